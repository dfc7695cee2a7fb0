"""``linear_target_loss``: hidden states × head → loss and gradients, in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qtarget.errors import ConfigError
from qtarget.losses import engine, inputs
from qtarget.losses.engine import EngineCall, Result, chunks, matmuls
from qtarget.losses.engine.sizes import check_chunk
from qtarget.losses.heads import Head, TopK, check_head
from qtarget.losses.inputs import (
    Checks,
    Tokens,
    check_options,
    check_requirements,
    denominator,
    real_vocabulary,
    supervised,
)
from qtarget.losses.output import ALL_STATISTICS, LossOutput
from qtarget.targets import Target


def linear_target_loss(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    target: Target | Sequence[Target],
    *,
    which: Tensor | None = None,
    head_bias: Tensor | None = None,
    teacher: Head | TopK | None = None,
    reference: Head | TopK | None = None,
    old_logps: Tensor | None = None,
    weight: Tensor | None = None,
    critical: Tensor | None = None,
    vocab_size: int | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    z_loss: float = 0.0,
    stats: str = "basic",
    backend: str = "auto",
    chunk_rows: int | None = None,
) -> LossOutput:
    """The loss of a target from hidden states; equal to ``target_loss`` on their logits.

        logits = softcap(logit_scale · (hidden @ head_weight.T + head_bias))

    The gradient is computed in the forward pass, chunk by chunk, so that only dH and dW are kept. With
    ``reduction="none"`` each token's upstream gradient is not yet known then, so backward runs the chunks again.

    Args:
        hidden: [..., d], float32, float64, bfloat16 or float16. head_weight: [V, d]; without ``requires_grad`` no dW is
            formed. head_bias: [V] or None.
        labels: [...] int64; nothing is shifted: labels[i] belongs to hidden[i]. Ignored positions cost nothing.
        target: what to learn; see ``qtarget.preset``. A list: each token has its own, in one pass with one dW.
        which: [...] int64 in the labels' shape: the index of each token's target, if ``target`` is a list.
        teacher, reference: ``Head`` (hidden states of the same positions, of any width) or ``TopK``.
        old_logps: [...] log p_y of the old policy. weight: [...] or one per row. critical: [...] booleans.
        vocab_size: real tokens of a padded head.
        reduction: "mean" divides by ``num_items`` if given, else by the number of supervised labels; weights do not
            change the divisor.
        z_loss: c of c · lse² on each token, as in ``target_loss``; in plain PyTorch, whatever the backend.
        stats: "basic", or "all" to add kl_q.
        backend: the code that computes each row: "auto"; "torch", which runs everywhere; "triton", on NVIDIA GPUs;
            "compiled", by inductor, which starts in about ten seconds. Logits are float32 in all (float64 for float64).
        chunk_rows: tokens per chunk; None: chosen from the device and the memory budget.

    Returns:
        LossOutput: the published value of the objective and per-token statistics.

    Raises:
        ConfigError: an input that the target needs is missing, a shape or value is wrong, or logits are not finite.
        RuntimeError: a second backward pass through the same call, or second derivatives.
    """
    targets = _targets(target, which)
    check_options(reduction, stats, z_loss)
    check_head(hidden, head_weight, head_bias, logit_softcap, prefix="head_")
    check_chunk(chunk_rows, head_weight.shape[0])
    vocab_size = real_vocabulary(vocab_size, head_weight.shape[0])
    given: dict[str, Any] = {"teacher": teacher, "reference": reference}
    columns = {"old_logps": old_logps, "weight": weight, "critical": critical}
    for one in targets:
        check_requirements(one, given, columns, "{}=qt.Head(hidden, weight) or qt.TopK(ids, logprobs)")
    compute = matmuls.compute_dtype(hidden, head_weight)
    dtype = matmuls.result_dtype(compute)
    backend = engine.choose(backend, hidden.device, dtype)
    aux = {name: given[name] for name in given if any(name in one.requires for one in targets)}
    _check_devices(hidden, {"head_weight": head_weight, "head_bias": head_bias, "labels": labels, "which": which}, aux)
    checks = Checks(hidden.device)
    tokens = supervised(
        labels, hidden.shape[:-1], "hidden", vocab_size, ignore_index, dtype, columns, targets, which, checks
    )
    for name, other in aux.items():
        _check_aux(name, other, tokens, vocab_size, checks, targets)
    call = EngineCall(
        targets=targets,
        tokens=tokens,
        aux=aux,
        vocab_size=vocab_size,
        logit_scale=float(logit_scale),
        logit_softcap=logit_softcap,
        z_loss=float(z_loss),
        with_kl=stats == "all",
        backend=backend,
        compute=compute,
        aux_compute={name: _aux_compute(head, compute) for name, head in aux.items() if isinstance(head, Head)},
        checks=checks,
        rows_per_chunk=chunk_rows,
    )
    per_token = reduction == "none"
    scale = denominator(reduction, tokens, num_items)
    # Function.apply hides whether a graph is being recorded, so that is asked here.
    loss = _LinearTargetLoss.apply(hidden, head_weight, head_bias, call, per_token, scale, torch.is_grad_enabled())
    found = call.statistics
    return LossOutput(
        loss, {name: tokens.scatter(found[name], float("nan")) for name in ALL_STATISTICS if name in found}
    )


def _student(call: EngineCall, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
    flat = hidden.detach().reshape(-1, hidden.shape[-1])
    bias = None if bias is None else bias.detach()
    return Head(flat, weight.detach(), bias, call.logit_scale, call.logit_softcap)


class _LinearTargetLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, call, per_token, scale, recording):
        wanted = tuple(recording and needed for needed in ctx.needs_input_grad[:3])
        ctx.call, ctx.wanted, ctx.per_token, ctx.hidden_shape = call, wanted, per_token, hidden.shape
        now = (False, False, False) if per_token else wanted
        result = chunks.run(call, _student(call, hidden, weight, bias), now, divisor=scale)
        call.statistics = result.stats
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        if per_token:
            ctx.save_for_backward(hidden, weight, bias)
            return call.tokens.scatter(result.loss, 0.0)
        ctx.result = result
        return result.loss.sum() / scale

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():  # once_differentiable would let a gradient without a graph pass silently
            raise RuntimeError(
                "linear_target_loss has no second derivatives; call backward without create_graph=True, "
                "or use target_loss on full logits"
            )
        if ctx.per_token:
            student = _student(ctx.call, *ctx.saved_tensors)
            result = chunks.run(ctx.call, student, ctx.wanted, upstream=ctx.call.tokens.select(upstream))
            factor = result.factor
        else:
            if ctx.result is None:
                raise RuntimeError(
                    "backward ran a second time through linear_target_loss, whose gradients were formed in the forward "
                    'pass and are gone; call the loss again, or use reduction="none", which recomputes them'
                )
            result, ctx.result = ctx.result, None
            factor = upstream * result.factor
        gradients = _scaled(result, factor, ctx.dtypes)
        if gradients[0] is not None:
            gradients[0] = gradients[0].view(ctx.hidden_shape)
        return (*gradients, *(None,) * 4)


def _scaled(result: Result, factor: Tensor | float, dtypes: tuple) -> list[Tensor | None]:
    """The gradients times the factor in their inputs' dtypes, in one pass."""
    readable = not isinstance(factor, Tensor) or inputs.on_host(factor.device)
    one = readable and float(factor) == 1  # asking a device would wait for it
    scaled: list[Tensor | None] = []
    for gradient, dtype in zip((result.d_hidden, result.d_weight, result.d_bias), dtypes, strict=True):
        if gradient is None:
            scaled.append(None)
        elif one:
            scaled.append(gradient.to(dtype))
        else:
            by = factor.to(gradient.device) if isinstance(factor, Tensor) else factor
            out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
            scaled.append(torch.mul(gradient, by, out=out))
    return scaled


