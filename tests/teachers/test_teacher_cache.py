"""A teacher cache holds what plain forwards say, trains as the teacher itself, and survives what happens to files."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from safetensors.torch import load_file, save_file

import qtarget as qt
import teacher_caches
import tiny_models
from qtarget.cli.__main__ import main
from qtarget.teachers.cache.index import supervised_positions
from qtarget.teachers.cache.reader import CachedTeacher
from quick_runs import copied_weights, logits_of, quick_trainer, tokenised_rows, weight_change
from teacher_caches import VOCAB, build_cache, file_contents, refusal_of, rows_with_hints, wider_teacher, write_rows

K = 16
# Two documents fill a sequence, and no row is cut.
LAYOUTS = {
    "padded": {},
    "padding-free": {"padding_free": True, "max_length": None},
    "bfd": {"packing": True, "max_length": 120},
    "two workers": {"dataloader_num_workers": 2},
    "shuffled": {"shuffle_dataset": True},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return teacher_caches.write_world(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def whole(world) -> Path:
    """The whole vocabulary in float32: nothing is left out or rounded."""
    return build_cache(world, world / "whole", "--k", VOCAB, "--cache_dtype", "float32", "--shard_tokens", 100)


@pytest.fixture(scope="module")
def some(world) -> Path:
    """The 16 likeliest tokens in float16."""
    return build_cache(world, world / "some", "--k", K, "--shard_tokens", 100)


def read(folder: Path, made: list[dict]) -> list[tuple[torch.Tensor, ...]]:
    """(ids, logprobs, tail) of each row's supervised tokens."""
    cache, found = CachedTeacher(folder), []
    for row in tokenised_rows(Dataset.from_list(made)):
        places = cache.places(row["input_ids"], row["labels"])
        got = cache.gather(torch.tensor(places))
        at = supervised_positions(row["labels"])
        found.append(tuple(got[name][at] for name in ("teacher_ids", "teacher_logprobs", "teacher_tail_logprob")))
    return found


# -- what is in it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["some", "whole"])
def test_holds_what_plain_forwards_say(kind, request):
    """One row at a time, without padding, full logits in float64."""
    folder = request.getfixturevalue(kind)
    model, made = wider_teacher(torch.float64), rows_with_hints()
    for row, (ids, kept, tail) in zip(tokenised_rows(Dataset.from_list(made)), read(folder, made), strict=True):
        log_p = logits_of(model, row).detach().log_softmax(-1)
        top = log_p.topk(ids.shape[1], dim=-1)
        assert kept.dtype == (torch.float16 if kind == "some" else torch.float32)
        step = 2**-11 if kind == "some" else 2**-22
        assert bool((kept.double() - top.values).abs().le(2e-5 + step * top.values.abs()).all())
        same = log_p.gather(1, ids.long())
        assert torch.allclose(same, top.values, atol=1e-5), "each id has the log-probability that stands beside it"
        if kind == "some":
            outside = 1 - top.values.exp().sum(-1)
            assert torch.allclose(tail.double().exp(), outside, atol=1e-6)
        else:
            assert bool((tail < -20).all())


def test_says_what_it_is(some, capsys):
    manifest = json.loads((some / "manifest.json").read_text())
    unique = {json.dumps([row["prompt"], row["completion"]]) for row in rows_with_hints()}
    assert manifest["rows"] == len(unique) and manifest["tokens"] == sum(line["tokens"] for line in manifest["shards"])
    assert manifest["k"] == K and manifest["state"] == "complete" and len(manifest["shards"]) > 3
    assert main(["cache", "inspect", str(some), "--verify"]) == 0
    said = capsys.readouterr().out
    assert re_has(said, "state", "complete") and re_has(said, "kept", "16 tokens each, float16")
    size = sum((some / line["file"]).stat().st_size for line in manifest["shards"])
    per_token = K * (4 + 2) + 4
    assert size == pytest.approx(manifest["tokens"] * per_token, rel=0.05), "little beside what was promised"


def re_has(text: str, name: str, value: str) -> bool:
    return any(line.startswith(name) and value in line for line in text.splitlines())


