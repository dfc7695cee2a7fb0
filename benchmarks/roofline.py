"""What the engine is predicted to cost on a GPU, by arithmetic from counted bytes. Nothing here was measured on a GPU.

    python benchmarks/roofline.py           # prints the table, writes benchmarks/results/roofline.json

R_t is time over that of the matmuls no method can do without: student's logits, dH and dW, and a teacher's logits where
there is one. A card is two numbers, the rate of its bf16 matmuls and the rate of its copies. To the matmuls come

- the bytes of the two kernels: BYTES a logit, which tests/losses/test_engine_device.py counts in Triton's interpreter;
- half of what float32 logits write more than bf16 ones would: an epilogue is partly hidden behind the next tile;
- dW beyond what a bf16 result would write, as the engine cuts its work (``sizes.device_sizes``), the pass that scales and
  casts it, and the cast of a float32 head;
- hidden states, gathered, their gradient in float32, scattered and cast;
- torch's operations on [rows] between the kernels, SMALL a chunk and FIXED a call, at SECONDS each: they run one after
  another on the GPU, however far ahead the host is.

Peers are models of the same kind: what they must read and write by their published algorithms.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import qtarget as qt
from qtarget.losses.engine.sizes import Sizes, device_sizes

# Read and written for each logit by both kernels: float32 logits twice, another model's twice, a 16-bit gradient once.
STUDENT, OTHER = 4 + 4 + 2, 8 + 8 + 2


def bytes_of(target: qt.Target) -> int:
    """A logit's bytes: more where a rule asks another model for the label, and for the mean score of a divergence."""
    models = {name for term in target.residual_terms for name in term.pool.requires}
    asked = sum(f"{name}_log_p_y" in target.needs for name in ("teacher", "reference"))
    scored = any(not term.divergence.is_forward_kl for term in target.residual_terms)
    return (OTHER if models else STUDENT) + 4 * asked + 4 * (1 + len(models)) * scored


BYTES = {name: bytes_of(qt.preset(name)) for name in qt.presets.names()}
BYTES |= {"gem logsigmoid": STUDENT, "target-sft, top-k": STUDENT, "kd at T = 2": OTHER}
BYTES |= {"kd by reverse_kl": bytes_of(qt.preset("kd", divergence="reverse_kl"))}
# torch's operations on [rows] for one more chunk of logits, as counted in the same tests, and for a call.
SMALL = {"dft": 12, "eaft": 30, "gem": 17, "kd": 14, "target-sft": 13, "target-sft, top-k": 132}
FIXED = 100
SECONDS = 2.5e-6
LIMITS = {(2048, False): 1.30, (2048, True): 1.35, (4096, False): 1.20, (4096, True): 1.22}
RESULTS = Path(__file__).parent / "results" / "roofline.json"


@dataclass(frozen=True)
class Card:
    """flops: of bf16 matmuls, per second. bandwidth: bytes read and written by a copy, per second. memory: bytes."""

    flops: float
    bandwidth: float
    memory: int


# The H200's rates were seen on one card; the H100's are of the same order as published ones.
CARDS = {"H100": Card(660e12, 3.0e12, 80 << 30), "H200": Card(790e12, 4.3e12, 141 << 30)}


@dataclass(frozen=True)
class Problem:
    """tokens, vocabulary, width; float32_head: multiplied under bf16 autocast, as the trainer's default is on a GPU."""

    tokens: int
    vocab: int
    width: int
    float32_head: bool = False


def products(card: Card, problem: Problem, models: int) -> float:
    """Seconds of the matmuls no method can do without."""
    return (2 + models) * 2 * problem.tokens * problem.vocab * problem.width / card.flops


def cut(card: Card, problem: Problem, models: int) -> Sizes:
    """As the engine cuts this problem."""
    spared = 0 if problem.float32_head else 4 * problem.vocab * problem.width
    return device_sizes(problem.tokens, problem.vocab, models, 2, spared, card.memory, False)


