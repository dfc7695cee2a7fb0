"""What TRL refuses is refused, and so is what it would train otherwise than was asked for."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from peft import LoraConfig

import tiny_models
from beside_trl import OURS, TRL, make_trainer
from dataset_shapes import as_text, packed_already, streamed, tokenizer_with_template, with_mask
from qtarget import ConfigError


@dataclass(frozen=True)
class Refused:
    """``told``: a part of qtarget's sentence."""

    name: str
    told: str
    settings: dict[str, Any] = field(default_factory=dict)
    data: Callable[[], Any] = tiny_models.text_dataset
    given: dict[str, Any] = field(default_factory=dict)


ASSISTANT, FREE = {"assistant_only_loss": True}, {"padding_free": True}
UNPREPARED = {"dataset_kwargs": {"skip_prepare_dataset": True}}
BY_BOTH = [
    Refused("padding_free with max_length", "set `max_length=None`", FREE),
    Refused("packing without max_length", "set max_length to the length", {"packing": True, "max_length": None}),
    Refused("another strategy of packing", "valid: bfd, bfd_split", {"packing": True, "packing_strategy": "tight"}),
    Refused("another mode of truncation", "did you mean 'keep_end'?", {"truncation_mode": "keep_middle"}),
    Refused("another loss", "did you mean 'nll'", {"loss_type": "nlll"}),
    Refused("the assistant's part of text", "not conversational", ASSISTANT),
    Refused(
        "the assistant's part without markers",
        "no {% generation %} markers",
        ASSISTANT,
        tiny_models.message_dataset,
        {"processing_class": tiny_models.tokenizer()},
    ),
    Refused(
        "completions of a formatting function",
        "`completion_only_loss=True`, which is incompatible",
        {"completion_only_loss": True},
        tiny_models.prompt_dataset,
        {"formatting_func": as_text},
    ),
    Refused("a mask, not prepared", "mask columns but no 'labels'", UNPREPARED, lambda: with_mask("completion_mask")),
    Refused("rows made on the fly", "with_transform", {}, lambda: tiny_models.text_dataset().with_transform(dict)),
    Refused(
        "rows of another shape",
        "give it one of messages",
        {},
        lambda: tiny_models.text_dataset().rename_column("text", "it"),
    ),
    Refused("images", "vision-related", {}, lambda: tiny_models.text_dataset().add_column("image", ["none"] * 8)),
    Refused("no data", "`train_dataset` is required", {}, lambda: None),
    Refused("a list", "must be a `Dataset`", {}, lambda: [{"text": "one"}]),
    Refused(
        "a stream without end", "max_steps has to be specified", {"max_steps": -1}, streamed(tiny_models.text_dataset)
    ),
    Refused("an end of sequence that is no token", "not found in the vocabulary", {"eos_token": "<none>"}),
    Refused("an auxiliary loss without experts", "not a Mixture-of-Experts", {"router_aux_loss_coef": 0.1}),
    Refused("selective, but nothing", "requires `gradient_ch", {"gradient_checkpointing_kwargs": {"selective": True}}),
    Refused(
        "an adapter on the head",
        "an adapter on the head is not supported",
        given={"peft_config": LoraConfig(target_modules=["lm_head"])},
    ),
    Refused("no adapter", "must be a `peft.PeftConfig`", given={"peft_config": {"r": 4}}),
    Refused(
        "a collator where rows are joined",
        "custom data collator is not supported",
        FREE | {"max_length": None},
        given={"data_collator": list},
    ),
]
# TRL trains each of these.
BY_QTARGET = [
    Refused("a loss of one's own", "compute_loss_func is given together with target", given={"compute_loss_func": max}),
    Refused("packed rows under one mask", "documents see each other", {"max_length": None}, packed_already),
    Refused(
        "documents that see each other",
        "documents see each other",
        {"eval_packing": True, "max_length": 200},
        given={"eval_dataset": tiny_models.message_dataset()},
    ),
    Refused("two losses", "contradict each other", {"loss_type": "dft", "label_smoothing_factor": 0.1}),
]


def refusal(kind, case, folder):
    with pytest.raises((ValueError, TypeError, KeyError)) as error:
        given = {"processing_class": tokenizer_with_template(tiny_models.MARKED_TEMPLATE), **case.given}
        make_trainer(kind, tiny_models.llama(tied=False), folder, case.data(), given, **case.settings)
    return error.value


@pytest.mark.parametrize("case", BY_BOTH, ids=lambda case: case.name)
def test_what_trl_refuses_is_refused(case, tmp_path):
    assert refusal(TRL, case, tmp_path)
    assert re.search(re.escape(case.told), str(refusal(OURS, case, tmp_path)))


@pytest.mark.filterwarnings("ignore:`compute_loss_func` is deprecated", "ignore:`label_smoothing_factor` is deprecated")
@pytest.mark.parametrize("case", BY_QTARGET, ids=lambda case: case.name)
def test_what_only_qtarget_refuses(case, tmp_path):
    make_trainer(TRL, tiny_models.llama(), tmp_path, case.data(), case.given, **case.settings)
    error = refusal(OURS, case, tmp_path)
    assert isinstance(error, ConfigError) and len(error.faults) == 1 and case.told in error.faults[0]
