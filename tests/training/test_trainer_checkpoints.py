"""A checkpoint is complete or not there; what the disk refuses is one sentence, and the last good checkpoint stays."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny_models
from qtarget import ConfigError
from qtarget.cli.__main__ import main
from qtarget.training.saving import checkpoints
from quick_runs import copied_weights, quick_trainer

SAVED = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.05}


def made(folder: Path, **settings):
    return quick_trainer(
        tiny_models.trained_model(), folder, tiny_models.conversation_dataset(8), target="dft", **{**SAVED, **settings}
    )


def there(folder: Path) -> list[str]:
    return [found.name for found in checkpoints.all_of(folder)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# -- complete or not there -----------------------------------------------------------------------------------------


def test_nothing_has_a_checkpoints_name_before_it_is_whole(tmp_path, monkeypatch):
    """Looked at after every file that is written."""
    seen = []

    class Watched(type(made(tmp_path))):
        def _save_rng_state(self, output_dir):
            seen.append((output_dir, there(tmp_path)))
            super()._save_rng_state(output_dir)

        def write_into_checkpoint(self, folder):
            seen.append((str(folder), there(tmp_path)))
            super().write_into_checkpoint(folder)

    quick_trainer(
        tiny_models.trained_model(), tmp_path, tiny_models.conversation_dataset(8), kind=Watched, target="dft", **SAVED
    ).train()
    assert [names for _, names in seen] == [[]] * 2 + [["checkpoint-2"]] * 2 + [["checkpoint-4", "checkpoint-2"]] * 2
    assert {Path(folder).parent.name for folder, _ in seen} == {checkpoints.UNFINISHED}
    assert there(tmp_path) == ["checkpoint-6", "checkpoint-4", "checkpoint-2"]
    assert not (tmp_path / checkpoints.UNFINISHED).exists()
    assert all(checkpoints.fault(tmp_path / name) is None for name in there(tmp_path))


def test_the_limit_and_the_best_are_kept(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "learning_rate": 0.5}
    made_ = quick_trainer(
        tiny_models.trained_model(),
        tmp_path,
        tiny_models.conversation_dataset(8),
        eval_dataset=tiny_models.conversation_dataset(4),
        target="sft",
        **{**SAVED, **settings},
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="nll",
        greater_is_better=True,  # a learning rate this high makes it worse, then better: the best is not the last
    )
    made_.train()
    best = made_.state.best_global_step
    assert there(tmp_path) == [f"checkpoint-{step}" for step in sorted({6, best}, reverse=True)] and best < 6
    assert made_.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    for name in there(tmp_path):
        state = (tmp_path / name / "trainer_state.json").read_text()
        assert checkpoints.UNFINISHED not in state and str(tmp_path / f"checkpoint-{best}") in state


def test_a_checkpoint_is_deleted_as_a_whole(tmp_path, monkeypatch):
    """Killed in the middle of a deletion, there is no half of a checkpoint under its name."""
    made(tmp_path).train()

    def killed(folder, *args, **kwargs):
        next(Path(folder).rglob("model.safetensors")).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda folder, **_: killed(folder) if folder.exists() else None)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.remove(tmp_path / "checkpoint-6")
    assert there(tmp_path) == ["checkpoint-4", "checkpoint-2"]


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda folder: os.truncate(folder / "model.safetensors", 100), "model.safetensors has 100 bytes of"),
        (lambda folder: (folder / checkpoints.FILES).write_text("{"), "qtarget_files.json cannot be read"),
    ],
    ids=["missing", "cut short", "list cut short"],
)
def test_a_checkpoint_that_is_not_whole_is_passed_over(spoil, told, tmp_path, caplog):
    whole = made(tmp_path)
    whole.train()
    spoil(tmp_path / "checkpoint-6")
    with pytest.raises(ConfigError, match=f"which is incomplete: {told}.*the last complete one is '.*checkpoint-4'"):
        made(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    again = made(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert f"checkpoint-6 is incomplete ({told}" in caplog.text
    assert all(
        torch.equal(copied_weights(whole.model)[name], value) for name, value in copied_weights(again.model).items()
    )
    assert checkpoints.fault(tmp_path / "checkpoint-6") is None, "written again in its place"


def test_another_programs_half_of_a_checkpoint(tmp_path):
    """TRL's own, killed while it wrote: its state, which comes last, is not there."""
    made(tmp_path).train()
    for file in (checkpoints.FILES, "qtarget.json", "trainer_state.json"):
        (tmp_path / "checkpoint-6" / file).unlink()
    assert checkpoints.last(tmp_path) == tmp_path / "checkpoint-4"


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="which is not a folder; start from scratch in another output_dir"):
        made(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


def test_without_a_checkpoint_a_run_starts_at_the_beginning(tmp_path, caplog):
    """So that a job that is killed early can be started again by the same command."""
    run = made(tmp_path)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 6 and "holds no checkpoint to resume from: the run starts at step 0" in caplog.text


# -- a disk that refuses -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("disk")
    tiny_models.trained_model().save_pretrained(root / "model")
    tiny_models.tokenizer().save_pretrained(root / "model")
    (root / "data").mkdir()
    tiny_models.conversation_dataset(8).to_json(root / "data" / "train.jsonl")
    (root / "config.yaml").write_text(
        f"model_name_or_path: {root}/model\ndataset_name: {root}/data\ntarget: dft\nmax_steps: 6\nsave_steps: 2\n"
        "per_device_train_batch_size: 4\nreport_to: none\nuse_cpu: true\nlens_every: 1\noptim: adamw_torch\n"
    )
    return root / "config.yaml"


def one_sentence(said: str) -> str:
    lines = [line for line in said.splitlines() if line.startswith("qtarget train:")]
    assert len(lines) == 1 and "Traceback" not in said, said
    return lines[0]


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    """A file system of its own, which needs root."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def filled_up_to(folder: Path, free: int) -> None:
    """Leave ``free`` bytes."""
    there = os.statvfs(folder)
    (folder / "filler").write_bytes(bytes(max(0, there.f_bavail * there.f_frsize - free)))


def test_a_full_disk(config, tmp_path, capsys):
    """A real one: room for the second checkpoint in part, with every place in it where room may end."""
    with mounted(tmp_path / "disk", "size=16m"):
        run = tmp_path / "disk" / "run"
        words = ["train", "--config", str(config), "--output_dir", str(run)]
        assert main([*words, "--max_steps", "2", "--save_total_limit", "1"]) == 0
        good = contents(run / "checkpoint-2")
        size = sum(map(len, good.values()))
        assert size > 200_000
        for share in (0.02, 0.15, 0.4, 0.7, 0.97):
            filled_up_to(tmp_path / "disk", int(share * size))
            capsys.readouterr()
            assert main([*words, "--resume_from_checkpoint", "true"]) == 2
            said = one_sentence(capsys.readouterr().err)
            assert "could not be written to" in said and "free some space" in said, said
            assert "resume from the last complete checkpoint, checkpoint-2, with --resume_from_checkpoint true" in said
            assert contents(run / "checkpoint-2") == good and there(run) == ["checkpoint-2"]
            assert not (run / checkpoints.UNFINISHED).exists(), "what could not be finished takes no room"
            (tmp_path / "disk" / "filler").unlink()
        assert main([*words, "--resume_from_checkpoint", "true"]) == 0
        assert checkpoints.last(run) == run / "checkpoint-6"


def test_a_folder_that_turns_read_only(config, tmp_path, capsys):
    with mounted(tmp_path / "disk", "size=16m"):
        run = tmp_path / "disk" / "run"
        words = ["train", "--config", str(config), "--output_dir", str(run)]
        assert main([*words, "--max_steps", "2"]) == 0
        good = contents(run / "checkpoint-2")
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        capsys.readouterr()
        assert main([*words, "--resume_from_checkpoint", "true"]) == 2
        assert "which cannot be written; choose a folder you own" in one_sentence(capsys.readouterr().err)
        with pytest.raises(ConfigError, match="which cannot be written; choose a folder you own"):
            made(run).train()
        assert contents(run / "checkpoint-2") == good


def test_a_folder_that_turns_read_only_under_way(config, tmp_path):
    """In a process of its own, between two checkpoints."""
    with mounted(tmp_path / "disk", "size=16m"):
        run = tmp_path / "disk" / "run"
        words = (
            f"--output_dir {run} --max_steps 100000 --save_steps 20 --save_total_limit 1 --lens_every 100000".split()
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "qtarget", "train", "--config", str(config), *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not checkpoints.all_of(run) and process.poll() is None:
            signal.sigtimedwait([], 0.01)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], capture_output=True)
        while process.poll() is None:  # busy while a file is open for writing
            subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], capture_output=True)
            signal.sigtimedwait([], 0.05)
        said = one_sentence(process.communicate()[1])
        assert process.returncode == 2
        assert "Read-only file system" in said and "--resume_from_checkpoint true" in said
        assert checkpoints.last(run) is not None


def test_a_file_that_may_not_grow(config, tmp_path):
    """Where no file system can be mounted: a real process whose files may not pass a size."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "qtarget", "train", "--config", str(config), "--output_dir", str(run)]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited)
    assert done.returncode == 2
    said = one_sentence(done.stderr)
    assert "File too large" in said and "there is no checkpoint yet, so start from scratch" in said
    assert not there(run) and not (run / checkpoints.UNFINISHED).exists()
    shutil.rmtree(run)


def test_what_is_no_fault_of_the_disk_is_left_alone(tmp_path):
    for error in (RuntimeError("a shape is wrong"), FileNotFoundError(2, "No such file", "x"), OSError("odd")):
        with pytest.raises(type(error)), checkpoints.storage_errors("it", tmp_path):
            raise error
    with pytest.raises(PermissionError), checkpoints.storage_errors("it", tmp_path):
        raise PermissionError(13, "Permission denied", "/elsewhere/rows.jsonl")
