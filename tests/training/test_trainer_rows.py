"""Rows as people write them train what the plainly written ones do, and what cannot be meant is refused."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset, load_dataset

import teacher_caches
import tiny_models
from dataset_shapes import rows_of, tokenizer_with_template
from qtarget import DataError, QTargetTrainer
from qtarget.models.causal_lm import CausalLM
from qtarget.teachers.context import Context
from quick_runs import quick_config, quick_settings

PADDED = {"packing": False, "max_length": 600}
ASSISTANT = {"assistant_only_loss": True}
# Writes tools and tool calls as they are, the way most templates do.
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Reads content in parts and nothing else.
PARTS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}"
)
# Prints a greeting that comes with the row.
GREETING = "{{ greeting or 'Hm.' }}" + tiny_models.TEMPLATE


def user(content: Any = "How many?", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def answer(content: Any = "It is 7.", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def talk(*messages: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": [*messages], **columns}


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {name: {"type": kind} for name, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.fixture(scope="module")
def model():
    return tiny_models.llama()


@pytest.fixture
def prepared(model, tmp_path):
    """Rows or a dataset → what is trained of it."""

    def prepare(data: Any, template: str | None = None, **settings: Any) -> list[dict[str, Any]]:
        return rows_of(trainer_of(model, tmp_path, data, template, **settings).train_dataset)

    return prepare


def trainer_of(model: Any, folder: Path, data: Any, template: str | None = None, **settings: Any) -> QTargetTrainer:
    data = Dataset.from_list(data) if isinstance(data, list) else data
    config = quick_config(folder, **(PADDED | settings))
    return QTargetTrainer(model, config, train_dataset=data, processing_class=tokenizer_with_template(template))


IDS = tiny_models.tokenizer()(tiny_models.SENTENCES[0])["input_ids"][:9]
PAD = 0
N = len(IDS)
ALONE = [{"input_ids": IDS}] * 2
NAMED = ["system", "human", "gpt", "human", "model"]
USUAL = ["system", "user", "assistant", "user", "assistant"]
SAID = ["Count.", "1 + 1?", "2", "2 + 2?", "4"]

# name → (rows as they come, rows written plainly, template, settings)
SAME: dict[str, tuple[Any, Any, str | None, dict[str, Any]]] = {
    "content in parts": (
        [talk(user([text_part("How many?")]), answer([text_part("It is"), text_part(" 7.")]))],
        [talk(user(), answer())],
        None,
        {},
    ),
    "parts in a prompt and its completion": (
        [{"prompt": [user([text_part("How many?")])], "completion": [answer([text_part("It is 7.")])]}],
        [{"prompt": [user()], "completion": [answer()]}],
        None,
        {},
    ),
    "parts of every role": (
        [
            talk(
                {"role": "system", "content": [text_part("Count.")]},
                user([text_part("How many?")]),
                {"role": "tool", "content": [text_part("7")]},
                answer([text_part("It is 7.")]),
            )
        ],
        [talk({"role": "system", "content": "Count."}, user(), {"role": "tool", "content": "7"}, answer())],
        None,
        {},
    ),
    "parts by another library's names": (
        [
            talk(
                user([{"type": "input_text", "text": "How many?"}]),
                answer([{"type": "output_text", "text": "It is 7."}]),
            )
        ],
        [talk(user(), answer())],
        None,
        {},
    ),
    "text for a template that reads parts": (
        [talk(user(), answer())],
        [talk(user([text_part("How many?")]), answer([text_part("It is 7.")]))],
        PARTS,
        {},
    ),
    "roles of ShareGPT": (
        [talk(*({"role": role, "content": text} for role, text in zip(NAMED, SAID, strict=True)))],
        [talk(*({"role": role, "content": text} for role, text in zip(USUAL, SAID, strict=True)))],
        tiny_models.MARKED_TEMPLATE,
        ASSISTANT,
    ),
    "ShareGPT's keys in messages": (
        [talk(*({"from": role, "value": text} for role, text in zip(NAMED, SAID, strict=True)))],
        [talk(*({"role": role, "content": text} for role, text in zip(USUAL, SAID, strict=True)))],
        tiny_models.MARKED_TEMPLATE,
        ASSISTANT,
    ),
    "conversations": (
        [{"conversations": [{"from": role, "value": text} for role, text in zip(NAMED, SAID, strict=True)]}],
        [talk(*({"role": role, "content": text} for role, text in zip(USUAL, SAID, strict=True)))],
        tiny_models.MARKED_TEMPLATE,
        ASSISTANT,
    ),
    "conversations of role and content": (
        [{"conversations": [user(), answer()]}],
        [talk(user(), answer())],
        None,
        {},
    ),
    "roles in capitals": (
        [talk({"role": "User", "content": "How many?"}, {"role": "Assistant", "content": "It is 7."})],
        [talk(user(), answer())],
        None,
        {},
    ),
    "a prompt beside messages": (
        [{"prompt": "How many?", "prompt_id": "7", **talk(user(), answer())}],
        [talk(user(), answer())],
        None,
        {},
    ),
    "a prompt beside messages, assistant only": (
        [{"prompt": "How many?", "completion_id": "7", **talk(user(), answer())}] * 2,
        [talk(user(), answer())] * 2,
        tiny_models.MARKED_TEMPLATE,
        ASSISTANT,
    ),
    "chosen and rejected beside messages": (
        [{"prompt": "How many?", "chosen": [user(), answer()], "rejected": [user()], **talk(user(), answer())}],
        [talk(user(), answer())],
        tiny_models.MARKED_TEMPLATE,
        ASSISTANT,
    ),
    "a prompt beside text": (
        [{"prompt": "Tom", "text": "Tom has 3 apples."}],
        [{"text": "Tom has 3 apples."}],
        None,
        {},
    ),
    "a completion beside text": (
        [{"completion": "Tom", "text": "Tom has 3 apples."}],
        [{"text": "Tom has 3 apples."}],
        None,
        {},
    ),
    "text beside prompt and completion": (
        [{"prompt": "Tom has", "completion": " 3 apples.", "text": "Ann"}],
        [{"prompt": "Tom has", "completion": " 3 apples."}],
        None,
        {},
    ),
    "template arguments that are null": (
        [
            talk(user(), answer(), chat_template_kwargs=None),
            talk(user(), answer(), chat_template_kwargs={"greeting": "Hi."}),
        ],
        [
            talk(user(), answer(), chat_template_kwargs={}),
            talk(user(), answer(), chat_template_kwargs={"greeting": "Hi."}),
        ],
        GREETING,
        {},
    ),
    "one template argument in each row": (
        [talk(user(), answer(), chat_template_kwargs={name: "Hi."}) for name in ("greeting", "farewell")],
        [talk(user(), answer(), chat_template_kwargs=json) for json in ({"greeting": "Hi."}, {"greeting": "Hm."})],
        GREETING,
        {},
    ),
    "no tools as an empty list": (
        [talk(user(), answer(), tools=[])] * 2,
        [talk(user(), answer())] * 2,
        tiny_models.TEMPLATE.replace("{% for", "{% if tools is not none %}Tools.{% endif %}{% for", 1),
        {},
    ),
    "calls that are null or none": (
        [talk(user(tool_calls=None), answer(tool_calls=[]))],
        [talk(user(), answer())],
        TOOLS.replace("message.tool_calls or []", "message.tool_calls"),
        {},
    ),
    "content that is null beside a call": (
        [talk(user(), answer(None, tool_calls=[call("add", a=1)]))],
        [talk(user(), answer("", tool_calls=[call("add", a=1)]))],
        TOOLS,
        {},
    ),
    "padding on the right": (
        [{"input_ids": [*IDS, *[PAD] * k], "attention_mask": [1] * N + [0] * k} for k in (43, 0)],
        ALONE,
        None,
        {},
    ),
    "padding on the left": (
        [{"input_ids": [PAD] * k + IDS, "attention_mask": [0] * k + [1] * N} for k in (43, 0)],
        ALONE,
        None,
        {},
    ),
    "padding under labels": (
        [{"input_ids": [*IDS, PAD], "attention_mask": [1] * N + [0], "labels": [-100, *IDS[1:], PAD]}],
        [{"input_ids": IDS, "labels": [-100, *IDS[1:]]}],
        None,
        {},
    ),
    "padding under a mask of the completion": (
        [{"input_ids": [*IDS, PAD], "attention_mask": [True] * N + [False], "completion_mask": [0] + [1] * N}],
        [{"input_ids": IDS, "completion_mask": [0] + [1] * (N - 1)}],
        None,
        {"completion_only_loss": True},
    ),
    "padding, packed": (
        [{"input_ids": [*IDS, *[PAD] * k], "attention_mask": [1] * N + [0] * k} for k in (43, 0)],
        ALONE,
        None,
        {"packing": True, "max_length": 30},
    ),
}


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", SAME)
def test_trains_what_is_meant(case, streamed, prepared):
    odd, plain, template, settings = SAME[case]
    data = Dataset.from_list(odd)
    ours = prepared(data.to_iterable_dataset() if streamed else data, template, **settings)
    assert ours == prepared(plain, template, **settings)
    assert any(label != -100 for row in ours for label in row["labels"])


def test_columns_lose_the_padding_with_their_tokens(model, tmp_path):
    padded = {"input_ids": [PAD, *IDS], "attention_mask": [0] + [1] * N, "weight": [9.0, *range(N)]}
    kept = trainer_of(model, tmp_path, [padded] * 2, target="iw-sft").train_dataset[0]
    assert kept["weight"] == [*range(N)]


# -- tools ---------------------------------------------------------------------------------------------------------

TOOL_ROWS = [
    talk(user(), answer(None, tool_calls=[call("add", city="Rome")]), tools=[tool("add", city="string")]),
    talk(user(), answer(None, tool_calls=[call("at", zone=2, day=None)]), tools=[tool("at", zone="integer")]),
    talk(user(), answer()),
]


def test_tools_and_calls_of_other_rows_leave_no_null(prepared):
    together = prepared(TOOL_ROWS, TOOLS)
    assert together == [prepared([row], TOOLS)[0] for row in TOOL_ROWS]
    texts = [tiny_models.tokenizer().decode(row["input_ids"]) for row in together]
    assert "null" not in "".join(texts) and '{"zone": 2}' in texts[1]


def test_nulls_that_json_keeps_are_the_user_s(prepared, tmp_path):
    """A file whose rows differ is read as JSON, which holds no null but those that were written."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TOOL_ROWS))
    data = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    texts = [tiny_models.tokenizer().decode(row["input_ids"]) for row in prepared(data, TOOLS)]
    assert '"day": null' in texts[1] and "null" not in texts[0] + texts[2]


