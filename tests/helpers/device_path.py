"""The device's path of the engine, run on a CPU: kernels in Triton's interpreter, everything else as on a GPU.

``as_on_a_device`` makes the engine treat CPU tensors as a device's: nothing is read but where it has to be, logits and
gradients have buffers of their own, and matmuls take autocast's dtype or the weight's. ``Watch`` counts what that costs.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpreterBuilder

from qtarget.losses import inputs
from qtarget.losses.engine import matmuls, sizes
from qtarget.losses.engine.device import device_rows, kernels, row_functions

# Small tiles, so that a test's vocabulary has several, and groups, so that there are more than one.
BLOCK, GROUP = 32, 8
# Make a tensor, or touch a few entries of one.
FEW = ("empty", "new_empty", "empty_like", "gather", "scatter", "scatter_", "index_put_")
READS = ("_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero", "masked_select")


@contextlib.contextmanager
def small_tiles() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "BLOCK", BLOCK)
        for module in (kernels, row_functions, device_rows):
            patch.setattr(module, "GROUP", GROUP)
        yield


@contextlib.contextmanager
def as_on_a_device(logits_rows: int = 8, gradient_rows: int = 16) -> Iterator[None]:
    """Chunks of a few rows, so that a test's tokens make several."""
    with small_tiles(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "on_host", lambda device: False)
        patch.setattr(sizes, "_DEVICE_LOGITS_ROWS", logits_rows)
        patch.setattr(sizes, "_DEVICE_GRADIENT_ROWS", gradient_rows)
        patch.setattr(sizes, "_DEVICE_FEWEST_ROWS", 1)
        yield


class Watch(TorchDispatchMode):
    """Counts host reads, the dtypes of products, and bytes of [rows, vocab] tensors read and written by torch's
    operations and by kernels.

    Args:
        elements: from how many a tensor counts as [rows, vocab].
    """

    def __init__(self, elements: int = 1 << 60):
        super().__init__()
        self.elements = elements
        self.reads: Counter[str] = Counter()
        self.products: list[tuple[torch.dtype, torch.dtype]] = []
        self.bytes = 0
        self.kernel_bytes = 0
        self._in_kernel = False
        self._patch = pytest.MonkeyPatch()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        out = function(*args, **(kwargs or {}))
        if self._in_kernel:
            return out
        if name in READS:
            self.reads[name] += 1
        if name in ("mm", "addmm", "addmm_", "bmm"):
            matrices = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.products.append((matrices[0].dtype, matrices[1].dtype))
        elif not function.is_view and name not in FEW:
            self.bytes += sum(self._size(x) for x in (*args, *(kwargs or {}).values()))
            made = out if isinstance(out, (tuple, list)) else (out,)
            self.bytes += sum(self._size(x) for x in made)
        return out

    def _size(self, x) -> int:
        whole = isinstance(x, torch.Tensor) and x.numel() >= self.elements
        return x.numel() * x.element_size() if whole else 0

    def __enter__(self):
        self._wrap_kernels()
        self._wrap_reads()
        self._wrap_products()
        return super().__enter__()

    def __exit__(self, *error):
        self._patch.undo()
        return super().__exit__(*error)

    def _wrap_kernels(self) -> None:
        """Inside a kernel the interpreter's own work is left out, and what it loads and stores is counted."""
        for name in ("sums", "gradient"):
            real = getattr(kernels, name)

            def run(*args, real=real):
                self._in_kernel = True
                try:
                    return real(*args)
                finally:
                    self._in_kernel = False

            self._patch.setattr(kernels, name, run)
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def counted_load(builder, ptrs, mask, *rest):
            value = load(builder, ptrs, mask, *rest)
            self.kernel_bytes += int(mask.data.sum()) * value.data.itemsize if mask.data.size > 1 else 0
            return value

        def counted_store(builder, ptrs, value, mask, *rest):
            size = ptrs.dtype.element_ty.primitive_bitwidth // 8
            self.kernel_bytes += int(mask.data.sum()) * size if mask.data.size > 1 else 0
            return store(builder, ptrs, value, mask, *rest)

        self._patch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        self._patch.setattr(InterpreterBuilder, "create_masked_store", counted_store)

    def _wrap_reads(self) -> None:
        real = inputs.read_together

        def read(numbers):
            self.reads["together"] += bool(numbers)
            return real(numbers)

        self._patch.setattr(inputs, "read_together", read)

    def _wrap_products(self) -> None:
        """A CPU multiplies no 16-bit inputs to float32 results, so the product's own cast is left out of the count."""
        mm, addmm = matmuls.wide_mm, matmuls.wide_addmm

        def wide_mm(a, b, out=None):
            return self._counted(mm, (a, b), a, b, out)

        def wide_addmm(acc, a, b, beta, alpha):
            return self._counted(addmm, (a, b), acc, a, b, beta, alpha)

        self._patch.setattr(matmuls, "wide_mm", wide_mm)
        self._patch.setattr(matmuls, "wide_addmm", wide_addmm)

    def _counted(self, product, pair, *args):
        self.products.append((pair[0].dtype, pair[1].dtype))
        self._in_kernel = True
        try:
            return product(*args)
        finally:
            self._in_kernel = False
