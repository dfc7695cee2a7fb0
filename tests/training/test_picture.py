"""What will be trained, counted before it is: every number against a count by hand, and against real batches."""

from __future__ import annotations

import copy
import functools
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import dataset_shapes
import tiny_models
from qtarget import QTargetConfig, QTargetTrainer
from qtarget.data.picture import Picture
from qtarget.data.roles import of_tokens

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "be", "kind", "think"]
SPECIAL = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"]
CHAT = "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|>\n{% endfor %}"
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|> {% if m.role == 'assistant' %}{% generation %}{{ m.content }} <|end|>"
    "{% endgeneration %}{% else %}{{ m.content }} <|end|>{% endif %}\n{% endfor %}"
)
END_UNMARKED = MARKED.replace(" <|end|>{% endgeneration %}", "{% endgeneration %} <|end|>")
ENDLESS = CHAT.replace(" <|end|>", "")


@functools.cache
def words(eos: str = "<|end|>", template: str = CHAT, adds: str = "") -> Any:
    """A tokenizer with a token for each word, so that tokens are counted by reading. adds: "<s>" or "</s>" to a text."""
    level = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="zero"))
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds:
        form = f"{adds} $A" if adds == "<s>" else f"$A {adds}"
        level.post_processor = processors.TemplateProcessing(single=form, special_tokens=[(adds, SPECIAL.index(adds))])
    made = PreTrainedTokenizerFast(
        tokenizer_object=level,
        bos_token="<s>",
        eos_token=eos,
        pad_token="<pad>",
        additional_special_tokens=[token for token in SPECIAL[3:] if token != eos],
    )
    made.chat_template = template
    return made


@functools.cache
def model() -> LlamaForCausalLM:
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=len(SPECIAL) + len(WORDS), eos_token_id=None, bos_token_id=1, **size)
    )


def trainer_of(data: Any, folder: Path, tokenizer: Any = None, **settings: Any) -> QTargetTrainer:
    settings = {"max_length": None, "use_cpu": True, "report_to": "none", "max_steps": 2, "logging_steps": 1} | settings
    own = copy.deepcopy(words() if tokenizer is None else tokenizer)
    config = QTargetConfig(output_dir=str(folder), save_strategy="no", gradient_checkpointing=False, **settings)
    return QTargetTrainer(copy.deepcopy(model()), config, train_dataset=data, processing_class=own)


def picture_of(data: Any, folder: Path, tokenizer: Any = None, **settings: Any) -> Picture:
    return trainer_of(data, folder, tokenizer, **settings).picture()


def say(*contents: str, system: str = "") -> list[dict[str, str]]:
    said = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}] * bool(system) + said


TEXTS = Dataset.from_list([{"text": "one two three"}, {"text": "four five </s>"}])  # 4 and 3 tokens
TALKS = Dataset.from_list(  # 4 + 5 + 4 tokens, and 3 + 4 + 5 + 3
    [
        {"messages": say("one two three", "four five", system="be kind")},
        {"messages": say("six", "seven eight", "nine ten one", "two")},
    ]
)
PAIRS = Dataset.from_list(  # 2 + 3 tokens, and 1 + 2
    [{"prompt": "one two ", "completion": "three four"}, {"prompt": "five ", "completion": "six"}]
)
ASKED = Dataset.from_list(  # 5 + 4 tokens
    [{"prompt": say("one two three"), "completion": [{"role": "assistant", "content": "four five"}]}]
)
IDS = Dataset.from_list(
    [{"input_ids": [8, 9, 10, 7], "labels": [8, -100, 10, 7]}, {"input_ids": [9, 7], "labels": [-100, 7]}]
)
END = words(template=MARKED)
TEXT = words("</s>")


