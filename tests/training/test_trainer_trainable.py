"""Nothing is trained where no parameter asks for a gradient, or the loss reaches none that does: refused by name."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import tiny_models
from qtarget import ConfigError
from quick_runs import change_by_training, quick_trainer, train_quickly

LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(tiny_models.llama(), LORA).save_pretrained(folder)
    return folder


def test_adapters_that_were_loaded_to_be_read_are_refused_before_training(adapter, tmp_path):
    frozen = PeftModel.from_pretrained(tiny_models.llama(), adapter)
    trainer = quick_trainer(frozen, tmp_path)
    with pytest.raises(ConfigError, match=r"^nothing is trainable: .*is_trainable=True"):
        trainer.train()
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_adapters_that_were_loaded_to_be_trained_move(adapter, tmp_path):
    change = change_by_training(PeftModel.from_pretrained(tiny_models.llama(), adapter, is_trainable=True), tmp_path)
    assert change and all("lora_" in name for name in change)
    assert any(float(moved.norm()) > 0 for moved in change.values())


def test_a_part_that_is_frozen_stays_and_the_rest_moves(tmp_path):
    model = tiny_models.llama()
    model.model.layers[0].requires_grad_(False)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    train_quickly(model, tmp_path)
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if not name.startswith("model.layers.0.")}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_parameters_that_the_loss_does_not_reach_are_refused_before_a_step(checkpointing, tmp_path):
    model = tiny_models.llama().requires_grad_(False)
    model.unused = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ConfigError, match=r"^nothing is trained: the loss reaches none of the 1 parameters .* unused"):
        train_quickly(model, tmp_path, gradient_checkpointing=checkpointing)


def test_an_adapter_that_is_not_in_use_is_refused(tmp_path):
    model = get_peft_model(tiny_models.llama(), LORA)
    model.add_adapter("other", LORA)
    model.set_adapter("other")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".default." in name
    with pytest.raises(ConfigError, match=r"nothing is trained: .*model\.set_adapter\(name\)"):
        train_quickly(model, tmp_path)


def test_single_tokens_of_a_tied_head_are_refused(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]})
    with pytest.raises(ConfigError, match="head is tied to its embedding"):
        quick_trainer(tiny_models.llama(), tmp_path, peft_config=lora)
