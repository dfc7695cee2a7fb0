"""Does a model answer rightly: tasks, seeded sampling, verdicts, scores, comparison."""

from qtarget.evaluation.grading import grade

__all__ = ["grade"]
