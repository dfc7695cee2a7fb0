"""Evaluation: tasks of one's own, folders of results, comparisons."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_models import cut, without, write
from bench import PROBLEMS, Bench, Case

SAMPLES, ASKED = "samples/sums.jsonl", "problems/sums.jsonl"


def asked(id: str, wrong: str, words: list[object], *says: str) -> Case:
    """``qtarget eval`` of the world's model with these words, the last of a name winning."""

    def do(bench: Bench) -> list[object]:
        own = ["eval", "--model", bench.world / "model", "--tasks", bench.world / "sums.jsonl", "--verifier", "choice"]
        words_ = [bench.world / word[1:] if str(word).startswith("@") else word for word in words]
        return [*own, "--n", 1, "--max_new_tokens", 2, "-o", bench.folder / "r", *words_]

    return Case(id, wrong, do, says)


def task(id: str, wrong: str, content: str | bytes, *says: str, verifier: str = "math", name: str = "t.jsonl") -> Case:
    """A task file of one's own."""

    def do(bench: Bench) -> list[object]:
        file = bench.file(name, content)
        own = ["eval", "--model", bench.world / "model", "--tasks", file, "--verifier", verifier, "--n", 0]
        return [*own, "--max_new_tokens", 2, "-o", bench.folder / "r"]

    return Case(id, wrong, do, says)


def row(**values: Any) -> str:
    return json.dumps({"prompt": "1 + 1?", "answer": "2"} | values) + "\n"


def manifest(**values: Any) -> Callable[[Path], None]:
    """Parts of eval.json changed; ``...`` takes a part out."""

    def damage(folder: Path) -> None:
        held = json.loads((folder / "eval.json").read_text()) | values
        (folder / "eval.json").write_text(json.dumps({k: v for k, v in held.items() if v is not ...}))

    return damage


