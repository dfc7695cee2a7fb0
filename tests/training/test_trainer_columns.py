"""weight, critical and old_logps stay with their tokens."""

import pytest
import torch

import tiny_models
from published import CASES
from qtarget import ConfigError
from quick_runs import (
    assert_same_change,
    change_by_autograd,
    change_by_training,
    quick_trainer,
    tokenised_dataset,
    tokenised_rows,
    train_quickly,
)

# TRL's own notice about a setting that one layout tests
pytestmark = pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
SIGN = {"old_logps": -1.0}
CASE = {case.id: case for case in CASES}


def numbered(name="weight", number_of_rows=9):
    """A column that says which token it belongs to; a log-probability is below 0."""
    sign = SIGN.get(name, 1.0)
    return tokenised_dataset(
        tiny_models.conversation_dataset(number_of_rows), **{name: lambda _, row: [sign * i for i in row["input_ids"]]}
    )


def batches(made):
    return [*made.get_train_dataloader(), *made.get_eval_dataloader()]


LAYOUTS = {
    "padded": {},
    "cut": {"max_length": 30},
    "cut at the front": {"max_length": 30, "truncation_mode": "keep_end"},
    "shuffled": {"shuffle_dataset": True},
    "padded to 16": {"pad_to_multiple_of": 16},
    "two processes": {"dataset_num_proc": 2},
    "worker": {"dataloader_num_workers": 1},
    "bfd": {"packing": True, "max_length": 64},
    "bfd, rows cut": {"packing": True, "max_length": 30, "shuffle_dataset": True},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 30},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 30},
    "padding_free": {"padding_free": True, "max_length": None},
    "padding_free to 16": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16},
}


def check_numbers_lie_on_their_tokens(made, name):
    seen = 0
    for batch in batches(made):
        ids = batch["input_ids"]
        real = batch["attention_mask"] == 1 if "attention_mask" in batch else ids != made.tokenizer.pad_token_id
        assert batch[name].shape == ids.shape and batch[name].dtype == torch.float32
        assert torch.equal(batch[name], SIGN.get(name, 1.0) * torch.where(real, ids, 0).float())
        seen += int(real.sum())
    lists = [ids for data in (made.train_dataset, made.eval_dataset) for ids in data["input_ids"]]
    assert seen == sum(map(len, lists)) > 0


