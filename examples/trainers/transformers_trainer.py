"""Transformers' own ``Trainer`` trains a target: one more entry in ``callbacks``.

    python examples/trainers/transformers_trainer.py MODEL ROWS.jsonl FOLDER

A row has a prompt and a completion, both lists of messages; only the completion is trained. The model is saved in FOLDER.
"""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import qtarget as qt

model_name, file, folder = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(model_name, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(model_name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def tokenise(row):
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]
    return {"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]}


rows = load_dataset("json", data_files=file, split="train")
settings = TrainingArguments(
    folder,
    num_train_epochs=1,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    learning_rate=1e-5,
    lr_scheduler_type="constant",
    logging_steps=1,
    report_to="none",
)
trainer = Trainer(
    model,
    settings,
    train_dataset=rows.map(tokenise, remove_columns=rows.column_names),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    callbacks=[qt.TargetCallback("dft")],  # the line
)
trainer.train()
trainer.save_model()
