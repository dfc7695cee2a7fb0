"""Files written whole or not there, journals, JSON of strangers, and what two records differ in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from typing import Annotated, Any, Literal, NotRequired

import pytest
import torch
from pydantic import Field, with_config
from typing_extensions import TypedDict

import qtarget as qt
from qtarget import files
from qtarget.losses.inputs import Tokens


def python(code: str, **options: Any) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, **options)


# -- written whole or not there ----------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"\x00\xff", "äöü \ud800"])
def test_a_file_is_written_and_written_again(tmp_path, data):
    path = tmp_path / "new" / "file"
    files.write(path, "before")
    files.write(path, data)
    assert path.read_bytes() == (data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
    assert [path] == [*path.parent.iterdir()]


def test_json_is_as_it_always_was(tmp_path):
    value = {"name": "ü", "of": [1, None]}
    files.write_json(tmp_path / "a", value)
    assert (tmp_path / "a").read_text() == json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def test_what_raises_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(KeyError), files.whole(path) as partial:
        partial.write_text("half")
        raise KeyError
    assert path.read_text() == "before" and [path] == [*tmp_path.iterdir()]


def test_a_folder_gets_its_name_last(tmp_path):
    path = tmp_path / "folder"
    with files.whole(path) as partial:
        (partial / "inner").mkdir(parents=True)
        (partial / "inner" / "file").write_text("a")
        assert not path.exists()
    assert (path / "inner" / "file").read_text() == "a" and [path] == [*tmp_path.iterdir()]


@pytest.mark.parametrize("old", [None, "before"])
def test_a_killed_writer_leaves_no_half_file(tmp_path, old):
    path = tmp_path / "file"
    if old:
        path.write_text(old)
    done = python(
        f"""
        import os, signal
        from pathlib import Path
        from qtarget import files
        with files.whole(Path({str(path)!r})) as partial:
            partial.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    assert done.returncode == -signal.SIGKILL
    assert (path.read_text() if path.exists() else None) == old
    files.write(path, "whole")  # what the killed one left is in nobody's way
    assert path.read_text() == "whole" and [path] == [*tmp_path.iterdir()]


def test_a_file_that_grows_too_large(tmp_path):
    """A real refusal of the file system: a limit on the size of files."""
    path = tmp_path / "file"
    path.write_text("before")
    done = python(
        f"""
        import resource, signal
        from pathlib import Path
        import qtarget as qt
        from qtarget import files
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            files.write(Path({str(path)!r}), b"0" * 5000)
        except qt.StorageError as error:
            print(error)
        """
    )
    assert done.stdout.startswith(f"{path} cannot be written: File too large; make room or choose another folder"), done
    assert path.read_text() == "before" and [path] == [*tmp_path.iterdir()]


def test_a_full_disk(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(qt.StorageError, match=r"cannot be written: the disk is full; make room .* the same command"):
        files.write(tmp_path / "file", "a")
    with pytest.raises(OSError, match="No space"), files.whole(tmp_path / "file", report=False) as partial:
        partial.write_text("a")
    assert not [*tmp_path.iterdir()]


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(qt.StorageError, match="cannot be written"):
        files.write(tmp_path / "a" / "file", "a")


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "file.partial").mkdir()
    (tmp_path / "file.partial" / "thesis.tex").write_text("years of work")
    with pytest.raises(qt.StorageError, match=r"is first written as '.*file.partial', which is a folder; rename that"):
        files.write(tmp_path / "file", "a")
    assert (tmp_path / "file.partial" / "thesis.tex").read_text() == "years of work"


def test_another_fault_in_the_block_is_none_of_writing(tmp_path):
    with pytest.raises(FileNotFoundError), files.whole(tmp_path / "file") as partial:
        partial.write_text("a")
        (tmp_path / "elsewhere" / "nothing").read_text()


# -- journals ----------------------------------------------------------------------------------------------------


class Step(TypedDict):
    step: int


