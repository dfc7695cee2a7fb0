"""What to learn: targets as trust × residual. Imports torch only."""

from qtarget.targets import divergence, presets, residual, trust
from qtarget.targets.stats import TokenStats
from qtarget.targets.target import Target

__all__ = ["Target", "TokenStats", "divergence", "presets", "residual", "trust"]
