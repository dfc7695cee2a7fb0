"""The two passes over a block's logits as Triton kernels, one program a row.

They compute what ``row_functions.py`` says in PyTorch; names and form are in ``row_plan.py``. A student's target
reads each float32 logit twice and writes a 16-bit gradient, 10 bytes; with another model's logits 18. Everything is
relative to a running maximum, and what is absent has a logit of −1e30, so that no sum needs a branch.

exp2 of arguments scaled beforehand, since Triton's exp does not flush denormals and costs a third more instructions.
Eight elements a thread: sixteen would need 168 registers. g is never written over logits of another width: a row's
first tile would be overwritten before it is read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtarget.losses.engine.device.kernel_scores import compared, expm1_over, is_small, kind
from qtarget.losses.engine.device.row_functions import GROUP, Pass
from qtarget.losses.engine.device.row_plan import FOUND, NEVER, TABLE, WEIGHTS

# Columns of a tile, and warps of a program.
BLOCK = 2048
WARPS = 8
# Of a thread: where the compiler aims at fewer for more programs at a time, it spills a loop's sums.
REGISTERS = 128

_NEVER = tl.constexpr(NEVER)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)

try:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    COMPILE_ERRORS: tuple[type[Exception], ...] = (CompilationError, OutOfResources, PTXASError)
except ImportError:  # other versions name them elsewhere
    COMPILE_ERRORS = (RuntimeError,)


def can_run(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, or None where they can. In Triton's interpreter a CPU can."""
    if triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return f"needs a CUDA device and hidden is on {device.type}"
    if torch.version.hip is not None:
        return "is made for NVIDIA's devices"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"needs compute capability 8.0 or newer and the device has {capability[0]}.{capability[1]}"
    if triton.__version__.startswith("3.9.0") and capability >= (9, 0):
        # its LLVM crashes the whole process on a kernel with another model's logits, so that nothing could be caught
        return (
            f"cannot be compiled by triton {triton.__version__} for compute capability {capability[0]}.{capability[1]}"
        )
    return None


