"""``qtarget train``: a model, a dataset and a target from a YAML file and flags."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtarget.cli import fields
from qtarget.errors import ConfigError

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

_USAGE = """\
usage: qtarget train --config FILE [--any_field value ...]
       qtarget train --config FILE --dry_run [--gpus 8]   check a recipe without weights; nothing is written
       accelerate launch -m qtarget train --config FILE   (or torchrun --nproc_per_node N -m qtarget train ...)

Fine-tune a model toward a target. Keys of the file and flags are TRL's names and those below; flags win. Peers'
spellings of an objective (use_dft_loss, use_eaft, gem_beta, ...) are read too.
"""


def run(arguments: Sequence[str]) -> int:
    if "-h" in arguments or "--help" in arguments or not arguments:
        _print_help()
        return 0
    if "--help_all" in arguments or "--help-all" in arguments:
        _print_help_all()
        return 0
    from qtarget.cli import options, setup

    own, arguments = options.take(arguments, {"gpus": None}, flags=("dry_run",))
    if own["dry_run"]:
        from qtarget.cli import dry_run

        return dry_run.run(arguments, options.whole("gpus", own["gpus"] or dry_run.GPUS, 1))
    if own["gpus"] is not None:
        raise ConfigError(
            f"gpus is {own['gpus']!r} without --dry_run; a run takes its number of processes from accelerate launch "
            "--num_processes, or torchrun --nproc_per_node"
        )
    asked = setup.read(arguments)
    if _is_main():
        _print_settings(asked)
    trainer = setup.build(asked)
    from qtarget.training import checkpoints

    try:
        with checkpoints.storage_errors("what the run leaves", asked.config.output_dir):
            return _train(trainer, asked)
    except ConfigError:
        print(file=sys.stderr)  # leave the progress bar's line
        raise


# -- the run -----------------------------------------------------------------------------------------------------


def _train(trainer: QTargetTrainer, asked: Any) -> int:
    from qtarget.cli import recipe, setup, summary

    config, script = asked.config, asked.script
    evaluated = trainer.eval_dataset is not None
    before = summary.at_start(trainer) if evaluated else {}
    result = trainer.train(resume_from_checkpoint=setup.resume(config.resume_from_checkpoint))
    after = summary.evaluate(trainer) if evaluated else {}
    trainer.save_model(config.output_dir)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    if trainer.accelerator.is_main_process:
        folder = Path(config.output_dir)
        (folder / "target.json").write_text(json.dumps(trainer.args.resolve_objective().to_config(), indent=2) + "\n")
        if asked.settings.notes:
            recipe.write(folder, asked.settings.notes, asked.settings.given_by("flag"))
        if evaluated:
            (folder / "before_after.json").write_text(json.dumps({"before": before, "after": after}, indent=2) + "\n")
        # After the last evaluation, whose figures it shows. A folder is no data set of the hub to link to.
        name = script.dataset_name
        trainer.create_model_card(model_name=folder.name, dataset_name=None if Path(name).exists() else name)
        summary.show(trainer, before, after, folder)
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    trainer.accelerator.wait_for_everyone()
    if hasattr(trainer, "end"):
        trainer.end()
    return 0


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


# -- help and settings -------------------------------------------------------------------------------------------


def _print_help() -> None:
    print(_USAGE)
    for group, rows in fields.COMMON:
        print(f"{group}:")
        for name, default, what in rows:
            shown = "" if default is None else f" ({_shown(default)})"
            print(f"  --{name:<30} {what}{shown}")
        print()
    print("every field: qtarget train --help_all      the targets: qtarget targets")


def _print_help_all() -> None:
    from qtarget.cli.settings import groups

    print(_USAGE)
    for group, cls in groups().items():
        print(f"{group} ({cls.__name__}):")
        for field in dataclasses.fields(cls):
            if field.init:
                default = "" if field.default is dataclasses.MISSING else f" ({_shown(field.default)})"
                text = " ".join(str(field.metadata.get("help", "")).replace("%%", "%").split())
                print(f"  --{field.name:<32} {text}{default}")
        print()


def _print_settings(asked: Any) -> None:
    """Each setting with its origin; of TRL's many, those that were given or that the help table shows."""
    settings, given = asked.settings, asked.settings.origin
    names = [*fields.names(), *(name for name in given if name not in fields.names())]
    width = max(len(name) for name in names)
    print("settings")
    for name in names:
        holder = next((h for h in (asked.config, asked.model, asked.script) if hasattr(h, name)), None)
        value = getattr(holder, name) if holder is not None else settings.spelled.get(name)
        if name in given or value is not None:
            print(f"  {name:<{width}}  {_shown(value):<40}  {given.get(name, 'default')}")
    for note in asked.notes:
        print(f"note: {note}")


def _shown(value: Any) -> str:
    return str(getattr(value, "value", value))