def test_k_by_coverage(world, tmp_path, capsys):
    """The smallest k that keeps the share on average, and what tokens need by themselves."""
    folder = build_cache(world, tmp_path / "covered", "--coverage", "0.9")
    manifest = json.loads((folder / "manifest.json").read_text())
    model = wider_teacher(torch.float64)
    unique = {tuple(row["input_ids"]): row for row in tokenised_rows(Dataset.from_list(rows_with_hints()))}
    masses = torch.cat([logits_of(model, row).softmax(-1).sort(descending=True).values for row in unique.values()])
    mean = masses.cumsum(-1).mean(0)
    assert mean[manifest["k"] - 1] >= 0.9 > mean[manifest["k"] - 2]
    needed = (masses.cumsum(-1) < 0.9).sum(-1) + 1
    assert manifest["coverage"]["needed_k"]["100"] == int(needed.max())
    assert manifest["coverage"]["needed_k"]["50"] == pytest.approx(float(needed.double().median()), abs=1)
    assert f"k = {manifest['k']} keeps" in capsys.readouterr().out


# -- training from it ----------------------------------------------------------------------------------------------


def one_step(folder: Path, made: Dataset, **settings) -> dict[str, torch.Tensor]:
    settings = {"max_length": 120, "target": "target-sft", "per_device_train_batch_size": 8} | settings
    run = quick_trainer(
        tiny_models.trained_model(), folder, made, gradient_accumulation_steps=1, num_train_epochs=1, **settings
    )
    before = copied_weights(run.model)
    run.train()
    return weight_change(before, run.model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_from_it_is_training_with_the_teacher(layout, whole, tmp_path):
    made, settings = Dataset.from_list(rows_with_hints()), {**LAYOUTS[layout], "max_steps": 3, "learning_rate": 0.1}
    live = one_step(tmp_path / "live", made, teacher_model=wider_teacher(), **settings)
    if settings.get("max_length", 0) is None:  # a cache knows how rows were cut, and these are not
        cut = "max_length: null\n"
        config = tmp_path / "config.yaml"
        config.write_text((whole.parent / "config.yaml").read_text().replace("max_length: 120\n", cut))
        whole = tmp_path / "uncut"
        words = ["cache", "build", "--config", config, "-o", whole, "--k", VOCAB, "--cache_dtype", "float32"]
        assert main([str(word) for word in words]) == 0
    cached = one_step(tmp_path / "cached", made, teacher_cache=str(whole), **settings)
    assert distance(cached, live) < 2e-5
    order = np.random.default_rng(0).permutation(len(made))
    if layout == "padded":  # the order of rows is another, their teachers are not
        live = one_step(tmp_path / "live2", made.select(order), teacher_model=wider_teacher(), **settings)
        cached = one_step(tmp_path / "cached2", made.select(order), teacher_cache=str(whole), **settings)
        assert distance(cached, live) < 2e-5


def distance(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    off = sum(float((got[name] - wanted[name]).square().sum()) for name in wanted)
    return (off / sum(float(value.square().sum()) for value in wanted.values())) ** 0.5


def test_from_a_stream(world, whole, tmp_path):
    stream = load_dataset(str(world / "data"), split="train", streaming=True)
    settings = {"max_steps": 2, "learning_rate": 0.1}
    live = one_step(tmp_path / "live", stream, teacher_model=wider_teacher(), **settings)
    cached = one_step(tmp_path / "cached", stream, teacher_cache=str(whole), **settings)
    assert distance(cached, live) < 2e-5


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
def test_every_token_has_its_own_teacher_where_rows_go_on(strategy, world, tmp_path):
    """Packings that cut a row anywhere: the teacher has read it from its beginning."""
    config = tmp_path / "config.yaml"
    config.write_text((world / "config.yaml").read_text() + f"packing: true\npacking_strategy: {strategy}\n")
    words = ["cache", "build", "--config", config, "-o", tmp_path / "c", "--k", VOCAB, "--cache_dtype", "float32"]
    assert main([str(word) for word in words]) == 0
    made, model = Dataset.from_list(rows_with_hints()), wider_teacher()
    run = quick_trainer(
        tiny_models.trained_model(),
        tmp_path,
        made,
        target="kd",
        teacher_cache=str(tmp_path / "c"),
        packing=True,
        packing_strategy=strategy,
        max_length=50,
    )
    expected: dict[tuple, list[torch.Tensor]] = {}
    for row in tokenised_rows(made):
        for at, log_p in zip(supervised_positions(row["labels"]), logits_of(model, row).log_softmax(-1), strict=True):
            expected.setdefault(tuple(row["input_ids"][max(0, at - 3) : at + 1]), []).append(log_p.detach())
    seen = 0
    for batch in run.get_train_dataloader():
        for b, t in (batch["labels"] != -100).nonzero().tolist():
            if t < 3:
                continue
            got = torch.empty(VOCAB).scatter(0, batch["teacher_ids"][b, t].long(), batch["teacher_logprobs"][b, t])
            known = expected.get(tuple(batch["input_ids"][b, t - 3 : t + 1].tolist()))
            if known is None:  # behind a cut, where the tokens before are another row's
                continue
            assert any(torch.allclose(got, log_p, atol=1e-4) for log_p in known)
            seen += 1
    assert seen > 300


def test_a_context_that_only_the_teacher_reads(world, tmp_path):
    """Built with a context and trained without naming it again: the manifest knows."""
    context = {"prompt": "{{ prompt }} ({{ hint }})"}
    words = ["--teacher_context", json.dumps(context), "--k", VOCAB, "--cache_dtype", "float32"]
    folder = build_cache(world, tmp_path / "c", *words)
    made, settings = Dataset.from_list(rows_with_hints()), {"max_steps": 2, "learning_rate": 0.1}
    live = one_step(tmp_path / "live", made, teacher_model=wider_teacher(), teacher_context=context, **settings)
    cached = one_step(tmp_path / "cached", made, teacher_cache=str(folder), **settings)
    plain = one_step(tmp_path / "plain", made, teacher_model=wider_teacher(), **settings)
    assert distance(cached, live) < 2e-5 and distance(plain, live) > 1e-3


def test_a_pool(world, tmp_path):
    pool = {str(world / "teacher"): 0.7, str(world / "other"): 0.3}
    words = ["--teachers", json.dumps(pool), "--teacher_model_name_or_path", "none"]
    folder = build_cache(world, tmp_path / "c", *words, "--k", VOCAB, "--cache_dtype", "float32")
    made, settings = Dataset.from_list(rows_with_hints()), {"max_steps": 2, "learning_rate": 0.1}
    live = one_step(tmp_path / "live", made, teachers=pool, **settings)
    cached = one_step(tmp_path / "cached", made, teacher_cache=str(folder), teachers=pool, **settings)
    assert distance(cached, live) < 2e-5
    other = {str(world / "teacher"): 0.6, str(world / "other"): 0.4}
    with pytest.raises(qt.ConfigError, match="the cache was built with teacher's pool"):
        one_step(tmp_path / "other", made, teacher_cache=str(folder), teachers=other, **settings)


def test_an_even_tail_is_another_target(some, tmp_path):
    """Both against the oracle's distribution, through the trainer's own loss."""
    made = Dataset.from_list(rows_with_hints(4))
    student = tiny_models.trained_model()
    losses = {}
    for tail in ("student", "even"):
        run = quick_trainer(
            tiny_models.trained_model(),
            tmp_path / tail,
            made,
            target="kd",
            teacher_cache=str(some),
            teacher_tail=tail,
            max_length=120,
        )
        run.args.per_device_train_batch_size = run._train_batch_size = 4
        run.model.eval()
        batch = next(iter(run.get_train_dataloader()))
        losses[tail] = float(run.compute_loss(run.model, dict(batch)).detach())
    wanted = {"student": [], "even": []}
    for row, (ids, kept, tail_mass) in zip(tokenised_rows(made), read(some, rows_with_hints(4)), strict=True):
        log_p = logits_of(student, row).detach().double().log_softmax(-1)
        ids, kept, mass = ids.long(), kept.double().exp(), tail_mass.double().exp()
        outside = torch.ones_like(log_p).scatter(1, ids, 0.0)
        for tail, shape in (("student", log_p.exp() * outside), ("even", outside)):
            t = (shape / shape.sum(-1, keepdim=True) * mass[:, None]).scatter(1, ids, kept)
            t = t / t.sum(-1, keepdim=True)  # what was kept was rounded
            wanted[tail].append(-(t * log_p).sum(-1))
    for tail, values in wanted.items():
        assert losses[tail] == pytest.approx(float(torch.cat(values).mean()), rel=2e-4)
    assert losses["student"] != pytest.approx(losses["even"], rel=1e-3)


def test_a_pad_token_added_since(world, some, tmp_path, capsys):
    """No row of the cache holds it, so that the cache is trained from as before."""
    more = copy.deepcopy(tiny_models.tokenizer())
    more.add_special_tokens({"pad_token": "<pad>"})
    tiny_models.trained_model(vocab=VOCAB + 1).save_pretrained(tmp_path / "model")
    more.save_pretrained(tmp_path / "model")
    words = ["train", "--config", world / "config.yaml", "--teacher_cache", some, "--max_steps", 1]
    words += ["--model_name_or_path", tmp_path / "model", "--output_dir", tmp_path / "run"]
    assert main([str(word) for word in words]) == 0


# -- what it is not for --------------------------------------------------------------------------------------------


def test_built_for_something_else(world, some, tmp_path, capsys):
    """Each time the first difference, before a step is trained."""
    start = ["train", "--config", world / "config.yaml", "--teacher_cache", some, "--output_dir", tmp_path / "run"]
    config = (world / "config.yaml").read_text()
    alone = tmp_path / "alone.yaml"  # the cache says which teacher it is of
    alone.write_text(config.replace(f"teacher_model_name_or_path: {world}/teacher\n", ""))
    start[2] = alone

    stranger = tmp_path / "stranger"
    shutil.copytree(world / "model", stranger)
    tiny_models.tokenizer(extra="zebra quagga ").save_pretrained(stranger)
    said = refusal_of(capsys, *start, "--model_name_or_path", stranger)
    assert "the cache was built with tokenizer" in said and "build a cache for this one" in said

    template = tmp_path / "other.jinja"
    template.write_text(tiny_models.TEMPLATE.replace("<|im_start|>", "<|im_end|>"))
    assert "chat_template" in refusal_of(capsys, *start, "--chat_template_path", template)
    assert "max_length 120, and this run has 90" in refusal_of(capsys, *start, "--max_length", 90)
    said = refusal_of(capsys, *start, "--completion_only_loss", "false")
    assert "completion_only_loss true, and this run has false" in said
    said = refusal_of(capsys, *start, "--teacher_context", "{{ prompt }} more")
    assert 'teacher_context null, and this run has {"prompt": "{{ prompt }} more"}' in said

    said = refusal_of(capsys, *start, "--teacher_model_name_or_path", world / "other")
    assert "teacher's name" in said and "name the teacher of the cache" in said
    moved_here = tmp_path / "elsewhere"  # the same weights in another folder are the same teacher
    shutil.copytree(world / "teacher", moved_here)
    once = ["--max_steps", 1, "--teacher_model_name_or_path", moved_here]
    assert main([str(word) for word in [*start, *once]]) == 0
    trained = load_file(moved_here / "model.safetensors")
    trained["model.norm.weight"] += 0.01  # and other weights under its name are another
    save_file(trained, moved_here / "model.safetensors", metadata={"format": "pt"})
    assert "teacher's" in refusal_of(capsys, *start, *once[2:], "--output_dir", tmp_path / "run2")


def test_rows_changed_since(world, some, tmp_path, capsys):
    changed = rows_with_hints()
    changed[5]["completion"][0]["content"] += " Or not."
    folder = write_rows(tmp_path / "changed", changed)
    start = ["train", "--config", world / "config.yaml", "--teacher_cache", some, "--output_dir", tmp_path / "run"]
    said = refusal_of(capsys, *start, "--dataset_name", folder)
    assert "row 5 of the train dataset is not in the teacher cache" in said and "changed since" in said
    write_rows(tmp_path / "turned", [*reversed(rows_with_hints())])  # another order is the same rows
    assert main([str(w) for w in [*start, "--dataset_name", tmp_path / "turned", "--max_steps", 1]]) == 0


def test_evaluation_rows_that_ask_no_teacher(world, some, tmp_path):
    """They need not be in the cache where another target is reported for them."""
    rows_ = rows_with_hints()
    folder = write_rows(tmp_path / "data", rows_)
    strange = json.dumps({**rows_[0], "completion": [{"role": "assistant", "content": "Not in the cache."}]})
    (folder / "test.jsonl").write_text(strange + "\n")
    start = ["train", "--config", world / "config.yaml", "--teacher_cache", some, "--dataset_name", folder]
    start += ["--max_steps", 1, "--output_dir", tmp_path / "run"]
    assert main([str(word) for word in [*start, "--eval_target", "sft"]]) == 0
    assert "eval_nll" in (tmp_path / "run" / "trainer_state.json").read_text()


def test_packed_before(some, tmp_path):
    packed = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "seq_lengths": [2, 2]}] * 4)
    settings = {"packing": True, "target": "kd", "teacher_cache": str(some), "max_length": 120}
    settings["completion_only_loss"] = True
    with pytest.raises(qt.ConfigError, match=r"packed already \(column seq_lengths\)"):
        quick_trainer(tiny_models.trained_model(), tmp_path, packed, **settings)


