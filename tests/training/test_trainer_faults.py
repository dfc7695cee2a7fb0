"""What peers get wrong in silence: each fault is put in and must be noticed. What cannot be trained is refused."""

import logging

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig
from transformers import Trainer

import batch_layouts
import tiny_models
from published import CASES
from qtarget import ConfigError, QTargetConfig, QTargetTrainer
from qtarget.data.columns import TokenColumnCollator
from qtarget.models import forward
from qtarget.models.causal_lm import CausalLM
from qtarget.training import auxiliary
from quick_runs import (
    assert_same_change,
    change_by_autograd,
    change_by_training,
    largest_difference,
    logged_values,
    logits_of,
    quick_config,
    quick_trainer,
    tokenised_dataset,
    tokenised_rows,
    train_quickly,
)

CASE = {case.id: case for case in CASES}
# TRL's own notice about a setting that one layout tests
pytestmark = pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")


def loss_of(name):
    return lambda logits, labels, **given: CASE[name].loss(logits, labels, given)


# -- the denominator -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_models.gpt2, tiny_models.no_kwargs], ids=lambda make: make.__name__)
def test_a_count_left_to_the_architecture_is_noticed(make, monkeypatch, tmp_path):
    """Every token supervised: Transformers counts GPT-2's position 0, and nothing where forward takes no kwargs."""
    data = tiny_models.text_dataset(6)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    wanted = change_by_autograd(tiny_models.trained_model(make).double(), tokenised_rows(data), loss_of("dft"))
    assert_same_change(
        change_by_training(tiny_models.trained_model(make).double(), tmp_path, data, target="dft", **settings),
        wanted,
        1e-6,
    )
    monkeypatch.setattr(QTargetTrainer, "_get_num_items_in_batch", Trainer._get_num_items_in_batch)
    assert (
        largest_difference(
            change_by_training(tiny_models.trained_model(make).double(), tmp_path, data, target="dft", **settings),
            wanted,
        )[0]
        > 1e-2
    )


# -- joining by token ------------------------------------------------------------------------------


def test_a_teacher_joined_by_position_is_noticed(monkeypatch, tmp_path):
    """Prompt tuning puts three virtual tokens before the student's own: by position the teacher would be three late."""
    prompt = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    teacher = tiny_models.trained_model(seed=7, width=48)

    def step():
        torch.manual_seed(0)
        return change_by_training(
            tiny_models.trained_model(), tmp_path, target="kd", teacher_model=teacher, peft_config=prompt
        )

    right = step()

    def by_position(self, hidden, weight, bias, transform):
        length = self.labels.shape[1]
        return real(self, torch.cat([hidden[:, :length]], 1), weight, bias, transform)

    real = forward.LossCall.__call__
    monkeypatch.setattr(forward.LossCall, "__call__", by_position)
    assert largest_difference(step(), right)[0] > 1e-2


