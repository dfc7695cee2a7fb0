"""``qtarget train``: fine-tune a model toward a target, from a YAML file and flags.

Keys of the file and flags are TRL's names and those below; flags win. Peers' spellings of an objective (use_dft_loss,
use_eaft, gem_beta, ...) are read too. On several GPUs: accelerate launch -m qtarget train --config FILE, or torchrun
--nproc_per_node N -m qtarget train --config FILE.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtarget.cli import fields, picture, setup, terminal
from qtarget.cli.arguments import Option, Verb, whole
from qtarget.errors import ConfigError

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

VERB = Verb("train", __doc__, more=fields.common)


@VERB.command(
    Option("dry_run", "check the recipe without weights; nothing is written"),
    Option("gpus", "of the dry run; unset: 8", whole(1)),
    picture.SHOW_ROWS,
    Option("help_all", "this help with every setting"),
    settings=True,
)
def train_model(options: Any) -> int:
    if options.help_all:
        print(VERB.help(fields.every()), end="")
        return 0
    if options.dry_run:
        from qtarget.cli import preview
        from qtarget.planning import steps

        preview.show(options.words, options.gpus or steps.GPUS, options.show_rows)
        return 0
    if options.gpus is not None:
        raise ConfigError(
            f"gpus is {str(options.gpus)!r} without --dry_run; a run takes its number of processes from accelerate "
            "launch --num_processes, or torchrun --nproc_per_node"
        )
    run = setup.read(options.words)
    if terminal.is_main():
        _print_settings(run)
    trainer = setup.build(run)
    from qtarget.training import checkpoints

    try:
        with checkpoints.storage_errors("what the run leaves", run.config.output_dir):
            return train(trainer, run, options.show_rows)
    except ConfigError:
        print(file=sys.stderr)  # leave the progress bar's line
        raise


# -- the run -----------------------------------------------------------------------------------------------------


def train(trainer: QTargetTrainer, run: setup.Run, show_rows: int = 1) -> int:
    from qtarget import files
    from qtarget.cli import recipe, summary

    config, script = run.config, run.script
    if (seen := trainer.picture()) is not None and terminal.is_main():
        picture.show(seen, show_rows)
    evaluated = trainer.eval_dataset is not None
    before = summary.at_start(trainer) if evaluated else {}
    result = trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    after = summary.evaluate(trainer) if evaluated else {}
    trainer.save_model(config.output_dir)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    if trainer.accelerator.is_main_process:
        folder = Path(config.output_dir)
        files.write_json(folder / "target.json", trainer.args.resolve_objective().to_config())
        if run.settings.notes:
            recipe.write(folder, run.settings.notes, run.settings.given_by("flag"))
        if evaluated:
            files.write_json(folder / "before_after.json", {"before": before, "after": after})
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


def _print_settings(run: setup.Run) -> None:
    """Each setting with its origin; of TRL's many, those that were given or that the help table shows."""
    settings, given = run.settings, run.settings.origin
    names = [*fields.names(), *(name for name in given if name not in fields.names())]
    width = max(len(name) for name in names)
    print("settings")
    for name in names:
        holder = next((h for h in (run.config, run.model, run.script) if hasattr(h, name)), None)
        value = getattr(holder, name) if holder is not None else settings.spelled.get(name)
        if name in given or value is not None:
            print(f"  {name:<{width}}  {fields.shown(value):<40}  {given.get(name, 'default')}")
    for note in run.notes:
        print(f"note: {note}")
