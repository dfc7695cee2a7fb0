"""Whatever the model is, and whatever is put around or inside of it, the run is TRL's, step by step."""

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import set_seed

import tiny_models
from beside_trl import ONE_MICRO_BATCH, OURS, TRL, assert_same_run, run_one, side_by_side

DFT = {"loss_type": "dft"}
BFD = {"packing": True, "max_length": 64}
PADDING_FREE = {"padding_free": True, "max_length": None}


def named(cases):
    """Every case under its name."""
    return pytest.mark.parametrize("case", cases.values(), ids=cases)


# -- architectures ---------------------------------------------------------------------------------


def untied():
    return tiny_models.trained_model(tied=False)


def wide():
    """A head with more rows than the tokenizer has tokens, as padded to a multiple."""
    return tiny_models.trained_model(vocab=384)


def gpt2():
    return tiny_models.trained_model(tiny_models.gpt2)


def with_dropout():
    """Drops parts of the embeddings, of the attention and of each layer's output."""
    model = gpt2()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    return model


def gemma2():
    return tiny_models.trained_model(tiny_models.gemma2)


def cohere():
    return tiny_models.trained_model(tiny_models.cohere)


def granite():
    return tiny_models.trained_model(tiny_models.granite)


# Gentle steps: Granite's divided logits send float32 and float64 apart within three that are long.
@pytest.mark.parametrize("settings", [{}, DFT | ONE_MICRO_BATCH], ids=["sft", "dft"])
@pytest.mark.parametrize(
    "model", [untied, wide, gpt2, with_dropout, gemma2, cohere, granite], ids=lambda model: model.__name__
)
def test_architectures(model, settings, tmp_path):
    assert_same_run(*side_by_side(tmp_path, tiny_models.conversation_dataset, model, learning_rate=0.05, **settings))


# -- mixtures of experts ---------------------------------------------------------------------------

EXPERTS = {
    "of the model's coefficient": {},
    "of another coefficient": {"router_aux_loss_coef": 0.5},
    "without the auxiliary loss": {"router_aux_loss_coef": 0.0},
    "one micro-batch": ONE_MICRO_BATCH,
    "bfd": BFD,
    "padding_free": PADDING_FREE,
    "checkpointing": {"gradient_checkpointing": True},
    "dft": DFT,
}


@named(EXPERTS)
def test_a_mixture_of_experts(case, tmp_path):
    theirs, ours = side_by_side(tmp_path, tiny_models.conversation_dataset, tiny_models.qwen3_moe, **case)
    assert_same_run(theirs, ours)
    assert all(("aux_loss" in step) == (case.get("router_aux_loss_coef") != 0.0) for step in theirs.steps)


def test_a_mixture_of_experts_with_adapters(tmp_path):
    given = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}
    theirs, ours = side_by_side(tmp_path, tiny_models.conversation_dataset, tiny_models.qwen3_moe, given)
    assert_same_run(theirs, ours)
    assert theirs.steps[0]["aux_loss"] > 0


# -- what saves memory, and noise ------------------------------------------------------------------

AROUND = {
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "not reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "selective": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}},
    "checkpointing, dft, bfd": {"gradient_checkpointing": True} | DFT | BFD,
    "noisy embeddings": {"neftune_noise_alpha": 5.0},
    "noisy embeddings, padding_free": {"neftune_noise_alpha": 5.0} | PADDING_FREE,
}


@named(AROUND)
def test_around_the_model(case, tmp_path):
    assert_same_run(*side_by_side(tmp_path, tiny_models.conversation_dataset, **case))


def test_noise_and_dropout_are_at_work(tmp_path):
    """Otherwise the same run with them would show nothing."""
    plain = run_one(TRL, tmp_path, tiny_models.conversation_dataset, gpt2)
    for model, settings in [(gpt2, {"neftune_noise_alpha": 5.0}), (with_dropout, {})]:
        with pytest.raises(AssertionError, match="step 1: loss"):
            assert_same_run(plain, run_one(OURS, tmp_path, tiny_models.conversation_dataset, model, **settings))


# -- adapters --------------------------------------------------------------------------------------


def lora(**more):
    return LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **more)


ADAPTERS = {
    "lora": lora(),
    "lora of all": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "lora with dropout": lora(lora_dropout=0.3),
    "dora": lora(use_dora=True),
    "lora and the head": lora(modules_to_save=["lm_head"]),
    "lora and tokens": lora(trainable_token_indices={"embed_tokens": [1, 2, 30]}),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "prompt tuning": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prompt encoder": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, task_type="CAUSAL_LM"),
    "prefix tuning": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}
WITH = {
    "sft": {},
    "dft": DFT,
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "bfd": BFD,
}
# Not a prefix with checkpointing: there TRL's own run ends in an error.
IN_EVERY_WAY = ("lora with dropout", "lora and the head", "prompt tuning")
TRAINED = [(name, how) for name in ADAPTERS for how in WITH if how == "sft" or name in IN_EVERY_WAY]


@pytest.mark.parametrize("adapter, how", TRAINED)
def test_adapters(adapter, how, tmp_path):
    """Of prompts and completions: nothing is trained at position 0, before which virtual tokens would come."""
    given = {"peft_config": ADAPTERS[adapter]}
    assert_same_run(*side_by_side(tmp_path, tiny_models.conversation_dataset, untied, given, **WITH[how]))


def test_a_model_that_has_adapters_already(tmp_path):
    def adapted():
        set_seed(5)
        return get_peft_model(untied(), lora())

    assert_same_run(*side_by_side(tmp_path, tiny_models.conversation_dataset, adapted))


def test_adapters_for_the_tokens_of_a_new_template(tmp_path):
    """TRL trains the rows of the tokens it adds, and the head."""
    other = tiny_models.tokenizer("other").__class__(
        tokenizer_object=tiny_models.tokenizer()._tokenizer, eos_token="<|im_end|>"
    )
    other.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    other.chat_template = tiny_models.TEMPLATE.replace("<|im_start|>", "<|turn|>")
    other.save_pretrained(tmp_path / "other")
    settings = {"chat_template_path": str(tmp_path / "other")}
    theirs, ours = side_by_side(tmp_path, tiny_models.message_dataset, untied, {"peft_config": lora()}, **settings)
    assert any("trainable_tokens" in name for name in theirs.moved) and any("lm_head" in name for name in theirs.moved)
    assert_same_run(theirs, ours)


# -- a model by its path ---------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"model_init_kwargs": {"attn_implementation": "eager"}}], ids=str)
def test_a_model_by_its_path(settings, tmp_path):
    """With its own tokenizer, which nobody passes."""
    tiny_models.trained_model().save_pretrained(tmp_path / "model")
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    path = str(tmp_path / "model")
    theirs, ours = side_by_side(
        tmp_path, tiny_models.message_dataset, lambda: path, {"processing_class": None}, **settings
    )
    assert_same_run(theirs, ours)
    assert ours.trainer.model.config._attn_implementation == theirs.trainer.model.config._attn_implementation