def test_text_beside_parts_in_a_file_may_be_a_number(prepared, tmp_path):
    """A column of texts and parts is kept as JSON, which gives back "7" as 7."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(talk(user([text_part("3 + 4?")]), answer("7"))) + "\n")
    how = {"data_files": str(path), "split": "train", "cache_dir": str(tmp_path / "cache")}
    for streaming in (False, True):
        read = prepared(load_dataset("json", streaming=streaming, **how))
        assert read == prepared([talk(user("3 + 4?"), answer("7"))])


def test_tools_as_text_are_those(prepared):
    as_text = [{**row, "tools": json.dumps(row.get("tools"))} for row in TOOL_ROWS]
    assert prepared(as_text, TOOLS) == prepared(TOOL_ROWS, TOOLS)


@pytest.mark.parametrize(
    "case", ["content in parts", "conversations", "a prompt beside messages", "a prompt beside text"]
)
def test_a_teacher_with_more_to_read_reads_them_too(case):
    """Its prompt is made of the row as the student's is."""
    odd, plain, template, _ = SAME[case]
    tokenizer = tokenizer_with_template(template)
    context = Context({"prompt": "Mind the sum."}, tokenizer)
    labels = [-100] * (N - 1) + IDS[-1:]
    assert context.of(odd[0], IDS, labels) == context.of(plain[0], IDS, labels)


