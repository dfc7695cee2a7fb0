"""Rows that are longer than what a model can read, or hold tokens that it has no embedding for."""

import logging

import pytest
from datasets import Dataset
from transformers import BertConfig, BertLMHeadModel, BloomConfig, BloomForCausalLM, OPTConfig, OPTForCausalLM

import tiny_models
from qtarget import ConfigError, DataError
from qtarget.models import positions
from quick_runs import quick_trainer, train_quickly

ONE_BY_ONE = {"max_length": None, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
LONG = Dataset.from_list([{"text": "Tom has 3."}, {"text": "Tom has 3 apples. " * 60}])


@pytest.mark.parametrize(
    "model, wanted",
    [
        (tiny_models.gpt2, 256),
        (tiny_models.llama, None),
        (
            lambda: OPTForCausalLM(
                OPTConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, ffn_dim=8)
            ),
            2048,
        ),
        (lambda: BloomForCausalLM(BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=1)), None),
        (
            lambda: BertLMHeadModel(
                BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
            ),
            512,
        ),
    ],
    ids=["wpe", "rope", "opt", "alibi", "bert"],
)
def test_learned_positions(model, wanted):
    assert positions.learned(model()) == wanted


def test_a_window_is_stretched_as_its_rope_is():
    config = tiny_models.llama().config
    assert positions.window(config) == 256
    config.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert positions.window(config) == 1024


def test_a_row_beyond_learned_positions_is_refused_with_its_number(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^max_length is null and row 1 .* but the model takes 256 positions; set max"
    ):
        quick_trainer(tiny_models.gpt2(), tmp_path, LONG, max_length=None)


def test_it_is_cut_where_max_length_says_so(tmp_path):
    made = quick_trainer(tiny_models.gpt2(), tmp_path, LONG, max_length=256)
    assert max(len(row["input_ids"]) for row in made.train_dataset) == 256


def test_packed_rows_count_by_document(tmp_path):
    short = Dataset.from_list([{"text": "Tom has 3 apples. " * 8}] * 8)
    made = quick_trainer(tiny_models.gpt2(), tmp_path, short, packing=True, max_length=512)
    assert max(len(row["input_ids"]) for row in made.train_dataset) > 256


def test_a_row_of_a_stream_is_refused_when_it_comes(tmp_path):
    with pytest.raises(DataError, match=r"^step 1: a row has \d+ tokens, but GPT2LMHeadModel takes 256 positions"):
        train_quickly(tiny_models.gpt2(), tmp_path, LONG.to_iterable_dataset(), **ONE_BY_ONE)


def test_a_teacher_that_was_handed_over_is_asked_about_no_such_row(tmp_path):
    with pytest.raises(DataError, match="but GPT2LMHeadModel takes 256 positions"):
        train_quickly(
            tiny_models.llama(), tmp_path, LONG, teacher_model=tiny_models.gpt2(), target="kd", max_length=None
        )


def test_a_window_that_is_left_is_warned_of_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        quick_trainer(tiny_models.llama(), tmp_path, LONG, max_length=None)
    said = [record.message for record in caplog.records if "was made for 256" in record.message]
    assert len(said) == 1 and "row 1 of the train dataset" in said[0]


def test_a_token_without_an_embedding_is_refused_where_a_row_has_it(tmp_path):
    small = tiny_models.llama(vocab=len(tiny_models.tokenizer()) - 3)
    with pytest.raises(ConfigError, match=r"holds token .* \(id 319\), but the model has embeddings for 317 tokens"):
        quick_trainer(small, tmp_path)
    quick_trainer(small, tmp_path, Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]))
