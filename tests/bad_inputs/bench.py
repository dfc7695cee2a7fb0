"""What every case of the corpus is run on: a small real world, and the promises that hold whatever the case is.

A case is refused with its sentence, or handled as its own check says. Either way: no traceback, no hang, nothing that was
on the disk before is changed, and a refusal leaves nothing behind and comes before a model has read a token.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

import teacher_caches
import tiny_models
from hangs import SECONDS, within
from qtarget.cli.__main__ import main
from qtarget.errors import ConfigError

PROBLEMS = [
    {"id": f"p{i}", "prompt": f"{i} + {i} = ?", "options": [str(i), str(2 * i), str(3 * i + 1)], "answer": "B"}
    for i in range(1, 4)
]


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        id: its name, unique in the corpus. wrong: what is wrong, in a few words.
        do: makes the input in the bench and hands it to qtarget: words for the command line are returned and run; code
            that calls functions raises ConfigError or returns None.
        says: what the sentences must hold: the field, its value, the fix. Empty: the input is handled, not refused.
        reads: the fault shows only when a model has read the rows, so that a forward pass may come before the sentence.
            Of what is handled: it goes on with a run, whose folder it may write to.
    """

    id: str
    wrong: str
    do: Callable[[Bench], Sequence[object] | None]
    says: tuple[str, ...] = ()
    reads: bool = False


@dataclass
class Answer:
    """What qtarget said. status: None where a function was called and returned."""

    status: int | None
    out: str
    err: str

    @property
    def sentences(self) -> list[str]:
        return [line for line in self.err.splitlines() if re.match(r"qtarget \S+: ", line)]


class Bench:
    """A case's own folder beside the world, which no case may change."""

    def __init__(self, world: Path, folder: Path):
        self.world, self.folder = world, folder
        self.folder.mkdir(parents=True, exist_ok=True)

    def copy(self, name: str) -> Path:
        """One of the world's folders, to be damaged."""
        return Path(shutil.copytree(self.world / name, self.folder / name))

    def rows(self, *rows: Any, name: str = "rows") -> Path:
        """A dataset of these rows."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def train(self, *words: object, **settings: Any) -> list[object]:
        """``qtarget train`` with the world's config, these settings put over it."""
        return ["train", "--config", self.config(**settings), *words]

    def config(self, **settings: Any) -> Path:
        own = yaml.safe_load((self.world / "config.yaml").read_text())
        own |= {"output_dir": str(self.folder / "run"), **SHORT, **settings}
        own = {name: str(value) if isinstance(value, Path) else value for name, value in own.items()}
        return self.file("config.yaml", yaml.safe_dump(own))


def setting(id: str, wrong: str, says: str | tuple[str, ...], **values: Any) -> Case:
    """A config that trains, but for these values."""
    return Case(id, wrong, lambda bench: bench.train(**values), (says,) if isinstance(says, str) else says)


SHORT = {
    "target": "sft",
    "teacher_model_name_or_path": None,
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "save_strategy": "no",
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "dataset_test_split": "none",
}


# -- the world ---------------------------------------------------------------------------------------------------


def make_world(root: Path) -> Path:
    """Models, rows, a cache, a capture, results, signals and a checkpoint, all made by qtarget itself."""
    teacher_caches.write_world(root)
    stranger = tiny_models.tokenizer(extra="zebra quagga ")
    tiny_models.llama(3).save_pretrained(root / "stranger")
    stranger.save_pretrained(root / "stranger")
    broken = tiny_models.llama()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    broken.save_pretrained(root / "broken")
    tiny_models.tokenizer().save_pretrained(root / "broken")
    (root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    teacher_caches.write_rows(root / "few", teacher_caches.rows_with_hints(6))
    config = ["--config", root / "config.yaml"]
    few = [*config, "--dataset_name", root / "few"]
    spoken(["cache", "build", *few, "-o", root / "cache", "--k", 8, "--shard_tokens", 60])
    spoken(["lens", "capture", *few, "--rows", 3, "--top_k", 5, "-o", root / "capture"])
    spoken(
        ["data", "weights", *few, "--fixed", "--reference_model_name_or_path", root / "other", "-o", root / "signal"]
    )
    ask = ["eval", "--model", root / "model", "--tasks", root / "sums.jsonl", "--verifier", "choice", "--n", 2]
    spoken([*ask, "--max_new_tokens", 4, "--verifier_processes", 1, "-o", root / "results"])
    run = ["--target", "psft", "--teacher_model_name_or_path", "none", "--dataset_test_split", "none", "--max_steps", 2]
    run += ["--save_steps", 1, "--per_device_train_batch_size", 2, "--lens_every", 1, "--output_dir", root / "stopped"]
    spoken(["train", *few, *run])
    shutil.rmtree(root / "stopped" / "checkpoint-2")
    return root


def spoken(words: Sequence[object]) -> Answer:
    """A command that must succeed."""
    answer = run_words(words)
    assert answer.status == 0, answer.err
    return answer


def run_words(words: Sequence[object]) -> Answer:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(word) for word in words])
        except Exception:
            status = 1
            traceback.print_exc()
    return Answer(status, out.getvalue(), err.getvalue())


