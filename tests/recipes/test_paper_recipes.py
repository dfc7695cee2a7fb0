"""recipes/paper: ten files of four targets each, checked by the dry run, and what a dry run refuses."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset

import qtarget as qt
import quick_runs
import tiny_models
from hub_configs import CONFIGS
from qtarget import QTargetTrainer
from qtarget.cli import __main__ as cli
from qtarget.cli import recipe
from qtarget.planning import memory, shapes, steps

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "paper"
FILES = sorted(FOLDER.glob("*.yaml"))
STEPS = {"numina-67k": 264, "openr1-15k": 58, "m23k": 91}
ARMS = ("sft", "dft", "kd", "target-sft")


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"paper_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look a class up
    spec.loader.exec_module(module)
    return module


prepare = script("prepare")


def dry_run(file: Path, *flags: str) -> tuple[int, str, str]:
    """(exit status, output, errors) of ``qtarget train --config file --dry_run``."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(["train", "--config", str(file), "--dry_run", *map(str, flags)])
    return status, " ".join(out.getvalue().split()), err.getvalue()


def values(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def changed(folder: Path, file: Path, **fields: Any) -> Path:
    """A recipe with other values; None takes a field out. No comment is left in it."""
    recipe = {name: value for name, value in (values(file) | fields).items() if value is not None}
    changed = folder / file.name
    changed.write_text(yaml.safe_dump(recipe))
    return changed


@pytest.fixture(scope="module")
def answers(hub_configs) -> dict[tuple[str, str], tuple[int, str, str]]:
    return {(file.stem, arm): dry_run(file, "--target", arm) for file in FILES for arm in ARMS}


# -- the ten -----------------------------------------------------------------------------------------------------


def test_ten_settings():
    assert len(FILES) == 10 and {file.stem.split("_")[0] for file in FILES} == set(STEPS)
    assert all(values(file)["name"] == file.stem for file in FILES)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_dry_run_passes(file, arm, answers):
    data, _ = file.stem.split("_")
    status, said, errors = answers[file.stem, arm]
    assert (status, errors) == (0, "")
    micro, accumulation = (16, 2) if data == "m23k" else (4, 8)
    assert f"8 GPUs x {micro} rows x {accumulation} accumulations = 256 rows a step" in said
    assert f"steps {STEPS[data]}, {STEPS[data] // 10} of them warm-up" in said
    assert f"has {STEPS[data]} whole steps" in said
    assert said.count("FSDP2") == 1 and "its shape is not known" not in said
    assert f"target {arm}" in said and (" teacher " in said.partition(" data ")[0]) == (arm in ("kd", "target-sft"))
    assert "to pin model_revision, teacher_model_revision, dataset_source_revision: " in said
    assert "by flag: target" in said and "target.eta" not in said
    assert "the seeds, and how many runs" in said
    assert not Path(values(file)["output_dir"]).exists()


def test_the_file_alone_is_target_sft():
    status, said, errors = dry_run(FILES[0])
    assert (status, errors) == (0, "")
    assert "target target-sft(eta=0.5, teacher_temperature=1.0)" in said
    assert "target.eta, target.teacher_temperature" in said and "by flag" not in said


def test_kd_and_target_sft_by_name_are_those_of_the_comment():
    text = FILES[0].read_text(encoding="utf-8")
    assert "at temperature 1\n" in text and "with eta 0.5 and the teacher's temperature 1" in text
    assert qt.preset("kd").to_config() == qt.preset("kd", temperature=1.0).to_config()
    assert qt.preset("target-sft").to_config() == qt.Target.from_config(values(FILES[0])["target"]).to_config()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_field_says_where_it_comes_from(file):
    fields = values(file)
    entries = recipe.provenance(file.read_text(encoding="utf-8"))
    assert set(fields) - {"name", "unknown"} == {name.split(".")[0] for name in entries}
    for whole in ("target", "dataset_source_columns"):
        assert {f"{whole}.{part}" for part in fields[whole]} <= set(entries)
    for name in ("seed", "denominator", "teacher_model_name_or_path", "target.eta"):
        assert entries[name].startswith("ours"), name
    assert entries["target.preset"] == "published"


def test_origins_are_comments_behind_a_value():
    text = """\
# ours: this line is a heading
seed: 1            # ours
bf16: "a # b"   # published: with a # in it
target: {preset: kd}  #borrowed from m1: so
learning_rate: 1   # a note
unknown: # ours
  - a   # ours
packing:
  deep: true   # published
  deeper:
    deepest: true   # published
adam_beta1: 0.9
  # ours
max_steps: &a 1   # ours
save_steps: *a
name: oursome   # oursome
report_to: none   # ours"""
    assert recipe.provenance(text) == {
        "seed": "ours",
        "bf16": "published: with a # in it",
        "target": "borrowed from m1: so",
        "packing.deep": "published",
        "max_steps": "ours",
        "report_to": "ours",
    }
    assert recipe.provenance(text.replace("\n", "\r\n")) == recipe.provenance(text)
    assert recipe.provenance("") == recipe.provenance("- 1   # ours") == {}


def test_no_commit_is_made_up():
    for file in FILES:
        fields = values(file)
        revisions = {name for name in fields if name.endswith("revision")}
        assert {fields[name] for name in revisions} == {"main"}
        assert set(recipe.to_pin(fields)) == revisions


def test_a_revision_that_was_looked_up_is_no_longer_to_pin():
    _, said, _ = dry_run(FILES[0], "--model_revision", "0" * 40)
    assert "to pin teacher_model_revision, dataset_source_revision: they name branches" in said


# -- what is refused ---------------------------------------------------------------------------------------------

MATH, MEDICINE = FOLDER / "numina-67k_qwen2.5-math-1.5b.yaml", FOLDER / "m23k_llama-3.2-3b.yaml"
REFUSED: dict[str, tuple[Path, dict[str, Any], list[str], str]] = {
    "another number of GPUs": (
        MATH,
        {},
        ["--gpus", "4"],
        "8 accumulations is 128; set gradient_accumulation_steps: 16",
    ),
    "an odd number of GPUs": (MATH, {}, ["--gpus", "3"], "256 is not a multiple of 3 x 4"),
    "no number of GPUs": (MATH, {}, ["--gpus", "many"], "gpus is 'many'; use a whole number from 1"),
    "another accumulation": (
        MATH,
        {"gradient_accumulation_steps": 7},
        [],
        "is 224; set gradient_accumulation_steps: 8",
    ),
    "other steps": (
        MATH,
        {"max_steps": 265},
        [],
        "max_steps is 265, but 1 epoch of 67600 rows are 264 whole steps of 256",
    ),
    "other rows": (MATH, {"expected_rows": 60000}, [], "are 234 whole steps of 256; set max_steps: 234"),
    "hardly any rows": (MATH, {"expected_rows": 20}, [], "fewer than a step's 256"),
    "rows in words": (MATH, {"expected_rows": "67k"}, [], "expected_rows is '67k'; use a whole number: rows of the"),
    "no rows": (MATH, {"expected_rows": 0}, [], "expected_rows is 0; use a number from 1"),
    "text in a list": (MATH, {"unknown": [["the seeds"]]}, [], "unknown holds ['the seeds']; write text there"),
    "an unknown field": (MATH, {"learning_rat": 1}, [], "'learning_rat'; did you mean learning_rate?"),
    "a note as a flag": (MATH, {}, ["--expected_rows", "5"], "unknown flag: --expected_rows"),
    "no teacher": (MEDICINE, {"teacher_model_name_or_path": None}, [], "needs a teacher and got none"),
    "no such folder": (
        MATH,
        {"model_name_or_path": "./build/no/model"},
        [],
        "which is not a folder here; create it, or name",
    ),
    "no such target": (MATH, {}, ["--target", "dtf"], "target is 'dtf'; did you mean 'dft'?"),
    "columns": (MATH, {"dataset_source_columns": {"question": "a"}}, [], "names question; name prompt and completion"),
    "prompt": (
        MATH,
        {"dataset_source_prompt": "plain"},
        [],
        "dataset_source_prompt is 'plain'; use chat_template or as_is",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_contradiction_is_a_sentence(name, tmp_path):
    file, fields, flags, sentence = REFUSED[name]
    status, said, errors = dry_run(changed(tmp_path, file, **fields), *flags)
    assert status == 2
    assert said == ""
    assert sentence in errors, errors
    assert len(errors.splitlines()) == 1, errors


def test_gpus_belongs_to_the_dry_run(capsys):
    assert cli.main(["train", "--config", str(MATH), "--gpus", "4"]) == 2
    assert "gpus is '4' without --dry_run" in capsys.readouterr().err


# -- arithmetic --------------------------------------------------------------------------------------------------


def settings_of(micro: int, accumulation: int, drop: bool, epochs: float = 1, max_steps: int = -1) -> SimpleNamespace:
    return SimpleNamespace(
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        dataloader_drop_last=drop,
        num_train_epochs=epochs,
        max_steps=max_steps,
    )


@pytest.mark.parametrize("rows", [1, 5, 8, 9, 15, 16, 17, 31])
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_steps_are_those_the_trainer_takes(rows, drop, accumulation, tmp_path):
    """Of one process, asked of a real trainer."""
    data = Dataset.from_dict({"input_ids": [[5, 6, 7]] * rows, "labels": [[5, 6, 7]] * rows})
    settings = dict(per_device_train_batch_size=2, gradient_accumulation_steps=accumulation, dataloader_drop_last=drop)
    made = quick_runs.quick_trainer(tiny_models.llama(), tmp_path, data, max_steps=-1, num_train_epochs=2, **settings)
    loader = made.get_train_dataloader()
    counted = steps.planned(rows, 1, made.args)
    if rows == 1 and drop:
        assert counted.per_epoch == 0
        return
    told = made.set_initial_training_values(made.args, loader)
    assert (counted.per_epoch, counted.total) == (told[1], told[-1])
    sizes = [len(batch["input_ids"]) for batch in loader]
    of_a_step = [sum(sizes[i : i + accumulation]) for i in range(0, len(sizes), accumulation)]
    assert of_a_step == [counted.batch] * counted.whole + [counted.short] * bool(counted.short)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("rows", [64, 65, 79, 80, 95, 96, 127, 128, 150])
def test_steps_on_several_processes_are_those_of_accelerates_sampler(rows, drop):
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler, SequentialSampler

    gpus, micro, accumulation = 4, 4, 2
    sampler = BatchSampler(SequentialSampler(range(rows)), micro, drop)
    each = len(list(BatchSamplerShard(sampler, gpus, 0)))
    counted = steps.planned(rows, gpus, settings_of(micro, accumulation, drop))
    assert counted.per_epoch == max(-(-each // accumulation), 0)
    assert counted.whole <= rows // counted.batch


@pytest.mark.parametrize(("data", "per_epoch"), [("numina-67k", 264), ("openr1-15k", 59), ("m23k", 92)])
def test_an_epoch_alone_is_not_the_published_steps(data, per_epoch, tmp_path):
    """Without max_steps the trainer would take a last step of fewer rows, which the relatives drop."""
    file = next(file for file in FILES if file.stem.startswith(data))
    _, said, _ = dry_run(changed(tmp_path, file, max_steps=None))
    assert f"steps {per_epoch}, " in said


# -- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen/Qwen2.5-7B", 7.61),
        ("Qwen/Qwen2.5-14B-Instruct", 14.7),
        ("Qwen/Qwen2.5-Math-72B-Instruct", 72.7),
        ("Qwen/Qwen3-8B", 8.2),
        ("meta-llama/Llama-3.1-8B", 8.03),
        ("meta-llama/Llama-3.1-70B-Instruct", 70.6),
    ],
)
def test_parameters_are_those_of_the_model_cards(name, billions, hub_configs):
    assert shapes.find("model", name).parameters / 1e9 == pytest.approx(billions, rel=6e-3)


def test_every_model_of_a_recipe_has_a_config_here():
    fields = [values(file) for file in FILES]
    named = {f[name] for f in fields for name in ("model_name_or_path", "teacher_model_name_or_path")}
    assert named <= set(CONFIGS)


def test_without_a_config_the_steps_are_there_and_memory_says_why_it_is_not(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    status, said, errors = dry_run(MATH, "--target", "kd")
    assert (status, errors) == (0, "")
    assert "steps 264, 26 of them warm-up" in said and "FSDP2" not in said
    assert (
        "memory not known, because the shape of Qwen/Qwen2.5-Math-1.5B, Qwen/Qwen2.5-Math-7B-Instruct is unknown: its "
        in said
    )
    assert "its config.json is not here, and the hub does not answer; name a folder" in said


def test_frozen_models_are_counted_as_they_are_loaded():
    half, unknown = (shapes.Shape(2, 4, 8, 2, 1, 2, 10, True, dtype=dtype) for dtype in ("bfloat16", None))
    whole = shapes.Shape(2, 4, 8, 2, 1, 2, 10, True, dtype="float32")
    for kwargs, shape, cpu, size in [
        (None, half, False, 2),
        ({}, whole, False, 4),
        (None, half, True, 4),
        ({"dtype": "auto"}, whole, True, 4),
        ({"dtype": "bfloat16"}, whole, True, 2),
        ({"dtype": torch.float32}, half, False, 4),
        ({"dtype": torch.float16}, whole, False, 2),
        (None, unknown, False, 2),
        (None, None, False, 2),
    ]:
        assert shapes.frozen_bytes(kwargs, shape, cpu) == size, (kwargs, shape, cpu)


@pytest.mark.parametrize("role", ["teacher", "reference"])
def test_a_teacher_or_reference_without_dtype_takes_what_its_checkpoint_takes(role, tmp_path, hub_configs):
    """On accelerators; recipes leave use_cpu out."""

    def memory_of(**fields):
        told = dry_run(changed(tmp_path, MATH, **fields))[1]
        return re.findall(r"(?:DDP|ZeRO-2|FSDP2) [\d. ]+", told)

    named = (
        {"target": "kd"}
        if role == "teacher"
        else {"target": "sft-kl", "reference_model_name_or_path": "Qwen/Qwen2.5-7B"}
    )
    kwargs = f"{role}_model_init_kwargs"
    without, half, whole = (
        memory_of(**named, **{kwargs: given}) for given in (None, {"dtype": "bfloat16"}, {"dtype": "float32"})
    )
    assert len(without) == 3 and without == half != whole


def test_a_hand_worked_estimate():
    shape = shapes.Shape(2, 4, 8, 2, 1, 2, 10, True)  # layer: 4·2·(4 + 2) + 3·4·8 + 8 = 152; root: 40 + 4
    assert (shape.layer_parameters, shape.root_parameters, shape.parameters) == (152, 44, 348)
    work = memory.Workload(shape, 2, 6)
    ddp, fsdp2 = memory.estimate(work, "ddp"), memory.estimate(work, "fsdp2")
    assert [ddp[part] for part in ("weights", "gradients", "optimiser")] == [6 * 348, 8 * 348, 8 * 348]
    assert [fsdp2[part] for part in ("weights", "gradients", "optimiser")] == [2 * 348, 2 * 348, 4 * 348]
    assert fsdp2["gathered"] == 4 * 44 + 6 * 152
    attention, ffn = 2 * (2 + 2) * 2, 4 * 8  # sdpa lays out keys for each of two heads
    layer = 6 * (16 * 4 + 2 * (attention + ffn))  # bf16: norms keep float32, bf16, bf16
    passing, last = 3 * 6 * 2 * 8, 3 * 6 * 2 * 4
    assert fsdp2["activations"] == 6 * 2 * 2 * 4 + layer + last + passing
    autocast = 6 * (26 * 4 + 2 * (attention + ffn))  # float32 norms, a bf16 copy for each of five products
    assert ddp["activations"] == 6 * 4 * 2 * 4 + autocast + 2 * last + passing


# -- with a model and rows at hand ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def at_hand(tmp_path_factory) -> Path:
    """A config whose model, teacher and data are folders."""
    root = tmp_path_factory.mktemp("at_hand")
    for name, extra in (("model", ""), ("stranger", "zebra quagga ")):
        tiny_models.llama().save_pretrained(root / name)
        tiny_models.tokenizer(extra=extra).save_pretrained(root / name)
    (root / "data").mkdir()
    rows = tiny_models.conversation_dataset(8).to_list()
    (root / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model_name_or_path": str(root / "model"),
        "teacher_model_name_or_path": str(root / "model"),
        "target": "target-sft",
        "dataset_name": str(root / "data"),
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "output_dir": str(root / "run"),
    }
    (root / "config.yaml").write_text(yaml.safe_dump(settings))
    return root


def test_rows_and_shapes_are_read_from_what_is_there(at_hand):
    before = sorted(at_hand.rglob("*"))
    status, said, errors = dry_run(at_hand / "config.yaml", "--gpus", "1")
    assert (status, errors) == (0, "")
    assert f"{sum(p.numel() for p in tiny_models.llama().parameters()) / 1e9:.2f} billion parameters" in said
    assert "8 rows with prompt, completion" in said
    assert "steps 4, 0 of them warm-up" in said
    assert sorted(at_hand.rglob("*")) == before


@pytest.mark.parametrize(
    "file",
    [*FILES, ROOT / "recipes" / "quickstart.yaml", ROOT / "recipes" / "scale" / "8b_from_32b.yaml"],
    ids=lambda file: file.stem,
)
def test_every_recipe_shows_what_it_trains_where_its_models_and_rows_are_here(file, at_hand, tmp_path):
    tiny_models.conversation_dataset(512).to_json(tmp_path / "train.jsonl")
    words = [
        "--dataset_name",
        tmp_path,
        "--output_dir",
        tmp_path / "run",
        "--model_revision",
        "main",
        "--max_steps",
        "2",
    ]
    for name in ("--model_name_or_path", "--teacher_model_name_or_path"):
        words += [name, at_hand / "model"]
    status, said, errors = dry_run(file, *words)
    assert status == 0, errors
    assert "rows read the first 256" in said and "in 256 rows by role prompt 0 of" in said
    assert "ends with <|im_end|> in 256 of 256 rows; generation stops at it" in said
    assert "«A box holds 12<|im_end|>" in said


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--teacher_model_name_or_path", "ROOT/stranger"], "which has another tokenizer: id "),
        (["--target", "iw-sft"], "needs weights, but the train dataset has no column 'weight'"),
        (["--max_steps", "5"], "max_steps is 5, but 1 epoch of 8 rows are 4 whole steps of 2"),
        (["--model_name_or_path", "ROOT/data"], "whose config cannot be read"),
        (["--dataset_name", "ROOT/nowhere"], "which is not a folder or file here"),
    ],
    ids=lambda value: str(value).split("'")[1] if isinstance(value, list) else "",
)
def test_what_is_there_is_checked(flags, sentence, at_hand):
    words = [word.replace("ROOT", str(at_hand)) for word in flags]
    status, _, errors = dry_run(at_hand / "config.yaml", "--gpus", "1", *words)
    assert status == 2
    assert sentence in errors and len(errors.splitlines()) == 1, errors


def test_notes_are_kept_beside_the_model(at_hand, tmp_path, capsys):
    recipe = yaml.safe_load((at_hand / "config.yaml").read_text()) | {
        "target": "sft",
        "teacher_model_name_or_path": None,
    }
    recipe = {name: value for name, value in recipe.items() if value is not None}
    text = yaml.safe_dump(recipe | {"name": "small", "expected_rows": 8}).replace(
        "target: sft", "target: sft  # ours: so"
    )
    (tmp_path / "small.yaml").write_text(text)
    words = ["--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--gradient_checkpointing", "false"]
    assert cli.main(["train", "--config", str(tmp_path / "small.yaml"), *words]) == 0
    kept = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert (kept["name"], kept["expected_rows"], kept["provenance"]) == ("small", 8, {"target": "ours: so"})
    assert kept["flags"]["max_steps"] == 1


# -- the relatives' gradients --------------------------------------------------------------------------------------


class Recording(QTargetTrainer):
    """Keeps the micro-batches it was given."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.seen = [*getattr(self, "seen", []), {name: value.clone() for name, value in inputs.items()}]
        return super().training_step(model, inputs, *args, **kwargs)


def token_losses(target: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    p = logits.softmax(-1).gather(-1, labels.unsqueeze(-1))
    return -p.log() if target == "sft" else 1 - p  # the relatives' way to write dft's gradient


@pytest.mark.parametrize("with_flags", [True, False], ids=["with the flags", "without"])
@pytest.mark.parametrize(("target", "limit"), [("sft", 1.0), ("dft", 0.05), ("dft", 0.5)])
def test_summed_gradients_are_the_flags_of_the_recipe(target, limit, with_flags, tmp_path):
    """The relatives' step by plain autograd: the mean of each micro-batch is back-propagated, the gradients add up, their
    norm is clipped, AdamW steps. With the flags the weights come out the same. Without them they do not, unless the clip
    acts in every step of both (here sft): then AdamW divides the factor out. At the last limit the first step is not
    clipped.
    """
    micro_batches, optimizer_steps = 4, 3
    factor = micro_batches if with_flags else 1
    made = quick_runs.quick_trainer(
        tiny_models.llama().double(),
        tmp_path,
        tiny_models.conversation_dataset(8),
        kind=Recording,
        target=target,
        denominator="micro_batch",
        max_grad_norm=limit / factor,
        adam_epsilon=1e-8 / factor,
        max_steps=optimizer_steps,
        gradient_accumulation_steps=micro_batches,
        per_device_train_batch_size=2,
        **dict(adam_beta1=0.9, adam_beta2=0.95, weight_decay=0.01, learning_rate=1e-2, optim="adamw_torch"),
    )
    before = quick_runs.copied_weights(made.model)
    made.train()

    relative = tiny_models.llama().double()
    # Transformers leaves norms out of weight decay, the relatives do not: told apart here, that is not what is shown.
    decayed = [(name, p) for name, p in relative.named_parameters() if "norm" not in name]
    norms = [(name, p) for name, p in relative.named_parameters() if "norm" in name]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    clipped = []
    for begin in range(0, len(made.seen), micro_batches):
        optimizer.zero_grad()
        for batch in made.seen[begin : begin + micro_batches]:
            logits = relative(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            kept = labels != -100
            token_losses(target, logits[kept], labels[kept]).mean().backward()
        clipped.append(bool(torch.nn.utils.clip_grad_norm_(relative.parameters(), limit) > limit))
        optimizer.step()
    assert len(clipped) == optimizer_steps and clipped[1:] == [True, True] and clipped[0] == (limit != 0.5)
    error, _ = quick_runs.largest_difference(
        quick_runs.weight_change(before, made.model), quick_runs.weight_change(before, relative)
    )
    if with_flags:
        assert error < 1e-4  # torch adds 1e-6 to a norm before it divides by it
    else:
        assert (error > 1e-3) == (target == "dft")


def relatives(file: Path) -> str:
    """The flags that a recipe's head gives for the relatives' steps."""
    written = re.search(r"^#     (--denominator .*)$", file.read_text(), re.M)
    assert written is not None
    return written[1]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_flags_stand_in_the_recipe_and_pass(file):
    flags = relatives(file).split()
    fields = values(file)
    factor = fields["expected_batch"] // 2 // fields["per_device_train_batch_size"]
    assert float(flags[3]) == 1 / factor and float(flags[5]) == pytest.approx(1e-8 / factor)
    status, said, _ = dry_run(file, *flags)
    assert status == 0
    assert f"clipping gradient norm {1 / factor:g}, of a gradient whose denominator is micro_batch" in said


# -- the rows ------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path) -> Path:
    """A set with nested columns, and a recipe that reads it."""
    rows = [{"extra_info": {"question": f"{i} + 1?", "answer": f"It is {i + 1}."}, "ability": "sums"} for i in range(3)]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    tiny_models.llama().save_pretrained(tmp_path / "model")
    return changed(
        tmp_path,
        MATH,
        model_name_or_path=str(tmp_path / "model"),
        model_revision=None,
        dataset_source=str(tmp_path / "set"),
        dataset_name=str(tmp_path / "rows"),
        attn_implementation=None,
        output_dir=str(tmp_path / "run"),
        target="sft",
        expected_rows=3,
    )


def test_nested_columns_become_prompt_and_completion(source, tmp_path, capsys):
    assert prepare.main(["--config", str(source)]) == 0
    rows = Dataset.from_parquet(str(tmp_path / "rows" / "train.parquet"))
    assert rows.column_names == ["prompt", "completion"]
    assert rows[1]["prompt"] == "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    assert rows[1]["completion"] == "It is 2."
    record = json.loads((tmp_path / "rows.json").read_text())
    assert (record["rows"], record["commit"]) == (3, None)
    assert len(record["sha256"]) == 64
    flags = ["--gradient_accumulation_steps", "1", "--gpus", "1", "--per_device_train_batch_size", "1"]
    status, _, errors = dry_run(source, *flags)
    assert status == 2 and "expected_batch is 256" in errors


def test_prepared_rows_train_on_answer_and_end_token_alone(source, tmp_path):
    prepare.main(["--config", str(source)])
    data = Dataset.from_parquet(str(tmp_path / "rows" / "train.parquet"))
    made = quick_runs.quick_trainer(tiny_models.llama(), tmp_path / "run", data)
    tokenizer = tiny_models.tokenizer()
    for row, prepared in zip(data, made.train_dataset, strict=True):
        trained = [token for token in prepared["labels"] if token != -100]
        assert tokenizer.decode(trained) == row["completion"] + tokenizer.eos_token
        assert tokenizer.decode(prepared["input_ids"]) == row["prompt"] + row["completion"] + tokenizer.eos_token


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"dataset_source_columns": {"prompt": "extra_info.problem", "completion": "ability"}},
            "it has question, answer",
        ),
        ({"dataset_source_columns": {"prompt": "extra_info", "completion": "ability"}}, "is text that is not empty"),
        ({"dataset_source": None}, "has no dataset_source; add it"),
        ({"dataset_source": "./nowhere/at/all"}, "which cannot be loaded"),
        ({"model_name_or_path": "./nowhere/at/all"}, "whose tokenizer cannot be loaded"),
    ],
)
def test_what_cannot_be_prepared_is_said(fields, sentence, source, tmp_path, capsys):
    again = tmp_path / "again"
    again.mkdir()
    assert prepare.main(["--config", str(changed(again, source, **fields))]) == 2
    assert sentence in capsys.readouterr().err


def test_columns_may_lead_into_lists():
    row = {"messages": [{"content": "1 + 1?"}, {"content": "2"}]}
    assert prepare._text(row, "messages.1.content", 0) == "2"


def test_a_begin_token_that_the_tokenizer_adds_is_taken_off():
    class Begins:
        bos_token, bos_token_id = "<s>", 1

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1, 7]}

    assert prepare._renderer(Begins(), "as_is")("<s><s>1 + 1?") == "1 + 1?"


# -- the page ------------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")


def table(name: str) -> list[list[str]]:
    found = re.search(rf"<!-- {name}: .*?-->\n(.*?)\n<!-- end of {name}", PAGE, re.S)
    assert found is not None
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in found[1].splitlines()[2:]]


def test_the_page_has_a_number_for_every_recipe():
    assert {(row[0], row[1]) for row in table("numbers")} == {tuple(file.stem.split("_")) for file in FILES}
    assert {len(row) for row in table("numbers")} == {7}


def test_the_page_lists_the_notes_as_they_are():
    assert {row[0].strip("`"): row[1] for row in table("notes")} == {k: told for k, (_, told) in recipe.NOTES.items()}


def test_the_page_has_the_flags_of_the_recipes():
    for file in (MATH, MEDICINE):
        assert relatives(file) in PAGE
