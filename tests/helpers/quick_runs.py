"""Trainer runs that last a fraction of a second, and the same steps by plain autograd on full logits.

``change_by_autograd`` takes nothing from qtarget or TRL: rows are tokenised here and forwarded one at a time without
padding through ``model(...).logits``, and the objective is a function of logits and labels. So agreement with
a trainer, which pads, splits into micro-batches and never forms logits, means something.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

import tiny_models
from qtarget import QTargetConfig, QTargetTrainer

Weights = dict[str, Tensor]
# ‖difference‖ / ‖change‖. In float64 runs agree to 1e-14; a wrong denominator or a lost column shows at 1e-2.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


# -- runs ------------------------------------------------------------------------------------------


def quick_settings(folder: Path, **settings: Any) -> dict[str, Any]:
    """Settings under which a step of SGD shows the gradient: four rows, as 2 x 2, nothing clipped."""
    return {
        "output_dir": str(folder),
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    } | settings


def quick_config(folder: Path, **settings: Any) -> QTargetConfig:
    return QTargetConfig(**({"teacher_check_rows": 0} | quick_settings(folder, **settings)))


def quick_trainer(
    model: nn.Module | str,
    folder: Path,
    data: Dataset | None = None,
    *,
    kind: type[QTargetTrainer] = QTargetTrainer,
    eval_dataset: Any = None,
    teacher_model: nn.Module | None = None,
    reference_model: nn.Module | None = None,
    peft_config: Any = None,
    compute_metrics: Callable | None = None,
    callbacks: list | None = None,
    **settings: Any,
) -> QTargetTrainer:
    """A trainer on four conversations unless told otherwise; ``settings`` are those of QTargetConfig."""
    return kind(
        model,
        quick_config(folder, **settings),
        train_dataset=tiny_models.conversation_dataset(4) if data is None else data,
        eval_dataset=eval_dataset,
        processing_class=tiny_models.tokenizer(),
        teacher_model=teacher_model,
        reference_model=reference_model,
        peft_config=peft_config,
        compute_metrics=compute_metrics,
        callbacks=callbacks,
    )


def train_quickly(model: nn.Module, folder: Path, data: Dataset | None = None, **more: Any) -> QTargetTrainer:
    made = quick_trainer(model, folder, data, **more)
    made.train()
    return made


def logged_values(made: QTargetTrainer, name: str) -> list[float]:
    """Every value logged under a name, in order."""
    return [entry[name] for entry in made.state.log_history if name in entry]


def single_target(args: QTargetConfig):
    """The single target these settings train, once its schedules have ended."""
    return args.resolve_objective().targets[None].final


# -- the same by hand ------------------------------------------------------------------------------


def tokenised_rows(data: Dataset) -> list[dict[str, Any]]:
    """input_ids and labels of each row, tokenised here; other columns are kept."""
    return [_tokenised_row(row) for row in data]


def _tokenised_row(row: dict[str, Any]) -> dict[str, Any]:
    if "input_ids" in row:
        return {"labels": row["input_ids"], **row}
    tokenizer = tiny_models.tokenizer()
    if "text" in row:
        ids = tokenizer(row["text"] + tokenizer.eos_token)["input_ids"]
        return {**row, "input_ids": ids, "labels": ids}
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]
    return {**row, "input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}


def tokenised_dataset(data: Dataset, **columns: Callable[[int, dict], Any]) -> Dataset:
    """The same rows as input_ids and labels, with columns made from (number of the row, row)."""
    made = []
    for number, row in enumerate(tokenised_rows(data)):
        row = {"input_ids": row["input_ids"], "labels": row["labels"]}
        made.append(row | {name: make(number, row) for name, make in columns.items()})
    return Dataset.from_list(made)


def supervised_positions(row: dict[str, Any]) -> Tensor:
    """Positions, after the shift, whose next token is trained."""
    return (torch.tensor(row["labels"])[1:] != -100).nonzero().squeeze(1)


def count_supervised(data: Iterable[dict[str, Any]]) -> int:
    """Supervised labels, after the shift."""
    return sum(len(supervised_positions(row)) for row in data)


def logits_of(model: nn.Module, row: dict[str, Any]) -> Tensor:
    """[n, vocab] at the supervised positions."""
    return model(input_ids=torch.tensor([row["input_ids"]])).logits[0, supervised_positions(row)]


def labels_of(row: dict[str, Any]) -> Tensor:
    return torch.tensor(row["labels"])[supervised_positions(row) + 1]


def column_of(row: dict[str, Any], name: str) -> Tensor:
    """[n] of a column aligned with labels before the shift, or a number for the whole row."""
    values = torch.as_tensor(row[name], dtype=torch.float32)
    return values.expand(len(row["labels"]))[supervised_positions(row) + 1]


COLUMNS = ("weight", "critical", "old_logps")


def per_row_losses(
    model: nn.Module,
    data: list[dict[str, Any]],
    loss: Callable[..., Tensor],
    teacher: nn.Module | None = None,
    reference: Callable[[dict[str, Any]], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Per-token losses of each row: ``loss(logits, labels, **what the row and the other models give)``."""
    for row in data:
        given: dict[str, Any] = {name: column_of(row, name) for name in COLUMNS if name in row}
        given["vocab_size"] = len(tiny_models.tokenizer())
        with torch.no_grad():
            if teacher is not None:
                given["teacher_logits"] = logits_of(teacher, row)
            if reference is not None:
                given["reference_logits"] = reference(row)
        yield loss(logits_of(model, row), labels_of(row), **given)


