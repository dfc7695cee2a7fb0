"""Chooses the code for a target's rows: two passes over the logits, or plain blocks."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from qtarget.losses.engine import EngineCall, matmuls
from qtarget.losses.engine.block import RowMath
from qtarget.losses.engine.buffers import Scratch
from qtarget.losses.engine.device.device_rows import DeviceRows
from qtarget.losses.engine.device.passes import FunctionPasses, Passes, TritonPasses
from qtarget.losses.engine.device.row_plan import RowPlan
from qtarget.losses.heads import Head
from qtarget.targets import Target
from qtarget.targets.residual import Residual

logger = logging.getLogger(__name__)
_told: set[str] = set()


@dataclass(frozen=True)
class Place:
    """What the rows of a call are worked on with.

    Attributes:
        width: columns of the student's logits. scratch: buffers. gradient: whether one is formed.
        beside: whether it is written beside the logits, in 16 bits, and not over them.
    """

    width: int
    scratch: Scratch
    gradient: bool
    beside: bool


def computes(call: EngineCall, target: Target, place: Place) -> RowMath | DeviceRows:
    """What the call's backend has for the target; plain PyTorch, with one line of log, where that is nothing."""
    plan = None if call.backend == "torch" or call.z_loss else RowPlan.of(target)
    if plan is None:
        if call.backend != "torch":
            has = "z_loss" if call.z_loss else "several residuals or a divergence of your own"
            tell(f"target {target} has {has}, so backend 'torch' is used for it")
        return computes_in_torch(call, target, place)
    passes: Passes = TritonPasses() if call.backend == "triton" else FunctionPasses()
    return DeviceRows(
        plan=plan,
        passes=passes,
        support=place.width if plan.pool is None else _support(call, plan.pool, place.width),
        factor=matmuls.gradient_factor(call.compute) if place.beside else 1.0,
        **_of_both(call, target, place),
    )


def computes_in_torch(call: EngineCall, target: Target, place: Place) -> RowMath:
    """Blocks in place, which every target and every device has."""
    pools = [term.pool for term in target.residual_terms]
    support = tuple(_support(call, pool, place.width) for pool in pools)
    return RowMath(support=support, z_loss=call.z_loss, **_of_both(call, target, place))


def _of_both(call: EngineCall, target: Target, place: Place) -> dict[str, Any]:
    return {
        "target": target,
        "vocab_size": call.vocab_size,
        "scratch": place.scratch,
        "gradient": place.gradient,
        "with_kl": call.with_kl,
        "softcap": call.logit_softcap,
    }


def tell(sentence: str) -> None:
    """Warn once in a process."""
    if sentence not in _told:
        _told.add(sentence)
        logger.warning(sentence)


def _support(call: EngineCall, pool: Residual, width: int) -> int:
    """Columns a residual covers: all of the head for a student-only pool, else the real vocabulary all models share."""
    if pool.is_student_only:
        return width
    others = [call.aux[name] for name in pool.requires]
    return min([call.vocab_size, *(other.width for other in others if isinstance(other, Head))])
