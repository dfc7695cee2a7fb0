"""The README's picture: what three targets teach for one token of a real sentence.

    python docs/make_picture.py --model build/quickstart/SmolLM2-135M-Instruct

The student reads only the sentence, the teacher (the same model) has read the answer before it. Writes
docs/assets/one_token.svg and the numbers in it, docs/assets/one_token.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qtarget as qt

matplotlib.use("svg")
from matplotlib import pyplot

CONTEXT = "Question: What is the capital of Australia? Answer: Canberra.\n"
SEEN = "The capital of Australia is"
LABEL = " Melbourne"  # what a careless annotator wrote next
TARGETS = [("sft", {}), ("dft", {}), ("target-sft", {"eta": 0.5})]
FOLDER = Path(__file__).parent / "assets"


@torch.no_grad()
def next_token_logits(model, tokenizer, text: str) -> torch.Tensor:
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    return model(ids).logits[0, -1].double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="build/quickstart/SmolLM2-135M-Instruct")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    student = next_token_logits(model, tokenizer, SEEN)
    teacher = next_token_logits(model, tokenizer, CONTEXT + SEEN)
    (label,) = tokenizer(LABEL)["input_ids"]
    labels = torch.tensor([label])
    rows = {"student p": student.softmax(-1), "teacher": teacher.softmax(-1)}
    for name, parameters in TARGETS:
        target = qt.preset(name, **parameters)
        Q = qt.target_distribution(student[None], labels, target, teacher_logits=teacher[None])[0]
        rows[f"Q of {name}"] = Q
    shown = list(dict.fromkeys([label, *(int(token) for row in rows.values() for token in row.topk(3).indices)]))[:8]
    shown = [token for token in shown if max(float(row[token]) for row in rows.values()) > 0.005]
    words = [tokenizer.decode([token]).strip() or "␣" for token in shown]

    figure, axes = pyplot.subplots(1, len(rows), figsize=(11, 2.9), sharey=True, layout="constrained")
    colours = ["#4c78a8", "#72b7b2", "#9a9a9a", "#9a9a9a", "#e4572e"]
    for axis, (title, row), colour in zip(axes, rows.items(), colours, strict=True):
        heights = [float(row[token]) for token in shown]
        rest = float(1 - sum(heights))
        bars = axis.barh([*words, "all others"], [*heights, rest], color=colour)
        axis.bar_label(bars, [f"{value:.2f}" for value in [*heights, rest]], padding=2, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.set_xlim(0, 1.18)
        axis.set_xticks([])
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle(f"“{SEEN}…”, and the demonstration goes on with “{LABEL.strip()}”", fontsize=10)
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / "one_token.svg")
    numbers = {
        title: {word: float(row[token]) for word, token in zip(words, shown, strict=True)}
        for title, row in rows.items()
    }
    (FOLDER / "one_token.json").write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
