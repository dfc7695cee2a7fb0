"""Write the rows of a recipe as prompt and completion: what ``dataset_name`` of recipes/paper names.

    python recipes/paper/prepare.py --config recipes/paper/numina-67k_qwen2.5-math-1.5b.yaml

The sets on the hub nest their columns (``extra_info.question``), which no loader reads as prompt and completion. The
recipe says which columns they are (``dataset_source_columns``) and whether the prompt is still to be rendered
(``dataset_source_prompt: chat_template``: the model's template on one user turn, the assistant's turn opened). Both
are written as text, so that training ends the completion with the tokenizer's end token, once. All targets of a
setting share their rows. Beside them, DATASET_NAME.json says what they were made from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qtarget.cli import settings as reading
from qtarget.errors import ConfigError

NEEDED = ("dataset_source", "dataset_source_columns", "dataset_source_prompt")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="a recipe")
    parser.add_argument("--out", type=Path, help="folder to write to, in place of the recipe's dataset_name")
    args = parser.parse_args(argv)
    try:
        prepare(args.config, args.out)
    except ConfigError as error:
        print("\n".join(f"prepare: {fault}" for fault in error.faults), file=sys.stderr)
        return 2
    return 0


def prepare(config: str, out: Path | None = None) -> Path:
    """Write train.parquet of a recipe and what it was made from; returns the folder.

    Raises:
        ConfigError: the recipe does not say what is needed, a column is not there, or a row has no text in it.
    """
    settings = reading.read(["--config", config])
    missing = [f"{config} has no {name}; add it" for name in NEEDED if name not in settings.notes]
    if faults := settings.faults + missing:
        raise ConfigError(faults)
    notes, model = settings.notes, settings.values["model"]
    folder = Path(out or settings.values["script"]["dataset_name"])
    name, asked = notes["dataset_source"], notes.get("dataset_source_revision")
    commit = _commit(name, asked)
    rows = _load(name, commit or asked, notes.get("dataset_source_split", "train"))
    tokenizer = _tokenizer(model["model_name_or_path"], model.get("model_revision"))
    columns = notes["dataset_source_columns"]
    render = _renderer(tokenizer, notes["dataset_source_prompt"])
    twice = 0

    def convert(row: Mapping[str, Any], number: int) -> dict[str, str]:
        prompt, completion = (_text(row, columns[side], number) for side in ("prompt", "completion"))
        return {"prompt": render(prompt), "completion": completion}

    begin = _added_at_the_start(tokenizer)
    if begin:
        twice = sum(_text(row, columns["prompt"], number).startswith(begin) for number, row in enumerate(rows))
    made = rows.map(convert, with_indices=True, remove_columns=rows.column_names)
    folder.mkdir(parents=True, exist_ok=True)
    made.to_parquet(folder / "train.parquet")
    record = {
        **{key: value for key, value in notes.items() if key.startswith("dataset_source")},
        "commit": commit,
        "model": model["model_name_or_path"],
        "rows": len(made),
        "prompts_that_began_with_the_begin_token": twice,
        "sha256": hashlib.sha256((folder / "train.parquet").read_bytes()).hexdigest(),
    }
    record_file = folder.with_name(folder.name + ".json")  # beside it: a json file inside would be taken for rows
    record_file.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{len(made)} rows of {name} at {commit or asked or 'its default'} in {folder}")
    if len(made) != notes.get("expected_rows", len(made)):
        print(f"the recipe expects {notes['expected_rows']} rows; qtarget train --dry_run says what that changes")
    if twice:
        print(f"{twice} prompts began with {begin}, which the tokenizer adds itself; it was taken off")
    return folder


def _text(row: Mapping[str, Any], path: str, number: int) -> str:
    """What a dotted path leads to, names into mappings and numbers into lists."""
    value: Any = row
    for part in path.split("."):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, ValueError, TypeError):
            has = ", ".join(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            raise ConfigError(
                f"dataset_source_columns names {path!r}, but row {number} has no {part!r} there (it has {has}); name "
                "the right column in the recipe"
            ) from None
    if not isinstance(value, str) or not value:
        raise ConfigError(f"row {number} has {value!r} at {path!r}; a prompt or completion is text that is not empty")
    return value


def _renderer(tokenizer: Any, how: str) -> Callable[[str], str]:
    """From a column's text to the prompt, without a begin token that the tokenizer adds itself."""
    begin = _added_at_the_start(tokenizer)

    def render(text: str) -> str:
        if how == "chat_template":
            turn = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        while begin and text.startswith(begin):
            text = text.removeprefix(begin)
        return text

    return render


def _added_at_the_start(tokenizer: Any) -> str | None:
    begin = tokenizer.bos_token
    return begin if begin and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else None


def _tokenizer(name: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision or "main")
    except (OSError, ValueError) as error:
        told = " ".join(str(error).split())
        raise ConfigError(f"model_name_or_path is {name!r}, whose tokenizer cannot be loaded: {told}") from error


def _load(name: str, revision: str | None, split: str) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, split=split, revision=None if Path(name).exists() else revision)
    except Exception as error:  # datasets raises many kinds, all of them about what was asked for
        told = " ".join(str(error).split())
        raise ConfigError(f"dataset_source is {name!r}, which cannot be loaded: {told}") from error


def _commit(name: str, revision: str | None) -> str | None:
    """The commit a branch stands at now; None for a folder and where the hub does not answer."""
    if Path(name).exists():
        return None
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, revision=revision).sha
    except Exception:  # no network, no permission: the load says so
        return None


if __name__ == "__main__":
    sys.exit(main())
