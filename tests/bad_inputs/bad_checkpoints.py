"""Checkpoints that a run is to go on from."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bad_models import Boom, cut, without, write
from bench import Bench, Case

from qtarget.training.saving import checkpoints

CHECKPOINT = "checkpoint-1"


def resumed(
    id: str, wrong: str, damage: Any, *says: str, reads: bool = False, listed: bool = True, **settings: Any
) -> Case:
    """The world's stopped run, damaged, gone on with. ``listed``: the list of files is made to agree with the damage, as
    whoever damages a checkpoint on purpose would; otherwise it tells by itself that the checkpoint is not whole."""

    def do(bench: Bench) -> list[object]:
        run = bench.copy("stopped")
        run.rename(bench.folder / "run")
        damage(bench.folder / "run" / CHECKPOINT)
        if listed:
            checkpoints.list_files(bench.folder / "run" / CHECKPOINT)
        own = {"target": "psft", "max_length": 120, "dataset_name": bench.world / "few", "max_steps": 2, **settings}
        return bench.train(resume_from_checkpoint="true", **own)

    return Case(id, wrong, do, says, reads)


def pickled(name: str) -> Callable[[Path], None]:
    """A file that writes another when it is unpickled."""

    def damage(folder: Path) -> None:
        with (folder / name).open("wb") as stream:
            pickle.dump({"a": Boom(folder / "ran")}, stream)

    return damage


def torch_pickled(name: str) -> Callable[[Path], None]:
    return lambda folder: torch.save({"a": Boom(folder / "ran")}, folder / name)


def old_policy(**values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        held = torch.load(folder / "psft_old_policy_0.pt", weights_only=True)
        torch.save(held | values, folder / "psft_old_policy_0.pt")

    return damage


def nothing(folder: Path) -> None:
    return None


def target_file(**values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        held = json.loads((folder / "qtarget.json").read_text())
        (folder / "qtarget.json").write_text(json.dumps(held | values))

    return damage


CASES = [
    Case(
        "no-checkpoint",
        "no such folder",
        lambda b: b.train(resume_from_checkpoint=str(b.folder / "checkpoint-9")),
        ("resume_from_checkpoint is", "checkpoint-9', which is not a folder"),
    ),
    Case(
        "nothing-to-resume",
        "a run without a checkpoint, killed before its first: it starts, and the log says so",
        lambda b: b.train(resume_from_checkpoint="true"),
        (),
        True,
    ),
    Case(
        "an-empty-checkpoint",
        "a checkpoint with nothing in it",
        lambda b: b.train(resume_from_checkpoint=str(b.file("checkpoint-1/.keep", "").parent)),
        ("resume_from_checkpoint is", "trainer_state.json"),
    ),
    resumed(
        "half-an-identity",
        "half of qtarget.json",
        cut("qtarget.json"),
        "qtarget.json cannot be read",
        "resume from another checkpoint",
    ),
    resumed(
        "an-identity-that-is-a-list", "a list", write("qtarget.json", "[1]"), "qtarget.json cannot be read", "resume"
    ),
    resumed(
        "another-target",
        "a run of another target",
        target_file(target="dft"),
        "target is",
        "was trained with 'dft'; resume with that",
    ),
    resumed(
        "another-denominator",
        "another denominator",
        nothing,
        "denominator is 'micro_batch', but the checkpoint",
        denominator="micro_batch",
    ),
    *(
        resumed(f"another-{id}", wrong, nothing, says, "was trained with", **settings)
        for id, wrong, says, settings in (
            ("rate", "a rate that the state overrides", "learning_rate is 0.001, but", {"learning_rate": 1e-3}),
            ("decay", "a decay that the state overrides", "weight_decay is 0.1, but", {"weight_decay": 0.1}),
            ("optimiser", "an optimiser that the state is not of", "optim is sgd, but", {"optim": "sgd"}),
            (
                "batch",
                "so the rows skipped would not be those",
                "per_device_train_batch_size × gradient_accumulation_steps × processes is 1, but",
                {"per_device_train_batch_size": 1},
            ),
            ("seed", "so the rows skipped would not be those", "seed is 5, but", {"seed": 5}),
        )
    ),
    resumed(
        "the-same-batch-in-parts",
        "a batch of two as two of one: it goes on",
        nothing,
        reads=True,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
    ),
    resumed("half-a-course", "half of its file", cut("qtarget_course.json"), "qtarget_course.json cannot be read"),
    resumed(
        "a-course-that-is-a-list", "a list", write("qtarget_course.json", "[1]"), "qtarget_course.json cannot be read"
    ),
    resumed(
        "half-a-state", "half of trainer_state.json", cut("trainer_state.json"), "trainer_state.json cannot be read"
    ),
    resumed(
        "no-state",
        "no trainer_state.json",
        without("trainer_state.json"),
        "resume_from_checkpoint is",
        "trainer_state.json",
    ),
    resumed(
        "half-the-weights",
        "weights cut in half",
        cut("model.safetensors"),
        "resume_from_checkpoint is",
        "cannot be loaded",
    ),
    resumed(
        "half-an-optimiser", "half of optimizer.pt", cut("optimizer.pt"), "resume_from_checkpoint is", "optimizer.pt"
    ),
    resumed(
        "an-optimiser-that-is-code",
        "a pickle that runs code: not run",
        torch_pickled("optimizer.pt"),
        "resume_from_checkpoint is",
        "optimizer.pt",
        "pickle",
    ),
    resumed(
        "a-schedule-that-is-code",
        "a pickle that runs code: not run",
        torch_pickled("scheduler.pt"),
        "resume_from_checkpoint is",
        "scheduler.pt",
        "pickle",
    ),
    resumed(
        "random-numbers-that-are-code",
        "a pickle that runs code: not run",
        torch_pickled("rng_state.pth"),
        "resume_from_checkpoint is",
        "rng_state.pth",
        "pickle",
    ),
    resumed(
        "arguments-that-are-code",
        "training_args.bin is written and never read: the run goes on",
        pickled("training_args.bin"),
        reads=True,
    ),
    resumed(
        "no-old-policy",
        "no copy of the old policy",
        without("psft_old_policy_0.pt"),
        "resume_from_checkpoint is",
        "which holds no old policy",
    ),
    resumed(
        "an-old-policy-that-is-code",
        "a pickle that runs code: not run",
        torch_pickled("psft_old_policy_0.pt"),
        "psft_old_policy_0.pt",
        "pickle",
    ),
    resumed(
        "half-an-old-policy",
        "a file cut in half",
        cut("psft_old_policy_0.pt"),
        "psft_old_policy_0.pt",
        "cannot be loaded",
    ),
    resumed(
        "a-copy-cut-short",
        "a copy of a checkpoint that was cut short",
        cut("model.safetensors"),
        "holds no complete checkpoint",
        "model.safetensors has",
        listed=False,
    ),
    resumed(
        "a-copy-without-a-file",
        "a copy of a checkpoint without a file",
        without("optimizer.pt"),
        "holds no complete checkpoint",
        "optimizer.pt is missing",
        listed=False,
    ),
    resumed("an-old-policy-of-another-shape", "a list for weights", old_policy(weights=[1]), "psft_old_policy_0.pt"),
]
