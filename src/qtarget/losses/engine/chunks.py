"""The engine in plain PyTorch: chunk after chunk of tokens, logits in, gradient written over them, two matmuls out.

Every matmul is the vendor library's. Logits are float32 (float64 for float64 inputs) whatever the weights are.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qtarget.errors import NonFiniteLogits
from qtarget.losses.engine.block import RowMath
from qtarget.losses.engine.buffers import KeptRows, Rows, Scratch
from qtarget.losses.engine.sizes import block_rows, chunk_rows
from qtarget.losses.heads import Head, TopK
from qtarget.losses.inputs import Tokens
from qtarget.losses.output import ALL_STATISTICS, BASIC_STATISTICS
from qtarget.targets import Target

# Vocabulary rows of a half-precision head cast up at a time.
_CAST_ROWS = 4096

_kept = threading.local()


@dataclass
class Problem:
    """One call of the engine: everything but the student's hidden states, head weight and bias."""

    target: Target
    tokens: Tokens
    others: dict[str, Head | TopK]
    real: int
    logit_scale: float
    logit_softcap: float | None
    everything: bool
    rows_per_chunk: int | None = None
    statistics: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Result:
    """Per-token loss and statistics [n], and the summed loss's gradients where they were asked for."""

    loss: Tensor
    stats: dict[str, Tensor]
    d_hidden: Tensor | None = None
    d_weight: Tensor | None = None
    d_bias: Tensor | None = None


def run(
    problem: Problem,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    want: tuple[bool, bool, bool],
    upstream: Tensor | None = None,
    divisor: Tensor | float = 1,
) -> Result:
    """Loss, statistics and, where ``want`` says so, gradients of the summed loss.

    Args:
        hidden: [N, d], flattened positions. weight: [V, d]. bias: [V] or None.
        want: whether to form the gradient of (hidden, weight, bias).
        upstream: [n] factors on each token's loss, or None for 1.
        divisor: what the gradients are divided by; folded into the matmuls, so that it costs nothing.
    """
    tokens, target = problem.tokens, problem.target
    dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    device, vocab, n = hidden.device, weight.shape[0], tokens.count
    heads = {name: other for name, other in problem.others.items() if isinstance(other, Head)}
    itemsize = torch.finfo(dtype).bits // 8
    rows = problem.rows_per_chunk or chunk_rows(n, vocab, 1 + len(heads), itemsize, device)
    workspace = _workspace(dtype, device)
    logits = workspace.get("logits", min(rows, n), vocab)
    head_logits = {name: workspace.get(name, min(rows, n), head.weight.shape[0]) for name, head in heads.items()}
    block = block_rows(max(1, logits.shape[0]), vocab, itemsize, device)

    result = Result(logits.new_zeros(n), {})
    if want[0]:
        result.d_hidden = torch.zeros_like(hidden)
    if want[1]:
        result.d_weight = torch.empty(weight.shape, dtype=dtype, device=device)
    if want[2] and bias is not None:
        result.d_bias = torch.zeros(bias.shape, dtype=dtype, device=device)
    math = RowMath(
        target=target,
        real=problem.real,
        covered=tuple(_covered(problem, pool, vocab) for _, pool in target.residual_terms),
        gradient=any(want),
        everything=problem.everything,
        softcap=problem.logit_softcap,
        scratch=workspace,
    )
    scale = problem.logit_scale / float(divisor)
    first = True  # dW is written by the first matmul: no pass that fills it with zeros
    with torch.autocast(device.type, enabled=False):
        for begin in range(0, n, rows):
            chunk = slice(begin, min(begin + rows, n))
            size = chunk.stop - begin
            h = _rows_of(hidden, tokens, chunk)
            z = logits[:size]
            logits_into(z, h, weight, bias, problem.logit_scale, problem.logit_softcap)
            others = _other_rows(problem, chunk, head_logits, dtype)
            kept = _blocks(math, z, others, chunk, block, result, problem, upstream)
            if any(want) and kept is not None:
                _backward_matmuls(z, h, weight, kept, chunk, tokens, scale, result, first)
                first = False
    if first and result.d_weight is not None:
        result.d_weight.zero_()
    if not n:  # nothing supervised: the statistics are there all the same, of no token
        result.stats = dict.fromkeys(ALL_STATISTICS if problem.everything else BASIC_STATISTICS, result.loss)
    return result


def _workspace(dtype: torch.dtype, device: torch.device) -> Scratch:
    """Buffers of the chunks. On a CPU they are kept between calls, which spares each call fresh pages."""
    if device.type != "cpu":
        return Scratch(dtype, device)
    kept: dict[torch.dtype, Scratch] = _kept.__dict__.setdefault("by_dtype", {})
    return kept.setdefault(dtype, Scratch(dtype, device))


def _blocks(
    math: RowMath,
    z: Tensor,
    others: dict[str, Tensor | KeptRows],
    chunk: slice,
    block: int,
    result: Result,
    problem: Problem,
    upstream: Tensor | None,
) -> Tensor | None:
    """Run the row mathematics over a chunk. Returns which of its rows have a gradient, gathered at the front of z."""
    tokens, size = problem.tokens, chunk.stop - chunk.start
    may_skip = problem.target.may_skip_tokens and math.gradient
    kept_rows, write = [], 0
    for begin in range(0, size, block):
        here = slice(begin, min(begin + block, size))
        there = slice(chunk.start + here.start, chunk.start + here.stop)
        rows = Rows(
            z=z[here],
            others={name: other[here] for name, other in others.items()},
            labels=tokens.labels[there],
            columns={name: column[there] for name, column in tokens.columns.items()},
        )
        loss, statistics, active = math.run(rows)
        result.loss[there] = loss
        for name, value in statistics.items():
            if name not in result.stats:
                result.stats[name] = result.loss.new_empty(result.loss.shape)
            result.stats[name][there] = value
        _check_finite(loss, statistics, there, problem)
        if upstream is not None and math.gradient:
            rows.z.mul_(upstream[there][:, None])
        if may_skip:
            (places,) = active.nonzero(as_tuple=True)
            if len(places) < len(active) or write < begin:
                z[write : write + len(places)] = rows.z[places]
            write += len(places)
            kept_rows.append(places + begin)
    if not may_skip:
        return torch.arange(size, device=z.device)
    kept = torch.cat(kept_rows)
    return kept if len(kept) else None