def test_a_journal_goes_on_after_its_whole_lines(tmp_path):
    file = tmp_path / "journal"
    files.Journal(file).add([{"step": 1}, {"step": 2, "text": "ü\ud800\n"}])
    with file.open("ab") as stream:
        stream.write(b'{"step": 3, "te')  # its writer was killed
    with pytest.raises(qt.StorageError, match=rf"^{file} is damaged in line 3; delete that line and start again \("):
        files.read_lines(file, Step, "start again")
    assert [r["step"] for r in files.read_lines(file, Step, "start again", half_allowed=True)] == [1, 2]
    files.Journal(file).add([{"step": 3}])
    records = files.read_lines(file, Step, "start again")
    assert [record["step"] for record in records] == [1, 2, 3] and records[1]["text"] == "ü\ud800\n"


@pytest.mark.parametrize(
    "text, what",
    [
        ("{}", "it has no step"),
        ('{"step": "a"}', "step is 'a', which should be a valid integer"),
        ("[1]", r"it is \[1\], which should be a valid dictionary"),
        ("[" * 100_000, "its values are nested too deeply"),
        ("{", "Expecting property name"),
    ],
)
def test_a_damaged_line(tmp_path, text, what):
    (tmp_path / "journal").write_text(f'{{"step": 1}}\n{text}\n')
    with pytest.raises(qt.StorageError, match=rf"damaged in line 2; .* \(.*{what}"):
        files.read_lines(tmp_path / "journal", Step, "start again")


def test_a_missing_journal(tmp_path):
    with pytest.raises(qt.StorageError, match=r"cannot be read \(No such file or directory\); start again"):
        files.read_lines(tmp_path / "journal", Step, "start again")


# -- reading what somebody else may have written -----------------------------------------------------------------


@with_config(**files.CLOSED)
class Part(TypedDict):
    name: str
    size: Annotated[int, Field(ge=0)]


@with_config(**files.CLOSED)
class Pool(TypedDict):
    pool: list[Part]


@with_config(**files.CLOSED)
class Whole(TypedDict):
    format: int
    kind: Literal["a", "b"]
    parts: list[Part]
    by_name: dict[str, Part]
    share: NotRequired[float | None]
    place: NotRequired[int | str]
    source: NotRequired[Part | Pool]


GOOD = {"format": 1, "kind": "a", "parts": [{"name": "x", "size": 0}], "by_name": {"y": {"name": "y", "size": 1}}}


@pytest.mark.parametrize("more", [{}, {"share": 1}, {"share": None}, {"place": 1}, {"place": "b"}])
def test_a_record_is_given_back_as_it_is(more):
    record = GOOD | more
    assert files.checked(record, Whole) is record


