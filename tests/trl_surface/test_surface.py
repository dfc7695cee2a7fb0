"""Whatever shape a dataset has and however it is cut, packed and batched, the run is TRL's, step by step."""

import copy

import pytest
from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import tiny_models
from beside_trl import ONE_MICRO_BATCH, OURS, TRL, assert_same_run, run_one, side_by_side
from dataset_shapes import (
    SHAPES,
    extra_columns,
    labels_at_the_start,
    many_rows,
    one_long_row,
    packed_already,
    some_without_labels,
    streamed,
)
from quick_runs import tokenised_dataset

DFT = {"loss_type": "dft"}
BFD = {"packing": True, "max_length": 32}
SPLIT = BFD | {"packing_strategy": "bfd_split"}
WRAPPED = BFD | {"packing_strategy": "wrapped"}
PADDING_FREE = {"padding_free": True, "max_length": None}
EPOCHS = {"max_steps": -1, "num_train_epochs": 2}
SCHEDULE = {"lr_scheduler_type": "cosine", "warmup_steps": 1, "weight_decay": 0.1}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_dataset_of_any_shape(shape, tmp_path):
    assert_same_run(*side_by_side(tmp_path, shape.data, given=shape.given(), **shape.settings))


CASES = {
    "bfd": (one_long_row, BFD),
    "bfd of completions": (tiny_models.conversation_dataset, BFD | {"max_length": 64}),
    "bfd_split": (one_long_row, SPLIT),
    "bfd_split of completions": (tiny_models.conversation_dataset, SPLIT),
    "wrapped": (one_long_row, WRAPPED),
    "wrapped completions": (tiny_models.conversation_dataset, WRAPPED),
    "bfd, shuffled": (tiny_models.prompt_dataset, BFD | {"shuffle_dataset": True}),
    "bfd of a stream": (streamed(tiny_models.prompt_dataset), BFD),
    "bfd_split of a stream": (streamed(one_long_row), SPLIT),
    "wrapped stream": (streamed(tiny_models.prompt_dataset), WRAPPED),
    "bfd of a stream, shuffled": (streamed(tiny_models.prompt_dataset), BFD | {"shuffle_dataset": True}),
    "padding_free": (tiny_models.text_dataset, PADDING_FREE),
    "padding_free with completions": (tiny_models.conversation_dataset, PADDING_FREE),
    "padding_free, one micro-batch": (tiny_models.message_dataset, PADDING_FREE | ONE_MICRO_BATCH),
    "cut at the end": (tiny_models.text_dataset, {"max_length": 13}),
    "cut at the end, rows left without labels": (tiny_models.conversation_dataset, {"max_length": 29}),
    "cut at the start, rows left without labels": (
        labels_at_the_start,
        {"max_length": 20, "truncation_mode": "keep_end"},
    ),
    "cut at the start": (tiny_models.text_dataset, {"max_length": 13, "truncation_mode": "keep_end"}),
    "not cut": (one_long_row, {"max_length": None}),
    "shuffled": (tiny_models.text_dataset, {"shuffle_dataset": True}),
    "stream, shuffled": (streamed(tiny_models.text_dataset), {"shuffle_dataset": True}),
    "padded to a multiple": (tiny_models.text_dataset, {"pad_to_multiple_of": 16}),
    "another end of sequence": (tiny_models.text_dataset, {"eos_token": "<|im_start|>"}),
    "another padding token": (tiny_models.text_dataset, {"pad_token": "<|im_start|>"}),
    "two processes prepare": (many_rows, BFD | {"dataset_num_proc": 2}),
    "not prepared": (
        lambda: tokenised_dataset(tiny_models.conversation_dataset(8)),
        {"dataset_kwargs": {"skip_prepare_dataset": True}},
    ),
    "packed already": (packed_already, PADDING_FREE),
    "packed already, not prepared": (
        packed_already,
        {"packing": True, "dataset_kwargs": {"skip_prepare_dataset": True}},
    ),
    "rows of like length together": (tiny_models.text_dataset, {"train_sampling_strategy": "group_by_length"}),
    "rows together by a column": (
        extra_columns,
        {"train_sampling_strategy": "group_by_length", "length_column_name": "score", "learning_rate": 0.1},
    ),
    "rows in order": (tiny_models.text_dataset, {"train_sampling_strategy": "sequential"}),
    "columns kept": (tiny_models.conversation_dataset, {"remove_unused_columns": False}),
    "one row a micro-batch": (
        tiny_models.text_dataset,
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
    ),
    "one micro-batch": (tiny_models.conversation_dataset, ONE_MICRO_BATCH),
    "micro-batches left over": (lambda: tiny_models.text_dataset(7), EPOCHS),
    # whole steps in every pass: what is left over is trained otherwise, see tests/training/test_trainer_resume.py
    "a stream that ends": (streamed(lambda: tiny_models.text_dataset(8)), {"max_steps": 4}),
    "epochs": (tiny_models.conversation_dataset, EPOCHS),
    "adamw": (
        tiny_models.conversation_dataset,
        SCHEDULE | {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 5},
    ),
    "schedule": (tiny_models.text_dataset, SCHEDULE),
    "logged at every second step": (tiny_models.text_dataset, {"logging_steps": 2, "max_steps": 4}),
    "tokens counted": (tiny_models.text_dataset, {"include_num_input_tokens_seen": "non_padding"}),
    "a process that loads": (tiny_models.conversation_dataset, {"dataloader_num_workers": 1}),
    "another seed": (tiny_models.text_dataset, {"seed": 5, "data_seed": 6}),
    "label smoothing": (tiny_models.text_dataset, {"label_smoothing_factor": 0.2}),
    "label smoothing of completions": (
        tiny_models.conversation_dataset,
        {"label_smoothing_factor": 0.2} | ONE_MICRO_BATCH,
    ),
    "dft": (tiny_models.conversation_dataset, DFT),
    "dft of text": (tiny_models.text_dataset, DFT | ONE_MICRO_BATCH),
    "dft, bfd": (one_long_row, DFT | BFD),
    "dft, bfd_split": (tiny_models.conversation_dataset, DFT | SPLIT),
    "dft, wrapped": (tiny_models.conversation_dataset, DFT | WRAPPED),
    "dft, padding_free": (tiny_models.conversation_dataset, DFT | PADDING_FREE),
    "dft of a stream": (streamed(tiny_models.prompt_dataset), DFT),
    "dft, cut at the end": (tiny_models.conversation_dataset, DFT | {"max_length": 29}),
}


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated")
@pytest.mark.filterwarnings("ignore:`pad_token` is deprecated")
@pytest.mark.parametrize("case", CASES)
def test_settings_of_the_data(case, tmp_path):
    data, settings = CASES[case]
    assert_same_run(*side_by_side(tmp_path, data, **settings))