@pytest.mark.parametrize("layout", ["bfd", "padding_free"])
def test_a_teacher_under_another_mask_is_noticed(layout, monkeypatch, tmp_path):
    """An invented all-ones mask and no positions: the teacher would read across documents."""
    wanted = batch_layouts.layout_change_by_autograd("target-sft", layout)
    real = CausalLM.head

    def invented(self, inputs):
        ids = inputs["input_ids"]
        return real(self, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    monkeypatch.setattr(CausalLM, "head", invented)
    assert (
        largest_difference(batch_layouts.layout_change_by_trainer("target-sft", layout, 1, tmp_path), wanted)[0] > 1e-3
    )


def test_a_student_that_moved_before_its_teacher_is_noticed(monkeypatch, tmp_path):
    """psft's old policy left in the model: the student would train the old weights."""
    settings = {"target": "psft", "psft_refresh": 9, "max_steps": 3, "num_train_epochs": 9, "learning_rate": 0.3}
    right = change_by_training(tiny_models.trained_model(), tmp_path, **settings)
    swaps = []
    real = auxiliary.OldPolicy._swap

    def once(self):
        swaps.append(1)
        if len(swaps) % 2:
            real(self)

    monkeypatch.setattr(auxiliary.OldPolicy, "_swap", once)
    assert largest_difference(change_by_training(tiny_models.trained_model(), tmp_path, **settings), right)[0] > 1e-2


# -- packed rows under a mask that does not part them ----------------------------------------------


def packed_by_the_user():
    first, second = tokenised_rows(tiny_models.conversation_dataset(2))
    joined = {name: first[name] + second[name] for name in ("input_ids", "labels")}
    return Dataset.from_list([{**joined, "seq_lengths": [len(first["labels"]), len(second["labels"])]}] * 2)


def test_a_packed_set_with_an_all_ones_mask(tmp_path):
    with pytest.raises(ConfigError, match=r"the train dataset is packed \(column seq_lengths\), but its batches would"):
        quick_trainer(tiny_models.llama(), tmp_path, packed_by_the_user())
    data = packed_by_the_user()
    made = train_quickly(tiny_models.trained_model(), tmp_path, data, padding_free=True, max_length=None)
    apart = tokenised_rows(tiny_models.conversation_dataset(2))
    with torch.no_grad():
        own = torch.cat(
            [
                *map(
                    lambda row: CASE["sft"].loss(logits_of(tiny_models.trained_model().eval(), row), _labels(row), {}),
                    apart,
                )
            ]
        )
    assert logged_values(made, "nll")[0] == pytest.approx(float(own.mean()), rel=1e-5)


def _labels(row):
    return torch.tensor([label for label in row["labels"][1:] if label != -100])


def test_only_evaluation_packed(tmp_path):
    """TRL would pad its batches and let documents see each other."""
    short = tiny_models.text_dataset(8)
    with pytest.raises(
        ConfigError, match=r"the eval dataset is packed .*turn packing \(eval_packing\) on for all sets"
    ):
        quick_trainer(tiny_models.llama(), tmp_path, eval_dataset=short, eval_packing=True, max_length=128)
    both = quick_trainer(tiny_models.llama(), tmp_path, eval_dataset=short, packing=True, max_length=128)
    assert both.evaluate()["eval_nll"] > 0


def test_a_batch_that_is_packed_and_masked(tmp_path):
    made = quick_trainer(tiny_models.llama(), tmp_path, padding_free=True, max_length=None)
    inner = made.data_collator.inner

    def with_a_mask(examples):
        batch = inner(examples)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    made.data_collator = TokenColumnCollator(with_a_mask)
    with pytest.raises(ConfigError, match=r"the batch is packed .* and has a two-dimensional attention_mask"):
        made.train()


def test_packing_changes_no_rows_loss(tmp_path):
    """Each statistic of a token is that of its document alone."""
    data = batch_layouts.layout_dataset()
    padded = quick_trainer(tiny_models.trained_model(), tmp_path, eval_dataset=data, eval_target="dft").evaluate()
    settings = {"packing": True, "max_length": 160}
    packed = quick_trainer(
        tiny_models.trained_model(), tmp_path, eval_dataset=data, eval_target="dft", **settings
    ).evaluate()
    for name in ("eval_loss", "eval_nll", "eval_trust", "eval_entropy", "eval_supervised_tokens"):
        assert packed[name] == pytest.approx(padded[name], rel=1e-5)


# -- rows that teach nothing -----------------------------------------------------------------------


def test_rows_that_lost_their_labels_are_counted(tmp_path, caplog):
    """TRL drops them unseen."""
    data = tokenised_dataset(tiny_models.conversation_dataset(8))
    first = [next(i for i, label in enumerate(row["labels"]) if label != -100) for row in data]
    limit = sorted(first)[4]
    gone = sum(place >= limit for place in first)
    with caplog.at_level(logging.WARNING, "qtarget"):
        made = quick_trainer(tiny_models.llama(), tmp_path, data, max_length=limit)
    assert made.rows.without_labels == {"train": gone} and len(made.train_dataset) == 8 - gone
    assert (
        f"{gone} of 8 rows of the train dataset have no supervised token left: all are cut at max_length" in caplog.text
    )
    assert "they are dropped" in caplog.text


def test_rows_that_lost_their_labels_in_a_packed_set(tmp_path, caplog):
    data = tokenised_dataset(
        tiny_models.conversation_dataset(4),
        labels=lambda number, row: [-100] * len(row["labels"]) if number == 2 else row["labels"],
    )
    with caplog.at_level(logging.WARNING, "qtarget"):
        made = quick_trainer(tiny_models.llama(), tmp_path, data, packing=True, max_length=128)
    assert made.rows.without_labels == {"train": 1} and "1 of 4 rows of the train dataset" in caplog.text
    assert "they teach nothing" in caplog.text


def test_rows_that_lost_their_labels_in_a_stream(tmp_path, caplog):
    data = tokenised_dataset(
        tiny_models.conversation_dataset(4),
        labels=lambda number, row: [-100] * len(row["labels"]) if number == 2 else row["labels"],
    )
    made = quick_trainer(tiny_models.llama(), tmp_path, data.to_iterable_dataset(), num_train_epochs=1)
    with caplog.at_level(logging.WARNING, "qtarget"):
        seen = sum(len(batch["labels"]) for batch in made.get_train_dataloader())
    assert seen == 3 and made.rows.without_labels == {"train": 1}
    assert "1 of 3 rows of the train dataset have no supervised token left" in caplog.text


# -- the update against sft's ----------------------------------------------------------------------


def test_how_much_smaller_the_update_is(tmp_path, capsys):
    made = train_quickly(
        tiny_models.trained_model(), tmp_path, target="dft", max_steps=8, num_train_epochs=9, learning_rate=0.1
    )
    logits = [
        logits_of(tiny_models.trained_model().eval(), row)
        for row in tokenised_rows(tiny_models.conversation_dataset(4))
    ]
    labels = [_labels(row) for row in tokenised_rows(tiny_models.conversation_dataset(4))]
    p = torch.cat([z.softmax(-1).gather(1, y[:, None]).squeeze(1) for z, y in zip(logits, labels, strict=True)])
    share = float((p * (1 - p)).sum() / (1 - p).sum())
    assert logged_values(made, "update_vs_sft")[0] == pytest.approx(share, rel=1e-5)
    assert logged_values(made, "lr_to_match_sft")[0] == pytest.approx(0.1 / share, rel=1e-5)
    assert len(logged_values(made, "lr_to_match_sft")) == 5 < len(logged_values(made, "update_vs_sft"))
    said = capsys.readouterr().out
    assert f"the update is {share:.3g} of plain SFT's on the same tokens" in said
    assert "asks for no other learning rate under Adam" in said


def test_a_teacher_that_is_the_student_has_no_matching_rate(tmp_path, capsys):
    model = tiny_models.trained_model()
    made = train_quickly(model, tmp_path, target="kd", teacher_model=tiny_models.trained_model(), max_steps=2)
    assert logged_values(made, "update_vs_sft")[0] < 1e-6 and not logged_values(made, "lr_to_match_sft")
    assert "of plain SFT's on the same tokens" not in capsys.readouterr().out


def test_sft_is_as_large_as_itself(tmp_path, capsys):
    made = train_quickly(tiny_models.trained_model(), tmp_path)
    assert logged_values(made, "update_vs_sft") == [pytest.approx(1, abs=1e-6)]
    assert "of plain SFT's" not in capsys.readouterr().out


# -- models that cannot be fed ---------------------------------------------------------------------


def test_a_teacher_whose_head_is_elsewhere(tmp_path):
    folder = tmp_path / "teacher"
    tiny_models.llama(7, tied=False).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    placed = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ConfigError, match=r"teacher_model_init_kwargs.device_map puts the teacher's head on 'meta'"):
        quick_trainer(
            tiny_models.llama(),
            tmp_path,
            target="kd",
            teacher_model_name_or_path=str(folder),
            teacher_model_init_kwargs={"device_map": placed, "offload_folder": str(tmp_path / "offload")},
        )


