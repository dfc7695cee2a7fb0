"""A target: what distribution each supervised token should move toward.

    Q_t = γ_t δ_{y_t} + (1 − γ_t) π̃_t          trust × residual, always stop-gradient
    loss_t = s_t · CE(Q_t, p_t)                gradient on the logits: s_t (p_t − Q_t)

Every objective's logit gradient is g = a (p − δ) + Σ_j b_j p ⊙ (s_j − E_p[s_j]) with a, b_j, R_j and s_j held constant.
So a target is kept as a trust rule, which gives (a, b) from statistics of the token, and a list of residuals R_j, each
with a factor and the divergence that gives its score s_j. Under forward KL the term is b_j (p − R_j). A residual equal to
the student has no gradient: it is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qtarget.errors import ConfigError, check_range
from qtarget.targets.divergence import as_divergence
from qtarget.targets.residual import Student, Term, as_pool
from qtarget.targets.stats import STATISTICS, TokenStats
from qtarget.targets.trust import Rule, as_rule

# How the residual's part of the reported loss is written; the gradient is the same.
VALUE_FORMS = ("kl", "ce", "tempered_kl")
COMPOSED = "composed"


@dataclass(frozen=True)
class Target:
    """What to learn from each token: trust × residual (× scale). ``dataclasses.replace`` makes a copy with other parts.

    Args:
        trust: a rule of ``qtarget.trust``, a number, or a function of the token's statistics.
        residual: one of ``qtarget.residual``, or a list of (factor, residual) and (factor, residual, divergence), the
            divergence one of ``qtarget.divergence`` or forward KL; None: the student.
        scale: multiplies both parts; a number, a rule, or None for 1.
        value: how the reported loss writes a residual's part under forward KL: "kl" b·KL(R‖p), "ce" b·CE(R, p), or
            "tempered_kl" b·T²·KL(R₁‖R₂) for a pair of residuals at temperature T. Gradients do not depend on it; other
            divergences are written as b·D.
        share: how much of the target this is, from 0 to 1; the rest is plain SFT (a warm-up moves it from 0 to 1).
        name, hyperparameters, formula: how it is named and shown; ``qtarget.preset`` sets them. Comparisons ignore
            them, and a copy with other parts loses them.

    Raises:
        ConfigError: a part is not valid, or out of its range.

    >>> from dataclasses import replace
    >>> from qtarget.targets import residual, trust
    >>> target = Target(trust=trust.probability(), residual=residual.guided(eta=0.5))
    >>> sorted(target.requires)
    ['teacher']
    >>> replace(target, residual=residual.student()).requires
    frozenset()
    """

    trust: Rule = 1.0  # type: ignore[assignment]
    residual: tuple[Term, ...] = None  # type: ignore[assignment]
    scale: Rule | None = None
    value: str = field(default="kl", kw_only=True)
    share: float = field(default=1.0, kw_only=True)
    name: str = field(default=COMPOSED, kw_only=True, compare=False)
    hyperparameters: dict = field(default_factory=dict, kw_only=True, compare=False)
    formula: str = field(default="", kw_only=True, compare=False)
    # The name and what it was given to: a copy with other parts is not what its name says.
    _named: tuple = field(default=(), kw_only=True, compare=False, repr=False)

    if TYPE_CHECKING:  # what may be given; what is held stands above

        def __init__(
            self,
            trust: object = 1.0,
            residual: object = None,
            scale: object = None,
            *,
            value: str = "kl",
            share: float = 1.0,
            name: str = COMPOSED,
            hyperparameters: dict | None = None,
            formula: str = "",
        ) -> None: ...

    def __post_init__(self) -> None:
        if self.value not in VALUE_FORMS:
            raise ConfigError(f"value is {self.value!r}; use one of {', '.join(VALUE_FORMS)}")
        self._set(
            trust=as_rule(self.trust),
            residual=_terms(self.residual),
            scale=None if self.scale is None else as_rule(self.scale, "scale"),
            share=check_range("share", self.share, 0, 1),
        )
        if self.value == "tempered_kl" and _tempered(self.residual) is None:
            raise ConfigError(
                "value is 'tempered_kl'; it is for a pair of residuals whose weights cancel, the second of them the "
                "student at a temperature: [(T, teacher(T)), (-T, tempered(T))]"
            )
        parts = (self.name, self.trust, self.residual, self.scale, self.value)
        if self._named[:1] == parts[:1] and self._named != parts:
            self._set(name=COMPOSED, hyperparameters={}, formula="")
        self._set(_named=(self.name, *parts[1:]), formula=self.formula or self._composition())

    def _set(self, **fields: object) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def _composition(self) -> str:
        parts = " + ".join(f"{factor:g}·{pool.label}" for factor, pool, _ in self.residual)
        others = ", ".join(dict.fromkeys(str(t.divergence) for t in self.residual if not t.divergence.is_forward_kl))
        by = f", by {others}" if others else ""
        return f"Q = γ δ + (1 − γ) π̃,  γ = {self.trust.name or 'function'},  π̃ = {parts}{by}"

    @property
    def residual_terms(self) -> tuple[Term, ...]:
        """The terms that have a gradient: not the student itself, and not those with a weight of zero."""
        if self.trust.fixed_rest == 0 or self.share == 0:
            return ()
        return tuple(term for term in self.residual if term.factor != 0 and not term.pool.is_student)

    @property
    def needs_full_support(self) -> frozenset[str]:
        """The models that may not rule out a token: some divergence from a residual of theirs would be infinite."""
        terms = (term for term in self.residual_terms if term.divergence.needs_full_support)
        return frozenset(name for term in terms for name in term.pool.requires)

    @property
    def on_ruled_out(self) -> str:
        """What an error about such a model's logits says first; nothing where every divergence is finite."""
        names = dict.fromkeys(str(t.divergence) for t in self.residual_terms if t.divergence.needs_full_support)
        if not names:
            return ""
        return (
            f"divergence {' and '.join(names)} is infinite where a model rules out a token by -inf: use jsd, skew_kl, "
            "total_variation or another that is finite there, or a model without -inf; else "
        )

    @property
    def tempered(self) -> float | None:
        """1/T where the residuals are a pair whose weights cancel, the second the student at temperature T, and the
        value is written as one; else None."""
        return _tempered(self.residual_terms) if self.value == "tempered_kl" else None

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that the rules read."""
        if self.share == 0:
            return frozenset({"log_p_y"})
        return self.trust.needs | (self.scale.needs if self.scale is not None else frozenset())

    @property
    def requires(self) -> frozenset[str]:
        """The inputs that this target needs with its present numbers: at eta=0 or kl_weight=0 no model is needed."""
        from_rules = {STATISTICS[name] for name in self.needs if STATISTICS.get(name)}
        from_pools = {name for term in self.residual_terms for name in term.pool.requires}
        return frozenset(from_rules | from_pools)  # type: ignore[arg-type]

    @property
    def may_skip_tokens(self) -> bool:
        """Whether some tokens may have no gradient at all, so that it pays to look for them."""
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
        return a, [term.factor * rest for term in self.residual_terms]

    def label_loss(self, stats: TokenStats) -> Tensor:
        """The reported value of the label's part, [n]."""
        if self.share == 0:
            return -stats.log_p_y
        loss = self.trust.label_loss(stats)
        if self.scale is not None:
            loss = self.scale(stats) * loss
        return loss if self.share == 1 else self.share * loss - (1 - self.share) * stats.log_p_y

    def __str__(self) -> str:
        inside = ", ".join(f"{key}={value}" for key, value in self.hyperparameters.items())
        whole = f"{self.name}({inside})" if inside else self.name
        return whole if self.share == 1 else f"{self.share:g} {whole} + {1 - self.share:g} sft"

    @staticmethod
    def from_config(config: object) -> Target:
        """A target from its YAML form.

        ``"dft"`` | ``{preset: eaft, top_k: 20}`` | ``{trust: ..., residual: ..., scale: ...}`` |
        ``"my_pkg.my_module:my_target"`` | another library's setting, ``{use_eaft_loss: true}``. A mapping may also hold
        ``share: 0.5``, half this target and half plain SFT.
        """
        from qtarget.targets.yaml_form import target_from_config

        return target_from_config(config)

    def to_config(self, *, composed: bool = False) -> str | dict:
        """The YAML form; ``Target.from_config(target.to_config()) == target``.

        Args:
            composed: write a preset, too, as its trust, residual and scale, with its numbers filled in.

        >>> from qtarget.targets import presets
        >>> presets.build("target-sft", eta=0.3).to_config(composed=True)
        {'trust': 'probability', 'residual': {'guided': {'eta': 0.3, 'temperature': 1.0}}}
        """
        from qtarget.targets.yaml_form import target_to_config

        return target_to_config(self, composed)


