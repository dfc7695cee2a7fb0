"""Reference and old log-probs: against plain forwards of single rows, through training, and what a run is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM

import quick_runs
import tiny_models
from qtarget.cli.__main__ import main

# Cuts some completions, and two rows so far that nothing of theirs is left.
MAX_LENGTH = 42
LONG = " ".join(tiny_models.SENTENCES)[:120]


def signal_rows() -> list[dict]:
    made = [
        {**row, "source": f"s{i}", "level": i / 2}
        for i, row in enumerate(tiny_models.conversation_dataset(9).to_list())
    ]
    for i in (2, 5):
        made[i]["prompt"] = [{"role": "user", "content": LONG}]
    return made


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("signals")
    for name, model, tokenizer in (
        ("model", tiny_models.trained_model(), tiny_models.tokenizer()),
        ("reference", tiny_models.llama(3), tiny_models.tokenizer()),
        ("stranger", tiny_models.llama(3), tiny_models.tokenizer(extra="zebra quagga ")),
    ):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "data").mkdir()
    for split, here in (("train", signal_rows()), ("test", signal_rows()[3:6])):
        (root / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in here))
    template = root / "loud.jinja"
    template.write_text(tiny_models.TEMPLATE.replace("assistant", "ASSISTANT"))
    settings = {
        "model_name_or_path": str(root / "model"),
        "dataset_name": str(root / "data"),
        "output_dir": str(root / "run"),
        "max_length": MAX_LENGTH,
        "per_device_eval_batch_size": 3,
        "report_to": "none",
        "use_cpu": True,
    }
    for name, target in (
        ("sft", {"target": "sft"}),
        ("iw-sft", {"target": "iw-sft"}),
        ("online", {"target": "iw-sft", "weights": "online"}),
        ("psft", {"target": "psft", "psft_refresh": "never"}),
    ):
        (root / f"{name}.yaml").write_text(yaml.safe_dump(settings | target))
    return {"root": root, "template": template} | {path.stem: path for path in root.glob("*.yaml")}


def data_words(world: dict, verb: str, folder: Path, *more: object, config: str = "iw-sft") -> list[str]:
    return [*map(str, ["data", verb, "--config", world[config], "-o", folder, *more])]


def made(world: dict, verb: str, folder: Path, *more: object, **settings: str) -> dict[str, list[dict]]:
    assert main(data_words(world, verb, folder, *more, **settings)) == 0
    return read(folder)


def read(folder: Path) -> dict[str, list[dict]]:
    return {split: rows.to_list() for split, rows in load_dataset(str(folder)).items()}


def train(world: dict, config: str, folder: Path, *more: object) -> list[str]:
    flags = ["--dataset_name", folder, "--output_dir", folder.with_name("run"), "--max_steps", 2, "--logging_steps", 1]
    flags += ["--save_strategy", "no", "--learning_rate", 1e-3, *more]
    return [*map(str, ["train", "--config", world[config], *flags])]


def model_of(world: dict, name: str):
    return AutoModelForCausalLM.from_pretrained(world["root"] / name).eval()


def cut(row: dict) -> dict:
    """A row as it is trained, tokenised here."""
    (whole,) = quick_runs.tokenised_rows(Dataset.from_list([row]))
    return whole | {name: whole[name][:MAX_LENGTH] for name in ("input_ids", "labels")}


@torch.no_grad()
def label_logps(model, row: dict) -> torch.Tensor:
    """[n] log p of the supervised labels, of a single row in full logits."""
    return quick_runs.logits_of(model, row).log_softmax(-1).gather(1, quick_runs.labels_of(row)[:, None]).squeeze(1)


def rows_trained(split: str) -> list[dict]:
    """The original rows that have something to train."""
    return [
        row
        for row in (signal_rows() if split == "train" else signal_rows()[3:6])
        if len(quick_runs.supervised_positions(cut(row)))
    ]


def without(row: dict, *names: str) -> dict:
    return {name: value for name, value in row.items() if name not in names}


# -- the numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--shuffle_dataset", "true", "--per_device_eval_batch_size", "2"]])
def test_reference_logps_are_those_of_single_rows(world, tmp_path, capsys, more):
    splits = made(world, "weights", tmp_path / "rows", *more, config="online")
    told = capsys.readouterr().out
    model = model_of(world, "model")
    for split in ("train", "test"):
        wanted = rows_trained(split)
        assert [without(row, "reference_logp") for row in splits[split]] == wanted
        means = [float(label_logps(model, cut(row)).mean()) for row in wanted]
        assert [row["reference_logp"] for row in splits[split]] == pytest.approx(means, abs=1e-5)
        assert max(means) - min(means) > 0.01, "rows alike would not tell one from another"
    assert len(splits["train"]) == 7 and len(splits["test"]) == 2
    tokens = sum(
        len(quick_runs.supervised_positions(cut(row))) for row in [*rows_trained("train"), *rows_trained("test")]
    )
    assert f"9 rows, {tokens} supervised tokens" in told
    assert "dropped    2 of 9 rows of train" in told and "dropped    1 of 3 rows of test" in told
    assert json.loads((tmp_path / "rows" / "signal.json").read_text())["dropped"] == {"train": 2, "test": 1}


def test_another_reference_is_asked(world, tmp_path):
    reference = world["root"] / "reference"
    splits = made(world, "weights", tmp_path / "rows", "--reference_model_name_or_path", reference, config="online")
    means = [float(label_logps(model_of(world, "reference"), cut(row)).mean()) for row in rows_trained("train")]
    assert [row["reference_logp"] for row in splits["train"]] == pytest.approx(means, abs=1e-5)


def test_adapters_change_nothing_at_the_start(world, ready, tmp_path):
    peft = ["--use_peft", "true", "--lora_target_modules", "q_proj", "v_proj"]
    for verb, config, name in (("weights", "online", "reference_logp"), ("oldlogps", "psft", "old_logps")):
        rows = made(world, verb, tmp_path / verb, *peft, config=config)["train"]
        for row, plain in zip(rows, read(ready[verb])["train"], strict=True):
            assert row[name] == pytest.approx(plain[name], abs=1e-6)


@pytest.mark.parametrize("temperature", [0.25, 2.0])
def test_fixed_weights(world, tmp_path, temperature):
    more = [
        "--fixed",
        "--reference_model_name_or_path",
        world["root"] / "reference",
        "--weights_temperature",
        temperature,
    ]
    splits = made(world, "weights", tmp_path / "rows", *more)
    model, reference = model_of(world, "model"), model_of(world, "reference")
    gaps = [float((label_logps(model, r) - label_logps(reference, r)).mean()) for r in map(cut, rows_trained("train"))]
    wanted = [min(math.exp(temperature * gap), 16.0) for gap in gaps]
    assert [row["weight"] for row in splits["train"]] == pytest.approx(wanted, rel=1e-5)
    assert (16.0 in wanted) == (temperature == 2.0), "one of the two must show the clamp"


@pytest.mark.parametrize("more", [[], ["--shuffle_dataset", "true", "--per_device_eval_batch_size", "2"]])
def test_old_logps_are_those_of_single_rows(world, tmp_path, more):
    splits = made(world, "oldlogps", tmp_path / "rows", *more, config="psft")
    model = model_of(world, "model")
    for split in ("train", "test"):
        wanted = [cut(row) for row in rows_trained(split)]
        kept = [{name: row[name] for name in ("input_ids", "labels", "source", "level")} for row in wanted]
        assert [without(row, "old_logps") for row in splits[split]] == kept
        for row, plain in zip(splits[split], wanted, strict=True):
            old = torch.zeros(len(plain["labels"]))
            old[quick_runs.supervised_positions(plain) + 1] = label_logps(model, plain)
            assert row["old_logps"] == pytest.approx(old.tolist(), abs=1e-5)


def test_all_labels_of_a_text_but_the_first(world, tmp_path):
    """Without max_length nothing is cut, and no row dropped by the trainer."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in tiny_models.text_dataset(5).to_list())
    )
    more = ["--dataset_name", tmp_path / "data", "--max_length", "null"]
    splits = made(world, "oldlogps", tmp_path / "rows", *more, config="psft")
    assert [*splits["train"][0]] == ["input_ids", "labels", "old_logps"]
    for row, plain in zip(splits["train"], quick_runs.tokenised_rows(tiny_models.text_dataset(5)), strict=True):
        wanted = [0.0, *label_logps(model_of(world, "model"), plain).tolist()]
        assert row["old_logps"] == pytest.approx(wanted, abs=1e-5)


