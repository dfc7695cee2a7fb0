"""The engine's loop over chunks of tokens: logits in, gradient out, two matmuls back.

Tokens stand in the order of their targets, so a batch with several targets is cut like any other: one set of buffers,
one dW. Where the rows' mathematics writes g over float32 logits (``block.py``, ``float32`` on a device) a chunk of
logits is also a chunk of g; where it writes g in 16 bits beside them, many chunks of logits fill one of g.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qtarget.errors import NonFiniteLogits
from qtarget.losses import inputs
from qtarget.losses.engine import EngineCall, Result, buffers, matmuls, who
from qtarget.losses.engine.buffers import Places, RowResult, Rows, TopKRows
from qtarget.losses.engine.device.device_rows import DeviceRows, Part
from qtarget.losses.engine.device.passes import CannotCompile
from qtarget.losses.engine.matmuls import HeadMatmuls, WeightGradient
from qtarget.losses.engine.sizes import Sizes, block_rows, chunk_rows, device_memory, device_sizes
from qtarget.losses.heads import Head
from qtarget.losses.output import ALL_STATISTICS, BASIC_STATISTICS

# A chunk whose kept rows leave less than this share of it free is multiplied before the next logits are formed.
_ROOM = 1 / 3


def run(
    call: EngineCall,
    student: Head,
    want: tuple[bool, bool, bool],
    upstream: Tensor | None = None,
    divisor: Tensor | float = 1,
) -> Result:
    """Loss, statistics and, where ``want`` says so, gradients of the summed loss.

    Args:
        student: hidden [N, d], flattened positions; nothing here has a graph.
        want: whether to form the gradient of (hidden, weight, bias).
        upstream: [n] factors on each token's loss, or None for 1.
        divisor: what the gradients are divided by.
    """
    with torch.autocast(student.hidden.device.type, enabled=False):
        return _Run(call, student, want, upstream, divisor).result()


class _Run:
    """The state of one call: buffers, heads as they are multiplied, and how far it has come."""

    def __init__(self, call, student, want, upstream, divisor):
        self.call, self.student, self.want = call, student, want
        self.tokens, self.device = call.tokens, student.hidden.device
        self.vocab = student.weight.shape[0]
        self.dtype = matmuls.result_dtype(call.compute)
        self.head = HeadMatmuls.of(student, call.compute)
        aux = {name: other for name, other in call.aux.items() if isinstance(other, Head)}
        self.aux_heads = {name: HeadMatmuls.of(other, call.aux_compute[name]) for name, other in aux.items()}
        self.gradient = any(want)
        # g beside the logits, in 16 bits; else over them.
        self.beside = call.backend != "torch" and call.compute in matmuls.HALF and self.gradient
        self.scratch = buffers.workspace(self.dtype, self.device)
        self.sizes = self._sizes(student.weight)
        self.place = who.Place(self.vocab, self.scratch, self.gradient, self.beside)
        self.math = [who.computes(call, target, self.place) for target in call.targets]
        # Blocks of each target of which loss and statistics are still to be worked out, with their tokens.
        self.parts: list[tuple[DeviceRows, list[tuple[slice, Part]]]] = []
        self._scale(upstream, divisor)
        self._prepare(student.weight)

    def _sizes(self, weight: Tensor) -> Sizes:
        call, n = self.call, self.tokens.count
        itemsize = self.dtype.itemsize
        models = 1 + len(self.aux_heads)
        if not self.beside:
            rows = call.rows_per_chunk or chunk_rows(n, self.vocab, models, itemsize, self.device)
            rows = max(1, min(rows, n))
            block = block_rows(rows, self.vocab, itemsize, self.device) if call.backend != "triton" else rows
            return Sizes(rows, rows, block)
        spared = 4 * weight.numel() if self.want[1] and weight.dtype == torch.bfloat16 == call.compute else 0
        skips = any(target.may_skip_tokens for target in call.targets)
        sizes = device_sizes(n, self.vocab, models, call.compute.itemsize, spared, device_memory(self.device), skips)
        if call.rows_per_chunk:
            rows = max(1, min(call.rows_per_chunk, n))
            sizes = replace(sizes, logits=rows, gradient=max(rows, sizes.gradient), block=rows)
        return sizes

    def _scale(self, upstream: Tensor | None, divisor: Tensor | float) -> None:
        """Where what the gradients are multiplied by goes: into each row of g, into the products, or into the pass that
        multiplies by the incoming gradient."""
        self.upstream = upstream
        self.factor: Tensor | float = 1.0
        self.alpha = self.call.logit_scale / matmuls.gradient_factor(self.call.compute)
        if upstream is not None and self.call.compute in matmuls.HALF:
            # in the range of 16 bits, whatever a loss scale makes of it
            largest = upstream.abs().amax().clamp(min=torch.finfo(torch.float32).tiny) if len(upstream) else 1.0
            self.upstream, self.factor = upstream / largest, largest
        if not isinstance(divisor, Tensor) or inputs.on_host(self.device):
            self.alpha = self.alpha / float(divisor)
        elif self.beside and self.call.compute == torch.bfloat16:  # which has room for it below
            self.upstream = divisor.reciprocal().to(self.device, self.dtype).expand(self.tokens.count)
        else:
            self.factor = self.factor / divisor

    def _prepare(self, weight: Tensor) -> None:
        n, sizes = self.tokens.count, self.sizes

        def logits(name: str, width: int) -> Tensor:
            rows = min(sizes.logits, n)
            if inputs.on_host(self.device) and not self.beside:
                return self.scratch.get(name, rows, width)
            return buffers.padded_rows(rows, width, self.dtype, self.device)

        self.logits = logits("logits", self.vocab)
        self.aux_logits = {name: logits(name, head.weight.shape[0]) for name, head in self.aux_heads.items()}
        self.g = None
        if self.beside:  # one row more, to which device code writes rows that have no gradient
            rows = min(sizes.gradient, n) + 1
            self.g = buffers.padded_rows(rows, self.vocab, self.call.compute, self.device)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=self.dtype, device=self.device)

        self.out = Result(zeros(n), {}, factor=self.factor)
        if self.want[0]:
            self.out.d_hidden = zeros(*self.student.hidden.shape)
        self.d_weight = None
        if self.want[1]:
            # One product of all of g may round to the weight's own 16 bits: to bfloat16, whose range a sum does not
            # leave, and where nothing is left to multiply by, which would round again.
            half = sizes.whole and weight.dtype == self.call.compute == torch.bfloat16
            dtype = weight.dtype if half and not isinstance(self.factor, Tensor) else self.dtype
            out = torch.empty(weight.shape, dtype=dtype, device=self.device)
            self.d_weight = WeightGradient(out)
        if self.want[2]:
            self.out.d_bias = zeros(self.vocab)

    # -- the loop ------------------------------------------------------------------------------------------------

    def result(self) -> Result:
        if self.beside:
            self._beside()
        else:
            self._over()
        if self.d_weight is not None:
            self.out.d_weight = self.d_weight.finish()
        if not self.tokens.count:  # nothing supervised: the statistics are there all the same, of no token
            self.call.checks.read()
            self.out.stats = dict.fromkeys(ALL_STATISTICS if self.call.with_kl else BASIC_STATISTICS, self.out.loss)
        return self.out

    def _over(self) -> None:
        """g over the logits. Rows without a gradient make room at the front for the next logits, so that a product has
        as many rows as a chunk however many tokens are dropped."""
        n, rows = self.tokens.count, self.logits.shape[0]
        begin = 0
        kept: list[Tensor] = []  # token numbers of the rows of g at the front of the buffer
        while begin < n:
            front = sum(len(numbers) for numbers in kept)
            chunk = slice(begin, min(begin + rows - front, n))
            z = self.logits[front : front + chunk.stop - begin]
            self._form_logits(chunk, z)
            active = []
            for segment, number in self._segments(chunk):
                here = z[segment.start - begin : segment.stop - begin]
                active.append(self._blocks(self._rows(segment, here, number), segment, number))
            begin = chunk.stop
            if not self.gradient:
                continue
            kept.append(self._pack(chunk, front, active))
            count = sum(len(numbers) for numbers in kept)
            if begin == n or rows - count < rows * _ROOM:
                if begin == n:
                    self._read()
                self._multiply(self.logits[:count], torch.cat(kept))
                kept = []
        if n and not self.gradient:
            self._read()

    def _beside(self) -> None:
        """g beside the logits, in 16 bits; on a device no number is read but once for each part of g."""
        n, sizes = self.tokens.count, self.sizes
        skips = any(target.may_skip_tokens for target in self.call.targets)
        assert self.g is not None
        for part in _cut(slice(0, n), sizes.gradient):
            places = Places(self.device) if skips else None
            for chunk in _cut(part, sizes.logits):
                z = self.logits[: chunk.stop - chunk.start]
                self._form_logits(chunk, z)
                for segment, number in self._segments(chunk):
                    g = self.g if skips else self.g[segment.start - part.start : segment.stop - part.start]
                    rows = self._rows(segment, z[segment.start - chunk.start : segment.stop - chunk.start], number)
                    self._blocks(replace(rows, g=g, places=places), segment, number)
            count, numbers = part.stop - part.start, torch.arange(part.start, part.stop, device=self.device)
            # Before the last products, so that the host can go on while they run.
            wanted = [] if places is None else [places.count]
            if part.stop == n:
                found = self._read(*wanted)
            else:
                found = self.call.checks.read(*wanted) if wanted else []
            if places is not None:
                count = int(found[0])
                numbers = places.takers(count) + part.start
            self._multiply(self.g[:count], numbers)

    def _segments(self, chunk: slice) -> Iterator[tuple[slice, int]]:
        """The stretches of a chunk that have one target, with its number."""
        for number, group in enumerate(self.tokens.groups):
            start, stop = max(chunk.start, group.start), min(chunk.stop, group.stop)
            if start < stop:
                yield slice(start, stop), number

    def _blocks(self, rows: Rows, segment: slice, number: int) -> Tensor | None:
        """Run the row mathematics over a stretch of one target, a block that fits the cache at a time.

        Returns which rows have a gradient, [rows] bool; None where all have, or where telling would wait for the device.
        """
        waits = not inputs.on_host(self.device) and isinstance(self.math[number], DeviceRows)
        skips = self.call.targets[number].may_skip_tokens and self.gradient and not self.beside and not waits
        active = []
        length = segment.stop - segment.start
        for here in _cut(slice(0, length), length if waits else self.sizes.block):
            there = slice(segment.start + here.start, segment.start + here.stop)
            with_gradient = self._run_rows(rows[here], there, number)
            if skips:
                active.append(with_gradient)
        return torch.cat(active) if skips else None

    def _run_rows(self, rows: Rows, segment: slice, number: int) -> Tensor:
        """Put the block's gradient where it belongs; a compiler that refuses is told of once, and plain PyTorch goes on.

        Returns which rows have a gradient, [rows] bool.
        """
        math = self.math[number]
        if not isinstance(math, DeviceRows):
            result = math.run(rows)
            if self.gradient:
                self._deliver(rows, result.active)
            self._keep(segment, result)
            return result.active
        try:
            part = math.run(rows)
        except CannotCompile as error:
            who.tell(f"backend {self.call.backend!r} cannot be compiled here, so 'torch' is used: {error}")
            self.math[number] = who.computes_in_torch(self.call, self.call.targets[number], self.place)
            self._form_logits(segment, rows.z)
            fresh = self._rows(segment, rows.z, number)
            return self._run_rows(replace(fresh, g=rows.g, places=rows.places), segment, number)
        if not self.parts or self.parts[-1][0] is not math:
            self.parts.append((math, []))
        self.parts[-1][1].append((segment, part))
        return part.active

    def _deliver(self, rows: Rows, active: Tensor) -> None:
        """Multiply what plain PyTorch wrote over the logits by each row's factor, and round it to where it belongs."""
        if rows.factor is not None:
            rows.z.mul_(rows.factor[:, None])
        if rows.g is None:
            return
        g = (rows.z * matmuls.gradient_factor(self.call.compute)).to(rows.g.dtype)
        if rows.places is None:
            rows.g[: len(g)].copy_(g)
        else:
            rows.g.index_put_((rows.places.take(active),), g)

    def _pack(self, chunk: slice, front: int, active: Sequence[Tensor | None]) -> Tensor:
        """Move the chunk's rows that have a gradient to the front of the buffer; returns their token numbers."""
        if all(mask is None for mask in active):  # every row has one
            return torch.arange(chunk.start, chunk.stop, device=self.device)
        every = torch.ones(chunk.stop - chunk.start, dtype=torch.bool, device=self.device)
        for (segment, _), mask in zip(self._segments(chunk), active, strict=True):
            if mask is not None:
                every[segment.start - chunk.start : segment.stop - chunk.start] = mask
        (rows,) = every.nonzero(as_tuple=True)
        if len(rows) < chunk.stop - chunk.start:
            # A block at a time: what is written lies before what is still to be read.
            for to, piece in enumerate(rows.split(self.sizes.block)):
                begin = front + to * self.sizes.block
                self.logits[begin : begin + len(piece)] = self.logits.index_select(0, piece + front)
        return rows + chunk.start

    # -- rows ----------------------------------------------------------------------------------------------------

    def _form_logits(self, chunk: slice, out: Tensor) -> None:
        self.head.logits(self._states(self.student.hidden, chunk), out)

    def _states(self, hidden: Tensor, chunk: slice) -> Tensor:
        flat, index = hidden.reshape(-1, hidden.shape[-1]), self.tokens.index
        return flat[chunk] if index is None else flat.index_select(0, index[chunk])

    def _rows(self, segment: slice, z: Tensor, number: int) -> Rows:
        tokens, target = self.tokens, self.call.targets[number]
        columns = {name: column[segment] for name, column in tokens.columns.items()}
        aux = {name: self._aux_rows(name, segment) for name in self.call.aux if name in target.requires}
        factor = None if self.upstream is None else self.upstream[segment]
        return Rows(z, aux, tokens.labels[segment], columns, factor=factor)

    def _aux_rows(self, name: str, segment: slice) -> Tensor | TopKRows:
        """Another model's logits formed into its buffer, or its top-k rows."""
        other, select = self.call.aux[name], self.tokens.select
        if isinstance(other, Head):
            z = self.aux_logits[name][: segment.stop - segment.start]
            self.aux_heads[name].logits(self._states(other.hidden.detach(), segment), z)
            return z[:, : other.width]
        ids = select(other.ids)[segment].long().clamp(0, self.call.vocab_size - 1)  # checked, on a device later
        log_tail = select(other.log_tail().detach())[segment].to(self.dtype)
        return TopKRows(ids, select(other.logprobs.detach())[segment].to(self.dtype), log_tail, other.tail)

    def _keep(self, segment: slice, result: RowResult) -> None:
        self.out.loss[segment] = result.loss
        for name, value in result.stats.items():
            if name not in self.out.stats:
                self.out.stats[name] = torch.empty_like(self.out.loss)
            self.out.stats[name][segment] = value

    def _multiply(self, g: Tensor, numbers: Tensor) -> None:
        """dH = g W and dW += gᵀ H for rows of g that belong to the tokens ``numbers``."""
        if not len(numbers) or not self.gradient:
            return
        index = self.tokens.index
        places = numbers if index is None else index.index_select(0, numbers)
        if g.dtype != self.call.compute and self.call.compute in matmuls.HALF:
            g = (g * matmuls.gradient_factor(self.call.compute)).to(self.call.compute)
        if self.out.d_hidden is not None:
            d_hidden = self.head.d_hidden(g)
            self.out.d_hidden.index_copy_(0, places, d_hidden if self.alpha == 1 else d_hidden.mul_(self.alpha))
        if self.d_weight is not None:
            self.d_weight.add(g, self.student.hidden.index_select(0, places), self.alpha)
        if self.out.d_bias is not None:
            self.out.d_bias.add_(g.sum(0, dtype=self.dtype), alpha=self.alpha)

    # -- faults --------------------------------------------------------------------------------------------------

    def _read(self, *wanted: Tensor) -> list[float]:
        """Raise what is wrong with the call, in one host read, which also brings the ``wanted`` numbers."""
        for math, parts in self.parts:  # the blocks of one target follow each other
            whole = slice(parts[0][0].start, parts[-1][0].stop)
            self._keep(whole, math.report([part for _, part in parts]))
        loss, stats = self.out.loss, self.out.stats
        if self.gradient and self.call.compute == torch.float16:
            weights = stats["trust"].abs() + stats["residual_mass"].abs()
            self.call.checks.add([weights.amax()], _beyond_float16)
        # The entropy touches every logit of the student, the cross-entropy of Q every one of the others.
        student = torch.isfinite(stats["entropy"])
        bad = ~(torch.isfinite(loss) & student & torch.isfinite(stats["ce_q"]))
        first = bad.long().argmax()
        found = self.call.checks.read(*wanted, bad.any(), first, student.gather(0, first.reshape(1)))
        wrong, row, student_is_finite = found[len(wanted) :]
        if wrong:
            row = int(row)
            if not student_is_finite:
                raise NonFiniteLogits("logits", row, self.tokens)
            (number,) = [i for i, group in enumerate(self.tokens.groups) if group.start <= row < group.stop]
            target = self.call.targets[number]
            names = [name for name in self.call.aux if name in target.requires]
            fault = " or ".join(f"{name} logits" for name in names) or "the trust rule's weights"
            raise NonFiniteLogits(fault, row, self.tokens, target.on_ruled_out)
        return found[: len(wanted)]


def _beyond_float16(largest: float) -> str | None:
    if not largest > matmuls.FLOAT16_MOST:  # NaN has a message of its own
        return None
    return (
        f"the target's weights reach {largest:.3g}, and the gradient of a float16 head holds {matmuls.FLOAT16_MOST:g} at "
        "most; make the weights smaller, or train in bfloat16 or float32"
    )


def _cut(part: slice, rows: int) -> Iterator[slice]:
    for begin in range(part.start, part.stop, rows):
        yield slice(begin, min(begin + rows, part.stop))