@pytest.mark.parametrize(
    ("data", "tokenizer", "settings", "tokens", "trained", "roles", "setting"),
    [
        (TEXTS, TEXT, {}, 7, 5, {"text": (7, 5)}, None),
        (
            TALKS,
            None,
            {},
            28,
            26,
            {"system": (4, 3), "user": (13, 12), "assistant": (11, 11)},
            "assistant_only_loss: true",
        ),
        (
            TALKS,
            END,
            {"assistant_only_loss": True},
            28,
            8,
            {"system": (4, 0), "user": (13, 0), "assistant": (11, 8)},
            None,
        ),
        (PAIRS, TEXT, {}, 8, 5, {"prompt": (3, 0), "completion": (5, 5)}, None),
        (
            PAIRS,
            TEXT,
            {"completion_only_loss": False},
            8,
            6,
            {"prompt": (3, 1), "completion": (5, 5)},
            "completion_only_loss: true",
        ),
        (ASKED, None, {}, 9, 4, {"prompt": (5, 0), "completion": (4, 4)}, None),
        (ASKED, END, {"assistant_only_loss": True}, 9, 3, {"user": (5, 0), "assistant": (4, 3)}, None),
        (IDS, None, {}, 6, 3, None, None),
    ],
    ids=["text", "messages", "assistant only", "pairs", "whole pairs", "asked", "asked, assistant only", "ids"],
)
def test_tokens_by_role(data, tokenizer, settings, tokens, trained, roles, setting, tmp_path):
    seen = picture_of(data, tmp_path, tokenizer, **settings)
    assert (seen.given, seen.rows, seen.tokens, seen.trained) == (len(data), len(data), tokens, trained)
    assert seen.roles == roles
    assert seen.roles_rows == (0 if roles is None else len(data))
    assert setting in seen.setting if setting else seen.setting is None
    assert (seen.cut, seen.untrained, seen.doubled, seen.warnings) == (0, 0, {}, [])
    assert [(end.text, end.rows, end.stops) for end in seen.ends] == [
        (TEXT.eos_token if tokenizer is TEXT else "<|end|>", len(data), True)
    ]
    streamed = picture_of(data.to_iterable_dataset(), tmp_path, tokenizer, **settings)
    assert streamed.of_stream and replace(streamed, of_stream=False) == seen


