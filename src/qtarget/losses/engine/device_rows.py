"""Row mathematics on a device: two passes, plain torch on [r] between, no host reads.

The passes are Triton's (``kernels.py``) or inductor's (``row_functions.py``); here is what both have in common: the
target's weights, a top-k distribution's k entries, and the statistics. Written without slices by ``[]`` and ``[:,
None]``, so that it runs on tensors without data, too.

Shape suffixes: r rows of the block, v vocabulary, k kept ids of a top-k distribution.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qtarget.losses import inputs
from qtarget.losses.engine import top_k
from qtarget.losses.engine.block import label_statistics, top_k_too_large
from qtarget.losses.engine.buffers import RowResult, Rows, Scratch, TopKRows
from qtarget.losses.engine.passes import HostReads, Passes
from qtarget.losses.engine.row_functions import GROUP, Pass
from qtarget.losses.engine.row_plan import FOUND, NEVER, TABLE, RowPlan
from qtarget.losses.output import simplex_tolerance
from qtarget.targets import Target, TokenStats

logger = logging.getLogger(__name__)
_watched: set[str] = set()


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
        support = min(self.vocab_size, other.shape[1])
        logits = other.narrow(1, 0, support).clamp(min=NEVER)
        y = rows.labels.clamp(max=support - 1)
        table, _ = self.passes.sums(logits, logits, y, Pass(support))
        return table.select(0, TABLE.index("log_p_y")).masked_fill(rows.labels >= support, float("-inf"))

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
            return self.target.residual_terms[0].factor * found["kl"]
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
    if width % GROUP:  # the last group has fewer columns
        values = z.gather(1, places.clamp(max=width - 1)).masked_fill(places >= width, NEVER)
    else:
        values = z.gather(1, places)
    if entries is not None:  # the entries that were taken out
        values = torch.cat([values, entries.z], 1)
    largest = values.topk(k, dim=1).values
    gap = largest.narrow(1, 1, k - 1) - largest.narrow(1, 0, 1)
    share = gap.exp()
    rest = share.sum(1)
    return rest.log1p() - (gap * share).sum(1) / (1 + rest)
