"""Targets from and to what YAML holds: names, mappings, import paths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qtarget.errors import ConfigError, check_range, unknown
from qtarget.targets import peers, presets
from qtarget.targets.divergence import FORWARD_KL, as_divergence
from qtarget.targets.parts import call, load_object, part_from_config, part_to_config
from qtarget.targets.residual import Residual, Term
from qtarget.targets.target import Target
from qtarget.targets.trust import Rule

_PARTS = ("trust", "residual", "scale", "value")
_SHARE = "share"
_DIVERGENCE = "divergence"


def target_from_config(config: object) -> Target:
    """See ``Target.from_config``."""
    if isinstance(config, Target):
        return config
    if isinstance(config, str):
        return _from_name(config, {})
    if not isinstance(config, Mapping):
        raise ConfigError(f"target is {config!r}; use a name such as 'dft', a mapping, or my_pkg.my_module:my_target")
    config = dict(config)
    if strange := [key for key in config if not isinstance(key, str)]:
        raise ConfigError(f"target has the key {strange[0]!r}; keys are names")
    if _SHARE in config:
        share = config.pop(_SHARE)
        return replace(target_from_config(config), share=share)
    spelled = _peers_keys(config)
    own = {key: value for key, value in config.items() if key not in spelled}
    if spelled and not {"preset", *_PARTS} & own.keys():
        peers.refuse_strays(spelled, own)
    if (read := peers.read(spelled, own or None)) is not None and not own:
        return read.target
    config = own or config
    if "preset" in config:
        name = config.pop("preset")
        mixed = [key for key in config if key in _PARTS]
        if mixed and name in presets.names():
            raise ConfigError(f"target names the preset {name!r} and also {', '.join(mixed)}; use one or the other")
        return _from_name(name, config)
    if any(key in config for key in _PARTS):
        for key in config:
            if key not in _PARTS:
                raise unknown("key of target", key, _PARTS)
        return Target(
            trust=part_from_config(config.get("trust", 1.0), Rule, "trust"),
            residual=_residual(config.get("residual", "student")),
            scale=None if config.get("scale") is None else part_from_config(config["scale"], Rule, "scale"),
            value=config.get("value", "kl"),
        )
    raise ConfigError(
        f"target is {config!r}; give preset: NAME, or trust: and residual: (presets: {', '.join(presets.names())})"
    )


def _peers_keys(config: Mapping) -> dict[str, Any]:
    """What is a peer's spelling, as it may also stand at the top of a config file: no part, no preset's parameter, and
    beside parts no parameter alone."""
    spelled = {key: value for key, value in config.items() if key in peers.KEYS and key not in _PARTS}
    if "preset" not in config:
        return {} if {*_PARTS} & config.keys() and not peers.FLAGS & spelled.keys() else spelled
    if config["preset"] not in presets.names():  # a function of the user's own may take any name
        return {}
    taken = {key for name in presets.names() for key in presets.describe(name).parameters}
    return {key: value for key, value in spelled.items() if key not in taken}


def target_to_config(target: Target, composed: bool = False) -> str | dict:
    """See ``Target.to_config``."""
    if target.share != 1:
        whole = target_to_config(replace(target, share=1.0), composed)
        return {**({"preset": whole} if isinstance(whole, str) else whole), _SHARE: target.share}
    if not composed and (target.name in presets.names() or ":" in target.name):
        numbers = {key: part_to_config(value) for key, value in target.hyperparameters.items()}
        return {"preset": target.name, **numbers} if numbers else target.name
    config: dict[str, Any] = {
        "trust": part_to_config(target.trust),
        "residual": _term_to_config(target.residual[0])
        if [term.factor for term in target.residual] == [1.0]
        else [_term_to_config(term) for term in target.residual],
    }
    if target.scale is not None:
        config["scale"] = part_to_config(target.scale)
    if target.value != "kl":
        config["value"] = target.value
    return config


def names_code(config: object) -> bool:
    """Whether reading this configuration would import a module."""
    if isinstance(config, Mapping):
        return any(names_code(part) for pair in config.items() for part in pair)
    if isinstance(config, (list, tuple)):
        return any(map(names_code, config))
    return isinstance(config, str) and ":" in config


def _from_name(name: object, hyperparameters: dict) -> Target:
    if not isinstance(name, str):
        raise ConfigError(f"target is {name!r}; use a name such as 'dft'")
    if ":" not in name:
        return presets.build(name, **hyperparameters)
    made = load_object(name, "target")
    if (entry := presets.written_as(name)) is not None:
        return replace(presets.build(entry.name, **hyperparameters), name=name)
    if not isinstance(made, Target):
        if not callable(made):
            raise ConfigError(f"target is {name!r}, which is neither a Target nor a function that returns one")
        made = call(made, hyperparameters, f"target {name}")
    if not isinstance(made, Target):
        raise ConfigError(f"target is {name!r}, which returned {type(made).__name__}, not a Target")
    return replace(made, name=name, hyperparameters=hyperparameters)


def _residual(value: object) -> Any:
    """A residual, or a list of them, each with an optional ``weight`` and ``divergence`` beside its name."""
    if not isinstance(value, (list, tuple)):
        if not isinstance(value, Mapping) or _DIVERGENCE not in value:
            return part_from_config(value, Residual, "residual")
        value = [value]
    terms = []
    for entry in value:
        if not isinstance(entry, (Mapping, str, Residual)):
            raise ConfigError(f"residual holds {entry!r}; write a name, or a name with its parameters")
        entry = dict(entry) if isinstance(entry, Mapping) else {entry: {}}
        factor = check_range("weight of a residual", entry.pop("weight", 1.0))
        divergence = as_divergence(entry.pop(_DIVERGENCE, FORWARD_KL))
        terms.append((factor, part_from_config(entry, Residual, "residual"), divergence))
    return terms


def _term_to_config(term: Term) -> str | dict:
    written = part_to_config(term.pool)
    beside: dict[str, Any] = {} if term.factor == 1.0 else {"weight": term.factor}
    if not term.divergence.is_forward_kl:
        beside[_DIVERGENCE] = part_to_config(term.divergence)
    if not beside:
        return written
    return {**beside, **({written: {}} if isinstance(written, str) else written)}