# -- training ----------------------------------------------------------------------------------------------------


def test_psft_starts_at_ratio_one(world, tmp_path):
    made(world, "oldlogps", tmp_path / "rows", config="psft")
    assert main(train(world, "psft", tmp_path / "rows", "--learning_rate", 1e-2)) == 0
    logged = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert logged[0]["trust"] == pytest.approx(1.0, abs=1e-5)
    assert abs(logged[1]["trust"] - 1.0) > 1e-3


def test_iw_sft_reads_fixed_weights(world, tmp_path):
    reference = world["root"] / "reference"
    splits = made(world, "weights", tmp_path / "rows", "--fixed", "--reference_model_name_or_path", reference)
    assert main(train(world, "iw-sft", tmp_path / "rows", "--per_device_train_batch_size", 7)) == 0
    logged = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    counts = [len(quick_runs.supervised_positions(cut(row))) for row in rows_trained("train")]
    mean = sum(row["weight"] * n for row, n in zip(splits["train"], counts, strict=True)) / sum(counts)
    assert logged[0]["trust"] == pytest.approx(mean, rel=1e-5)


# -- what a run is refused ---------------------------------------------------------------------------------------


def refused(capsys, words: list[str]) -> list[str]:
    capsys.readouterr()
    assert main(words) == 2
    return capsys.readouterr().err.splitlines()


