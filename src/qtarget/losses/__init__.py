"""Compute the loss of a target: the full-logits oracle, and the engine that never forms a [tokens, vocab] tensor."""

from qtarget.losses.full_logits import target_distribution, target_loss
from qtarget.losses.heads import Head, TopK
from qtarget.losses.linear import linear_target_loss
from qtarget.losses.output import LossOutput

__all__ = ["Head", "LossOutput", "TopK", "linear_target_loss", "target_distribution", "target_loss"]
