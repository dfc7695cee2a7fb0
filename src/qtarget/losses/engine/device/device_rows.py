"""Row mathematics on a device: two passes, plain torch on [r] between, no host reads.

The passes are Triton's (``kernels.py``) or inductor's (``row_functions.py``); here is what both have in common: the
target's weights, a top-k distribution's k entries, and the statistics. Written without slices by ``[]`` and ``[:,
None]``, so that it runs on tensors without data, too.

Shape suffixes: r rows of the block, v vocabulary, k kept ids of a top-k distribution.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from qtarget.losses import inputs
from qtarget.losses.engine import token_statistics, top_k
from qtarget.losses.engine.block import label_statistics
from qtarget.losses.engine.buffers import PerRow, RowCode, RowResult, Rows, TopKRows
from qtarget.losses.engine.device.passes import HostReads, Passes
from qtarget.losses.engine.device.row_functions import GROUP, Pass
from qtarget.losses.engine.device.row_plan import FOUND, NEVER, TABLE, RowPlan
from qtarget.losses.inputs import check_top_k
from qtarget.losses.output import simplex_tolerance
from qtarget.targets import TokenStats
from qtarget.targets.stats import OF_TOP_K

logger = logging.getLogger(__name__)
_watched: set[str] = set()


@dataclass(frozen=True, kw_only=True)
class DeviceRows(RowCode):
    """Two passes; scratch is only for a top-k distribution that has to be written out.

    Args:
        plan: the target's one difference. passes: who runs over the logits. support: columns the residual covers.
        factor: what the written gradient is multiplied by.
    """

    plan: RowPlan
    passes: Passes
    support: int
    factor: float = 1.0

    def run(self, rows: Rows) -> Part:
        """Write the block's gradient; what is reported of the rows is worked out later, for all blocks at once."""
        z, y = rows.z, rows.labels
        pool = None if self.plan.is_pair else self.plan.pool
        kept = top_k.cheap_rows([] if pool is None else [pool], rows)
        given = rows.columns | self._read_off_rows(rows)
        o = self._dense(rows, self.plan.other) if kept is None and self.plan.other is not None else z
        case = self._case(kept, z.shape[1])
        entries = None if kept is None else top_k.take_out(z, y, kept)
        table, groups = self.passes.sums(z, o, y, case)
        shares = None
        if entries is not None:
            table, shares = entries.put_back(table, self.plan, padded=case.pooled)
            case = replace(case, pooled=False, tail=True, divergence=self.plan.divergence)
        tops: dict[int, Tensor] = {}
        a, b = self._weights(self._stats(table, given, tops, lambda k: _largest(z, groups, entries, k)))
        weight = b[0] if b else torch.zeros_like(a)  # of the one difference
        active = (a != 0) | (weight != 0) if b else a != 0  # two operations less, in every chunk
        factor = torch.full_like(a, self.factor)
        weights = torch.stack([a, weight, factor if rows.factor is None else factor * rows.factor])
        places = rows.places.take(active) if rows.places is not None else None
        found = self._second_pass(rows, o, table, weights, case, places)
        if shares is not None:
            more, g = shares.gradient(a, weight, table.select(0, TABLE.index("rest_mass")), self.with_kl)
            found = _together(found, more)
            if self.gradient:
                shares.write(g, rows, places, self.softcap, weights.select(0, 2))
        return Part(table, found, a, b, active, given, tops)

    # -- what the passes are given -------------------------------------------------------------------------------

    def _read_off_rows(self, rows: Rows) -> PerRow:
        """What the rule reads that is not in the first pass's table, [r] each."""
        needs = self.target.needs
        by_kernel = {f"{name}_log_p_y": name for name in ("teacher", "reference") if f"{name}_log_p_y" in needs}
        found = token_statistics.of_rows(rows, needs - by_kernel.keys(), self.vocab_size, self._dense)
        return found | {statistic: self._aux_log_p_y(rows, name) for statistic, name in by_kernel.items()}

    def _aux_log_p_y(self, rows: Rows, name: str) -> Tensor:
        """log-probability of the label under another model, [r]: one more read of its logits."""
        other = self._dense(rows, name)
        support = min(self.vocab_size, other.shape[1])
        logits = other.narrow(1, 0, support).clamp(min=NEVER)
        y = rows.labels.clamp(max=support - 1)
        table, _ = self.passes.sums(logits, logits, y, Pass(support))
        return table.select(0, TABLE.index("log_p_y")).masked_fill(rows.labels >= support, float("-inf"))

    def _case(self, kept: TopKRows | None, width: int) -> Pass:
        plan, groups = self.plan, not self.target.needs.isdisjoint(OF_TOP_K)
        if kept is not None:
            # With a padded vocabulary the pool is the student itself over real tokens: what it has outside the k.
            return Pass(support=self.vocab_size, pooled=self.vocab_size < width, groups=groups)
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
            within=not plan.divergence.is_forward_kl and self.support < width,
            groups=groups,
            divergence=plan.divergence,
        )

    def _stats(
        self, table: Tensor, given: PerRow, tops: dict[int, Tensor], largest: Callable[[int], Tensor] | None
    ) -> TokenStats:
        """The k largest are read off the logits, which are gone when the loss is reported: ``tops`` holds them."""
        values = _by_name(TABLE, table)
        if self.plan.slope is None and "offset_mass" in self.target.needs:
            values["offset_mass"] = torch.ones_like(values["log_p_y"])

        def top_k(k: int) -> Tensor:
            if k not in tops:
                assert largest is not None, f"the top {k} is asked for after the logits are gone"
                tops[k] = (largest(k).t() - values["m"]) - values["log_s"]
            return tops[k].t()

        return TokenStats(values | given, top_k, self.target.needs)

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
        if not (case.write or case.with_kl or case.pooled or case.tail):
            return z.new_zeros(len(FOUND), z.shape[0])
        if case.pooled and not case.divergence.is_forward_kl:
            # Scores are small where R is near p, and their mean with them, so that its rounding needs no correction.
            mean = self.passes.mean_score(z, o, rows.labels, table, weights, case)
            table.select(0, TABLE.index("mean_score")).zero_().add_(mean)
        elif case.pooled and g.dtype == z.dtype and self.passes.drifts(z):
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
        part = _joined(parts)
        rows, found, a, b = _by_name(TABLE, part.table), _by_name(FOUND, part.found), part.a, part.b
        label_loss = self.target.label_loss(self._stats(part.table, part.given, part.tops, None))
        statistics = label_statistics(rows["log_p_y"], rows["entropy"], rows["z_y"] >= rows["top"], a, b)
        tolerance = simplex_tolerance(a.dtype)
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

    def _residual_value(self, entropy: Tensor, found: PerRow) -> Tensor:
        """The residual's published value for a weight of one; see ``Target.value``. CE(R, p) = H(p) + Σ (B − R) log p."""
        if self.target.value == "tempered_kl":
            return self.target.residual_terms[0].factor * found["divergence"]
        as_ce = self.target.value == "ce" and self.plan.divergence.is_forward_kl
        return found["cross"] + entropy if as_ce else found["divergence"]


