"""Counts over the syntax tree of a checkout: who reaches into the trainer, who imports whom, what is described twice."""

from __future__ import annotations

import ast
import re
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

TRAINER = "QTargetTrainer"
CONFIG = "QTargetConfig"
# What a variable, parameter or attribute that holds a trainer is called.
NAMED_TRAINER = ("trainer", "_trainer")
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
# Transformers' own, which has no public name for it.
NOT_OURS = ("_name_or_path",)
BY_NAME = ("getattr", "setattr", "hasattr", "delattr", "object")  # the last: mock.patch.object
# A description is a sentence; a setting beside one or two words is a table of choices or of values.
SENTENCE_WORDS = 3
# Where fewer settings stand in one file, their names are headings of something else.
SETTINGS_OF_A_TABLE = 3


class Source:
    """The Python files of a checkout, parsed."""

    def __init__(self, root: Path):
        self.root = root
        self.package = root / "src" / "qtarget"

    @cached_property
    def files(self) -> dict[Path, ast.Module]:
        """Every file of src, path → syntax tree."""
        return {path: parsed(path) for path in sorted(self.package.rglob("*.py"))}

    @cached_property
    def classes(self) -> dict[str, tuple[Path, ast.ClassDef]]:
        return {
            node.name: (path, node)
            for path, tree in self.files.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
        }

    def ancestors(self, name: str) -> list[str]:
        """The classes of src that a class inherits from, itself left out."""
        found: list[str] = []
        bases = self.classes[name][1].bases if name in self.classes else []
        for base in filter(None, map(last_name, bases)):
            if base in self.classes:
                found += [base, *self.ancestors(base)]
        return list(dict.fromkeys(found))

    @cached_property
    def private_names(self) -> frozenset[str]:
        """What the trainer and its bases here define under a name that begins with an underscore."""
        return frozenset().union(*(defined(self.classes[name][1]) for name in [TRAINER, *self.ancestors(TRAINER)]))

    def place(self, path: Path, node: ast.AST, text: str) -> str:
        return f"{path.relative_to(self.root)}:{getattr(node, 'lineno', 1)} {text}"


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    with tokenize.open(path) as file:
        tokens = [token for token in tokenize.generate_tokens(file.readline) if token.type not in LAYOUT]
    held = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            held -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(held)


