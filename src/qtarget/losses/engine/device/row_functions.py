"""The two passes over a block's logits as pure functions of tensors.

They are what the kernels of ``kernels.py`` compute, said in plain PyTorch, and what inductor compiles where there is no
Triton, or where it pays on a CPU. Between the two, the target's weights are worked out on [r] numbers
(``device_rows.py``). Their form and the names of what goes in and out are in ``row_plan.py``.

Shape suffixes: r rows of the block, v vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtarget.losses.engine.device.row_plan import DERIVED, FOUND, NEVER, SUMS
from qtarget.targets.divergence import FORWARD_KL, Divergence

# Logits of which the largest is kept, so that the k largest can be looked for among few.
GROUP = 128


@dataclass(frozen=True)
class Pass:
    """What does not change from row to row; each combination of flags is a kernel, or a graph, of its own.

    Attributes:
        pooled: whether R is a softmax of pooled logits; other: whether another model's logits are in the pool.
        offset, pair: whether the pool has an offset, and B is the student at a temperature.
        within: whether B is the student over the columns that R covers, and not over all.
        tail: whether what is outside the k of a top-k distribution moves as a whole, in the student's shape.
        groups: whether maxima of groups of columns are kept.
        support: columns R covers. divergence: by which R is approached.
        softcap: cap whose derivative g carries, or None. with_kl: also KL(Q ‖ p).
        write: whether g is written. mean_only: whether only the mean score is found.
    """

    support: int
    c_z: float = 1.0
    c_o: float = 0.0
    c_b: float = 1.0
    slope: float = 0.0
    softcap: float | None = None
    pooled: bool = False
    other: bool = False
    offset: bool = False
    pair: bool = False
    within: bool = False
    tail: bool = False
    groups: bool = False
    divergence: Divergence = FORWARD_KL
    with_kl: bool = False
    write: bool = True
    mean_only: bool = False

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The numbers that may differ between targets with the same flags: c_z + c_o − c_b, which is 0 for most and then
        exactly so, c_o, c_b, the slope and 1/softcap."""
        excess = self.c_z + self.c_o - self.c_b
        return (excess if abs(excess) > 1e-12 else 0.0, self.c_o, self.c_b, self.slope, 1 / (self.softcap or 1.0))

    @property
    def flags(self) -> tuple[bool, ...]:
        return (self.pooled, self.other, self.offset, self.pair, self.within, self.tail, self.groups)


def maxima(z: Tensor, o: Tensor, y: Tensor, c: Tensor, support: int, flags: tuple[bool, ...]):
    """([3, r]: m, top and m_u of ``SUMS``, maxima of groups [r, ⌈v / GROUP⌉] or None): what ``sums`` is relative to.

    A graph of its own: in one with the sums inductor would write out a [r, v] tensor between the two loops.

    Args:
        z: [r, v] logits. o: another model's. y: [r] labels. c: the coefficients of ``Pass`` as a tensor, so that another
            value is no other graph.
    """
    pooled, other, offset, _, _, _, groups = flags
    z_y = z.gather(1, y.unsqueeze(1))
    is_y = _columns(z) == y.unsqueeze(1)
    top = torch.where(is_y, NEVER, z).amax(1)
    # Above what is absent, so that e^(NEVER − m) is 0 even in a row where nothing is left.
    m = torch.maximum(z_y.squeeze(1), top).clamp(min=0.5 * NEVER)
    m_u = m
    if pooled:
        own = c[0] + c[2]
        u = own * z + _gap(z, torch.zeros_like(z), o, z_y, c, support, other, offset)
        m_u = u.amax(1) - own * m
    return torch.stack([m, top, m_u]), _group_maxima(z) if groups else None


def sums(z: Tensor, o: Tensor, y: Tensor, peaks: Tensor, c: Tensor, support: int, flags: tuple[bool, ...]) -> Tensor:
    """[len(TABLE), r] from what ``maxima`` found, peaks [3, r]."""
    pooled, other, offset, pair, within, _, _ = flags
    m, top, m_u = peaks.unsqueeze(2).unbind(0)
    is_y = _columns(z) == y.unsqueeze(1)
    z_y = z.gather(1, y.unsqueeze(1))
    x = z - m
    e = torch.where(is_y, 0.0, x.exp())
    found = dict.fromkeys(SUMS, torch.ones_like(m.squeeze(1)))
    found |= {"z_y": z_y.squeeze(1), "m": m.squeeze(1), "top": top.squeeze(1), "rest": _sum(e), "dot": _sum(e * x)}
    if within:
        found["s_b"] = _sum(torch.where(_columns(z) < support, x.exp(), 0.0))
    elif pair:
        found["s_b"] = _sum((c[2] * x).exp())
    if offset:
        found["s_plain"] = _sum(((c[0] + c[2]) * x).exp())
    if pooled:
        u = c[2] * x + _gap(z, x, o, z_y, c, support, other, offset)
        found |= {"m_u": m_u.squeeze(1), "s_u": _sum((u - m_u).exp())}
    found |= derived(found, pooled, pair or within)
    return torch.stack([found[name] for name in (*SUMS, *DERIVED)])


