"""Two tiny models that the runs below ask: one at random, one that learned half of the answers."""

import json
from pathlib import Path

import torch

import tiny_models

sums, birds = (
    [*map(json.loads, Path("tasks", task, "test.jsonl").read_text().splitlines())] for task in ("sums", "birds")
)
rows = [f"What is {row['question']}?{row['answer']}<|im_end|>" for row in sums[:4]]
rows += [row["question"] + row["choices"][row["answer"]] for row in birds[:3]]
tokenizer = tiny_models.tokenizer()
for name, steps in (("first", 0), ("second", 150)):
    model = tiny_models.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        ids = torch.tensor([tokenizer(rows[step % len(rows)])["input_ids"]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(name)
    tokenizer.save_pretrained(name)
