"""Settings are described once, in their config's docstring; help and docs are made from it.

Only text is read here, so that ``qtarget train --help`` need not import torch.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

_Config = TypeVar("_Config", bound=type)


def entries(docstring: str) -> dict[str, str]:
    """name → description, each on one line, of a docstring's ``Args:``.

    >>> entries('''A config.
    ...
    ...     Args:
    ...         rate: how fast. Above 1 it
    ...             rarely ends well.
    ...         steps: how long.
    ...     ''')
    {'rate': 'how fast. Above 1 it rarely ends well.', 'steps': 'how long.'}
    """
    section = re.search(r"^Args:\n((?: +.*\n|\n)+)", inspect.cleandoc(docstring) + "\n", re.MULTILINE)
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def with_help(choices: Mapping[str, Sequence[str]]) -> Callable[[_Config], _Config]:
    """A class decorator over ``@dataclass``: the docstring's entries, and the choices, go into the fields' metadata.

    Transformers' and TRL's argument parsers read them there.
    """

    def decorate(config: _Config) -> _Config:
        described = entries(config.__doc__ or "")
        for field in dataclasses.fields(config):
            if field.name in config.__annotations__:  # the others belong to the base class
                more = {"choices": list(choices[field.name])} if field.name in choices else {}
                field.metadata = MappingProxyType({"help": described.get(field.name, ""), **more})
        return config

    return decorate


def settings(file: Path, config: str) -> list[tuple[str, Any, str]]:
    """(name, default, description) of the fields of a class, read from its source without importing it.

    Args:
        file: the module's source. config: the class's name. Fields are written as ``name: type = literal``.
    """
    module = ast.parse(file.read_text(encoding="utf-8"))
    body = next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == config)
    described = entries(ast.get_docstring(body, clean=False) or "")
    return [
        (node.target.id, ast.literal_eval(node.value), described.get(node.target.id, ""))
        for node in body.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None
    ]