def head_bytes(problem: Problem, sizes: Sizes) -> float:
    """Read and written for dW beyond a bf16 result, and for a float32 head's cast, in bytes of the head."""
    parts = -(-problem.tokens // sizes.gradient)
    if problem.float32_head:  # cast, written in float32, read and written for each further part, scaled in place
        each = 6 + 2 + 8 * (parts - 1) + 8
    elif sizes.whole:  # scaled in place
        each = 4
    else:
        each = 2 + 8 * (parts - 1) + 6
    return each * problem.vocab * problem.width


def predicted(card: Card, problem: Problem, target: str) -> float:
    """R_t of a target."""
    models = 2 if BYTES[target] == OTHER else 1
    sizes = cut(card, problem, models)
    logits = problem.tokens * problem.vocab
    bytes_ = (BYTES[target] + 0.5 * 2 * models) * logits + head_bytes(problem, sizes)
    bytes_ += 24 * problem.tokens * problem.width
    chunks = -(-problem.tokens // sizes.logits)
    small = (SMALL[target] * chunks + FIXED) * SECONDS
    bare = products(card, problem, models)
    return 1 + (bytes_ / card.bandwidth + small) / bare


def peers(card: Card, problem: Problem) -> dict[str, float]:
    """R_t of what others offer, over the three matmuls (four with a teacher)."""
    one = 2 * problem.tokens * problem.vocab * problem.width / card.flops
    logit = problem.tokens * problem.vocab / card.bandwidth
    head = problem.vocab * problem.width / card.bandwidth
    rounds = problem.vocab // problem.width + 1  # Liger's chunks
    return {
        "torch.compile of full bf16 logits, cross-entropy": 1 + 10 * logit / (3 * one),
        "torch.compile of full bf16 logits, target-sft": 1 + 22 * logit / (4 * one),
        "TRL's fused head (logits computed twice)": (4 * one + 6 * logit + 12 * head) / (3 * one),
        "cut-cross-entropy (logits computed twice)": 4 / 3,
        "Liger's fused cross-entropy": 1 + (8 * logit + 4 * rounds * head) / (3 * one),
        "Liger's fused JSD": 1 + (60 * logit + 4 * rounds * head) / (4 * one),
    }


def peak_bytes(card: Card, problem: Problem, models: int) -> float:
    """Of the engine's buffers and of dW as long as it is in float32, beyond inputs, dH and dW."""
    sizes = cut(card, problem, models)
    buffers = (4 * models * sizes.logits + 2 * sizes.gradient) * problem.vocab
    accumulator = 0 if sizes.whole or problem.float32_head else 4 * problem.vocab * problem.width
    return buffers + accumulator


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    record: dict = {"kind": "predicted", "tokens": args.tokens, "vocab": args.vocab, "cards": {}}
    missed = []
    print(f"predicted, not measured: {args.tokens} tokens, vocabulary {args.vocab}, time over the matmuls")
    for name, card in CARDS.items():
        for width in (2048, 4096):
            problem = Problem(args.tokens, args.vocab, width)
            autocast = Problem(args.tokens, args.vocab, width, float32_head=True)
            print(f"\n{name}, width {width}: the matmuls {1e3 * products(card, problem, 1):.1f} ms", end="")
            print(f", with a teacher {1e3 * products(card, problem, 2):.1f} ms")
            rows = {}
            for target in SMALL:
                other = BYTES[target] == OTHER
                R, under_autocast = predicted(card, problem, target), predicted(card, autocast, target)
                limit = LIMITS[width, other]
                if target != "target-sft, top-k" and limit < R:
                    missed.append(f"{name}, width {width}, {target}: {R:.3f} > {limit:.2f}")
                gigabytes = peak_bytes(card, problem, 2 if other else 1) / 1e9
                rows[target] = {
                    "R": round(R, 3),
                    "R, float32 head under autocast": round(under_autocast, 3),
                    "peak GB": round(gigabytes, 2),
                }
                print(
                    f"  {target:<20} {R:5.2f}  (limit {limit:.2f}; float32 head {under_autocast:.2f}; {gigabytes:.1f} GB)"
                )
            others = {peer: round(R, 2) for peer, R in peers(card, problem).items()}
            for peer, R in others.items():
                print(f"  {peer:<50} {R:5.2f}")
            record["cards"][f"{name}, width {width}"] = {"targets": rows, "peers": others}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nraw results: {args.out}")
    for line in missed:
        print(f"over its limit: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
