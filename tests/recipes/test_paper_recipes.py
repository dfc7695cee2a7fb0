"""recipes/paper: forty files as their table writes them, each checked by the dry run, and what a dry run refuses."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

import quick_runs
import tiny_models
from qtarget import QTargetTrainer
from qtarget.cli import __main__ as cli
from qtarget.cli import recipe
from qtarget.planning import memory, shapes, steps

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "paper"
FILES = sorted(FOLDER.glob("*.yaml"))
STEPS = {"numina-67k": 264, "openr1-15k": 58, "m23k": 91}
ARMS = {"sft", "dft", "kd", "target-sft"}


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"paper_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look a class up
    spec.loader.exec_module(module)
    return module


generate, prepare = script("generate"), script("prepare")


def dry_run(file: Path, *flags: str) -> tuple[int, str, str]:
    """(exit status, output, errors) of ``qtarget train --config file --dry_run``."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(["train", "--config", str(file), "--dry_run", *map(str, flags)])
    return status, " ".join(out.getvalue().split()), err.getvalue()


def values(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def changed(folder: Path, file: Path, **fields: Any) -> Path:
    """A recipe with other values; None takes a field out. Its provenance follows."""
    recipe = values(file) | fields
    recipe = {name: value for name, value in recipe.items() if value is not None}
    if "provenance" in recipe and "provenance" not in fields:
        recipe["provenance"] = {n: t for n, t in recipe["provenance"].items() if n.split(".")[0] in recipe}
        recipe["provenance"] |= {name: "ours" for name in fields if name in recipe and name not in recipe["provenance"]}
        recipe["provenance"] = {n: t for n, t in recipe["provenance"].items() if n not in ("to_pin", "unknown")}
    changed = folder / file.name
    changed.write_text(yaml.safe_dump(recipe))
    return changed


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[int, str, str]]:
    return {file.stem: dry_run(file) for file in FILES}


# -- the forty ---------------------------------------------------------------------------------------------------


def test_ten_settings_and_four_arms():
    settings = Counter(tuple(file.stem.split("_")[:2]) for file in FILES)
    assert len(settings) == 10 and set(settings.values()) == {4}
    assert {file.stem.split("_")[2] for file in FILES} == ARMS


def test_the_files_are_what_the_table_writes():
    assert {file.name: file.read_text(encoding="utf-8") for file in FILES} == generate.recipes()


