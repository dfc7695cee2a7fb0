"""The how-to pages on rows show what the program does with the very rows, recipes and templates that they print."""

from __future__ import annotations

import copy
import json
import re
import runpy
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import trl
import yaml
from jinja2 import TemplateError

import tiny_models
from qtarget.cli.__main__ import main
from qtarget.data.messages import RowReader

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "data" / "to_rows.py"
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
MARK = "<!-- held against the program by tests/docs_site/test_how_to_rows.py -->\n"
ROLES = ["system", "user", "assistant", "user", "assistant"]


def page(name: str) -> str:
    return (ROOT / "docs" / "how-to" / f"{name}.md").read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", page(name), re.S | re.M)
    return [textwrap.dedent(text) for _, text in found]


def held(name: str) -> list[str]:
    """What the page says that the program prints, its spaces made one; tables are left out."""
    shown = []
    for part in page(name).split(MARK)[1:]:
        text = part.lstrip("\n")
        if text.lstrip().startswith("|"):
            continue
        indent = len(text) - len(text.lstrip(" "))
        inside = re.match(rf"(?:(?: {{{indent}}}[^\n]*)?\n)+", text)
        assert inside is not None and indent >= 4, text[:80]
        shown.append(" ".join(inside[0].split()))
    return shown


def table(name: str, head: str) -> dict[str, list[str]]:
    """A table's rows by their first cell; ``head``: its first line."""
    lines = page(name).split(head + "\n")[1].splitlines()[1:]
    rows = [line.strip("| ").split(" | ") for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "|")]]
    return {first: rest for first, *rest in rows}


def template(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_models.llama().save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def says(model, tmp_path, capfd, caplog):
    """What a dry run prints and logs of rows with a recipe and a chat template, its spaces made one."""

    def run(rows: list[dict[str, Any]] | Path, recipe: str, chat: str | None = None, **settings: Any) -> str:
        (model / "chat_template.jinja").write_text(chat or tiny_models.TEMPLATE, encoding="utf-8")
        folder = rows if isinstance(rows, Path) else tmp_path / "rows"
        if not isinstance(rows, Path):
            folder.mkdir(exist_ok=True)
            written = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "train.jsonl").write_text(written, encoding="utf-8")
        here = {"model_name_or_path": str(model), "dataset_name": str(folder), "use_cpu": True, "report_to": "none"}
        asked = yaml.safe_load(recipe) | here | settings
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(asked), encoding="utf-8")
        capfd.readouterr()
        caplog.clear()
        main(["train", "--config", str(tmp_path / "recipe.yaml"), "--dry_run", "--show_rows", "2", "--gpus", "1"])
        return " ".join(" ".join([*capfd.readouterr(), *caplog.messages]).split())

    return run


@pytest.fixture
def to_rows(tmp_path, monkeypatch):
    """The script of the page, as it is called there."""

    def run(shape: str, rows: list[dict[str, Any]]) -> Path:
        source, folder = tmp_path / "source.jsonl", tmp_path / "my_folder"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["to_rows.py", shape, str(source), str(folder)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return folder

    return run


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]


# -- multi-turn chats --------------------------------------------------------------------------------------------


def test_multi_turn(says, tmp_path):
    name = "multi-turn"
    (row,), (recipe,), (chat,) = blocks(name, "json"), blocks(name, "yaml"), blocks(name, "jinja")
    picture, refused = held(name)
    row = json.loads(row)
    assert picture in says([row], recipe, template("qwen2_5"))
    assert "user 45 of 45" in says([row], recipe, template("qwen2_5"), assistant_only_loss=False)
    assert refused in says([row], recipe, template("llama3_1"))
    own = tmp_path / "my_template.jinja"
    own.write_text(chat, encoding="utf-8")
    said = says([row], recipe, chat_template_path=str(own))
    assert "assistant «It is 132.<|im_end|>» <|im_start|>user" in said and "assistant «66.<|im_end|>»" in said
    tokenizer = tiny_models.tokenizer()
    for prompts in (False, True):
        plain, marked = (
            tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=prompts, **how)
            for how in ({}, {"chat_template": chat})
        )
        assert plain == marked
    # Not this turn.
    line = re.search(r"`(\{%- if message.role == .*? %\})`", page(name))
    assert line is not None
    third = chat.splitlines()[2].strip()
    own.write_text(chat.replace(third, line[1]), encoding="utf-8")
    row["messages"][2]["train"] = False
    said = says([row, {"messages": row["messages"][3:]}], recipe, chat_template_path=str(own))
    assert "assistant It is 132.<|im_end|> <|im_start|>user" in said and "assistant «66.<|im_end|>»" in said
    assert "is not read" not in said
    assert "train of a message is not read" in says([row], recipe, template("qwen2_5"))
    # The end of the turn outside the block.
    own.write_text(
        chat.replace(" + '<|im_end|>' }}\n        {%- end", " }}\n        {%- end").replace(
            "{{- '\\n' }}", "{{- '<|im_end|>\\n' }}"
        ),
        encoding="utf-8",
    )
    assert "the end of turn follows it in 1 rows and is not trained" in says([row], recipe, chat_template_path=str(own))


