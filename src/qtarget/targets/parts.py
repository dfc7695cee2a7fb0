"""What rules, residuals and divergences share: a name, by which YAML writes and reads them."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

from qtarget import own_code
from qtarget.errors import ConfigError, unknown

C = TypeVar("C", bound=type)


class Part:
    """Base of rules, residuals and divergences.

    A class with parameters is a frozen dataclass; they are written and read by the names of its fields. One without a
    name of its own is written as ``my_pkg.my_module:MyClass``.
    """

    name: ClassVar[str] = ""
    known: ClassVar[dict[str, Any]]  # of the kind, by name

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.name or type(self).__name__


def named(name: str):
    """Class decorator: known by this name among its kind."""

    def add(cls: C) -> C:
        cls.name = name  # type: ignore[attr-defined]
        cls.known[name] = cls  # type: ignore[attr-defined]
        return cls

    return add


class Kind(NamedTuple):
    """How a kind of part is made of what is no name, and of a plain function, where it may be one."""

    convert: Callable[..., Any]
    of_function: Callable[..., Any] | None = None


KINDS: dict[type[Part], Kind] = {}


def part_from_config(value: object, kind: type[Part], field: str) -> Any:
    """A part: ``name`` | ``{name: {parameter: value}}`` | a number | ``my_pkg.my_module:name``."""
    convert, of_function = KINDS[kind]
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
        if of_function is not None and not isinstance(made, type) and not parameters:
            return of_function(made, path=value)
        return convert(call(made, parameters, f"{field} {value}"))
    if value not in kind.known:
        raise unknown(field, value, kind.known)
    parameters = {
        key: part_from_config(inner, kind, f"{field}.{key}") if key == "trust" else inner  # a rule may hold another
        for key, inner in parameters.items()
    }
    return convert(call(kind.known[value], parameters, f"{field} {value}"))


def part_to_config(value: Any) -> Any:
    """A part as YAML writes it; what is none as it is."""
    return _named_form(value) if isinstance(value, Part) else value


def _named_form(part: Part) -> str | dict:
    if (function := getattr(part, "function", None)) is not None:  # a plain function of the user's own
        return part.path or f"{function.__module__}:{function.__qualname__}"  # type: ignore[attr-defined]
    own = part.known.get(part.name) is not type(part)  # a subclass inherits the name of a part it is not
    name = f"{type(part).__module__}:{type(part).__qualname__}" if own else part.name
    if not dataclasses.is_dataclass(part):
        return name
    values = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    parameters = {key: part_to_config(value) for key, value in values.items()}
    return {name: parameters} if parameters else name


def load_object(path: str, field: str) -> Any:
    """What ``my_pkg.my_module:name`` points to. Importing runs the module: only for a path that the user wrote.

    Raises:
        ConfigError: it is no such path, or the module cannot be imported, whatever it raises.
    """
    module_name, _, attribute = path.partition(":")
    is_file = module_name.endswith(".py") or "/" in module_name
    if is_file or not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        mend = "a module is named without folder and .py: " if is_file else ""
        raise ConfigError(f"{field} is {path!r}; {mend}write the path of an object, my_pkg.my_module:name")
    try:
        with own_code.searched():
            module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # what a module does when it is imported is its own: it may even exit
        why = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        folders, searched = own_code.FOLDERS.get(), ""
        if folders and isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0]:
            searched = f" among installed packages or in {' or '.join(folders)}"
        raise ConfigError(
            f"{field} is {path!r}, but importing {module_name} failed: {why}{searched}; fix that, or check the path"
        ) from error
    if not hasattr(module, attribute):
        if hidden := own_code.hidden_by(module):
            raise ConfigError(
                f"{field} is {path!r}, but {module_name} is an installed module, which comes before {hidden}; rename "
                "that file"
            )
        near = difflib.get_close_matches(attribute, vars(module), n=1)
        mend = f"did you mean {near[0]!r}?" if near else "name something it has"
        raise ConfigError(f"{field} is {path!r}, but {module_name} has no {attribute!r}; {mend}")
    return getattr(module, attribute)


def call(build: Callable, parameters: Mapping, field: str) -> Any:
    """``build(**parameters)``; any fault of the parameters or of the function is a ConfigError that names ``field``."""
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
            f"{field} failed with {type(error).__name__}: {error}; fix it or its parameters (--debug shows where)"
        ) from error
