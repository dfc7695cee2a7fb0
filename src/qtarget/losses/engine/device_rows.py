"""A block of rows in two passes over its logits with plain torch on [r] numbers between them; no host read anywhere.

The passes are Triton's (``kernels.py``) or inductor's (``row_functions.py``); here is what both have in common: the
target's weights, a top-k distribution's k entries, and the statistics. Written without slices by ``[]`` and ``[:,
None]``, so that it runs on tensors without data, too.

Shape suffixes: r rows of the block, v vocabulary, k kept ids of a top-k distribution.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qtarget.losses import inputs
from qtarget.losses.engine import row_functions, top_k
from qtarget.losses.engine.block import label_statistics, top_k_too_large
from qtarget.losses.engine.buffers import RowResult, Rows, Scratch, TopKRows
from qtarget.losses.engine.row_functions import GROUP, Pass
from qtarget.losses.engine.row_plan import FOUND, NEVER, TABLE, RowPlan
from qtarget.losses.output import simplex_tolerance
from qtarget.targets import Target, TokenStats

_MOST_GRAPHS = 256
logger = logging.getLogger(__name__)
_watched: set[str] = set()


class CannotCompile(Exception):
    """A pass that its compiler refuses on this machine."""


class Passes(Protocol):
    """Who runs the two passes."""

    def sums(self, z: Tensor, o: Tensor, y: Tensor, case: Pass) -> tuple[Tensor, Tensor | None]: ...

    def drifts(self, z: Tensor) -> bool:
        """Whether sums in z's dtype leave log R's normaliser off by more than what is written is rounded by."""

    def gradient(
        self,
        z: Tensor,
        o: Tensor,
        y: Tensor,
        table: Tensor,
        weights: Tensor,
        case: Pass,
        g: Tensor,
        places: Tensor | None,
    ) -> Tensor: ...


class TritonPasses:
    """The kernels."""

    def __init__(self) -> None:
        from qtarget.losses.engine import kernels

        self._kernels = kernels

    def _run(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._kernels.COMPILE_ERRORS as error:
            raise CannotCompile(f"{type(error).__name__}: {error}") from error

    def drifts(self, z):
        return True

    def sums(self, z, o, y, case):
        return self._run(self._kernels.sums, z, o, y, case)

    def gradient(self, z, o, y, table, weights, case, g, places):
        return self._run(self._kernels.gradient, z, o, y, table, weights, case, g, places)


class FunctionPasses:
    """The pure functions, compiled by inductor or as they are."""

    def __init__(self, compiled: bool = True):
        self._compiled = compiled

    def _run(self, name: str, *arguments: Any) -> Any:
        if not self._compiled:
            return getattr(row_functions, name)(*arguments)
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor.exc import InductorError

        try:
            # each combination of flags is a graph of its own, more than dynamo expects of one function
            with torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS):
                return row_functions.compiled(name)(*arguments)
        except (TorchDynamoException, InductorError) as error:
            raise CannotCompile(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error

    def drifts(self, z):
        return z.dtype == torch.float64 or not inputs.on_host(z.device)  # there float32 is summed in float64

    def sums(self, z, o, y, case):
        c = _coefficients(case.coefficients, z.dtype, z.device)
        return self._run("sums", z, o, y, c, case.support, case.flags)

    def gradient(self, z, o, y, table, weights, case, g, places):
        c = _coefficients(case.coefficients, z.dtype, z.device)
        capped = case.softcap is not None
        skips = case.write and places is not None
        out = torch.empty_like(z, dtype=g.dtype) if skips else None if g is z else g.narrow(0, 0, z.shape[0])
        arguments = (case.support, case.flags, capped, case.with_kl, out, case.write)
        found = self._run("gradient", z, o, y, table, weights, c, *arguments)
        if skips:  # −1 is the last row, which is there for rows without a gradient
            g.index_put_((places,), out)
        return found


class HostReads(TorchDispatchMode):
    """Counts what waits for a device while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal", "masked_select")
        return function(*args, **(kwargs or {}))


