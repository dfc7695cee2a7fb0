"""Heads that do more than a product, and logits that are no numbers."""

import pytest
import torch
from transformers import LlamaForCausalLM, TrainerCallback

import tiny_models
from published import CASES
from qtarget import ConfigError
from qtarget.models.forward import accepted
from quick_runs import (
    assert_same_change,
    change_by_autograd,
    change_by_training,
    logged_values,
    quick_trainer,
    tokenised_rows,
    train_quickly,
)

CASE = {case.id: case for case in CASES}
TRANSFORMED = pytest.mark.parametrize(
    "make", [tiny_models.gemma2, tiny_models.cohere, tiny_models.granite], ids=lambda make: make.__name__
)


def loss_of(name):
    return lambda logits, labels, **given: CASE[name].loss(logits, labels, given)


@TRANSFORMED
def test_a_softcap_or_a_factor_is_part_of_the_loss(make, tmp_path):
    """sft's loss is the model's own cross-entropy, in training and in evaluation."""
    data = tiny_models.conversation_dataset(4)
    made = quick_trainer(
        tiny_models.trained_model(make), tmp_path, data, eval_dataset=data, per_device_eval_batch_size=4
    )
    batch = dict(next(iter(made.get_eval_dataloader())))
    with torch.no_grad():
        own = float(tiny_models.trained_model(make).eval()(**batch).loss)
    assert made.evaluate()["eval_loss"] == pytest.approx(own, rel=1e-5)
    made.train()
    assert logged_values(made, "loss")[0] == pytest.approx(own, rel=1e-5)


@TRANSFORMED
@pytest.mark.parametrize("name", ["dft", "target-sft", "gem"])
def test_a_softcap_or_a_factor_is_part_of_the_gradient(make, name, tmp_path):
    """The teacher has another one than the student."""
    teacher = (
        tiny_models.trained_model({tiny_models.gemma2: tiny_models.granite}.get(make, tiny_models.gemma2), seed=7)
        .double()
        .eval()
    )
    needed = teacher if "teacher_logits" in CASE[name].needs else None
    wanted = change_by_autograd(
        tiny_models.trained_model(make).double(),
        tokenised_rows(tiny_models.conversation_dataset(4)),
        loss_of(name),
        lr=0.3,
        steps=2,
        teacher=needed,
    )
    got = change_by_training(
        tiny_models.trained_model(make).double(),
        tmp_path,
        target=name,
        teacher_model=needed,
        learning_rate=0.3,
        max_steps=2,
    )
    assert_same_change(got, wanted, 1e-6)  # these two keep float32 inside, whatever the weights' dtype


class Doubles(LlamaForCausalLM):
    """Its config knows nothing of what it does to its logits."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


def doubles():
    model = Doubles(tiny_models.llama().config)
    model.load_state_dict(tiny_models.llama().state_dict())
    return model


@pytest.mark.parametrize("who", ["student", "teacher", "reference"])
def test_logits_that_cannot_be_rebuilt(who, tmp_path):
    """Stopped at the first batch, with what the model says and what was rebuilt."""
    models = {"student": tiny_models.llama(), "teacher": tiny_models.llama(), "reference": tiny_models.llama()} | {
        who: doubles()
    }
    target = {"trust": 0.5, "residual": {"pool": {"teacher": 0.5, "reference": 0.5}}}
    made = quick_trainer(
        models["student"],
        tmp_path,
        target=target,
        teacher_model=models["teacher"],
        reference_model=models["reference"],
    )
    with pytest.raises(ConfigError, match="Doubles's logits cannot be rebuilt from its hidden states") as error:
        made.train()
    own, rebuilt = (float(str(error.value).split(mark)[0].split()[-1]) for mark in (" in the model", " from hidden"))
    assert own == pytest.approx(2 * rebuilt, abs=2e-4)


def test_a_transform_named_in_the_config_is_followed(tmp_path):
    """The same model is fine once its config says so."""
    model = doubles()
    model.config.logit_scale = 2.0
    train_quickly(model, tmp_path)


def test_bf16_hides_no_wrong_head(tmp_path):
    """Half precision blurs the model's logits by a few in a thousand; a factor of two is still seen."""
    with pytest.raises(ConfigError, match="cannot be rebuilt"):
        train_quickly(doubles(), tmp_path, bf16=True)


def test_a_forward_is_given_what_it_takes():
    inputs = {"input_ids": 1, "attention_mask": 2, "cu_seq_lens_q": 3}
    assert accepted(tiny_models.llama(), inputs) == inputs
    assert accepted(tiny_models.no_kwargs(), inputs) == {"input_ids": 1, "attention_mask": 2}


class Poison(TrainerCallback):
    """NaN in one weight at the start of a step."""

    def __init__(self, step, model):
        self.step, self.model = step, model

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                self.model.get_input_embeddings().weight[1] = torch.nan


@pytest.mark.parametrize("step", [1, 3])
def test_nan_stops_the_run_with_step_and_row(step, tmp_path):
    model = tiny_models.llama(tied=False)
    made = quick_trainer(model, tmp_path, callbacks=[Poison(step, model)], max_steps=4)
    with pytest.raises(ConfigError, match=rf"^step {step}: .*NaN or infinite at row 0, position \d+; lower the learn"):
        made.train()
    assert made.state.global_step == step - 1


def test_nan_of_the_teacher_is_the_teachers(tmp_path):
    teacher = tiny_models.llama(1, tied=False)
    with torch.no_grad():
        teacher.lm_head.weight[5] = torch.nan
    with pytest.raises(ConfigError, match=r"^step 1: .*teacher.* NaN or infinite at row 0"):
        train_quickly(tiny_models.llama(), tmp_path, target="kd", teacher_model=teacher)


def test_nan_in_evaluation(tmp_path):
    model, data = tiny_models.llama(), tiny_models.conversation_dataset(2)
    made = quick_trainer(model, tmp_path, data, eval_dataset=data)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ConfigError, match="NaN or infinite at row 0"):
        made.evaluate()