@pytest.mark.parametrize(
    "change, said",
    [
        ({"kind": ...}, "it has no kind"),
        ({"kind": "c"}, "kind is 'c', which should be 'a' or 'b'"),
        ({"colour": 3}, "colour is 3, and no such file has a field of that name"),
        ({"format": True}, "format is True, which should be a valid integer"),
        ({"format": 1.0}, "format is 1.0, which should be a valid integer"),
        ({"parts": {}}, "parts is {}, which should be a valid list"),
        ({"parts": [{"name": "x"}]}, "parts[0] has no size"),
        ({"parts": [{"name": "x", "size": -1}]}, "parts[0].size is -1, which should be greater than or equal to 0"),
        ({"by_name": {"y": {"name": 5, "size": 1}}}, "by_name.y.name is 5, which should be a valid string"),
        ({"share": "half"}, "share is 'half', which should be a valid number"),
        ({"place": []}, "place is [], which should be a valid integer"),
        ({"source": {"pool": [{"name": "x"}]}}, "source.pool[0] has no size"),
        ({"source": {"name": "x"}}, "source has no size"),
        ({"source": 3}, "source is 3, which should be a valid dictionary"),
        ({"kind": "c" * 999}, "kind is 'ccc"),
    ],
)
def test_a_field_that_is_not_as_it_must_be(change, said, tmp_path):
    record = {name: value for name, value in (GOOD | change).items() if value is not ...}
    (tmp_path / "file").write_text(json.dumps(record))
    with pytest.raises(qt.StorageError) as caught:
        files.load(tmp_path / "file", Whole, "make it again")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'file'} cannot be read ({said}") and message.endswith("; make it again")
    assert "\n" not in message and len(message) < 500


def test_another_format_is_named_before_its_fields(tmp_path):
    (tmp_path / "file").write_text('{"format": 2, "fields": "to come"}')
    with pytest.raises(qt.StorageError, match=r"file has format 2, and this version reads 1; make it again$"):
        files.load(tmp_path / "file", Whole, "make it again", format=1)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe{", b"[" * 100_000, b"[]", b"null", b"1e999"])
def test_what_is_no_record_is_refused_in_a_sentence(data, tmp_path):
    (tmp_path / "file").write_bytes(data)
    for format in (None, 1):
        with pytest.raises(qt.StorageError, match=r"; make it again$"):
            files.load(tmp_path / "file", Whole, "make it again", format)


# -- comparing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted, there, options, found",
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {}, []),
        ({"a": 1}, {"a": 2}, {}, [("a", 1, 2)]),
        ({"a": 1}, {"b": 1}, {}, [("a", 1, None), ("b", None, 1)]),
        ({"a": 1}, {"b": 1}, {"partly": True}, [("a", 1, None)]),
        ({"a": 1}, {"a": 2}, {"ignored": ["a"]}, []),
        ({"a": {"x": {"y": 1}}}, {"a": {"x": {"y": 2}, "z": 0}}, {}, [("a.x.y", 1, 2), ("a.z", None, 0)]),
        ({"a": {"x": 1}}, {"a": {"x": 2, "z": 0}}, {"partly": True}, [("a.x", 1, 2)]),
        ({"a": {"x": 1}}, {"a": {"x": 2}}, {"nested": False}, [("a", {"x": 1}, {"x": 2})]),
        ({"a": {"x": 1}}, {"a": "sft"}, {}, [("a", {"x": 1}, "sft")]),
        ({"m": {"name": "p", "weights": "w"}}, {"m": {"name": "q", "weights": "w"}}, {}, []),
        ({"m": {"name": "p", "weights": None}}, {"m": {"name": "q", "weights": None}}, {}, [("m.name", "p", "q")]),
    ],
)
def test_differences(wanted, there, options, found):
    assert [*files.differences(wanted, there, **options)] == found


# -- kinds of errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [qt.DataError, qt.StorageError, qt.NonFiniteLogits])
def test_who_catches_config_errors_catches_every_kind(kind):
    assert issubclass(kind, qt.ConfigError) and issubclass(kind, qt.QTargetError) and issubclass(kind, ValueError)


def test_a_step_is_added_and_row_and_position_stay():
    tokens = Tokens.__new__(Tokens)
    object.__setattr__(tokens, "index", torch.tensor([3, 7]))
    object.__setattr__(tokens, "shape", (2, 5))
    error = qt.NonFiniteLogits("logits", 1, tokens)
    error.during("step 4")
    assert (error.row, error.position) == (1, 2)
    assert str(error).startswith("step 4: logits are NaN or infinite at row 1, position 2; ")
    assert error.faults == [str(error)]


def test_a_trainer_adds_its_step(tmp_path):
    import tiny_models
    from quick_runs import quick_trainer

    model = tiny_models.llama()
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    made = quick_trainer(model, tmp_path, tiny_models.conversation_dataset(4))
    with pytest.raises(
        qt.NonFiniteLogits, match=r"^step 1: logits are NaN or infinite at row 0, position \d+; "
    ) as caught:
        made.train()
    assert caught.value.row == 0 and isinstance(caught.value.position, int)
