"""Checkpoints that are complete or absent, even if the run is killed in between.

A checkpoint is written as ``_unfinished/checkpoint-N`` in the run's folder and renamed once its last file is there, so
every ``checkpoint-N`` is whole: for qtarget, for Transformers and for a script that copies folders. It also lists its
files with their sizes, which tells a copy that was cut short.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME, safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, sort_checkpoints

from qtarget import files
from qtarget.errors import StorageError, raise_together, reason
from qtarget.training.saving import output_folder

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

logger = logging.getLogger(__name__)

# Where a checkpoint is written, and where it goes to be deleted. Transformers leaves _* out of uploads to the hub.
UNFINISHED = "_unfinished"
FILES = "qtarget_files.json"
# What a run that goes on unpickles, up to tensors. Copies of weights that a target keeps are looked at when they are
# loaded; training_args.bin and a callback's own files are never read.
_PICKLED = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "pytorch_model*.bin", "adapter_model.bin")


# -- reading -----------------------------------------------------------------------------------------------------


def fault(folder: str | Path) -> str | None:
    """Why a checkpoint is not whole, in a few words, or None. Files are told by their sizes, not read."""
    folder = Path(folder)
    if not (folder / TRAINER_STATE_NAME).is_file():
        return f"{TRAINER_STATE_NAME} is missing"
    try:
        listed = files.checked(files.loads((folder / FILES).read_bytes()), dict[str, int])
    except FileNotFoundError:  # another program's, which writes its state last
        return None
    except (ValueError, OSError) as error:
        return f"{FILES} cannot be read ({error})"
    for name, size in listed.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes of {size}"
    return None


def all_of(run: str | Path) -> list[Path]:
    """The checkpoints of a run, whole or not, the latest first."""
    steps = {folder: folder.name.split("-", 1)[1] for folder in Path(run).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    folders = [folder for folder, step in steps.items() if step.isdecimal() and folder.is_dir()]
    return sorted(folders, key=lambda folder: int(steps[folder]), reverse=True)


def last(run: str | Path) -> Path | None:
    """The latest whole checkpoint of a run."""
    return next((folder for folder in all_of(run) if fault(folder) is None), None)


def passed_over(run: str | Path) -> list[str]:
    """A sentence for each checkpoint that is later than the last whole one."""
    faults = ((folder, fault(folder)) for folder in all_of(run))
    later = itertools.takewhile(lambda pair: pair[1] is not None, faults)
    return [f"{folder} is incomplete ({why}): it is skipped" for folder, why in later]


def unreadable_files(folder: str | Path) -> list[str]:
    """Sentences on files that cannot be read or are pickles of more than tensors; none where all can be loaded."""
    folder = Path(folder)
    setting = f"resume_from_checkpoint is {str(folder)!r}"
    try:
        files.checked(files.loads((folder / TRAINER_STATE_NAME).read_bytes()), dict)
    except (OSError, ValueError) as error:
        return [f"{setting}, whose {TRAINER_STATE_NAME} cannot be read ({error}); name another checkpoint"]
    faults = []
    pickled = {file for name in _PICKLED for file in folder.glob(name)}
    for file in sorted(pickled | {*folder.glob("*.safetensors")}):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
            else:
                with safe_globals():
                    torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
        except Exception as error:  # a pickle that is none may make anything of the unpickler
            faults.append(f"{setting}, whose {file.name} cannot be loaded: {reason(error)}; name another checkpoint")
    return faults


def to_resume_from(resume_from_checkpoint: Any, output_dir: Any) -> str | None:
    """The folder a run would resume from: the one that is named, for True the last whole one, or None.

    Raises:
        StorageError: the one that is named is not whole.
    """
    if isinstance(resume_from_checkpoint, str | Path):
        folder = Path(resume_from_checkpoint)
        if (why := fault(folder)) is None:
            return str(folder)
        whole = last(folder.parent)
        mend = (
            "start from scratch in another output_dir" if whole is None else f"the last complete one is {str(whole)!r}"
        )
        what = f"is incomplete: {why}" if folder.is_dir() else "is not a folder"
        raise StorageError(f"resume_from_checkpoint is {str(folder)!r}, which {what}; {mend}")
    whole = last(output_dir) if resume_from_checkpoint else None
    return None if whole is None else str(whole)


def step_of(folder: str | Path) -> int:
    """The optimiser step at which a checkpoint was written."""
    return int(json.loads((Path(folder) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"])


def begin(trainer: QTargetTrainer, run: str, resume_from_checkpoint: Any) -> str | None:
    """Before a run starts: can its folder be written, and which checkpoint does it go on from.

    Raises:
        StorageError: the folder cannot be written, or a file of the checkpoint cannot be loaded.
    """
    if trainer.args.should_save:
        raise_together(output_folder.unwritable(Path(run)), StorageError)
    folder = to_resume_from(resume_from_checkpoint, run)
    if resume_from_checkpoint is True and trainer.is_world_process_zero():
        for sentence in passed_over(run):
            logger.warning(sentence)
        if folder is None:
            logger.warning(f"{run} holds no checkpoint to resume from: the run starts at step 0")
    raise_together([] if folder is None else unreadable_files(folder), StorageError)
    if trainer.args.should_save:
        clear(run)
        if folder is None and trainer.args.overwrite_output_dir:
            output_folder.delete_run(Path(run))
    return folder


# -- writing -----------------------------------------------------------------------------------------------------


def list_files(folder: Path) -> None:
    """Write the sizes of a checkpoint's files into it."""
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}
    sizes.pop(FILES, None)
    (folder / FILES).write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")