def _backward_matmuls(
    z: Tensor,
    h: Tensor,
    weight: Tensor,
    kept: Tensor,
    chunk: slice,
    tokens: Tokens,
    scale: float,
    result: Result,
    first: bool,
) -> None:
    """dH = g W and dW += gᵀ H for the rows at the front of z; rows without a gradient cost nothing."""
    g = z[: len(kept)]
    if len(kept) < len(h):
        h = h[kept]
    if result.d_hidden is not None:
        places = kept + chunk.start
        if tokens.index is not None:
            places = tokens.index[places]
        d_h = _times_weight(g, weight).mul_(scale)
        result.d_hidden.index_copy_(0, places, d_h.to(result.d_hidden.dtype))
    if result.d_weight is not None:
        result.d_weight.addmm_(g.T, h.to(g.dtype), beta=0 if first else 1, alpha=scale)
    if result.d_bias is not None:
        result.d_bias.add_(g.sum(0), alpha=scale)


def logits_into(
    out: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> None:
    """out = softcap(scale · (h Wᵀ + bias)), accumulated in out's dtype."""
    if _multiplies_in_half(h, weight):
        torch.mm(h.to(weight.dtype), weight.T, out_dtype=out.dtype, out=out)
    else:
        h = h.to(out.dtype)
        for rows, piece in _cast_up(weight, out.dtype):
            torch.mm(h, piece.T, out=out[:, rows])
    if bias is not None:
        out.add_(bias.to(out.dtype))
    if scale != 1:
        out.mul_(scale)
    if softcap is not None:
        out.div_(softcap).tanh_().mul_(softcap)


def _times_weight(g: Tensor, weight: Tensor) -> Tensor:
    """g W, accumulated in g's dtype."""
    if _multiplies_in_half(g, weight):
        return torch.mm(g.to(weight.dtype), weight, out_dtype=g.dtype)
    out = None
    for rows, piece in _cast_up(weight, g.dtype):
        out = g[:, rows] @ piece if out is None else out.addmm_(g[:, rows], piece)
    assert out is not None
    return out


def _multiplies_in_half(x: Tensor, weight: Tensor) -> bool:
    """Whether a half-precision head is multiplied as it is, with float32 results: on CUDA only.

    A CPU has no such matmul: without bf16 units it is many times slower, and with them its results are rounded.
    """
    return weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16) and x.dtype != torch.float64


def _cast_up(weight: Tensor, dtype: torch.dtype):
    """(rows, weight[rows] in dtype): the whole at once where no cast is needed, else a tile at a time."""
    if weight.dtype == dtype:
        yield slice(0, weight.shape[0]), weight
        return
    for begin in range(0, weight.shape[0], _CAST_ROWS):
        rows = slice(begin, min(begin + _CAST_ROWS, weight.shape[0]))
        yield rows, weight[rows].to(dtype)


def _rows_of(hidden: Tensor, tokens: Tokens, chunk: slice) -> Tensor:
    flat = hidden.reshape(-1, hidden.shape[-1])
    return flat[chunk] if tokens.index is None else flat.index_select(0, tokens.index[chunk].to(flat.device))


def _other_rows(
    problem: Problem, chunk: slice, buffers: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor | KeptRows]:
    """Teacher and reference for a chunk: logits formed into a buffer, or the kept rows of a top-k distribution."""
    others: dict[str, Tensor | KeptRows] = {}
    size = chunk.stop - chunk.start
    for name, other in problem.others.items():
        if isinstance(other, Head):
            z = buffers[name][:size]
            h = _rows_of(other.hidden.detach(), problem.tokens, chunk)
            bias = None if other.bias is None else other.bias.detach()
            logits_into(z, h, other.weight.detach(), bias, other.logit_scale, other.logit_softcap)
            others[name] = z[:, : other.width]
        else:
            others[name] = KeptRows(
                problem.tokens.select(other.ids)[chunk].long(),
                problem.tokens.select(other.logprobs.detach())[chunk].to(dtype),
                problem.tokens.select(other.log_tail().detach())[chunk].to(dtype),
                other.tail,
            )
    return others


def _covered(problem: Problem, pool, vocab: int) -> int:
    """Entries a residual covers: all of the head for a student-only pool, else the real vocabulary all models share."""
    if pool.is_student_only:
        return vocab
    others = [problem.others[name] for name in pool.requires]
    return min([problem.real, *(other.width for other in others if isinstance(other, Head))])


def _check_finite(loss: Tensor, statistics: dict[str, Tensor], there: slice, problem: Problem) -> None:
    # The entropy touches every logit of the student, the cross-entropy of Q every one of the others.
    bad = ~(torch.isfinite(loss) & torch.isfinite(statistics["entropy"]) & torch.isfinite(statistics["ce_q"]))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        fault = " or ".join(f"{name} logits" for name in problem.others) or "the trust rule's weights"
        if not torch.isfinite(statistics["entropy"][row]):
            fault = "logits"
        raise NonFiniteLogits(fault, there.start + row, problem.tokens)
