"""Conversations: roles, content in parts, tools, template arguments, odd columns beside them."""

from __future__ import annotations

import json
from typing import Any

from bad_rows import ANSWER, GOOD, USER, case_of_rows, talk
from bench import Bench, Case

import tiny_models

TEXT, IMAGE = {"type": "text", "text": "How many?"}, {"type": "image", "url": "a.png"}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def content(id: str, wrong: str, value: Any, *says: str, **more: Any) -> Case:
    """A second row whose user says this."""
    rows = [talk(USER, GOOD["completion"][0]), talk({"role": "user", "content": value, **more}, ANSWER)]
    return case_of_rows(id, wrong, rows, "row 1 of the train dataset: message 0 of messages: ", *says)


def column(id: str, wrong: str, name: str, value: Any, *says: str, **settings: Any) -> Case:
    """Conversations, the second with this value in a column of its own."""
    rows = [talk(USER, ANSWER), {**talk(USER, ANSWER), name: value}]
    return case_of_rows(
        id, wrong, rows, *(f"row 1 of the train dataset: {name} is ", *says) if says else (), **settings
    )


def template(id: str, wrong: str, text: str, rows: list[Any], *says: str, **settings: Any) -> Case:
    """Rows under a chat template of their own."""

    def do(bench: Bench) -> list[object]:
        path = bench.file("template.jinja", text)
        return bench.train(dataset_name=bench.rows(*rows), chat_template_path=path, **settings)

    return Case(id, wrong, do, says, reads="dataset_streaming" in settings)