def renamed_task(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        held = json.loads((folder / "eval.json").read_text())
        held["tasks"] = {name: held["tasks"]["sums"]}
        (folder / "eval.json").write_text(json.dumps(held))

    return damage


def about(**values: Any) -> Callable[[Path], None]:
    """What eval.json says of the task changed; ``...`` takes a part out."""

    def damage(folder: Path) -> None:
        held = json.loads((folder / "eval.json").read_text())
        told = held["tasks"]["sums"] | values
        held["tasks"]["sums"] = {k: v for k, v in told.items() if v is not ...}
        (folder / "eval.json").write_text(json.dumps(held))

    return damage


def lines(file: str, change: Callable[[list[dict[str, Any]]], list[Any]]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        held = [json.loads(line) for line in (folder / file).read_text().splitlines()]
        (folder / file).write_text("".join(json.dumps(line) + "\n" for line in change(held)))

    return damage


def every(**values: Any) -> Callable[[list[dict[str, Any]]], list[Any]]:
    return lambda held: [{k: v for k, v in (one | values).items() if v is not ...} for one in held]


def compared(id: str, wrong: str, damage: Any, *says: str) -> Case:
    """The world's results, damaged, beside themselves."""

    def do(bench: Bench) -> list[object]:
        folder = bench.copy("results")
        damage(folder)
        return ["compare", f"a={bench.world / 'results'}", f"b={folder}", "--bootstrap", 200]

    return Case(id, wrong, do, says)


def rescored(id: str, wrong: str, damage: Any, *says: str) -> Case:
    def do(bench: Bench) -> list[object]:
        folder = bench.copy("results")
        damage(folder)
        return ["eval", "--rescore", folder, "--verifier_processes", 1]

    return Case(id, wrong, do, says)


def gone_on(id: str, wrong: str, damage: Any, *says: str) -> Case:
    """The world's results, unfinished and damaged, gone on with."""

    def do(bench: Bench) -> list[object]:
        folder = bench.copy("results")
        manifest(finished=False)(folder)
        damage(folder)
        own = ["eval", "--model", bench.world / "model", "--tasks", bench.world / "sums.jsonl", "--verifier", "choice"]
        return [*own, "--n", 2, "--max_new_tokens", 4, "--verifier_processes", 1, "-o", folder]

    return Case(id, wrong, do, says)


def arms(id: str, wrong: str, words: list[str], *says: str) -> Case:
    return Case(id, wrong, lambda b: ["compare", *(word.replace("ROOT", str(b.world)) for word in words)], says)


A = "a=ROOT/results"
CASES = [
    # what is asked
    asked("a-word-for-a-server", "no address", ["--server", "there"], "server is 'there'", "http://localhost:8000"),
    asked(
        "a-key-in-the-address",
        "a secret that would be shown",
        ["--server", "http://me:secret@localhost:8000"],
        "server holds a user name or a query; give only the address",
    ),
    asked(
        "a-served-name-without-a-server",
        "half of two options",
        ["--server_model", "m"],
        "server_model is 'm' without a server; name it as --server URL",
    ),
    asked(
        "a-precision-for-a-server",
        "it has loaded the model already",
        ["--server", "http://127.0.0.1:9", "--dtype", "bfloat16"],
        "dtype is 'bfloat16', but the server has already loaded the model; pass --dtype to vLLM",
    ),
    asked("no-model", "no such model", ["--model", "no/where/here"], "model is 'no/where/here'", "cannot be loaded"),
    asked("no-task", "no such task", ["--tasks", "chain_sums"], "task is 'chain_sums'; did you mean 'chain_sum'?"),
    asked("no-task-file", "no such file", ["--tasks", "nowhere.jsonl"], "task is 'nowhere.jsonl', which is not a file"),
    asked("nothing-asked", "no task", ["--tasks", ","], "tasks is not set"),
    asked("a-task-twice", "the same twice", ["--tasks", "chain_sum,chain_sum"], "tasks names 'chain_sum' twice"),
    asked("fewer-than-no-samples", "-1 samples", ["--n", "-1"], "n is -1; use a whole number from 0"),
    asked("samples-in-words", "a word", ["--n", "some"], "n is 'some'; use a whole number from 0"),
    asked("cold", "temperature 0", ["--temperature", "0"], "temperature is 0; the greedy answer is always included"),
    asked("a-nan-temperature", "NaN", ["--temperature", "nan"], "temperature is nan; use a number"),
    asked("an-infinite-temperature", "infinity", ["--temperature", "inf"], "temperature is inf; use a finite number"),
    asked("top-p-of-two", "more than all", ["--top_p", "2"], "top_p is 2; use a number above 0 to 1"),
    asked(
        "no-new-token",
        "answers of 0 tokens",
        ["--max_new_tokens", "0"],
        "max_new_tokens is 0; use a whole number from 1",
    ),
    asked(
        "longer-than-the-model",
        "more tokens than positions",
        ["--max_new_tokens", "9999"],
        "max_new_tokens is 9999",
        "the model has 256 positions; use",
    ),
    asked(
        "no-batch", "0 answers generated at once", ["--batch_size", "0"], "batch_size is 0; use a whole number from 1"
    ),
    asked("no-time", "0 seconds", ["--verifier_timeout", "0"], "verifier_timeout is 0; use a number above 0"),
    asked("an-unknown-prompt", "no such style", ["--prompt", "chatt"], "prompt is 'chatt'; did you mean 'chat'?"),
    asked("an-unknown-dtype", "no such precision", ["--dtype", "int4"], "dtype is 'int4'"),
    asked("an-unknown-option", "a typo", ["--top-k", "5"], "option of eval is '--top_k'"),
    asked(
        "an-unknown-verifier", "no such verifier", ["--verifier", "maths"], "verifier is 'maths'; did you mean 'math'?"
    ),
    asked(
        "a-verifier-that-is-not-there",
        "no such module",
        ["--verifier", "nowhere:mine"],
        "verifier is 'nowhere:mine', but importing nowhere failed",
    ),
    asked(
        "a-folder-of-something-else",
        "other files are there",
        ["-o", "@model"],
        "output is",
        "not an empty folder; name another folder",
    ),
    asked(
        "results-of-something-else",
        "results of other settings are there",
        ["-o", "@results"],
        "output is",
        "which holds a run with n 2, and this one has 1",
    ),
    # task files
    task("an-empty-task", "an empty file", "", "which has no problem; give it one row or more"),
    task("a-broken-line", "half a line", '{"prompt": "a"', "line 1, is not JSON", "fix or delete that line"),
    task(
        "half-an-emoji", "a lone surrogate", row(prompt="caf\ud83d?"), "line 1, holds half a character (\\ud83d", "fix"
    ),
    task(
        "half-an-emoji-in-a-message",
        "a lone surrogate",
        row() + row(prompt=[{"role": "user", "content": "\ude00"}]),
        "line 2, holds half a character (\\ude00",
    ),
    task("a-deep-line", "a hundred thousand brackets", "[" * 100_000, "line 1, is not JSON"),
    task("a-list-a-line", "a list", "[1]\n", "line 1, has no 'prompt'"),
    task("no-answer", "no answer", '{"prompt": "a"}\n', "line 1, has no 'answer'"),
    task(
        "an-empty-prompt", "an empty prompt", row(prompt=""), "line 1, has the prompt ''; write a text or chat messages"
    ),
    task("a-prompt-of-numbers", "a number", row(prompt=7), "line 1, has the prompt 7; write a text or chat messages"),
    task("a-prompt-of-nonsense", "a list that is no chat", row(prompt=[1, 2]), "line 1, has the prompt [1, 2]"),
    task("an-answer-of-null", "null", row(answer=None), "line 1, has the answer None"),
    task("an-id-twice", "two problems of one id", row(id="x") + row(id="x"), "id 'x' appears twice among the problems"),
    task("latin-1", "not UTF-8", row(prompt="caf").encode()[:-3] + b'\xe9"}\n', "t.jsonl", "UTF-8"),
    task(
        "options-of-numbers",
        "a number for options",
        row(options=3, answer="A"),
        "line 1, has the answer 'A' and options 3",
        verifier="choice",
    ),
    task(
        "an-answer-not-among-options",
        "the letter of nothing",
        row(options=["a", "b"], answer="Z"),
        "line 1, has the answer 'Z' and options",
        verifier="choice",
    ),
    task(
        "a-name-with-a-star",
        "a name that is a pattern: evaluated",
        row(options=["2", "3"], answer="A"),
        verifier="choice",
        name="t[*].jsonl",
    ),
    # folders of results
    arms("one-arm", "one folder", [A], "compare has 1 result folders; name two or more"),
    arms("no-such-arm", "no such folder", [A, "b=nowhere"], "'nowhere' holds no results"),
    arms("two-of-a-name", "one name for two", [A, A], "two arms are called 'a'; write NAME=DIR"),
    arms("an-arm-of-nothing", "no folder", [A, "b="], "arm 'b' names no folder"),
    arms(
        "few-draws", "3 draws", [A, "b=ROOT/results", "--bootstrap", "3"], "bootstrap is 3; use a whole number from 100"
    ),
    arms(
        "seeds-that-differ",
        "two folders beside one",
        [A, "b=ROOT/results,ROOT/results"],
        "the arms have different numbers of training seeds",
    ),
    Case(
        "a-page-that-cannot-be-written",
        "a file in the way",
        lambda b: ["compare", f"a={b.world}/results", f"b={b.world}/results", "-o", b.file("f", "")],
        ("output is", "cannot be written"),
    ),
    compared("the-same-twice", "a good folder beside itself: no difference shown", lambda folder: None),
    compared("half-a-manifest", "half of eval.json", cut("eval.json"), "eval.json cannot be read"),
    compared(
        "a-manifest-that-is-a-list", "a list", write("eval.json", "[]"), "eval.json cannot be read", "it names no tasks"
    ),
    compared(
        "a-deep-manifest", "a hundred thousand brackets", write("eval.json", "[" * 100_000), "eval.json cannot be read"
    ),
    compared(
        "unfinished",
        "a run that was stopped",
        manifest(finished=False),
        "is unfinished; run the same qtarget eval command again",
    ),
    compared("finished-is-not-said", "no finished", manifest(finished=...), "eval.json cannot be read", "finished"),
    compared(
        "a-manifest-with-samples-in-words", "a word for n", manifest(n="two"), "eval.json cannot be read", "n is 'two'"
    ),
    compared(
        "other-settings",
        "another temperature",
        manifest(temperature=0.5),
        "temperature is 0.5 in",
        "compare runs with the same settings",
    ),
    compared("a-part-nobody-knows", "a field of somebody else's", manifest(colour=3), "cannot be read", "colour is 3"),
    compared("no-digest", "a task without a digest", about(digest=...), "eval.json cannot be read", "digest"),
    compared(
        "a-task-that-climbs",
        "a task's name that leads out of the folder",
        renamed_task("../../x"),
        "eval.json cannot be read",
        "'../../x'",
    ),
    compared("no-samples", "a file is missing", without(SAMPLES), "cannot be read", "run qtarget eval again"),
    compared("half-the-samples", "a file cut in half", cut(SAMPLES), "sums.jsonl"),
    compared(
        "a-sample-that-is-a-list",
        "a list",
        lines(SAMPLES, lambda held: [[1], *held[1:]]),
        "is damaged in line 1; delete that line",
    ),
    compared(
        "a-sample-without-a-verdict", "no strict", lines(SAMPLES, every(strict=...)), "is damaged in line 1", "strict"
    ),
    compared(
        "a-verdict-in-words",
        "a word for a verdict",
        lines(SAMPLES, every(strict="perhaps")),
        "is damaged in line 1",
        "strict",
    ),
    compared(
        "tokens-in-words", "a word for a length", lines(SAMPLES, every(tokens="many")), "is damaged in line 1", "tokens"
    ),
    compared(
        "a-nan-entropy",
        "NaN for an entropy",
        lines(SAMPLES, every(entropy=float("nan"))),
        "is damaged in line 1",
        "entropy",
    ),
    compared(
        "an-answer-missing",
        "one sample less",
        lines(SAMPLES, lambda held: held[1:]),
        "has 2 of 3 answers to problem p1",
        "its samples were changed",
    ),
    compared(
        "an-answer-twice",
        "one sample twice",
        lines(SAMPLES, lambda held: [held[1], *held[1:]]),
        "answers to problem p1",
        "its samples were changed",
    ),
    compared("no-problems", "a file is missing", without(ASKED), "cannot be read", "run qtarget eval again"),
    compared("a-problem-without-an-id", "no id", lines(ASKED, every(id=...)), "is damaged in line 1", "id"),
    rescored(
        "rescore-nothing",
        "no such folder",
        lambda folder: [file.unlink() for file in folder.glob("*.json")],
        "holds no results",
    ),
    rescored(
        "rescore-a-task-that-climbs",
        "a task's name that leads out of the folder",
        renamed_task("../../x"),
        "eval.json cannot be read",
        "'../../x'",
    ),
    rescored(
        "rescore-code-of-the-folder",
        "a verifier that the folder names: not imported",
        about(verifier="this:s"),
        "verifier is 'this:s'",
        "--verifier this:s",
    ),
    rescored(
        "rescore-an-unknown-verifier",
        "no such verifier",
        about(verifier="maths"),
        "verifier is 'maths'; did you mean 'math'?",
    ),
    rescored(
        "rescore-a-row-without-options",
        "a row that lacks what the verifier reads",
        lines(ASKED, every(row={"answer": "A"})),
        "is damaged in line 1",
        "options",
    ),
    rescored(
        "rescore-a-text-of-numbers",
        "a number for a text",
        lines(SAMPLES, every(text=5)),
        "is damaged in line 1",
        "text",
    ),
    rescored(
        "rescore-a-problem-nobody-asked",
        "a sample of another problem",
        lines(SAMPLES, every(problem="p9")),
        "problem 'p9'",
    ),
    gone_on(
        "go-on-with-a-broken-sample",
        "a line that is no JSON",
        lambda folder: (folder / SAMPLES).write_text("{\n" * 3),
        "is damaged in line 1; delete that line",
    ),
    gone_on("go-on-without-a-verdict", "no strict", lines(SAMPLES, every(strict=...)), "is damaged in line 1"),
]
assert PROBLEMS[0]["id"] == "p1"