def _terms(value: object) -> tuple[Term, ...]:
    """What ``Target`` takes as its residual: one, a list of (factor, residual[, divergence]), or None for the student."""
    if value is None:
        return (Term(1.0, Student()),)
    if not isinstance(value, (list, tuple)):
        return (Term(1.0, as_pool(value)),)
    terms = []
    for entry in value:
        if not isinstance(entry, (list, tuple)) or len(entry) not in (2, 3):
            raise ConfigError(
                f"residual holds {entry!r}; write a residual, or a list of (factor, residual) or (factor, residual, "
                "divergence)"
            )
        factor, pool, divergence = Term(*entry)
        term = Term(check_range("weight of a residual", factor), as_pool(pool), as_divergence(divergence))
        temperature = getattr(term.pool, "temperature", 1)
        if temperature != 1 and not term.divergence.is_forward_kl:
            raise ConfigError(
                f"temperature of {term.pool.label} is {temperature:g} with divergence {term.divergence.label}: it "
                "works only with forward_kl; leave it at 1, or write a flattened teacher as pool: {teacher: 0.5}"
            )
        terms.append(term)
    return tuple(terms)


def _tempered(terms: Sequence[Term]) -> float | None:
    if len(terms) != 2 or terms[0].factor != -terms[1].factor or not all(t.divergence.is_forward_kl for t in terms):
        return None
    pool = terms[1].pool
    at_temperature = pool.is_student_only and not pool.is_student and pool.offset_slope is None
    return pool.coefficient("student") if at_temperature and pool.coefficient("student") > 0 else None