@pytest.mark.parametrize(
    ("settings", "rows", "tokens", "trained", "lost", "ends", "untrained"),
    [
        # Rows of 13 and 15 tokens, 8 of them trained by assistant_only: 4 5 end; 7 8 end, 2 end.
        ({"max_length": 14}, 2, 27, 7, 1, 1, 0),
        ({"max_length": 11}, 2, 22, 4, 4, 2, 0),
        ({"max_length": 6}, 1, 6, 2, 6, 2, 1),
        ({"max_length": 5, "truncation_mode": "keep_end"}, 2, 10, 5, 3, 0, 0),
        ({"max_length": 2, "truncation_mode": "keep_end"}, 2, 4, 2, 6, 0, 0),
        ({"max_length": 11, "packing": True}, 2, 22, 4, 4, 2, 0),
        ({"max_length": 14, "packing": True, "packing_strategy": "bfd_split"}, 2, 28, 7, 0, 0, 0),
        ({"max_length": 14, "packing": True, "packing_strategy": "wrapped"}, 2, 28, 8, 0, 0, 0),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The `'keep_end'`:FutureWarning")
def test_what_max_length_cuts(settings, rows, tokens, trained, lost, ends, untrained, tmp_path):
    seen = picture_of(TALKS, tmp_path, END, assistant_only_loss=True, **settings)
    assert (seen.rows, seen.tokens, seen.trained) == (rows, tokens, trained)
    assert (seen.labels_lost, seen.ends_lost, seen.untrained, seen.longest) == (lost, ends, untrained, 15)
    assert seen.cut == sum(length > settings["max_length"] for length in (13, 15)) * (lost > 0)
    assert any("are cut at max_length" in sentence for sentence in seen.warnings) == (lost > 0)
    assert seen.roles is not None
    of_roles = [sum(counts) for counts in zip(*seen.roles.values(), strict=True)]
    assert of_roles == [tokens, trained]


@pytest.mark.parametrize("packing", [None, "bfd", "bfd_split"])
@pytest.mark.parametrize("shape", [s for s in dataset_shapes.SHAPES if "stream" not in s.name], ids=lambda s: s.name)
def test_it_counts_what_batches_train(shape, packing, tmp_path):
    """In every form that rows may come in, cut: labels of all collated batches that some position predicts."""
    packs = {} if packing is None else {"packing": True, "packing_strategy": packing}
    config = QTargetConfig(
        str(tmp_path), max_length=shape.max_length, use_cpu=True, report_to="none", **shape.settings, **packs
    )
    trainer = QTargetTrainer(tiny_models.llama(), config, train_dataset=shape.data(), **shape.given())
    batches = list(trainer.get_train_dataloader())
    seen = trainer.picture()
    assert seen.trained == sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    if packing is None:
        masks = [batch["attention_mask"] for batch in batches]
        assert (seen.rows, seen.tokens) == (sum(map(len, masks)), sum(int(mask.sum()) for mask in masks))
    else:
        assert seen.tokens == sum(map(len, trainer.train_dataset["input_ids"]))


def test_one_process_or_several(tmp_path):
    data = Dataset.from_list([*TALKS] * 20)
    one, two = (picture_of(data, tmp_path, max_length=14, dataset_num_proc=n) for n in (None, 2))
    assert one == two and [*one.spans(9)] == [*two.spans(9)]


def test_more_rows_than_are_looked_at_one_by_one(tmp_path):
    """All rows are counted, roles over the first 256, and a stream is read no further than these."""
    long = Dataset.from_list([{"messages": say("one", "two three")}] * 1300)  # 3 + 4 tokens a row, in two batches
    seen = picture_of(long, tmp_path)
    assert (seen.rows, seen.tokens, seen.trained, seen.ends[0].rows) == (1300, 9100, 7800, 1300)
    assert (seen.roles, seen.roles_rows) == ({"user": (768, 512), "assistant": (1024, 1024)}, 256)
    assert "in 256 rows" in str(seen)
    stream = picture_of(long.to_iterable_dataset(), tmp_path)
    assert (stream.rows, stream.tokens, stream.of_stream) == (256, 1792, True)
    assert str(stream).startswith("the first 256 rows, 1,792 tokens, 1,536 trained (85.7%): user 512 of 768")


# -- ends --------------------------------------------------------------------------------------------------------


def test_the_templates_end_of_turn_is_not_the_end_that_generation_knows(tmp_path, caplog):
    """A base model under a chat template: said with the fix, which fixes it and is saved."""
    base = words("</s>", CHAT)
    seen = picture_of(TALKS, tmp_path, base)
    assert [(end.text, end.rows, end.stops) for end in seen.ends] == [("<|end|>", 2, False)]
    (warning,) = seen.warnings
    assert "2 of 2 completions end with <|end|>, at which generation does not stop (it stops at </s>)" in warning
    assert 'set eos_token: "<|end|>"' in warning
    with caplog.at_level(logging.WARNING):
        trainer_of(TALKS, tmp_path, base).train()
    assert warning in caplog.messages
    trainer = trainer_of(TALKS, tmp_path, base, eos_token="<|end|>")
    assert trainer.picture().warnings == []
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert (
        SPECIAL.index("<|end|>")
        in json.loads((tmp_path / "saved" / "generation_config.json").read_text())["eos_token_id"]
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token == "<|end|>"


def test_a_template_without_an_end_of_turn(tmp_path):
    (warning,) = picture_of(TALKS, tmp_path, words(template=ENDLESS)).warnings
    assert "2 of 2 completions end with 'five' or 'two', at which generation does not stop" in warning
    assert (
        "no end is taught; end the assistant's turns in the chat template (chat_template_path) with <|end|>" in warning
    )


def test_an_end_of_turn_that_is_masked(tmp_path):
    seen = picture_of(TALKS, tmp_path, words(template=END_UNMARKED), assistant_only_loss=True)
    assert seen.ends_masked == 2
    (warning,) = seen.warnings
    assert "the end of turn follows it in 2 rows and is not trained" in warning and "{% generation %}" in warning


def test_rows_of_ids_without_an_end(tmp_path):
    rows = Dataset.from_list([{"input_ids": [8, 9, 10]}, {"input_ids": [9, 7]}])
    (warning,) = picture_of(rows, tmp_path).warnings
    assert "1 of 2 completions end with 'two', at which generation does not stop" in warning
    assert "end the rows with <|end|>" in warning


def test_every_id_of_the_generation_config_stops(tmp_path):
    base = words("</s>", CHAT)
    trainer = trainer_of(TALKS, tmp_path, base)
    trainer.model.generation_config.eos_token_id = [2, 7]
    assert trainer.picture().warnings == [] and trainer.picture().stops == ["</s>", "<|end|>"]


# -- special tokens twice ----------------------------------------------------------------------------------------


def test_a_tokenizer_that_adds_the_end_as_we_do(tmp_path, caplog):
    """One end is left, in ids, labels and where a completion begins, and it is said how often."""
    with caplog.at_level(logging.WARNING):
        plain = trainer_of(TEXTS, tmp_path, words("</s>", adds="</s>"))
    assert "2 of 2 rows of the train dataset, row 0 first: the tokenizer adds </s> to a text" in caplog.text
    same = trainer_of(TEXTS, tmp_path, TEXT).train_dataset
    for column in ("input_ids", "labels"):
        assert plain.train_dataset[column] == same[column]
    assert plain.picture().doubled == {}
    caplog.clear()
    pairs = trainer_of(PAIRS, tmp_path, words("</s>", adds="</s>")).train_dataset
    for column in ("input_ids", "labels"):
        assert pairs[column] == trainer_of(PAIRS, tmp_path, TEXT).train_dataset[column]
    assert "the prompt alone is tokenised differently" not in caplog.text


def test_a_beginning_twice(tmp_path):
    rows = Dataset.from_list([{"text": "one two"}, {"text": "<s> one two"}, {"text": "<s> six"}])
    seen = picture_of(rows, tmp_path, words("</s>", adds="<s>"))
    assert seen.doubled == {"<s>": (2, 1)}
    (warning,) = seen.warnings
    assert "<s> appears twice in succession in 2 of 3 rows, first in row 1" in warning


def test_an_end_twice_in_a_conversation(tmp_path):
    talks = Dataset.from_list([{"messages": say("one", "two <|end|>")}, {"messages": say("one", "two")}])
    assert picture_of(talks, tmp_path).doubled == {"<|end|>": (1, 0)}


def test_padding_and_unknown_words_may_stand_side_by_side(tmp_path):
    rows = Dataset.from_list([{"input_ids": [8, 8, 9, 9, 7, 0, 0, 0], "labels": [8, 8, 9, 9, 7, -100, -100, -100]}])
    assert picture_of(rows, tmp_path).doubled == {}


# -- roles -------------------------------------------------------------------------------------------------------

GREETING = "<s> <|system|> be kind <|end|> "  # of a template that has a system prompt of its own
OWN_SYSTEM = "{% if messages[0].role != 'system' %}" + GREETING + "{% endif %}" + CHAT
# Thinks only in its last turn, as Qwen3's template writes it.
THINKS_LAST = (
    "{% for m in messages %}<|{{ m.role }}|> {% if m.role == 'assistant' and loop.last %}think {% endif %}"
    "{{ m.content }} <|end|>\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "messages", "roles"),
    [
        (OWN_SYSTEM, say("one", "two three"), {"template": (5, 4), "user": (3, 3), "assistant": (4, 4)}),
        ("<s> " + CHAT, say("one", "two three"), {"user": (4, 3), "assistant": (4, 4)}),
        (THINKS_LAST, say("six", "seven eight", "nine ten one", "two"), {"user": (8, 7), "assistant": (8, 8)}),
        (
            CHAT,
            [*say("one", "two"), {"role": "tool", "content": "six"}],
            {"user": (3, 2), "assistant": (3, 3), "tool": (3, 3)},
        ),
        ("{{ messages | length }}" + CHAT, say("one", "two"), None),
    ],
    ids=["a system prompt of its own", "only <s> of its own", "thinks in the last turn", "a tool", "joined"],
)
def test_roles_are_found_through_the_template(template, messages, roles, tmp_path):
    seen = picture_of(Dataset.from_list([{"messages": messages}]), tmp_path, words(template=template))
    assert seen.roles == roles
    assert roles is not None or "roles not known" in str(seen)


TEMPLATES = Path(trl.__file__).parent / "chat_templates"
THREE_ROUNDS = say("How many?", "Three.", "And now?", "Four.", "Sure?", "Yes.", system="Be kind.")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"properties": {}}}}
WITH_TOOLS = [
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "name": "add", "content": "11"},
    {"role": "tool", "name": "add", "content": "22"},
    {"role": "assistant", "content": "Three."},
]


