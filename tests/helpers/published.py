"""Every preset at many values of its hyperparameters, beside the loss its paper prints.

The printed losses stand beside the presets and use nothing of qtarget's rules, residuals and engine: where gradients by
autograd in float64 differ, one of the two is wrong. logits [n, v], labels [n] → loss [n].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import qtarget as qt
from qtarget.targets.presets import printed_loss
from qtarget.targets.presets.anchors import psft_loss as psft
from qtarget.targets.presets.printed import dft, label_log_p
from qtarget.targets.presets.printed import nll as sft
from qtarget.targets.presets.teachers import kd_loss as kd
from qtarget.targets.presets.teachers import target_sft_loss as target_sft

__all__ = ["CASES", "Case", "dft", "kd", "label_log_p", "psft", "sft", "target_sft", "target_sft_cross_entropy"]


def target_sft_cross_entropy(
    logits: Tensor, labels: Tensor, *, eta: float, teacher_temperature: float, teacher_logits: Tensor | None, **_: Any
) -> Tensor:
    """CE(sg Q, p) with Q = p_y δ + (1 − p_y) π̃, arXiv:2606.11189: with the part that has no gradient."""
    log_p = logits.log_softmax(-1)
    log_r = log_p
    if teacher_logits is not None:
        log_r = ((1 - eta) * log_p + eta * (teacher_logits / teacher_temperature).log_softmax(-1)).log_softmax(-1)
    p_y = label_log_p(logits, labels).exp()
    q = ((1 - p_y)[:, None] * log_r.exp()).scatter_add(-1, labels[:, None], p_y[:, None])
    return -(q.detach() * log_p).sum(-1)


@dataclass(frozen=True)
class Case:
    """A preset with hyperparameters and the inputs it needs.

    ``loss`` computes the printed loss; ``instead``: another one in its place, to see a check fail.
    """

    id: str
    preset: str
    hyperparameters: dict[str, Any]
    needs: tuple[str, ...] = ()
    instead: Callable[..., Tensor] | None = None

    def loss(self, logits: Tensor, labels: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Per-token loss [n]; of `inputs` only what this objective takes is used."""
        if self.instead is not None:
            return self.instead(logits, labels)
        printed = printed_loss(qt.preset(self.preset, **self.hyperparameters))
        assert printed is not None
        return printed(logits, labels, {name: inputs.get(name) for name in self.needs})


def cases(preset: str, needs: tuple[str, ...], *hyperparameters: dict[str, Any]) -> list[Case]:
    """One at the defaults, and one for each of ``hyperparameters``."""
    named = [",".join(f"{name}={value}" for name, value in given.items()) for given in hyperparameters]
    return [
        Case(preset, preset, {}, needs),
        *(Case(f"{preset}:{name}", preset, given, needs) for name, given in zip(named, hyperparameters, strict=True)),
    ]


DIVERGENCES: list[Any] = [
    "reverse_kl",
    *({"jsd": {"beta": beta}} for beta in (0.1, 0.5, 0.9)),
    *({name: {"alpha": alpha}} for name in ("skew_kl", "skew_reverse_kl") for alpha in (0.1, 0.6)),
    "total_variation",
    *({"alpha": {"alpha": alpha}} for alpha in (0.5, 0.0, 1.0)),
    "todi",
]
REFERENCE = ("reference_logits", "vocab_size")
TEACHER = ("teacher_logits", "vocab_size")