def test_conversations_without_an_assistant(says):
    (row,), (recipe,) = blocks("multi-turn", "json"), blocks("multi-turn", "yaml")
    rows = [json.loads(row), {"messages": [{"role": "user", "content": "Hello?"}]}]
    said = says(rows, recipe, template("qwen2_5"))
    assert "in 1 of 2 rows" in said and "1 rows have no trained token and teach nothing; 1 of them are dropped" in said
    for settings in ({"packing": True}, {"max_length": None}):
        said = says(rows, recipe, template("qwen2_5"), **settings)
        assert "in 2 rows" in said and "1 of 2 rows of the train dataset have no supervised token left" in said
        assert "they teach nothing" in said


def test_marked_copies_are_those_that_trl_has():
    from trl.chat_template_utils import get_training_chat_template

    tokenizer = copy.deepcopy(tiny_models.tokenizer())
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    assert "Qwen2.5, Qwen3, Llama 3, Gemma 1 to 3, Phi-3 and others" in " ".join(page("multi-turn").split())
    for name in ("qwen2_5", "qwen3", "llama3", "gemma", "gemma3", "phi3"):
        tokenizer.chat_template = template(name)
        assert "generation" in get_training_chat_template(tokenizer)
    for name in ("llama3_1", "llama3_2", "gemma4"):
        tokenizer.chat_template = template(name)
        with pytest.raises(ValueError, match="not training-compatible"):
            get_training_chat_template(tokenizer)


# -- tool calls --------------------------------------------------------------------------------------------------


def test_tool_calls(says, to_rows):
    name = "tool-calls"
    (row,), (recipe,) = blocks(name, "json"), blocks(name, "yaml")
    by_role, end, refused = held(name)
    row = json.loads(row)
    said = says([row], recipe, template("qwen2_5"))
    assert by_role in said and end in said
    assert "not read" not in said and "leaves out" not in said
    as_text = says([{**row, "tools": json.dumps(row["tools"])}], recipe, template("qwen2_5"))
    assert by_role in as_text and end in as_text
    assert refused in says([row], recipe, template("lfm2"))
    # A result in a completion.
    pair = {"prompt": row["messages"][:1], "completion": row["messages"][1:], "tools": row["tools"]}
    shown = "<|im_end|> <|im_start|>user <tool_response> 132"
    assert f"</tool_call>{shown}" in says([pair], recipe, template("qwen2_5"), assistant_only_loss=False)
    assert "tool 0 of 38" in says([pair], recipe, template("qwen2_5"))
    said = says(to_rows("turns", [row]), recipe, template("qwen2_5"), assistant_only_loss=False)
    assert "assistant «<tool_call>" in said and "132 </tool_response><|im_end|> <|im_start|>assistant «It is" in said


# What the page calls a template → TRL's file of it; SmolLM2's writes each message as the small tokenizer's does.
FILES = {
    "Qwen2.5": "qwen2_5",
    "Qwen3": "qwen3",
    "Llama 3.1": "llama3_1",
    "Llama 3.2": "llama3_2",
    "GLM-4-MoE": "glm4moe",
    "GPT-OSS": "gptoss",
    "LFM2, its first version": "lfm2",
    "Llama 3": "llama3",
    "Phi-3": "phi3",
    "SmolLM2": None,
    "Gemma": "gemma",
    "Gemma 3": "gemma3",
}