def _targets(target: Target | Sequence[Target], which: Tensor | None) -> tuple[Target, ...]:
    if isinstance(target, (list, tuple)):
        if not target:
            raise ConfigError("target is an empty list; pass one target or more")
        if which is None and len(target) > 1:
            raise ConfigError(
                f"target is a list of {len(target)}; pass which=, an int64 tensor of the labels' shape with the number "
                "of each token's target"
            )
        return tuple(target)
    if which is not None:
        raise ConfigError("which numbers the targets of a list, and target is a single one; pass target as a list")
    return (target,)  # type: ignore[return-value]  # anything else is refused by check_requirements


def _check_devices(hidden: Tensor, own: dict[str, Tensor | None], aux: dict[str, Any]) -> None:
    """Everything lies where the hidden states do."""
    parts = dict(own)
    for name, other in aux.items():
        fields = ("hidden", "weight", "bias") if isinstance(other, Head) else ("ids", "logprobs", "tail_logprob")
        parts |= {f"{name}'s {field}": getattr(other, field, None) for field in fields}
    for name, tensor in parts.items():
        if isinstance(tensor, Tensor) and tensor.device != hidden.device:
            raise ConfigError(
                f"{name} is on {tensor.device} and hidden on {hidden.device}; move it with .to({str(hidden.device)!r})"
            )


def _aux_compute(head: Head, compute: torch.dtype) -> torch.dtype:
    """What another model's head is multiplied in: as its own weights ask, with logits in the student's dtype."""
    if compute == torch.float64:
        return compute
    own = matmuls.compute_dtype(head.hidden, head.weight)
    return torch.float32 if own == torch.float64 else own


def _check_aux(
    name: str, other: object, tokens: Tokens, vocab_size: int, checks: Checks, targets: Sequence[Target]
) -> None:
    if not isinstance(other, (Head, TopK)):
        raise ConfigError(f"{name} is a {type(other).__name__}; use qt.Head(hidden, weight) or qt.TopK(ids, logprobs)")
    if other.token_shape != tokens.shape:
        raise ConfigError(
            f"{name} covers positions of shape {list(other.token_shape)}; hidden requires {list(tokens.shape)}"
        )
    if not isinstance(other, TopK):
        return
    # a cache holds the tokens that are asked about: elsewhere there may be anything
    ids, logprobs = (tokens.read_by(targets, name, tokens.select(part)) for part in (other.ids, other.logprobs))
    if not ids.numel():
        return

    def out_of_range(low, high):
        fault = f"{name}: TopK ids run from {low:.0f} to {high:.0f}; use ids from 0 to {vocab_size - 1}"
        return fault if low < 0 or high >= vocab_size else None

    def twice(some, again):
        return f"{name}: TopK ids hold {again:.0f} twice for one token; each id may appear once" if some else None

    def too_much(mass):
        fault = (
            f"{name}: TopK logprobs sum to a probability of {mass:.3g}; "
            "use log_softmax over the whole vocabulary, whose k largest sum to 1 at most"
        )
        return fault if mass > 1.05 else None  # a little more than rounding to 16 bits makes of 1

    checks.add([ids.min(), ids.max()], out_of_range)
    ordered = ids.sort(-1).values
    if ids.shape[-1] > 1:
        again = (ordered.diff(dim=-1) == 0).flatten()
        value = ordered.narrow(-1, 1, ids.shape[-1] - 1).flatten().gather(0, again.long().argmax().reshape(1))
        checks.add([again.any(), value], twice)
    checks.add([logprobs.float().exp().sum(-1).max()], too_much)