# -- what is odd is logged -----------------------------------------------------------------------------------------

# Writes the thinking of the last turn alone, and none that stands in content, as Qwen3's does.
THINKS_LAST = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("rows", "template", "says"),
    [
        (
            [
                talk(user(), answer()),
                *[{"conversations": None, **talk({"role": "human", "content": "a"}, answer())}] * 2,
            ],
            None,
            ["2 of 3 rows of the train dataset, row 1 first: role 'human' is read as 'user'"],
        ),
        (
            [talk(user(), answer()), talk(user(), answer("So.", tool_calls=[call("add", a=1)]))],
            None,
            ["1 of 2 rows of the train dataset, row 1 first: the chat template leaves out tool_calls"],
        ),
        (
            [talk(user(), answer(), tools=[tool("add", a="integer")])] * 2,
            None,
            ["2 of 2 rows of the train dataset, row 0 first: the chat template leaves out tools"],
        ),
        (
            [talk(user(), answer(reasoning_content="Hm."))],
            None,
            ["the chat template leaves out reasoning_content"],
        ),
        (
            [talk(user(), answer(reasoning_content="Hm."), user("a"), answer("So.", reasoning_content="Hm."))],
            THINKS_LAST,
            ["row 0 first: the chat template leaves out reasoning_content of earlier turns"],
        ),
        ([talk(user(), answer(reasoning_content="Hm."))], THINKS_LAST, []),
        (
            [talk(user(), answer("<think>\nHm.\n</think>\nSo."))],
            THINKS_LAST,
            ["row 0 first: the chat template leaves out <think> parts of content"],
        ),
        ([talk(user(), answer("<think>\n\n</think>\nSo."))], THINKS_LAST, []),
        ([talk(user(), answer("<think>\nHm.\n</think>\nSo."))], None, []),
        (
            [talk(user(), {"role": "tool", "content": "seven"}, answer())],
            "{% for m in messages if m.role != 'tool' %}"
            + tiny_models.TEMPLATE.split("%}", 1)[1].replace("message", "m"),
            ["row 0 first: the chat template leaves out messages of role 'tool'"],
        ),
        (
            [talk({"role": "system", "content": "Count."}, user(), answer())],
            "{% for m in messages if m.role != 'system' %}"
            + tiny_models.TEMPLATE.split("%}", 1)[1].replace("message", "m"),
            ["row 0 first: the chat template leaves out messages of role 'system'"],
        ),
        ([talk({"role": "system", "content": 'Say "hm"\n'}, user(), answer())], None, []),
        ([talk(user(), answer(), system="Count.")], None, ["row 0 first: column system is not read"]),
        ([talk(user(), answer(weight=0))], None, ["row 0 first: weight of a message is not read"]),
        (
            [
                talk(user(), answer(tool_calls=[{"function": {"name": "add", "arguments": '{"a": "ä"}'}}])),
                talk(user(), answer()),
            ],
            TOOLS,
            ["1 of 2 rows of the train dataset, row 0 first: arguments of a tool call are text"],
        ),
        (TOOL_ROWS, TOOLS, []),
        ([talk(user(), {"role": "tool", "content": "7"}, answer())], None, []),
    ],
    ids=[
        "roles",
        "calls",
        "tools",
        "reasoning",
        "earlier-reasoning",
        "last-reasoning",
        "thinking-in-content",
        "no-thinking-in-content",
        "written-thinking",
        "role",
        "system",
        "written-system",
        "system-column",
        "weight",
        "quoted-arguments",
        "all-written",
        "tool",
    ],
)
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_what_is_odd_is_logged_once_with_its_row(rows, template, says, streamed, prepared, caplog):
    data = Dataset.from_list(rows)
    with caplog.at_level(logging.WARNING, logger="qtarget"):
        prepared(data.to_iterable_dataset() if streamed else data, template)
    said = [message for message in caplog.messages if "first:" in message]
    if streamed:
        assert bool(said) == bool(says)
        return
    assert len(said) == len(says)
    assert all(any(part in message for message in said) for part in says), said


