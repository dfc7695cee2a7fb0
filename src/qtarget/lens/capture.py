"""Records one forward pass of student, teacher and reference on a run's own rows.

Rows come from the trainer's own preparation (template, mask, cutting; packing off), and hidden states from its own
wrapped forward. Logits exist for a chunk of supervised tokens at a time and never for a batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qtarget import __version__, files
from qtarget.data.text import text_of
from qtarget.errors import ConfigError
from qtarget.lens.page_targets import manifest_targets
from qtarget.lens.record import FILES, OTHERS, SIGNALS, Writer
from qtarget.losses import Head, TopK
from qtarget.losses.log_probs import log_probs, refuse_nan
from qtarget.models.frozen import evaluation_mode
from qtarget.teachers.fingerprints import template_hash, tokenizer_hash
from qtarget.teachers.settings import teacher_named_by

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

# Supervised tokens whose logits are formed at a time; [256, vocabulary] float32 is 50 MB at 49,152.
_CHUNK = 256


def check(trainer: QTargetTrainer, rows: int, top_k: int, folder: str | Path) -> None:
    """Raise ConfigError where these settings cannot be captured."""
    faults = []
    vocab = trainer.vocab_size
    if rows < 1:
        faults.append(f"rows is {rows}; capture one row or more")
    if not 1 <= top_k <= vocab:
        faults.append(f"top_k is {top_k}; use a number from 1 to the vocabulary's {vocab} tokens")
    faults += folder_faults(Path(folder))
    longest = getattr(trainer.student.base.config.get_text_config(), "max_position_embeddings", None)
    for number, row in enumerate(_rows(trainer, rows) if not faults else ()):
        if longest and len(row["input_ids"]) > longest:
            faults.append(
                f"row {number} has {len(row['input_ids'])} tokens, more than the model's {longest} positions; set "
                f"max_length to {longest} or less"
            )
    if faults:
        raise ConfigError(faults)


def folder_faults(folder: Path) -> list[str]:
    """Why a capture may not have a folder: nothing of anybody else's is overwritten or deleted."""
    partial, written = files.partial_of(folder), {*FILES, "manifest.json"}
    if (folder / "manifest.json").exists():
        what = "which holds a capture; name another folder, or delete that one"
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "which is not an empty folder; name another folder"
    elif partial.exists() and (not partial.is_dir() or any(file.name not in written for file in partial.iterdir())):
        what = f"and {str(partial)!r}, where it is made, holds other files; name another folder"
    else:
        return []
    return [f"output is {str(folder)!r}, {what}"]


def estimate(trainer: QTargetTrainer, rows: int, top_k: int) -> tuple[int, int, float]:
    """(rows, supervised tokens, megabytes on disk at most)."""
    chosen = [*_rows(trainer, rows)]
    tokens = sum(sum(label != -100 for label in row["labels"][1:]) for row in chosen)
    others = len(_models(trainer))
    ids = top_k * (1 + others) + 1
    return len(chosen), tokens, tokens * (ids * 4 * (2 + others) + 40) / 2**20