def test_options_that_cannot_be(world, tmp_path, capsys):
    start = ["cache", "build", "--config", world / "config.yaml", "-o", tmp_path / "c"]
    assert "k is 0; use a whole number from 1" in refusal_of(capsys, *start, "--k", 0)
    assert f"k is 999, more than the vocabulary's {VOCAB} tokens" in refusal_of(capsys, *start, "--k", 999)
    assert "coverage is 1; use a share" in refusal_of(capsys, *start, "--coverage", 1)
    assert "--k and --coverage are both given" in refusal_of(capsys, *start, "--k", 4, "--coverage", 0.9)
    assert "cache_dtype is 'int8'" in refusal_of(capsys, *start, "--cache_dtype", "int8")
    said = refusal_of(capsys, *start, "--teacher_ema_decay", 0.9, "--teacher_model_name_or_path", "none")
    assert "changes at every step" in said
    assert "output is not set" in refusal_of(capsys, *start[:-2])
    assert "needs a teacher" in refusal_of(capsys, *start, "--teacher_model_name_or_path", "none")
    assert not (tmp_path / "c").exists()
    assert "did you mean 'build'" in refusal_of(capsys, "cache", "bild")
    assert "which holds no manifest.json" in refusal_of(capsys, "cache", "inspect", tmp_path)