def test_a_row_without_an_assistant_is_dropped_and_counted(model, tmp_path, prepared):
    rows, settings = [talk(user(), answer()), talk(user()), talk(user(), answer("2"))], ASSISTANT
    made = trainer_of(model, tmp_path, rows, tiny_models.MARKED_TEMPLATE, **settings)
    assert rows_of(made.train_dataset) == prepared([rows[0], rows[2]], tiny_models.MARKED_TEMPLATE, **settings)
    assert made.rows.without_labels == {"train": 1}


# -- faults have one sentence, wherever they are met ---------------------------------------------------------------

RAISES = tiny_models.TEMPLATE + "{% for m in messages %}{{ 1 // (m.content | length - 3) }}{% endfor %}"
BAD = [talk(user(), answer())] * 5 + [talk(user("abc"), answer())] + [talk(user(), answer())] * 2
SENTENCE = "row 5 of the train dataset: the chat template cannot be applied: ZeroDivisionError"
WAYS: dict[str, dict[str, Any]] = {
    "map": {},
    "two workers of map": {"dataset_num_proc": 2},
    "packing": {"packing": True},
    "stream": {"streamed": True},
    "packed stream": {"streamed": True, "packing": True},
    "stream in a worker": {"streamed": True, "dataloader_num_workers": 1},
}