def test_what_templates_do_with_tools():
    row = json.loads(blocks("tool-calls", "json")[0])
    checked = set()
    for names, cells in table("tool-calls", "| chat template | tools | calls | results |").items():
        for name in [names] if names in FILES else names.split(", "):
            assert wrote(row, FILES[name]) == [cell.split(",")[0] for cell in cells], name
            checked.add(name)
    assert checked == set(FILES)


def wrote(row: dict[str, Any], name: str | None) -> list[str]:
    """Whether the template writes tools, calls and results, or that it refuses the row."""
    tokenizer = copy.deepcopy(tiny_models.tokenizer())
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    chat = tokenizer.chat_template if name is None else template(name)
    messages = RowReader.of(tokenizer, chat).read(row)[0]["messages"]
    question, call = messages[:2]
    silent = {name: value for name, value in call.items() if name != "tool_calls"}

    def text(*messages: dict[str, Any], tools: Any = None) -> str:
        return tokenizer.apply_chat_template([*messages], tools=tools, tokenize=False, chat_template=chat)

    found = ["The product of" in text(question, tools=row["tools"]), text(question, call) != text(question, silent)]
    cells = ["yes" if there else "no" for there in found]
    try:
        return [*cells, "yes" if text(*messages).count("132") == 2 else "no"]  # the result, and the answer
    except TemplateError:
        return [*cells, "the row is refused"]