def test_a_file_changed_by_hand_is_seen(tmp_path, capsys):
    generate.main(["--out", str(tmp_path)])
    assert generate.main(["--check", "--out", str(tmp_path)]) == 0
    one = tmp_path / FILES[0].name
    one.write_text(one.read_text().replace("seed: 1\n", "seed: 2\n"))
    capsys.readouterr()
    assert generate.main(["--check", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out.split() == [FILES[0].name]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_dry_run_passes(file, answers):
    data, _, arm = file.stem.split("_")
    status, said, errors = answers[file.stem]
    assert (status, errors) == (0, "")
    micro, accumulation = (16, 2) if data == "m23k" else (4, 8)
    assert f"8 GPUs x {micro} rows x {accumulation} accumulations = 256 rows a step" in said
    assert f"steps {STEPS[data]}, {STEPS[data] // 10} of them warm-up" in said
    assert f"has {STEPS[data]} whole steps" in said
    assert said.count("FSDP2") == 1 and "its shape is not known" not in said
    assert (
        f"to pin model_revision, {'teacher_model_revision, ' * (arm in ('kd', 'target-sft'))}dataset_source_rev" in said
    )
    assert ("target.eta" in said) == (arm == "target-sft")
    assert "the seeds, and how many runs" in said
    assert not Path(values(file)["output_dir"]).exists()


def test_every_field_says_where_it_comes_from():
    for file in FILES:
        fields = values(file)
        entries = {name: recipe.origin(text) for name, text in fields["provenance"].items()}
        assert None not in entries.values()
        assert set(fields) - set(recipe.ABOUT) == {name for name in entries if "." not in name}
        for name in ("seed", "denominator", "teacher_model_name_or_path", "target.eta"):
            assert name not in entries or entries[name][0] == "ours", (file.name, name)


def test_no_commit_is_made_up():
    for file in FILES:
        fields = values(file)
        revisions = {name for name in fields if name.endswith("revision")}
        assert {fields[name] for name in revisions} == {"main"}
        assert set(fields["to_pin"]) == revisions


def test_a_revision_that_was_looked_up_is_no_longer_to_pin(monkeypatch):
    monkeypatch.setitem(generate.REVISIONS, "Qwen/Qwen2.5-7B", "0" * 40)
    fields = yaml.safe_load(generate.recipes()["m23k_qwen2.5-7b_sft.yaml"])
    assert fields["model_revision"] == "0" * 40
    assert fields["to_pin"] == ["dataset_source_revision"]


# -- what is refused ---------------------------------------------------------------------------------------------

KD = FOLDER / "numina-67k_qwen2.5-math-1.5b_kd.yaml"
MATH, TAUGHT = FOLDER / "numina-67k_qwen2.5-math-1.5b_sft.yaml", FOLDER / "m23k_llama-3.2-3b_target-sft.yaml"
REFUSED: dict[str, tuple[Path, dict[str, Any], list[str], str]] = {
    "another number of GPUs": (
        MATH,
        {},
        ["--gpus", "4"],
        "8 accumulations is 128; set gradient_accumulation_steps: 16",
    ),
    "an odd number of GPUs": (MATH, {}, ["--gpus", "3"], "256 is no multiple of 3 x 4"),
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
    "an unknown origin": (
        MATH,
        {"provenance": {"seed": "guessed"}},
        [],
        "provenance of seed is 'guessed'; use published, ",
    ),
    "a field without origin": (
        MATH,
        {"provenance": {"seed": "ours"}},
        [],
        "provenance has no entry for adam_beta1, ",
    ),
    "an origin of nothing": (
        MATH,
        {"provenance": {"sead": "ours"}},
        [],
        "'sead', which the recipe does not set; take it out, or",
    ),
    "to pin what is not set": (
        MATH,
        {"to_pin": ["teacher_model_revision"]},
        [],
        "to_pin names 'teacher_model_revision'",
    ),
    "to pin what is pinned": (MATH, {"model_revision": "a" * 40}, [], f"which is pinned to {'a' * 40}; take it out"),
    "to pin a list": (MATH, {"to_pin": [["model_revision"]]}, [], "to_pin holds ['model_revision']; write text there"),
    "a number as origin": (MATH, {"provenance": {"seed": 1}}, [], "provenance holds 1; write text there"),
    "an unknown field": (MATH, {"learning_rat": 1}, [], "'learning_rat'; did you mean learning_rate?"),
    "a note as a flag": (MATH, {}, ["--expected_rows", "5"], "unknown flag: --expected_rows"),
    "no teacher": (TAUGHT, {"teacher_model_name_or_path": None}, [], "needs a teacher and got none"),
    "another family": (
        TAUGHT,
        {"teacher_model_name_or_path": "Qwen/Qwen3-8B"},
        [],
        "which has the tokens of Qwen3 and the model those of Llama 3",
    ),
    "no such folder": (
        MATH,
        {"model_name_or_path": "./build/no/model"},
        [],
        "which is no folder here; make it, or name",
    ),
    "no such target": (MATH, {}, ["--target", "stf"], "target is 'stf'; did you mean 'sft'?"),
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
    assert "origin" in name or len(errors.splitlines()) == 1, errors


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
    counted = steps.of(rows, 1, made.args)
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
    counted = steps.of(rows, gpus, settings_of(micro, accumulation, drop))
    assert counted.per_epoch == max(-(-each // accumulation), 0)
    assert counted.whole <= rows // counted.batch


@pytest.mark.parametrize(("data", "per_epoch"), [("numina-67k", 264), ("openr1-15k", 59), ("m23k", 92)])
def test_an_epoch_alone_is_not_the_published_steps(data, per_epoch, tmp_path):
    """Without max_steps the trainer would take a last step of fewer rows, which the relatives drop."""
    file = next(file for file in FILES if file.stem.startswith(data))
    _, said, _ = dry_run(changed(tmp_path, file, max_steps=None))
    assert f"steps {per_epoch}, " in said


# -- memory ------------------------------------------------------------------------------------------------------

CONFIGS = {
    "Qwen/Qwen2.5-Math-1.5B": Qwen2Config,
    "Qwen/Qwen3-1.7B-Base": Qwen3Config,
    "meta-llama/Llama-3.2-3B": LlamaConfig,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_of_the_table_are_those_of_the_model(name):
    shape = shapes.KNOWN[name]
    config = CONFIGS[name](
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters


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
def test_parameters_are_those_of_the_model_cards(name, billions):
    assert shapes.KNOWN[name].parameters / 1e9 == pytest.approx(billions, rel=6e-3)


def test_frozen_models_are_counted_as_they_are_loaded():
    half, unknown = shapes.KNOWN["Qwen/Qwen3-8B"], shapes.Shape(2, 4, 8, 2, 1, 2, 10, True)
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
def test_a_teacher_or_reference_without_dtype_takes_what_its_checkpoint_takes(role, tmp_path):
    """On accelerators; recipes leave use_cpu out."""

    def memory_of(**fields):
        told = dry_run(changed(tmp_path, KD if role == "teacher" else MATH, **fields))[1]
        return re.findall(r"(?:DDP|ZeRO-2|FSDP2) [\d. ]+", told)

    named = {} if role == "teacher" else {"target": "sft-kl", "reference_model_name_or_path": "Qwen/Qwen2.5-7B"}
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
    ("flags", "sentence"),
    [
        (["--teacher_model_name_or_path", "ROOT/stranger"], "which has another tokenizer: id "),
        (["--target", "iw-sft"], "needs weights, but the train dataset has no column 'weight'"),
        (["--max_steps", "5"], "max_steps is 5, but 1 epoch of 8 rows are 4 whole steps of 2"),
        (["--model_name_or_path", "ROOT/data"], "whose config cannot be read"),
        (["--dataset_name", "ROOT/nowhere"], "which is no folder or file here"),
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
    recipe |= {"name": "small", "expected_rows": 8, "provenance": dict.fromkeys([*recipe, "expected_rows"], "ours; so")}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))
    words = ["--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--gradient_checkpointing", "false"]
    assert cli.main(["train", "--config", str(tmp_path / "small.yaml"), *words]) == 0
    kept = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert (kept["name"], kept["expected_rows"], kept["provenance"]["target"]) == ("small", 8, "ours; so")
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


@pytest.mark.parametrize("file", FILES[::5], ids=lambda file: file.stem)
def test_the_flags_stand_in_the_recipe_and_pass(file):
    written = re.search(r"^#     (--denominator .*)$", file.read_text(), re.M)
    assert written is not None
    flags = written[1].split()
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
        to_pin=["dataset_source_revision"],
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
    assert {(row[0], row[1]) for row in table("numbers")} == {tuple(file.stem.split("_")[:2]) for file in FILES}
    assert {len(row) for row in table("numbers")} == {7}


def test_the_page_lists_the_notes_as_they_are():
    assert {row[0].strip("`"): row[1] for row in table("notes")} == {k: told for k, (_, told) in recipe.NOTES.items()}


def test_the_page_has_the_flags_of_the_recipes():
    for data in (generate.NUMINA, generate.M23K):
        assert " ".join(generate.relatives(data)) in PAGE
