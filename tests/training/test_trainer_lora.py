"""Adapters: what trains, what the reference is, what is saved."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

import tiny_models
from published import CASES
from qtarget import ConfigError
from quick_runs import (
    as_it_is_now,
    assert_same_change,
    change_by_autograd,
    change_by_training,
    copied_weights,
    logits_of,
    quick_trainer,
    tokenised_rows,
    train_quickly,
)

CASE = {case.id: case for case in CASES}


def loss_of(name):
    return lambda logits, labels, **given: CASE[name].loss(logits, labels, given)


def lora(**more):
    return LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **more)


def adapted(**more):
    """A model with adapters that do something from the start: PEFT's own begin at zero."""
    torch.manual_seed(5)
    model = get_peft_model(tiny_models.trained_model(tied=False).double(), lora(**more), autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def test_only_adapters_train(tmp_path):
    made = quick_trainer(tiny_models.trained_model(), tmp_path, peft_config=lora(), max_steps=2)
    before = copied_weights(made.model)
    made.train()
    changed = {name for name, p in made.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and changed == {name for name in before if "lora_" in name}


@pytest.mark.parametrize("name", ["sft", "asft:kl_weight=0.8", "sft-kl:kl_weight=3.0", "target-sft", "gem"])
@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["lm_head"]}], ids=["adapters", "and the head"])
def test_three_steps_are_those_of_autograd(name, more, tmp_path):
    """The reference is the model as it starts, adapters at work, with the head as it starts where one trains."""
    case, model = CASE[name], adapted(**more)
    twin = copy.deepcopy(model)
    made = {}
    if "reference_logits" in case.needs:
        made["reference"] = as_it_is_now(twin)
    teacher = tiny_models.trained_model(seed=7, width=48).double().eval() if "teacher_logits" in case.needs else None
    wanted = change_by_autograd(
        twin,
        tokenised_rows(tiny_models.conversation_dataset(4)),
        loss_of(name),
        lr=0.3,
        steps=3,
        teacher=teacher,
        **made,
    )
    got = change_by_training(
        model,
        tmp_path,
        target={"preset": case.preset, **case.hyperparameters},
        teacher_model=copy.deepcopy(teacher),
        learning_rate=0.3,
        max_steps=3,
    )
    assert any("lora" in name for name in got) and any("lm_head" in name for name in got) == bool(more)
    assert_same_change(got, wanted)


def test_fresh_adapters_are_their_own_reference(tmp_path):
    """At the first step student and base agree, so the spring pulls at nothing; at the second it does."""

    def after(steps, target):
        got = change_by_training(
            tiny_models.trained_model().double(),
            tmp_path,
            peft_config=lora(),
            target=target,
            max_steps=steps,
            learning_rate=0.3,
        )
        return {name: w for name, w in got.items() if "lora_B" in name}  # at the first step, A has no gradient yet

    spring = {"preset": "sft-kl", "kl_weight": 5.0}
    assert_same_change(after(1, spring), after(1, "sft"))
    with pytest.raises(AssertionError, match="otherwise"):
        assert_same_change(after(2, spring), after(2, "sft"), 1e-3)


@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["lm_head"]}], ids=["adapters", "and the head"])
def test_base_is_untouched_by_training(more, tmp_path):
    row = tokenised_rows(tiny_models.conversation_dataset(1))[0]
    model = adapted(**more)
    start = logits_of(tiny_models.trained_model(tied=False).double().eval(), row)
    made = train_quickly(model, tmp_path, target="asft", max_steps=3, learning_rate=0.3)
    with torch.no_grad(), made.model.eval().disable_adapter():
        assert torch.equal(logits_of(made.model, row), start)
    assert made.aux.reference is None, "no copy of the model is held beside its adapters"


def ask_twice(aux):
    """Fail where the reference's answer is a matter of chance."""
    ask = aux.ask

    def twice(*args):
        first, second = ask(*args), ask(*args)
        assert torch.equal(first["reference"].hidden, second["reference"].hidden)
        return second

    aux.ask = twice


@pytest.mark.parametrize("peft_config", [lora(lora_dropout=0.5), None], ids=["adapters off", "frozen copy"])
def test_dropout_is_off_in_the_reference_and_on_in_the_student(peft_config, tmp_path):
    model = tiny_models.trained_model()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    made = quick_trainer(model, tmp_path, peft_config=peft_config, target="sft-kl", max_steps=2)
    ask_twice(made.aux)
    made.train()
    assert all(module.training for module in made.model.modules()), "the reference's forward left dropout off"


def test_virtual_tokens_are_the_students_only(tmp_path):
    """Prompt tuning lengthens the student's sequence; teacher, base and labels are joined by token."""
    prompt = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")

    def prompted():
        torch.manual_seed(5)
        return get_peft_model(tiny_models.trained_model().double(), prompt)

    def base_logits(row):
        return logits_of(base, row)

    base = tiny_models.trained_model().double().eval()
    twin = prompted()
    # The model drops its virtual positions here, so that everything else is as without them.
    forward = twin.forward

    def without_virtual_tokens(**inputs):
        output = forward(**inputs)
        output.logits = output.logits[:, 3:]
        return output

    twin.forward = without_virtual_tokens
    loss = loss_of("sft-kl:kl_weight=3.0")
    wanted = change_by_autograd(
        twin, tokenised_rows(tiny_models.conversation_dataset(4)), loss, lr=0.3, steps=2, reference=base_logits
    )
    target = {"preset": "sft-kl", "kl_weight": 3.0}
    got = change_by_training(prompted(), tmp_path, target=target, learning_rate=0.3, max_steps=2)
    assert_same_change(got, wanted)


@pytest.mark.parametrize("modules", [["q_proj", "lm_head"], "lm_head"])
def test_an_adapter_on_the_head_is_refused(modules, tmp_path):
    with pytest.raises(ConfigError) as error:
        quick_trainer(
            tiny_models.llama(), tmp_path, peft_config=LoraConfig(target_modules=modules, task_type="CAUSAL_LM")
        )
    assert error.value.faults == [
        "lora_target_modules holds 'lm_head'; an adapter on the head is not supported: remove it, or train the whole "
        "head with lora_modules_to_save"
    ]


def test_a_saved_adapter_loads_with_peft(tmp_path):
    row = tokenised_rows(tiny_models.conversation_dataset(1))[0]
    made = train_quickly(tiny_models.trained_model(), tmp_path, peft_config=lora(), target="asft", max_steps=2)
    made.save_model(str(tmp_path / "adapter"))
    assert not list((tmp_path / "adapter").glob("model*")), "the base is not part of an adapter"
    loaded = PeftModel.from_pretrained(tiny_models.trained_model(), tmp_path / "adapter").eval()
    with torch.no_grad():
        after, base = logits_of(loaded, row), logits_of(tiny_models.trained_model().eval(), row)
        assert torch.allclose(after, logits_of(made.model.eval(), row), atol=1e-6)
        assert not torch.allclose(after, base, atol=1e-2)
