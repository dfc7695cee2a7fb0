"""Who runs the two passes: Triton's kernels, or the pure functions through inductor."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qtarget.losses import inputs
from qtarget.losses.engine import buffers
from qtarget.losses.engine.device import row_functions
from qtarget.losses.engine.device.row_functions import Pass
from qtarget.losses.engine.device.row_plan import FOUND

# Each combination of flags is a graph of its own, more than dynamo expects of one function.
_MOST_GRAPHS = 256


class CannotCompile(Exception):
    """A pass that its compiler refuses on this machine."""


class TritonPasses:
    """The kernels."""

    def __init__(self) -> None:
        from qtarget.losses.engine.device import kernels

        self._kernels = kernels

    def _run(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._kernels.COMPILE_ERRORS as error:
            raise CannotCompile(f"{type(error).__name__}: {error}") from error

    def drifts(self, z: Tensor) -> bool:
        """Whether sums in z's dtype leave log R's normaliser off by more than what is written is rounded by."""
        return True

    def sums(self, z: Tensor, o: Tensor, y: Tensor, case: Pass) -> tuple[Tensor, Tensor | None]:
        return self._run(self._kernels.sums, z, o, y, case)

    def mean_score(self, z, o, y, table, weights, case: Pass) -> Tensor:
        case = replace(case, mean_only=True, write=False, with_kl=False, softcap=None)
        found = self._run(self._kernels.gradient, z, o, y, table, weights, case, z, None)
        return found.select(0, FOUND.index("drift"))

    def gradient(self, z, o, y, table, weights, case: Pass, g: Tensor, places: Tensor | None) -> Tensor:
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
            with torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS):
                return row_functions.compiled(name)(*arguments)
        except (TorchDynamoException, InductorError) as error:
            raise CannotCompile(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error

    def drifts(self, z: Tensor) -> bool:
        return z.dtype == torch.float64 or not inputs.on_host(z.device)  # there float32 is summed in float64

    def sums(self, z: Tensor, o: Tensor, y: Tensor, case: Pass) -> tuple[Tensor, Tensor | None]:
        c = _coefficients(case.coefficients, z.dtype, z.device)
        peaks, groups = self._run("maxima", z, o, y, c, case.support, case.flags)
        return self._run("sums", z, o, y, peaks, c, case.support, case.flags), groups

    def mean_score(self, z, o, y, table, weights, case: Pass) -> Tensor:
        c = _coefficients(case.coefficients, z.dtype, z.device)
        return self._run("mean_score", z, o, table, c, case.support, case.flags, case.divergence)

    def gradient(self, z, o, y, table, weights, case: Pass, g: Tensor, places: Tensor | None) -> Tensor:
        c = _coefficients(case.coefficients, z.dtype, z.device)
        beside = case.write and (g is z or places is not None)
        out = None
        if case.write:  # not over what is read, for which inductor would make a copy of its own
            shape = (z.shape[0], g.shape[1])
            out = buffers.workspace(g.dtype, z.device).get("out", *shape) if beside else g.narrow(0, 0, shape[0])
        arguments = (case.support, case.flags, case.divergence, case.softcap is not None, case.with_kl, out)
        found = self._run("gradient", z, o, y, table, weights, c, *arguments)
        if places is not None and out is not None:  # −1 is the last row, which is there for rows without a gradient
            g.index_put_((places,), out)
        elif beside:
            g.copy_(out)  # type: ignore[arg-type]  # beside only where there is something to write
        return found


Passes = TritonPasses | FunctionPasses


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
