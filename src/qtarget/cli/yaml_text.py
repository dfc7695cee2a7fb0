"""A safe YAML loader for untrusted files: no key twice, no more than fits on some pages."""

from __future__ import annotations

from typing import Any

import yaml

from qtarget.errors import ConfigError

# Values once all aliases are written out, and how deep they may stand in each other: far above any recipe, far below
# what an alias of aliases of aliases unfolds to, or what a later walk through the value could not recurse into.
_MOST, _DEEPEST = 100_000, 100


def load(text: str, what: str) -> Any:
    """The value of one YAML document.

    Args:
        what: the field and its value, such as ``config is 'my.yaml'``: how the sentence begins.

    Raises:
        ConfigError: it is not YAML, asks for another type than YAML's own, holds a key twice or itself, or is too large.
    """
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{what}, which is not YAML: it holds the character {error.character:#x}") from None
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {}, set())
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" at line {mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{what}, which is not YAML{line}: {' '.join(problem.split())}") from None
    except ConfigError:
        raise
    except Exception as error:  # a date in month 13, a number of ten thousand digits, a tag its value does not fit
        raise ConfigError(
            f"{what}, which holds a value that cannot be read ({type(error).__name__}: {error}); put it in quotes"
        ) from None
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise yaml.MarkedYAMLError(
                problem=f"values are nested more than {_DEEPEST} deep", problem_mark=self.peek_event().start_mark
            )
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_yaml_int(self, node: Any) -> int:
        value = super().construct_yaml_int(node)
        str(value)  # raises where a hexadecimal number has more digits than Python writes, in an error's text too
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]], above: set[int]) -> tuple[int, int]:
    """(values in it, how deep it is) with aliases written out."""
    if id(node) in known:
        return known[id(node)]
    if id(node) in above:
        raise _fault("a value holds itself by an alias; write it out", node)
    if isinstance(node, yaml.MappingNode):
        _once(node)
        parts = [part for pair in node.value for part in pair]
    else:
        parts = node.value if isinstance(node, yaml.SequenceNode) else []
    above.add(id(node))
    inside = [_measure(part, known, above) for part in parts]
    above.remove(id(node))
    size, depth = 1 + sum(count for count, _ in inside), 1 + max((deep for _, deep in inside), default=0)
    if size > _MOST or depth > _DEEPEST:
        raise _fault(
            f"its aliases unfold to more than {_MOST:,} values, or {_DEEPEST} in each other; write it out", node
        )
    known[id(node)] = size, depth
    return size, depth


def _once(node: yaml.MappingNode) -> None:
    seen: set[tuple[str, str]] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                raise _fault(f"{key.value} appears twice; keep one of them", key)
            seen.add((key.tag, key.value))


def _fault(problem: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