def change_by_autograd(
    model: nn.Module,
    data: list[dict[str, Any]],
    loss: Callable[..., Tensor],
    *,
    lr: float = 1.0,
    steps: int = 1,
    denominator: float | None = None,
    teacher: nn.Module | None = None,
    reference: Callable[[dict[str, Any]], Tensor] | None = None,
) -> Weights:
    """How far plain SGD on all rows moves the weights: Σ loss / (supervised labels of all rows)."""
    model = model.eval()
    before = copied_weights(model)
    for _ in range(steps):
        total = torch.cat([*per_row_losses(model, data, loss, teacher, reference)]).sum()
        model.zero_grad()
        (total / (count_supervised(data) if denominator is None else denominator)).backward()
        with torch.no_grad():
            for parameter in trainable_parameters(model).values():
                parameter -= lr * parameter.grad
    return weight_change(before, model)


def as_it_is_now(model: nn.Module) -> Callable[[dict[str, Any]], Tensor]:
    """A reference for ``change_by_autograd``: the model, whatever it learns later."""
    twin = copy.deepcopy(model).eval()
    return lambda row: logits_of(twin, row)


# -- comparing -------------------------------------------------------------------------------------


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def copied_weights(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def weight_change(before: Weights, model: nn.Module) -> Weights:
    """By how much each trainable weight has changed."""
    return {name: p.detach() - before[name] for name, p in trainable_parameters(model).items()}


def change_by_training(model: nn.Module, folder: Path, data: Dataset | None = None, **more: Any) -> Weights:
    """By how much a trainer moves the weights."""
    made = quick_trainer(model, folder, data, **more)
    before = copied_weights(made.model)
    made.train()
    return weight_change(before, made.model)


def largest_difference(got: Weights, wanted: Weights) -> tuple[float, str]:
    """The largest ‖got − wanted‖ / ‖wanted‖ of any weight, and its name."""
    assert got.keys() == wanted.keys()
    errors = {name: float((got[name] - w).norm() / w.norm().clamp(min=1e-30)) for name, w in wanted.items()}
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def assert_same_change(got: Weights, wanted: Weights, tolerance: float | None = None) -> None:
    assert all(float(w.norm()) > 0 for w in wanted.values()), "a weight did not move: this would compare zeros"
    error, name = largest_difference(got, wanted)
    allowed = TOLERANCE[wanted[name].dtype] if tolerance is None else tolerance
    assert error <= allowed, f"{name} moved otherwise than by autograd on full logits: relative error {error:.2e}"
