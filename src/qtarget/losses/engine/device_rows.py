"""A block of rows in two passes over its logits with plain torch on [r] numbers between them; no host read anywhere.

The passes are Triton's (``kernels.py``) or inductor's (``row_functions.py``); here is what both have in common: the
target's weights, a top-k distribution's k entries, and the statistics. Written without slices by ``[]`` and ``[:,
None]``, so that it runs on tensors without data, too.

Shape suffixes: r rows of the block, v vocabulary, k kept ids of a top-k distribution.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qtarget.losses import inputs
from qtarget.losses.engine import row_functions, top_k
from qtarget.losses.engine.block import label_statistics, top_k_too_large
from qtarget.losses.engine.buffers import RowResult, Rows, Scratch, TopKRows
from qtarget.losses.engine.row_functions import GROUP, Pass
from qtarget.losses.engine.row_plan import FOUND, GIVEN, NEVER, SUMS, RowPlan
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
        self, z: Tensor, o: Tensor, y: Tensor, given: Tensor, case: Pass, g: Tensor, places: Tensor | None
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

    def gradient(self, z, o, y, given, case, g, places):
        return self._run(self._kernels.gradient, z, o, y, given, case, g, places)


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

    def gradient(self, z, o, y, given, case, g, places):
        c = _coefficients(case.coefficients, z.dtype, z.device)
        capped = case.softcap is not None
        skips = case.write and places is not None
        out = torch.empty_like(z, dtype=g.dtype) if skips else None if g is z else g.narrow(0, 0, z.shape[0])
        arguments = (case.support, case.flags, capped, case.with_kl, out, case.write)
        found = self._run("gradient", z, o, y, given, c, *arguments)
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

    def run(self, rows: Rows) -> RowResult:
        """The block's loss, statistics and which rows have a gradient; the gradient is written to ``rows.g``."""
        z, y, pool = rows.z, rows.labels, self.plan.pool
        kept = self._kept(rows)
        o = self._other_logits(rows) if kept is None and self.plan.other is not None else z
        case = Pass(
            support=self.vocab_size if kept is not None else self.support,
            c_z=self.plan.c_z if kept is None else 1.0,
            c_o=self.plan.c_o if kept is None else 0.0,
            c_b=self.plan.c_b,
            slope=self.plan.slope or 0.0,
            # With a padded vocabulary the pool is the student itself over real tokens: what is outside the k.
            pooled=pool is not None and (kept is None or self.vocab_size < z.shape[1]),
            other=self.plan.other is not None and kept is None,
            offset=self.plan.slope is not None,
            pair=self.plan.is_pair,
            groups="top_k_entropy" in self.target.needs,
        )
        z_y = z.gather(1, y.unsqueeze(1)).squeeze(1)
        aux_log_p = {name: self._aux_log_p_y(rows, name) for name in ("teacher", "reference") if self._reads(name)}
        entries = None
        if kept is not None:
            entries = top_k.take_out(z, y, kept)
        found, groups = self.passes.sums(z, o, y, case)
        s = dict(zip(SUMS, found.unbind(0), strict=True))
        log_outside = None
        if entries is not None:
            s, log_outside = entries.put_back(s, z_y, padded=case.pooled)
        student = _student(s, z_y)
        stats = self._stats(rows, student, s, groups, entries, aux_log_p)
        a, b = self._weights(stats)
        label_loss = self.target.label_loss(stats)
        weight = b[0] if b else torch.zeros_like(a)  # of the one difference
        active = a != 0
        if b:
            active = active | (weight != 0)

        given = self._given(s, student, a, weight, rows)
        shares = None
        if entries is not None:
            assert log_outside is not None
            shares = entries.shares(student, log_outside, self.plan.c_o)
            given |= {"shift": shares.d_tail, "label": given["label"].masked_fill(entries.label_kept, 0.0)}
            case = replace(case, pooled=False, one_shift=True)
        places = rows.places.take(active) if rows.places is not None else None
        result = self._second_pass(rows, o, given, case, places)
        if shares is not None:
            found_k, g_k = shares.gradient(a, weight, student.rest_mass, self.with_kl)
            for name, value in found_k.items():
                result[name] = torch.minimum(result[name], value) if name == "lowest" else result[name] + value
            if self.gradient:
                shares.write(g_k, rows, places, self.softcap, given["factor"])
        return self._result(student, a, b, weight, label_loss, result, active, z.dtype == torch.float64, s)

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
        found, _ = self.passes.sums(logits, logits, y, Pass(covered))
        s = dict(zip(SUMS, found.unbind(0), strict=True))
        log_p_y = _student(s, logits.gather(1, y.unsqueeze(1)).squeeze(1)).log_p_y
        return log_p_y.masked_fill(rows.labels >= covered, float("-inf"))

    def _stats(self, rows, student, s, groups, entries, aux_log_p) -> TokenStats:
        values = {"log_p_y": student.log_p_y, "rest_mass": student.rest_mass, "entropy": student.entropy}
        values |= rows.columns
        values |= {f"{name}_log_p_y": value for name, value in aux_log_p.items()}
        if self.plan.pool is not None:
            values["offset_mass"] = torch.ones_like(student.log_p_y)
            if self.plan.slope is not None:
                log_mass = s["m_u"] - self.plan.c_z * s["m"] + (s["s_u"] / s["s_plain"]).log()
                values["offset_mass"] = log_mass.exp()
        return TokenStats(values, lambda k: _top_k_entropy(rows.z, groups, entries, k), self.target.needs)

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

    def _given(self, s, student, a: Tensor, weight: Tensor, rows: Rows) -> dict[str, Tensor]:
        given = dict.fromkeys(GIVEN, s["m"])
        given |= {"log_s": student.log_s, "a": a, "label": -a * student.rest_mass, "b": weight, "z_y": student.z_y}
        factor = torch.full_like(a, self.factor)
        given["factor"] = factor if rows.factor is None else factor * rows.factor
        m_b, s_b = (self.plan.c_b * s["m"], s["s_b"]) if self.plan.is_pair else (s["m"], student.total)
        s_u = s["s_u"]
        given |= {"m_u": s["m_u"], "log_s_u": s_u.log(), "m_b": m_b, "log_s_b": s_b.log()}
        # of d = c_o (o − z) + (c_z + c_o − c_b)(z − m) + shift, in which nothing of the size of a logit cancels
        given["shift"] = ((self.plan.c_z + self.plan.c_o) * s["m"] - s["m_u"]) - (s_u / s_b).log()
        return given

    # -- the second pass -----------------------------------------------------------------------------------------

    def _second_pass(self, rows: Rows, o: Tensor, given: dict, case: Pass, places: Tensor | None) -> dict[str, Tensor]:
        z = rows.z
        g = z if rows.g is None else rows.g
        case = replace(case, softcap=self.softcap, with_kl=self.with_kl, write=self.gradient)
        if case.pooled and g.dtype == z.dtype and self.passes.drifts(z):
            # Both distributions sum to one, so Σ (B − R) tells by how much log R's normaliser is off. Where g is
            # rounded to 16 bits that is below rounding.
            plain = replace(case, write=False, with_kl=False)
            drift = self._pass(rows, o, given, plain, g, None)["drift"]
            given |= {"log_s_u": given["log_s_u"] + torch.log1p(-drift), "shift": given["shift"] - torch.log1p(-drift)}
        if not (case.write or case.with_kl or case.pooled or case.one_shift):
            return {}
        return self._pass(rows, o, given, case, g, places)

    def _pass(self, rows: Rows, o: Tensor, given: dict, case: Pass, g: Tensor, places: Tensor | None) -> dict:
        table = torch.stack([given[name] for name in GIVEN])
        found = self.passes.gradient(rows.z, o, rows.labels, table, case, g, places)
        return dict(zip(FOUND, found.unbind(0), strict=True))

    # -- values --------------------------------------------------------------------------------------------------

    def _result(self, student, a, b, weight, label_loss, found, active, double: bool, s) -> RowResult:
        statistics = label_statistics(student, a, b)
        tolerance = simplex_tolerance(double)
        if self.plan.pool is None:  # Q is p_y + a (1 − p_y) at the label and (1 − a) p_v elsewhere
            lowest = student.p_y + a * student.rest_mass
            others = (s["top"] - s["m"] - student.log_s).exp()
            lowest = torch.minimum(lowest, torch.where(a > 1, (1 - a) * others, lowest))
            statistics["update"] = a.abs() * student.rest_mass
            cross, loss = torch.zeros_like(a), label_loss
        else:
            lowest, cross = found["lowest"], found["cross"]
            statistics["update"] = found["size"] / 2
            loss = label_loss + weight * self._residual_value(student, found)
        statistics["off_simplex_fraction"] = (lowest < -tolerance).to(a.dtype)
        statistics["ce_q"] = a * -student.log_p_y + (1 - a) * student.entropy + weight * cross
        if self.with_kl:
            statistics["kl_q"] = found["kl_q"].masked_fill(lowest < -tolerance, float("nan"))
        return RowResult(loss, statistics, active)

    def _residual_value(self, student, found: dict[str, Tensor]) -> Tensor:
        """The residual's published value for a weight of one; see ``Target.value``. CE(R, p) = H(p) + Σ (B − R) log
        p."""
        if self.target.value == "tempered_kl":
            return self.target.residual_terms[0][0] * found["kl"]
        return found["kl"] if self.target.value == "kl" else found["cross"] + student.entropy


@dataclass
class _Student:
    """What is known of the student's rows, [r] each."""

    total: Tensor
    log_s: Tensor
    p_y: Tensor
    rest_mass: Tensor
    log_p_y: Tensor
    entropy: Tensor
    is_top1: Tensor
    z_y: Tensor
    m: Tensor


def _student(s: dict[str, Tensor], z_y: Tensor) -> _Student:
    x_y = z_y - s["m"]
    e_y = x_y.exp()
    total = s["rest"] + e_y
    log_s = total.log()
    rest_mass = s["rest"] / total
    log_p_y = torch.where(rest_mass < 0.5, torch.log1p(-rest_mass.clamp(max=0.5)), x_y - log_s)
    entropy = log_s - (s["dot"] + e_y * x_y) / total
    return _Student(total, log_s, e_y / total, rest_mass, log_p_y, entropy, z_y >= s["top"], z_y, s["m"])


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
