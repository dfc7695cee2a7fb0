"""Ask a trained model one held-out problem. Nothing but Transformers: what qtarget saves is a plain model.

python examples/answer.py --model build/quickstart/run --data build/quickstart/data/test.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="model folder or hub name")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines with prompt and completion")
    parser.add_argument("--row", type=int, default=0, help="which line of the data to ask")
    parser.add_argument("--max_new_tokens", type=int, default=160)
    args = parser.parse_args()

    logging.disable_progress_bar()
    row = json.loads(args.data.read_text(encoding="utf-8").splitlines()[args.row])
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)

    prompt = tokenizer.apply_chat_template(
        row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=args.max_new_tokens, do_sample=False)
    answer = tokens[0, prompt["input_ids"].shape[1] :]

    for title, text in (
        ("question", row["prompt"][-1]["content"]),
        (f"answer of {args.model}", tokenizer.decode(answer, skip_special_tokens=True)),
        ("reference", row["completion"][0]["content"]),
    ):
        print(f"\n--- {title}\n{text.strip()}")


if __name__ == "__main__":
    main()