@pytest.fixture(scope="module")
def ready(world, tmp_path_factory) -> dict[str, Path]:
    """A folder of each kind."""
    root = tmp_path_factory.mktemp("ready")
    made(world, "weights", root / "weights", config="online")
    made(world, "oldlogps", root / "oldlogps", config="psft")
    return {"weights": root / "weights", "oldlogps": root / "oldlogps"}


# config, folder, flags (ROOT is the world's) → what the first sentence says
DIFFERENCES = {
    "another tokenizer": (
        "online",
        "weights",
        ["--model_name_or_path", "ROOT/stranger"],
        "but column reference_logp of 'FOLDER' was made with another tokenizer, that of 'ROOT/model'",
    ),
    "another template": (
        "online",
        "weights",
        ["--chat_template_path", "ROOT/loud.jinja"],
        "chat_template_path is 'ROOT/loud.jinja', but column reference_logp of 'FOLDER' was made with another chat "
        "template (the tokenizer's own, of ROOT/model)",
    ),
    "another length": (
        "online",
        "weights",
        ["--max_length", "64"],
        "max_length is 64, but column reference_logp of 'FOLDER' was made with 42, so it belongs to other tokens",
    ),
    "another mask": (
        "online",
        "weights",
        ["--completion_only_loss", "false"],
        "completion_only_loss is False, but column reference_logp of 'FOLDER' was made with None",
    ),
    "another reference": (
        "online",
        "weights",
        ["--reference_model_name_or_path", "ROOT/reference"],
        "the reference is 'ROOT/reference', but column reference_logp of 'FOLDER' was made with 'ROOT/model'",
    ),
    "another start": (
        "psft",
        "oldlogps",
        ["--model_name_or_path", "ROOT/reference"],
        "model_name_or_path is 'ROOT/reference', but column old_logps of 'FOLDER' was made with 'ROOT/model', and "
        "psft starts from the model its old log-probabilities are of; train that model, or make it again: qtarget data "
        "oldlogps",
    ),
    "rows cut at their beginnings": (
        "psft",
        "oldlogps",
        ["--max_length", "30", "--truncation_mode", "keep_end"],
        "max_length is 30 and truncation_mode 'keep_end', but column old_logps of 'FOLDER' was made with max_length 42",
    ),
    "tokens of another tokenizer": (
        "sft",
        "oldlogps",
        ["--model_name_or_path", "ROOT/stranger"],
        "but column old_logps of 'FOLDER' was made with another tokenizer",
    ),
}


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
@pytest.mark.parametrize("case", DIFFERENCES)
def test_differences_are_refused(world, ready, capsys, case):
    config, verb, flags, sentence = DIFFERENCES[case]
    flags = [flag.replace("ROOT", str(world["root"])) for flag in flags]
    sentence = sentence.replace("ROOT", str(world["root"])).replace("FOLDER", str(ready[verb]))
    assert sentence in refused(capsys, train(world, config, ready[verb], *flags))[0]


def test_what_the_target_does_not_read_may_differ(world, ready, tmp_path):
    shutil.copytree(ready["weights"], tmp_path / "weights")
    assert main(train(world, "sft", tmp_path / "weights", "--max_length", 64)) == 0
    shutil.copytree(ready["oldlogps"], tmp_path / "old")
    other = ["--model_name_or_path", world["root"] / "reference", "--output_dir", tmp_path / "another_run"]
    assert main(train(world, "sft", tmp_path / "old", *other)) == 0


def test_the_same_model_elsewhere_is_the_same(world, ready, tmp_path):
    shutil.copytree(world["root"] / "model", tmp_path / "moved")
    shutil.copytree(ready["oldlogps"], tmp_path / "rows")
    assert main(train(world, "psft", tmp_path / "rows", "--model_name_or_path", tmp_path / "moved")) == 0