CASES = [
    # content
    content(
        "an-image",
        "an image among the parts",
        [TEXT, IMAGE],
        "part 1 of content is",
        "'image'",
        "write content as text",
    ),
    content("parts-of-numbers", "numbers for parts", [1, 2], "part 0 of content is 1"),
    content("parts-of-words", "texts for parts", ["How", "many?"], "part 0 of content is 'How'"),
    content(
        "a-part-without-text", "a part whose text is null", [{"type": "text", "text": None}], "part 0 of content is"
    ),
    content("a-part-of-audio", "sound among the parts", [{"type": "input_audio", "input_audio": "a"}], "'input_audio'"),
    content("no-part", "a list of no part", [], "content is []"),
    content("a-mapping", "a part that is in no list", TEXT, "content is {"),
    content("a-number", "a number for content, of a column that is JSON", 7.5, "content is 7.5; write text"),
    case_of_rows(
        "numbers",
        "numbers for content",
        [talk({"role": "user", "content": 5}, {"role": "assistant", "content": 7})] * 2,
        "row 0 of the train dataset: message 0 of messages: content is 5; write text",
    ),
    content("null", "null for content and nothing in its place", None, "content is None; write text"),
    content("null-beside-no-call", "null for content and no call", None, "content is None", tool_calls=[]),
    case_of_rows(
        "an-image-in-a-completion",
        "an image in what is trained",
        [GOOD, {**GOOD, "completion": [{"role": "assistant", "content": [IMAGE]}]}],
        "row 1 of the train dataset: message 0 of completion: part 0 of content is",
    ),
    case_of_rows(
        "a-message-of-words",
        "a text for a message",
        [{"messages": ["How many?", "7"]}],
        "row 0 of the train dataset: messages holds 'How many?'; write messages",
    ),
    case_of_rows(
        "a-message-that-is-null",
        "null for a message",
        [talk(USER, ANSWER), talk(USER, None)],
        "row 1 of the train dataset: messages holds None",
    ),
    case_of_rows(
        "messages-that-are-one",
        "a message that is in no list",
        [{"messages": USER}],
        "row 0 of the train dataset: messages is {",
    ),
    case_of_rows(
        "messages-that-are-null",
        "null for messages",
        [talk(USER, ANSWER), {"messages": None}],
        "row 1 of the train dataset: messages is None",
    ),
    case_of_rows(
        "a-prompt-of-no-message",
        "a prompt that holds no message",
        [GOOD, {**GOOD, "prompt": []}],
        "row 1 of the train dataset: prompt is []",
    ),
    case_of_rows(
        "prompt-of-messages-completion-of-text",
        "messages in the prompt and text in the completion",
        [GOOD, {**GOOD, "completion": "It is 2."}],
        "row 1 of the train dataset: prompt is [{",
        "and completion 'It is 2.'; write text in both",
    ),
    case_of_rows(
        "a-name",
        "a name beside role and content: the template does not ask for it",
        [talk({**USER, "name": "Tom"}, ANSWER)],
    ),
    # roles
    case_of_rows(
        "a-role-of-sharegpt-that-is-none",
        "a from that nobody knows",
        [{"conversations": [{"from": "narrator", "value": "Once"}, {"from": "gpt", "value": "2"}]}],
        "row 0 of the train dataset: message 0 of conversations: role is 'narrator'",
    ),
    case_of_rows(
        "a-role-that-is-a-number",
        "a number for a role",
        [talk({"role": 1, "content": "a"}, {"role": 2, "content": "b"})],
        "row 0 of the train dataset: message 0 of messages: role is 1; write user, assistant or system",
    ),
    case_of_rows(
        "no-role-in-one-message",
        "one message without a role",
        [talk(USER, ANSWER), talk(USER, {"content": "2"})],
        "row 1 of the train dataset: message 1 of messages: role is None",
    ),
    case_of_rows("an-empty-role", "a role of no letter", [talk({"role": "", "content": "a"}, ANSWER)], "role is ''"),
    # tools and calls
    column(
        "tools-of-nothing",
        "an empty text for tools",
        "tools",
        "",
        "row 1 of the train dataset: tools is '', which is no JSON",
        "or null for none",
    ),
    column(
        "tools-of-words",
        "words for tools",
        "tools",
        "add",
        "row 1 of the train dataset: tools is 'add', which is no JSON",
    ),
    column("tools-that-are-one", "a tool that is in no list", "tools", json.dumps(ADD), "write a list of tools"),
    column("tools-by-name", "names for tools", "tools", ["add"], "['add']; write a list of tools, each a mapping"),
    column("tools-of-numbers", "a number for tools", "tools", 5, "5; write a list of tools"),
    case_of_rows(
        "a-call-that-is-not-written",
        "a tool call for content under a template that leaves calls out",
        [talk(USER, ANSWER), talk(USER, {"role": "assistant", "content": None, "tool_calls": [CALL]})],
        "row 1 of the train dataset: message 1 holds tool_calls, which the chat template leaves out",
        "chat_template_path",
    ),
    case_of_rows(
        "reasoning-that-is-not-written",
        "reasoning for content under a template that leaves it out",
        [talk(USER, {"role": "assistant", "reasoning_content": "Hm."})],
        "row 0 of the train dataset: message 1 holds reasoning_content, which the chat template leaves out",
    ),
    # template arguments
    column(
        "arguments-as-text",
        "a text for template arguments",
        "chat_template_kwargs",
        "{}",
        "chat_template_kwargs is '{}'; write a mapping",
    ),
    column("arguments-as-a-list", "a list for template arguments", "chat_template_kwargs", [1], "[1]; write a mapping"),
    column("arguments-that-are-null", "null in a row: as no arguments", "chat_template_kwargs", {"a": 1}),
    case_of_rows(
        "an-argument-of-the-tokenizer-s",
        "a template argument that the tokenizer is given already",
        [talk(USER, ANSWER), {**talk(USER, ANSWER), "chat_template_kwargs": {"tokenize": False}}],
        "row 1 of the train dataset: the chat template cannot be applied",
        "'tokenize'",
    ),
    # columns beside
    column(
        "a-prompt-beside", "a prompt beside messages, as in ultrachat: the messages are trained", "prompt", "1 + 1?"
    ),
    case_of_rows(
        "a-prompt-beside-text",
        "a prompt beside text: the text is trained",
        [{"text": "Tom has 3.", "prompt": "Tom"}] * 2,
    ),
    case_of_rows(
        "a-completion-alone",
        "an answer without its prompt",
        [{"completion": "2"}],
        "has columns completion; give it one of",
    ),
    case_of_rows(
        "a-prompt-and-an-answer",
        "an answer by another name",
        [{"prompt": "1 + 1?", "answer": "2"}],
        "has columns answer, prompt; give it one of",
    ),
    # templates
    template(
        "a-template-that-refuses",
        "a template that wants user and assistant in turn",
        "{{ raise_exception('roles must alternate') if messages[1].role == 'user' }}" + tiny_models.TEMPLATE,
        [talk(USER, ANSWER), talk(USER, USER, ANSWER)],
        "row 1 of the train dataset: the chat template cannot be applied",
        "roles must alternate",
    ),
    template(
        "a-template-that-refuses-on-a-stream",
        "the same on a stream, in a worker",
        "{{ raise_exception('roles must alternate') if messages[1].role == 'user' }}" + tiny_models.TEMPLATE,
        [talk(USER, ANSWER), talk(USER, USER, ANSWER)],
        "row 1 of the train dataset: the chat template cannot be applied",
        "roles must alternate",
        dataset_streaming=True,
        dataloader_num_workers=1,
    ),
    template(
        "assistant-only-in-a-row-without-one",
        "a conversation without an answer under assistant_only_loss: dropped, and said",
        tiny_models.MARKED_TEMPLATE,
        [talk(USER, ANSWER), talk(USER)],
        assistant_only_loss=True,
    ),
    template(
        "assistant-only-in-no-row",
        "no conversation with an answer under assistant_only_loss",
        tiny_models.MARKED_TEMPLATE,
        [talk(USER), talk(USER)],
        "the train dataset has no supervised token",
        assistant_only_loss=True,
    ),
    template(
        "assistant-only-first-row-empty",
        "no message in the first row under assistant_only_loss",
        tiny_models.MARKED_TEMPLATE,
        [talk(), talk(USER, ANSWER)],
        "row 0 of the train dataset: messages is []",
        assistant_only_loss=True,
    ),
]
