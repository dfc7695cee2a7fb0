"""What the engine launches: calls of ``linear_target_loss`` with a recorder in place of its two kernels.

So the flags, the types of arguments and the number of warps are the engine's own, whatever its passes are handed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import qtarget as qt

KERNELS = ("sums", "gradient")
KEPT = 16


@dataclass
class Launch:
    """One launch: ``function[grid](*arguments, **options)``, by the call ``label``."""

    kernel: str
    label: str
    function: Any
    grid: Any
    arguments: tuple
    options: dict[str, Any]

    def run(self, **options: Any) -> None:
        """Launch it again, with other ``options``."""
        self.function[self.grid](*self.arguments, **{**self.options, **options})

    @property
    def named(self) -> dict[str, Any]:
        """Every argument by its name, constants too."""
        free = [name for name in self.function.arg_names if name not in self.options]
        given = dict(zip(free, self.arguments, strict=True))
        return given | {name: self.options[name] for name in self.function.arg_names if name in self.options}

    @property
    def logits(self) -> Tensor:
        """[r, V], the first argument."""
        return self.arguments[0]

    @property
    def flags(self) -> list[str]:
        return sorted(name for name, value in self.named.items() if name.isupper() and name != "BLOCK" and value)

    @property
    def g(self) -> str:
        """The dtype the gradient is written in, "" where none is."""
        return "" if self.kernel == "sums" else str(self.named["g_ptr"].dtype).removeprefix("torch.")

    @property
    def bytes(self) -> int:
        """Logits read, the other model's too, and the gradient written."""
        named = self.named
        a_logit = self.logits.element_size() * (2 if named.get("OTHER") else 1)
        if named.get("WRITE"):
            a_logit += named["g_ptr"].element_size()
        return self.logits.numel() * a_logit


class _Recorder:
    """Stands in for a kernel."""

    def __init__(self, kernel: str, function: Any, label: str, found: list[Launch], execute: bool):
        self.kernel, self.function, self.label, self.found, self.execute = kernel, function, label, found, execute

    def __getitem__(self, grid: Any) -> Any:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: Any, *arguments: Any, **options: Any) -> None:
        launch = Launch(self.kernel, self.label, self.function, grid, arguments, options)
        self.found.append(launch)
        if self.execute:
            launch.run()


@contextlib.contextmanager
def recorded(label: str, execute: bool) -> Iterator[list[Launch]]:
    """The launches made inside; without ``execute`` nothing runs, and what they would have written is garbage."""
    from qtarget.losses.engine.device import kernels

    found: list[Launch] = []
    own = {f"_{name}": getattr(kernels, f"_{name}") for name in KERNELS}
    for name, function in own.items():
        setattr(kernels, name, _Recorder(name[1:], function, label, found, execute))
    try:
        yield found
    finally:
        for name, function in own.items():
            setattr(kernels, name, function)


@contextlib.contextmanager
def as_on_a_device() -> Iterator[None]:
    """CPU tensors go the way of a device's: kernels, 16-bit products, no number read in between."""
    from qtarget.losses import inputs
    from qtarget.losses.engine.device import kernels

    own = inputs.on_host, kernels.can_run
    inputs.on_host, kernels.can_run = lambda device: False, lambda device: None
    try:
        yield
    finally:
        inputs.on_host, kernels.can_run = own


# -- calls -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A call that leads to launches.

    Attributes:
        targets: (preset, hyperparameters) each; several share the tokens. source: "head" or "top-k" for a teacher.
        dtype: of hidden states and heads. vocab: rows of the head. real: real tokens of a padded one.
    """

    label: str
    targets: tuple[tuple[str, dict], ...]
    source: str = ""
    dtype: torch.dtype = torch.bfloat16
    vocab: int = 0
    real: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


def launches(call: Call, rows: int, width: int, device: torch.device, execute: bool) -> list[Launch]:
    """What a call over ``rows`` tokens, all in one chunk, launches. width: d."""
    g = torch.Generator(device).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=g)

    real = call.real or call.vocab
    hidden = (2 * randn(rows, width)).to(call.dtype).requires_grad_()
    weight = (randn(call.vocab, width) * width**-0.5).to(call.dtype).requires_grad_()
    labels = torch.randint(0, real, (rows,), device=device, generator=g)
    given: dict[str, Any] = {"vocab_size": call.real, "chunk_rows": rows, **call.options}
    near = (weight.detach() + 0.1 * width**-0.5 * randn(call.vocab, width)).to(call.dtype)
    if call.source == "head":
        given["teacher"] = qt.Head(hidden.detach(), near)
    elif call.source == "top-k":
        kept = (hidden.detach().float() @ near[:real].float().T).log_softmax(-1).topk(min(KEPT, real - 1))
        given["teacher"] = qt.TopK(kept.indices, kept.values)
    targets = [qt.preset(name, **hyperparameters) for name, hyperparameters in call.targets]
    if len(targets) > 1:
        given["which"] = torch.arange(rows, device=device) // -(-rows // len(targets))
    with recorded(call.label, execute) as found:
        try:
            qt.linear_target_loss(
                hidden, weight, labels, targets if len(targets) > 1 else targets[0], backend="triton", **given
            )
        except qt.ConfigError:  # of numbers that no kernel has written
            if execute:
                raise
    return found