@pytest.mark.parametrize("settings", [{}, DFT], ids=["sft", "dft"])
def test_a_step_without_labels_trains_nothing(settings, tmp_path):
    """Neither run may divide by zero, nor leave the next steps with weights that are no numbers."""
    order = {"train_sampling_strategy": "sequential", "max_length": None}
    theirs, ours = side_by_side(tmp_path, some_without_labels, **order, **settings)
    assert ours.steps[0]["loss"] == 0 and ours.steps[1]["loss"] > 0
    assert_same_run(theirs, ours)


# -- the tokenizer and its template ----------------------------------------------------------------


def test_a_template_from_a_file(tmp_path):
    (tmp_path / "chat.jinja").write_text(tiny_models.TEMPLATE.replace("<|im_start|>", "<|im_start|>the "))
    settings = {"chat_template_path": str(tmp_path / "chat.jinja")}
    theirs, ours = side_by_side(tmp_path, tiny_models.message_dataset, **settings)
    assert_same_run(theirs, ours)
    text = ours.trainer.processing_class.decode(ours.trainer.train_dataset[0]["input_ids"])
    assert text.startswith("<|im_start|>the ")


def test_a_template_from_another_tokenizer(tmp_path):
    """Its special tokens are added, and the model gets rows for them."""
    other = copy.deepcopy(tiny_models.tokenizer())
    other.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    other.chat_template = tiny_models.TEMPLATE.replace("<|im_start|>", "<|turn|>")
    other.save_pretrained(tmp_path / "other")
    theirs, ours = side_by_side(tmp_path, tiny_models.message_dataset, chat_template_path=str(tmp_path / "other"))
    assert ours.trainer.model.vocab_size > tiny_models.llama().vocab_size
    assert_same_run(theirs, ours)


def test_a_tokenizer_without_padding_token(tmp_path):
    tokenizer = copy.deepcopy(tiny_models.tokenizer())
    tokenizer.pad_token = None
    theirs, ours = side_by_side(tmp_path, tiny_models.message_dataset, given={"processing_class": tokenizer})
    assert_same_run(theirs, ours)
    assert ours.trainer.model.config.pad_token_id == tokenizer.eos_token_id


def test_a_collator_of_ones_own(tmp_path):
    """Of pre-tokenised rows, which it may pad as it likes."""
    given = {"data_collator": DataCollatorForLanguageModeling(pad_token_id=5, pad_to_multiple_of=8)}
    theirs, ours = side_by_side(tmp_path, lambda: tokenised_dataset(tiny_models.conversation_dataset(8)), given=given)
    assert_same_run(theirs, ours)
    assert next(iter(ours.trainer.get_train_dataloader()))["input_ids"].shape[1] % 8 == 0


# -- that these tests can fail ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"seed": 5}, {"max_length": 20}, {"loss_type": "dft"}, {"gradient_accumulation_steps": 1}], ids=str
)
def test_another_run_is_noticed(settings, tmp_path):
    with pytest.raises(AssertionError, match="step 1"):
        assert_same_run(
            run_one(TRL, tmp_path, tiny_models.text_dataset),
            run_one(OURS, tmp_path, tiny_models.text_dataset, **settings),
        )


def test_one_label_less_is_noticed(tmp_path):
    def one_less() -> Dataset:
        return tokenised_dataset(tiny_models.text_dataset(8)).map(lambda row: {"labels": [*row["labels"][:-1], -100]})

    theirs = run_one(TRL, tmp_path, lambda: tokenised_dataset(tiny_models.text_dataset(8)))
    with pytest.raises(AssertionError, match="step 1: loss"):
        assert_same_run(theirs, run_one(OURS, tmp_path, one_less))