@pytest.mark.parametrize("target, name", [("iw-sft", "weight"), ("psft", "old_logps")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_number_arrives_with_its_token(target, name, layout, tmp_path):
    """Through cutting, dropping, shuffling, every packing and padding-free batches."""
    data = numbered(name)
    settings = {"psft_refresh": "never"} | LAYOUTS[layout]
    made = quick_trainer(tiny_models.llama(), tmp_path, data, eval_dataset=data, target=target, **settings)
    check_numbers_lie_on_their_tokens(made, name)


def test_the_check_notices_a_shifted_column(tmp_path):
    """What a column one token late would look like."""
    made = quick_trainer(tiny_models.llama(), tmp_path, numbered(), eval_dataset=numbered(), target="iw-sft")
    made.train_dataset = made.train_dataset.map(lambda row: {"weight": row["weight"][-1:] + row["weight"][:-1]})
    with pytest.raises(AssertionError):
        check_numbers_lie_on_their_tokens(made, "weight")


def test_from_a_stream(tmp_path):
    data = numbered().to_iterable_dataset()
    made = quick_trainer(tiny_models.llama(), tmp_path, data, target="iw-sft", packing=True, max_length=64)
    seen = 0
    for batch in made.get_train_dataloader():
        assert torch.equal(batch["weight"], batch["input_ids"].float())
        seen += batch["weight"].numel()
    assert seen == sum(len(row["input_ids"]) for row in numbered())


def test_a_uid_keeps_every_digit(tmp_path):
    """Whole numbers beyond what float32 holds; no target asks for them, a cache will."""
    large = 2**40
    uid = lambda number, row: [large + 1000 * number + i for i in range(len(row["input_ids"]))]  # noqa: E731
    data = tokenised_dataset(tiny_models.conversation_dataset(6), uid=uid)
    token = {u: t for row in data for u, t in zip(row["uid"], row["input_ids"], strict=True)}
    made = quick_trainer(tiny_models.llama(), tmp_path, data, packing=True, max_length=64, shuffle_dataset=True)
    for batch in made.get_train_dataloader():
        assert batch["uid"].dtype == torch.int64
        assert [token[u] for u in batch["uid"].flatten().tolist()] == batch["input_ids"].flatten().tolist()
    made.train()


def test_one_number_for_a_row_is_spread_over_its_tokens(tmp_path):
    data = tiny_models.conversation_dataset(4).add_column("weight", [0.5, 1.0, 2.0, 0.0])
    made = quick_trainer(tiny_models.llama(), tmp_path, data, target="iw-sft")
    first_tokens = {tuple(row["input_ids"]): row["weight"] for row in tokenised_rows(data)}
    for batch in made.get_train_dataloader():
        for ids, mask, weight in zip(batch["input_ids"], batch["attention_mask"], batch["weight"], strict=True):
            length = int(mask.sum())
            wanted = first_tokens[tuple(ids[:length].tolist())]
            assert weight[:length].eq(wanted).all() and weight[length:].eq(0).all()


def test_weights_of_conversations_train_their_rows(tmp_path):
    """From prompt, completion and weight to the step: the row of weight 0 teaches nothing, yet counts."""
    data = tiny_models.conversation_dataset(4).add_column("weight", [0.5, 1.0, 2.0, 0.0])
    got = change_by_training(tiny_models.trained_model().double(), tmp_path, data, target="iw-sft")
    wanted = change_by_autograd(
        tiny_models.trained_model().double(),
        tokenised_rows(data),
        lambda z, y, **given: CASE["iw-sft"].loss(z, y, given),
    )
    assert_same_change(got, wanted)


def test_a_mask_of_booleans(tmp_path):
    data = tokenised_dataset(
        tiny_models.conversation_dataset(4), critical=lambda number, row: [i % 2 == 0 for i in row["input_ids"]]
    )
    made = train_quickly(tiny_models.llama(), tmp_path, data, target="cft")
    even = [label % 2 == 0 for row in tokenised_rows(data) for label in row["labels"][1:] if label != -100]
    assert made.state.log_history[0]["trust"] == pytest.approx(sum(even) / len(even))


def test_a_column_nobody_reads_is_left_behind(tmp_path):
    made = quick_trainer(tiny_models.llama(), tmp_path, numbered(), target="dft")
    assert "weight" not in next(iter(made.get_train_dataloader()))
    made.train()


def test_evaluation_may_read_a_column_that_training_does_not(tmp_path):
    data = tokenised_dataset(tiny_models.conversation_dataset(4), weight=lambda number, row: 2.0)
    made = train_quickly(tiny_models.llama(), tmp_path, data, eval_dataset=data, target="dft", eval_target="iw-sft")
    assert made.evaluate()["eval_trust"] == 2 and made.state.log_history[0]["trust"] < 1


# -- refusals --------------------------------------------------------------------------------------


def refused(data, folder, **settings):
    with pytest.raises(ConfigError) as error:
        quick_trainer(tiny_models.llama(), folder, data, **settings)
    return str(error.value)


def test_a_column_of_another_length_in_the_middle(tmp_path):
    data = tokenised_dataset(
        tiny_models.conversation_dataset(6), weight=lambda number, row: [1.0] * (len(row["input_ids"]) - (number == 4))
    )
    told = refused(data, tmp_path, target="iw-sft")
    length = len(data[4]["input_ids"])
    assert told == (
        f"row 4 of the train dataset: column weight has {length - 1} numbers for {length} tokens; give one per input_id "
        "(pre-tokenised rows), or one number per row"
    )
    assert told in refused(data, tmp_path, target="iw-sft", packing=True, max_length=64)


def test_one_old_log_probability_for_a_row(tmp_path):
    data = tokenised_dataset(tiny_models.conversation_dataset(4), old_logps=lambda number, row: -1.5)
    told = refused(data, tmp_path, target="psft", psft_refresh="never")
    assert told.endswith("column old_logps holds -1.5 for a whole row; it needs one number per token")


@pytest.mark.parametrize(
    "target, name, value, told",
    [
        ("iw-sft", "weight", -1.0, "row 2 of the train dataset: column weight holds -1; weights must be 0 or more"),
        ("cft", "critical", 0.5, "row 2 of the train dataset: column critical holds 0.5; it is a mask of tokens"),
        ("iw-sft", "weight", float("nan"), "row 2 of the train dataset: column weight holds nan at a supervised token"),
        ("iw-sft", "weight", None, "row 2 of the train dataset: column weight holds None at a supervised token"),
    ],
)
def test_values_that_make_no_sense(target, name, value, told, tmp_path):
    data = tokenised_dataset(
        tiny_models.conversation_dataset(4), **{name: lambda number, row: value if number == 2 else 1.0}
    )
    assert told in refused(data, tmp_path, target=target)


def test_what_stands_at_a_masked_token_does_not_matter(tmp_path):
    unknown_at_prompt = tokenised_dataset(
        tiny_models.conversation_dataset(4),
        weight=lambda number, row: [float("nan") if label == -100 else 2.0 for label in row["labels"]],
    )
    made = train_quickly(tiny_models.llama(), tmp_path, unknown_at_prompt, target="iw-sft")
    assert made.state.log_history[0]["trust"] == 2


def test_a_collator_that_pads_on_the_left(tmp_path):
    """Columns are laid from the left: on such a batch each number would lie on another token."""
    made = quick_trainer(tiny_models.llama(), tmp_path, numbered(number_of_rows=4), target="iw-sft")
    inner = made.data_collator.inner

    def left(examples):
        return {name: column.flip(1) for name, column in inner(examples).items()}

    made.data_collator.inner = left
    with pytest.raises(ConfigError, match="the data collator moved or changed the tokens of a row"):
        made.train()
