"""Short hashes that tell tokenizers, chat templates and weights apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import with_config
from typing_extensions import TypedDict

from qtarget import files
from qtarget.models.loading import find_adapter

# Weight files are sampled: this many pieces of that many bytes, evenly over each file, its first and last included.
_PIECES, _PIECE_BYTES = 64, 64 * 1024
# Of an adapter's settings, those that leave its numbers alone.
_SAYS_NOTHING = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")
_NO_WEIGHTS = {"training_args.bin"}  # Transformers' trainer leaves it beside them, with the run's paths in it


@with_config(**files.CLOSED)
class Model(TypedDict):
    """A model in a manifest: by its name and, where they are known, what tells its weights from others."""

    name: str
    revision: str | None
    weights: str | None


def named(name: str, revision: str | None) -> Model:
    return {"name": name, "revision": revision, "weights": weights_hash(name, revision)}


def tokenizer_hash(tokenizer: Any) -> str:
    """Of every token and its id."""
    return _short(_by_id(tokenizer))


def shorter_hashes(tokenizer: Any) -> Iterator[tuple[str, int]]:
    """(hash, size of the vocabulary) of the tokenizer without its last added token, without its last two, ..."""
    tokens, added = _by_id(tokenizer), tokenizer.added_tokens_decoder
    while len(tokens) > 1 and tokens[-1][1] in added:
        tokens.pop()
        yield _short(tokens), tokens[-1][1] + 1


def _by_id(tokenizer: Any) -> list[tuple[str, int]]:
    return sorted(tokenizer.get_vocab().items(), key=lambda token: token[1])


def template_hash(tokenizer: Any) -> str | None:
    """Of the chat template; None where there is none."""
    return None if tokenizer.chat_template is None else _short(tokenizer.chat_template)


def weights_hash(name_or_path: str, revision: str | None = None) -> str | None:
    """What tells a model's weights from others: of samples of a folder's weight files, or the hub's commit.

    A folder's files are read in 64 pieces each, evenly spread, and by their sizes: training moves every weight, so other
    weights are told apart without reading hundreds of gigabytes. An adapter's is of its weights, its settings and its
    base. None where they are not known.
    """
    try:
        found = find_adapter(name_or_path, revision)
    except ValueError:  # whoever loads it says so
        return None
    if found is None or found.base == name_or_path:
        return _own_weights(name_or_path, revision)
    parts = _own_weights(name_or_path, revision), weights_hash(found.base, found.base_revision)
    told = {name: value for name, value in found.settings.items() if name not in _SAYS_NOTHING}
    return None if None in parts else _short([*parts, sorted(told.items())])


def _own_weights(name_or_path: str, revision: str | None) -> str | None:
    folder = Path(name_or_path)
    if not folder.is_dir():
        return _commit(name_or_path, revision)
    found = (file for pattern in _WEIGHT_FILES for file in folder.glob(pattern))
    weight_files = sorted(file for file in found if file.name not in _NO_WEIGHTS)
    if not weight_files:
        return None
    digest = hashlib.sha256()
    for file in weight_files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for piece in range(_PIECES):
                stream.seek(max(0, size - _PIECE_BYTES) * piece // (_PIECES - 1))
                digest.update(stream.read(_PIECE_BYTES))
    return digest.hexdigest()[:16]


def _commit(name: str, revision: str | None) -> str | None:
    from transformers import AutoConfig
    from transformers.utils.hub import extract_commit_hash

    try:
        if (found := find_adapter(name, revision)) is not None:
            commit = extract_commit_hash(str(found.file("adapter_config.json")), None)
        else:
            commit = AutoConfig.from_pretrained(name, revision=revision or "main")._commit_hash
    except (OSError, ValueError):
        return None
    return None if commit is None else f"commit {commit[:12]}"


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
