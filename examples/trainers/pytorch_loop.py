"""Your own loop trains a target: ``apply_target`` changes what the model returns as its loss.

    python examples/trainers/pytorch_loop.py MODEL ROWS.jsonl FOLDER

A row has a prompt and a completion, both lists of messages; only the completion is trained. The model is saved in FOLDER.
"""

import sys

import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import qtarget as qt

model_name, file, folder = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(model_name, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(model_name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
qt.apply_target(model, "dft")  # the line


def tokenise(row):
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]
    return {"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]}


rows = load_dataset("json", data_files=file, split="train")
rows = rows.map(tokenise, remove_columns=rows.column_names)
order = torch.Generator().manual_seed(0)
batches = DataLoader(rows, batch_size=4, shuffle=True, generator=order, collate_fn=DataCollatorForSeq2Seq(tokenizer))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
applied = qt.applied_to(model)

model.train()
for step, batch in enumerate(batches):
    applied.step, applied.total_steps = step, len(batches)  # for targets with a schedule
    loss = model(**batch.to(model.device)).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print({"step": step + 1, "loss": loss.item(), **applied.figures()})

model.save_pretrained(folder)
tokenizer.save_pretrained(folder)