@pytest.mark.parametrize("way", WAYS)
def test_one_sentence_names_the_row(way, model, tmp_path):
    settings = dict(WAYS[way])
    data = Dataset.from_list(BAD)
    data = data.to_iterable_dataset() if settings.pop("streamed", False) else data
    with pytest.raises(DataError) as raised:
        trainer_of(model, tmp_path, data, RAISES, max_steps=2, **settings).train()
    (fault,) = raised.value.faults
    assert fault.startswith(SENTENCE) and "\n" not in fault and "chat_template_path" in fault


@pytest.mark.parametrize(
    "broken",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[9].content.x }}",
        "{{ messages[0].content.index('q') }}",
        "{{ '%(x)s' | format(y=1) }}",
        "{% for m in 5 %}{% endfor %}",
    ],
)
def test_whatever_a_template_raises_is_a_sentence(broken, prepared):
    with pytest.raises(DataError, match=r"^row 0 of the train dataset: the chat template"):
        prepared([talk(user("hm"), answer())], tiny_models.TEMPLATE + broken)


def test_half_a_character_is_named(prepared):
    from datasets import IterableDataset

    def rows():
        yield {"text": "Tom has 3 apples."}
        yield {"text": "half \ud83d"}

    with pytest.raises(DataError, match=r"^row 1 of the train dataset: it holds half a character, '\\ud83d'"):
        prepared(IterableDataset.from_generator(rows))


@pytest.mark.full
def test_two_processes_say_what_one_says(tmp_path):
    """Rank 0 prepares the rows first, and says the sentence once."""
    root = tmp_path / "world"
    root.mkdir()
    teacher_caches.write_world(root)
    settings = yaml.safe_load((root / "config.yaml").read_text())
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in [talk(user(), answer()), talk(user([5]), answer())]))
    template = tmp_path / "template.jinja"
    template.write_text(tiny_models.TEMPLATE)
    settings |= quick_settings(tmp_path / "run", dataset_name=str(rows), target="sft", chat_template_path=str(template))
    settings |= {"teacher_model_name_or_path": None, "dataset_test_split": "none"}
    config = tmp_path / "own.yaml"
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "qtarget"]
    done = subprocess.run(
        [*command, "train", "--config", str(config)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("qtarget train: ")]
    assert done.returncode != 0
    (sentence,) = said
    assert sentence.startswith(
        "qtarget train: row 1 of the train dataset: message 0 of messages: part 0 of content is 5;"
    )


@pytest.mark.parametrize("field", ["text", "words"])
def test_a_formatting_function_makes_the_text_whatever_else_a_row_holds(field, model, tmp_path, prepared):
    """TRL calls it, and trains prompt and completion, or messages, where the row has them."""
    rows = [{"prompt": "3 + 4?", "completion": "7", **talk(user(), answer()), field: "Ann"}]
    settings = PADDED | {"completion_only_loss": False, "dataset_text_field": field}
    made = QTargetTrainer(
        model,
        quick_config(tmp_path, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer_with_template(None),
        formatting_func=lambda row: f"Q: {row['prompt']} A: {row['completion']}",
    )
    assert rows_of(made.train_dataset) == prepared([{"text": "Q: 3 + 4? A: 7"}])


# -- labels and tokens ---------------------------------------------------------------------------------------------


def test_labels_of_another_length_reach_no_loss(model, tmp_path):
    made = trainer_of(model, tmp_path, [{"input_ids": IDS, "labels": IDS}] * 2)
    inputs = made.data_collator([made.train_dataset[0]])
    with pytest.raises(DataError, match=r"labels of a batch have the shape \[1, 8\] for input_ids of \[1, 9\]"):
        made.compute_loss(made.model, {**inputs, "labels": inputs["labels"][:, 1:]})
    rows = [{"input_ids": IDS[:length], "labels": IDS[: 9 - length]} for length in (5, 4)]
    with pytest.raises(DataError, match="a row has 4 labels for 5 input_ids"):
        made.data_collator(rows)
    ids = torch.tensor([IDS])
    with pytest.raises(DataError, match=r"8 labels a row and 9 tokens, 0 of them virtual"):
        CausalLM(made.model, made.vocab_size).label_log_p({"input_ids": ids}, ids[:, 1:])
