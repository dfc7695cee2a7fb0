"""A run's log on the screen: a table that grows by a row a line, on a terminal above a bar."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

from rich import progress
from rich.text import Text
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import has_length

from qtarget.cli import terminal

# statistic of the log → characters of its column; with step, rate, speed and time left a row has 79, up to 999,999 steps
_WIDTHS = {"loss": 7, "nll": 7, "trust": 7, "update": 7, "accuracy": 8}
_HEADING_EVERY = 20  # rows, so that a screen always holds one


@contextlib.contextmanager
def shown(trainer: Any, full: bool) -> Iterator[None]:
    """Print what the trainer logs meanwhile, in place of Transformers' callback.

    Args:
        full: each line of the log as a whole, as a dict, in place of the table.
    """
    for theirs in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback):
        trainer.remove_callback(theirs)
    terminal.silence_libraries()  # what they have to show from now on is short
    columns = [progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn()]
    columns += [progress.TimeElapsedColumn(), progress.TextColumn("left"), progress.TimeRemainingColumn()]
    bars = terminal.has_bars() and not trainer.args.disable_tqdm
    # An hour: of steps that take minutes each, rich would by itself forget the last and know no speed.
    how = {"refresh_per_second": 2, "speed_estimate_period": 3600, "transient": True}
    with terminal.progress(*columns, console=terminal.console(120), disable=not bars, **how) as running:
        trainer.add_callback(LogTable(running, full))
        yield


class LogTable(TrainerCallback):
    """Prints the log while a run trains, and moves its bars.

    Args:
        progress: rich's, which prints above its bars. full: dicts in place of the table.
    """

    def __init__(self, progress: Any, full: bool):
        self._progress, self._full = progress, full
        self._training: Any = None  # the bars' tasks
        self._evaluating: Any = None
        self._rows = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._first, self._start = state.global_step, time.monotonic()
        # Of a run that goes on, the first line's count of tokens is the first that is known.
        self._tokens = None if self._first else 0
        self._mark, self._spent = self._start, 0.0
        self._training = self._progress.add_task("training", total=state.max_steps, completed=self._first)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._count_time()
        self._progress.update(self._training, completed=state.global_step)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if self._evaluating is None:
            total = len(eval_dataloader) if has_length(eval_dataloader) else None
            self._evaluating = self._progress.add_task("evaluation", total=total)
        self._progress.advance(self._evaluating)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._evaluating is not None:
            self._progress.remove_task(self._evaluating)
        self._evaluating, self._mark = None, time.monotonic()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.remove_task(self._training)
        self._training = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._training is None or not state.is_world_process_zero:
            return
        evaluated = next((name.removesuffix("_nll") for name in logs if name.endswith("_nll")), "")
        if self._full or not ("loss" in logs or "train_loss" in logs or evaluated):
            shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in logs.items()}
            shown.pop("total_flos", None)
            self._say(str(shown))
        elif "train_loss" in logs:
            took = terminal.duration(logs["train_runtime"])
            self._say(f"{state.global_step - self._first} steps in {took}, mean loss {logs['train_loss']:.4f}")
        else:
            self._row(state, logs, evaluated)

    def _row(self, state: Any, logs: dict[str, Any], evaluated: str) -> None:
        wide = max(4, len(f"{state.max_steps}/{state.max_steps}"))
        if self._rows % _HEADING_EVERY == 0:
            names = "".join(f" {name:>{width}}" for name, width in _WIDTHS.items())
            self._say(f"{'step':>{wide}}{names}       lr tokens/s    left", "bold")
        self._rows += 1
        prefix = f"{evaluated}_" if evaluated else ""
        cells = "".join(f" {_figure(logs.get(prefix + name)):>{width}}" for name, width in _WIDTHS.items())
        end = evaluated or self._rate_and_time(state, logs)
        self._say(f"{f'{state.global_step}/{state.max_steps}':>{wide}}{cells} {end}", "cyan" if evaluated else "")
        odd = [f"{name} is {value}" for name, value in logs.items() if _is_odd(value)]
        if odd:
            self._say(f"warning    step {state.global_step}: {', '.join(odd)}", "red")

    def _rate_and_time(self, state: Any, logs: dict[str, Any]) -> str:
        """Learning rate, tokens a second of training since the last row, and time left at the pace so far."""
        self._count_time()
        rate, tokens, speed = logs.get("learning_rate"), logs.get("num_tokens"), "-"
        if tokens is not None:
            if self._tokens is not None and self._spent:
                speed = f"{(tokens - self._tokens) / self._spent:.0f}"
            self._tokens, self._spent = tokens, 0.0
        done = state.global_step - self._first
        seconds = round((self._mark - self._start) / done * (state.max_steps - state.global_step)) if done else 0
        left = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        return f"{'-' if rate is None else f'{rate:.2e}':>8} {speed:>8} {left:>7}"

    def _count_time(self) -> None:
        """Add what passed since the last mark to the time spent in training, without evaluations and saves."""
        now = time.monotonic()
        self._spent += now - self._mark
        self._mark = now

    def _say(self, text: str, style: str = "") -> None:
        self._progress.console.print(Text(text, style), soft_wrap=True)


def _figure(value: Any) -> str:
    """Of as few characters as a column has; - where there is none."""
    if value is None:
        return "-"
    return f"{value:.4f}" if value == 0 or 5e-5 <= abs(value) < 100 or not math.isfinite(value) else f"{value:.1e}"


def _is_odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