CASES = [
    *cases("sft", ()),
    *cases("dft", ()),
    *cases("beyond-log", (), *({"alpha": alpha} for alpha in (0.0, 0.5, 1.0, 8.0, -0.5))),
    *cases("talr", (), {"tau": 2.0}, {"tau": 0.5}),
    *cases("mixce", (), *({"mixing_ratio": share} for share in (0.0, 0.2, 1.0))),
    *cases("gold-floor", (), *({"floor": floor} for floor in (0.0, 0.2, 1.0))),
    *cases("tailr", (), *({"gamma": gamma} for gamma in (0.01, 0.5, 1.0))),
    *cases("trsft", (), {"high": 1.0}, {"high": 0.5}),
    *cases("luffy", (), {"gamma": 0.3}),
    *cases("chord-phi", ()),
    *cases("infosft", (), {"confidence": 0.6}),
    *cases("idft", (), {"strength": 0.0}, {"strength": 0.3, "beta": 2.0}, {"low": 0.5, "high": 1.5}),
    *cases("deft", ()),
    *cases("sed-sft", (), {"weight": 1.0, "top_k": 1, "tau": 1.0}, {"weight": 0.5, "top_k": 3, "tau": 0.5}),
    *cases("focal", (), {"gamma": 0.0}, {"gamma": 1.0}, {"held": True}, {"gamma": 3.0, "held": True}),
    *cases("poly", (), {"epsilon": -1.0}, {"epsilon": 5.0}),
    *cases("symmetric-ce", (), {"alpha": 0.0, "beta": 0.25}, {"alpha": 0.5, "log_zero": -0.5}),
    *cases(
        "profit",
        (),
        {"tau": 0.01},
        {"tau": 0.02, "direction": "higher"},
        {"tau": 0.1, "direction": "lower"},
        {"tau_low": 0.01, "tau_high": 0.5, "direction": "middle"},
    ),
    *cases(
        "eaft",
        (),
        {"top_k": 5},
        {"top_k": 2},
        {"power": 2.0},
        {"power": 0.5},
        {"power": 0.0},
        {"normalizer": "log_k", "top_k": 8, "power": 3.0},
        {"normalizer": 3.0},
        {"normalizer": 3.0, "power": 2.0},
        {"normalizer": "none"},
        {"normalizer": "none", "top_k": 10, "power": 2.0},
    ),
    *cases("prift", REFERENCE, {"by": "mass"}, {"by": "mass", "threshold": 0.05}),
    *cases("stm", REFERENCE, {"perplexity": 20.0}),
    *cases("iw-sft", ("weight",)),
    *cases("cft", ("critical",)),
    *cases("label-smoothing", ("vocab_size",), *({"smoothing": epsilon} for epsilon in (0.0, 0.3, 0.9))),
    *cases("sft-kl", REFERENCE, {"kl_weight": 0.5}, {"kl_weight": 3.0}, {"kl_weight": 0.5, "direction": "reverse"}),
    Case("sft-kl:kl_weight=0.0", "sft-kl", {"kl_weight": 0.0}),
    *cases("asft", REFERENCE, {"kl_weight": 0.1}, {"kl_weight": 0.8}, {"direction": "reverse"}),
    Case("asft:kl_weight=0.0", "asft", {"kl_weight": 0.0}),
    *cases("sft-entropy", ("vocab_size",), {"entropy_weight": 0.0}, {"entropy_weight": 1.0}),
    *cases("gift", REFERENCE, {"beta": 2.0}, {"beta": 0.1}),
    Case("gift:toward=teacher", "gift", {"beta": 3.0, "toward": "teacher"}, TEACHER),
    *cases("psft", ("old_logps",), {"clip": 0.5}, {"clip": 0.2, "clip_high": 0.28}),
    *cases("gem", (), *({"beta": beta, "h": h} for h in ("linear", "logsigmoid") for beta in (0.7, 0.3, 1.0))),
    *cases("kd", TEACHER, *({"temperature": t} for t in (1.0, 2.0, 0.5))),
    *cases("kd", TEACHER, *({"divergence": divergence} for divergence in DIVERGENCES))[1:],
    *cases("todi", TEACHER, {"slope": 0.0}, {"slope": 3.0}),
    *cases("taid", TEACHER, {"t": 1.0}, {"t": 0.1}),
    Case("taid:t=0.0", "taid", {"t": 0.0}),
    *cases(
        "kd-hybrid",
        TEACHER,
        *({"kd_weight": weight, "temperature": t} for weight, t in ((0.2, 1.0), (0.5, 2.0), (0.9, 2.0), (1.0, 1.0))),
    ),
    *cases("kd-hybrid", TEACHER, {"kd_weight": 0.2, "divergence": "jsd"})[1:],
    Case("kd-hybrid:kd_weight=0.0,temperature=1.0", "kd-hybrid", {"kd_weight": 0.0, "temperature": 1.0}),
    *(
        Case(f"target-sft:eta=0.0,teacher_temperature={t}", "target-sft", {"eta": 0.0, "teacher_temperature": t})
        for t in (1.0, 2.0)
    ),
    *cases(
        "target-sft", TEACHER, *({"eta": eta, "teacher_temperature": t} for eta in (0.3, 0.5, 1.0) for t in (1.0, 2.0))
    ),
]
CASES += cases("target-sft", TEACHER, {"eta": 0.3, "divergence": "reverse_kl"}, {"divergence": "skew_kl"})[1:]
# A preset without cases of its own is tried at its defaults.
INPUTS = {"teacher": TEACHER, "reference": REFERENCE, "old_policy": ("old_logps",)}
for _name in set(qt.presets.names()) - {case.preset for case in CASES}:
    _needs = [INPUTS.get(need, (need,)) for need in sorted(qt.preset(_name).requires)]
    CASES.append(Case(_name, _name, {}, tuple(dict.fromkeys(name for names in _needs for name in names))))


def kind(case: Case) -> tuple:
    """What makes a case another path through the code: its preset, words among its numbers, what they leave out."""
    words = [(key, next(iter(v)) if isinstance(v, dict) else v) for key, v in sorted(case.hyperparameters.items())]
    target = qt.preset(case.preset, **case.hyperparameters)
    named = tuple(word for word in words if isinstance(word[1], str))
    return case.preset, named, len(target.residual_terms), target.tempered is None


# The first of each kind: for tests in which another number is no other path.
KINDS = [*{kind(case): case for case in reversed(CASES)}.values()][::-1]
