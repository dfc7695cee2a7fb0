"""``qtarget lens``: see what a target teaches before training with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qtarget.cli import picture, setup, terminal
from qtarget.cli.arguments import FILE, FOLDER, NAME, TEXT, Option, Verb, one_of, only, whole
from qtarget.errors import ConfigError, loading, raise_together

VERB = Verb("lens", __doc__)
_WIDTH = 160  # of a pipe: lines cut for 80 columns are hard to search
_ONE = "one folder of a capture, as in: qtarget lens show my_capture"
_TARGET = Option("target", "a target instead of the one the capture was made for", TEXT)


@VERB.command(
    Option("output", "folder of the capture", FOLDER, mend="name the folder of the capture, as in: -o my_capture"),
    Option("rows", "how many rows to capture, from the first", whole(1), 64),
    Option("top_k", "how many of the likeliest tokens to keep of each distribution", whole(1), 20),
    picture.SHOW_ROWS,
    word="capture",
    settings=True,
)
def capture_rows(options: Any) -> int:
    """One forward pass over your rows, as `qtarget train` would prepare them; keeps the likeliest tokens of student,
    teacher and reference.
    """
    rows, top_k, folder = options.rows, options.top_k, options.output
    from qtarget.lens import capture

    raise_together(capture.folder_faults(folder))
    fixed = {**setup.MEASURES, "packing": False, "padding_free": False}
    run = setup.read(options.words, fixed, trains=False)
    run.keep(lambda length: range(min(rows, length)))
    trainer = setup.build(run)
    capture.check(trainer, rows, top_k, folder)
    count, tokens, megabytes = capture.estimate(trainer, rows, top_k)
    if (seen := trainer.picture()) is not None:
        picture.show(seen, options.show_rows)
    print(f"{count} rows, {tokens} supervised tokens: at most {megabytes:.1f} MB in {folder}")
    bar = terminal.bar(count, "capturing")
    about = {"dataset": run.script.dataset_name, "split": run.script.dataset_train_split}
    capture.capture(trainer, folder, rows=rows, top_k=top_k, about=about, progress=bar)
    print(f"capture    {folder}")
    print(f"next       qtarget lens report {folder} -o lens.html    |  qtarget lens show {folder}")
    return 0


@VERB.command(
    Option("output", "the page", FILE, Path("lens.html")),
    Option("run", "a run trained with lens_every, whose maps the page plays", FOLDER),
    Option("config", "refuse a capture whose model, tokenizer or template differs from this config", FILE),
    Option("rows", "most rows to show", whole(1), 300),
    Option("target", "another target to show on the page", TEXT),
    word="report",
    takes="DIR",
)
def report(options: Any) -> int:
    """Writes one self-contained HTML file: every target with its parameters, on every token of the capture."""
    folder, out = only(options.words, _ONE), options.output
    from qtarget.lens import page, record

    read = record.read(folder)
    if options.config is not None:
        _check_config(read, options.config)
    if options.run is not None:
        from qtarget.training import history

        if not (options.run / history.FILE).is_file():
            raise ConfigError(
                f"run is {str(options.run)!r}, which has no {history.FILE}; train with lens_every, or leave --run out"
            )
        read.manifest["history"] = history.frames(options.run)
    try:
        page.write(read, out, max_rows=options.rows, target=_target(options.target))
    except OSError as error:
        raise ConfigError(
            f"output is {str(out)!r}, which cannot be written ({error.strerror}); name a file in a folder you own"
        ) from error
    print(f"page       {out}  ({out.stat().st_size / 2**20:.1f} MB; open it in a browser)")
    return 0


def _check_config(read: Any, config: Path) -> None:
    from qtarget.cli import settings
    from qtarget.lens import capture
    from qtarget.models.loading import load_tokenizer

    named = settings.read(["--config", str(config)])
    raise_together(named.faults)
    model = str(named.values["model"].get("model_name_or_path"))
    with loading("model_name_or_path", model, "tokenizer"):
        tokenizer = load_tokenizer(model)
    raise_together(capture.differences(read.manifest, model, tokenizer))


@VERB.command(
    Option("row", "number of the row; unset: only the tokens that are taught most", whole(0)),
    _TARGET,
    Option("all", "compare all targets"),
    word="show",
    takes="DIR",
)
def show(options: Any) -> int:
    """Shows a row in the terminal, and the tokens that are taught most."""
    folder = only(options.words, _ONE)
    from qtarget.lens import page_targets, record
    from qtarget.lens import terminal as lens
    from qtarget.targets import Target

    read, target = record.read(folder), _target(options.target)
    console = terminal.console(_WIDTH)
    if options.all:
        console.print(lens.comparison(read, target))
        return 0
    if target is None:
        name, target = next(iter(page_targets.targets_of_run(read).items()), ("sft", "sft"))
        if isinstance(target, str):
            if name != "sft":
                console.print(f"note: the capture's target {name} is not shown: {target}", markup=False)
            target = Target.from_config("sft")
    lens.show(read, target, options.row, console)
    return 0


@VERB.command(_TARGET, word="advise", takes="DIR")
def advise(options: Any) -> int:
    """Says how familiar the data are to the model, and which targets tend to suit them."""
    folder = only(options.words, _ONE)
    from qtarget.lens import record
    from qtarget.lens.advise import advise

    console = terminal.console(_WIDTH)
    for line in advise(record.read(folder), _target(options.target)).lines():
        console.print(line, markup=False, soft_wrap=not console.is_terminal)
    return 0


def _target(value: str | None) -> Any:
    from qtarget.cli import yaml_text
    from qtarget.targets import Target

    return None if value is None else Target.from_config(yaml_text.load(value, f"target is {value!r}"))


# -- any loss ----------------------------------------------------------------------------------------------------


@VERB.command(
    Option(
        "loss",
        "any PyTorch loss of (logits, labels), shown with its target Q = p − gradient, its trust and its residual",
        NAME,
        mend="name a function of (logits, labels), as in: --loss my_pkg.my_module:my_loss",
    ),
    Option("reduction", "how the loss combines the tokens", one_of("sum", "mean"), "sum"),
)
def induced(options: Any) -> int:
    import torch

    from qtarget.targets.induced import RULES, induced_target
    from qtarget.targets.parts import load_object

    loss = load_object(options.loss, "loss")
    if not callable(loss):
        raise ConfigError(f"loss is {options.loss!r}, which cannot be called; name a function of (logits, labels)")
    # One token for each probability of the label, the rest of the vocabulary falling off from likely to rare.
    probabilities = torch.tensor([0.001, 0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999], dtype=torch.float64)
    rest = torch.linspace(2, -4, 30, dtype=torch.float64).softmax(0)
    p = torch.cat([probabilities[:, None], (1 - probabilities)[:, None] * rest], 1)
    try:
        made = induced_target(loss, p.log(), torch.zeros(len(p), dtype=torch.int64), reduction=options.reduction)
    except ConfigError:
        raise
    except Exception as error:  # the user's own function
        raise ConfigError(
            f"loss is {options.loss!r}, which failed with {type(error).__name__}: {error}; name a function of (logits, "
            "labels) that returns a number"
        ) from error
    headings = ("p_y", "trust γ", "residual", "Q of the label", "update ½‖p − Q‖", "on the simplex")
    table = terminal.table(*headings, title=f"what {options.loss} teaches")
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
    console = terminal.console(_WIDTH)
    console.print(table)
    rules = "; ".join(_RULES[name] for name in sorted({RULES[rule] for rule in made.rule.tolist() if rule >= 0}))
    console.print(f"trust and residual are unique only under a rule, here: {rules or 'none applies'}", markup=False)
    console.print("the gradient does not fix a loss's scale: half the loss has another Q but the same fixed point")
    return 0


_RULES = {
    "student": "Q_k/p_k is one constant c for every k but the label, so the residual is the student and γ = 1 − c",
    "largest": "the largest γ that leaves the residual non-negative",
}
