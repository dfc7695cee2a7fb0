"""What a run prints at its end: held-out figures, the picture, the next command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

# (statistic of evaluation, what it is called in the table)
_ROWS = [
    ("nll", "nll of the label (nats)"),
    ("loss", "loss of the target"),
    ("accuracy", "label is the most likely token"),
    ("trust", "trust in the label, mean a"),
    ("residual_mass", "weight of the residual, mean b"),
    ("update", "update, mean ½‖p − Q‖₁"),
    ("kl_q", "KL(Q ‖ student)"),
    ("entropy", "student's entropy (nats)"),
    ("teacher_kl", "drift: KL(teacher ‖ student)"),
]

_DRIFT_ROWS = 64  # how far student and teacher are apart is read off that many held-out rows


def evaluate(trainer: QTargetTrainer) -> dict[str, float]:
    """Held-out figures without their prefix; with a teacher also how far the student is from it."""
    metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    if trainer.evaluates_teacher:
        rows = trainer.eval_dataset
        few = rows.select(range(min(len(rows), _DRIFT_ROWS))) if hasattr(rows, "select") else rows
        with trainer.evaluating("kd"):
            drift = trainer.evaluate(few, metric_key_prefix="eval_teacher")
        metrics["teacher_kl"] = drift["eval_teacher_kl_q"]
    return metrics


def at_start(trainer: QTargetTrainer) -> dict[str, float]:
    """Held-out figures before training; under FSDP and DeepSpeed they are filled in when training begins.

    Such an engine cuts the student in pieces then, and evaluating earlier would cut it twice. A run that goes on from a
    checkpoint has none there: the weights it started from are gone.
    """
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return evaluate(trainer)
    from transformers import TrainerCallback

    figures: dict[str, float] = {}

    class AtStart(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                figures.update(evaluate(trainer))

    trainer.add_callback(AtStart())
    return figures


def show(trainer: QTargetTrainer, before: dict[str, float], after: dict[str, float], folder: Path) -> None:
    """Print the table and the next command, and draw the run's curves."""
    from qtarget.cli import curves

    if before and after:
        _table(before, after)
    elif after:
        print(f"held-out nll {after['nll']:.4f}; of the start nothing is known, as the run went on from a checkpoint")
    else:
        print("no held-out rows: the dataset has no test split, so there is nothing to compare before and after")
    if trainer.evaluates_teacher and before:
        print(_about_drift(trainer, before, after))
    picture = folder / "curves.png"
    if curves.draw(trainer.state.log_history, str(trainer.args.resolve_objective()), picture):
        print(f"curves     {picture}")
    print(f"model      {folder}  (plain Transformers files)")
    print(f"next       qtarget train --config FILE --model_name_or_path {folder} --output_dir {folder}-2")


def _table(before: dict[str, float], after: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"held-out, {int(after['supervised_tokens'])} supervised tokens", title_justify="left", box=None
    )
    for heading, justify in (("", "left"), ("before", "right"), ("after", "right"), ("change", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for name, label in _ROWS:
        if name in before and name in after:
            change = after[name] - before[name]
            table.add_row(label, f"{before[name]:.4f}", f"{after[name]:.4f}", f"{change:+.4f}")
    Console().print(table)


def _about_drift(trainer: QTargetTrainer, before: dict[str, float], after: dict[str, float]) -> str:
    drift_before, drift_after = before["teacher_kl"], after["teacher_kl"]
    text = f"Student and teacher were {abs(drift_before):.4f} nats apart at the start and {drift_after:.4f} at the end."
    if drift_before < 1e-6 and "target-sft" in {t.name for t in trainer.args.resolve_objective().finals()}:
        text += (
            " They started equal, so the first step was dft by construction: the teacher pulls only as far as the "
            "student has moved."
        )
    return text
