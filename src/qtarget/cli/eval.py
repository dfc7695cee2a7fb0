"""``qtarget eval``: a model's answers to tasks, sampled, judged and scored."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qtarget.cli import options
from qtarget.errors import ConfigError, check_range

_HELP = """\
usage: qtarget eval --model PATH --tasks NAME,... -o DIR [options]
       qtarget eval --rescore DIR [--verifier_timeout 10]

Sample n answers to each problem and a greedy one, judge them, and score: avg@n, pass@k, maj@n, greedy, length, cut off,
without an answer, entropy. A run that was killed goes on with the same command. accelerate launch or torchrun shares
the batches among processes.

  --tasks NAME,...          any reasoning-gym task, or FILE.jsonl with prompt and answer; experimental, for never run:
                            math5, med10, hle, or one of their benchmarks
  --n 16                    samples a problem; 0 for the greedy answer alone
  --temperature 1 --top_p 1 --max_new_tokens 1024 --seed 0
  --verifier NAME           of files: math, math_verify, choice, reasoning_gym:TASK, or your own function of (text, row):
                            my_pkg.my_module:function
  --problems N              of each task; of generated ones 100 without it, of others all
  --task_seed 0             of generated problems
  --prompt auto             chat (the tokenizer's template), plain, qwen-boxed; auto is chat where there is a template
  --instruction TEXT        after each question, in place of the task's own; '' for none
  --batch_size 16           answers at once
  --dtype float32           of the weights; --revision REV, --backend transformers|vllm
  --verifier_timeout 10     seconds; a call that takes longer counts as wrong, and is counted. --verifier_processes 2
  --rescore DIR             judge the texts of a finished folder again; needs no model. A function of your own that the
                            folder names is run only with --verifier too
"""
_OPTIONS: dict[str, Any] = {
    "model": None,
    "tasks": None,
    "output": None,
    "n": 16,
    "temperature": 1.0,
    "top_p": 1.0,
    "max_new_tokens": 1024,
    "seed": 0,
    "verifier": None,
    "problems": None,
    "task_seed": 0,
    "prompt": "auto",
    "instruction": None,
    "batch_size": 16,
    "dtype": None,
    "revision": None,
    "backend": "transformers",
    "verifier_timeout": 10.0,
    "verifier_processes": 2,
    "rescore": None,
}
_DTYPES = ("float32", "bfloat16", "float16", "auto")


def run(arguments: Sequence[str]) -> int:
    words = list(arguments)
    if not words or "-h" in words or "--help" in words:
        print(_HELP, end="")
        return 0
    own, rest = options.take(words, _OPTIONS)
    if rest:
        from qtarget.errors import unknown

        raise unknown("option", rest[0].removeprefix("--").partition("=")[0], [*_OPTIONS])
    asked = _checked(own)
    if own["rescore"] is not None:
        return _rescore(Path(own["rescore"]), asked, own["verifier"])
    for name in ("model", "tasks", "output"):
        if not own[name]:
            flag = "-o DIR" if name == "output" else f"--{name} ..."
            raise ConfigError(f"{name} is not set; write {flag}")
    return _evaluate(own, asked)


def _checked(own: dict[str, Any]) -> dict[str, Any]:
    """The numbers as numbers, the names known."""
    from qtarget.errors import unknown
    from qtarget.evaluation.tasks import PROMPTS

    lows = {"n": 0, "max_new_tokens": 1, "seed": 0, "task_seed": 0, "batch_size": 1, "verifier_processes": 1}
    asked: dict[str, Any] = {name: options.whole(name, own[name], low) for name, low in lows.items()}
    asked["problems"] = None if own["problems"] is None else options.whole("problems", own["problems"], 1)
    for name in ("temperature", "top_p", "verifier_timeout"):
        asked[name] = options.number(name, own[name])
    if asked["temperature"] == 0:
        raise ConfigError("temperature is 0; the greedy answer is always there: use --n 0 for it alone")
    check_range("temperature", asked["temperature"], 0, open_low=True)
    check_range("top_p", asked["top_p"], 0, 1, open_low=True)
    check_range("verifier_timeout", asked["verifier_timeout"], 0, open_low=True)
    for name, valid in (("prompt", PROMPTS), ("backend", ("transformers", "vllm"))):
        if own[name] not in valid:
            raise unknown(name, own[name], valid)
    if own["dtype"] is not None and own["dtype"] not in _DTYPES:
        raise unknown("dtype", own["dtype"], _DTYPES)
    return asked


def _evaluate(own: dict[str, Any], asked: dict[str, Any]) -> int:
    from qtarget.evaluation import records, running, sampling, sampling_vllm, tasks

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if own["backend"] == "vllm":
        sampling_vllm.check()
        if world > 1:
            raise ConfigError("backend is 'vllm', which shares its work by itself; start one process")
    made = tasks.load(
        own["tasks"],
        problems=asked["problems"],
        task_seed=asked["task_seed"],
        verifier=own["verifier"],
        instruction=own["instruction"],
    )
    tokenizer = sampling.load_tokenizer(own["model"], own["revision"])
    positions = sampling.positions(own["model"], own["revision"])
    prompts = tasks.prompts(made, tokenizer, own["prompt"], positions, asked["max_new_tokens"])
    folder = Path(own["output"])
    settings = _settings(own, asked) | {"prompt_style": tasks.resolved(own["prompt"], tokenizer)}
    manifest = records.describe(settings, made)
    if records.begin(folder, manifest, made, writes=rank == 0):
        if rank == 0:
            print(f"{folder} is finished; its scores again:")
            _tell(running.score(folder, {task.name: task.suite for task in made}, asked["n"]), None)
        return 0
    work = running.Run(
        made,
        folder,
        n=asked["n"],
        seed=asked["seed"],
        prompts=prompts,
        batch_size=asked["batch_size"],
        timeout=asked["verifier_timeout"],
        processes=asked["verifier_processes"],
        rank=rank,
        world=world,
    )
    batches = work.batches()
    share = sum(len(batch) for _, batch in batches)
    if rank == 0:
        problems = sum(len(task.problems) for task in made)
        print(
            f"{len(made)} tasks, {problems} problems, {problems * (asked['n'] + 1)} answers of up to "
            f"{asked['max_new_tokens']} tokens, {work.missing()} to do",
            flush=True,
        )
    if batches:
        common = {name: asked[name] for name in ("max_new_tokens", "temperature", "top_p")}
        if own["backend"] == "vllm":
            sampler: Any = sampling_vllm.VllmSampler(own["model"], own["revision"], own["dtype"], **common)
        else:
            sampler = sampling.Sampler(own["model"], own["revision"], own["dtype"], device=_device(), **common)
        work.sample(sampler, _telling(share) if rank == 0 else lambda done: None)
    if rank > 0:
        return 0
    work.wait()
    _tell(work.finish(), work.last_error)
    print(f"results    {folder}")
    print(f"next       qtarget compare {folder} OTHER_DIR")
    return 0


def _settings(own: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """What the samples depend on, in the order in which a difference is named."""
    from qtarget.teachers.fingerprints import named

    numbers = {name: asked[name] for name in ("n", "temperature", "top_p", "max_new_tokens", "seed")}
    names = {name: own[name] for name in ("prompt", "backend", "dtype")}
    return {"model": named(own["model"], own["revision"]), **numbers, **names, "batch_size": asked["batch_size"]}


def _device() -> Any:
    import torch

    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else None


def _rescore(folder: Path, asked: dict[str, Any], verifier: str | None) -> int:
    from qtarget.evaluation import running

    manifest = running.finished(folder)
    total = sum(about["problems"] for about in manifest["tasks"].values()) * (manifest["n"] + 1)
    timeout, processes = asked["verifier_timeout"], asked["verifier_processes"]
    made, changed = running.rescore(folder, timeout, processes, _telling(total), verifier)
    _tell(made, None)
    print(f"verdicts   {changed} changed of {total}")
    return 0


def _telling(total: int) -> Callable[[int], None]:
    """A bar with the time left on a terminal; elsewhere an estimate after the first batch."""
    from qtarget.cli.data import bar, duration

    advance, started, told = bar(total, "answers"), time.monotonic(), False
    advance(0)

    def step(done: int) -> None:
        nonlocal told
        if not told and not sys.stderr.isatty() and done < total:
            left = (time.monotonic() - started) * (total - done) / done
            print(f"about {duration(left)} for the other {total - done} answers, by the first {done}", flush=True)
        told = True
        advance(done)

    return step


def _tell(scores: dict[str, Any], last_error: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("task", "score", "avg@n", "95 %", "pass@n", "maj@n", "greedy", "no answer"):
        table.add_column(column, justify="left" if column in ("task", "score") else "right", no_wrap=True)
    for name, task in scores["tasks"].items():
        for reading in ("strict", "lenient"):
            part = task[reading]
            table.add_row(
                name if reading == "strict" else "",
                reading,
                percent(part.get("avg")),
                span(part.get("interval")),
                percent(part["pass"][-1] if "pass" in part else None),
                percent(part.get("majority")),
                percent(part["greedy"]),
                percent(part["no_answer"]),
            )
    for name, suite in scores["suites"].items():
        for reading in ("strict", "lenient"):
            part = suite[reading]
            row = (percent(part.get("avg")), span(part.get("interval")), "", "", percent(part["greedy"]), "")
            table.add_row(f"{name} mean" if reading == "strict" else "", reading, *row)
    Console(width=120 if not sys.stdout.isatty() else None).print(table)
    for name, task in scores["tasks"].items():
        entropy = "" if task["entropy"] is None else f", entropy {task['entropy']:.3f} nats a token"
        print(
            f"{name}: {task['problems']} problems, n = {task['n']}, {task['mean_tokens']:.1f} tokens an answer, "
            f"{task['truncated']:.1%} cut off, {task['empty']:.1%} empty{entropy}"
        )
        if task["timeouts"] or task["errors"]:
            why = f", the last time with: {last_error}" if last_error else ""
            print(f"{name}: the verifier took too long {task['timeouts']} times, failed {task['errors']} times{why}")


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def span(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"