def derived(s: dict[str, Tensor], pooled: bool = False, own_base: bool = False) -> dict[str, Tensor]:
    """What follows from the sums of ``SUMS``, [r] each, by the names of ``DERIVED``. own_base: whether B is not p."""
    x_y = s["z_y"] - s["m"]
    e_y = x_y.exp()
    total = s["rest"] + e_y
    log_s, rest_mass = total.log(), s["rest"] / total
    found = dict.fromkeys(DERIVED, log_s)
    found["rest_mass"] = rest_mass
    found["log_p_y"] = torch.where(rest_mass < 0.5, torch.log1p(-rest_mass.clamp(max=0.5)), x_y - log_s)
    found["entropy"] = log_s - (s["dot"] + e_y * x_y) / total
    if pooled:
        s_b = s["s_b"] if own_base else total
        found["log_s_u"], found["log_s_b"] = s["s_u"].log(), s_b.log()
        found["shift"] = -(s["s_u"] / s_b).log()
        found["offset_mass"] = s["m_u"].exp() * (s["s_u"] / s["s_plain"])
    return found


def gradient(
    z: Tensor,
    o: Tensor,
    y: Tensor,
    table: Tensor,
    weights: Tensor,
    c: Tensor,
    support: int,
    flags: tuple[bool, ...],
    divergence: Divergence,
    capped: bool,
    with_kl: bool,
    out: Tensor | None,
) -> Tensor:
    """[len(FOUND), r] from a row's sums, table [len(TABLE), r], and its weights [len(WEIGHTS), r].

    g times each row's factor is written to ``out`` [r, v], or nowhere.
    """
    pooled, tail = flags[0], flags[5]
    s = _by_name(table)
    a, b, factor = weights.unsqueeze(2).unbind(0)
    m = s["m"]
    label = -a * s["rest_mass"]
    if tail:  # an entry that was taken out gets its gradient elsewhere, the label's too
        label = torch.where(z.gather(1, y.unsqueeze(1)) < 0.5 * NEVER, 0.0, label)
    v, x = _columns(z), z - m
    log_p = x - s["log_s"]
    p = log_p.exp()
    g = torch.where(v == y.unsqueeze(1), label, a * p)
    found = dict.fromkeys(FOUND, torch.zeros_like(m.squeeze(1)))
    if pooled or tail:
        forward = divergence.is_forward_kl
        if tail:
            difference = s["tail_pull"] * (x - s["log_s_b"]).exp()
            if support < z.shape[1]:  # beyond, R is 0, and another divergence does not look there
                difference = torch.where(v < support, difference, p if forward else 0.0)
                found["divergence"] = _sum(torch.where(v < support, 0.0, difference))
        else:
            log_base, base, R, d = _compared(z, x, o, s, c, support, flags, divergence)
            if forward:
                # B − R = −B (e^d − 1): by its series where d is small, its next term below rounding: nothing cancels
                small, further = (2e-3, 1 / 120) if z.dtype == torch.float64 else (0.0625, 0.0)
                near = -(base * d) * (1 + d * (0.5 + d * (1 / 6 + d * (1 / 24 + d * further))))
                difference = torch.where(d.abs() < small, near, base - R)
                found["divergence"] = _sum(R * d + difference)
            else:
                difference = divergence.times_p(base, log_base, -d) - base * s["mean_score"]
                found["divergence"] = _sum(divergence.value(base, R, -d))
        g = g + b * difference
        found["cross"] = _sum(difference * log_p)
        found["drift"] = _sum(difference)
        found["size"] = _sum(g.abs())
        found["lowest"] = (p - g).amin(1)
    if with_kl:
        found["kl_q"] = _sum(kl_terms(p, log_p, g))
    if capped:
        g = g * (1 - (z * c[4]).clamp(-1, 1) ** 2)  # a logit that was taken out is beyond every cap
    if out is not None:
        out.copy_(g * factor)
    return torch.stack([found[name] for name in FOUND])


def mean_score(
    z: Tensor,
    o: Tensor,
    table: Tensor,
    c: Tensor,
    support: int,
    flags: tuple[bool, ...],
    divergence: Divergence,
) -> Tensor:
    """E_B[s], [r], of a divergence other than forward KL."""
    s = _by_name(table)
    log_base, base, _, d = _compared(z, z - s["m"], o, s, c, support, flags, divergence)
    return _sum(divergence.times_p(base, log_base, -d))