def capture(
    trainer: QTargetTrainer,
    folder: str | Path,
    *,
    rows: int = 64,
    top_k: int = 20,
    about: dict[str, Any] | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> Path:
    """Write a record of the trainer's first rows.

    Args:
        trainer: a QTargetTrainer with packing off. folder: where the record goes; a capture that is there is kept.
        rows: how many of its training rows. top_k: tokens kept of each model.
        about: further lines of the manifest. progress: called with the number of rows done.

    Raises:
        ConfigError: see ``check``. DataError: a model gives NaN or infinite logits.
    """
    check(trainer, rows, top_k, folder)
    folder = Path(folder)
    files.remove(files.partial_of(folder))  # a capture that was interrupted is no record
    with files.whole(folder) as partial:
        _write(trainer, partial, rows, top_k, about or {}, progress)
    return folder


@torch.no_grad()
def _write(
    trainer: QTargetTrainer,
    folder: Path,
    rows: int,
    top_k: int,
    about: dict[str, Any],
    progress: Callable[[int], object],
) -> None:
    aux = trainer.auxiliary(_models(trainer))
    names = [name for name in OTHERS if aux.has(name)]
    have = set(trainer.rows.columns.carried) & set(trainer.train_dataset.column_names)
    present = [name for name in SIGNALS if name in have]
    writer = Writer(folder, names, present)
    size = trainer.args.per_device_eval_batch_size
    done, student, chosen = 0, trainer.student, _rows(trainer, rows)
    with evaluation_mode(student.model):
        while batch := [*itertools.islice(chosen, size)]:
            asked = trainer.batch(batch)
            heads = aux.ask(student, asked, {"student", *names})
            columns = {name: asked.columns[name] for name in present}
            who = {name: student.name if name == "student" else _named(trainer, name) for name in heads}
            tokens = _tokens(heads, asked.labels, columns, top_k, trainer.vocab_size, done, who)
            writer.add([_row(done + i, [*row["input_ids"]], asked.labels[i]) for i, row in enumerate(batch)], tokens)
            done += len(batch)
            progress(done)
    tokenizer = trainer.tokenizer
    manifest = {
        "program": f"qtarget {__version__}",
        "model": student.name,
        **{role: _named(trainer, role) if role in names else None for role in OTHERS},
        **manifest_targets(trainer.objective),
        "vocab_size": trainer.vocab_size,
        "top_k": top_k,
        "max_length": trainer.args.max_length,
        "tokenizer": tokenizer_hash(tokenizer),
        "chat_template": template_hash(tokenizer),
        "eos_token_ids": student.stop_tokens(tokenizer),
        **about,
    }
    writer.close(manifest, lambda index: text_of(tokenizer, index), tokenizer.all_special_ids)


def _models(trainer: QTargetTrainer) -> frozenset[str]:
    """Of teacher and reference, what the run's target needs or its settings name."""
    named = {name for name in OTHERS if getattr(trainer.args, f"{name}_model_name_or_path")}
    return frozenset((trainer.objective.requires | named) & set(OTHERS))


def _named(trainer: QTargetTrainer, role: str) -> str:
    own = teacher_named_by(trainer.args, trainer.rows.join) if role == "teacher" else None
    name = getattr(trainer.args, f"{role}_model_name_or_path") or f"the {role} of the run"
    return own or f"{name} (revision {getattr(trainer.args, f'{role}_model_revision') or 'default'})"


def _rows(trainer: QTargetTrainer, rows: int) -> Iterator[dict[str, Any]]:
    return itertools.islice(trainer.train_dataset, rows)


def _row(number: int, ids: list[int], labels: Tensor) -> dict[str, Any]:
    supervised = [i > 0 and int(label) != -100 for i, label in enumerate(labels[: len(ids)])]
    return {"row": number, "input_ids": ids, "supervised": supervised}


def _tokens(
    heads: dict[str, Head | TopK],
    labels: Tensor,
    columns: dict[str, Tensor],
    top_k: int,
    vocab: int,
    first_row: int,
    who: dict[str, str],
) -> dict[str, list]:
    """The columns of tokens.parquet for a batch. ``who``: what to call each model."""
    shifted = labels[:, 1:]
    row, place = (shifted != -100).nonzero(as_tuple=True)
    tokens: dict[str, list] = {
        "row": (row + first_row).tolist(),
        "position": (place + 1).tolist(),
        "label": shifted[row, place].tolist(),
        **{name: column[:, 1:][row, place].tolist() for name, column in columns.items()},
    }
    for begin in range(0, max(len(row), 1), _CHUNK):  # once also for masked rows, whose columns are there all the same
        here = slice(begin, begin + _CHUNK)
        at = row[here], place[here]
        log_p = {"student": log_probs(heads["student"], at, vocab)}
        for name, head in heads.items():
            log_p[name] = log_p[name] if name in log_p else log_probs(head, at, vocab, log_p["student"])
            refuse_nan(f"{name} {who[name]}", log_p[name], at, range(first_row, first_row + len(labels)))
        for name, values in _chunk(log_p, shifted[at], top_k).items():
            tokens.setdefault(name, []).extend(values)
    return tokens


def _chunk(log_p: dict[str, Tensor], labels: Tensor, top_k: int) -> dict[str, list]:
    student = log_p["student"]
    at_label = student.gather(1, labels[:, None])
    top = {name: values.topk(min(top_k, values.shape[1]), dim=-1) for name, values in log_p.items()}
    union = torch.cat([labels[:, None], *(found.indices for found in top.values())], 1)
    ids = [sorted(set(line)) for line in union.tolist()]
    columns: dict[str, list] = {
        "log_p_y": at_label.squeeze(1).tolist(),
        "rank": (student > at_label).sum(1).tolist(),
        "entropy": (-(student.exp() * student.clamp(min=-1e4)).sum(1)).tolist(),
        "ids": ids,
    }
    for name, values in log_p.items():
        outside = values.exp().scatter(1, union, 0.0)
        columns[name] = [values[line, listed].tolist() for line, listed in enumerate(ids)]
        columns[f"{name}_tail"] = outside.sum(1, dtype=torch.float64).log().clamp(min=-1e4).tolist()
        columns[f"{name}_floor"] = top[name].values[:, -1].tolist()
        if name != "student":
            columns[f"{name}_log_p_y"] = values.gather(1, labels[:, None]).squeeze(1).tolist()
    return columns


# -- what tells one capture from another -------------------------------------------------------------------------


def differences(manifest: dict[str, Any], model: str, tokenizer: Any) -> list[str]:
    """Sentences on how a capture differs from the model and tokenizer a config names."""
    pairs = {
        "model": (manifest.get("model"), model),
        "tokenizer": (manifest.get("tokenizer"), tokenizer_hash(tokenizer)),
        "chat_template": (manifest.get("chat_template"), template_hash(tokenizer)),
    }
    return [
        f"the capture was made with {name} {was!r}, but the config names {now!r}; capture again, or leave --config out"
        for name, (was, now) in pairs.items()
        if was != now
    ]
