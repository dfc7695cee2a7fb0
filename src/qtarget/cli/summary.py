"""What a run prints at its end: held-out figures, a picture, what is there, what to do next."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtarget import extras
from qtarget.cli import terminal

if TYPE_CHECKING:
    from qtarget.cli.setup import Run
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
# (what a picture shows, statistics of the log)
_PANELS = [
    ("loss and negative log-likelihood", ("loss", "nll")),
    ("weight of label and residual", ("trust", "residual_mass")),
    ("update: share of probability asked to move", ("update",)),
    ("student's entropy (nats)", ("entropy",)),
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


def show(trainer: QTargetTrainer, run: Run, before: dict[str, float], after: dict[str, float]) -> None:
    """Print the table, what is in the folder and what to do with it, and draw the run's curves."""
    folder = Path(run.config.output_dir)
    print()
    if before and after:
        _table(before, after)
    elif after:
        print(f"held-out nll {after['nll']:.4f}; of the start nothing is known, as the run went on from a checkpoint")
    else:
        print("no held-out rows: the dataset has no test split, so there is nothing to compare before and after")
    if trainer.evaluates_teacher and before:
        terminal.console(500).print(_about_drift(trainer, before, after), markup=False)
    picture = folder / "curves.png"
    if importlib.util.find_spec("matplotlib") is None:
        print(f"curves     need matplotlib, which is not installed; {extras.pip_line('plots')}")
    else:
        with trainer.side_files.writing(picture.name):
            if _draw(trainer.state.log_history, str(trainer.args.resolve_objective()), picture):
                print(f"curves     {picture}")
    print(f"model      {folder}  ({_what(trainer)})")
    print("\nnext")
    for purpose, *commands in _next(trainer, run, folder):
        print(f"  {purpose}")
        for command in commands:
            print(f"    qtarget {shlex.join(map(str, command))}")


def _what(trainer: QTargetTrainer) -> str:
    """What the run left."""
    adapter = getattr(trainer.student.unwrapped, "active_peft_config", None)
    if adapter is None:
        return "plain Transformers files"
    return f"an adapter ({adapter.peft_type.value}) for {trainer.student.base.config._name_or_path}"


def _next(trainer: QTargetTrainer, run: Run, folder: Path) -> Iterator[Sequence[Any]]:
    """What people do next, each with its commands: look at answers, score and compare them, see the target, merge."""
    start, results, capture = run.model, [f"{folder}-eval-before", f"{folder}-eval"], f"{folder}-lens"
    yield "talk to the model", ["chat", folder]
    revision = [] if start.model_revision == "main" else ["--revision", start.model_revision]
    score = ["--tasks", "gsm_symbolic", "--n", 4, "-o"]
    missing = importlib.util.find_spec("reasoning_gym") is None
    yield (
        "did it help? score the model before and after on the same problems"
        + f" (first {extras.pip_line('eval')})" * missing,
        ["eval", "--model", start.model_name_or_path, *revision, *score, results[0]],
        ["eval", "--model", folder, *score, results[1]],
        ["compare", *results],
    )
    yield (
        "see in a page, token by token, what the target taught",
        ["lens", "capture", *run.words, "-o", capture],
        ["lens", "report", capture, "-o", f"{capture}.html"],
    )
    adapter = getattr(trainer.student.unwrapped, "active_peft_config", None)
    if adapter is not None and not adapter.is_prompt_learning:
        yield "one plain model of adapter and base", ["merge", folder, "-o", f"{folder}-merged"]


def _table(before: dict[str, float], after: dict[str, float]) -> None:
    title = f"held-out, {int(after['supervised_tokens'])} supervised tokens"
    table = terminal.table("", "before", "after", "change", left=("",), title=title)
    for name, label in _ROWS:
        if name in before and name in after:
            change = after[name] - before[name]
            table.add_row(label, f"{before[name]:.4f}", f"{after[name]:.4f}", f"{change:+.4f}")
    terminal.console(80).print(table)


def _about_drift(trainer: QTargetTrainer, before: dict[str, float], after: dict[str, float]) -> str:
    drift_before, drift_after = before["teacher_kl"], after["teacher_kl"]
    text = f"Student and teacher were {abs(drift_before):.4f} nats apart at the start and {drift_after:.4f} at the end."
    if drift_before < 1e-6 and "target-sft" in {t.name for t in trainer.args.resolve_objective().finals()}:
        text += (
            " They started equal, so the first step was dft by construction: the teacher pulls only as far as the "
            "student has moved."
        )
    return text


def _draw(log_history: Sequence[Mapping[str, float]], title: str, path: Path) -> bool:
    """Write the curves of ``trainer.state.log_history`` to ``path``; False where there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [entry for entry in log_history if "loss" in entry]
    if not steps:
        return False
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 5.5), layout="constrained")
    for axis, (heading, names) in zip(axes.flat, _PANELS, strict=True):
        for name, style in zip(names, ("-", "--"), strict=False):
            points = [(entry["step"], entry[name]) for entry in steps if name in entry]
            if points:
                axis.plot(*zip(*points, strict=True), style, marker="." if len(points) < 50 else None, label=name)
        held_out = [(entry["step"], entry["eval_nll"]) for entry in log_history if "eval_nll" in entry]
        if "nll" in names and held_out:
            axis.plot(*zip(*held_out, strict=True), "s", fillstyle="none", label="held-out nll")
        axis.set_title(heading, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(axis.lines) > 1:
            axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