def test_a_template_without_generation_markers(tmp_path):
    data = Dataset.from_list(
        [{"messages": row["prompt"] + row["completion"]} for row in tiny_models.conversation_dataset(2)]
    )
    with pytest.raises(
        ConfigError, match=r"assistant_only_loss is true, but the chat template has no \{% generation %\}"
    ):
        quick_trainer("nowhere", tmp_path, data, assistant_only_loss=True)


def test_a_mask_that_nobody_would_read(tmp_path):
    """Prepared by the user, with a mask and no labels: every token would count."""
    made = quick_trainer(
        tiny_models.llama(),
        tmp_path,
        tokenised_dataset(tiny_models.conversation_dataset(4)),
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    masked = Dataset.from_list(
        [{"input_ids": row["input_ids"], "completion_mask": row["input_ids"]} for row in made.train_dataset]
    )
    with pytest.raises(ValueError, match="has mask columns but no 'labels'"):
        made.evaluate(masked)


# -- the target as an argument ---------------------------------------------------------------------


def test_the_target_as_an_argument_of_the_trainer(tmp_path):
    made = QTargetTrainer(
        tiny_models.llama(),
        quick_config(tmp_path),
        target="dft",
        train_dataset=tiny_models.conversation_dataset(4),
        processing_class=tiny_models.tokenizer(),
    )
    assert made.describe().startswith("target dft")
    for args, told in (
        (quick_config(tmp_path, target="sft"), "but args.target is"),
        (quick_config(tmp_path, loss_type="nll"), "contradict"),
    ):
        with pytest.raises(ConfigError, match=told):
            QTargetTrainer(
                tiny_models.llama(),
                args,
                target="dft",
                train_dataset=tiny_models.text_dataset(2),
                processing_class=tiny_models.tokenizer(),
            )
    assert QTargetConfig(str(tmp_path), use_cpu=True).target is None


def test_the_same_arguments_serve_two_trainers(tmp_path):
    args = quick_config(tmp_path)
    for target in ("dft", "gem"):
        made = QTargetTrainer(
            tiny_models.llama(),
            args,
            target=target,
            train_dataset=tiny_models.text_dataset(4),
            processing_class=tiny_models.tokenizer(),
        )
        assert made.describe().startswith(f"target {target}")
    assert args.target is None
