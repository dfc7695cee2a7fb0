"""A target: what distribution each supervised token should move toward.

    Q_t = γ_t δ_{y_t} + (1 − γ_t) π̃_t          trust × residual, always stop-gradient
    loss_t = s_t · CE(Q_t, p_t)                gradient on the logits: s_t (p_t − Q_t)

Every objective's logit gradient is g = a (p − δ) + Σ_j b_j (p − R_j) with a, b_j and R_j held constant, so a target
is kept as a trust rule, which gives (a, b) from statistics of the token, and a list of residuals R_j with factors.
A residual equal to the student has p − R = 0: it is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qtarget.errors import ConfigError, check_range
from qtarget.targets import residual as residuals
from qtarget.targets.residual import Pool
from qtarget.targets.stats import STATISTICS, TokenStats
from qtarget.targets.trust import Rule, as_rule

# How the residual's part of the reported loss is written; the gradient is the same.
VALUE_FORMS = ("kl", "ce", "tempered_kl")


@dataclass(frozen=True, init=False)
class Target:
    """What to learn from each token: trust × residual (× scale).

    Args:
        trust: a rule of ``qtarget.trust``, a number, or a function of the token's statistics.
        residual: a pool of ``qtarget.residual``, or a list of (factor, pool).
        scale: multiplies both parts; a number, a rule, or None for 1.
        value: how the reported loss writes the residual's part: "kl" b·KL(R‖p), "ce" b·CE(R, p), or "tempered_kl"
            b·T²·KL(R₁‖R₂) for a pair of residuals at temperature T. Gradients do not depend on it.
        share: how much of the target this is, from 0 to 1; the rest is plain SFT (a warm-up moves it from 0 to 1).

    >>> from qtarget.targets import residual, trust
    >>> target = Target(trust=trust.probability(), residual=residual.guided(eta=0.5))
    >>> sorted(target.requires)
    ['teacher']
    """

    trust: Rule
    terms: tuple[tuple[float, Pool], ...]
    scale: Rule | None = None
    value: str = "kl"
    share: float = 1.0
    name: str = "composed"
    hyperparameters: dict = field(default_factory=dict, compare=False)

    def __init__(
        self,
        trust: object = 1.0,
        residual: Pool | Sequence[tuple[float, Pool]] | None = None,
        scale: object = None,
        *,
        value: str = "kl",
        share: float = 1.0,
    ):
        if value not in VALUE_FORMS:
            raise ConfigError(f"value is {value!r}; use one of {', '.join(VALUE_FORMS)}")
        rule = as_rule(trust)
        written = [(1.0, residuals.student())] if residual is None else residual
        if isinstance(written, (Pool,)) or callable(written):
            written = [(1.0, residuals.as_pool(written))]
        terms = tuple((float(factor), residuals.as_pool(pool)) for factor, pool in written)
        set_ = object.__setattr__
        set_(self, "trust", rule)
        set_(self, "terms", terms)
        set_(self, "scale", None if scale is None else as_rule(scale, "scale"))
        if value == "tempered_kl" and _tempered(terms) is None:
            raise ConfigError(
                "value is 'tempered_kl'; it is for a pair of residuals whose weights cancel, the second of them the "
                "student at a temperature: [(T, teacher(T)), (-T, tempered(T))]"
            )
        set_(self, "value", value)
        set_(self, "share", check_range("share", share, 0, 1))
        set_(self, "name", "composed")
        set_(self, "hyperparameters", {})

    def named(self, name: str, hyperparameters: dict) -> Target:
        """The same target under a preset's name."""
        copy = _copy(self)
        object.__setattr__(copy, "name", name)
        object.__setattr__(copy, "hyperparameters", dict(hyperparameters))
        return copy

    def with_share(self, share: float) -> Target:
        """This target in part, plain SFT for the rest: g = share · g_target + (1 − share)(p − δ)."""
        copy = _copy(self)
        object.__setattr__(copy, "share", check_range("share", share, 0, 1))
        return copy

    @property
    def residual_terms(self) -> tuple[tuple[float, Pool], ...]:
        """The (factor, pool) pairs that have a gradient: neither the student itself nor a weight of zero."""
        if self.trust.fixed_rest == 0 or self.share == 0:
            return ()
        return tuple((factor, pool) for factor, pool in self.terms if factor != 0 and not pool.is_student)

    @property
    def tempered(self) -> float | None:
        """1/T where the residuals are a pair whose weights cancel, the second the student at temperature T, and the
        value is written as one; else None."""
        return _tempered(self.residual_terms) if self.value == "tempered_kl" else None

    @property
    def needs(self) -> frozenset[str]:
        """Statistics the rules read."""
        if self.share == 0:
            return frozenset({"log_p_y"})
        return self.trust.needs | (self.scale.needs if self.scale is not None else frozenset())

    @property
    def requires(self) -> frozenset[str]:
        """Inputs this target cannot do without, by value: at eta=0 or kl_weight=0 no model is needed."""
        from_rules = {STATISTICS[name] for name in self.needs if STATISTICS.get(name)}
        from_pools = {name for _, pool in self.residual_terms for name in pool.requires}
        return frozenset(from_rules | from_pools)  # type: ignore[arg-type]

    @property
    def may_skip_tokens(self) -> bool:
        """Whether some tokens may have no gradient at all, so that looking for them pays."""
        return self.share == 1 and self.trust.can_be_zero and (not self.residual_terms or self.trust.fixed_rest is None)

    def weights(self, stats: TokenStats) -> tuple[Tensor, list[Tensor]]:
        """(a, [b_j]): weights of the label and of each residual of ``residual_terms``, [n] each."""
        if self.share == 0:
            return torch.ones_like(stats.log_p_y), []
        a, rest = self.trust.weights(stats)
        for weight in (a, rest):
            if not isinstance(weight, Tensor) or weight.shape != stats.log_p_y.shape:
                got = f"a tensor of shape {list(weight.shape)}" if isinstance(weight, Tensor) else repr(weight)
                raise ConfigError(
                    f"the trust rule gave {got}; return one number per token, a tensor shaped like stats.log_p_y"
                )
        if self.scale is not None:
            scale = self.scale(stats)
            a, rest = scale * a, scale * rest
        if self.share != 1:
            a, rest = self.share * a + (1 - self.share), self.share * rest
        return a, [factor * rest for factor, _ in self.residual_terms]

    def label_loss(self, stats: TokenStats) -> Tensor:
        """The reported value of the label's part, [n]."""
        if self.share == 0:
            return -stats.log_p_y
        loss = self.trust.label_loss(stats)
        if self.scale is not None:
            loss = self.scale(stats) * loss
        return loss if self.share == 1 else self.share * loss - (1 - self.share) * stats.log_p_y

    @property
    def formula(self) -> str:
        """One line of mathematics: the preset's formula, or the parts of a composed target."""
        from qtarget.targets import presets

        if self.name in presets.names():
            return presets.describe(self.name).formula
        parts = " + ".join(f"{factor:g}·{pool.written[0]}" for factor, pool in self.terms)
        return f"Q = γ δ + (1 − γ) π̃,  γ = {self.trust.name or 'function'},  π̃ = {parts}"

    def __str__(self) -> str:
        inside = ", ".join(f"{key}={value}" for key, value in self.hyperparameters.items())
        whole = f"{self.name}({inside})" if inside else self.name
        return whole if self.share == 1 else f"{self.share:g} {whole} + {1 - self.share:g} sft"

    @staticmethod
    def from_config(config: object) -> Target:
        """A target from its YAML form.

        ``"dft"`` | ``{preset: eaft, top_k: 20}`` | ``{trust: ..., residual: ..., scale: ...}`` |
        ``"my_pkg.my_module:my_target"`` | a peer's spelling such as ``{use_eaft_loss: true}``. A mapping may also hold
        ``share: 0.5``, half this target and half plain SFT.
        """
        from qtarget.targets.yaml_form import target_from_config

        return target_from_config(config)

    def to_config(self) -> str | dict:
        """The YAML form; ``Target.from_config(target.to_config()) == target``."""
        from qtarget.targets.yaml_form import target_to_config

        return target_to_config(self)


def _tempered(terms: Sequence[tuple[float, Pool]]) -> float | None:
    if len(terms) != 2:
        return None
    (first, _), (second, pool) = terms
    cancels = (
        first == -second
        and pool.is_student_only
        and not pool.is_student
        and pool.offset_slope is None
        and pool.student > 0
    )
    return pool.student if cancels else None


def _copy(target: Target) -> Target:
    """A copy whose fields may be set (``dataclasses.replace`` would call the friendlier ``__init__``)."""
    copy = object.__new__(Target)
    for name in ("trust", "terms", "scale", "value", "share", "name", "hyperparameters"):
        object.__setattr__(copy, name, getattr(target, name))
    return copy