# -- the promises ------------------------------------------------------------------------------------------------


def digest(*folders: Path) -> dict[str, str]:
    """Every file with its contents, every folder."""
    return {
        str(path): hashlib.blake2b(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for folder in folders
        for path in sorted(folder.rglob("*"))
    }


@contextlib.contextmanager
def forwards() -> Iterator[list[int]]:
    """How many tokens models have read meanwhile."""
    seen: list[int] = []

    def note(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if getattr(module, "config", None) is not None and isinstance(ids, torch.Tensor) and ids.device.type != "meta":
            seen.append(ids.numel())

    from transformers import LlamaForCausalLM

    before = LlamaForCausalLM.__init__

    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **kwargs)
        self.register_forward_pre_hook(note, with_kwargs=True)

    LlamaForCausalLM.__init__ = made
    try:
        yield seen
    finally:
        LlamaForCausalLM.__init__ = before


def answer_to(case: Case, bench: Bench) -> tuple[Answer, dict[str, str], list[int]]:
    """(what was said, the files as they were before qtarget saw the input, tokens that models read)."""
    out, err = io.StringIO(), io.StringIO()
    with within(SECONDS), forwards() as seen:
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                words = case.do(bench)
        except ConfigError as error:
            faults = "".join(f"qtarget call: {fault}\n" for fault in error.faults)
            return Answer(2, "", faults), digest(bench.world, bench.folder), seen
        before = digest(bench.world, bench.folder)
        answer = Answer(None, out.getvalue(), err.getvalue()) if words is None else run_words(words)
    return answer, before, seen


def check(case: Case, bench: Bench) -> None:
    """Every promise, for one case."""
    world = digest(bench.world)
    answer, before, seen = answer_to(case, bench)
    assert "Traceback" not in answer.err + answer.out, answer.err[-3000:]
    after = digest(bench.world, bench.folder)
    own = str(bench.folder / "run")
    kept = {name: value for name, value in before.items() if case.says or not case.reads or not name.startswith(own)}
    changed = [name for name, value in kept.items() if after.get(name) != value]
    assert not changed, f"{changed} changed"
    assert world == digest(bench.world), "the world changed"
    assert not any(Path(name).name.endswith("ran") for name in after), "code of a file was run"
    assert "this" not in sys.modules, "a module that a file names was imported"
    if case.says:
        assert answer.status == 2, f"status {answer.status}: {answer.out[-1500:]}{answer.err[-1500:]}"
        said = "\n".join(answer.sentences)
        for part in case.says:
            assert part in said, f"{part!r} is not in:\n{said}"
        assert len(answer.sentences) <= 3, f"{len(answer.sentences)} sentences:\n{said}"
        assert all(len(sentence) < 700 for sentence in answer.sentences), f"a sentence of a page:\n{said[:2000]}"
        assert case.reads or not seen, f"{len(seen)} forward passes before:\n{said}"
        # Transformers makes the empty folder of a run before its rows are read.
        new = [
            name for name in after if name not in before and name != own and not (case.reads and name.startswith(own))
        ]
        assert not new, f"{new} was written before:\n{said}"
    else:
        assert answer.status in (None, 0), f"status {answer.status}: {answer.err[-3000:]}"
    for name in after:
        if name.endswith(".safetensors") and name not in before and "run" in Path(name).parts:
            assert all(torch.isfinite(tensor).all() for tensor in load_file(name).values()), f"{name} holds NaN"
