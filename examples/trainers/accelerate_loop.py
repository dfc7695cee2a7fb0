"""A loop with Accelerate trains a target, with gradient accumulation and several processes.

    accelerate launch examples/trainers/accelerate_loop.py MODEL ROWS.jsonl FOLDER

A row has a prompt and a completion, both lists of messages; only the completion is trained. The model is saved in FOLDER.
"""

import contextlib
import sys

import torch
from accelerate import Accelerator
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import qtarget as qt

ACCUMULATION = 2
model_name, file, folder = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(model_name, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(model_name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
qt.apply_target(model, "dft")  # the line, before accelerator.prepare
applied = qt.applied_to(model)


def tokenise(row):
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]
    return {"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]}


accelerator = Accelerator()
rows = load_dataset("json", data_files=file, split="train")
rows = rows.map(tokenise, remove_columns=rows.column_names)
order = torch.Generator().manual_seed(0)
batches = DataLoader(rows, batch_size=2, shuffle=True, generator=order, collate_fn=DataCollatorForSeq2Seq(tokenizer))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
model, optimizer, batches = accelerator.prepare(model, optimizer, batches)

model.train()
coming, steps = iter(batches), len(batches) // ACCUMULATION
for step in range(steps):
    applied.step, applied.total_steps = step, steps  # for targets with a schedule
    micro_batches = [next(coming) for _ in range(ACCUMULATION)]
    # Divide by the labels of the whole step: all its micro-batches, all processes. The first token of a row has none.
    labels = sum((batch["labels"][:, 1:] != -100).sum() for batch in micro_batches)
    count = accelerator.reduce(labels, "sum")
    loss = 0.0
    for batch in micro_batches:
        last = batch is micro_batches[-1]
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            part = model(**batch, num_items_in_batch=count).loss
            accelerator.backward(part * accelerator.num_processes)  # backward averages over the processes
        loss += part.detach()
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print({"step": step + 1, "loss": accelerator.reduce(loss, "sum").item(), **applied.figures()})

if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