def test_a_teacher_that_gives_nan(world, tmp_path, capsys):
    broken = wider_teacher()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    tiny_models.tokenizer().save_pretrained(tmp_path / "broken")
    start = ["cache", "build", "--config", world / "config.yaml", "-o", tmp_path / "c", "--k", K]
    said = refusal_of(capsys, *start, "--teacher_model_name_or_path", tmp_path / "broken")
    assert "the teacher gives NaN for row" in said and "dtype" in said


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["missing", "cut short", "a flipped bit", "index", "manifest", "not finished"])
def test_damaged(fault, world, some, tmp_path, capsys):
    folder = tmp_path / "c"
    shutil.copytree(some, folder)
    shard = folder / "shard-00002.safetensors"
    content = bytearray(shard.read_bytes())
    if fault == "missing":
        shard.unlink()
        wanted = r"shard-00002.safetensors is missing"
    elif fault == "cut short":
        shard.write_bytes(content[:-7])
        wanted = "was cut short or changed"
    elif fault == "a flipped bit":
        content[-100] ^= 1
        shard.write_bytes(content)
        wanted = "its checksum differs"
    elif fault == "index":
        index = bytearray((folder / "index.safetensors").read_bytes())
        index[-5] ^= 1
        (folder / "index.safetensors").write_bytes(index)
        wanted = "index.safetensors is not what was written"
    elif fault == "manifest":
        (folder / "manifest.json").write_text('{"format": 1')
        wanted = "manifest.json cannot be read"
    else:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest |= {"state": "building", "shards": manifest["shards"][:2]}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        wanted = "is not finished (2 of"
    start = ["train", "--config", world / "config.yaml", "--teacher_cache", folder, "--output_dir", tmp_path / "run"]
    assert wanted in refusal_of(capsys, *start)
    if fault in ("missing", "cut short", "a flipped bit", "not finished"):  # built again, only that is made anew
        before = (folder / "shard-00001.safetensors").stat().st_mtime_ns
        build_cache(world, folder, "--k", K, "--shard_tokens", 100)
        assert (folder / "shard-00001.safetensors").stat().st_mtime_ns == before
        assert file_contents(folder) == file_contents(some)


