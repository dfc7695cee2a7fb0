"""qtarget verify: it passes what is right, and each deliberate fault is caught by the checks that should catch it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import qtarget as qt
import quick_runs
import tiny_models
from qtarget.cli.__main__ import main
from qtarget.data import preparation
from qtarget.data.columns import TokenColumnCollator
from qtarget.losses import heads
from qtarget.losses.engine import buffers, matmuls
from qtarget.losses.engine.buffers import Scratch
from qtarget.models import forward
from qtarget.targets.divergence import Divergence
from qtarget.targets.presets import teachers
from qtarget.targets.presets.entry import ENTRIES
from qtarget.training import QTargetTrainer, denominator
from qtarget.training.auxiliary import AuxiliaryModels
from qtarget.verification import Subject, neighbours, peak, report, resources

HERE = Path(__file__).parents[1] / "helpers"
NAMES = [check.name for check in report.CHECKS]
P_Q, FORMULA, STEP, MICRO, PADDING, FREE, PACKING, CHUNKS, WORLD = NAMES[:9]
IN_PLACE, PROMPT, ANSWER, END, TEACHER, REFERENCE, NEIGHBOURS, BF16, MEMORY = NAMES[9:]
TARGET_SFT = {"target": {"preset": "target-sft", "eta": 0.5}}
ALL_ROWS = {"target": "dft"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A student whose head has padded rows, a teacher, rows of several shapes and a cache of 8 tokens."""
    root = tmp_path_factory.mktemp("verify")
    models = {
        "model": tiny_models.trained_model(vocab=len(tiny_models.tokenizer()) + 13),
        "teacher": tiny_models.trained_model(seed=7, width=48, tied=False),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tiny_models.tokenizer().save_pretrained(root / name)
    tiny_models.tokenizer().save_pretrained(root / "marked")
    (root / "marked" / "chat_template.jinja").write_text(tiny_models.MARKED_TEMPLATE)
    chats = tiny_models.conversation_dataset(6).to_list()
    many: dict[str, Iterable[dict]] = {
        "chats": chats,
        "texts": tiny_models.text_dataset(6),
        "turns": tiny_models.message_dataset(6),
        "prompts": tiny_models.prompt_dataset(6),
        "weights": [{**row, "weight": 0.3 + number % 3} for number, row in enumerate(chats)],
        "sources": [{**row, "source": ("math", "chat")[number % 2]} for number, row in enumerate(chats)],
    }
    ids = [tiny_models.tokenizer()(text)["input_ids"][:24] for text in tiny_models.SENTENCES[:6]]
    critical = [[(place + number) % 3 == 0 for place in range(len(row))] for number, row in enumerate(ids)]
    many["critical"] = [
        {"input_ids": row, "labels": row, "critical": mask} for row, mask in zip(ids, critical, strict=True)
    ]
    for name, rows in many.items():
        (root / name).mkdir()
        (root / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model_name_or_path": str(root / "model"),
        "dataset_name": str(root / "chats"),
        "max_length": 128,
        "use_cpu": True,
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    return root


def verify(world: Path, capsys, **settings: Any) -> tuple[int, dict[str, Any]]:
    """(exit status, the JSON) of the command in this process."""
    words = [word for name, value in settings.items() for word in (f"--{name}", _flag(value))]
    capsys.readouterr()
    status = main(["verify", "--config", str(world / "config.yaml"), "--json", "-", *words])
    out = capsys.readouterr()
    return status, json.loads(out.out) if status != 2 else {"error": out.err}


def _flag(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, bool)) else str(value)


def statuses(made: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["status"] for check in made["checks"]}


def failed(made: dict[str, Any]) -> set[str]:
    return {name for name, status in statuses(made).items() if status == "fail"}


def taught_by(world: Path) -> dict[str, str]:
    return {"teacher_model_name_or_path": str(world / "teacher")}


# -- what is right passes ------------------------------------------------------------------------------------------

RIGHT: dict[str, Callable[[Path], dict[str, Any]]] = {
    "target-sft": lambda w: TARGET_SFT | taught_by(w),
    "kd at T = 2": lambda w: {"target": {"preset": "kd", "temperature": 2.0}} | taught_by(w),
    "sft on texts": lambda w: {"target": "sft", "dataset_name": w / "texts"},
    "dft with z_loss": lambda w: {"target": "dft", "z_loss": 0.02},
    "dft on plain prompts": lambda w: {"target": "dft", "dataset_name": w / "prompts"},
    "sft-kl": lambda w: {"target": "sft-kl"},
    "psft": lambda w: {"target": "psft"},
    "iw-sft, online": lambda w: {"target": "iw-sft", "weights": "online"},
    "iw-sft, a column": lambda w: {"target": "iw-sft", "dataset_name": w / "weights"},
    "cft, kept": lambda w: {"target": "cft", "dataset_name": w / "critical", "denominator": "kept"},
    "its own average": lambda w: TARGET_SFT | {"teacher_ema_decay": 0.9},
    "a context": lambda w: TARGET_SFT | taught_by(w) | {"teacher_context": "Think. {{ prompt }}"},
    "a pool": lambda w: TARGET_SFT | {"teachers": {str(w / "teacher"): 0.7, str(w / "model"): 0.3}},
    "by source": lambda w: (
        {
            "targets": {"math": {"preset": "target-sft", "eta": 0.5}, "chat": "gem"},
            "dataset_name": w / "sources",
        }
        | taught_by(w)
    ),
    "a schedule": lambda w: (
        {
            "target": {"preset": "target-sft", "eta": {"schedule": "linear", "from": 0, "to": 1, "steps": 10}},
            "max_steps": 10,
        }
        | taught_by(w)
    ),
    "lora": lambda w: {"target": "dft", "use_peft": True, "lora_target_modules": "all-linear"},
    "composed": lambda w: {"target": {"trust": "probability", "residual": {"uniform": {}}}},
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_passes(name, world, capsys):
    status, made = verify(world, capsys, **RIGHT[name](world))
    assert status == 0, made.get("error") or [c for c in made["checks"] if c["status"] == "fail"]
    assert made["passed"] and not failed(made)


def test_every_preset_and_divergence_passes(world, tmp_path, capsys):
    """A source each. Those that need a column are tried above."""
    targets = [name for name in ENTRIES if not qt.preset(name).requires & {"weight", "critical"}]
    targets += [{"preset": "kd", "divergence": name} for name in Divergence.known]
    targets += [{"preset": name, "direction": "reverse"} for name in ("sft-kl", "asft")]
    rows = tiny_models.conversation_dataset(len(targets)).to_list()
    lines = [json.dumps({**row, "source": f"s{number}"}) + "\n" for number, row in enumerate(rows)]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    sources = {f"s{number}": target for number, target in enumerate(targets)}
    settings = {"targets": sources, "dataset_name": tmp_path, "rows": len(targets)}
    status, made = verify(world, capsys, **settings, **taught_by(world))
    assert status == 0 and made["about"]["not_among_the_rows"] == [], made.get("error") or failed(made)
    formula = next(check for check in made["checks"] if check["name"] == FORMULA)
    assert {*ENTRIES} - {"iw-sft", "cft"} <= {name.split("(")[0] for name in formula["figures"]}


def test_two_rows_are_enough(world, capsys):
    status, made = verify(world, capsys, rows=2, **ALL_ROWS)
    assert status == 0 and statuses(made)[MICRO] == "pass", failed(made)


def test_every_source_is_looked_at(world, capsys):
    """Whichever comes first: some rows, and some tokens, of each target."""
    settings = {
        "targets": {"chat": {"preset": "target-sft", "eta": 0.9}, "math": "gem"},
        "dataset_name": world / "sources",
    }
    status, made = verify(world, capsys, rows=4, **settings, **taught_by(world))
    assert status == 0, failed(made)
    assert made["about"]["not_among_the_rows"] == []
    formula = next(check for check in made["checks"] if check["name"] == FORMULA)
    assert {name.split("(")[0] for name in formula["figures"] if "(" in name} == {"target-sft", "gem"}


def test_a_target_without_a_printed_loss_is_named(world, capsys):
    settings = {"targets": {"chat": "dft", "math": {"trust": 0.5}}, "dataset_name": world / "sources"}
    status, made = verify(world, capsys, rows=4, **settings)
    formula = next(check for check in made["checks"] if check["name"] == FORMULA)
    assert status == 0 and formula["status"] == "pass"
    assert re.fullmatch(r"dft: relative error \S+; composed has no printed loss", formula["told"])


@pytest.mark.parametrize("name", ENTRIES)
def test_the_limits_of_every_preset_can_be_built(name):
    assert "share 0 is sft" in [limit.name for limit in neighbours.limits(qt.preset(name))]


def test_nan_is_worse_than_any_error():
    from qtarget.verification.check import worst

    assert worst({"a": 1.0, "b": float("nan"), "c": 2.0}) == "b"
    assert worst({"a": float("nan"), "b": 2.0}) == "a"


def test_what_is_told_of_each_check(world, capsys):
    """Applicable where the run has what it is about, and with figures that were measured."""
    status, made = verify(world, capsys, **TARGET_SFT, **taught_by(world))
    assert status == 0 and made["about"]["rows"] == 6
    found = {check["name"]: check for check in made["checks"]}
    assert list(found) == NAMES
    assert {name for name, check in found.items() if check["status"] != "pass"} == {WORLD, REFERENCE, MEMORY}
    for name in (P_Q, FORMULA, STEP, MICRO, PADDING, FREE, PACKING, CHUNKS, NEIGHBOURS):
        assert 0 <= found[name]["figures"]["error"] < 1e-4, name
    assert found[PACKING]["figures"]["most_rows_in_a_sequence"] > 1
    assert found[PROMPT]["figures"]["tokens"] > 30 and found[ANSWER]["figures"]["tokens"] > 30
    assert found[END]["figures"]["answers"] == 6 and "<|im_end|>" in found[END]["told"]
    assert {"eta 0 is dft", "share 0 is sft"} < found[NEIGHBOURS]["figures"].keys()
    assert all(check["hint"] is None for check in found.values())


def test_a_cache_in_the_teachers_place(world, capsys):
    folder = a_cache(world, capsys)
    status, made = verify(world, capsys, **TARGET_SFT, **taught_by(world), teacher_cache=folder)
    assert status == 0, made
    (told,) = [check["told"] for check in made["checks"] if check["name"] == TEACHER]
    assert "have a place in the cache, 0 have none" in told


def a_cache(world: Path, capsys) -> Path:
    folder = world / "cache"
    if not folder.exists():
        words = ["cache", "build", "--config", str(world / "config.yaml"), "-o", str(folder), "--k", "8"]
        words += ["--target", json.dumps(TARGET_SFT["target"]), "--teacher_model_name_or_path", str(world / "teacher")]
        assert main(words) == 0, capsys.readouterr().err
    return folder


def test_masks_of_messages(world, capsys):
    """Assistant's turns by a template that marks them; and one that leaves the end of turn outside its marks."""
    settings = {"target": "sft", "dataset_name": world / "turns", "assistant_only_loss": True}
    good, bad = world / "marked" / "chat_template.jinja", world / "endless.jinja"
    bad.write_text(
        tiny_models.MARKED_TEMPLATE.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    )
    status, made = verify(world, capsys, **settings, chat_template_path=good)
    assert status == 0 and statuses(made)[PROMPT] == statuses(made)[END] == "pass", made
    status, made = verify(world, capsys, **settings, chat_template_path=bad)
    assert status == 1 and failed(made) == {END}
    (end,) = [check for check in made["checks"] if check["name"] == END]
    assert end["figures"]["untrained"] == end["figures"]["answers"] and "generation" in end["hint"]


# -- deliberate faults ---------------------------------------------------------------------------------------------


def missing_divisor(patch: pytest.MonkeyPatch) -> None:
    """The sum of the losses, divided by nothing."""
    patch.setattr(QTargetTrainer, "_get_num_items_in_batch", lambda *_: torch.tensor(1.0))


def padding_in_the_divisor(patch: pytest.MonkeyPatch) -> None:
    """Every position counts as a label."""

    def count(batches, *_):
        return torch.tensor(float(sum(batch["labels"][:, 1:].numel() for batch in batches)))

    patch.setattr(denominator, "count", count)


def mean_of_means(patch: pytest.MonkeyPatch) -> None:
    """Each micro-batch divided by its own labels, then averaged."""
    real = QTargetTrainer.compute_loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return real(self, model, inputs) / self.current_gradient_accumulation_steps

    patch.setattr(QTargetTrainer, "compute_loss", compute_loss)


def instead_of_the_loss(patch: pytest.MonkeyPatch, change: Callable[..., tuple[tuple, dict]]) -> None:
    real = forward.linear_target_loss

    def changed(*args, **kwargs):
        args, kwargs = change(args, kwargs)
        return real(*args, **kwargs)

    patch.setattr(forward, "linear_target_loss", changed)


def shifted_label(patch: pytest.MonkeyPatch) -> None:
    """Each token of an answer learns itself instead of the next."""

    def change(args, kwargs):
        hidden, weight, labels, target = args
        own = labels.roll(1, -1)
        labels = torch.where((labels != -100) & (own != -100), own, labels)
        return (hidden, weight, labels, target), kwargs

    instead_of_the_loss(patch, change)


def shifted_column(patch: pytest.MonkeyPatch) -> None:
    """A column that is not shifted with the labels."""
    real = forward.LossCall.__init__

    def made(self, targets, labels, columns, *more):
        real(self, targets, labels, {name: column.roll(1, -1) for name, column in columns.items()}, *more)

    patch.setattr(forward.LossCall, "__init__", made)


def wrong_detach(patch: pytest.MonkeyPatch) -> None:
    """dft's weight p_y with a gradient of its own."""
    real = forward.linear_target_loss

    def undetached(hidden, weight, labels, target, **given):
        out = real(hidden, weight, labels, target, **given)
        log_p = (hidden @ weight.T).log_softmax(-1)
        nll = -log_p.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        loss = ((-nll).exp() * nll)[labels != -100].sum() / given["num_items"]
        return type(out)(loss, out.stats)

    patch.setattr(forward, "linear_target_loss", undetached)


def dropped_tail(patch: pytest.MonkeyPatch) -> None:
    """A cached teacher without the mass outside its k tokens."""
    patch.setattr(heads.TopK, "log_tail", lambda self: torch.full_like(self.logprobs[..., 0], -50.0))


def padded_rows_of_the_head(patch: pytest.MonkeyPatch) -> None:
    """Rows of the head that stand for no token counted as tokens."""
    real = forward.LossCall.__init__

    def made(self, targets, labels, columns, others, vocab_size, *more):
        real(self, targets, labels, columns, others, None, *more)

    patch.setattr(forward.LossCall, "__init__", made)


def relabelled(patch: pytest.MonkeyPatch, change: Callable[[list[int], list[int]], list[int]]) -> None:
    real = preparation.Preparation.__call__

    def prepare(self, dataset, name, report):
        if "seq_lengths" not in dataset.column_names and not self.packing:
            dataset = dataset.map(lambda row: {"labels": change(row["input_ids"], row["labels"])})
        return real(self, dataset, name, report)

    patch.setattr(preparation.Preparation, "__call__", prepare)


def prompt_in_the_loss(patch: pytest.MonkeyPatch) -> None:
    """Every token of a row is a label."""
    relabelled(patch, lambda ids, labels: ids)


def end_token_lost(patch: pytest.MonkeyPatch) -> None:
    """The end of turn has no label."""
    end = tiny_models.tokenizer().eos_token_id
    relabelled(patch, lambda ids, labels: [-100 if label == end else label for label in labels])


def answer_cut_short(patch: pytest.MonkeyPatch) -> None:
    """The first token of each answer counted with the prompt."""

    def change(ids, labels):
        first = next(place for place, label in enumerate(labels) if label != -100)
        return [-100 if place == first else label for place, label in enumerate(labels)]

    relabelled(patch, change)


def labels_moved_by_the_collator(patch: pytest.MonkeyPatch) -> None:
    """Labels shifted once in the batch, and once more in the loss."""
    real = TokenColumnCollator.__call__

    def collate(self, examples):
        batch = real(self, examples)
        batch["labels"] = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        return batch

    patch.setattr(TokenColumnCollator, "__call__", collate)


def other_ids(patch: pytest.MonkeyPatch, role: str) -> None:
    real = AuxiliaryModels.ask

    def ask(self, student, batch, of):
        if role in of:
            inputs = batch.inputs | {"input_ids": batch.inputs["input_ids"].roll(-1, -1)}
            batch = dataclasses.replace(batch, inputs=inputs)
        return real(self, student, batch, of)

    patch.setattr(AuxiliaryModels, "ask", ask)


def a_teacher_that_reads_on(patch: pytest.MonkeyPatch) -> None:
    """A teacher that reads the ids of the next position."""
    other_ids(patch, "teacher")


def a_reference_that_reads_on(patch: pytest.MonkeyPatch) -> None:
    """A reference that reads the ids of the next position."""
    other_ids(patch, "reference")


def documents_that_see_each_other(patch: pytest.MonkeyPatch) -> None:
    """Positions that go on from one document of a line to the next."""
    real = QTargetTrainer._prepare_inputs

    def prepare(self, inputs):
        inputs = real(self, inputs)
        if "position_ids" in inputs:
            inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
        return inputs

    patch.setattr(QTargetTrainer, "_prepare_inputs", prepare)


def padding_that_is_read(patch: pytest.MonkeyPatch) -> None:
    """Every row moved to the end of the batch by padding that the mask does not take out."""
    real = QTargetTrainer._prepare_inputs

    def prepare(self, inputs):
        inputs = real(self, inputs)
        if "attention_mask" in inputs:
            extra = (inputs["attention_mask"] == 0).sum(1).min()
            for name in ("input_ids", "labels"):
                inputs[name] = inputs[name].roll(int(extra), 1)
            inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        return inputs

    patch.setattr(QTargetTrainer, "_prepare_inputs", prepare)


def temperature_once(patch: pytest.MonkeyPatch) -> None:
    """kd's T² taken as T: the factor of both residuals is 1."""
    real = teachers.Target

    def target(trust, residual, **more):
        residual = (
            [(factor / abs(factor), pool) for factor, pool in residual] if isinstance(residual, list) else residual
        )
        return real(trust=trust, residual=residual, **more)

    patch.setattr(teachers, "Target", target)


def eta_never_0(patch: pytest.MonkeyPatch) -> None:
    """A floor under eta that the run's own eta does not meet."""
    real = teachers.residual.guided
    patch.setattr(teachers.residual, "guided", lambda eta, temperature: real(max(eta, 0.2), temperature))


def last_chunk_alone(patch: pytest.MonkeyPatch) -> None:
    """Each chunk's gradient of the head written over that of the one before."""
    real = matmuls.WeightGradient.add

    def add(self, *args):
        self.written = False
        real(self, *args)

    patch.setattr(matmuls.WeightGradient, "add", add)


def logits_in_bf16(patch: pytest.MonkeyPatch) -> None:
    """Logits of a half-precision head rounded to its dtype."""
    real = matmuls.HeadMatmuls.logits

    def logits(self, h, out):
        real(self, h, out)
        if self.weight.dtype == torch.bfloat16:
            out.copy_(out.bfloat16())

    patch.setattr(matmuls.HeadMatmuls, "logits", logits)


def states_that_are_scaled(patch: pytest.MonkeyPatch) -> None:
    """Other hidden states than those the head was made for."""
    real = forward.LossCall.__call__
    patch.setattr(forward.LossCall, "__call__", lambda self, hidden, *more: real(self, hidden * 1.1, *more))


LOSS = {P_Q, STEP}
MUTANTS: list[tuple[Callable[[pytest.MonkeyPatch], None], dict[str, Any], set[str]]] = [
    (missing_divisor, ALL_ROWS, LOSS),
    (padding_in_the_divisor, ALL_ROWS, LOSS | {MICRO, PADDING, FREE, PACKING}),
    (mean_of_means, ALL_ROWS, {MICRO, PACKING}),
    (shifted_label, ALL_ROWS, LOSS),
    (shifted_column, {"target": "cft", "dataset_name": "critical"}, LOSS),
    (wrong_detach, ALL_ROWS, LOSS),
    (dropped_tail, TARGET_SFT | {"teacher": True, "cached": True}, LOSS | {FORMULA, BF16}),
    (padded_rows_of_the_head, {"target": {"preset": "label-smoothing", "smoothing": 0.3}}, LOSS),
    (prompt_in_the_loss, ALL_ROWS, {PROMPT}),
    (end_token_lost, ALL_ROWS, {END}),
    (answer_cut_short, ALL_ROWS, {ANSWER}),
    (labels_moved_by_the_collator, ALL_ROWS, {IN_PLACE, STEP}),
    (a_teacher_that_reads_on, TARGET_SFT | {"teacher": True}, LOSS | {FORMULA, TEACHER}),
    (a_reference_that_reads_on, {"target": {"preset": "sft-kl", "kl_weight": 1.0}}, LOSS | {FORMULA, REFERENCE}),
    (documents_that_see_each_other, ALL_ROWS, {FREE, PACKING}),
    (padding_that_is_read, ALL_ROWS, {PADDING}),
    (temperature_once, {"target": {"preset": "kd", "temperature": 2.0}, "teacher": True}, {FORMULA}),
    (eta_never_0, TARGET_SFT | {"teacher": True}, {NEIGHBOURS}),
    (last_chunk_alone, ALL_ROWS, {CHUNKS}),
    (logits_in_bf16, ALL_ROWS, {BF16}),
    (states_that_are_scaled, ALL_ROWS, LOSS),
]


@pytest.mark.parametrize(("mutant", "settings", "caught_by"), MUTANTS, ids=[m.__name__ for m, _, _ in MUTANTS])
def test_a_deliberate_fault_is_caught(mutant, settings, caught_by, world, capsys, monkeypatch):
    """By these checks and by no other, so that they tell where to look."""
    settings = dict(settings)
    if settings.pop("teacher", False):
        settings |= taught_by(world)
    if settings.pop("cached", False):
        settings["teacher_cache"] = a_cache(world, capsys)
    if "dataset_name" in settings:
        settings["dataset_name"] = world / settings["dataset_name"]
    mutant(monkeypatch)
    status, made = verify(world, capsys, **settings)
    assert status == 1
    assert failed(made) == caught_by
    assert all(check["hint"] for check in made["checks"] if check["status"] == "fail")


# -- memory --------------------------------------------------------------------------------------------------------


def wide(folder: Path) -> Subject:
    """A step whose largest part is its logits: 20,000 of them a token."""
    data = tiny_models.conversation_dataset(8)
    made = quick_runs.quick_trainer(tiny_models.llama(vocab=20_000), folder, data, target="dft")
    return Subject(made, data.to_list())


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="a process tells its high-water mark on Linux only"
)
def test_memory_is_measured_and_held_against_the_estimate(tmp_path, monkeypatch):
    """Measured to the tenth; a loss that keeps whole logits is over the estimate of one that does not."""
    with peak.watched(torch.device("cpu")) as allocated:
        block = torch.ones(50 << 20)
        del block
    assert allocated.bytes == pytest.approx(200 << 20, rel=0.1)

    monkeypatch.setattr(buffers, "workspace", Scratch)  # or earlier tests would have made the buffers
    monkeypatch.setattr(resources, "_LEAST", 0)
    subject = wide(tmp_path)
    measured = subject.step.bytes
    for estimate, status in (
        (lambda *_: measured, "pass"),
        (lambda *_: measured // 3, "fail"),
        (lambda *_: measured * 3, "fail"),
        (lambda *_: None, "not applicable"),
        (None, "not applicable"),
    ):
        subject.estimate = estimate
        assert resources.memory.run(subject).status == status
    wrong_detach(monkeypatch)  # it forms whole logits too
    mutant = wide(tmp_path)
    mutant.estimate = lambda *_: measured
    assert resources.memory.run(mutant).status == "fail"


# -- the command ---------------------------------------------------------------------------------------------------


def command(
    *words: object, launcher: tuple[str, ...] = ("-m", "qtarget"), cwd: Path | None = None
) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *launcher, *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cwd,
        timeout=900,
    )


def test_the_command(world, tmp_path):
    """A table with a line for each check, the figures in a file; nothing else is written."""
    before, here = sorted(world.rglob("*")), tmp_path / "here"
    here.mkdir()
    out = tmp_path / "figures.json"
    done = command(
        "verify", "--config", world / "config.yaml", "--target", "dft", "--json", out, "--rows", "4", cwd=here
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(any(line.startswith(name) for line in lines) for name in NAMES)
    assert f"{len(NAMES) - 4} pass, 0 fail, 4 not applicable" in lines
    assert json.loads(out.read_text())["about"]["rows"] == 4
    assert sorted(world.rglob("*")) == before and not [*here.iterdir()]


def test_two_processes(world, tmp_path):
    """The gradient of two processes is that of one; and where it is not, this is the check that says so."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    words = ["--config", world / "config.yaml", "--target", "dft"]
    done = command(tmp_path, *words, launcher=(*torchrun, str(HERE / "verify_processes.py")))
    assert done.returncode == 0, done.stderr[-4000:]
    made = {
        name: json.loads((tmp_path / f"{name}.json").read_text())
        for name in ("right", "not_together", "own_labels_only")
    }
    assert made["right"]["passed"] and statuses(made["right"])[WORLD] == "pass"
    assert made["right"]["about"]["processes"] == 2
    assert failed(made["not_together"]) == {WORLD}
    assert failed(made["own_labels_only"]) == {P_Q, STEP, WORLD}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rows", "0"], "rows is 0; use a whole number from 1"),
        (["--rows", "some"], "rows is 'some'; use a whole number from 1"),
        (["--json", "/nowhere/at/all.json"], "json is '/nowhere/at/all.json', which cannot be written"),
        (["--target", "dtf"], "'dtf'"),
        (["--target", "kd"], "needs a teacher and got none"),
        (["--model_name_or_path", "/nowhere"], "model_name_or_path is '/nowhere'"),
        (["--rowz", "3"], "rowz"),
    ],
)
def test_bad_input_gets_one_sentence(words, sentence, world, capsys):
    capsys.readouterr()
    assert main(["verify", "--config", str(world / "config.yaml"), *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qtarget verify: ")]
    assert sentence in line


def test_a_sharding_engine_is_refused(world, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(["verify", "--config", str(world / "config.yaml")]) == 2
    assert "FSDP is on, but verify compares whole gradients" in capsys.readouterr().err


def test_the_documentation_lists_the_faults():
    lines = ["| fault | caught by |", "|---|---|"]
    for mutant, _, caught_by in MUTANTS:
        what = " ".join((mutant.__doc__ or "").rstrip(".").split())
        lines.append(f"| {what} | {', '.join(name for name in NAMES if name in caught_by)} |")
    text = (Path(__file__).parents[2] / "docs" / "verify.md").read_text()
    shown = text.split("<!-- mutants: checked by test_verify.py -->\n")[1].split("<!-- end of mutants -->")[0]
    assert shown.splitlines() == lines
    assert all(f"| {name} |" in text for name in NAMES)


def test_help(capsys):
    assert main(["verify", "--help"]) == 0
    told = capsys.readouterr().out
    assert "--rows" in told and "--json" in told and "Exit status" in told
    assert main(["--help"]) == 0
    assert "qtarget verify --config FILE" in capsys.readouterr().out