def test_changed_files_are_refused(world, ready, tmp_path, capsys):
    folder = tmp_path / "rows"
    shutil.copytree(ready["oldlogps"], folder)
    table = load_dataset(str(folder))["train"].select(range(3))
    table.to_parquet(folder / "train.parquet")
    (said,) = refused(capsys, train(world, "psft", folder))
    assert "whose file train.parquet was changed since it was written" in said
    (folder / "train.parquet").unlink()
    (said,) = refused(capsys, train(world, "psft", folder))
    assert (
        "whose file train.parquet is missing; restore it, or make the folder again with qtarget data oldlogps" in said
    )
    (folder / "signal.json").write_text("{}")
    assert "signal.json cannot be read" in refused(capsys, train(world, "psft", folder))[0]


# -- folders -----------------------------------------------------------------------------------------------------


def test_folders_of_others_are_left_alone(world, ready, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert (
        "which is not an empty folder; name another folder"
        in refused(capsys, data_words(world, "weights", tmp_path))[0]
    )
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    said = refused(capsys, data_words(world, "weights", ready["oldlogps"], config="online"))[0]
    assert "which holds finished rows of qtarget data oldlogps; name another folder" in said
    assert "output is not set" in refused(capsys, ["data", "weights", "--config", str(world["sft"])])[0]


def test_a_run_that_was_killed_is_done_again_by_the_same_command_alone(world, ready, tmp_path, capsys):
    folder = tmp_path / "rows"
    shutil.copytree(ready["weights"], folder)
    manifest = json.loads((folder / "signal.json").read_text())
    (folder / "signal.json").write_text(json.dumps(manifest | {"finished": False}))
    (folder / "test.parquet").unlink()
    said = refused(capsys, data_words(world, "weights", folder, "--max_length", 64, config="online"))[0]
    assert "an unfinished run with preprocessing.max_length 42, and this one has 64" in said
    said = refused(capsys, data_words(world, "oldlogps", folder, config="psft"))[0]
    assert "an unfinished run with kind 'weights', and this one has 'old_logps'" in said
    assert "which qtarget data weights has not finished" in refused(capsys, train(world, "online", folder))[0]
    made(world, "weights", folder, config="online")
    for name in ("signal.json", "train.parquet", "test.parquet"):
        assert (folder / name).read_bytes() == (ready["weights"] / name).read_bytes(), name


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["weights", "--fixed"], "reference_model_name_or_path is not set, so that the model is its own reference"),
        (
            ["weights", "--fixed", "--reference_model_name_or_path", "ROOT/model"],
            "the model itself, so that all weights",
        ),
        (["weights", "--reference_model_name_or_path", "ROOT/stranger"], "which has another tokenizer: id"),
        (
            ["weights", "--dataset_streaming", "true"],
            "dataset_streaming is true, but the rows of a stream are not numbered",
        ),
        (["wieghts"], "word after data is 'wieghts'; did you mean 'weights'?"),
        (
            ["oldlogps", "--model_name_or_path", "ROOT/nothing"],
            "model_name_or_path is 'ROOT/nothing', which cannot be loaded: no such folder",
        ),
    ],
)
def test_refusals(world, tmp_path, capsys, words, sentence):
    verb, *flags = [word.replace("ROOT", str(world["root"])) for word in words]
    said = refused(capsys, data_words(world, verb, tmp_path / "rows", *flags))[0]
    assert sentence.replace("ROOT", str(world["root"])) in said
    assert not (tmp_path / "rows").exists()


def test_a_column_that_is_there_is_not_made_again(world, ready, tmp_path, capsys):
    words = data_words(world, "weights", tmp_path / "rows", "--dataset_name", ready["weights"], config="online")
    assert "the train split has a column 'reference_logp' already" in refused(capsys, words)[0]


def test_a_model_that_gives_nan(world, tmp_path, capsys):
    """The model and the dataset's own row are named, whatever was dropped before it."""
    model = tiny_models.trained_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    tiny_models.tokenizer().save_pretrained(tmp_path / "broken")
    words = ["data", "oldlogps", "--config", world["sft"], "--model_name_or_path", tmp_path / "broken"]
    assert main([str(word) for word in [*words, "-o", tmp_path / "signal"]]) == 2
    said = capsys.readouterr().err
    assert f"the logits of {tmp_path / 'broken'} are NaN or infinite at row " in said and "of the train dataset" in said
