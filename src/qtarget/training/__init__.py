"""Train with a target: TRL's SFTTrainer with the loss replaced."""

from qtarget.training.config import QTargetConfig
from qtarget.training.trainer import QTargetTrainer

__all__ = ["QTargetConfig", "QTargetTrainer"]