@functools.lru_cache(256)
def _coefficients(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the device, made once: a copy to it waits."""
    return torch.tensor(values, dtype=dtype, device=device)


@dataclass(frozen=True)
class DeviceRows:
    """Computes blocks of rows for one target.

    Args:
        plan: the target's one difference. passes: who runs over the logits.
        vocab_size: real tokens. support: columns the residual covers.
        gradient: write the gradient. with_kl: also kl_q.
        softcap: cap of the logits already applied, whose derivative the gradient must carry.
        factor: what the written gradient is multiplied by.
        scratch: buffers for a top-k distribution that has to be written out.
    """

    target: Target
    plan: RowPlan
    passes: Passes
    vocab_size: int
    support: int
    scratch: Scratch
    gradient: bool = True
    with_kl: bool = False
    softcap: float | None = None
    factor: float = 1.0

    def run(self, rows: Rows) -> Part:
        """Write the block's gradient; what is reported of the rows is worked out later, for all blocks at once."""
        z, y = rows.z, rows.labels
        kept = self._kept(rows)
        aux_log_p = {name: self._aux_log_p_y(rows, name) for name in ("teacher", "reference") if self._reads(name)}
        o = self._other_logits(rows) if kept is None and self.plan.other is not None else z
        case = self._case(kept, z.shape[1])
        entries = None if kept is None else top_k.take_out(z, y, kept)
        table, groups = self.passes.sums(z, o, y, case)
        shares = None
        if entries is not None:
            table, shares = entries.put_back(table, self.plan.c_o, padded=case.pooled)
            case = replace(case, pooled=False, one_shift=True)
        part = Part(table, rows.columns, aux_log_p)
        stats = self._stats(part, lambda k: _top_k_entropy(z, groups, entries, k))
        part.a, part.b = self._weights(stats)
        weight = part.b[0] if part.b else torch.zeros_like(part.a)  # of the one difference
        part.active = (part.a != 0) | (weight != 0) if part.b else part.a != 0
        factor = torch.full_like(part.a, self.factor)
        weights = torch.stack([part.a, weight, factor if rows.factor is None else factor * rows.factor])
        places = rows.places.take(part.active) if rows.places is not None else None
        part.found = self._second_pass(rows, o, table, weights, case, places)
        if shares is not None:
            found, g = shares.gradient(part.a, weight, table.select(0, _REST_MASS), self.with_kl)
            part.found = _together(part.found, found)
            if self.gradient:
                shares.write(g, rows, places, self.softcap, weights.select(0, 2))
        return part

    # -- what the passes are given -------------------------------------------------------------------------------

    def _kept(self, rows: Rows) -> TopKRows | None:
        """A top-k distribution that needs no dense row: outside its k, R is the student's shape times one number."""
        pool = self.plan.pool
        if pool is None or self.plan.other is None or self.plan.is_pair:
            return None
        other = rows.aux[self.plan.other]
        cheap = isinstance(other, TopKRows) and other.tail == "student" and pool.keeps_student_shape
        return other if cheap else None  # type: ignore[return-value]

    def _other_logits(self, rows: Rows) -> Tensor:
        assert self.plan.other is not None
        other = rows.aux[self.plan.other]
        if isinstance(other, Tensor):
            return other
        buffer = self.scratch.get(f"dense_{self.plan.other}", *rows.z.shape)
        return top_k.dense(other, rows.z, self.vocab_size, buffer)

    def _reads(self, name: str) -> bool:
        return f"{name}_log_p_y" in self.target.needs

    def _aux_log_p_y(self, rows: Rows, name: str) -> Tensor:
        """log-probability of the label under another model, [r]: one more read of its logits."""
        other = rows.aux[name]
        if isinstance(other, TopKRows):
            other = top_k.dense(other, rows.z, self.vocab_size, self.scratch.get(f"dense_{name}", *rows.z.shape))
        covered = min(self.vocab_size, other.shape[1])
        logits = other.narrow(1, 0, covered).clamp(min=NEVER)
        y = rows.labels.clamp(max=covered - 1)
        table, _ = self.passes.sums(logits, logits, y, Pass(covered))
        return table.select(0, TABLE.index("log_p_y")).masked_fill(rows.labels >= covered, float("-inf"))

    def _case(self, kept: TopKRows | None, width: int) -> Pass:
        plan = self.plan
        if kept is None:
            return Pass(
                support=self.support,
                c_z=plan.c_z,
                c_o=plan.c_o,
                c_b=plan.c_b,
                slope=plan.slope or 0.0,
                pooled=plan.pool is not None,
                other=plan.other is not None,
                offset=plan.slope is not None,
                pair=plan.is_pair,
                groups="top_k_entropy" in self.target.needs,
            )
        # With a padded vocabulary the pool is the student itself over real tokens: what it has outside the k.
        return Pass(
            support=self.vocab_size,
            pooled=self.vocab_size < width,
            groups="top_k_entropy" in self.target.needs,
        )

    def _stats(self, part: Part, top_k_entropy: Callable[[int], Tensor]) -> TokenStats:
        rows = part.rows
        values = {name: rows[name] for name in ("log_p_y", "rest_mass", "entropy", "offset_mass")}
        if self.plan.slope is None:
            del values["offset_mass"]
            if "offset_mass" in self.target.needs:
                values["offset_mass"] = torch.ones_like(rows["log_p_y"])
        values |= part.columns
        values |= {f"{name}_log_p_y": value for name, value in part.aux_log_p.items()}

        def remembered(k: int) -> Tensor:  # it reads the logits, which are gone when the loss is reported
            if k not in part.top_k_entropies:
                part.top_k_entropies[k] = top_k_entropy(k)
            return part.top_k_entropies[k]

        return TokenStats(values, remembered, self.target.needs)

    def _weights(self, stats: TokenStats) -> tuple[Tensor, list[Tensor]]:
        """The target's weights. The first time, a rule that reads a number of the device is told of by its name."""
        name = f"trust rule {self.target.trust.label!r}"
        if name in _watched or inputs.on_host(stats.log_p_y.device):
            return self.target.weights(stats)
        _watched.add(name)
        with HostReads() as reads:
            weights = self.target.weights(stats)
        if reads.count:
            logger.warning(
                "%s reads a number of a tensor on the device (bool(), float(), .item(), nonzero), which waits for every "
                "kernel before it, in every block of rows; use torch.where and tensor operations",
                name,
            )
        return weights

    # -- the second pass -----------------------------------------------------------------------------------------

    def _second_pass(
        self, rows: Rows, o: Tensor, table: Tensor, weights: Tensor, case: Pass, places: Tensor | None
    ) -> Tensor:
        z = rows.z
        g = z if rows.g is None else rows.g
        case = replace(case, softcap=self.softcap, with_kl=self.with_kl, write=self.gradient)
        if not (case.write or case.with_kl or case.pooled or case.one_shift):
            return z.new_zeros(len(FOUND), z.shape[0])
        if case.pooled and g.dtype == z.dtype and self.passes.drifts(z):
            # Both distributions sum to one, so Σ (B − R) tells by how much log R's normaliser is off. Where g is
            # rounded to 16 bits that is below rounding.
            plain = replace(case, write=False, with_kl=False)
            found = self.passes.gradient(z, o, rows.labels, table, weights, plain, g, None)
            off = torch.log1p(-found.select(0, FOUND.index("drift")))
            table.select(0, TABLE.index("log_s_u")).add_(off)
            table.select(0, TABLE.index("shift")).sub_(off)
        return self.passes.gradient(z, o, rows.labels, table, weights, case, g, places)

    # -- what is reported ----------------------------------------------------------------------------------------

    def report(self, parts: Sequence[Part]) -> RowResult:
        """Loss and statistics of all rows of the blocks."""
        part = parts[0] if len(parts) == 1 else _joined(parts)
        rows, a, b = part.rows, part.a, part.b
        label_loss = self.target.label_loss(self._stats(part, _gone))
        statistics = label_statistics(rows["log_p_y"], rows["entropy"], rows["z_y"] >= rows["top"], a, b)
        tolerance = simplex_tolerance(a.dtype == torch.float64)
        found = dict(zip(FOUND, part.found.unbind(0), strict=True))
        loss, cross, lowest = label_loss, torch.zeros_like(a), found["lowest"]
        if self.plan.pool is None:  # Q is p_y + a (1 − p_y) at the label and (1 − a) p_v elsewhere
            lowest = rows["log_p_y"].exp() + a * rows["rest_mass"]
            others = (rows["top"] - rows["m"] - rows["log_s"]).exp()
            lowest = torch.minimum(lowest, torch.where(a > 1, (1 - a) * others, lowest))
            statistics["update"] = a.abs() * rows["rest_mass"]
        else:
            weight = b[0] if b else torch.zeros_like(a)
            statistics["update"] = found["size"] / 2
            loss = label_loss + weight * self._residual_value(rows["entropy"], found)
            cross = weight * found["cross"]
        statistics["off_simplex_fraction"] = (lowest < -tolerance).to(a.dtype)
        statistics["ce_q"] = a * -rows["log_p_y"] + (1 - a) * rows["entropy"] + cross
        if self.with_kl:
            statistics["kl_q"] = found["kl_q"].masked_fill(lowest < -tolerance, float("nan"))
        return RowResult(loss, statistics, part.active)

    def _residual_value(self, entropy: Tensor, found: dict[str, Tensor]) -> Tensor:
        """The residual's published value for a weight of one; see ``Target.value``. CE(R, p) = H(p) + Σ (B − R) log p."""
        if self.target.value == "tempered_kl":
            return self.target.residual_terms[0][0] * found["kl"]
        return found["kl"] if self.target.value == "kl" else found["cross"] + entropy


@dataclass
class Part:
    """What is known of a block of rows once its gradient is written.

    Attributes:
        table: [len(TABLE), r]. found: [len(FOUND), r]. a: [r]. b: [r] each. active: [r], whether the row has a gradient.
        columns, aux_log_p: what the rule was given. top_k_entropies: what it asked, by k.
    """

    table: Tensor
    columns: dict[str, Tensor]
    aux_log_p: dict[str, Tensor]
    top_k_entropies: dict[int, Tensor] = field(default_factory=dict)
    a: Tensor = field(init=False)
    b: list[Tensor] = field(init=False)
    active: Tensor = field(init=False)
    found: Tensor = field(init=False)

    @property
    def rows(self) -> dict[str, Tensor]:
        return dict(zip(TABLE, self.table.unbind(0), strict=True))


_REST_MASS = TABLE.index("rest_mass")


def _joined(parts: Sequence[Part]) -> Part:
    first = parts[0]

    def each(values: Sequence[dict]) -> dict:
        return {key: torch.cat([value[key] for value in values]) for key in values[0]}

    whole = Part(
        torch.cat([part.table for part in parts], 1),
        each([part.columns for part in parts]),
        each([part.aux_log_p for part in parts]),
        each([part.top_k_entropies for part in parts]),
    )
    whole.a = torch.cat([part.a for part in parts])
    whole.b = [torch.cat([part.b[j] for part in parts]) for j in range(len(first.b))]
    whole.active = torch.cat([part.active for part in parts])
    whole.found = torch.cat([part.found for part in parts], 1)
    return whole


def _together(found: Tensor, more: dict[str, Tensor]) -> Tensor:
    """What the second pass found, with what the k entries of a top-k distribution add."""
    rows = dict(zip(FOUND, found.unbind(0), strict=True))
    for name, value in more.items():
        rows[name] = torch.minimum(rows[name], value) if name == "lowest" else rows[name] + value
    return torch.stack([rows[name] for name in FOUND])


def _gone(k: int) -> Tensor:
    raise AssertionError(f"the entropy of the top {k} is asked for after the logits are gone")


def _top_k_entropy(z: Tensor, groups: Tensor | None, entries: top_k.Entries | None, k: int) -> Tensor:
    """Entropy of the k largest, renormalised: they are among the k groups of columns with the largest maxima."""
    assert groups is not None
    width = z.shape[1]
    if k > width:
        raise top_k_too_large(k, width)
    best = groups.topk(min(k, groups.shape[1]), dim=1).indices
    places = (best.unsqueeze(2) * GROUP + torch.arange(GROUP, device=z.device)).flatten(1)
    values = z.gather(1, places.clamp(max=width - 1)).masked_fill(places >= width, float("-inf"))
    if entries is not None:  # the entries that were taken out
        values = torch.cat([values, entries.z], 1)
    largest = values.topk(k, dim=1).values
    gap = largest.narrow(1, 0, 1) - largest.narrow(1, 1, k - 1)
    share = (-gap).exp()
    rest = share.sum(1)
    return rest.log1p() + torch.where(share > 0, gap * share, 0.0).sum(1) / (1 + rest)
