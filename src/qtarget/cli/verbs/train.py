"""``qtarget train``: fine-tune a model toward a target, from a YAML file and flags.

Keys of the file and flags are TRL's names and those below; flags win. Other libraries' settings (use_dft_loss,
use_eaft, gem_beta, ...) are read too. On several GPUs: accelerate launch -m qtarget train --config FILE, or torchrun
--nproc_per_node N -m qtarget train --config FILE.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtarget.cli import fields, picture, setup, terminal
from qtarget.cli.arguments import SWITCH, Option, Verb, one_of, whole
from qtarget.errors import ConfigError

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

VERB = Verb("train", __doc__, more=fields.common)


@VERB.command(
    Option("dry_run", "check the recipe without weights; nothing is written"),
    Option("gpus", "GPUs that the dry run assumes; unset: 8", whole(1)),
    picture.SHOW_ROWS,
    Option("show_settings", "settings printed first: the changed ones or all", one_of("changed", "all"), "changed"),
    Option("log_full", "every figure of each log line, as a dict, in place of the table", SWITCH, False),
    Option("help_all", "this help with every setting"),
    settings=True,
)
def train_model(options: Any) -> int:
    if options.help_all:
        print(VERB.help(fields.every()), end="")
        return 0
    every_setting = options.show_settings == "all"
    if options.dry_run:
        from qtarget.cli import preview
        from qtarget.planning import steps

        preview.show(options.words, options.gpus or steps.GPUS, options.show_rows, every_setting)
        return 0
    if options.gpus is not None:
        raise ConfigError(
            f"gpus is {str(options.gpus)!r} without --dry_run; a run takes its number of processes from accelerate "
            "launch --num_processes, or torchrun --nproc_per_node"
        )
    run = setup.read(options.words)
    if terminal.is_main():
        fields.show_run(run, every_setting)
    from qtarget.training.saving import checkpoints

    try:
        trainer = setup.build(run)
        with checkpoints.storage_errors("what the run leaves", run.config.output_dir):
            return train(trainer, run, options.show_rows, options.log_full)
    except ConfigError:
        if terminal.has_bars():  # leave the bar's line
            print(file=sys.stderr)
        raise
    except KeyboardInterrupt:
        checkpoint = checkpoints.last(run.config.output_dir)
        raise KeyboardInterrupt(_how_to_go_on(run, checkpoint)) from None


def _how_to_go_on(run: setup.Run, checkpoint: Path | None) -> str:
    if checkpoint is None:
        return "interrupted; there is no checkpoint yet, so the same command starts anew"
    more = [] if run.config.resume_from_checkpoint is True else ["--resume_from_checkpoint", "true"]
    more += ["--overwrite_output_dir", "false"] if run.config.overwrite_output_dir else []
    return f"interrupted; go on from {checkpoint.name} with: qtarget train {shlex.join([*run.words, *more])}"


# -- the run -----------------------------------------------------------------------------------------------------


def train(trainer: QTargetTrainer, run: setup.Run, show_rows: int = 1, log_full: bool = False) -> int:
    from qtarget import files
    from qtarget.cli import log_table, recipe, summary

    config, script, folder = run.config, run.script, Path(run.config.output_dir)
    evaluated, beside = trainer.eval_dataset is not None, trainer.side_files.writing
    if (seen := trainer.picture()) is not None and terminal.is_main():
        picture.show(seen, show_rows)
    with log_table.shown(trainer, log_full):
        before = summary.at_start(trainer) if evaluated else {}
        try:
            result = trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
        except Exception:
            # What fails after the last step, such as a tracker's farewell, must not cost what was trained.
            sharded, state = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled, trainer.state
            if 0 < state.max_steps <= state.global_step and not sharded:
                trainer.save_model(config.output_dir)
            raise
        trainer.save_model(config.output_dir)
        after = summary.evaluate(trainer) if evaluated else {}
    with beside("train_results.json"):
        trainer.save_metrics("train", result.metrics)
    with beside("trainer_state.json"):
        trainer.save_state()
    if trainer.accelerator.is_main_process:
        with beside("target.json"):
            files.write_json(folder / "target.json", trainer.args.resolve_objective().to_config())
        if run.settings.notes:
            with beside("the recipe"):
                recipe.write(folder, run.settings.notes, run.settings.given_by("flag"))
        if evaluated:
            with beside("before_after.json"):
                files.write_json(folder / "before_after.json", {"before": before, "after": after})
        # After the last evaluation, whose figures it shows. A folder is no data set of the hub to link to.
        name = script.dataset_name
        trainer.create_model_card(model_name=folder.name, dataset_name=None if Path(name).exists() else name)
        summary.show(trainer, run, before, after)
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    trainer.accelerator.wait_for_everyone()
    if hasattr(trainer, "end"):
        trainer.end()
    if missing := trainer.side_files.failed:
        print(f"qtarget train: the weights are in {folder}, without {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0
