"""The named objectives, an entry each: names, YAML, help, docs and tests read this file.

A preset is a composition of a trust rule and a residual with the published defaults. ``g = a (p − δ) + Σ b (p − R)``
is its gradient on the logits; everything in a, b and R is held constant.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from qtarget.errors import ConfigError, check_range, unknown
from qtarget.targets import residual, trust
from qtarget.targets.target import Target


@dataclass(frozen=True)
class Preset:
    """What is written about an objective, beside the function that builds it."""

    name: str
    build: Callable[..., Target]
    formula: str
    trusts: str
    rest: str
    source: str
    aliases: tuple[str, ...] = ()

    @property
    def parameters(self) -> dict[str, object]:
        """Hyperparameters with their defaults."""
        return {name: p.default for name, p in inspect.signature(self.build).parameters.items()}

    @property
    def summary(self) -> str:
        return inspect.getdoc(self.build) or ""


_PRESETS: dict[str, Preset] = {}


def preset(name: str, *, formula: str, trusts: str, rest: str, source: str, aliases: tuple[str, ...] = ()):
    """Register the function below as an objective."""

    def add(build: Callable[..., Target]) -> Callable[..., Target]:
        _PRESETS[name] = Preset(name, build, formula, trusts, rest, source, aliases)
        return build

    return add


def names() -> list[str]:
    """Names of all objectives, from plain SFT to Target-SFT."""
    return list(_PRESETS)


def describe(name: str) -> Preset:
    """The entry of an objective, by name or alias; an unknown name raises with the nearest one."""
    for entry in _PRESETS.values():
        if name == entry.name or name in entry.aliases:
            return entry
    raise unknown("target", name, _PRESETS)


def build(name: str, /, **hyperparameters: object) -> Target:
    """``qtarget.preset``: an objective by name.

    Args:
        name: one of ``qtarget.presets.names()``, or an alias ("nll", "p-loss").
        **hyperparameters: those of the objective; see ``qtarget targets show NAME``.

    Raises:
        ConfigError: unknown name or hyperparameter (the valid ones are listed), or a value out of range.

    >>> str(build("target-sft", eta=0.3))
    'target-sft(eta=0.3, teacher_temperature=1.0)'
    """
    entry = describe(name)
    known = entry.parameters
    for parameter in hyperparameters:
        if parameter not in known:
            if not known:
                raise ConfigError(f"{entry.name} has no parameter {parameter!r}; it takes none")
            raise unknown(f"parameter of {entry.name}", parameter, known)
    try:
        target = entry.build(**hyperparameters)
    except ConfigError as error:
        error.during(f"target {entry.name}")
        raise
    return target.named(entry.name, {**known, **hyperparameters})


def _forward_only(direction: str) -> None:
    if direction == "reverse":
        raise ConfigError(
            "direction is 'reverse'; only 'forward', KL(reference ‖ student), is available: "
            "reverse KL is not of the form a(p − δ) + b(p − R)"
        )
    if direction != "forward":
        raise unknown("direction", direction, ("forward",))


@preset(
    "sft",
    formula="L = −log p_y;  a = 1",
    trusts="every label fully",
    rest="nowhere: Q = δ",
    source="cross-entropy",
    aliases=("nll",),
)
def sft() -> Target:
    """Fit every observed token as if it were the only right one."""
    return Target(trust=trust.constant(1.0), residual=residual.student())


@preset(
    "dft",
    formula="L = −sg(p_y) log p_y;  a = p_y",
    trusts="p_y",
    rest="the student",
    source="arXiv:2508.05629",
    aliases=("p-loss",),
)
def dft() -> Target:
    """Learn least from tokens the student finds unlikely: noise is ignored, and so is news."""
    return Target(trust=trust.probability(), residual=residual.student())


@preset(
    "beyond-log",
    formula="L = (1 − p_y^alpha)/alpha;  a = p_y^alpha",
    trusts="p_y^alpha",
    rest="the student",
    source="arXiv:2510.00526",
)
def beyond_log(alpha: float = 1.0) -> Target:
    """A family: alpha 0 is sft, 1 has dft's gradient, more trusts only the likely, less than 0 leaves the simplex."""
    return Target(trust=trust.probability_power(alpha), residual=residual.student())


@preset(
    "profit",
    formula="L = −m log p_y;  a = m = 1[p_y ≥ tau]",
    trusts="1 where p_y ≥ tau, else 0",
    rest="the student",
    source="arXiv:2601.09195",
)
def profit(
    tau: float = 0.1, direction: str = "higher", tau_low: float | None = None, tau_high: float | None = None
) -> Target:
    """Drop tokens below a probability; "lower" drops those above, "middle" keeps tau_low ≤ p_y < tau_high."""
    return Target(trust=trust.probability_threshold(tau, direction, tau_low, tau_high), residual=residual.student())


@preset(
    "eaft",
    formula="L = −sg(a) log p_y;  a = (H_k / ln k)^power",
    trusts="the student's doubt, H_k / ln k",
    rest="the student",
    source="arXiv:2601.02151",
)
def eaft(top_k: int = 20, power: float = 1.0, normalizer: str | float = "log_k") -> Target:
    """Learn most where the student is undecided. Blind to the label: noise keeps its weight there."""
    return Target(trust=trust.entropy(top_k, power, normalizer), residual=residual.student())


@preset(
    "iw-sft",
    formula="L = −w log p_y;  a = w",
    trusts="w, the weight of the row",
    rest="the student",
    source="arXiv:2507.12856",
)
def iw_sft() -> Target:
    """Importance-weighted rows, weights given as data; w > 1 leaves the simplex."""
    return Target(trust=trust.trajectory_weight(), residual=residual.student())


