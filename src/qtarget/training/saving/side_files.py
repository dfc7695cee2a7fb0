"""What a run saves: its weights first, so that no other file's failure can lose them."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, PreTrainedModel

from qtarget import files
from qtarget.errors import reason

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

logger = logging.getLogger(__name__)


class SideFiles:
    """Files beside the weights. One that cannot be written is warned of, and the run goes on.

    Attributes:
        failed: what could not be written → why.
    """

    def __init__(self) -> None:
        self.failed: dict[str, str] = {}

    @contextlib.contextmanager
    def writing(self, what: str, full_disk: bool = False) -> Iterator[None]:
        """``full_disk``: raise what the file system itself refuses, for a caller who knows what to go on from."""
        try:
            yield
        except Exception as error:  # of whatever library writes it
            if full_disk and isinstance(error, OSError) and error.errno in files.REFUSED:
                raise
            if what not in self.failed:
                logger.warning(f"{what} could not be written: {reason(error)}; the weights are saved anyway")
            self.failed[what] = reason(error)


def weights_first(
    trainer: QTargetTrainer, host: Callable[..., None], output_dir: str | None, state_dict: dict | None
) -> None:
    """The host's ``_save`` with its side files after the weights, each on its own."""
    folder = Path(output_dir or str(trainer.args.output_dir))
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    processing, collator = trainer.processing_class, trainer.data_collator
    alone: dict[str, Callable[..., object]] = {}
    if isinstance(model, PreTrainedModel):
        alone["can_generate"] = lambda: False
    if hasattr(model, "create_or_update_model_card"):  # PEFT's
        alone["create_or_update_model_card"] = lambda *_: None
    trainer.processing_class = trainer.data_collator = None
    model.__dict__.update(alone)
    try:
        host(output_dir, state_dict)
    finally:
        trainer.processing_class, trainer.data_collator = processing, collator
        for name in alone:
            del model.__dict__[name]
    if not trainer.args.should_save:
        return
    side = {"the tokenizer": processing or getattr(collator, "tokenizer", None)}
    if "can_generate" in alone and model.can_generate():
        side["generation_config.json"] = model.generation_config
    for what, part in side.items():
        with trainer.side_files.writing(what, full_disk=trainer.checkpoints.writing):
            if part is not None:
                part.save_pretrained(folder)
    if "create_or_update_model_card" in alone:
        with trainer.side_files.writing("README.md", full_disk=trainer.checkpoints.writing):
            model.create_or_update_model_card(str(folder))


def mend_generation_config(model: Any) -> None:
    """Take out of a model's generation settings what contradicts the rest: Transformers would refuse to save them."""
    config = getattr(model, "generation_config", None)
    taken: dict[str, Any] = {}
    if not isinstance(config, GenerationConfig):
        return
    while (fault := _fault(config)) is not None:
        names = [name for name in re.findall(r"^- `(\w+)`:", fault, re.M) if hasattr(config, name)]
        if not set(names) - taken.keys():
            ends = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            config = model.generation_config = GenerationConfig(**ends)
            logger.warning(
                f"the model's generation_config.json cannot be saved ({reason(ValueError(fault))}): its end tokens are "
                "kept, the rest is dropped"
            )
            return
        taken |= {name: getattr(config, name) for name in names}
        for name in names:
            setattr(config, name, None)
    if taken:
        shown = ", ".join(f"{name} {value}" for name, value in taken.items())
        logger.warning(
            f"the model's generation_config.json contradicts itself and could not be saved; left out of what this run "
            f"saves: {shown} (used only with do_sample, or with several beams)"
        )


def _fault(config: GenerationConfig) -> str | None:
    try:
        config.validate(strict=True)
    except (ValueError, TypeError) as error:
        return str(error)
    return None
