"""What a run prints while it trains: a table, plain in a pipe, above a bar on a terminal."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import logging
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from tqdm import tqdm
from transformers import TrainerState

import screen
import tiny_models
from qtarget.cli import log_table, terminal
from qtarget.cli.__main__ import main
from qtarget.cli.settings import groups

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "reading-the-log.md"
HEADING = "step    loss     nll   trust  update accuracy       lr tokens/s    left"
NAMES = ("loss", "nll", "trust", "update", "accuracy")
BARS = re.compile(r"[\r\x1b█━]|it/s|\d%\|")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A model, rows and a config that evaluates in between."""
    root = tmp_path_factory.mktemp("log")
    tiny_models.llama().save_pretrained(root / "model")
    tiny_models.tokenizer().save_pretrained(root / "model")
    for split, rows in (("train", 8), ("test", 3)):
        tiny_models.conversation_dataset(rows).to_json(root / "data" / f"{split}.jsonl")
    settings = {
        "model_name_or_path": str(root / "model"),
        "dataset_name": str(root / "data"),
        "target": "dft",
        "weight_decay": 0.0,  # the default
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
    }
    (root / "config.yaml").write_text(yaml.safe_dump(settings))
    return root


def words(root: Path, name: str, *more: str) -> list[str]:
    return ["train", "--config", str(root / "config.yaml"), "--output_dir", str(root / name), *more]


def history(folder: Path) -> list[dict[str, float]]:
    """The log without what an evaluation before and after adds, which no table shows."""
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    end = next(number for number, entry in enumerate(entries) if "train_loss" in entry)
    return [entry for entry in entries[: end + 1] if entry["step"]]


def rows_of(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if re.match(r" *\d+/\d+ ", line)]


def check_rows(rows: list[list[str]], folder: Path) -> None:
    """Row by row the figures of the log."""
    entries = [entry for entry in history(folder) if "train_loss" not in entry]
    assert [row[0] for row in rows] == [f"{entry['step']}/4" for entry in entries] and len(rows) == 6
    for row, entry in zip(rows, entries, strict=True):
        prefix = "eval_" if "eval_nll" in entry else ""
        assert [float(cell) for cell in row[1:6]] == pytest.approx([entry[prefix + n] for n in NAMES], abs=5.1e-5)
        assert row[6:] == ["eval"] if prefix else float(row[6]) == pytest.approx(entry["learning_rate"]) and row[8]


