"""``qtarget eval``: samples a model's answers to tasks, grades and scores them.

n samples of each problem and a greedy answer give avg@n, pass@k, maj@n, the greedy score, mean length, entropy, and the
shares of answers cut off and without an answer. A killed run resumes with the same command. accelerate launch or
torchrun splits the batches among processes. Evaluate a model with --model, --tasks and -o; grade a finished folder
again with --rescore.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from qtarget.cli import terminal
from qtarget.cli.arguments import ABOVE_ZERO, FOLDER, NAME, TEXT, Option, Verb, number, one_of, whole
from qtarget.errors import ConfigError, check_range

VERB = Verb("eval", __doc__)
_PROMPTS, _DTYPES = ("auto", "chat", "plain", "qwen-boxed"), ("float32", "bfloat16", "float16", "auto")


@VERB.command(
    Option("model", "a folder or hub id; with --server only its tokenizer is read; unset: the served folder's", NAME),
    Option("server", "URL of a vLLM server with the model, used instead of loading it", NAME),
    Option("server_model", "what the server calls the model; unset: the only one it serves", NAME),
    Option("server_timeout", "seconds to wait for an answer from the server", ABOVE_ZERO, 600.0),
    Option(
        "tasks",
        "reasoning-gym tasks or FILE.jsonl, separated by commas; experimental, never run: math5, med10, hle, their "
        "parts",
        NAME,
    ),
    Option("output", "folder of the results", FOLDER),
    Option("n", "samples per problem; 0: the greedy answer only", whole(0), 16),
    Option("temperature", "sampling temperature", number(), 1.0),
    Option("top_p", "top-p of the sampling", number(0, 1, open_low=True), 1.0),
    Option("max_new_tokens", "the longest answer, in tokens", whole(1), 1024),
    Option("seed", "seed of the sampling", whole(0), 0),
    Option(
        "verifier",
        "for files: math, math_verify, choice, reasoning_gym:TASK or my_pkg.my_module:function of (text, row)",
        NAME,
    ),
    Option("problems", "problems per task; unset: 100 of generated tasks, all of others", whole(1)),
    Option("task_seed", "seed of generated problems", whole(0), 0),
    Option("prompt", "chat: the tokenizer's template; auto: chat if there is one", one_of(*_PROMPTS), "auto"),
    Option("instruction", "text after each question, instead of the task's own; '' for none", TEXT),
    Option("batch_size", "answers generated at once", whole(1), 16),
    Option("dtype", "precision of the weights; unset: as in the model's config", one_of(*_DTYPES)),
    Option("revision", "branch, tag or commit of the model", NAME),
    Option(
        "verifier_timeout", "seconds; a verdict that takes longer counts as wrong and is reported", ABOVE_ZERO, 10.0
    ),
    Option("verifier_processes", "verifiers running at once", whole(1), 2),
    Option(
        "rescore",
        "grade the texts of a finished folder again, instead of all the above; needs no model. A function of your own "
        "that the folder names runs only if --verifier names it too",
        FOLDER,
    ),
)
def run(options: Any) -> int:
    if options.temperature == 0:
        raise ConfigError("temperature is 0; the greedy answer is always included: use --n 0 for it alone")
    check_range("temperature", options.temperature, 0, open_low=True)
    if options.rescore is not None:
        return _rescore(options)
    asked = ("tasks", "output") if options.server else ("model", "tasks", "output")
    missing = [name for name in asked if not getattr(options, name)]
    if missing:
        raise ConfigError(
            [f"{name} is not set; write {'-o DIR' if name == 'output' else f'--{name} NAME'}" for name in missing]
        )
    return _evaluate(options)


def _evaluate(options: Any) -> int:
    from qtarget.evaluation import records, running, sampling, tasks

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    served = _served(options)
    made = tasks.load(
        options.tasks,
        problems=options.problems,
        task_seed=options.task_seed,
        verifier=options.verifier,
        instruction=options.instruction,
    )
    name = options.model = options.model or served.name
    tokenizer = sampling.load_tokenizer(name, options.revision)
    room = {"positions": sampling.positions(name, options.revision), **(served.room if served else {})}
    prompts = tasks.prompts(made, tokenizer, options.prompt, max_new_tokens=options.max_new_tokens, **room)
    folder = options.output
    common = {field: getattr(options, field) for field in ("max_new_tokens", "temperature", "top_p")}
    settings = _settings(options) | {"prompt_style": tasks.resolved(options.prompt, tokenizer)}
    if served:
        from qtarget.evaluation.served import ServedSampler

        settings |= served.record(settings["model"])
        sampler: Any = ServedSampler(served, tokenizer, sampling.generation_config(name, options.revision), **common)
        sampler.check(next(iter(prompts.values())))
    manifest = records.manifest_of(settings, made)
    if records.begin(folder, manifest, made, writes=rank == 0):
        if rank == 0:
            print(f"{folder} is already finished; its scores:")
            _show(running.score(folder, {task.name: task.suite for task in made}, options.n), None)
        return 0
    work = running.Run(
        made,
        folder,
        n=options.n,
        seed=options.seed,
        prompts=prompts,
        batch_size=options.batch_size,
        timeout=options.verifier_timeout,
        processes=options.verifier_processes,
        rank=rank,
        world=world,
    )
    batches = work.batches()
    share = sum(len(batch) for _, batch in batches)
    if rank == 0:
        problems = sum(len(task.problems) for task in made)
        print(
            f"{len(made)} tasks, {problems} problems, {problems * (options.n + 1)} answers of up to "
            f"{options.max_new_tokens} tokens, {work.missing()} to do",
            flush=True,
        )
    if batches:
        if not served:
            sampler = sampling.Sampler(name, options.revision, options.dtype, device=_device(), **common)
        work.sample(sampler, _progress(share) if rank == 0 else lambda done: None)
    if rank > 0:
        return 0
    work.wait()
    _show(work.finish(), work.last_error)
    print(f"results    {folder}")
    print(f"next       qtarget compare {folder} OTHER_DIR")
    return 0


def _served(options: Any) -> Any:
    """The server's model; None where the model is loaded here."""
    if not options.server:
        if options.server_model:
            raise ConfigError(f"server_model is {options.server_model!r} without a server; name it as --server URL")
        return None
    if options.dtype is not None:
        raise ConfigError(
            f"dtype is {options.dtype!r}, but the server has already loaded the model; pass --dtype to vLLM"
        )
    from qtarget.evaluation.served import LEAST_TEMPERATURE, ServedModel

    if options.n and options.temperature < LEAST_TEMPERATURE:
        raise ConfigError(
            f"temperature is {options.temperature:g}, which vLLM raises to {LEAST_TEMPERATURE:g}; use that, or --n 0 "
            "for the greedy answer alone"
        )
    return ServedModel(
        options.server, options.server_model, timeout=options.server_timeout, connections=options.batch_size
    )