def _compared(
    z: Tensor,
    x: Tensor,
    o: Tensor,
    s: dict[str, Tensor],
    c: Tensor,
    support: int,
    flags: tuple[bool, ...],
    divergence: Divergence,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log B, B, R, d = log R − log B), [r, v]. Beyond the columns that R covers R is 0; where B is the student over
    these columns alone, B and d are 0 there, too."""
    _, other, offset, pair, within, _, _ = flags
    log_base = c[2] * x - s["log_s_b"] if pair or within else x - s["log_s"]
    # The same rounded d as in the sums, so that R adds up to one however large the logits are.
    d = _gap(z, x, o, s["z_y"], c, support, other, offset, -math.inf if divergence.needs_full_support else NEVER)
    R = ((c[2] * x + d - s["m_u"]) - s["log_s_u"]).exp()
    d = (d - s["m_u"]) + s["shift"]
    base = log_base.exp()
    if support < z.shape[1]:
        covered = _columns(z) < support
        R, d = torch.where(covered, R, 0.0), torch.where(covered, d, 0.0 if within else NEVER)
        base = torch.where(covered, base, 0.0) if within else base
    return log_base, base, R, d


def _gap(
    z: Tensor,
    x: Tensor,
    o: Tensor,
    z_y: Tensor,
    c: Tensor,
    support: int,
    other: bool,
    offset: bool,
    lowest: float = NEVER,
) -> Tensor:
    """d [r, v], the pooled logits less B's, x = z − m: from differences, so that a teacher near the student loses no
    digits; −1e30 beyond the columns the residual covers, and ``lowest`` for what the other model rules out."""
    d = c[0] * x
    if other:
        o = o.narrow(1, 0, support).clamp(min=lowest)  # what it rules out is −inf
        if support < z.shape[1]:
            o = torch.nn.functional.pad(o, (0, z.shape[1] - support), value=NEVER)
        d = d + c[1] * (o - z)
    if offset:
        d = d + torch.nn.functional.logsigmoid(c[3] * (z - z_y))
    if support < z.shape[1]:
        d = torch.where(_columns(z) < support, d, NEVER)
    return d


def _columns(z: Tensor) -> Tensor:
    return torch.arange(z.shape[1], device=z.device).unsqueeze(0)


def _by_name(table: Tensor) -> dict[str, Tensor]:
    """A table's rows, [r, 1] each."""
    return dict(zip((*SUMS, *DERIVED), table.unsqueeze(2).unbind(0), strict=True))


def _sum(x: Tensor) -> Tensor:
    """Σ over the vocabulary, [r]. On a CPU in float64: a float32 sum of 49,152 entries is off by some 1e-6."""
    if x.device.type == "cpu":
        return x.sum(1, dtype=torch.float64).to(x.dtype)
    return x.sum(1)


def _group_maxima(z: Tensor) -> Tensor:
    groups = -(-z.shape[1] // GROUP)
    padded = torch.nn.functional.pad(z, (0, groups * GROUP - z.shape[1]), value=NEVER)
    return padded.unflatten(1, (groups, GROUP)).amax(2)


def kl_terms(p: Tensor, log_p: Tensor, g: Tensor) -> Tensor:
    """Q log(Q/p) − Q + p for Q = p − g, each 0 or more, so that nothing cancels where Q is near p."""
    Q = (p - g).clamp(min=0)
    x = -g / p.clamp(min=torch.finfo(p.dtype).tiny)
    # (1 + x) log(1 + x) − x by its series where x is small
    series = 0.5 + x * (-1 / 6 + x * (1 / 12 + x * (-1 / 20 + x * (1 / 30 + x * (-1 / 42 + x / 56)))))
    near = p * x * x * series
    far = torch.special.xlogy(Q, Q) - Q * log_p.clamp(min=NEVER) - Q + p
    return torch.where(x.abs() < (0.1 if p.dtype == torch.float32 else 1e-2), near, far)


# Inductor writes out what several sums read, a [r, v] tensor of its own; in the same loop it costs nothing to keep.
_ONE_LOOP: dict[str, str | int | bool | Callable[..., Any]] = {
    "realize_reads_threshold": 1000,
    "realize_opcount_threshold": 1000,
    "realize_acc_reads_threshold": 1000,
}


@functools.cache
def compiled(name: str):
    """One of the functions above through inductor: a graph for each combination of flags and dtypes, for any number of
    rows and any vocabulary."""
    functions: dict[str, Callable] = {"maxima": maxima, "sums": sums, "mean_score": mean_score, "gradient": gradient}
    return torch.compile(functions[name], dynamic=True, fullgraph=True, options=_ONE_LOOP)