@pytest.mark.parametrize(
    ("name", "form", "says_so"),
    [
        ("qwen2_5", str, "the chat template puts in quotes"),
        ("llama3_1", str, "the chat template puts in quotes"),
        ("gptoss", str, "the chat template puts in quotes"),
        ("qwen3", str, "no contradictions found"),
        ("glm4moe", dict, "no contradictions found"),
        ("glm4moe", str, "the chat template cannot be applied"),
        ("deepseekv3", dict, "the chat template cannot be applied"),
    ],
)
def test_the_form_of_arguments(name, form, says_so, says, to_rows):
    row = json.loads(blocks("tool-calls", "json")[0])
    recipe = blocks("tool-calls", "yaml")[0]
    function = row["messages"][1]["tool_calls"][0]["function"]
    if form is str:
        function["arguments"] = json.dumps(function["arguments"])
    said = says([row], recipe, template(name), assistant_only_loss=False)
    assert says_so in said and ("quotes" in said) == ("quotes" in says_so)
    if "quotes" in says_so:
        (mended,) = written(to_rows("openai", [row]))
        assert mended["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 12, "b": 11}


# -- thinking ----------------------------------------------------------------------------------------------------


def test_thinking(says, to_rows, tmp_path):
    name = "thinking"
    (chat, asked), (recipe,), (lines,) = blocks(name, "json"), blocks(name, "yaml"), blocks(name, "jinja")
    second, logged, empty = held(name)
    said = says(to_rows("turns", [json.loads(chat)]), recipe, template("qwen3"))
    assert second in said and logged in said
    assert "assistant «<think> 12 * 11 is 120 + 12. </think> It is 132.<|im_end|> »" in said
    assert empty in says([json.loads(asked)], recipe, template("qwen3"))
    thinks = {name: value for name, value in json.loads(asked).items() if name != "chat_template_kwargs"}
    assert "«<think> </think> It is 132." in says([thinks], recipe, template("qwen3"))
    # Read, but not trained.
    own = tmp_path / "my_template.jinja"
    marked = blocks("multi-turn", "jinja")[0]
    own.write_text(marked.replace("        {%- generation %}", f"{lines}        {{%- generation %}}"), encoding="utf-8")
    said = says([json.loads(chat)], recipe, chat_template_path=str(own), assistant_only_loss=True)
    assert "assistant <think> 12 * 11 is 120 + 12. </think> «It is 132.<|im_end|>»" in said
    assert "leaves out" not in said


def test_what_each_form_of_thinking_trains(says):
    chat, (recipe,) = json.loads(blocks("thinking", "json")[0]), blocks("thinking", "yaml")
    rows = page("thinking").split(MARK)[3].split("\n\n")[0]
    assert "| `messages` | none | left out | written | every token |" in rows
    said = says([chat], recipe, template("qwen3"))
    assert "120 + 12" not in said and "132 / 2 is 66." in said and "whole conversations are trained" in said
    assert "| `messages` | `assistant_only_loss: true` | written | written | both answers with their thinking |" in rows
    said = says([chat], recipe, template("qwen3"), assistant_only_loss=True)
    assert "«<think> 12 * 11 is 120 + 12. </think> It is 132." in said and "«<think> 132 / 2" in said
    # In the content, and with nothing to think.
    inside = copy.deepcopy(chat)
    for message in inside["messages"][1::2]:
        message["content"] = f"<think>\n{message.pop('reasoning_content')}\n</think>\n\n{message['content']}"
    said = says([inside], recipe, template("qwen3"))
    assert "the chat template leaves out <think> parts of content" in said and "132 / 2 is 66. </think> 66." in said
    bare = [{name: message[name] for name in ("role", "content")} for message in chat["messages"]]
    said = says(
        [{"messages": bare, "chat_template_kwargs": {"enable_thinking": False}}],
        recipe,
        template("qwen3"),
        assistant_only_loss=True,
    )
    assert said.count("«<think> </think>") == 2
    # DeepSeek-R1's distilled models.
    r1 = template("deepseek_r1_distill")
    pair = {"prompt": inside["messages"][:1], "completion": inside["messages"][1:2]}
    said = says([pair], recipe, r1)
    assert "leaves out <think> parts of content" in said and "120 + 12" not in said
    assert "120 + 12" in says([inside], recipe, r1, assistant_only_loss=True)
    assert "leaves out reasoning_content" in says([chat], recipe, r1, assistant_only_loss=True)
    # Models that do not think by themselves.
    assert "leaves out reasoning_content" in says([chat], recipe, template("qwen2_5"))
    assert "assistant« <think> 12 * 11" in says([inside], recipe, template("qwen2_5"), assistant_only_loss=True)


# -- other columns -----------------------------------------------------------------------------------------------


def test_the_page_prints_the_script():
    assert blocks("other-columns", "python") == [SCRIPT.read_text(encoding="utf-8")]
    shapes = runpy.run_path(str(SCRIPT))["SHAPES"]
    assert all(f"`{shape}`" in page("other-columns") for shape in shapes)


def test_alpaca(says, to_rows):
    (recipe,) = blocks("other-columns", "yaml")
    picture, refused = held("other-columns")
    asked = re.search(r"Alpaca row `(.*?)`", page("other-columns"))
    assert asked is not None
    row = json.loads(asked[1])
    assert refused in says([row], recipe, template("qwen2_5"))
    assert picture in says(to_rows("alpaca", [row]), recipe, template("qwen2_5"))
    assert written(to_rows("alpaca", [{**row, "input": ""}]))[0]["prompt"][0]["content"] == "Add these numbers."


HI = {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello."}]}


@pytest.mark.parametrize(
    ("shape", "row"),
    [
        ("pair", {"prompt": "Hi", "response": "Hello."}),
        ("pair", {"question": "Hi", "answer": "Hello."}),
        ("pair", {"prompt": "Hi", "completion": "Hello."}),
        ("chosen", {"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}),
        ("chosen", {"prompt": HI["prompt"], "chosen": HI["completion"], "rejected": HI["prompt"]}),
        ("chosen", {"prompt": "Hi", "chosen": HI["completion"]}),
        ("chosen", {"prompt": "Hi", "chosen": HI["prompt"] + HI["completion"]}),
        ("chosen", {"chosen": HI["prompt"] + HI["completion"]}),
        ("turns", {"messages": HI["prompt"] + HI["completion"]}),
        ("last_turn", {"messages": HI["prompt"] + HI["completion"]}),
    ],
)
def test_other_shapes_become_prompt_and_completion(shape, row, says, to_rows):
    folder = to_rows(shape, [row])
    assert written(folder) == [HI]
    assert "assistant «Hello.<|im_end|> »" in says(folder, blocks("other-columns", "yaml")[0])


def test_sharegpt_with_its_columns(says, to_rows):
    call = {"name": "multiply", "arguments": {"a": 12, "b": 11}}
    said = [("human", "12 * 11?"), ("function_call", json.dumps(call)), ("observation", "132"), ("gpt", "132.")]
    turns = [{"from": role, "value": text} for role, text in said]
    other = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    rows = [
        {"system": "Be brief.", "conversations": turns, "tools": json.dumps([call])},
        {"system": "", "conversations": other, "tools": ""},
    ]
    recipe = blocks("other-columns", "yaml")[0]
    assert "role is 'function_call'" in says(rows[:1], recipe, template("qwen2_5"))
    shown = says(to_rows("sharegpt", rows), recipe, template("qwen2_5"), assistant_only_loss=True)
    assert (
        "Be brief. # Tools" in shown and '« <tool_call> {"name": "multiply", "arguments": {"a": 12, "b": 11}}' in shown
    )
    assert "<tool_response> 132 </tool_response>" in shown and "user Hi<|im_end|>" in shown


def test_turns_keep_other_columns(to_rows):
    messages = [{"role": role, "content": str(place)} for place, role in enumerate(ROLES)]
    first, second = written(to_rows("turns", [{"messages": messages, "source": "math", "weight": 0.5}]))
    assert first == {"source": "math", "weight": 0.5, "prompt": messages[:2], "completion": messages[2:3]}
    assert second == {"source": "math", "weight": 0.5, "prompt": messages[:4], "completion": messages[4:]}
    assert written(to_rows("last_turn", [{"messages": messages}])) == [
        {"prompt": messages[:4], "completion": messages[4:]}
    ]


# -- long rows ---------------------------------------------------------------------------------------------------


def long_rows() -> list[dict[str, Any]]:
    lines = tiny_models.SENTENCES
    return [
        {
            "prompt": [{"role": "user", "content": lines[i]}],
            "completion": [
                {"role": "assistant", "content": " ".join(lines[(i + j + 1) % 8] for j in range(1 + 2 * i))}
            ],
        }
        for i in range(4)
    ]


def test_what_is_cut(says):
    (recipe,), (cut,) = blocks("long-rows", "yaml"), held("long-rows")
    assert cut in says(long_rows(), recipe, template("qwen2_5"), max_length=128, packing=False)
    assert cut in says(long_rows(), recipe, template("qwen2_5"), max_length=128)
    for strategy, trained in (("bfd_split", "442 of 448"), ("wrapped", "448 of 448")):
        said = says(long_rows(), recipe, template("qwen2_5"), max_length=128, packing_strategy=strategy)
        assert f"completion {trained}" in said and "are cut at" not in said
    said = says(long_rows(), recipe, template("qwen2_5"), max_length=None, packing=False, padding_free=True)
    assert "completion 448 of 448" in said


def test_the_memory_of_long_rows(hub_configs, tmp_path, capsys):
    head = "| `max_length` | peak | engine | activations | without checkpointing | float32 logits of the row |"
    shown = table("long-rows", head)
    assert len(shown) == 3
    recipe = tmp_path / "recipe.yaml"
    figures = tmp_path / "plan.json"

    def planned(**settings: Any) -> dict[str, Any]:
        asked = yaml.safe_load(blocks("long-rows", "yaml")[0]) | {"max_steps": 1} | settings
        recipe.write_text(yaml.safe_dump(asked), encoding="utf-8")
        words = ["plan", "--config", recipe, "--gpus", 8, "--gpu_memory", 80, "--json", figures]
        assert main([*map(str, words)]) == 0, capsys.readouterr().err
        return json.loads(figures.read_text(encoding="utf-8"))["memory"]["fsdp2"]

    for length, cells in shown.items():
        tokens = int(length.replace(",", ""))
        kept, all_kept = (planned(max_length=tokens, gradient_checkpointing=on) for on in (True, False))
        parts = kept["parts"]
        numbers = [kept["most"], parts["engine"], parts["activations"], all_kept["parts"]["activations"]]
        assert cells == [f"{number / 2**30:.1f}" for number in [*numbers, 4 * tokens * 152064]]


def test_long_rows_are_left_out(tmp_path, monkeypatch):
    (code,) = blocks("long-rows", "python")
    own = copy.deepcopy(tiny_models.tokenizer())
    own.save_pretrained(tmp_path / "model")
    (tmp_path / "my_folder").mkdir()
    (tmp_path / "my_folder" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long_rows()))
    monkeypatch.chdir(tmp_path)
    lengths = [len(own.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]) for row in long_rows()]
    code = code.replace("Qwen/Qwen2.5-7B-Instruct", "model").replace("16384", str(sorted(lengths)[1]))
    exec(compile(code, "long-rows", "exec"), {})
    assert written(tmp_path / "my_short") == long_rows()[:2]
