"""weight, critical and old_logps stay with their tokens."""

import pytest
import torch

import tiny
from published import CASES
from qtarget import ConfigError
from qtarget.training.columns import ColumnCollator
from runs import assert_same_change, change, expected, rows, tokenised, trained, trainer

CASE = {case.id: case for case in CASES}


def numbered(name="weight", number_of_rows=9):
    """A column that says which token it belongs to."""
    return tokenised(tiny.conversations(number_of_rows), **{name: lambda number, row: [*map(float, row["input_ids"])]})


def batches(made):
    return [*made.get_train_dataloader(), *made.get_eval_dataloader()]


@pytest.mark.parametrize("target, name", [("iw-sft", "weight"), ("psft", "old_logps")])
@pytest.mark.parametrize(
    "settings",
    [{}, {"max_length": 30}, {"shuffle_dataset": True}, {"pad_to_multiple_of": 16}, {"dataset_num_proc": 1}],
    ids=str,
)
def test_each_number_arrives_with_its_token(target, name, settings, tmp_path):
    """Padded, shuffled, cut at max_length, rows dropped because the cut left them nothing to train."""
    data = numbered(name)
    made = trainer(tiny.llama(), tmp_path, data, eval_dataset=data, target=target, **settings)
    seen = 0
    for batch in batches(made):
        real = batch["attention_mask"] == 1
        assert batch[name].shape == batch["input_ids"].shape and batch[name].dtype == torch.float32
        assert torch.equal(batch[name], torch.where(real, batch["input_ids"], 0).float())
        assert int(real.sum(1).max()) <= settings.get("max_length", 999)
        seen += len(real)
    assert seen == len(made.train_dataset) + len(made.eval_dataset) > 0


def test_the_check_notices_a_shifted_column(tmp_path):
    """What a column one token late would look like."""

    class Late(ColumnCollator):
        def _values(self, name, value, length):
            return super()._values(name, value, length).roll(1)

    made = trainer(tiny.llama(), tmp_path, numbered(), target="iw-sft")
    late = Late(made.data_collator.inner, ["weight"], made.args.max_length)
    batch = late([made.train_dataset[0], made.train_dataset[1]])
    real = batch["attention_mask"] == 1
    assert not torch.equal(batch["weight"], torch.where(real, batch["input_ids"], 0).float())


def test_one_number_for_a_row_is_spread_over_its_tokens(tmp_path):
    data = tiny.conversations(4).add_column("weight", [0.5, 1.0, 2.0, 0.0])
    made = trainer(tiny.llama(), tmp_path, data, target="iw-sft")
    first_tokens = {tuple(row["input_ids"]): row["weight"] for row in rows(data)}
    for batch in made.get_train_dataloader():
        for ids, mask, weight in zip(batch["input_ids"], batch["attention_mask"], batch["weight"], strict=True):
            length = int(mask.sum())
            wanted = first_tokens[tuple(ids[:length].tolist())]
            assert weight[:length].eq(wanted).all() and weight[length:].eq(0).all()


def test_weights_of_conversations_train_their_rows(tmp_path):
    """From prompt, completion and weight to the step: the row of weight 0 teaches nothing, yet counts."""
    data = tiny.conversations(4).add_column("weight", [0.5, 1.0, 2.0, 0.0])
    got = change(tiny.taught().double(), tmp_path, data, target="iw-sft")
    wanted = expected(tiny.taught().double(), rows(data), lambda z, y, **given: CASE["iw-sft"].loss(z, y, given))
    assert_same_change(got, wanted)


def test_a_mask_of_booleans(tmp_path):
    data = tokenised(tiny.conversations(4), critical=lambda number, row: [i % 2 == 0 for i in row["input_ids"]])
    made = trained(tiny.llama(), tmp_path, data, target="cft")
    even = [label % 2 == 0 for row in rows(data) for label in row["labels"][1:] if label != -100]
    assert made.state.log_history[0]["trust"] == pytest.approx(sum(even) / len(even))


def test_a_column_nobody_reads_is_left_behind(tmp_path):
    made = trainer(tiny.llama(), tmp_path, numbered(), target="dft")
    assert "weight" not in next(iter(made.get_train_dataloader()))
    made.train()


def test_evaluation_may_read_a_column_that_training_does_not(tmp_path):
    data = tokenised(tiny.conversations(4), weight=lambda number, row: 2.0)
    made = trained(tiny.llama(), tmp_path, data, eval_dataset=data, target="dft", eval_target="iw-sft")
    assert made.evaluate()["eval_trust"] == 2 and made.state.log_history[0]["trust"] < 1


# -- refusals --------------------------------------------------------------------------------------


def refused_batch(made):
    with pytest.raises(ConfigError) as error:
        made.train()
    return str(error.value)


def test_a_column_of_another_length(tmp_path):
    short = tokenised(tiny.conversations(4), weight=lambda number, row: [1.0] * (len(row["input_ids"]) - 1))
    told = refused_batch(trainer(tiny.llama(), tmp_path, short, target="iw-sft"))
    lengths = [len(row["input_ids"]) for row in rows(short)]
    assert any(f"column weight has {n - 1} numbers for a row of {n} tokens" in told for n in lengths)
    assert told.endswith("give one per input_id (pre-tokenised rows), or one number per row")
    long = tokenised(tiny.conversations(4), weight=lambda number, row: [1.0] * (len(row["input_ids"]) + 1))
    assert "column weight has" in refused_batch(trainer(tiny.llama(), tmp_path, long, target="iw-sft"))


def test_one_old_log_probability_for_a_row(tmp_path):
    data = tokenised(tiny.conversations(4), old_logps=lambda number, row: -1.5)
    told = refused_batch(trainer(tiny.llama(), tmp_path, data, target="psft"))
    assert told == "column old_logps holds -1.5 for a whole row; it needs one number per token"


def test_a_collator_that_pads_on_the_left(tmp_path):
    """Columns are laid from the left: on such a batch each number would lie on another token."""
    data = numbered(number_of_rows=4)
    made = trainer(tiny.llama(), tmp_path, data, target="iw-sft")
    inner = made.data_collator.inner

    def left(examples):
        return {name: column.flip(1) for name, column in inner(examples).items()}

    made.data_collator.inner = left
    assert "the data collator moved or changed the tokens of a row, and column weight" in refused_batch(made)


@pytest.mark.parametrize(
    "target, name, value, told",
    [
        ("iw-sft", "weight", -1.0, "weight holds -1; weights must be 0 or more"),
        ("cft", "critical", 0.5, "critical holds "),
        ("iw-sft", "weight", float("nan"), "weight holds NaN or infinity at a supervised token"),
    ],
)
def test_values_that_make_no_sense(target, name, value, told, tmp_path):
    data = tokenised(tiny.conversations(4), **{name: lambda number, row: value})
    assert told in refused_batch(trainer(tiny.llama(), tmp_path, data, target=target))
