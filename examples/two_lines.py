"""The quick start of TRL's documentation of SFTTrainer, with two lines changed: the import and ``target=``."""

from datasets import load_dataset

from qtarget import QTargetTrainer as SFTTrainer  # was: from trl import SFTTrainer

trainer = SFTTrainer(
    model="Qwen/Qwen3-0.6B",
    train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    target="dft",  # new; without it the run is plain SFT
)
trainer.train()
