"""What an entry of the presets contains, and how it is found and built."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from qtarget.errors import ConfigError, unknown
from qtarget.targets.divergence import FORWARD_KL, as_divergence
from qtarget.targets.presets.printed import has_formula, nll
from qtarget.targets.target import Target

# What an objective mainly decides: how far the label is trusted by its probability, which tokens are trained, what the
# student is held to, and what a teacher says. OWN: a user's.
OWN = "own"
GROUPS = ("label", "selection", "anchor", "distillation", OWN)


@dataclass(frozen=True)
class Preset:
    """What is recorded about an objective, along with the function that builds it.

    Attributes:
        build: its hyperparameters, all with the published defaults → Target; its docstring is the summary.
        formula: one line. trusts, rest: where the target's mass goes, in words. source: "arXiv:..." or a name.
        printed: the loss as its paper prints it, or None. A function of logits [n, V], labels [n], every hyperparameter
            by name, and of ``teacher_logits``, ``reference_logits``, ``old_logps``, ``weight``, ``critical`` and
            ``vocab_size`` what it names → loss [n], whose gradient is left to autograd.
        aliases: other names.
        group: one of ``GROUPS``. defaults: where the default numbers come from, and where paper and code differ.
        traps: what the published code does besides its formula, and what qtarget does.
        schedule: the hyperparameters that change during the published runs, in YAML form; the defaults stay constant.
    """

    name: str
    build: Callable[..., Target]
    formula: str
    trusts: str
    rest: str
    source: str
    printed: Callable[..., Tensor] | None = None
    aliases: tuple[str, ...] = ()
    group: str = OWN
    defaults: str = ""
    traps: str = ""
    schedule: Mapping[str, object] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, object]:
        """Hyperparameters with their defaults."""
        return {name: p.default for name, p in inspect.signature(self.build).parameters.items()}

    @property
    def summary(self) -> str:
        return inspect.getdoc(self.build) or ""


ENTRIES: dict[str, Preset] = {}


def preset(
    name: str,
    *,
    formula: str,
    trusts: str,
    rest: str,
    source: str,
    printed: Callable[..., Tensor] | None = None,
    aliases: tuple[str, ...] = (),
    group: str = OWN,
    defaults: str = "",
    traps: str = "",
    schedule: Mapping[str, object] | None = None,
):
    """Register the function below as an objective; see ``Preset``.

    Raises:
        ConfigError: the name or an alias is taken, or there is no such group.
    """
    if group not in GROUPS:
        raise unknown(f"group of preset {name}", group, GROUPS)

    def add(build: Callable[..., Target]) -> Callable[..., Target]:
        for entry in ENTRIES.values():
            if (taken := {name, *aliases} & {entry.name, *entry.aliases}) and _place(entry.build) != _place(build):
                raise ConfigError(f"preset {name!r} is called {sorted(taken)[0]!r}, as {entry.name!r} is; rename it")
        ENTRIES[name] = Preset(
            name, build, formula, trusts, rest, source, printed, aliases, group, defaults, traps, schedule or {}
        )
        return build

    return add


def _place(function: Callable) -> tuple[str, str]:
    return function.__module__, function.__qualname__


def names() -> list[str]:
    """Names of all objectives, from plain SFT to Target-SFT."""
    return list(ENTRIES)


def written_as(path: str) -> Preset | None:
    """The entry whose function ``my_pkg.my_module:my_objective`` is, if there is one."""
    return next((entry for entry in ENTRIES.values() if ":".join(_place(entry.build)) == path), None)


def describe(name: str) -> Preset:
    """The entry of an objective, by name or alias; an unknown name raises with the nearest one."""
    for entry in ENTRIES.values():
        if name == entry.name or name in entry.aliases:
            return entry
    raise unknown("target", name, ENTRIES)


def build(name: str, /, **hyperparameters: object) -> Target:
    """``qtarget.preset``: an objective by name.

    Args:
        name: one of ``qtarget.presets.names()``, or an alias ("nll", "p-loss").
        **hyperparameters: those of the objective; see ``qtarget targets show NAME``.

    Raises:
        ConfigError: unknown name or hyperparameter (the valid ones are listed), or a value out of range.

    >>> str(build("target-sft", eta=0.3))
    'target-sft(eta=0.3, teacher_temperature=1.0)'
    """
    entry = describe(name)
    known = entry.parameters
    for parameter in hyperparameters:
        if parameter not in known:
            if not known:
                raise ConfigError(f"{entry.name} has no parameter {parameter!r}; it takes none")
            raise unknown(f"parameter of {entry.name}", parameter, known)
    try:
        target = entry.build(**hyperparameters)
    except ConfigError as error:
        error.during(f"target {entry.name}")
        raise
    numbers = {**known, **hyperparameters}
    if "divergence" in numbers and (chosen := as_divergence(numbers.pop("divergence"))) != FORWARD_KL:
        numbers["divergence"] = chosen  # forward KL is what a target has without one
    return replace(target, name=entry.name, hyperparameters=numbers, formula=entry.formula)


def printed_loss(target: Target) -> Callable[[Tensor, Tensor, Mapping[str, Any]], Tensor] | None:
    """A named target's loss as its paper prints it; ``verify`` and tests compare the engine's gradient with it.

    Returns:
        (logits [n, V], labels [n], given) → loss [n], with ``given`` the further inputs by their names in
        ``qtarget.target_loss``. None for a composed target, for a preset without a printed loss, and for a user-defined
        divergence.

    >>> import torch
    >>> loss = printed_loss(build("beyond-log", alpha=1.0))
    >>> loss(torch.zeros(1, 4), torch.tensor([2]), {})  # 1 − p_y
    tensor([0.7500])
    """
    entry = ENTRIES.get(target.name) or written_as(target.name)
    if entry is None or entry.printed is None or not has_formula(target.hyperparameters.get("divergence", FORWARD_KL)):
        return None
    printed, numbers, share = entry.printed, target.hyperparameters, target.share
    takes = inspect.signature(printed).parameters

    def loss(logits: Tensor, labels: Tensor, given: Mapping[str, Any]) -> Tensor:
        inputs = {name: value for name, value in given.items() if name in takes and name not in numbers}
        whole = printed(logits, labels, **numbers, **inputs)
        return whole if share == 1 else share * whole + (1 - share) * nll(logits, labels)

    return loss
