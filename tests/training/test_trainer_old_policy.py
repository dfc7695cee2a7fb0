"""psft's old policy by refresh, and iw-sft's online weights: against the same steps written out."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

import batch_layouts
import qtarget as qt
import tiny_models
from old_policy import LR, old_policy_by_autograd
from published import label_log_p
from qtarget import ConfigError
from quick_runs import (
    assert_same_change,
    change_by_training,
    copied_weights,
    count_supervised,
    labels_of,
    logged_values,
    logits_of,
    quick_config,
    quick_trainer,
    tokenised_dataset,
    tokenised_rows,
    train_quickly,
    weight_change,
)


@pytest.mark.parametrize("interval", [2, 3, 100])
def test_the_old_policy_is_taken_every_so_many_steps(interval, tmp_path):
    data = tiny_models.conversation_dataset(4)
    wanted = old_policy_by_autograd(
        tiny_models.trained_model().double(), tokenised_rows(data), steps=5, interval=interval
    )
    got = change_by_training(
        tiny_models.trained_model().double(),
        tmp_path,
        data,
        target="psft",
        psft_refresh=interval,
        max_steps=5,
        num_train_epochs=9,
        learning_rate=LR,
    )
    assert_same_change(got, wanted)


def test_right_after_a_refresh_psft_is_sft(tmp_path):
    made = train_quickly(
        tiny_models.trained_model(),
        tmp_path,
        target="psft",
        psft_refresh=2,
        max_steps=4,
        num_train_epochs=9,
        learning_rate=0.1,
    )
    trust = logged_values(made, "trust")
    assert trust[0] == pytest.approx(1, abs=1e-6) and trust[2] == pytest.approx(1, abs=1e-6)
    assert abs(trust[1] - 1) > 1e-3 and abs(trust[3] - 1) > 1e-3


def test_only_adapters_are_copied_under_lora(tmp_path):
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    made = train_quickly(tiny_models.trained_model(), tmp_path, peft_config=peft_config, target="psft", psft_refresh=2)
    kept = made.aux.old_policy._copies
    assert kept and all("lora_" in name for name in kept)


@pytest.mark.parametrize("layout", ["padded", "bfd", "padding_free"])
def test_the_old_policy_sees_what_the_student_sees(layout, tmp_path):
    """Right after a refresh r is 1 for every token, whatever the layout."""
    data = batch_layouts.layout_dataset().remove_columns(["old_logps"])
    made = train_quickly(
        tiny_models.trained_model().double(),
        tmp_path,
        data,
        target="psft",
        psft_refresh=8,
        **batch_layouts.LAYOUTS[layout],
    )
    assert logged_values(made, "trust")[0] == pytest.approx(1, abs=1e-12)


def test_evaluation_reports_the_ratio_to_the_last_copy(tmp_path):
    data = tiny_models.conversation_dataset(4)
    made = train_quickly(
        tiny_models.trained_model(),
        tmp_path,
        data,
        eval_dataset=data,
        target="psft",
        psft_refresh=100,
        max_steps=3,
        num_train_epochs=9,
        learning_rate=0.1,
    )
    before = copied_weights(made.model)
    assert abs(made.evaluate()["eval_trust"] - 1) > 1e-3
    after = copied_weights(made.model)
    assert all(torch.equal(before[name], after[name]) for name in before), "the old weights stayed in the model"


def test_r_that_is_one_for_ever(tmp_path):
    with pytest.raises(ConfigError, match=r"psft_refresh is 1, .* r = 1 and the clip never acts: that is sft; use 2"):
        quick_config(tmp_path, target="psft", psft_refresh=1)
    assert quick_config(tmp_path, target="dft", psft_refresh=1), "nobody reads it"
    for wrong in (0, "sometimes", 2.5):
        with pytest.raises(ConfigError, match=r"psft_refresh is .*; use a number of optimiser steps from 2, or never"):
            quick_config(tmp_path, target="psft", psft_refresh=wrong)


def test_a_column_is_read_only_if_asked_for(tmp_path):
    data = tokenised_dataset(
        tiny_models.conversation_dataset(4), old_logps=lambda number, row: [-1.0] * len(row["input_ids"])
    )
    with pytest.raises(ConfigError, match=r"column old_logps, but psft_refresh is 8, .* set psft_refresh: never"):
        quick_trainer(tiny_models.llama(), tmp_path, data, target="psft")
    made = quick_trainer(tiny_models.llama(), tmp_path, data, target="psft", psft_refresh="never")
    assert "not the paper's schedule" in made.describe()
    assert (
        "copied every 4 steps" in quick_trainer(tiny_models.llama(), tmp_path, target="psft", psft_refresh=4).describe()
    )


# -- iw-sft ----------------------------------------------------------------------------------------


def weights_by_hand(model, reference, data, temperature):
    """One number per row: exp(temperature · mean(log p − log p_ref)), clamped to [0, 16]."""
    with torch.no_grad():
        gaps = [
            (
                label_log_p(logits_of(model, row), labels_of(row))
                - label_log_p(logits_of(reference, row), labels_of(row))
            )
            for row in data
        ]
    return [float((temperature * gap.mean()).exp().clamp(0, 16)) for gap in gaps]


@pytest.mark.parametrize("layout", ["padded", "bfd", "padding_free"])
def test_online_weights_are_those_of_the_papers_code(layout, tmp_path):
    """From the second step on the model is no longer its reference: a reference of its own shows it at once."""
    documents = batch_layouts.layout_documents(layout)
    model, reference = tiny_models.trained_model().double().eval(), tiny_models.trained_model(seed=9).double().eval()
    numbers = weights_by_hand(model, reference, documents, temperature=0.5)
    assert max(numbers) > 1.05 or min(numbers) < 0.95
    total = torch.cat(
        [-w * label_log_p(logits_of(model, row), labels_of(row)) for w, row in zip(numbers, documents, strict=True)]
    ).sum()
    before = copied_weights(model)
    (total / count_supervised(documents)).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= parameter.grad
    made = quick_trainer(
        tiny_models.trained_model().double(),
        tmp_path,
        batch_layouts.layout_dataset().remove_columns(["weight", "old_logps", "critical"]),
        reference_model=tiny_models.trained_model(seed=9).double(),
        target="iw-sft",
        weights="online",
        weights_temperature=0.5,
        **batch_layouts.LAYOUTS[layout],
    )
    batch_layouts.in_one_step(made, 2)
    start = copied_weights(made.model)
    made.train()
    assert_same_change(
        weight_change(start, made.model), weight_change(before, model), 1e-6
    )  # weights cross the loss in float32


def test_weights_at_the_start_are_one_and_clamped_later(tmp_path):
    made = train_quickly(tiny_models.trained_model(), tmp_path, target="iw-sft", weights="online")
    assert logged_values(made, "trust")[0] == pytest.approx(1, abs=1e-6)
    assert "weights online" in made.describe() and "reference" in made.describe()
    far = quick_trainer(
        tiny_models.trained_model(), tmp_path, reference_model=tiny_models.llama(3), target="iw-sft", weights="online"
    )
    batch = far.rows.batch(next(iter(far.get_train_dataloader())))
    assert float(far.aux.online_weights(far.student, batch, 50.0).max()) == 16


def test_a_column_is_not_asked_for_online(tmp_path):
    data = Dataset.from_list([*tiny_models.conversation_dataset(4)])
    with pytest.raises(ConfigError, match=r"no column 'weight' .*set weights: online"):
        quick_trainer(tiny_models.llama(), tmp_path, data, target="iw-sft")
    with pytest.raises(ConfigError, match="denominator is 'kept'"):
        quick_config(tmp_path, target="iw-sft", weights="online", denominator="kept")
    with pytest.raises(ConfigError, match="weights is 'on-line'; did you mean 'online'"):
        quick_config(tmp_path, target="iw-sft", weights="on-line")
    assert qt.preset("iw-sft").requires == {"weight"}