@pytest.mark.parametrize(
    ("name", "with_tools"),
    [(name, False) for name in ("qwen2_5", "qwen3", "qwen3_8", "llama3_2", "phi3", "gptoss", "cohere2", "deepseekv3")]
    + [(name, True) for name in ("qwen2_5", "qwen3", "qwen3_8", "gptoss")],
)
def test_roles_by_real_templates(name, with_tools):
    """Each role's tokens hold what it said and nothing that another said."""
    tokenizer = copy.deepcopy(tiny_models.tokenizer())
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    messages = WITH_TOOLS if with_tools else THREE_ROUNDS
    read = {"messages": messages, "tools": [TOOL] if with_tools else None, "chat_template_kwargs": {}}
    ids = tokenizer.apply_chat_template(messages, tools=read["tools"], return_dict=True)["input_ids"]
    found = of_tokens(ids, read, tokenizer, None)
    assert found is not None
    said = {role: {m["content"] for m in messages if m["role"] == role} - {""} for role in set(found) - {"template"}}
    for role in said:
        text = tokenizer.decode([token for token, of in zip(ids, found, strict=True) if of == role])
        assert {content for contents in said.values() for content in contents if content in text} == said[role]


# -- rows as text ------------------------------------------------------------------------------------------------


def test_the_first_rows_as_text(tmp_path):
    rows = [{"prompt": "one ", "completion": "two"}, {"prompt": "three ", "completion": "four five"}]
    seen = picture_of(Dataset.from_list(rows), tmp_path, TEXT)
    assert [*seen.spans(5)] == [
        (0, 3, [("one", False), (" two </s>", True)]),
        (1, 4, [("three", False), (" four five </s>", True)]),
    ]
    assert [*seen.spans(0)] == []


def test_a_row_that_trains_nothing_is_not_the_one_that_is_shown(tmp_path):
    rows = [{"input_ids": [8, 9], "labels": [-100, -100]}, {"input_ids": [8, 9, 7], "labels": [-100, -100, 7]}]
    seen = picture_of(Dataset.from_list(rows), tmp_path)
    assert next(seen.spans(1)) == (1, 3, [("zero one", False), (" <|end|>", True)])
    assert (seen.rows, seen.untrained, seen.dropped) == (2, 1, 0)
    seen = picture_of(Dataset.from_list(rows), tmp_path, max_length=9)
    assert (seen.given, seen.rows, seen.untrained, seen.dropped) == (2, 1, 1, True)


def test_rows_prepared_elsewhere_are_counted_too(tmp_path):
    seen = picture_of(IDS, tmp_path, dataset_kwargs={"skip_prepare_dataset": True})
    assert (seen.rows, seen.tokens, seen.trained, seen.roles) == (2, 6, 3, None)


def test_a_library_run_says_it_in_a_line(tmp_path, capsys):
    trainer_of(TALKS, tmp_path).train()
    assert "data: 2 rows, 28 tokens, 26 trained (92.9%): system 3 of 4, user 12 of 13" in capsys.readouterr().out
