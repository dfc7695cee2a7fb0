"""Write data of other columns as rows that qtarget trains.

python examples/data/to_rows.py alpaca my_alpaca.json my_folder
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import load_dataset


def say(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def alpaca(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """instruction, input (often empty), output"""
    asked = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    yield {"prompt": [say("user", asked)], "completion": [say("assistant", row["output"])]}


def pair(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A question and its answer, both text, by any of their usual names"""
    asked = next(row[name] for name in ("prompt", "question", "query") if name in row)
    answer = next(row[name] for name in ("response", "answer", "completion") if name in row)
    yield {"prompt": [say("user", asked)], "completion": [say("assistant", answer)]}


def chosen(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A preference set's better answer: text, or messages, with or without the prompt in them"""
    answer, prompt = row["chosen"], row.get("prompt")
    messages = [say("assistant", answer)] if isinstance(answer, str) else answer
    if messages[0]["role"] == "assistant":
        messages = ([say("user", prompt)] if isinstance(prompt, str) else prompt) + messages
    yield {"prompt": messages[:-1], "completion": messages[-1:]}


def sharegpt(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """conversations of from and value, beside columns system and tools; calls have the role function_call"""
    messages = [say("system", row["system"])] if row.get("system") else []
    for turn in row["conversations"]:
        if turn["from"] == "function_call":
            call = {"type": "function", "function": json.loads(turn["value"])}
            messages.append({"role": "assistant", "tool_calls": [call]})
        else:
            messages.append(say(turn["from"], turn["value"]))
    yield {"messages": messages, "tools": row.get("tools") or None}


def plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message without nulls, and with the arguments of its calls as mappings: OpenAI's are text"""
    message = {name: value for name, value in message.items() if value is not None}
    for call in message.get("tool_calls", ()):
        if isinstance(call["function"]["arguments"], str):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return message


def openai(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """messages as OpenAI's interface has them, and tools"""
    yield {**row, "messages": [plain(message) for message in row["messages"]]}


def turns(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """messages: a row for each answer, with all that was said before it as its prompt; other columns stay"""
    messages = [plain(message) for message in row.pop("messages")]
    for place, message in enumerate(messages):
        if place and message["role"] == "assistant":
            yield {**row, "prompt": messages[:place], "completion": [message]}


def last_turn(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """messages: a row for the last answer alone"""
    yield from list(turns(row))[-1:]


SHAPES = {shape.__name__: shape for shape in (alpaca, pair, chosen, sharegpt, openai, turns, last_turn)}
FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("shape", choices=SHAPES, help="what the rows are")
    parser.add_argument("source", help="a .json, .jsonl, .csv or .parquet file, or a hub name")
    parser.add_argument("folder", type=Path, help="where train.jsonl is written")
    args = parser.parse_args()

    shape, kind = SHAPES[args.shape], FILES.get(Path(args.source).suffix)
    how = {"path": kind, "data_files": args.source} if kind else {"path": args.source}
    rows = load_dataset(**how, split="train")
    args.folder.mkdir(parents=True, exist_ok=True)
    with (args.folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            for made in shape(row):
                file.write(json.dumps(made, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
