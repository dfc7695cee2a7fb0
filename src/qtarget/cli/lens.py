"""``qtarget lens``: what a target teaches, token by token."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtarget.cli import options
from qtarget.errors import ConfigError, unknown

_HELP = """\
usage: qtarget lens capture --config FILE [--rows 64] [--top_k 20] -o DIR [--any_field value ...]
       qtarget lens report DIR [-o lens.html] [--run RUN_FOLDER] [--config FILE] [--target TARGET]
       qtarget lens show DIR [--row N] [--target TARGET] [--all]
       qtarget lens advise DIR [--target TARGET]
       qtarget lens --loss my_pkg.my_module:my_loss [--reduction sum|mean]

See what a target teaches before training with it.

  capture   one forward pass over your rows, as `qtarget train` would prepare them; keeps the likeliest tokens of student,
            teacher and reference
  report    one HTML file, without a network: every target with its parameters, on every token of the capture
  show      a row in the terminal, and the tokens that are taught most; --all compares all targets
  advise    where the data lie between known and new to the model, and which targets tend to suit
  --loss    any PyTorch loss of (logits, labels): its target Q = p − gradient, its trust and its residual
"""


def run(arguments: Sequence[str]) -> int:
    words = list(arguments)
    if not words or "-h" in words or "--help" in words:
        print(_HELP, end="")
        return 0
    if words[0] == "--loss" or words[0].startswith("--loss="):
        return _loss(words)
    verbs = {"capture": _capture, "report": _report, "show": _show, "advise": _advise}
    if words[0] not in verbs:
        raise unknown("word after lens", words[0], (*verbs, "--loss"))
    return verbs[words[0]](words[1:])


def _options(words: list[str], values: Sequence[str], flags: Sequence[str] = (), folders: int = 1) -> Any:
    """(positional words, {option: value} of those that were given)."""
    given, positional = options.take(words, dict.fromkeys(values), flags)
    if unknown_option := next((word for word in positional if word.startswith("-")), None):
        raise unknown("option of lens", unknown_option, [f"--{name}" for name in (*values, *flags)])
    if len(positional) != folders:
        raise ConfigError(
            f"{' '.join(positional) or 'nothing'} was named where one folder of a capture is asked for, as in: "
            "qtarget lens show my_capture"
        )
    return positional, {name: value for name, value in given.items() if value not in (None, False)}


def _console() -> Any:
    """The terminal; a pipe has no width of its own, and lines cut for 80 columns are hard to search."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160)


def _target(value: str | None) -> Any:
    from qtarget.cli import yaml_text
    from qtarget.targets import Target

    return None if value is None else Target.from_config(yaml_text.load(value, f"target is {value!r}"))


# -- verbs -------------------------------------------------------------------------------------------------------


def _capture(words: list[str]) -> int:
    own, rest = options.take(words, {"rows": 64, "top_k": 20, "output": None})
    if own["output"] is None:
        raise ConfigError("output is not set; name the folder of the capture, as in: -o my_capture")
    rows, top_k = options.whole("rows", own["rows"], 1), options.whole("top_k", own["top_k"], 1)
    folder = Path(own["output"])
    from rich.progress import track

    from qtarget.cli import setup
    from qtarget.lens import capture

    if faults := capture.folder_faults(folder):
        raise ConfigError(faults)

    run = setup.read(rest, {"packing": False, "padding_free": False, "gradient_checkpointing": False}, trains=False)
    run.datasets.pop("test", None)
    if hasattr(run.datasets["train"], "select"):  # what is not captured need not be tokenised
        run.datasets["train"] = run.datasets["train"].select(range(min(rows, len(run.datasets["train"]))))
    trainer = setup.build(run)
    capture.check(trainer, rows, top_k, folder)
    count, tokens, megabytes = capture.estimate(trainer, rows, top_k)
    print(f"{count} rows, {tokens} supervised tokens: at most {megabytes:.1f} MB in {folder}")
    steps = iter(track(range(count), description="capturing", disable=not sys.stderr.isatty()))
    seen = 0

    def progress(done: int) -> None:
        nonlocal seen
        while seen < done:
            next(steps, None)
            seen += 1

    about = {"dataset": run.script.dataset_name, "split": run.script.dataset_train_split}
    capture.capture(trainer, folder, rows=rows, top_k=top_k, about=about, progress=progress)
    print(f"capture    {folder}")
    print(f"next       qtarget lens report {folder} -o lens.html    |  qtarget lens show {folder}")
    return 0


