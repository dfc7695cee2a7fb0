"""What `make eval-demo` asks a model: sums of two numbers of one digit, each once.

    python recipes/eval_demo.py --out build/eval/sums.jsonl

A model of 135 million parameters can do some of them; of the problems it was trained on it can do none.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/eval/sums.jsonl"), help="file to write")
    parser.add_argument("--problems", type=int, default=40, help="how many of the 64 sums")
    args = parser.parse_args()
    sums = [(a, b) for a in range(2, 10) for b in range(2, 10)]
    rows = [
        {"id": f"{a} + {b}", "prompt": f"What is {a} + {b}?", "answer": str(a + b)}
        for a, b in random.Random(0).sample(sums, args.problems)
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"data   {args.out}  {len(rows)} sums")


if __name__ == "__main__":
    main()
