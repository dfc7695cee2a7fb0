"""The whole weight of a head that is sharded over processes, with the right gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial


def whole(parameter: Tensor, like: Tensor) -> Tensor:
    """A head's parameter as a plain tensor, gathered where FSDP2 shards it.

    A head in a group of its own reaches the loss as a shard: its module is never called, so nothing gathers it. A bare
    ``full_tensor()`` would give each process only its own gradient; marked as partial they are summed over the mesh, and
    divided by its size as FSDP divides every other gradient. A head in the root group is gathered by FSDP already and
    comes through as it is.

    Args:
        parameter: weight or bias of the head. like: hidden states, whose precision a gathered head takes: the
            mixed-precision policy has cast them and never saw the head.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    if not (torch.is_grad_enabled() and parameter.requires_grad):
        sharded: Any = parameter.detach()
        return _as(sharded.full_tensor(), like)
    mesh: Any = parameter.device_mesh
    shared: Any = _Divided.apply(parameter, mesh.size())
    return _as(shared.full_tensor(grad_placements=[Partial()] * mesh.ndim), like)


def _as(tensor: Tensor, like: Tensor) -> Tensor:
    lower = like.is_floating_point() and torch.finfo(like.dtype).bits < torch.finfo(tensor.dtype).bits
    return tensor.to(like.dtype) if lower else tensor


class _Divided(torch.autograd.Function):
    """The tensor itself; its gradient divided by a number."""

    @staticmethod
    def forward(ctx, tensor, divisor):
        ctx.divisor = divisor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return gradient / ctx.divisor, None