def _report(words: list[str]) -> int:
    (folder,), given = _options(words, ("output", "run", "config", "rows", "target"))
    from qtarget.lens import page, record

    read = record.read(folder)
    _check_config(read, given.get("config"))
    if "run" in given:
        from qtarget.training import history

        if not (Path(given["run"]) / history.FILE).is_file():
            raise ConfigError(
                f"run is {given['run']!r}, which has no {history.FILE}; train with lens_every, or leave --run out"
            )
        read.manifest["history"] = history.frames(given["run"])
    out = Path(given.get("output", "lens.html"))
    try:
        rows = options.whole("rows", given.get("rows", 300), 1)
        page.write(read, out, max_rows=rows, target=_target(given.get("target")))
    except OSError as error:
        raise ConfigError(
            f"output is {str(out)!r}, which cannot be written ({error.strerror}); name a file in a folder you own"
        ) from error
    print(f"page       {out}  ({out.stat().st_size / 2**20:.1f} MB; open it in a browser)")
    return 0


def _check_config(read: Any, config: str | None) -> None:
    """Refuse a capture of another model, tokenizer or template than the config names."""
    if config is None:
        return
    from transformers import AutoTokenizer

    from qtarget.cli import settings
    from qtarget.lens import capture

    named = settings.read(["--config", config])
    if named.faults:
        raise ConfigError(named.faults)
    model = str(named.values["model"].get("model_name_or_path"))
    if faults := capture.differences(read.manifest, model, AutoTokenizer.from_pretrained(model)):
        raise ConfigError(faults)


def _show(words: list[str]) -> int:
    (folder,), given = _options(words, ("row", "target"), ("all",))
    from qtarget.lens import page_targets, record, terminal
    from qtarget.targets import Target

    read, target = record.read(folder), _target(given.get("target"))
    console = _console()
    if "all" in given:
        console.print(terminal.comparison(read, target))
        return 0
    if target is None:
        name, target = next(iter(page_targets.of_run(read).items()), ("sft", "sft"))
        if isinstance(target, str):
            if name != "sft":
                console.print(f"note: the capture's target {name} is not shown: {target}", markup=False)
            target = Target.from_config("sft")
    row = None if "row" not in given else options.whole("row", given["row"], 0)
    terminal.show(read, target, row, console)
    return 0


def _advise(words: list[str]) -> int:
    (folder,), given = _options(words, ("target",))
    from qtarget.lens import record
    from qtarget.lens.advise import advise

    console = _console()
    for line in advise(record.read(folder), _target(given.get("target"))).lines():
        console.print(line, markup=False, highlight=False, soft_wrap=not console.is_terminal)
    return 0


# -- any loss ----------------------------------------------------------------------------------------------------


def _loss(words: list[str]) -> int:
    _, given = _options(words, ("loss", "reduction"), folders=0)
    import torch
    from rich.table import Table

    from qtarget.targets.induced import RULES, induced_target
    from qtarget.targets.yaml_form import load_object

    sys.path.insert(0, "")  # a loss in the present folder, as `python -m` would find it
    loss = load_object(given["loss"], "loss")
    if not callable(loss):
        raise ConfigError(f"loss is {given['loss']!r}, which cannot be called; name a function of (logits, labels)")
    # One token for each probability of the label, the rest of the vocabulary falling off from likely to rare.
    probabilities = torch.tensor([0.001, 0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999], dtype=torch.float64)
    rest = torch.linspace(2, -4, 30, dtype=torch.float64).softmax(0)
    p = torch.cat([probabilities[:, None], (1 - probabilities)[:, None] * rest], 1)
    try:
        made = induced_target(
            loss, p.log(), torch.zeros(len(p), dtype=torch.int64), reduction=given.get("reduction", "sum")
        )
    except ConfigError:
        raise
    except Exception as error:  # the user's own function
        raise ConfigError(
            f"loss is {given['loss']!r}, which failed with {type(error).__name__}: {error}; name a function of (logits, "
            "labels) that returns a number"
        ) from error
    table = Table(title=f"what {given['loss']} teaches", title_justify="left", box=None, pad_edge=False)
    for heading in ("p_y", "trust γ", "residual", "Q of the label", "update ½‖p − Q‖", "on the simplex"):
        table.add_column(heading, justify="right")
    for i, p_y in enumerate(probabilities.tolist()):
        rule = int(made.rule[i])
        table.add_row(
            f"{p_y:g}",
            "-" if rule < 0 else f"{float(made.trust[i]):.4f}",
            {-1: "none", 0: "the student", 1: "its own"}[rule],
            f"{float(made.q[i, 0]):.4f}",
            f"{float((p[i] - made.q[i]).abs().sum() / 2):.4f}",
            "yes" if bool(made.on_simplex[i]) else f"no, off by {float(made.off_by[i]):.3g}",
        )
    console = _console()
    console.print(table)
    named = sorted({RULES[int(rule)] for rule in made.rule if int(rule) >= 0})
    console.print(
        "trust and residual are unique only by a rule, here: "
        + ("; ".join({"student": _STUDENT, "largest": _LARGEST}[name] for name in named) or "none applies"),
        markup=False,
        highlight=False,
    )
    console.print("the scale of a loss is not in its gradient: half the loss has another Q and the same fixed point")
    return 0


_STUDENT = "Q_k/p_k is one constant c for every k but the label, so the residual is the student and γ = 1 − c"
_LARGEST = "the largest γ that leaves the residual non-negative"