# -- a pipe --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def piped(root) -> str:
    command = [sys.executable, "-m", "qtarget", *words(root, "piped")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def test_a_pipe_gets_plain_lines_without_bars(root, piped):
    assert BARS.search(piped) is None
    assert [line for line in piped.splitlines() if line.startswith("step ")] == [HEADING]
    check_rows(rows_of(piped), root / "piped")
    assert re.search(r"^4 steps in .*, mean loss \d\.\d{4}$", piped, re.M)


def test_settings_that_differ_stand_by_where_they_come_from(root, piped):
    start = piped[: piped.index("\n\n")]
    of_file, of_flags = start.partition("  from flags\n")[::2]
    assert of_file.startswith("settings that differ from their defaults")
    assert re.search(r"^    max_steps +4$", of_file, re.M) and "  from the config file\n" in of_file
    assert "weight_decay" not in start and "seed" not in start
    assert of_flags.split() == ["output_dir", str(root / "piped")]


def test_full_lines_and_all_settings(root, piped, capsys):
    secret = ("--hub-token", "hf_secret")  # hyphens are read as underscores
    assert main(words(root, "full", "--log_full", "true", "--show_settings", "all", *secret)) == 0
    out = capsys.readouterr().out
    assert re.search(r"^    hub_token +<HUB_TOKEN>$", out, re.M) and "qtarget lens capture" in out
    written = [file.read_text() for file in (root / "full").rglob("*") if file.suffix in (".json", ".md")]
    assert all("hf_secret" not in text for text in [out, *written])
    entries = history(root / "full")
    lines = [ast.literal_eval(line) for line in out.splitlines() if line.startswith("{")]
    shown = [{name: v for name, v in entry.items() if name not in ("step", "total_flos")} for entry in entries]
    as_text = [{name: f"{v:.4g}" if isinstance(v, float) else v for name, v in entry.items()} for entry in shown]
    assert lines == as_text and HEADING not in out
    assert {"grad_norm", "ce_q", "update_vs_sft", "num_tokens"} <= {*entries[0]}

    start = out[: out.index("\n\n")]
    fields = {f.name for cls in groups().values() for f in dataclasses.fields(cls) if f.init}
    assert {*re.findall(r"^    (\w+) ", start, re.M)} == fields
    defaults = start.partition("  defaults\n")[2]
    assert re.search(r"^    seed +42$", defaults, re.M) and "weight_decay" in start and "weight_decay" not in defaults

    times = ("_runtime", "_per_second", "_time")
    same = [{n: v for n, v in entry.items() if not n.endswith(times)} for entry in entries]
    assert same == [{n: v for n, v in e.items() if not n.endswith(times)} for e in history(root / "piped")]


def test_the_dry_run_shows_all_settings_too(root, capsys):
    assert main(words(root, "dry", "--dry_run", "--show_settings", "all")) == 0
    assert re.search(r"^  defaults$", capsys.readouterr().out, re.M)


def test_a_misspelt_choice_is_a_sentence(root, capsys):
    assert main(words(root, "none", "--log_full", "yes", "--show_settings", "none")) == 2
    told = capsys.readouterr().err.splitlines()
    assert [line.removeprefix("qtarget train: ") for line in told] == [
        "log_full is 'yes'; valid: false, true",
        "show_settings is 'none'; valid: all, changed",
    ]


# -- a terminal ----------------------------------------------------------------------------------------------------


def test_on_a_terminal_the_table_stands_above_the_bars(root):
    status, written = screen.run([sys.executable, "-m", "qtarget", *words(root, "terminal")])
    assert status == 0, written[-3000:]
    for bar in ("training", "evaluation", "Loading weights"):
        assert bar in written
    shown = screen.lines(written)
    assert HEADING in shown and not any("training " in line or "━" in line for line in shown)
    check_rows(rows_of("\n".join(shown)), root / "terminal")
    end = next(number for number, line in enumerate(shown) if "mean loss" in line)
    assert all(len(line) <= 80 for line in shown[shown.index(HEADING) : end])
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l"), "the cursor is left hidden"
    note = next(number for number, line in enumerate(shown) if line.startswith("the update is "))
    assert shown[note + 2].endswith("(lr_to_match_sft)") and shown[note + 3] == HEADING, "wrapped between words"


def test_on_a_terminal_bars_and_colours_may_be_turned_off(root):
    command = [sys.executable, "-m", "qtarget", *words(root, "quiet", "--disable_tqdm", "true")]
    status, written = screen.run(command, NO_COLOR="1")
    assert status == 0, written[-3000:]
    assert "━" not in written and "Loading weights" not in written and "\r" not in written.replace("\r\n", "\n")
    assert not re.search(r"\x1b\[[0-9;]*[349]\dm", written) and "trained between « and »" in written
    check_rows(rows_of("\n".join(screen.lines(written))), root / "quiet")


def test_what_others_print_stands_above_the_bar(capsys):
    """Prints, logs of a handler that holds stderr, and bars of others: each a line of its own."""
    logger, handler = logging.getLogger("somebody.else"), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    there = io.StringIO()
    before = sys.stdout, sys.stderr
    with terminal.progress(
        console=Console(file=there, force_terminal=True, width=60), disable=False, redirect_stdout=True
    ) as progress:
        task = progress.add_task("steps", total=3)
        for step in range(3):
            progress.update(task, completed=step, refresh=True)
            print(f"printed {step}")
            logger.warning("logged %d", step)
        for _ in tqdm(range(3), desc="theirs", mininterval=0):
            progress.refresh()
        progress.remove_task(task)
    logger.removeHandler(handler)
    assert (sys.stdout, sys.stderr) == before and handler.stream is sys.stderr
    shown = [line for line in screen.lines(there.getvalue()) if line]
    assert shown[:-1] == [f"{what} {step}" for step in range(3) for what in ("printed", "logged")]
    assert shown[-1].startswith("theirs: 100%")


def test_a_bar_writes_nothing_into_a_pipe(capsys, monkeypatch):
    """stderr is a terminal and stdout is not, as in qtarget eval > scores."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    advance = terminal.bar(2, "at work")
    for done in range(3):
        advance(done)
        print(f"row {done}")
    out, err = capsys.readouterr()
    assert out == "row 0\nrow 1\nrow 2\n" and "at work" in err


# -- a row ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def table(monkeypatch):
    """A table, its clock, and what it has printed."""

    class Bench:
        now, there, state = 0.0, io.StringIO(), TrainerState(max_steps=100)

        def say(self, step: int, **logs: float) -> list[str]:
            self.state.global_step, before = step, dict(logs)
            self.there.seek(self.there.truncate(0))
            made.on_log(None, self.state, None, logs=logs)
            assert logs == before, "trackers see the same dict"
            return self.there.getvalue().splitlines()

    bench = Bench()
    monkeypatch.setattr(log_table.time, "monotonic", lambda: bench.now)
    with terminal.progress(console=Console(file=bench.there, width=80), disable=True) as progress:
        made = bench.made = log_table.LogTable(progress, False)
        yield bench


LINE = {"loss": 0.5, "nll": 1.25, "trust": 0.5, "update": 0.25, "accuracy": 0.75, "learning_rate": 1e-5}


def test_speed_is_of_training_alone_and_the_time_left_of_all(table):
    table.made.on_train_begin(None, table.state, None)
    for step in (1, 2):
        table.now += 5
        table.state.global_step = step
        table.made.on_step_end(None, table.state, None)
    assert table.say(2, **LINE, num_tokens=1000)[1].split()[-2:] == ["100", "0:08:10"]
    table.now += 30
    assert table.say(2, eval_loss=0.5, eval_nll=1.0)[0].split() == ["2/100", "0.5000", "1.0000", "-", "-", "-", "eval"]
    table.made.on_evaluate(None, table.state, None)
    table.now += 4
    table.state.global_step = 3
    table.made.on_step_end(None, table.state, None)
    table.now += 6
    table.made.on_save(None, table.state, None)
    table.now += 1
    table.made.on_step_end(None, table.state, None)
    assert table.say(4, **LINE, num_tokens=1500)[0].split()[-2:] == ["100", "0:20:24"]


def test_a_run_that_goes_on_knows_no_speed_in_its_first_row(table):
    table.state.global_step = 50
    table.made.on_train_begin(None, table.state, None)
    table.now += 10
    assert table.say(60, **LINE, num_tokens=9000)[1].split()[-2:] == ["-", "0:00:40"]
    table.now += 10
    assert table.say(70, **LINE, num_tokens=9500)[0].split()[-2:] == ["50", "0:00:30"]


def test_what_is_not_finite_is_pointed_at(table):
    table.made.on_train_begin(None, table.state, None)
    told = table.say(3, **{**LINE, "loss": float("nan"), "nll": float("inf")}, grad_norm=float("nan"))
    assert told[1].split()[:3] == ["3/100", "nan", "inf"]
    assert told[2] == "warning: at step 3/100, loss is nan, nll is inf, grad_norm is nan"


def test_the_heading_comes_again(table):
    table.made.on_train_begin(None, table.state, None)
    printed = [line for step in range(1, 42) for line in table.say(step, **LINE)]
    assert [number for number, line in enumerate(printed) if "tokens/s" in line] == [0, 21, 42]


def test_wide_numbers_stay_within_eighty_columns(table):
    table.state.max_steps = 99_999
    table.made.on_train_begin(None, table.state, None)
    table.now += 36
    wide = {"loss": 1234.5, "nll": 1e-7, "trust": -0.5, "update": 99.5, "accuracy": 1.0, "learning_rate": 1e-5}
    heading, row = table.say(1, **wide, num_tokens=36 * 12_345_678)
    figures = ["1.2e+03", "1.0e-07", "-0.5000", "99.5000", "1.0000", "1.00e-05", "12345678", "999:58:48"]
    assert row.split() == ["1/99999", *figures] and len(heading) <= 80 and len(row) <= 80


def test_sets_of_evaluation_are_named_and_other_lines_are_whole(table):
    table.made.on_train_begin(None, table.state, None)
    both = {"eval_long_loss": 0.5, "eval_long_nll": 1.0, "eval_aux_loss": 2.0}
    assert table.say(1, **both)[1].split() == ["1/100", "0.5000", "1.0000", "-", "-", "-", "eval_long"]
    assert table.say(1, mine=0.123456, total_flos=5) == ["{'mine': '0.1235'}"]
    table.made.on_train_end(None, table.state, None)
    assert table.say(1, **both) == [], "what is evaluated before and after stands in the summary"


def test_the_page_shows_the_table_as_it_is(table):
    """Its example, but for the times left."""
    example = re.search(r"(?:^     *(?:step|\d/8) .*\n)+", PAGE.read_text(encoding="utf-8"), re.M)
    heading, *rows = textwrap.dedent(example[0]).splitlines()
    recorded = (PAGE.parents[2] / "benchmarks" / "results" / "quickstart_log.txt").read_text(encoding="utf-8")
    assert {heading, *rows} <= {*recorded.splitlines()}
    table.state.max_steps, tokens, printed = 8, 0, []
    table.made.on_train_begin(None, table.state, None)
    for step, *cells in map(str.split, rows):
        if cells[5:] == ["eval"]:
            logs = {f"eval_{name}": float(cell) for name, cell in zip(NAMES, cells, strict=False)}
        else:
            logs = {name: float(cell) for name, cell in zip([*NAMES, "learning_rate"], cells, strict=False)}
            tokens, table.now = tokens + 10 * int(cells[6]), table.now + 10
            logs["num_tokens"] = tokens
        printed += table.say(int(step.partition("/")[0]), **logs)
    assert printed[0] == heading and len(printed) == 5
    assert [line[:63] for line in printed] == [row[:63] for row in (heading, *rows)]