@preset(
    "cft",
    formula="L = −c log p_y;  a = c ∈ {0, 1}",
    trusts="1 on critical tokens, else 0",
    rest="the student",
    source="arXiv:2510.10974",
)
def cft() -> Target:
    """Train only the tokens marked as critical; the denominator counts all supervised tokens."""
    return Target(trust=trust.token_mask(), residual=residual.student())


@preset(
    "label-smoothing",
    formula="L = (1 − ε)(−log p_y) + ε CE(U, p);  a = 1 − ε, b = ε, R = U",
    trusts="1 − ε",
    rest="every token alike",
    source="arXiv:1512.00567",
)
def label_smoothing(smoothing: float = 0.1) -> Target:
    """Keep a share ε for every token alike, padded rows of the head left out (Transformers averages over them too)."""
    check_range("smoothing", smoothing, 0, 1)
    return Target(trust=trust.constant(1 - smoothing), residual=residual.uniform(), value="ce")


@preset(
    "sft-kl",
    formula="L = −log p_y + λ KL(ref ‖ p);  a = 1, b = λ, R = ref",
    trusts="every label fully",
    rest="the reference, λ beside the label",
    source="arXiv:2509.23753 (baseline)",
)
def sft_kl(kl_weight: float = 0.1, direction: str = "forward") -> Target:
    """Plain SFT with a spring back to the reference, KL(reference ‖ student) over the full vocabulary."""
    _forward_only(direction)
    check_range("kl_weight", kl_weight, 0)
    return Target(trust=trust.anchored(trust.constant(1.0), kl_weight), residual=residual.reference())


@preset(
    "asft",
    formula="L = −sg(p_y) log p_y + λ KL(ref ‖ p);  a = p_y, b = λ, R = ref",
    trusts="p_y",
    rest="the reference, λ beside the label",
    source="arXiv:2509.23753",
)
def asft(kl_weight: float = 0.05, direction: str = "forward") -> Target:
    """DFT with a spring back to the starting model."""
    _forward_only(direction)
    check_range("kl_weight", kl_weight, 0)
    return Target(trust=trust.anchored(trust.probability(), kl_weight), residual=residual.reference())


@preset(
    "psft",
    formula="L = −min(r, clip(r, 1 − clip, 1 + clip_high));  a = r·1[r < 1 + clip_high], r = p_y / p_old",
    trusts="p_y / p_old, until clipped",
    rest="the student",
    source="arXiv:2508.17784",
)
def psft(clip: float = 0.2, clip_high: float | None = None) -> Target:
    """PPO's clip on demonstrations (column old_logps); with r = 1 it is sft."""
    return Target(trust=trust.clipped_ratio(clip, clip_high), residual=residual.student())


@preset(
    "gem",
    formula="L = CE(δ, p) − CE(q, p);  a = 1, b = −1, R = q = softmax(z/beta)",
    trusts="every label fully",
    rest="away from the sharpened student",
    source="arXiv:2408.16673",
)
def gem(beta: float = 0.7, h: str = "linear") -> Target:
    """Take mass from what the sharpened student favours and leave the rest diverse; signed, so Q leaves the simplex."""
    rule = trust.anchored(trust.constant(1.0), -1.0)
    scale = trust.offset_mass() if h == "logsigmoid" else None
    return Target(trust=rule, residual=residual.sharpened(beta, h), scale=scale, value="ce")


def _distilled(kd_weight: float, temperature: float, value: str) -> Target:
    """The label at 1 − kd_weight beside T²·KL(teacher ‖ student) at temperature T."""
    check_range("temperature", temperature, 0, open_low=True)
    rule = trust.constant(1 - kd_weight)
    if temperature == 1:
        return Target(trust=rule, residual=residual.teacher(), value=value)
    pair = [(temperature, residual.teacher(temperature)), (-temperature, residual.tempered(temperature))]
    return Target(trust=rule, residual=pair, value="tempered_kl")


@preset(
    "kd",
    formula="L = CE(t, p);  a = 0, b = 1, R = t.  At T ≠ 1: T² KL(t^T ‖ p^T)",
    trusts="0",
    rest="the teacher",
    source="arXiv:1503.02531",
)
def kd(temperature: float = 1.0) -> Target:
    """Forget the labels and match the teacher on the demonstrations' contexts."""
    return _distilled(1.0, temperature, "ce")


@preset(
    "kd-hybrid",
    formula="L = (1 − λ)(−log p_y) + λ KL(t ‖ p);  a = 1 − λ, b = λ, R = t",
    trusts="1 − λ",
    rest="the teacher",
    source="arXiv:1503.02531",
)
def kd_hybrid(kd_weight: float = 0.5, temperature: float = 1.0) -> Target:
    """A fixed mixture of label and teacher."""
    check_range("kd_weight", kd_weight, 0, 1)
    return _distilled(kd_weight, temperature, "kl")


@preset(
    "target-sft",
    formula="Q = p_y δ + (1 − p_y) R,  R = softmax((1 − η) z + η z_T / T);  a = p_y, b = 1 − p_y",
    trusts="p_y",
    rest="student^(1 − η) · teacher^η",
    source="arXiv:2606.11189",
)
def target_sft(eta: float = 0.5, teacher_temperature: float = 1.0) -> Target:
    """Trust the label as far as the student does, and let the teacher steer the rest; η = 0 is dft."""
    check_range("teacher_temperature", teacher_temperature, 0, open_low=True)
    return Target(trust=trust.probability(), residual=residual.guided(eta, teacher_temperature))