def test_the_disk_fills_up(world, some, tmp_path, capsys, monkeypatch):
    """What was written stays, and the next build goes on from it."""
    real, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    start = ["cache", "build", "--config", world / "config.yaml", "-o", tmp_path / "c", "--k", K, "--shard_tokens", 100]
    assert "cannot be written: the disk is full" in refusal_of(capsys, *start)
    monkeypatch.undo()
    there = file_contents(tmp_path / "c")
    assert 2 < len(there) < len(file_contents(some)) and not any(name.endswith(".partial") for name in there)
    build_cache(world, tmp_path / "c", "--k", K, "--shard_tokens", 100)
    assert file_contents(tmp_path / "c") == file_contents(some)


def test_no_room(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 1000))
    said = refusal_of(capsys, "cache", "build", "--config", world / "config.yaml", "-o", tmp_path / "c")
    assert "0 MB are free and the cache needs" in said


def test_another_build_in_the_folder(world, some, tmp_path, capsys):
    """Of something else, at the same time, or over files of another kind."""
    start = ["cache", "build", "--config", world / "config.yaml", "-o"]
    said = refusal_of(capsys, *start, some, "--k", 5, "--shard_tokens", 100)
    assert "the cache was built with k 16, and this run has 5; name another folder" in said
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    assert "holds other files" in refusal_of(capsys, *start, tmp_path / "mine", "--k", 5)
    hold = (
        "import sys, filelock\n"
        "lock = filelock.FileLock(sys.argv[1])\n"
        "lock.acquire()\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    (tmp_path / "c").mkdir()
    command = [sys.executable, "-c", hold, str(tmp_path / "c" / ".building")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        said = refusal_of(capsys, *start, tmp_path / "c", "--k", 5)
        other.stdin.close()
    assert "another qtarget cache build is running" in said


def test_other_rows_in_an_unfinished_build(world, some, tmp_path, capsys):
    folder = tmp_path / "c"
    shutil.copytree(some, folder)
    changed = rows_with_hints()
    changed[0]["completion"][0]["content"] += "!"
    start = ["cache", "build", "--config", world / "config.yaml", "-o", folder, "--k", K, "--shard_tokens", 100]
    said = refusal_of(capsys, *start, "--dataset_name", write_rows(tmp_path / "changed", changed))
    assert "name another folder" in said
    assert file_contents(folder) == file_contents(some)


# -- killed --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(world) -> Path:
    """A config with rows enough that a build takes a moment, and an uninterrupted build of it."""
    made = [
        {**row, "completion": [{"role": "assistant", "content": f"{row['completion'][0]['content']} {i}"}]}
        for i, row in enumerate(tiny_models.conversation_dataset(200).to_list())
    ]
    write_rows(world / "many", made)
    config = (world / "config.yaml").read_text().replace(f"{world}/data", f"{world}/many")
    (world / "many.yaml").write_text(config)
    run_build(world, world / "uninterrupted").wait()
    return world / "uninterrupted"


# A build that waits to be killed once it has written so many more files than the kill waits for, or at its end.
HELD = """
import signal, sys
from qtarget.cli.__main__ import main
from qtarget.teachers.cache import shards

left, write = int(sys.argv.pop(1)), shards.write_arrays

def counted(*arguments, **more):
    global left
    made = write(*arguments, **more)
    left -= 1
    while left == 0:
        signal.pause()
    return made

shards.write_arrays = counted
main(sys.argv[1:])
while True:
    signal.pause()
"""


def run_build(world: Path, folder: Path, held_after: int | None = None) -> subprocess.Popen:
    words = ["cache", "build", "--config", world / "many.yaml", "-o", folder, "--k", K, "--shard_tokens", 100]
    words += ["--batch_size", 1]
    program = ["-m", "qtarget"] if held_after is None else ["-c", HELD, str(held_after)]
    return subprocess.Popen(
        [sys.executable, *program, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def killed_and_resumed(world: Path, folder: Path, uninterrupted: Path, kills: int, seed: int) -> list[int]:
    """How many files were there at each kill; the finished build is compared byte by byte."""
    chance, there = random.Random(seed), []
    planned = json.loads((uninterrupted / "manifest.json").read_text())["planned_shards"]
    for kill in range(kills):
        # Somewhere in the next share of the work, at any moment between two files.
        wanted = int(planned * (kill + chance.random()) / kills)
        process = run_build(world, folder, max(wanted + 1 - sum(there[-1:]), 0) + 2)
        while process.poll() is None and len([*folder.glob("shard-*.safetensors")]) <= wanted:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        there.append(len([*folder.glob("shard-*.safetensors")]))
    assert run_build(world, folder).wait() == 0
    assert file_contents(folder) == file_contents(uninterrupted)
    return there


def test_killed_twice(world, many, tmp_path):
    there = killed_and_resumed(world, tmp_path / "c", many, kills=2, seed=1)
    assert 0 < there[0] < there[1], "each start went on from what was there"


@pytest.mark.full
def test_killed_twenty_times(world, many, tmp_path):
    there = killed_and_resumed(world, tmp_path / "c", many, kills=20, seed=2)
    assert sorted(there) == there and len(set(there)) > 10
