"""The engine: hidden states × head weight → loss and gradients, without a [tokens, vocab] tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qtarget.errors import ConfigError, check_range
from qtarget.losses import engine
from qtarget.losses.engine import chunks
from qtarget.losses.engine.chunks import Problem
from qtarget.losses.heads import Head, TopK
from qtarget.losses.inputs import (
    Tokens,
    check_options,
    check_requirements,
    denominator,
    real_vocabulary,
    supervised,
)
from qtarget.losses.output import ALL_STATISTICS, LossOutput
from qtarget.targets import Target

_HOW = {
    "teacher": "pass teacher=qt.Head(hidden, weight) or qt.TopK(ids, logprobs)",
    "reference": "pass reference=qt.Head(hidden, weight) or qt.TopK(ids, logprobs)",
}


def linear_target_loss(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    target: Target,
    *,
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
    stats: str = "basic",
    backend: str = "auto",
    chunk_rows: int | None = None,
) -> LossOutput:
    """The loss of a target from hidden states; equal to ``target_loss`` on the logits they give.

        logits = softcap(logit_scale · (hidden @ head_weight.T + head_bias))

    The gradient is formed in the forward pass, chunk by chunk, so that only dH and dW are kept. With
    ``reduction="none"`` each token's upstream gradient is unknown then: backward runs the chunks once more.

    Args:
        hidden: [..., d], float32, float64, bfloat16 or float16. head_weight: [V, d]; without ``requires_grad`` no dW is
            formed. head_bias: [V] or None.
        labels: [...] int64; nothing is shifted: labels[i] belongs to hidden[i]. Ignored positions cost nothing.
        target: what to learn; see ``qtarget.preset``.
        teacher, reference: ``Head`` (hidden states of the same positions, of any width) or ``TopK``.
        old_logps: [...] log p_y of the old policy. weight: [...] or one per row. critical: [...] booleans.
        vocab_size: real tokens of a padded head.
        reduction: "mean" divides by ``num_items``, else by the supervised labels; weights never enter it.
        stats: "basic", or "all" to add kl_q.
        chunk_rows: tokens per chunk; None takes them from the device and the memory budget.

    Returns:
        LossOutput: the published value of the objective and per-token statistics.

    Raises:
        ConfigError: an input the target needs is missing, a shape or value is wrong, or logits are not finite.
        RuntimeError: a second backward through the same call, or second derivatives.
    """
    engine.pick(backend)
    check_options(reduction, stats)
    _check_head(hidden, head_weight, head_bias, logit_softcap, chunk_rows)
    real = real_vocabulary(vocab_size, head_weight.shape[0])
    given: dict[str, Any] = {"teacher": teacher, "reference": reference}
    columns = {"old_logps": old_logps, "weight": weight, "critical": critical}
    check_requirements(target, {**given, **columns, "old_policy": old_logps}, _HOW)
    dtype = torch.float64 if torch.float64 in (hidden.dtype, head_weight.dtype) else torch.float32
    tokens = supervised(labels, hidden.shape[:-1], "hidden", real, ignore_index, dtype, columns)
    others = {name: given[name] for name in given if name in target.requires}
    for name, other in others.items():
        _check_other(name, other, tokens, real)
    problem = Problem(target, tokens, others, real, float(logit_scale), logit_softcap, stats == "all", chunk_rows)
    per_token = reduction == "none"
    scale = denominator(reduction, tokens, num_items)
    # Function.apply hides whether a graph is being recorded, so that is asked here.
    loss = _LinearTargetLoss.apply(hidden, head_weight, head_bias, problem, per_token, scale, torch.is_grad_enabled())
    statistics = {
        name: tokens.spread(problem.statistics[name], float("nan"))
        for name in ALL_STATISTICS
        if name in problem.statistics
    }
    return LossOutput(loss, statistics)


class _LinearTargetLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, problem, per_token, scale, recording):
        flat = hidden.detach().reshape(-1, hidden.shape[-1])
        wanted = tuple(recording and needed for needed in ctx.needs_input_grad[:3])
        ctx.problem, ctx.wanted, ctx.per_token, ctx.hidden_shape = problem, wanted, per_token, hidden.shape
        now = (False, False, False) if per_token else wanted
        head = weight.detach(), None if bias is None else bias.detach()
        result = chunks.run(problem, flat, *head, now, divisor=scale)
        problem.statistics = result.stats
        if per_token:
            ctx.save_for_backward(hidden, weight, bias)
            return problem.tokens.spread(result.loss, 0.0)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.gradients = [result.d_hidden, result.d_weight, result.d_bias]
        return result.loss.sum() / scale

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():  # once_differentiable would let a gradient without a graph pass silently
            raise RuntimeError(
                "linear_target_loss has no second derivatives; call backward without create_graph=True, "
                "or use target_loss on full logits"
            )
        if ctx.per_token:
            hidden, weight, bias = ctx.saved_tensors
            flat = hidden.detach().reshape(-1, hidden.shape[-1])
            result = chunks.run(
                ctx.problem,
                flat,
                weight.detach(),
                None if bias is None else bias.detach(),
                ctx.wanted,
                upstream=ctx.problem.tokens.select(upstream),
            )
            d_hidden, d_weight, d_bias = result.d_hidden, result.d_weight, result.d_bias
            dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        else:
            if ctx.gradients is None:
                raise RuntimeError(
                    "backward ran a second time through linear_target_loss, whose gradients were formed in the forward "
                    'pass and are gone; call the loss again, or use reduction="none", which recomputes them'
                )
            d_hidden, d_weight, d_bias = ctx.gradients
            ctx.gradients, dtypes = None, ctx.dtypes
            if upstream.is_cuda or float(upstream) != 1:
                for gradient in (d_hidden, d_weight, d_bias):
                    if gradient is not None:
                        gradient.mul_(upstream.to(gradient.device))
        if d_hidden is not None:
            d_hidden = d_hidden.view(ctx.hidden_shape)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(dtypes[1]),
            None if d_bias is None else d_bias.to(dtypes[2]),
            *(None,) * 4,
        )


def _check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, chunk_rows: int | None
) -> None:
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[-1]:
        raise ConfigError(
            f"hidden has shape {list(hidden.shape)} and head_weight {list(weight.shape)}; "
            "head_weight must be [vocabulary, width] with hidden's width"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ConfigError(f"head_bias has shape {list(bias.shape)}; head_weight asks for [{weight.shape[0]}]")
    if softcap is not None:
        check_range("logit_softcap", softcap, 0, open_low=True)
    if chunk_rows is not None and (not isinstance(chunk_rows, int) or chunk_rows < 1):
        raise ConfigError(f"chunk_rows is {chunk_rows!r}; use a whole number from 1, or None")


def _check_other(name: str, other: object, tokens: Tokens, real: int) -> None:
    if not isinstance(other, (Head, TopK)):
        raise ConfigError(f"{name} is a {type(other).__name__}; use qt.Head(hidden, weight) or qt.TopK(ids, logprobs)")
    if other.token_shape != tokens.shape:
        raise ConfigError(
            f"{name} covers positions of shape {list(other.token_shape)}; hidden asks for {list(tokens.shape)}"
        )
    if isinstance(other, TopK):
        ids = tokens.select(other.ids)  # a cache holds supervised tokens only: elsewhere there may be anything
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= real):
            raise ConfigError(
                f"{name}: TopK ids run from {int(ids.min())} to {int(ids.max())}; use ids from 0 to {real - 1}"
            )
        ordered = ids.sort(-1).values
        again = ordered[..., 1:][ordered.diff(dim=-1) == 0]
        if len(again):
            raise ConfigError(f"{name}: TopK ids hold {int(again[0])} twice for one token; each id may stand once")
        mass = tokens.select(other.logprobs).float().exp().sum(-1)
        if bool((mass > 1.05).any()):  # a little more than rounding to 16 bits makes of 1
            raise ConfigError(
                f"{name}: TopK logprobs sum to a probability of {float(mass.max()):.3g}; "
                "use log_softmax over the whole vocabulary, whose k largest sum to 1 at most"
            )
