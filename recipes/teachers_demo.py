"""A teacher asked once: build a cache, let the doctor look at it, train from it, and compare with the live teacher.

    python recipes/teachers_demo.py --demo build/quickstart --out build/teachers

Every step is a command of qtarget, printed before it runs. Two things are checked at the end, and the script fails if one
does not hold: training from a cache of the whole vocabulary has the losses of training with the live teacher to 1e-4 over
20 steps, and with 64 tokens kept the error of Q stays below its bound and the losses within what the doctor reported.
The teacher is the demo's model after two steps of plain SFT; the student is the model itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

STEPS = 20
MOST_TOKENS = 2000  # supervised: the whole vocabulary of each is 400 kB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("build/quickstart"), help="where prepare_quickstart.py wrote")
    parser.add_argument("--out", type=Path, default=Path("build/teachers"), help="where everything goes")
    parser.add_argument("--results", type=Path, help="also write the figures there, as JSON")
    options = parser.parse_args()
    out: Path = options.out
    shutil.rmtree(out, ignore_errors=True)
    model = options.demo / "SmolLM2-135M-Instruct"
    tokens = write_rows(options.demo, out / "data", model)

    start = ["--config", "recipes/quickstart.yaml", "--model_name_or_path", model, "--dataset_name", out / "data"]
    start += ["--dataset_test_split", "none"]
    sft = ["--target", "sft", "--teacher_model_name_or_path", "none", "--learning_rate", "1e-4", "--max_steps", 2]
    run("train", *start, *sft, "--output_dir", out / "teacher")
    start += ["--teacher_model_name_or_path", out / "teacher"]
    steps = ["--max_steps", STEPS, "--gradient_accumulation_steps", 1, "--per_device_train_batch_size", 2]

    run("train", *start, *steps, "--output_dir", out / "live")
    live = losses(out / "live")

    whole = out / "whole"
    vocabulary = len_of_vocabulary(model)
    shards = ["--shard_tokens", 500, "--batch_size", 2]
    run("cache", "build", *start, "-o", whole, "--k", vocabulary, "--cache_dtype", "float32", *shards)
    run("train", *start, *steps, "--teacher_cache", whole, "--output_dir", out / "from_whole")
    shutil.rmtree(whole)  # 800 MB
    from_whole = losses(out / "from_whole")

    run("cache", "build", *start, "-o", out / "cache", "--k", 64)
    run("cache", "inspect", out / "cache", "--verify")
    run("cache", "doctor", *start, "--cache", out / "cache", "--json", out / "doctor.json")
    run("train", *start, *steps, "--teacher_cache", out / "cache", "--output_dir", out / "from_cache")
    from_cache = losses(out / "from_cache")

    report = json.loads((out / "doctor.json").read_text())
    line = next(x for x in report["targets"] if (x["target"], x["tail"]) == ("target-sft", "student"))
    figures = {
        "supervised_tokens": tokens,
        "vocabulary": vocabulary,
        "loss_live": live,
        "loss_from_whole_vocabulary": from_whole,
        "loss_from_64": from_cache,
        "largest_difference_whole": max(abs(a - b) for a, b in zip(live, from_whole, strict=True)),
        "mean_difference_64": sum(abs(a - b) for a, b in zip(live, from_cache, strict=True)) / STEPS,
        "doctor": report,
    }
    print(f"\nlosses of {STEPS} steps, live teacher against its cache")
    print(f"  whole vocabulary  largest difference {figures['largest_difference_whole']:.1e}, asked for: 1e-4")
    print(f"  64 tokens kept    mean difference {figures['mean_difference_64']:.4f}, largest row by the doctor", end="")
    print(f" {line['loss_row']:.4f}")
    print(
        f"  error of Q        mean {line['q_mean']:.4f}, bound {line['bound_mean']:.4f}, holds for every token: ",
        end="",
    )
    print("yes" if line["holds"] else "NO")
    if options.results:
        options.results.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    whole_agrees = figures["largest_difference_whole"] <= 1e-4
    bound_holds = line["holds"] and figures["mean_difference_64"] <= line["loss_row"]
    if not (whole_agrees and bound_holds):
        raise SystemExit("the cache does not train as its teacher does")


def run(*words: object) -> None:
    """One command of qtarget, shown first."""
    command = ["qtarget", *map(str, words)]
    print("\n$ " + " ".join(command), flush=True)
    program = Path(sys.executable).with_name("qtarget")
    subprocess.run([str(program), *command[1:], *quiet(words)], check=True)


def quiet(words: tuple[object, ...]) -> list[str]:
    return ["--disable_tqdm", "true"] if words[0] == "train" else []


def losses(folder: Path) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    found = [line["loss"] for line in log if "loss" in line]
    assert len(found) == STEPS
    return found


def write_rows(demo: Path, folder: Path, model: Path) -> int:
    """The first of the demo's training rows with at most ``MOST_TOKENS`` supervised tokens. Returns their number."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    folder.mkdir(parents=True)
    total, kept = 0, []
    for line in (demo / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines():
        tokens = len(tokenizer(json.loads(line)["completion"][0]["content"])["input_ids"]) + 2  # its end of turn
        if total + tokens > MOST_TOKENS:
            break
        total += tokens
        kept.append(line)
    (folder / "train.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    return total


def len_of_vocabulary(model: Path) -> int:
    from transformers import AutoTokenizer

    return max(AutoTokenizer.from_pretrained(model).get_vocab().values()) + 1


if __name__ == "__main__":
    main()
