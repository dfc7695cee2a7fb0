"""Is anything trained: parameters that require a gradient, and a loss that reaches them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from qtarget.errors import ConfigError

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer


def all_frozen(model: nn.Module) -> list[str]:
    """The sentence for a model without a trainable parameter; one of which a part is frozen is as the user wants it."""
    if any(parameter.requires_grad for parameter in model.parameters()):
        return []
    adapter = "load it with PeftModel.from_pretrained(model, folder, is_trainable=True)"
    mend = adapter if hasattr(model, "peft_config") else "unfreeze some: parameter.requires_grad_(True)"
    return [f"nothing is trainable: no parameter of the model requires a gradient; {mend}"]


def out_of_reach(model: nn.Module) -> list[str]:
    """The sentence for a loss that depends on no trainable parameter."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    mend = ", or activate that adapter: model.set_adapter(name)" if hasattr(model, "peft_config") else ""
    return [
        f"nothing is trained: the loss reaches none of the {len(names)} parameters that require a gradient, such as "
        f"{names[0]}; unfreeze others{mend}"
    ]


def check_reached(trainer: QTargetTrainer) -> None:
    """Raise where no parameter has a gradient after the first backward.

    Engines, and optimisers that step layer by layer during it, leave none where it could be seen.
    """
    optimizer = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or "layerwise" in optimizer or "lomo" in optimizer:
        return
    if all(parameter.grad is None for parameter in trainer.model.parameters()):
        raise ConfigError(out_of_reach(trainer.model))


def missing_modules(model: nn.Module) -> list[str]:
    """Whole modules and parameters that adapters should train and the model has not: PEFT passes them over."""
    named = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    plain = [name.replace(".base_layer", "").replace(".original_module", "") for name in named]
    return [
        f"{setting} holds {wanted!r}, which the model does not have; remove it, or name one of its modules"
        for config in getattr(model, "peft_config", {}).values()
        for setting in ("modules_to_save", "target_parameters")
        for wanted in getattr(config, setting, None) or ()
        if not any(name == wanted or name.endswith(f".{wanted}") for name in plain)
    ]


def tied_tokens(model: Any) -> list[str]:
    """Rows of single tokens that are trained beside adapters, on a model whose head is its embedding.

    PEFT trains them in the embedding alone, and the head then has other rows than the embedding it is tied to.
    """
    configs = getattr(model, "peft_config", {}).values()
    if not any(getattr(config, "trainable_token_indices", None) for config in configs):
        return []
    if not model.config.get_text_config().tie_word_embeddings:
        return []
    return [
        "adapters train the rows of single tokens (new ones of chat_template_path, or trainable_token_indices), but the "
        "model's head is tied to its embedding, where they cannot be trained alone; add the tokens to the model, save it "
        "and train from there, or train without adapters (use_peft: false)"
    ]
