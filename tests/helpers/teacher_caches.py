"""A world of small models and rows on disk, and caches built in it by the command line's own code path."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import tiny_models
from qtarget.cli.__main__ import main

VOCAB = len(tiny_models.tokenizer())


def wider_teacher(dtype: torch.dtype = torch.float32):
    return tiny_models.trained_model(seed=7, width=48, tied=False).to(dtype).eval()


def write_world(root: Path) -> Path:
    """Student, teacher, another teacher, rows and a config."""
    for name, model in (
        ("model", tiny_models.trained_model()),
        ("teacher", wider_teacher()),
        ("other", tiny_models.trained_model(seed=9, width=48)),
    ):
        model.save_pretrained(root / name)
        tiny_models.tokenizer().save_pretrained(root / name)
    write_rows(root / "data", rows_with_hints())
    (root / "config.yaml").write_text(
        f"model_name_or_path: {root}/model\nteacher_model_name_or_path: {root}/teacher\ndataset_name: {root}/data\n"
        f"target: target-sft\noutput_dir: {root}/run\nmax_length: 120\nreport_to: none\nuse_cpu: true\n"
    )
    return root


def rows_with_hints(count: int = 24) -> list[dict]:
    """Rows with a hint for a teacher; three of 24 are the same as another."""
    return [{**row, "hint": f"hint {i}"} for i, row in enumerate(tiny_models.conversation_dataset(count).to_list())]


def write_rows(folder: Path, made: list[dict], evaluated: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", made), ("test", made[:evaluated])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def build_cache(world: Path, folder: Path, *more: object) -> Path:
    """A cache in ``folder``."""
    words = ["cache", "build", "--config", world / "config.yaml", "-o", folder, *more]
    assert main([str(word) for word in words]) == 0
    return folder


def refusal_of(capsys, *words: object) -> str:
    """What a refused command says."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("qtarget ")]
    assert lines and "Traceback" not in said, said
    return "\n".join(lines)


def file_contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}
