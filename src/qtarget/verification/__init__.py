"""Checks the trainer's promises on a user's own model, rows, target and config.

``subject`` is the trainer, stepped through its own functions and watched; ``expected`` works out what it should give from
nothing of the trainer's; each other module is a family of checks.
"""

from qtarget.verification.report import Report, verify
from qtarget.verification.subject import Subject

__all__ = ["Report", "Subject", "verify"]
