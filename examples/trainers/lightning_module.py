"""Lightning trains a target: ``apply_target`` in the module, and its metrics in Lightning's log.

    python examples/trainers/lightning_module.py MODEL ROWS.jsonl FOLDER

A row has a prompt and a completion, both lists of messages; only the completion is trained. The model is saved in FOLDER.
"""

import sys

import lightning
import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import qtarget as qt


class TargetModule(lightning.LightningModule):
    def __init__(self, model, target):
        super().__init__()
        self.model = qt.apply_target(model, target)  # the line
        self.model.train()  # it was loaded for evaluation, and Lightning leaves that as it is

    def training_step(self, batch, index):
        applied = qt.applied_to(self.model)
        applied.step, applied.total_steps = self.global_step, self.trainer.estimated_stepping_batches  # for schedules
        loss = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def on_before_zero_grad(self, optimizer):
        self.log_dict({f"target/{name}": value for name, value in qt.applied_to(self.model).figures().items()})

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-5, weight_decay=0.0)


model_name, file, folder = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def tokenise(row):
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]
    return {"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]}


rows = load_dataset("json", data_files=file, split="train")
rows = rows.map(tokenise, remove_columns=rows.column_names)
order = torch.Generator().manual_seed(0)
batches = DataLoader(rows, batch_size=4, shuffle=True, generator=order, collate_fn=DataCollatorForSeq2Seq(tokenizer))
module = TargetModule(AutoModelForCausalLM.from_pretrained(model_name, dtype="float32"), "dft")
trainer = lightning.Trainer(max_epochs=1, gradient_clip_val=1.0, log_every_n_steps=1, default_root_dir=folder)
trainer.fit(module, batches)
module.model.save_pretrained(folder)
tokenizer.save_pretrained(folder)
