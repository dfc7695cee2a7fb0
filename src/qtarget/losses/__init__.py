"""The loss of a target: an oracle on full logits, and an engine that never holds them."""

from qtarget.losses.full_logits import target_distribution, target_loss
from qtarget.losses.heads import Head, TopK
from qtarget.losses.linear import linear_target_loss
from qtarget.losses.output import LossOutput

__all__ = ["Head", "LossOutput", "TopK", "linear_target_loss", "target_distribution", "target_loss"]
