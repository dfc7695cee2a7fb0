"""A run's log on the screen: a table that grows by a row a line, on a terminal above a bar."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.text import Text
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import has_length

from qtarget.cli import terminal

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

# statistic → characters of its column. With step, rate, speed and time left a row has 80, up to 99,999 steps.
_WIDTHS = {"loss": 7, "nll": 7, "trust": 7, "update": 7, "accuracy": 8}
_HEADING_EVERY = 20  # rows, so that a screen always holds one


@contextlib.contextmanager
def shown(trainer: QTargetTrainer, full: bool) -> Iterator[None]:
    """Print what the trainer logs meanwhile, in place of Transformers' callback; ``full``: as dicts, in no table."""
    for theirs in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback):
        trainer.remove_callback(theirs)
    terminal.silence_libraries()  # what they have to show from now on is short
    bars = terminal.has_bars() and not trainer.args.disable_tqdm
    # An hour: of steps that take minutes each, rich would by itself forget the last and know no speed.
    how: dict[str, Any] = {"refresh_per_second": 2, "speed_estimate_period": 3600, "transient": True}
    with terminal.progress(console=terminal.console(120), disable=not bars, **how) as progress:
        trainer.add_callback(LogTable(progress, full))
        yield


class LogTable(TrainerCallback):
    """Prints the log while a run trains, and moves its bars.

    Args:
        progress: rich's, which prints above its bars. full: dicts in place of the table.
    """

    def __init__(self, progress: Any, full: bool):
        self._progress, self._full, self._rows = progress, full, 0
        self._training = self._evaluating = None  # tasks of the bars

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = self._progress.add_task("training", total=state.max_steps, completed=state.global_step)
        self._first, self._start = state.global_step, time.monotonic()
        self._last = self._stepped = self._start  # the last row, less what was no training since; the last step
        self._tokens = None if self._first else 0  # at the last row; a run that goes on does not know them yet

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stepped = time.monotonic()
        self._progress.update(self._training, completed=state.global_step)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._evaluating is None:
            batches = kwargs.get("eval_dataloader")
            total = len(batches) if has_length(batches) else None
            self._evaluating = self._progress.add_task("evaluation", total=total)
        self._progress.advance(self._evaluating)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._evaluating is not None:
            self._progress.remove_task(self._evaluating)
            self._evaluating = None
        self.on_save(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._training is not None:
            now = time.monotonic()
            self._last, self._stepped = self._last + now - self._stepped, now

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.remove_task(self._training)
        self._training = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._training is None or not state.is_world_process_zero:
            return
        evaluated = next((name.removesuffix("_nll") for name in logs if name.endswith("_nll")), "")
        if "train_loss" in logs and not self._full:
            took = terminal.duration(logs["train_runtime"])
            self._say(f"{state.global_step - self._first} steps in {took}, mean loss {logs['train_loss']:.4f}")
        elif self._full or not (evaluated or "loss" in logs):
            cells = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in logs.items()}
            self._say(str({name: cell for name, cell in cells.items() if name != "total_flos"}))
        else:
            self._row(state, logs, evaluated)

    def _row(self, state: Any, logs: dict[str, Any], evaluated: str) -> None:
        """``evaluated``: the prefix of an evaluation's names, which marks its row."""
        step = f"{state.global_step}/{state.max_steps}"
        wide = max(4, len(f"{state.max_steps}/{state.max_steps}"))
        if self._rows % _HEADING_EVERY == 0:
            names = " ".join(f"{name:>{width}}" for name, width in _WIDTHS.items())
            self._say(f"{'step':>{wide}} {names}       lr tokens/s    left", "bold")
        self._rows += 1
        figures = ((logs.get(f"{evaluated}_{name}" if evaluated else name), width) for name, width in _WIDTHS.items())
        cells = " ".join(f"{_figure(value):>{width}}" for value, width in figures)
        end = evaluated or self._rate_and_time(state, logs)
        self._say(f"{step:>{wide}} {cells} {end}", "cyan" if evaluated else "")
        odd = {name: value for name, value in logs.items() if isinstance(value, float) and not math.isfinite(value)}
        if odd:
            self._say(f"warning: at step {step}, " + ", ".join(f"{name} is {odd[name]}" for name in odd), "red")

    def _rate_and_time(self, state: Any, logs: dict[str, Any]) -> str:
        """Learning rate; tokens a second since the last row, of training alone; time left at the pace so far."""
        now, rate, tokens, speed = time.monotonic(), logs.get("learning_rate"), logs.get("num_tokens"), "-"
        if tokens is not None and self._tokens is not None:
            speed = f"{(tokens - self._tokens) / max(now - self._last, 1e-9):.0f}"
        self._tokens, self._last, self._stepped = tokens, now, now
        to_go = (state.max_steps - state.global_step) / max(state.global_step - self._first, 1)
        seconds = round((now - self._start) * to_go)
        left = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        return f"{'-' if rate is None else f'{rate:.2e}':>8} {speed:>8} {left:>7}"

    def _say(self, text: str, style: str = "") -> None:
        self._progress.console.print(Text(text, style), soft_wrap=True)


def _figure(value: Any) -> str:
    """Four digits behind the point, and less than a column's width."""
    if value is None:
        return "-"
    return f"{value:.1e}" if 0 < abs(value) < 5e-5 or 100 <= abs(value) < math.inf else f"{value:.4f}"