@dataclass
class Part:
    """What is known of a block of rows once its gradient is written.

    Attributes:
        table: [len(TABLE), r]. found: [len(FOUND), r]. a: [r]. b: [r] each. active: [r], whether the row has a gradient.
        given: what the rule reads beside the student's statistics. tops: [k, r] the log-probabilities of
            the k likeliest, by each k it asked for.
    """

    table: Tensor
    found: Tensor
    a: Tensor
    b: list[Tensor]
    active: Tensor
    given: PerRow
    tops: dict[int, Tensor]


def _joined(values: Sequence[Any]) -> Any:
    """The parts of several blocks as one: their tensors, and those in their lists and dicts, end to end."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(tuple(values), -1) if len(values) > 1 else first
    if isinstance(first, dict):
        return {key: _joined([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [_joined(column) for column in zip(*values, strict=True)]
    return Part(*(_joined([getattr(part, field.name) for part in values]) for field in fields(Part)))


def _by_name(names: Sequence[str], table: Tensor) -> PerRow:
    return dict(zip(names, table.unbind(0), strict=True))


def _together(found: Tensor, more: PerRow) -> Tensor:
    """What the second pass found, with what the k entries of a top-k distribution add."""
    rows = _by_name(FOUND, found)
    for name, value in more.items():
        rows[name] = torch.minimum(rows[name], value) if name == "lowest" else rows[name] + value
    return torch.stack([rows[name] for name in FOUND])


def _largest(z: Tensor, groups: Tensor | None, entries: top_k.Entries | None, k: int) -> Tensor:
    """The k largest logits, [r, k]: they are among the k groups of columns with the largest maxima."""
    assert groups is not None
    width = z.shape[1]
    check_top_k(k, width)
    best = groups.topk(min(k, groups.shape[1]), dim=1).indices
    places = torch.add(torch.arange(GROUP, device=z.device), best.unsqueeze(2), alpha=GROUP).flatten(1)
    # the last group may have fewer columns
    values = z.gather(1, places.clamp(max=width - 1)).masked_fill(places >= width, NEVER)
    if entries is not None:  # the entries that were taken out
        values = torch.cat([values, entries.z], 1)
    return values.topk(k, dim=1).values