def sums(z: Tensor, o: Tensor, y: Tensor, case: Pass) -> tuple[Tensor, Tensor | None]:
    """As ``row_functions.sums``, in one read of z and o."""
    rows, width = z.shape
    out = z.new_empty(len(TABLE), rows)
    groups = z.new_empty(rows, -(-width // GROUP)) if case.groups else None
    kept = out if groups is None else groups
    excess, c_o, c_b, slope, _ = case.coefficients
    _sums[(rows,)](
        z, o, y, out, kept,
        z.stride(0), o.stride(0), out.stride(0), kept.stride(0),
        width, _reach(width, z), case.support, _reach(case.support, o), excess, c_o, c_b, slope,
        POOLED=case.pooled, OTHER=case.other, OFFSET=case.offset, PAIR=case.pair, WITHIN=case.within,
        NARROW=_narrow(case, width, o), GROUP=GROUP if case.groups else 0,
        ODD=width % _VECTOR != 0, DOUBLE=z.dtype == torch.float64, BLOCK=BLOCK, num_warps=WARPS, maxnreg=REGISTERS,
    )  # fmt: skip
    return out, groups


def gradient(
    z: Tensor, o: Tensor, y: Tensor, table: Tensor, weights: Tensor, case: Pass, g: Tensor, places: Tensor | None
) -> Tensor:
    """As ``row_functions.gradient``; g goes to row ``places[i]`` of ``g`` for row i of z, or to row i."""
    rows, width = z.shape
    found = z.new_zeros(len(FOUND), rows)
    name, number = kind(case.divergence)
    _gradient[(rows,)](
        z, o, y, y if places is None else places, table, weights, found, g,
        z.stride(0), o.stride(0), g.stride(0), rows, width, _reach(width, z, g), case.support, _reach(case.support, o),
        *case.coefficients, number,
        POOLED=case.pooled, OTHER=case.other, OFFSET=case.offset, PAIR=case.pair or case.within, TAIL=case.tail,
        KIND=name, MEAN_ONLY=case.mean_only, CAPPED=case.softcap is not None, KL=case.with_kl, WRITE=case.write,
        SKIPS=places is not None, NARROW=_narrow(case, width, o),
        ODD=width % _VECTOR != 0, DOUBLE=z.dtype == torch.float64, BLOCK=BLOCK, num_warps=WARPS, maxnreg=REGISTERS,
    )  # fmt: skip
    return found


# Columns that loads and stores of 16 bytes come in, of the narrowest dtype.
_VECTOR = 16


def _reach(width: int, *tensors: Tensor) -> int:
    """Columns up to which a row is read and written: whole vectors where its stride has room for them. What lies beyond
    ``width`` is masked once it is in registers; a mask that ends within a vector would make every load a scalar."""
    return min(-(-width // _VECTOR) * _VECTOR, *(tensor.stride(0) for tensor in tensors))


def _narrow(case: Pass, width: int, o: Tensor) -> bool:
    """Whether columns have to be told apart: beyond the support, or where a tile's last lanes would enter a sum. So would
    what lies in the other model's buffer beyond its row, which nobody wrote."""
    beyond = case.other and _reach(case.support, o) > case.support
    return case.support < width or beyond or (case.pooled and case.c_z + case.c_o <= 0)


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1 + tl.exp2(-tl.abs(x) * _LOG2E))


@triton.jit
def _sums(
    z_ptr, o_ptr, y_ptr, out_ptr, group_ptr,
    z_stride, o_stride, out_stride, group_stride, width, reach, support, o_reach, excess, c_o, c_b, slope,
    POOLED: tl.constexpr, OTHER: tl.constexpr, OFFSET: tl.constexpr, PAIR: tl.constexpr, WITHIN: tl.constexpr,
    NARROW: tl.constexpr, GROUP: tl.constexpr, ODD: tl.constexpr, DOUBLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(y_ptr + row).to(tl.int32)
    z_ptr += row * z_stride
    if OTHER:
        o_ptr += row * o_stride
    z_y = tl.load(z_ptr + y)
    top = z_y * 0 + _NEVER
    # Above what is absent, so that e^(NEVER − m) is 0 even in a row where nothing is left.
    m = tl.maximum(z_y, 0.5 * _NEVER)
    m_u = top
    excess, c_o, c_b = z_y * 0 + excess, z_y * 0 + c_o, z_y * 0 + c_b  # in the logits' dtype
    c_own = c_b + excess
    lanes = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], z_y.dtype)
    rest, dot, s_u, s_b, s_plain = zero, zero, zero, zero, zero
    for start in tl.range(0, width, BLOCK):
        v = start + lanes
        z = tl.load(z_ptr + v, mask=v < reach, other=_NEVER)
        if ODD:  # what was read beyond the row is nothing
            z = tl.where(v < width, z, _NEVER)
        others = z
        if (y >= start) & (y < start + BLOCK):  # one tile of a row
            others = tl.where(v == y, _NEVER, z)
        if GROUP:
            maxima = tl.max(tl.reshape(z, [BLOCK // GROUP, GROUP]), 1)
            at = start // GROUP + tl.arange(0, BLOCK // GROUP)
            tl.store(group_ptr + row * group_stride + at, maxima, mask=at * GROUP < width)
        top = tl.maximum(top, tl.max(others, 0))
        m_new = tl.maximum(m, top)
        x = others - m_new
        e = tl.exp2(x * _LOG2E)
        shrink = tl.exp2((m - m_new) * _LOG2E)
        dot = (dot + (m - m_new) * rest) * shrink + e * x
        rest = rest * shrink + e
        if WITHIN:
            inside = tl.where(v < support, z - m_new, _NEVER)
            s_b = s_b * shrink + tl.exp2(inside * _LOG2E)
        if PAIR:
            s_b = s_b * tl.exp2(c_b * (m - m_new) * _LOG2E) + tl.exp2(c_b * (z - m_new) * _LOG2E)
        if OFFSET:
            s_plain = s_plain * tl.exp2(c_own * (m - m_new) * _LOG2E) + tl.exp2(c_own * (z - m_new) * _LOG2E)
        m = m_new
        if POOLED:
            u = c_own * z
            if OTHER:
                o = tl.maximum(tl.load(o_ptr + v, mask=v < o_reach, other=_NEVER).to(z.dtype), _NEVER)
                u += c_o * (o - z)
            if OFFSET:
                u += _log_sigmoid(slope * (z - z_y))
            if NARROW:
                u = tl.where(v < support, u, _NEVER)
            m_next = tl.maximum(m_u, tl.max(u, 0))
            s_u = s_u * tl.exp2((m_u - m_next) * _LOG2E) + tl.exp2((u - m_next) * _LOG2E)
            m_u = m_next
    rest, dot = tl.sum(rest, 0), tl.sum(dot, 0)
    x_y = z_y - m
    e_y = tl.exp2(x_y * _LOG2E)
    total = rest + e_y
    log_s = tl.log(total)
    rest_mass = rest / total
    # in the order of TABLE
    out_ptr += row
    tl.store(out_ptr, z_y)
    tl.store(out_ptr + out_stride, m)
    tl.store(out_ptr + 2 * out_stride, rest)
    tl.store(out_ptr + 3 * out_stride, dot)
    tl.store(out_ptr + 4 * out_stride, top)
    tl.store(out_ptr + 9 * out_stride, log_s)
    tl.store(out_ptr + 10 * out_stride, tl.where(rest_mass < 0.25, _log1m(rest_mass, DOUBLE), x_y - log_s))
    tl.store(out_ptr + 11 * out_stride, rest_mass)
    tl.store(out_ptr + 12 * out_stride, log_s - (dot + e_y * x_y) / total)
    if POOLED:
        s_u = tl.sum(s_u, 0)
        s_student = total
        if PAIR or WITHIN:
            s_student = tl.sum(s_b, 0)
        m_u -= c_own * m  # from here on relative, as d is
        tl.store(out_ptr + 5 * out_stride, m_u)
        tl.store(out_ptr + 6 * out_stride, s_u)
        tl.store(out_ptr + 13 * out_stride, tl.log(s_u))
        tl.store(out_ptr + 14 * out_stride, tl.log(s_student))
        tl.store(out_ptr + 15 * out_stride, -tl.log(s_u / s_student))
        if OFFSET:
            tl.store(out_ptr + 16 * out_stride, tl.exp2(m_u * _LOG2E) * (s_u / tl.sum(s_plain, 0)))


@triton.jit
def _log1m(x, DOUBLE: tl.constexpr):
    """log(1 − x) for x below 0.25, with every digit of a small x: a logarithm near 1 has lost them."""
    TERMS: tl.constexpr = 26 if DOUBLE else 13
    acc = x * 0 + 1.0 / TERMS
    for i in tl.static_range(1, TERMS):
        acc = acc * x + 1.0 / (TERMS - i)
    return -x * acc


@triton.jit
def _kl_term(p, log_p, g, DOUBLE: tl.constexpr):
    """Q log(Q/p) − Q + p for Q = p − g, 0 or more; by its series where Q is near p."""
    Q = tl.maximum(p - g, 0.0)
    x = -g / tl.maximum(p, 1.2e-38)
    near = 1.0 / 12 + x * (-1.0 / 20 + x * (1.0 / 30 + x * (-1.0 / 42 + x * (1.0 / 56))))
    near = p * x * x * (0.5 + x * (-1.0 / 6 + x * near))
    far = tl.where(Q > 0, Q * (tl.log(tl.maximum(Q, 1.2e-38)) - tl.maximum(log_p, _NEVER)), 0.0) - Q + p
    return tl.where(tl.abs(x) < (0.01 if DOUBLE else 0.1), near, far)


@triton.jit
def _gradient(
    z_ptr, o_ptr, y_ptr, place_ptr, table_ptr, weight_ptr, found_ptr, g_ptr,
    z_stride, o_stride, g_stride, rows, width, reach, support, o_reach, excess, c_o, c_b, slope, inv_cap, number,
    POOLED: tl.constexpr, OTHER: tl.constexpr, OFFSET: tl.constexpr, PAIR: tl.constexpr, TAIL: tl.constexpr,
    KIND: tl.constexpr, MEAN_ONLY: tl.constexpr, CAPPED: tl.constexpr, KL: tl.constexpr, WRITE: tl.constexpr,
    SKIPS: tl.constexpr, NARROW: tl.constexpr, ODD: tl.constexpr, DOUBLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = row
    if SKIPS:  # rows with a gradient are written one after another, the others cost nothing
        place = tl.load(place_ptr + row).to(tl.int64)
        if place < 0:
            return
    y = tl.load(y_ptr + row).to(tl.int32)
    # in the orders of TABLE and WEIGHTS
    table_ptr += row
    weight_ptr += row
    m = tl.load(table_ptr + rows)
    log_s = tl.load(table_ptr + 9 * rows)
    a = tl.load(weight_ptr)
    factor = tl.load(weight_ptr + 2 * rows)
    label = -a * tl.load(table_ptr + 11 * rows)
    FORWARD: tl.constexpr = KIND == "forward_kl"
    # A token that the other model rules out: −inf where that makes the divergence infinite.
    LOWEST: tl.constexpr = float("-inf") if KIND == "reverse_kl" or KIND == "todi" else _NEVER
    if POOLED or TAIL:
        z_y = tl.load(table_ptr)
        m_u = tl.load(table_ptr + 5 * rows)
        log_s_u = tl.load(table_ptr + 13 * rows)
        log_s_b = tl.load(table_ptr + 14 * rows)
        shift = tl.load(table_ptr + 15 * rows)
        b = tl.load(weight_ptr + rows)
        excess, c_o, c_b, number = m * 0 + excess, m * 0 + c_o, m * 0 + c_b, m * 0 + number  # in the logits' dtype
        mean = m * 0
        if not MEAN_ONLY:
            mean = tl.load(table_ptr + 17 * rows)
        pull = tl.load(table_ptr + 18 * rows)
    z_ptr += row * z_stride
    g_ptr += place * g_stride
    if OTHER:
        o_ptr += row * o_stride
    if TAIL:  # an entry that was taken out gets its gradient elsewhere, the label's too
        label = tl.where(tl.load(z_ptr + y) < 0.5 * _NEVER, label * 0, label)
    lanes = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], m.dtype)
    size, lowest, divergence, cross, drift, kl_q = zero, zero, zero, zero, zero, zero
    for start in tl.range(0, width, BLOCK):
        v = start + lanes
        z = tl.load(z_ptr + v, mask=v < reach, other=_NEVER)
        if ODD:
            z = tl.where(v < width, z, _NEVER)
        x = z - m
        log2_p = x * _LOG2E - log_s * _LOG2E
        p = tl.exp2(log2_p)
        g = a * p
        if (y >= start) & (y < start + BLOCK):  # one tile of a row
            g = tl.where(v == y, label, g)
        if TAIL:  # what is outside the k moves as a whole, in the student's shape
            difference = pull * tl.exp2(x * _LOG2E - log_s_b * _LOG2E)
            if NARROW:  # beyond, R is 0, and another divergence does not look there
                difference = tl.where(v < support, difference, p if FORWARD else zero)
                divergence += tl.where(v < support, 0.0, difference)
        if POOLED:
            log2_base, base = log2_p, p
            if PAIR:
                log2_base = c_b * x * _LOG2E - log_s_b * _LOG2E
                base = tl.exp2(log2_base)
            # from differences of logits, so that a teacher near the student loses no digits
            d = excess * x
            if OTHER:
                o = tl.maximum(tl.load(o_ptr + v, mask=v < o_reach, other=_NEVER).to(z.dtype), LOWEST)
                d += c_o * (o - z)
            if OFFSET:
                d += _log_sigmoid(slope * (z - z_y))
            R = tl.exp2((c_b * x + d - m_u) * _LOG2E - log_s_u * _LOG2E)
            d = (d - m_u) + shift
            if NARROW:
                R = tl.where(v < support, R, 0.0)
                d = tl.where(v < support, d, _NEVER if FORWARD else zero)
                base = base if FORWARD else tl.where(v < support, base, 0.0)
            # B − R = −B (e^d − 1)
            near = -(base * d) * expm1_over(d, DOUBLE)
            difference = tl.where(is_small(d, DOUBLE), near, base - R)
            if FORWARD:
                divergence += R * d + difference
            else:
                pulled, value = compared(base, R, difference, log2_base, -d, number, KIND, DOUBLE)
                divergence += value
                difference = pulled - base * mean
        if POOLED or TAIL:
            g += b * difference
            size += tl.abs(g)
            lowest = tl.minimum(lowest, p - g)
            cross += difference * log2_p
            drift += difference
        if KL:
            kl_q += _kl_term(p, log2_p * _LN2, g, DOUBLE)
        if CAPPED:
            share = tl.minimum(tl.maximum(z * inv_cap, -1.0), 1.0)  # a logit that was taken out is beyond every cap
            g *= 1 - share * share
        if WRITE:
            tl.store(g_ptr + v, (g * factor).to(g_ptr.dtype.element_ty), mask=v < reach)
    # in the order of FOUND
    found_ptr += row
    if POOLED or TAIL:
        if not MEAN_ONLY:
            tl.store(found_ptr, tl.sum(size, 0))
            tl.store(found_ptr + rows, tl.min(lowest, 0))
            tl.store(found_ptr + 2 * rows, tl.sum(divergence, 0))
            tl.store(found_ptr + 3 * rows, tl.sum(cross, 0) * _LN2)
        tl.store(found_ptr + 4 * rows, tl.sum(drift, 0))
    if KL:
        tl.store(found_ptr + 5 * rows, tl.sum(kl_q, 0))


assert (len(TABLE), len(WEIGHTS), len(FOUND)) == (19, 3, 6), "the kernels above count on these orders"
