"""Targets from and to what YAML holds: names, mappings, import paths."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from qtarget.errors import ConfigError, check_range, unknown
from qtarget.targets import peers, presets
from qtarget.targets.divergence import FORWARD_KL, Divergence, FunctionDivergence, as_divergence
from qtarget.targets.parts import Part
from qtarget.targets.residual import Residual, Term, as_pool
from qtarget.targets.target import Target
from qtarget.targets.trust import FunctionRule, Rule, as_rule

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
        numbers = {key: _written(value) for key, value in target.hyperparameters.items()}
        return {"preset": target.name, **numbers} if numbers else target.name
    config: dict[str, Any] = {
        "trust": _written(target.trust),
        "residual": _term_to_config(target.residual[0])
        if [term.factor for term in target.residual] == [1.0]
        else [_term_to_config(term) for term in target.residual],
    }
    if target.scale is not None:
        config["scale"] = _written(target.scale)
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


def load_object(path: str, field: str) -> Any:
    """What ``my_pkg.my_module:name`` points to. Importing runs the module: only for a path that the user wrote.

    Raises:
        ConfigError: it is no such path, or the module cannot be imported, whatever it raises.
    """
    module_name, _, attribute = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise ConfigError(f"{field} is {path!r}; write the path of an object, my_pkg.my_module:name")
    try:
        module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # what a module does when it is imported is its own: it may even exit
        why = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{field} is {path!r}, but importing {module_name} failed: {why}; mend that, or check the path"
        ) from error
    if not hasattr(module, attribute):
        raise ConfigError(f"{field} is {path!r}, but {module_name} has no {attribute!r}; name something it has")
    return getattr(module, attribute)


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
        made = _call(made, hyperparameters, f"target {name}")
    if not isinstance(made, Target):
        raise ConfigError(f"target is {name!r}, which returned {type(made).__name__}, not a Target")
    return replace(made, name=name, hyperparameters=hyperparameters)


def _call(build: Callable, parameters: Mapping, field: str) -> Any:
    try:
        known = inspect.signature(build).parameters
    except ValueError:
        known = None
    if known is not None:
        for parameter in parameters:
            if parameter not in known:
                raise unknown(f"parameter of {field}", parameter, known)
    try:
        return build(**parameters)
    except ConfigError:
        raise
    except Exception as error:  # a function of the user's own, or parameters of a kind it cannot take
        raise ConfigError(
            f"{field} failed with {type(error).__name__}: {error}; mend it or its parameters (--debug shows where)"
        ) from error


# How each kind of part is made of what is no name, and of a plain function that a path leads to.
_CONVERTED: dict[Any, Callable[..., Any]] = {Rule: as_rule, Residual: as_pool, Divergence: as_divergence}
_FUNCTIONS: dict[Any, Callable[..., Any]] = {Rule: FunctionRule, Divergence: FunctionDivergence}


def part_from_config(value: object, kind: type[Part], field: str) -> Any:
    """A part: ``name`` | ``{name: {parameter: value}}`` | a number | ``my_pkg.my_module:name``."""
    convert = _CONVERTED[kind]
    parameters: Mapping = {}
    if isinstance(value, Mapping):
        if len(value) != 1:
            raise ConfigError(
                f"{field} is {dict(value)!r}; write one name with its parameters, as in entropy: {{top_k: 20}}"
            )
        [(value, parameters)] = value.items()
        parameters = parameters or {}
        if not isinstance(parameters, Mapping) or not all(isinstance(key, str) for key in parameters):
            raise ConfigError(f"{field}.{value} is {parameters!r}; write its parameters as name: value")
    if not isinstance(value, str):
        return convert(value)
    if ":" in value:
        made = load_object(value, field)
        if isinstance(made, Part):
            return made
        if kind in _FUNCTIONS and not isinstance(made, type) and not parameters:
            return _FUNCTIONS[kind](made, path=value)
        return convert(_call(made, parameters, f"{field} {value}"))
    if value not in kind.known:
        raise unknown(field, value, kind.known)
    parameters = {
        key: part_from_config(inner, Rule, f"{field}.{key}") if key == "trust" else inner
        for key, inner in parameters.items()
    }
    return convert(_call(kind.known[value], parameters, f"{field} {value}"))


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
    written = _written(term.pool)
    beside: dict[str, Any] = {} if term.factor == 1.0 else {"weight": term.factor}
    if not term.divergence.is_forward_kl:
        beside[_DIVERGENCE] = _written(term.divergence)
    if not beside:
        return written
    return {**beside, **({written: {}} if isinstance(written, str) else written)}


def _written(value: Any) -> Any:
    """A part as YAML writes it; what is none as it is."""
    return _part_to_config(value) if isinstance(value, Part) else value


def _part_to_config(part: Part) -> str | dict:
    if isinstance(part, (FunctionRule, FunctionDivergence)):
        function: Any = part.function
        return part.path or f"{function.__module__}:{function.__qualname__}"
    own = part.known.get(part.name) is not type(part)  # a subclass inherits the name of a part it is not
    name = f"{type(part).__module__}:{type(part).__qualname__}" if own else part.name
    if not dataclasses.is_dataclass(part):
        return name
    values = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    parameters = {key: _written(value) for key, value in values.items()}
    return {name: parameters} if parameters else name
