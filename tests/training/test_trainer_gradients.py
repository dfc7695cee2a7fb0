"""What one or two steps of the trainer do to the weights, against plain autograd on full logits."""

import copy

import pytest
import torch

import qtarget as qt
import tiny_models
from published import CASES, label_log_p
from qtarget import ConfigError, QTargetTrainer
from quick_runs import (
    assert_same_change,
    change_by_autograd,
    change_by_training,
    copied_weights,
    count_supervised,
    labels_of,
    largest_difference,
    logits_of,
    per_row_losses,
    quick_config,
    quick_settings,
    quick_trainer,
    supervised_positions,
    tokenised_dataset,
    tokenised_rows,
    weight_change,
)

CASE = {case.id: case for case in CASES}
# Every preset, and the options that take another path.
CHECKED = [
    *qt.presets.names(),
    "asft:kl_weight=0.8",
    "gem:beta=0.7,h=logsigmoid",
    "kd:temperature=2.0",
    "kd-hybrid:kd_weight=0.5,temperature=2.0",
    "target-sft:eta=1.0,teacher_temperature=2.0",
    "label-smoothing:smoothing=0.9",
    "eaft:normalizer=3.0,power=2.0",
]
IN_FLOAT32 = ["sft", "dft", "asft:kl_weight=0.8", "gem", "target-sft", "iw-sft"]


def loss_of(case):
    return lambda logits, labels, **given: case.loss(logits, labels, given)


def target_of(case):
    return {"preset": case.preset, **case.hyperparameters}


def with_columns():
    """Columns for cft, iw-sft and psft; ratios to the old policy fall below, inside and above the clip."""
    model = tiny_models.trained_model().eval()

    @torch.no_grad()
    def old_logps(number, row):
        made = torch.zeros(len(row["input_ids"]))
        ratios = torch.tensor([0.0, 0.1, -0.1, 0.4, -0.5]).repeat(len(made))[: len(labels_of(row))]
        made[supervised_positions(row) + 1] = label_log_p(logits_of(model, row), labels_of(row)) - ratios
        return made.clamp(max=0).tolist()  # a log-probability

    return tokenised_dataset(
        tiny_models.conversation_dataset(4),
        weight=lambda number, row: [(i + number) % 5 / 4 for i in range(len(row["input_ids"]))],
        critical=lambda number, row: [(i + number) % 3 == 0 for i in range(len(row["input_ids"]))],
        old_logps=old_logps,
    )


def others(case, dtype, seed=7):
    """A teacher of another width, and the weights at the start as reference, where the case needs them."""
    made = {}
    if "teacher_logits" in case.needs:
        made["teacher"] = tiny_models.trained_model(seed=seed, width=48).to(dtype).eval()
    if "reference_logits" in case.needs:
        start = tiny_models.trained_model().to(dtype).eval()
        made["reference"] = lambda row: logits_of(start, row)
    return made


