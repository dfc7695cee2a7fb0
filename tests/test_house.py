"""The counts of `make house` see what they are for: each fault, planted in a small checkout, is found."""

from __future__ import annotations

from pathlib import Path

import pytest

import house
import house_counts

TRAINER = """
from trl import SFTTrainer

class Mixin(SFTTrainer):
    _rows: int

class QTargetTrainer(Mixin, SFTTrainer):
    def __init__(self):
        self.aux = self._others = 1

    def _base_model(self):
        return self._others
"""
CONFIG = '''
class QTargetConfig:
    """Settings.

    Args:
        denominator: what the loss is divided by.
        weights, weights_temperature: where weights come from.
    """

    denominator: str = "all"
    weights: str = "column"
    weights_temperature: float = 1.0
'''


def checkout(folder: Path, files: dict[str, str]) -> house_counts.Source:
    """A source tree with a trainer, a config and these files, path under src/qtarget → text."""
    files = {"training/trainer.py": TRAINER, "training/config.py": CONFIG, **files}
    for name, text in files.items():
        path = folder / "src" / "qtarget" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "docs").mkdir()
    (folder / "README.md").write_text("")
    return house_counts.Source(folder)


@pytest.mark.parametrize(
    ("own", "parts", "text"),
    [
        (1, 0, "def f(trainer): return trainer._others"),
        (1, 0, "def f(subject): return subject.trainer._prepare_inputs({})"),
        (1, 0, "class A:\n    def f(self): return self._trainer._tokenizer"),
        (1, 0, "def f(run: 'QTargetTrainer | None'): return run._objective"),
        (1, 0, "def f():\n    run = QTargetTrainer()\n    return run._objective"),
        (1, 0, "def f(subject):\n    it, n = subject.trainer, 2\n    return it._objective"),
        (1, 0, "def f(trainer): return getattr(trainer, '_objective', None)"),
        (1, 0, "def f(trainer): return vars(trainer)"),
        (1, 0, "def f(trainer): return trainer.__dict__"),
        (1, 0, "from operator import attrgetter\nf = attrgetter('_base_model')"),
        (1, 0, "def f(given): return given._base_model()"),  # by the name alone
        (1, 0, "class Rows(QTargetTrainer):\n    def f(self): return self._objective"),
        (1, 1, "def f(trainer): return trainer._others._head"),
        (0, 1, "def f(trainer): return trainer.aux._head"),
        (0, 1, "def f(trainer):\n    aux = trainer.aux\n    return aux._head"),
        (
            0,
            1,
            "class A:\n    def __init__(self, trainer): self.aux = trainer.aux\n    def f(self): return self.aux._head",
        ),
        (0, 0, "def f(trainer): return trainer.batch([]), trainer.__class__, trainer.aux.head"),
        (0, 0, "class A:\n    def f(self): return self._others"),
    ],
)
def test_private_names(tmp_path, own, parts, text):
    source = checkout(tmp_path, {"lens/page.py": text})
    found = house_counts.private_uses(source, source.files)
    assert tuple(map(len, found)) == (own, parts), found


def test_the_trainers_own_file_may_use_its_names(tmp_path):
    source = checkout(tmp_path, {})
    assert house_counts.private_uses(source, source.files) == ([], [])


def test_state_of_another_class(tmp_path):
    used = TRAINER.replace("_rows: int", "_others: int\n    def f(self): return self._others")
    source = checkout(tmp_path, {"training/trainer.py": used})
    assert len(house_counts.state_of_another_class(source)) == 1
    own = TRAINER.replace("_rows: int", "_rows = 3\n    def f(self): return self._rows")
    assert not house_counts.state_of_another_class(checkout(tmp_path / "own", {"training/trainer.py": own}))


def test_bases_are_counted_through_each_other(tmp_path):
    chain = TRAINER.replace("(Mixin, ", "(Second, ") + "\nclass Second(Mixin): pass\n"
    assert checkout(tmp_path, {"training/trainer.py": chain}).ancestors("QTargetTrainer") == ["Second", "Mixin"]


def test_untyped(tmp_path):
    text = (
        "def f(trainer: Any, n: Any): ...\ndef g(trainer): ...\ndef h(trainer: QTargetTrainer): ...\ntrainer: 'Any' = 1"
    )
    as_any, bare = house_counts.untyped(checkout(tmp_path, {"a.py": text}))
    assert len(as_any) == 2 and len(bare) == 1


@pytest.mark.parametrize(
    ("count", "one", "other"),
    [
        (1, "from qtarget.b import x", "def f():\n    from qtarget import a"),
        (1, "import qtarget.b", "from . import a"),
        (1, "from qtarget import b", "import importlib\nimportlib.import_module('qtarget.a')"),
        (0, "from qtarget import b", "if TYPE_CHECKING:\n    from qtarget import a"),
        (0, "from qtarget import b", "import torch"),
    ],
)
def test_circles(tmp_path, count, one, other):
    edges = house_counts.imports(checkout(tmp_path, {"__init__.py": "", "a.py": one, "b.py": other}))
    assert len(house_counts.pairs(edges)) == len(house_counts.circles(edges)) == count


def test_a_circle_of_three_is_a_group_and_no_pair(tmp_path):
    files = {"a.py": "from qtarget import b", "b.py": "from qtarget import c", "c.py": "from qtarget import a"}
    edges = house_counts.imports(checkout(tmp_path, {"__init__.py": "", **files}))
    assert house_counts.pairs(edges) == []
    assert house_counts.circles(edges) == [["qtarget.a", "qtarget.b", "qtarget.c"]]


ROWS = "(('denominator', None, 'a b c'), ('weights', None, 'a b c'), ('weights_temperature', None, 'a b c'))"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (2, f"TABLE = {ROWS}"),
        (2, "TABLE = {'denominator': 'a b c', 'weights': 'a b c', 'weights_temperature': 'a b c'}"),
        (1, "TABLE = {'denominator': 'a', 'weights': 'b', 'weights_temperature': 'c'}"),
        (1, "HEAD = ('weights', 'another two words', 'c')"),
    ],
)
def test_descriptions_in_code(tmp_path, count, text):
    described = house_counts.descriptions(checkout(tmp_path, {"cli/fields.py": text}))
    assert {len(places) for places in described.values()} == {count}


def test_descriptions_in_help_and_pages(tmp_path):
    helped = CONFIG.replace('"all"', 'field(default="all", metadata={"help": "what the loss is divided by"})')
    source = checkout(tmp_path, {"training/config.py": helped})
    table = "| `denominator` | all | a |\n| `weights`, `weights_temperature` | - | b |\n"
    (tmp_path / "docs" / "training.md").write_text(table)
    assert {name: len(places) for name, places in house_counts.descriptions(source).items()} == {
        "denominator": 3,
        "weights": 2,
        "weights_temperature": 2,
    }
    (tmp_path / "docs" / "training.md").write_text(f"<!-- settings: written by a script -->\n{table}<!-- end -->\n")
    assert max(map(len, house_counts.descriptions(source).values())) == 2


def test_the_command_fails_where_a_limit_is_passed(tmp_path, capsys):
    checkout(tmp_path, {"lens/page.py": "def f(trainer): return trainer._others"})
    assert house.main(["--root", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "src/qtarget/lens/page.py:1 _others" in said.out
    assert "over the limit: underscored names of the trainer" in said.err


def test_the_command_passes_where_nothing_is_wrong(tmp_path, capsys):
    checkout(tmp_path, {})
    assert house.main(["--root", str(tmp_path)]) == 0, capsys.readouterr().out
