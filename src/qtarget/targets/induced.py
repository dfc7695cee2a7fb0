"""From any loss to its target: Q = p − ∂L/∂z, what the loss asks for (arXiv:2606.11189)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qtarget.errors import ConfigError

RULES = ("student", "largest")
# Where the parts of a gradient are held to be equal: what rounding of logits in this precision allows.
_TOLERANCE = {torch.float64: 1e-9}
_COARSE = 1e-4
_NEGATIVE = {torch.float64: 1e-12}
_COARSE_NEGATIVE = 1e-6


@dataclass(frozen=True)
class InducedTarget:
    """What a loss teaches at each position; NaN at ignored positions.

    Attributes:
        q: [..., V], Q = p − g, with g the gradient of the summed loss. Its rows sum to 1 for a loss that depends on the
            logits through their softmax alone.
        on_simplex: [...] booleans: Q has no negative entry and sums to 1. False at ignored positions.
        off_by: [...] how far Q is off: its negative mass, Σ max(0, −q), plus |Σ q − 1|.
        trust: [...] γ of Q = γ δ + (1 − γ) π̃; NaN where Q is off the simplex and its residual is not the student.
        residual: [..., V] π̃, each row summing to 1.
        rule: [...] int64, the assumption that makes the two unique, as an index of ``RULES``: 0 "student", q_k/p_k is
            one constant c for k ≠ y, so that π̃ = p and γ = 1 − c; 1 "largest", the largest γ that leaves π̃ non-negative.
            −1 where trust is NaN.

    γ and π̃ are not identifiable in general, and the scale of a loss cannot be read from its gradient: a half-weighted
    cross-entropy and dft at p_y = ½ have the same Q.
    """

    q: Tensor
    on_simplex: Tensor
    off_by: Tensor
    trust: Tensor
    residual: Tensor
    rule: Tensor


def induced_target(
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,
    labels: Tensor,
    *,
    reduction: str = "sum",
    ignore_index: int = -100,
) -> InducedTarget:
    """The target implied by a differentiable loss.

    Args:
        loss_fn: called once with (logits, labels), unchanged; returns a scalar. Nothing is shifted.
        logits: [..., V], float32 or float64 (in float64, the simplex is checked to twelve digits).
        labels: [...] int64, ``ignore_index`` where nothing is trained.
        reduction: "sum", or "mean" where the loss averages over supervised tokens: g is then multiplied by their number.

    Raises:
        ConfigError: wrong shapes; a loss that is no scalar, is NaN or infinite, has no gradient, or changes its input.

    >>> import torch
    >>> z, y = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64), torch.tensor([1])
    >>> dft = lambda z, y: -z.softmax(-1).gather(-1, y[:, None]).sum()
    >>> made = induced_target(dft, z, y)
    >>> bool(torch.isclose(made.trust, z.softmax(-1)[:, 1]).all()), RULES[int(made.rule[0])]
    (True, 'student')
    """
    if reduction not in ("sum", "mean"):
        raise ConfigError(f"reduction is {reduction!r}; use 'sum' or 'mean', as the loss does")
    if labels.shape != logits.shape[:-1]:
        raise ConfigError(
            f"labels has shape {list(labels.shape)}, but logits requires {list(logits.shape[:-1])}; nothing is shifted "
            "here: labels[i] belongs to position i"
        )
    g = _gradient(loss_fn, logits, labels)
    trained = labels != ignore_index
    if reduction == "mean":
        g = g * trained.sum().clamp(min=1)
    p = logits.detach().softmax(-1)
    q = p - g
    exact = q.dtype == torch.float64
    off_by = (-q).clamp(min=0).sum(-1) + (q.sum(-1) - 1).abs()
    negative = _NEGATIVE.get(q.dtype, _COARSE_NEGATIVE)
    on_simplex = trained & (q.amin(-1) >= -negative) & ((q.sum(-1) - 1).abs() <= (1e-10 if exact else 1e-4))
    trust, residual, rule = _parts(p, g, q, labels.clamp(min=0), on_simplex)
    nan = float("nan")
    return InducedTarget(
        q.masked_fill(~trained[..., None], nan),
        on_simplex,
        off_by.masked_fill(~trained, nan),
        trust.masked_fill(~trained, nan),
        residual.masked_fill(~trained[..., None], nan),
        rule.masked_fill(~trained, -1),
    )


def _gradient(loss_fn: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    leaf = logits.detach().clone().requires_grad_()
    given, asked = leaf.detach().clone(), labels.clone()
    with torch.enable_grad():
        try:
            loss = loss_fn(leaf, labels)
        except RuntimeError as error:
            if "in-place" in str(error):
                raise ConfigError(f"the loss changes its logits in place ({error}); let it work on a copy") from None
            raise
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else repr(type(loss).__name__)
        raise ConfigError(f"the loss returned {got}; return a scalar: the sum or the mean over supervised tokens")
    if not torch.equal(leaf.detach(), given) or not torch.equal(labels, asked):
        raise ConfigError("the loss changed the logits or labels it was given; let it work on a copy")
    if not torch.isfinite(loss):
        raise ConfigError(
            f"the loss is {float(loss.detach())}; every number of its input is finite, so check the loss itself"
        )
    if not loss.requires_grad:
        raise ConfigError(
            "the loss has no gradient with respect to the logits; it may detach them or compute outside torch"
        )
    (g,) = torch.autograd.grad(loss, leaf, allow_unused=True)
    if g is None:
        raise ConfigError(
            "the loss has no gradient with respect to the logits; it may detach them or use different ones"
        )
    if not torch.isfinite(g).all():
        raise ConfigError(
            "the gradient of the loss holds NaN or infinity; look for 0 · (−inf) or a logarithm of 0 in it"
        )
    return g


def _parts(p: Tensor, g: Tensor, q: Tensor, labels: Tensor, on_simplex: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(trust, residual, rule): see ``InducedTarget``."""
    y = labels[..., None]
    p_rest, g_rest = p.scatter(-1, y, 0.0), g.scatter(-1, y, 0.0)
    # q_k/p_k = 1 − g_k/p_k is constant where g is parallel to p off the label; then γ = g_k/p_k.
    gamma = g_rest.sum(-1) / p_rest.sum(-1).clamp(min=torch.finfo(p.dtype).tiny)
    apart = (g_rest - gamma[..., None] * p_rest).abs().sum(-1)
    tolerance = _TOLERANCE.get(p.dtype, _COARSE)
    is_student = apart <= tolerance * (g_rest.abs().sum(-1) + p_rest.sum(-1))
    q_y = q.gather(-1, y)
    others = q.scatter(-1, y, 0.0).clamp(min=0)
    mass = others.sum(-1, keepdim=True)  # 1 − q_y, with the digits that are lost there where q_y is near 1
    largest = torch.where(mass > 0, others / mass.clamp(min=torch.finfo(p.dtype).tiny), p)
    known = is_student | on_simplex
    nan = float("nan")
    trust = torch.where(is_student, gamma, q_y.squeeze(-1)).masked_fill(~known, nan)
    residual = torch.where(is_student[..., None], p, largest).masked_fill(~known[..., None], nan)
    rule = torch.where(is_student, 0, 1).masked_fill(~known, -1)
    return trust, residual, rule
