"""Who computes a timed target: qtarget's backends, and what else there is. Each method gives a loss to call backward on.

Peers are imported when a method is made, so that one that is not installed is reported and nothing else is lost. Liger's
and Apple's kernels run on GPUs only; their calls follow liger-kernel 0.8.5 and cut-cross-entropy 25.1.1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import qtarget as qt
from gpu_run import full_logits
from gpu_run.inputs import TIMED, Inputs, Timed, timed

Loss = Callable[[Inputs], Tensor]
# For which inductor is asked, on full logits and for qtarget's row functions: each compiles for ten seconds or more.
COMPILED = ("dft", "target-sft")


@dataclass(frozen=True)
class Method:
    """A way to compute a target. ``make`` gives its loss, or raises where it is not available.

    Attributes:
        compiles: whether inductor has to compile something. exact: whether its gradient is the target's, up to rounding.
    """

    name: str
    target: Timed
    make: Callable[[], Loss]
    compiles: bool = False
    exact: bool = True

    @property
    def key(self) -> str:
        return f"{self.target.name}: {self.name}"


def qtarget_loss(x: Inputs, one: Timed, backend: str) -> Tensor:
    given = one.teacher(x)
    return qt.linear_target_loss(x.hidden, x.weight, x.labels, one.target, backend=backend, **given).loss


def under_autocast(x: Inputs, one: Timed, backend: str) -> Tensor:
    """As a trainer with float32 weights in mixed precision; the weights are x's own, cast up beforehand by the caller."""
    with torch.autocast(x.device.type, torch.bfloat16):
        return qtarget_loss(x, one, backend)


def _qtarget(one: Timed, backend: str) -> Method:
    make = functools.partial(functools.partial, qtarget_loss, one=one, backend=backend)
    return Method(f"qtarget {backend}", one, make, compiles=backend == "compiled")


def _eager(one: Timed) -> Method:
    return Method("eager full logits", one, lambda: full_logits.BY_NAME[one.name])


def _compile(one: Timed) -> Method:
    def make() -> Loss:
        return torch.compile(full_logits.BY_NAME[one.name], dynamic=False)

    return Method("torch.compile of full logits", one, make, compiles=True)


# -- peers -------------------------------------------------------------------------------------------------------------


def liger_cross_entropy(scaled: bool) -> Loss:
    """``scaled``: each token's loss times its probability, which is dft."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(use_token_scaling=scaled)
    return lambda x: _first(loss(x.weight, x.hidden, x.labels))


def liger_divergence(temperature: float) -> Loss:
    """β = 0 is KL(teacher ‖ student), whose gradient on the logits is kd's over T²; the factor is put in front."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.0, temperature=temperature)
    scale = temperature**2
    return lambda x: scale * loss(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, None)


def cut_cross_entropy(filter_eps: str | None, scaled: bool) -> Loss:
    """``filter_eps="high"`` is its default, which leaves small gradients out; None computes all."""
    from cut_cross_entropy import linear_cross_entropy

    def loss(x: Inputs) -> Tensor:
        options = {"reduction": "none" if scaled else "mean", "filter_eps": filter_eps}
        nll = linear_cross_entropy(x.hidden, x.weight, x.labels, **options)
        return ((-nll).detach().exp() * nll).mean() if scaled else nll

    return loss


def torch_cross_entropy() -> Loss:
    """PyTorch's own chunked head and cross-entropy, since 2.13."""
    function = F.linear_cross_entropy
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x: function(x.hidden, x.weight, x.labels, options=options)


def trl_log_probs(scaled: bool) -> Loss:
    """TRL's head with the statistics its SFT trainer asks for."""
    from trl.kernels import ChunkedLogProbFunction

    fields = ("entropy", "is_top1")

    def loss(x: Inputs) -> Tensor:
        log_p_y = ChunkedLogProbFunction.apply(x.hidden, x.weight, None, x.labels, 1.0, 32768, None, 1.0, fields)[0]
        return -((log_p_y.detach().exp() if scaled else 1) * log_p_y).mean()

    return loss


def trl_divergence(temperature: float) -> Loss:
    """β = 0 is KL(teacher ‖ student)."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(x: Inputs) -> Tensor:
        both = (x.hidden, x.weight, None, x.teacher_hidden, x.teacher_weight, None)
        return temperature**2 * ChunkedDivergenceFunction.apply(*both, 0.0, temperature)[0].mean()

    return loss


def _first(found: Tensor | tuple) -> Tensor:
    """Liger returns a tensor, or an object whose first field it is."""
    if isinstance(found, Tensor):
        return found
    return found[0] if isinstance(found, tuple) else found.loss


def _peers() -> list[Method]:
    found = []
    for name, scaled in (("sft", False), ("dft", True)):
        one = timed(name)
        found += [
            Method("Liger fused linear CE", one, functools.partial(liger_cross_entropy, scaled)),
            Method("cut cross-entropy", one, functools.partial(cut_cross_entropy, "high", scaled), exact=False),
            Method("cut cross-entropy, no filter", one, functools.partial(cut_cross_entropy, None, scaled)),
            Method("TRL chunked head", one, functools.partial(trl_log_probs, scaled)),
        ]
    found.append(Method("torch linear_cross_entropy", timed("sft"), torch_cross_entropy))
    for name, temperature in (("kd", 1.0), ("kd T=2", 2.0)):
        one = timed(name)
        found += [
            Method("Liger fused linear JSD", one, functools.partial(liger_divergence, temperature)),
            Method("TRL chunked divergence", one, functools.partial(trl_divergence, temperature)),
        ]
    return found


def all_methods(own: str) -> list[Method]:
    """Every method; ``own``: qtarget's backend that is judged, first of each target."""
    found = [_qtarget(one, own) for one in TIMED]
    if own != "torch":
        found += [_qtarget(one, "torch") for one in TIMED]
    found += [_eager(one) for one in TIMED]
    found += _peers()
    for name in COMPILED:
        found += [_compile(timed(name)), _qtarget(timed(name), "compiled")]
    return found


# -- what none can do without ------------------------------------------------------------------------------------------


@torch.no_grad()
def bare_matmuls(x: Inputs, teacher: bool, rows: int) -> None:
    """Logits, dH and dW, and a teacher's logits, ``rows`` at a time in the head's dtype: nothing else."""
    n, v = x.shape.tokens, x.shape.vocab
    z = torch.empty(min(rows, n), v, dtype=x.weight.dtype, device=x.device)
    other = torch.empty_like(z) if teacher else None
    d_weight = torch.empty_like(x.weight)
    for begin in range(0, n, rows):
        h = x.hidden[begin : begin + rows]
        out = z[: len(h)]
        torch.mm(h, x.weight.T, out=out)
        if other is not None:
            torch.mm(x.teacher_hidden[begin : begin + rows], x.teacher_weight.T, out=other[: len(h)])
        torch.mm(out, x.weight)
        if begin:
            d_weight.addmm_(out.T, h)
        else:
            torch.mm(out.T, h, out=d_weight)
