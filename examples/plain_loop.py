"""The engine in an ordinary PyTorch loop: any model, any optimiser, no trainer.

    python examples/plain_loop.py                                       # a small random model, seconds
    python examples/plain_loop.py --model build/quickstart/SmolLM2-135M-Instruct --steps 5

The loop does what a trainer would have to: last hidden states instead of logits, the head handed to the engine, labels
shifted by one, prompt and padding ignored. Student and teacher start equal, so the first step is plain DFT.
"""

from __future__ import annotations

import argparse
import copy

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import qtarget as qt


def batches(vocab: int, steps: int, seed: int = 0):
    """Token ids and labels [rows, length]: counting sequences, the first four tokens being the prompt."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        start = torch.randint(0, vocab // 2, (4, 1), generator=generator)
        ids = (start + torch.arange(24)) % vocab
        labels = ids.clone()
        labels[:, :4] = -100  # the prompt is read, not learned
        yield ids, labels


def train(model: torch.nn.Module, steps: int, target: qt.Target, learning_rate: float = 3e-4) -> list[dict[str, float]]:
    """Train ``model`` toward ``target`` with its own starting weights as teacher; one record a step."""
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    records = []
    for ids, labels in batches(model.config.vocab_size, steps):
        with torch.no_grad():
            teacher_hidden = teacher.base_model(ids).last_hidden_state
        hidden = model.base_model(ids).last_hidden_state
        out = qt.linear_target_loss(
            hidden[:, :-1],  # position i predicts token i + 1
            model.get_output_embeddings().weight,
            labels[:, 1:],
            target,
            teacher=qt.Head(teacher_hidden[:, :-1], teacher.get_output_embeddings().weight),
        )
        out.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        figures = {name: float(value.nanmean()) for name, value in out.stats.items()}
        records.append({"loss": out.loss.item(), **figures})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="folder or hub id; default: a small random Llama")
    parser.add_argument("--target", default="target-sft", help="a name of `qtarget targets`")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    else:
        torch.manual_seed(0)
        sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes))
    records = train(model, args.steps, qt.preset(args.target), 3e-3 if not args.model else 1e-5)
    for step, record in enumerate(records, 1):
        if step in (1, len(records)) or step % 10 == 0:
            shown = "  ".join(f"{name} {record[name]:.4f}" for name in ("loss", "nll", "trust", "update"))
            print(f"step {step:3d}  {shown}")


if __name__ == "__main__":
    main()
