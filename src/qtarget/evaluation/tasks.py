"""Tasks: problems with prompts and right answers, and the grader that judges them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import ascii_uppercase as LETTERS
from typing import Any

from qtarget import extras, files
from qtarget.errors import ConfigError, DataError, StorageError, reason, unknown
from qtarget.evaluation import graders, suites

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
_INSTRUCTIONS = {
    "math": BOXED,
    "choice": "Please reason step by step, and put the letter of your final answer within \\boxed{}.",
    "reasoning_gym": "Think step by step, and give your final answer between <answer> and </answer>.",
}
_GENERATED = 100  # problems of a generated task, where no number is asked for
_SUFFIXES = (".jsonl", ".json")


@dataclass(frozen=True)
class Problem:
    """id: of what is asked, so that it does not move with the rows' order. prompt: text or chat messages. row: what the
    grader reads; all of it JSON."""

    id: str
    prompt: str | list[dict[str, Any]]
    row: dict[str, Any]


@dataclass(frozen=True)
class Task:
    """grader, version: see ``graders``. instruction: put after each question. suite: math5, med10 or None."""

    name: str
    grader: str
    version: str
    problems: list[Problem]
    instruction: str = ""
    suite: str | None = None

    @cached_property
    def digest(self) -> str:
        """Tells its problems from others."""
        asked = json.dumps([[p.id, p.prompt, p.row] for p in self.problems], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()[:16]


def load(
    names: str | Sequence[str],
    *,
    problems: int | None = None,
    task_seed: int = 0,
    verifier: str | None = None,
    instruction: str | None = None,
) -> list[Task]:
    """The tasks of ``--tasks``: reasoning-gym tasks, benchmarks, suites, or files of JSON lines, by commas.

    Args:
        problems: how many of each; of generated ones 100 without it, of others all. task_seed: of generated ones.
        verifier: the grader of files. instruction: in place of each task's own.

    Raises:
        ConfigError: unknown, empty, twice, or a file that cannot be read.
    """
    words = [word.strip() for word in (names.split(",") if isinstance(names, str) else names) if word.strip()]
    if not words:
        raise ConfigError("tasks is not set; name a reasoning-gym task, math5, med10, hle, or a file of JSON lines")
    asked: list[tuple[str, str | None]] = []
    for word in words:
        asked += [(name, word) for name in suites.SUITES[word]] if word in suites.SUITES else [(word, None)]
    known = [*suites.SUITES, *suites.BENCHMARKS, *_generated()]
    for name, _ in asked:  # before anything is downloaded
        if not name.endswith(_SUFFIXES) and name not in known:
            if not _has_generated():
                raise ConfigError(
                    f"task is {name!r}, which is none of {', '.join(known)}; the tasks of reasoning-gym, which is not "
                    f"installed, come with {extras.pip_line('eval')}"
                )
            raise unknown("task", name, known)
    tasks = {}
    for name, suite in asked:
        task = _task(name, suite, problems, task_seed, verifier, instruction)
        if task.name in tasks:
            raise ConfigError(f"tasks names {task.name!r} twice; name it once, or give the file another name")
        tasks[task.name] = task
    return [*tasks.values()]


def _has_generated() -> bool:
    return importlib.util.find_spec("reasoning_gym") is not None


def _generated() -> list[str]:
    if not _has_generated():
        return []
    from reasoning_gym.factory import DATASETS

    return [*DATASETS]


def _task(
    name: str, suite: str | None, count: int | None, task_seed: int, verifier: str | None, instruction: str | None
) -> Task:
    if name.endswith(_SUFFIXES):
        if verifier is None:
            raise ConfigError(
                f"verifier is not set, and {name} needs one; use math, choice, reasoning_gym:TASK or "
                "my_pkg.my_module:function"
            )
        grader, rows, default = verifier, _file_rows(Path(name), verifier), ""
    elif name in suites.BENCHMARKS:
        grader, rows = suites.BENCHMARKS[name].grader, suites.rows(name)
        default = _INSTRUCTIONS[grader]
    else:
        grader, rows = f"reasoning_gym:{name}", _generated_rows(name, count or _GENERATED, task_seed)
        default = _INSTRUCTIONS["reasoning_gym"]
    graders.check(grader)
    if not (problems := _problems(rows[:count])):
        raise DataError(f"task is {name!r}, which has no problem; give it one row or more")
    label = Path(name).stem if name.endswith(_SUFFIXES) else name
    own = default if instruction is None else instruction
    return Task(label, grader, graders.version(grader), problems, own, suite)


def _generated_rows(name: str, count: int, seed: int) -> list[dict[str, Any]]:
    import reasoning_gym

    try:
        dataset = reasoning_gym.create_dataset(name, size=count, seed=seed)
        return [{key: dataset[i].get(key) for key in ("question", "answer", "metadata")} for i in range(count)]
    except Exception as error:  # some tasks need a package or data of their own
        raise ConfigError(
            f"task is {name!r}, which reasoning-gym cannot make: {reason(error)}; name another one"
        ) from error


def _file_rows(file: Path, verifier: str) -> list[dict[str, Any]]:
    if not file.is_file():
        raise StorageError(
            f"task is {str(file)!r}, which is not a file; name a file of JSON lines with prompt and answer"
        )
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"task is {str(file)!r}, which cannot be read ({error}); save it as UTF-8 text") from None
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = files.loads(line)
        except ValueError as error:
            raise DataError(f"{file}, line {number}, is not JSON ({error}); fix or delete that line") from None
        if half := re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
            raise DataError(
                f"{file}, line {number}, holds half a character (\\u{ord(half[0]):04x}, a lone surrogate), which no "
                "tokenizer reads; fix or delete that line"
            )
        needed = ("prompt", "options", "answer") if verifier == "choice" else ("prompt", "answer")
        missing = [key for key in needed if not isinstance(row, dict) or key not in row]
        if missing:
            raise DataError(
                f"{file}, line {number}, has no {missing[0]!r}; each line is an object with {', '.join(needed)}"
            )
        if not _is_prompt(row["prompt"]):
            raise DataError(f"{file}, line {number}, has the prompt {row['prompt']!r}; write a text or chat messages")
        if row["answer"] is None:
            raise DataError(f"{file}, line {number}, has the answer None; write the right answer, or remove the line")
        if verifier == "choice":
            read = suites.choice_row({**row, "question": str(row["prompt"])})
            if read is None:
                raise DataError(
                    f"{file}, line {number}, has the answer {row['answer']!r} and options {row['options']!r}; write a "
                    "list of texts, and the letter of one"
                )
            row |= {"options": read["options"], "answer": read["answer"]}
        rows.append(row)
    return rows


def _is_prompt(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and m.get("content") for m in value
        )
    return isinstance(value, str) and bool(value)


def _problems(rows: list[dict[str, Any]]) -> list[Problem]:
    made: list[Problem] = []
    seen: Counter[str] = Counter()
    for raw in rows:
        row = json.loads(json.dumps(raw, default=str))  # what a file of problems will hold
        prompt = row.get("prompt", row.get("question"))
        if isinstance(row.get("options"), list) and isinstance(prompt, str):
            prompt += "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, row["options"], strict=False))
        asked = json.dumps([prompt, row.get("answer")], sort_keys=True).encode()
        name = str(row["id"]) if "id" in row else hashlib.sha256(asked).hexdigest()[:12]
        seen[name] += 1
        if seen[name] > 1:
            if "id" in row:
                raise DataError(f"id {name!r} appears twice among the problems; give each problem its own id")
            name += f"#{seen[name]}"
        made.append(Problem(name, prompt, row))
    return made


# -- prompts -------------------------------------------------------------------------------------------------------

# BLL's literal prompt, whatever the tokenizer's own template is.
_QWEN = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{question}\n"
    + BOXED
    + "<|im_end|>\n<|im_start|>assistant\n"
)


def resolved(style: str, tokenizer: Any) -> str:
    """What auto stands for."""
    return style if style != "auto" else "chat" if tokenizer.chat_template else "plain"


def prompt_ids(tokenizer: Any, style: str, problem: Problem, instruction: str) -> list[int]:
    """Token ids of what the model reads.

    Args:
        style: chat, the tokenizer's template; plain, the question and a newline; qwen-boxed, a fixed ChatML text with
            its own instruction; auto, chat where there is a template and plain elsewhere.

    Raises:
        ConfigError: a chat is asked for and cannot be made.
    """
    prompt, style = problem.prompt, resolved(style, tokenizer)
    if style == "chat":
        if not tokenizer.chat_template:
            raise ConfigError("prompt is 'chat', but the tokenizer has no chat template; use --prompt plain")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        if instruction:
            messages[-1]["content"] = f"{messages[-1]['content']}\n{instruction}"
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    elif not isinstance(prompt, str):
        raise DataError(f"prompt is {style!r}, but problem {problem.id} has chat messages; use --prompt chat")
    elif style == "plain":
        ids = tokenizer(f"{prompt}\n{instruction}\n" if instruction else prompt)["input_ids"]
    else:
        ids = tokenizer(_QWEN.replace("{question}", prompt), add_special_tokens=False)["input_ids"]
    return list(ids)


def prompts(
    tasks: Sequence[Task],
    tokenizer: Any,
    style: str,
    positions: int | None,
    max_new_tokens: int,
    has: str = "the model has {} positions",
) -> dict[tuple[str, str], list[int]]:
    """(task, problem) → token ids of its prompt.

    Args:
        positions: how many the model has; None where that is unlimited. has: says so.

    Raises:
        ConfigError: a prompt is empty or leaves no room for the answer.
    """
    ids_of = {}
    for task in tasks:
        for problem in task.problems:
            ids = prompt_ids(tokenizer, style, problem, task.instruction)
            if not ids:
                raise DataError(f"problem {problem.id} of task {task.name} has an empty prompt; remove it")
            if positions and len(ids) + max_new_tokens > positions:
                room = positions - len(ids)
                mend = f"use {room} or less" if room > 0 else "remove the problem"
                raise ConfigError(
                    f"max_new_tokens is {max_new_tokens}: the prompt of problem {problem.id} of task {task.name} has "
                    f"{len(ids)} tokens, and {has.format(positions)}; {mend}"
                )
            ids_of[task.name, problem.id] = ids
    return ids_of
