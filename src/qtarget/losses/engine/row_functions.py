"""The two passes over a block's logits as pure functions of tensors.

They are what the kernels of ``kernels.py`` compute, said in plain PyTorch, and what inductor compiles where there is no
Triton, or where it pays on a CPU. Between the two, the target's weights are worked out on [r] numbers
(``device_rows.py``). Their form and the names of what goes in and out are in ``row_plan.py``.

Shape suffixes: r rows of the block, v vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qtarget.losses.engine.row_plan import DERIVED, FOUND, NEVER, SUMS

# Logits of which the largest is kept, so that the k largest can be looked for among few.
GROUP = 128


@dataclass(frozen=True)
class Pass:
    """What does not change from row to row; each combination of flags is a kernel, or a graph, of its own.

    Attributes:
        pooled: whether R is a softmax of pooled logits; other: whether another model's logits are in the pool.
        offset, pair: whether the pool has an offset, and B is not the student.
        one_shift: R is p times one number per row, on the first ``support`` columns: what a top-k distribution leaves.
        groups: whether maxima of groups of columns are kept.
        support: columns R covers.
        softcap: cap whose derivative g carries, or None. with_kl: also KL(Q ‖ p).
        write: whether g is written.
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
    one_shift: bool = False
    groups: bool = False
    with_kl: bool = False
    write: bool = True

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The numbers that may differ between targets with the same flags."""
        return (self.c_z, self.c_o, self.c_b, self.slope, 1 / (self.softcap or 1.0))

    @property
    def flags(self) -> tuple[bool, ...]:
        return (self.pooled, self.other, self.offset, self.pair, self.one_shift, self.groups)


def sums(z: Tensor, o: Tensor, y: Tensor, c: Tensor, support: int, flags: tuple[bool, ...]):
    """([len(TABLE), r], maxima of groups [r, ⌈v / GROUP⌉] or None) of logits z [r, v], another model's o, labels y [r].

    ``c``: the five coefficients of ``Pass`` as a tensor, so that another value is no other graph.
    """
    pooled, other, offset, pair, _, groups = flags
    v = torch.arange(z.shape[1], device=z.device).unsqueeze(0)
    is_y = v == y.unsqueeze(1)
    z_y = z.gather(1, y.unsqueeze(1))
    top = torch.where(is_y, NEVER, z).amax(1, keepdim=True)
    # Above what is absent, so that e^(NEVER − m) is 0 even in a row where nothing is left.
    m = torch.maximum(z_y, top).clamp(min=0.5 * NEVER)
    x = z - m
    e = torch.where(is_y, 0.0, x.exp())
    found = dict.fromkeys(SUMS, torch.ones_like(m.squeeze(1)))
    found |= {"z_y": z_y.squeeze(1), "m": m.squeeze(1), "top": top.squeeze(1), "rest": _sum(e), "dot": _sum(e * x)}
    if pair:
        found["s_b"] = _sum((c[2] * x).exp())
    if offset:
        found["s_plain"] = _sum((c[0] * x).exp())
    if pooled:
        u = _pooled(z, _as_wide(o, z, support), z_y, c, support, other, offset)
        m_u = u.amax(1, keepdim=True)
        found |= {"m_u": m_u.squeeze(1), "s_u": _sum((u - m_u).exp())}
    found |= derived(found, c, pooled, pair)
    return torch.stack([found[name] for name in (*SUMS, *DERIVED)]), _group_maxima(z) if groups else None


def derived(s: dict[str, Tensor], c: Tensor | None = None, pooled: bool = False, pair: bool = False) -> dict[str, Tensor]:
    """What follows from the sums of ``SUMS``, [r] each, by the names of ``DERIVED``."""
    x_y = s["z_y"] - s["m"]
    e_y = x_y.exp()
    total = s["rest"] + e_y
    log_s, rest_mass = total.log(), s["rest"] / total
    found = dict.fromkeys(DERIVED, log_s)
    found["rest_mass"] = rest_mass
    found["log_p_y"] = torch.where(rest_mass < 0.5, torch.log1p(-rest_mass.clamp(max=0.5)), x_y - log_s)
    found["entropy"] = log_s - (s["dot"] + e_y * x_y) / total
    if pooled:
        assert c is not None
        s_b = s["s_b"] if pair else total
        found["log_s_u"], found["log_s_b"] = s["s_u"].log(), s_b.log()
        found["shift"] = ((c[0] + c[1]) * s["m"] - s["m_u"]) - (s["s_u"] / s_b).log()
        found["offset_mass"] = (s["m_u"] - c[0] * s["m"] + (s["s_u"] / s["s_plain"]).log()).exp()
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
    capped: bool,
    with_kl: bool,
    out: Tensor | None,
    write: bool,
) -> Tensor:
    """[len(FOUND), r] from a row's sums, table [len(TABLE), r], and its weights [len(WEIGHTS), r].

    Where ``write`` says so, g times each row's factor is written to ``out`` [r, v], or over the logits: so it takes
    no memory of its own, whose pages would cost a CPU more than the arithmetic.
    """
    pooled, other, offset, pair, one_shift, _ = flags
    s = dict(zip((*SUMS, *DERIVED), table.unsqueeze(2).unbind(0), strict=True))
    a, b, factor = weights.unsqueeze(2).unbind(0)
    m, z_y, shift = s["m"], s["z_y"], s["shift"]
    label = -a * s["rest_mass"]
    if one_shift:  # an entry that was taken out gets its gradient elsewhere, the label's too
        label = torch.where(z.gather(1, y.unsqueeze(1)) < 0.5 * NEVER, 0.0, label)
    v = torch.arange(z.shape[1], device=z.device).unsqueeze(0)
    log_p = (z - m) - s["log_s"]
    p = log_p.exp()
    g = torch.where(v == y.unsqueeze(1), label, a * p)
    found = dict.fromkeys(FOUND, torch.zeros_like(m.squeeze(1)))
    if pooled or one_shift:
        base = (c[2] * (z - m) - s["log_s_b"]).exp() if pair else p
        if one_shift:  # R is the student's shape times one number per row
            d, R = shift.expand_as(z), (log_p + shift).exp()
        else:
            o = _as_wide(o, z, support)
            R = (_pooled(z, o, z_y, c, support, other, offset) - s["m_u"] - s["log_s_u"]).exp()
            # From differences of logits, so that a teacher near the student loses no digits.
            d = (c[0] + c[1] - c[2]) * (z - m) + shift
            if other:
                d = d + c[1] * (o - z)
            if offset:
                d = d + torch.nn.functional.logsigmoid(c[3] * (z - z_y))
        if support < z.shape[1]:
            R, d = torch.where(v < support, R, 0.0), torch.where(v < support, d, NEVER)
        # B − R = −B (e^d − 1): by its series where d is small, so that nothing cancels
        near = -(base * d) * (1 + d * (0.5 + d * (1 / 6 + d * (1 / 24 + d * _further(z)))))
        difference = torch.where(d.abs() < _near(z), near, base - R)
        g = g + b * difference
        found["kl"] = _sum(R * d + difference)
        found["cross"] = _sum(difference * log_p)
        found["drift"] = _sum(difference)
        found["size"] = _sum(g.abs())
        found["lowest"] = (p - g).amin(1)
    if with_kl:
        found["kl_q"] = _sum(kl_terms(p, log_p, g))
    if capped:
        g = g * (1 - (z * c[4]).clamp(-1, 1) ** 2)  # a logit that was taken out is beyond every cap
    if write:
        (z if out is None else out).copy_(g * factor)
    return torch.stack([found[name] for name in FOUND])


def _as_wide(o: Tensor, z: Tensor, support: int) -> Tensor:
    """Another model's logits with as many columns as the student's; what is absent or ruled out is −1e30."""
    o = o.narrow(1, 0, support).clamp(min=NEVER)
    return torch.nn.functional.pad(o, (0, z.shape[1] - support), value=NEVER) if support < z.shape[1] else o


def _pooled(z: Tensor, o: Tensor, z_y: Tensor, c: Tensor, support: int, other: bool, offset: bool) -> Tensor:
    """u [r, v]: pooled logits, −1e30 beyond the columns the residual covers."""
    u = c[0] * z
    if other:
        u = u + c[1] * o
    if offset:
        u = u + torch.nn.functional.logsigmoid(c[3] * (z - z_y))
    if support < z.shape[1]:
        u = torch.where(torch.arange(z.shape[1], device=z.device).unsqueeze(0) < support, u, NEVER)
    return u


def _near(z: Tensor) -> float:
    """Where the series of ``gradient`` has every digit: the next term is below rounding."""
    return 2e-3 if z.dtype == torch.float64 else 0.0625


def _further(z: Tensor) -> float:
    return 1 / 120 if z.dtype == torch.float64 else 0.0


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


@functools.cache
def compiled(name: str):
    """``sums`` or ``gradient`` through inductor: a graph for each combination of flags and dtypes, for any number of
    rows and any vocabulary."""
    functions: dict[str, Callable] = {"sums": sums, "gradient": gradient}
    return torch.compile(functions[name], dynamic=True, fullgraph=True)