def put(written: Path, finished: Path) -> None:
    """Give a written checkpoint its name; one of an earlier run that has it goes first."""
    _set_aside(finished)
    written.rename(finished)
    clear(finished.parent)


def remove(folder: Path) -> None:
    """Delete a checkpoint, which loses its name before its first file."""
    _set_aside(folder)
    clear(folder.parent)


def _set_aside(folder: Path) -> None:
    aside = folder.parent / UNFINISHED / f"deleted-{folder.name}"
    aside.parent.mkdir(exist_ok=True)
    with contextlib.suppress(FileNotFoundError):  # there is none, or another process was first
        folder.rename(aside)


def clear(run: str | Path) -> None:
    """Delete what is unfinished or set aside, also by a killed run."""
    shutil.rmtree(Path(run) / UNFINISHED, ignore_errors=True)


def rotate(run: Path, limit: int | None, best: str | None) -> None:
    """Delete all but the last ``limit`` checkpoints and the best, as Transformers' ``rotate_checkpoints`` does."""
    folders = sort_checkpoints(str(run), use_mtime=True)
    if not limit or limit <= 0 or not folders:
        return
    protected = {folders[-1]} | ({str(Path(best))} if best else set())
    spare = [folder for folder in folders if folder not in protected]
    for folder in spare[: max(0, len(folders) - max(limit, len(protected)))]:
        remove(Path(folder))


@contextlib.contextmanager
def storage_errors(what: str, run: str | Path) -> Iterator[None]:
    """Turn what the file system refuses into a sentence that names the checkpoint to go on from.

    Args:
        what: could not be written. run: the run's folder.

    Raises:
        StorageError: the disk is full, the folder cannot be written any more, a file would be too large.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        refusal = _refusal(error, Path(run).absolute())
        if refusal is None:
            raise
        clear(run)
        mend = "there is no checkpoint yet, so start from scratch"
        if (whole := last(run)) is not None:
            mend = f"resume from the last complete checkpoint, {whole.name}, with --resume_from_checkpoint true"
        raise StorageError(
            f"{what} could not be written to {str(run)!r}: {refusal}; free some space or fix the folder's permissions, "
            f"then {mend}"
        ) from error


def _refusal(error: BaseException | None, run: Path) -> str | None:
    """What the file system said, or None where it is not the file system that speaks, or of what was only read."""
    while error is not None:
        text = str(error)
        if isinstance(error, OSError) and error.errno in files.REFUSED:
            inside = error.filename is None or run in Path(os.fsdecode(error.filename)).absolute().parents
            rights = error.errno in (errno.EACCES, errno.EPERM)
            return None if rights and not inside else os.strerror(error.errno or 0)
        if isinstance(error, SafetensorError) and "os error" in text:  # ... No space left on device (os error 28)
            return text.rsplit(": ", 1)[-1].split(" (os error")[0]
        if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "inline_container" in text):
            return "the disk is full or a file is too large"  # torch.save keeps the number to itself
        error = error.__cause__ or error.__context__
    return None


class AtomicCheckpoints:
    """Writes a trainer's checkpoints: complete or not there.

    Attributes:
        writing: whether the host is writing one now, into a folder that is no checkpoint yet.
    """

    def __init__(self) -> None:
        self.writing = False

    def folder(self, run: str) -> str:
        """Where the host writes: ``run``, or a folder in it that is no checkpoint yet."""
        return os.path.join(run, UNFINISHED) if self.writing else run

    def save(
        self, trainer: QTargetTrainer, run: Path, write: Callable[[], object], push: Callable[[str], object]
    ) -> None:
        """A checkpoint of the step that is done.

        Args:
            run: the run's folder. write: the host's own part. push: uploads a finished one; an upload in the background
                needs a folder that stays.
        """
        finished = run / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        written = run / UNFINISHED / finished.name
        wait = trainer.accelerator.wait_for_everyone
        # Nodes may keep folders of their own.
        first_here = trainer.is_local_process_zero()
        with storage_errors(f"step {trainer.state.global_step}: the checkpoint", run):
            if first_here:
                clear(run)
            wait()
            self.writing = True
            try:
                write()
            finally:
                self.writing = False
            _name_best(trainer, run, finished, written)
            trainer.write_into_checkpoint(written)
            puts = trainer.is_world_process_zero()
            wait()
            if puts:
                list_files(written)
            wait()
            if first_here and not (written / FILES).exists():  # a node whose folder is its own
                puts = True
                list_files(written)
            wait()
            if puts:
                put(written, finished)
            wait()
        if trainer.args.push_to_hub:
            push(str(finished))
        if trainer.args.should_save:
            rotate(run, trainer.args.save_total_limit, trainer.state.best_model_checkpoint)


def _name_best(trainer: QTargetTrainer, run: Path, finished: Path, written: Path) -> None:
    """Where the best checkpoint will be: Transformers looked for it beside the one being written."""
    strategies = SaveStrategy.STEPS, SaveStrategy.EPOCH, SaveStrategy.BEST
    if not trainer.state.best_global_step or trainer.args.save_strategy not in strategies:
        return
    best = run / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.best_global_step}"
    if best == finished or best.exists():
        trainer.state.best_model_checkpoint = str(best)
    if trainer.args.should_save:
        trainer.state.save_to_json(str(written / TRAINER_STATE_NAME))