def _settings(options: Any) -> dict[str, Any]:
    """What the samples depend on, in the order in which a difference is named."""
    from qtarget.teachers.fingerprints import named

    names = ("n", "temperature", "top_p", "max_new_tokens", "seed", "prompt", "dtype", "batch_size")
    return {"model": named(options.model, options.revision), **{name: getattr(options, name) for name in names}}


def _device() -> Any:
    import torch

    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else None


def _rescore(options: Any) -> int:
    from qtarget.evaluation import running

    manifest = running.finished(options.rescore)
    total = sum(about["problems"] for about in manifest["tasks"].values()) * (manifest["n"] + 1)
    made, changed = running.rescore(
        options.rescore, options.verifier_timeout, options.verifier_processes, _progress(total), options.verifier
    )
    _show(made, None)
    print(f"verdicts   {changed} changed of {total}")
    return 0


def _progress(total: int) -> Callable[[int], None]:
    """A bar with the time left on a terminal; elsewhere an estimate after the first batch."""
    step = terminal.timed_bar(total, "answers", "answers")
    return lambda done: step(done, tells=done < total and not sys.stderr.isatty())


def _show(scores: dict[str, Any], last_error: str | None) -> None:
    from qtarget.evaluation.scores import too_few

    headings = ("task", "score", "avg@n", "95 %", "pass@n", "maj@n", "greedy", "no answer")
    table = terminal.table(*headings, left=("task", "score"), no_wrap=True)
    suites = {f"{name} mean": suite for name, suite in scores["suites"].items()}
    for name, scored in [*scores["tasks"].items(), *suites.items()]:
        for reading in ("strict", "lenient"):
            part = scored[reading]
            of_task = [part["pass"][-1] if "pass" in part else None, part.get("majority"), part["no_answer"]]
            passed, majority, no_answer = [""] * 3 if name in suites else map(percent, of_task)
            heads = (name if reading == "strict" else "", reading, percent(part.get("avg")), span(part.get("interval")))
            table.add_row(*heads, passed, majority, percent(part["greedy"]), no_answer)
    terminal.console(120).print(table)
    for name, task in scores["tasks"].items():
        entropy = "" if task["entropy"] is None else f", entropy {task['entropy']:.3f} nats per token"
        print(
            f"{name}: {task['problems']} problems, n = {task['n']}, {task['mean_tokens']:.1f} tokens per answer, "
            f"{task['truncated']:.1%} cut off, {task['empty']:.1%} empty{entropy}"
        )
        if task["timeouts"] or task["errors"]:
            why = f", most recently with: {last_error}" if last_error else ""
            print(f"{name}: the verifier timed out {task['timeouts']} times, failed {task['errors']} times{why}")
    for note in too_few({name: task["problems"] for name, task in scores["tasks"].items() if task["n"]}):
        print(note)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def span(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"