def last_name(node: ast.AST | None) -> str | None:
    """``b`` of ``a.b``, and of ``b``."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None


def underscored(name: object) -> bool:
    """Private: one underscore at its start. ``__dict__`` is a way around that, and counts."""
    return isinstance(name, str) and (name == "__dict__" or (name.startswith("_") and not name.startswith("__")))


def defined(cls: ast.ClassDef) -> set[str]:
    """Private names a class defines: methods, and its state."""
    methods = {node.name for node in ast.walk(cls) if isinstance(node, ast.FunctionDef) and underscored(node.name)}
    return methods | state(cls)


def state(cls: ast.ClassDef) -> set[str]:
    """Private attributes a class gives a value; one that is only declared belongs to another class."""
    names = set()
    for node in cls.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) and node.value is not None else targets
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    for node in ast.walk(cls):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and last_name(node.value) == "self":
            names.add(node.attr)
    return {name for name in names if underscored(name)}


def mentions(annotation: ast.AST | None, *names: str) -> bool:
    """Whether a type names one of these, quoted or not."""
    if annotation is None:
        return False
    for node in ast.walk(annotation):
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else last_name(node)
        if text and any(re.search(rf"\b{name}\b", text) for name in names):
            return True
    return False


class PrivateUses(ast.NodeVisitor):
    """Private names of a trainer that a file uses, and of what hangs on a trainer.

    A trainer is what is called one, what is annotated or made as one, and any other name for these. Where a value comes
    out of a function, its type is not known: there the trainer's own private names count, whatever they are read from.

    Attributes:
        own: (node, name) for private names of the trainer. parts: the same for parts of it, as in ``trainer.aux._head``.
    """

    def __init__(self, source: Source, tree: ast.Module):
        self.source = source
        self.own: list[tuple[ast.AST, str]] = []
        self.parts: list[tuple[ast.AST, str]] = []
        self.scopes: list[dict[str, str]] = [{}]
        self.attributes = self._attributes_holding_parts(tree)
        self.visit(tree)

    def _attributes_holding_parts(self, tree: ast.Module) -> dict[str, str]:
        """``self.NAME`` → "trainer" or "part", for what is stored on an object of this file."""
        self.attributes: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and (kind := self._kind(node.value)):
                for target in node.targets:
                    if isinstance(target, ast.Attribute) and last_name(target.value) == "self":
                        self.attributes[target.attr] = kind
        return self.attributes

    def _kind(self, node: ast.AST) -> str | None:
        """ "trainer", "part" of one, or None."""
        if isinstance(node, ast.Name):
            known = next((scope[node.id] for scope in reversed(self.scopes) if node.id in scope), None)
            return known or ("trainer" if node.id in NAMED_TRAINER else None)
        if isinstance(node, ast.Attribute):
            if node.attr in NAMED_TRAINER:
                return "trainer"
            if last_name(node.value) == "self" and node.attr in self.attributes:
                return self.attributes[node.attr]
            return "part" if self._kind(node.value) else None
        if isinstance(node, ast.Call):
            made = last_name(node.func)
            if made == TRAINER or (made in self.source.classes and TRAINER in self.source.ancestors(made)):
                return "trainer"
            return "part" if isinstance(node.func, ast.Attribute) and self._kind(node.func.value) else None
        return self._kind(node.value) if isinstance(node, ast.Subscript) else None

    def _bind(self, target: ast.AST, value: ast.AST | None) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for one, its in zip(target.elts, value.elts, strict=True):
                self._bind(one, its)
        elif isinstance(target, ast.Name) and value is not None:
            kind = self._kind(value)
            if kind == "trainer" or (kind and not isinstance(value, ast.Call | ast.Subscript)):
                self.scopes[-1][target.id] = kind

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        self.scopes.append({arg.arg: "trainer" for arg in arguments if mentions(arg.annotation, TRAINER)})
        self.generic_visit(node)
        self.scopes.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        heir = node.name == TRAINER or any(
            base == TRAINER or (base in self.source.classes and TRAINER in self.source.ancestors(base))
            for base in map(last_name, node.bases)
        )
        self.scopes.append({"self": "trainer"} if heir else {})
        self.generic_visit(node)
        self.scopes.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self._bind(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        if isinstance(node.target, ast.Name) and mentions(node.annotation, TRAINER):
            self.scopes[-1][node.target.id] = "trainer"
        else:
            self._bind(node.target, node.value)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.generic_visit(node)
        self._bind(node.target, node.value)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        if underscored(node.attr):
            self._count(node, node.value, node.attr)

    def visit_Call(self, node: ast.Call) -> None:
        """Private names in quotes: ``getattr(trainer, "_x")``, ``vars(trainer)``, ``attrgetter("_x")``."""
        self.generic_visit(node)
        function, arguments = last_name(node.func), node.args
        texts = [arg.value for arg in arguments if isinstance(arg, ast.Constant)]
        if function in BY_NAME and len(arguments) > 1 and texts and underscored(texts[0]):
            self._count(node, arguments[0], texts[0])
        elif function == "vars" and arguments:
            self._count(node, arguments[0], "__dict__")
        elif function in ("attrgetter", "methodcaller"):
            for text in texts:
                if isinstance(text, str) and text.split(".")[-1] in self.source.private_names:
                    self.own.append((node, text))

    def _count(self, node: ast.AST, owner: ast.AST, name: str) -> None:
        kind = None if name in NOT_OURS else self._kind(owner)
        if kind is None and name in self.source.private_names and last_name(owner) not in ("self", "cls"):
            kind = "part" if isinstance(owner, ast.Attribute) and last_name(owner.value) == "self" else "trainer"
            kind = None if isinstance(owner, ast.Call) and last_name(owner.func) == "super" else kind
        if kind:
            (self.own if kind == "trainer" else self.parts).append((node, name))


def private_uses(source: Source, files: Iterable[Path]) -> tuple[list[str], list[str]]:
    """Places outside the trainer's own file that use a private name of it, and those that use one of its parts'."""
    own, parts = [], []
    for path in files:
        uses = PrivateUses(source, parsed(path))
        if path != source.classes[TRAINER][0]:
            own += [source.place(path, node, name) for node, name in uses.own]
        parts += [source.place(path, node, name) for node, name in uses.parts]
    return own, parts


def state_of_another_class(source: Source) -> list[str]:
    """Private attributes that a base of the trainer uses and another class of the family gives a value."""
    found = []
    family = [TRAINER, *source.ancestors(TRAINER)]
    for name in family[1:]:
        path, cls = source.classes[name]
        below = set().union(*(state(source.classes[other][1]) for other in family if other != name))
        used = {node.attr: node for node in ast.walk(cls) if isinstance(node, ast.Attribute) and node.attr in below}
        found += [source.place(path, node, f"{name}.{attr}") for attr, node in used.items()]
    return found


def untyped(source: Source) -> tuple[list[str], list[str]]:
    """Trainers annotated as Any, and parameters that take a trainer without a type."""
    as_any, bare = [], []
    for path, tree in source.files.items():
        for node in ast.walk(tree):
            name = node.arg if isinstance(node, ast.arg) else None
            name = last_name(node.target) if isinstance(node, ast.AnnAssign) else name
            if name in NAMED_TRAINER:
                if mentions(node.annotation, "Any", "object"):
                    as_any.append(source.place(path, node, f"{name}: Any"))
                elif node.annotation is None:
                    bare.append(source.place(path, node, str(name)))
    return as_any, bare


def imports(source: Source) -> dict[str, set[str]]:
    """module → modules of qtarget it imports, at its top or inside a function; imports for type checkers left out."""
    names = {module_name(source, path): path for path in source.files}
    edges: dict[str, set[str]] = defaultdict(set)
    for name, path in names.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for full in imported(source.files[path], package):
            while full and full not in names:
                full = full.rpartition(".")[0]
            if full and full != name:
                edges[name].add(full)
    return edges


def module_name(source: Source, path: Path) -> str:
    parts = path.relative_to(source.package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(node: ast.AST, package: str) -> Iterator[str]:
    """Dotted names a piece of code imports, ``a.b.c`` for ``from a.b import c``."""
    if isinstance(node, ast.If) and last_name(node.test) == "TYPE_CHECKING":
        for child in node.orelse:
            yield from imported(child, package)
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        module = ".".join([*above, *([node.module] if node.module else [])])
        yield from (f"{module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and last_name(node.func) == "import_module":
        yield from (str(name.value) for name in node.args[:1] if isinstance(name, ast.Constant))
    for child in ast.iter_child_nodes(node):
        yield from imported(child, package)


def pairs(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other."""
    return sorted(
        f"{one} - {other}" for one in edges for other in edges[one] if one < other and one in edges.get(other, ())
    )


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which leads back to itself through the others (strongly connected, by Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def follow(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(edges.get(name, ())):
            if other not in index:
                follow(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            at = stack.index(name)
            group = stack[at:]
            del stack[at:]
            if len(group) > 1:
                groups.append(sorted(group))

    for name in sorted(edges):
        if name not in index:
            follow(name)
    return groups


def descriptions(source: Source) -> dict[str, list[str]]:
    """For each setting of QTargetConfig itself the places that say what it is."""
    path, cls = source.classes[CONFIG]
    settings = {
        node.target.id: node
        for node in cls.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not underscored(node.target.id)
    }
    found: dict[str, dict[str, str]] = {name: {} for name in settings}
    for name, node in settings.items():
        if node.value is not None and any(sentence(part) for part in ast.walk(node.value)):
            found[name]["help"] = source.place(path, node, "help of the field")
    for line in (ast.get_docstring(cls) or "").splitlines():
        if entry := re.match(r" *([a-z_]+(?:, [a-z_]+)*): ", line):
            for name in set(entry[1].split(", ")) & settings.keys():
                found[name]["docstring"] = f"{path.relative_to(source.root)} docstring"
    for other, tree in source.files.items():
        for name, node in rows_of_tables(tree):
            if name in settings:
                found[name][str(other)] = source.place(other, node, "row of a table")
    for page in [source.root / "README.md", *sorted((source.root / "docs").glob("*.md"))]:
        written = re.sub(
            r"<!-- [^>]*\b(?:generated|(?:made|written) by)\b.*?<!-- end",
            "",
            page.read_text(encoding="utf-8"),
            flags=re.S,
        )
        for row in re.findall(r"^\| *(`.*?) *\|", written, re.M):
            for name in set(re.findall(r"`(\w+)`", row)) & settings.keys():
                found[name][str(page)] = f"{page.relative_to(source.root)} row of a table"
    tables = Counter(place for places in found.values() for place in places)
    tables |= Counter({"help": SETTINGS_OF_A_TABLE, "docstring": SETTINGS_OF_A_TABLE})
    return {
        name: [text for place, text in places.items() if tables[place] >= SETTINGS_OF_A_TABLE]
        for name, places in found.items()
    }


def sentence(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value.split()) >= SENTENCE_WORDS


def rows_of_tables(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """(name, node) of tuples, calls and entries of mappings that set a sentence beside a name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            pairs = [[key, value] for key, value in zip(node.keys, node.values, strict=True) if key is not None]
        else:
            pairs = [node.elts] if isinstance(node, ast.Tuple | ast.List) else []
            pairs = [node.args + [word.value for word in node.keywords]] if isinstance(node, ast.Call) else pairs
        for values in pairs:
            if len(values) > 1 and isinstance(values[0], ast.Constant) and any(map(sentence, values[1:])):
                yield str(values[0].value), node
