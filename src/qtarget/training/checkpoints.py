"""Checkpoints that are complete or not there, whatever kills the run while one is written or deleted.

A checkpoint is written as ``_unfinished/checkpoint-N`` in the run's folder and renamed once its last file is there, so
every ``checkpoint-N`` is whole: for qtarget, for Transformers and for a script that copies folders. It also lists its
files with their sizes, which tells a copy that was cut short.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, sort_checkpoints
from trl import SFTTrainer

from qtarget import json_text
from qtarget.errors import ConfigError

# Where a checkpoint is written, and where it goes to be deleted. Transformers leaves _* out of uploads to the hub.
UNFINISHED = "_unfinished"
FILES = "qtarget_files.json"
# What the file system itself refuses. Another OSError is a fault of something else.
_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ESTALE)


# -- reading -----------------------------------------------------------------------------------------------------


def fault(folder: str | Path) -> str | None:
    """Why a checkpoint is not whole, in a few words, or None. Files are told by their sizes, not read."""
    folder = Path(folder)
    if not (folder / TRAINER_STATE_NAME).is_file():
        return f"{TRAINER_STATE_NAME} is missing"
    try:
        listed: dict[str, int] = json_text.loads((folder / FILES).read_bytes())
    except FileNotFoundError:  # another program's, which writes its state last
        return None
    except (ValueError, OSError) as error:
        return f"{FILES} cannot be read ({error})"
    if not isinstance(listed, dict):
        return f"{FILES} holds no mapping"
    for name, size in listed.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes of {size}"
    return None


def all_of(run: str | Path) -> list[Path]:
    """The checkpoints of a run, whole or not, the latest first."""
    found = [folder for folder in Path(run).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if folder.is_dir()]
    numbered = {int(number): folder for folder in found if (number := folder.name.split("-", 1)[1]).isdecimal()}
    return [numbered[number] for number in sorted(numbered, reverse=True)]


def last(run: str | Path) -> Path | None:
    """The latest whole checkpoint of a run."""
    return next((folder for folder in all_of(run) if fault(folder) is None), None)


def passed_over(run: str | Path) -> list[str]:
    """A sentence for each checkpoint that is later than the last whole one."""
    said = []
    for folder in all_of(run):
        if (why := fault(folder)) is None:
            break
        said.append(f"{folder} is not whole ({why}): it is passed over")
    return said


# -- writing -----------------------------------------------------------------------------------------------------


def list_files(folder: Path) -> None:
    """Write the sizes of a checkpoint's files into it."""
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}
    sizes.pop(FILES, None)
    (folder / FILES).write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")


def put(written: Path, finished: Path) -> None:
    """Give a written checkpoint its name; one of an earlier run that has it goes first."""
    remove(finished)
    os.rename(written, finished)
    _rmdir(written.parent)


def remove(folder: Path) -> None:
    """Delete a checkpoint, which loses its name before its first file."""
    bin_ = folder.parent / UNFINISHED / f"deleted-{folder.name}"
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(bin_, ignore_errors=True)
        if folder.exists():
            bin_.parent.mkdir(exist_ok=True)
            os.rename(folder, bin_)
            shutil.rmtree(bin_, ignore_errors=True)
            _rmdir(bin_.parent)


def clear(run: str | Path) -> None:
    """Delete what a killed run has left unfinished."""
    shutil.rmtree(Path(run) / UNFINISHED, ignore_errors=True)


def _rmdir(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not empty
        folder.rmdir()


def rotate(run: Path, limit: int | None, best: str | None) -> None:
    """Delete all but the last ``limit`` checkpoints and the best, as Transformers' ``rotate_checkpoints`` does."""
    there = sort_checkpoints(str(run), use_mtime=True)
    if not limit or limit <= 0 or not there:
        return
    protected = {there[-1]} | ({str(Path(best))} if best else set())
    spare = [folder for folder in there if folder not in protected]
    for folder in spare[: max(0, len(there) - max(limit, len(protected)))]:
        remove(Path(folder))


def unwritable(folder: str | Path) -> list[str]:
    """A sentence where a run cannot write its folder."""
    folder = Path(folder)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return [f"output_dir is {str(folder)!r}, which cannot be written; choose a folder you own"]
    return []


@contextlib.contextmanager
def told(what: str, run: str | Path) -> Iterator[None]:
    """Turn what the file system refuses into a sentence that names the checkpoint to go on from.

    Args:
        what: could not be written. run: the run's folder.

    Raises:
        ConfigError: the disk is full, the folder cannot be written any more, a file would be too large.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _refusal(error, Path(run).absolute())
        if reason is None:
            raise
        clear(run)
        whole = last(run)
        mend = "there is no checkpoint yet, so start anew"
        if whole is not None:
            mend = f"go on from the last whole checkpoint, {whole.name}, with --resume_from_checkpoint true"
        raise ConfigError(
            f"{what} could not be written to {str(run)!r}: {reason}; make room or mend the folder's rights, then {mend}"
        ) from error


def _refusal(error: BaseException | None, run: Path) -> str | None:
    """What the file system said, or None where it is not the file system that speaks, or of what was only read."""
    while error is not None:
        text = str(error)
        if isinstance(error, OSError) and error.errno in _REFUSED:
            inside = error.filename is None or run in Path(os.fsdecode(error.filename)).absolute().parents
            rights = error.errno in (errno.EACCES, errno.EPERM)
            return None if rights and not inside else os.strerror(error.errno or 0)
        if isinstance(error, SafetensorError) and "os error" in text:  # ... No space left on device (os error 28)
            return text.rsplit(": ", 1)[-1].split(" (os error")[0]
        if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "inline_container" in text):
            return "the disk is full or a file is too large"  # torch.save keeps the number to itself
        error = error.__cause__ or error.__context__
    return None


class AtomicCheckpoints(SFTTrainer):
    """TRL's trainer with checkpoints that are complete or not there; its subclass says what else goes into one."""

    _is_writing = False

    def write_into_checkpoint(self, folder: Path) -> None:
        """Write what a resumed run needs beside Transformers' files; called in every process."""

    def _get_output_dir(self, trial: Any) -> str:
        run: str = super()._get_output_dir(trial)
        return os.path.join(run, UNFINISHED) if self._is_writing else run

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Later, from the finished checkpoint: an upload in the background needs a folder that stays."""
        if not self._is_writing:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(super()._get_output_dir(trial))
        finished = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        written = run / UNFINISHED / finished.name
        with told(f"step {self.state.global_step}: the checkpoint", run):
            if self._is_first_here():
                clear(run)
            self.accelerator.wait_for_everyone()
            self._is_writing = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._is_writing = False
            self._name_best(run, finished, written)
            self.write_into_checkpoint(written)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                list_files(written)
            self.accelerator.wait_for_everyone()
            puts = self.is_world_process_zero()
            if self._is_first_here() and not (written / FILES).exists():  # a node whose folder is its own
                puts = True
                list_files(written)
            self.accelerator.wait_for_everyone()
            if puts:
                put(written, finished)
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(finished))
        if self.args.should_save:
            rotate(run, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _is_first_here(self) -> bool:
        """The first process of each node: nodes may keep folders of their own."""
        return self.is_local_process_zero()

    def _name_best(self, run: Path, finished: Path, written: Path) -> None:
        """Where the best checkpoint will be: Transformers looked for it beside the one being written."""
        strategies = SaveStrategy.STEPS, SaveStrategy.EPOCH, SaveStrategy.BEST
        if not self.state.best_global_step or self.args.save_strategy not in strategies:
            return
        best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best == finished or best.exists():
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