# -- every objective -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, dtype",
    [(name, torch.float64) for name in CHECKED] + [(name, torch.float32) for name in IN_FLOAT32],
    ids=str,
)
def test_two_steps_are_those_of_autograd_on_full_logits(name, dtype, tmp_path):
    """Padded micro-batches, masked prompts and accumulation against single rows and one sum. At the second
    step the student is no longer its reference."""
    case = CASE[name]
    data = (
        with_columns() if {"weight", "critical", "old_logps"} & set(case.needs) else tiny_models.conversation_dataset(4)
    )
    made = others(case, dtype)
    got = change_by_training(
        tiny_models.trained_model().to(dtype),
        tmp_path,
        data,
        target=target_of(case),
        psft_refresh="never",
        teacher_model=copy.deepcopy(made.get("teacher")),
        max_steps=2,
        learning_rate=0.3,
    )
    wanted = change_by_autograd(
        tiny_models.trained_model().to(dtype), tokenised_rows(data), loss_of(case), lr=0.3, steps=2, **made
    )
    # float32: the change of a weight near 1 is known only to the last place of that weight, twice.
    assert_same_change(got, wanted, None if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("name", ["sft", "target-sft"])
def test_z_loss_is_trained_and_not_evaluated(name, tmp_path):
    case, data, c = CASE[name], tiny_models.conversation_dataset(4), 0.02
    made = others(case, torch.float64)
    trainer = quick_trainer(
        tiny_models.trained_model().double(),
        tmp_path,
        data,
        eval_dataset=data,
        target=target_of(case),
        teacher_model=copy.deepcopy(made.get("teacher")),
        z_loss=c,
    )
    with_it = trainer.evaluate()["eval_loss"]
    trainer.args.z_loss = 0.0
    assert trainer.evaluate()["eval_loss"] == with_it
    trainer.args.z_loss = c
    before = copied_weights(trainer.model)
    trainer.train()

    def loss(logits, labels, **given):
        return case.loss(logits, labels, given) + c * logits.logsumexp(-1).square()

    wanted = change_by_autograd(tiny_models.trained_model().double(), tokenised_rows(data), loss, **made)
    assert_same_change(weight_change(before, trainer.model), wanted)


def test_plain_text_is_counted_without_position_zero(tmp_path):
    """Nothing predicts the first token: it is no part of the denominator."""
    data = tiny_models.text_dataset(4)
    got = change_by_training(tiny_models.trained_model().double(), tmp_path, data)
    assert_same_change(
        got, change_by_autograd(tiny_models.trained_model().double(), tokenised_rows(data), loss_of(CASE["sft"]))
    )


@pytest.mark.parametrize("name", ["label-smoothing", "target-sft", "kd:temperature=2.0", "sft-kl"])
def test_padded_heads(name, tmp_path):
    """Rows of the head beyond the real vocabulary: the student has 13 of them, the teacher 5."""
    case, real = CASE[name], len(tiny_models.tokenizer())
    student = tiny_models.llama(vocab=real + 13).double()
    teacher = tiny_models.llama(seed=3, width=48, vocab=real + 5).double()
    start = copy.deepcopy(student).eval()
    made = {"teacher": copy.deepcopy(teacher).eval()} if "teacher_logits" in case.needs else {}
    if "reference_logits" in case.needs:
        made["reference"] = lambda row: logits_of(start, row)
    wanted = change_by_autograd(
        copy.deepcopy(student),
        tokenised_rows(tiny_models.conversation_dataset(4)),
        loss_of(case),
        steps=2,
        lr=0.3,
        **made,
    )
    got = change_by_training(
        student,
        tmp_path,
        target=target_of(case),
        psft_refresh="never",
        teacher_model=teacher if "teacher" in made else None,
        learning_rate=0.3,
        max_steps=2,
    )
    assert_same_change(got, wanted)


# -- the check can fail ----------------------------------------------------------------------------


class CountsPositionZero(QTargetTrainer):
    """As Transformers counts where the architecture has no loss_type."""

    def _get_num_items_in_batch(self, batch_samples, device):
        return torch.tensor(float(sum((batch["labels"] != -100).sum() for batch in batch_samples)))


class HalvesTheDenominator(QTargetTrainer):
    def _get_num_items_in_batch(self, batch_samples, device):
        return super()._get_num_items_in_batch(batch_samples, device) / 2


class CountsEachMicroBatch(QTargetTrainer):
    def _get_num_items_in_batch(self, batch_samples, device):
        return None


class ForgetsAccumulation(QTargetTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_is_scaled_for_ga, self.model_accepts_loss_kwargs = None, False


@pytest.mark.parametrize("mutant", [CountsPositionZero, HalvesTheDenominator, CountsEachMicroBatch])
def test_a_wrong_denominator_is_noticed(mutant, tmp_path):
    data = tiny_models.text_dataset(4)
    got = change_by_training(tiny_models.trained_model(), tmp_path, data, kind=mutant)
    with pytest.raises(AssertionError, match="otherwise than by autograd"):
        assert_same_change(
            got, change_by_autograd(tiny_models.trained_model(), tokenised_rows(data), loss_of(CASE["sft"])), 1e-3
        )


def test_accumulation_left_to_the_host_is_noticed(tmp_path):
    """Transformers divides once more for a model whose forward takes no ``**kwargs``."""
    got = change_by_training(tiny_models.trained_model(tiny_models.no_kwargs), tmp_path, kind=ForgetsAccumulation)
    with pytest.raises(AssertionError, match="otherwise than by autograd"):
        assert_same_change(
            got,
            change_by_autograd(
                tiny_models.trained_model(), tokenised_rows(tiny_models.conversation_dataset(4)), loss_of(CASE["sft"])
            ),
            1e-3,
        )


def test_a_lost_stop_gradient_is_noticed(tmp_path):
    def without_stop_gradient(logits, labels, **given):
        log_p_y = label_log_p(logits, labels)
        return -log_p_y.exp() * log_p_y

    got = change_by_training(tiny_models.trained_model(), tmp_path, target="dft")
    with pytest.raises(AssertionError, match="otherwise than by autograd"):
        assert_same_change(
            got,
            change_by_autograd(
                tiny_models.trained_model(), tokenised_rows(tiny_models.conversation_dataset(4)), without_stop_gradient
            ),
            1e-3,
        )


def test_a_reference_that_moves_is_noticed(tmp_path):
    """A reference that shares the student's weights is right at the first step and wrong at the second."""
    case, data = CASE["asft:kl_weight=0.8"], tiny_models.conversation_dataset(4)
    made = quick_trainer(tiny_models.trained_model(), tmp_path, target=target_of(case), max_steps=2, learning_rate=0.3)
    made.aux.reference.model.load_state_dict(made.model.state_dict(), assign=True)
    before = copied_weights(made.model)
    made.train()
    got = weight_change(before, made.model)
    wanted = change_by_autograd(
        tiny_models.trained_model(), tokenised_rows(data), loss_of(case), lr=0.3, steps=2, **others(case, torch.float32)
    )
    with pytest.raises(AssertionError, match="otherwise than by autograd"):
        assert_same_change(got, wanted, 1e-3)


# -- the same rows, split otherwise ----------------------------------------------------------------


def lengths(data):
    return [len(row["input_ids"]) for row in tokenised_rows(data)]


SPLITS = [(1, 4), (2, 2), (4, 1), (3, 2)]


@pytest.mark.parametrize("target", ["sft", "dft", "target-sft"])
@pytest.mark.parametrize(
    "make", [tiny_models.llama, tiny_models.gpt2, tiny_models.no_kwargs], ids=lambda make: make.__name__
)
def test_any_split_into_micro_batches_gives_the_same_step(make, target, tmp_path):
    """4 rows as 1 x 4, 2 x 2, 4 x 1, and as 3 + 1; every token of the text is supervised, the first too."""
    case, data = CASE[target], tiny_models.text_dataset(4)
    made = others(case, torch.float64)
    wanted = change_by_autograd(tiny_models.trained_model(make).double(), tokenised_rows(data), loss_of(case), **made)
    for batch, accumulation in SPLITS:
        got = change_by_training(
            tiny_models.trained_model(make).double(),
            tmp_path,
            data,
            target=target,
            teacher_model=copy.deepcopy(made.get("teacher")),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        assert_same_change(got, wanted)


@pytest.mark.parametrize("target", ["sft", "target-sft", "sft-kl"])
@pytest.mark.parametrize(
    "settings",
    [
        {"padding_free": True, "max_length": None},
        {"packing": True, "max_length": 256},
        {"pad_to_multiple_of": 16},
    ],
    ids=["padding_free", "packed", "padded to 16"],
)
def test_rows_in_one_line_give_the_same_step(target, settings, tmp_path):
    """Documents in one row neither see nor predict each other, for the student and for the others."""
    case, data = CASE[target], tiny_models.text_dataset(4)
    made = others(case, torch.float64)
    one_line = quick_trainer(
        tiny_models.trained_model().double(),
        tmp_path,
        data,
        target=target,
        teacher_model=copy.deepcopy(made.get("teacher")),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        max_steps=2,
        learning_rate=0.3,
        **settings,
    )
    shape = next(iter(one_line.get_train_dataloader()))["input_ids"].shape
    assert shape[1] % 16 == 0 if "pad_to_multiple_of" in settings else shape == (1, sum(lengths(data)))
    before = copied_weights(one_line.model)
    one_line.train()
    got = weight_change(before, one_line.model)
    wanted = change_by_autograd(
        tiny_models.trained_model().double(), tokenised_rows(data), loss_of(case), lr=0.3, steps=2, **made
    )
    assert_same_change(got, wanted)


@pytest.mark.parametrize("target", ["sft", "target-sft", "sft-kl"])
def test_padding_on_the_left(target, tmp_path):
    """The others see the student's mask; without it they would read the padding."""
    case, data = CASE[target], tiny_models.conversation_dataset(4)
    made = others(case, torch.float64)
    padded = quick_trainer(
        tiny_models.trained_model().double(),
        tmp_path,
        data,
        target=target,
        teacher_model=copy.deepcopy(made.get("teacher")),
        max_steps=2,
        learning_rate=0.3,
    )
    right = padded.data_collator

    def left(examples):
        batch = right(examples)
        shifts = (1 - batch["attention_mask"]).sum(1).tolist()
        return {
            name: torch.stack([row.roll(by) for row, by in zip(column, shifts, strict=True)])
            for name, column in batch.items()
        }

    padded.data_collator = left
    assert any((batch["attention_mask"][:, 0] == 0).any() for batch in padded.get_train_dataloader())
    before = copied_weights(padded.model)
    padded.train()
    wanted = change_by_autograd(
        tiny_models.trained_model().double(), tokenised_rows(data), loss_of(case), lr=0.3, steps=2, **made
    )
    # Positions begin later, and rotary angles are float32 whatever the weights are.
    assert_same_change(weight_change(before, padded.model), wanted, 1e-4)


@pytest.mark.parametrize("target", ["dft", "sft-kl"])
def test_gradient_checkpointing_changes_nothing(target, tmp_path):
    case = CASE[target]
    got = change_by_training(
        tiny_models.trained_model().double(),
        tmp_path,
        target=target,
        gradient_checkpointing=True,
        max_steps=2,
        learning_rate=0.3,
    )
    wanted = change_by_autograd(
        tiny_models.trained_model().double(),
        tokenised_rows(tiny_models.conversation_dataset(4)),
        loss_of(case),
        lr=0.3,
        steps=2,
        **others(case, torch.float64),
    )
    assert_same_change(got, wanted)


@pytest.mark.parametrize("name", ["sft", "dft", "target-sft"])
def test_bf16_is_no_worse_than_full_logits_under_autocast(name, tmp_path):
    """Both against float32; the loss itself is computed in float32 whatever autocast says."""
    case, data = CASE[name], tokenised_rows(tiny_models.conversation_dataset(4))
    made = others(case, torch.float32)
    wanted = change_by_autograd(tiny_models.trained_model(), data, loss_of(case), **made)
    with torch.autocast("cpu", torch.bfloat16):
        plain = change_by_autograd(tiny_models.trained_model(), data, loss_of(case), **made)
    got = change_by_training(
        tiny_models.trained_model(), tmp_path, target=name, teacher_model=copy.deepcopy(made.get("teacher")), bf16=True
    )
    assert 1e-3 < largest_difference(got, wanted)[0] < 1.2 * largest_difference(plain, wanted)[0]


# -- denominators ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_models.llama, tiny_models.no_kwargs], ids=lambda make: make.__name__)
def test_micro_batch_is_the_mean_of_the_means(make, tmp_path):
    """One row a micro-batch, so that no order is assumed: mean over rows of each row's own mean."""
    data = tokenised_rows(tiny_models.conversation_dataset(4))
    model = tiny_models.trained_model(make).double()
    means = torch.stack([loss.mean() for loss in per_row_losses(model.eval(), data, loss_of(CASE["dft"]))])
    means.mean().backward()
    wanted = {name: -p.grad for name, p in model.named_parameters()}
    got = change_by_training(
        tiny_models.trained_model(make).double(),
        tmp_path,
        target="dft",
        denominator="micro_batch",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    assert_same_change(got, wanted)


@pytest.mark.parametrize("preset, column", [("cft", "critical"), ("iw-sft", "weight")])
def test_kept_counts_what_the_column_keeps(preset, column, tmp_path):
    data = with_columns()
    kept = sum(
        int((torch.tensor(row[column])[supervised_positions(row) + 1] != 0).sum()) for row in tokenised_rows(data)
    )
    assert 0 < kept < count_supervised(tokenised_rows(data))
    got = change_by_training(tiny_models.trained_model().double(), tmp_path, data, target=preset, denominator="kept")
    wanted = change_by_autograd(
        tiny_models.trained_model().double(), tokenised_rows(data), loss_of(CASE[preset]), denominator=kept
    )
    assert_same_change(got, wanted)


@pytest.mark.parametrize("target", ["profit", "sft", "dft"])
def test_kept_needs_a_column(target, tmp_path):
    with pytest.raises(ConfigError, match=r"denominator is 'kept' with target .*; which tokens are kept is known"):
        quick_config(tmp_path, target=target, denominator="kept")


def test_unknown_denominator(tmp_path):
    with pytest.raises(ConfigError, match="denominator is 'al_labels'; did you mean 'all_labels'"):
        qt.QTargetConfig(**quick_settings(tmp_path, denominator="al_labels"))
