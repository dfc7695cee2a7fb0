"""Does a model answer correctly: tasks, seeded sampling, verdicts, scores, comparison."""

from qtarget.evaluation.grading import grade

__all__ = ["grade"]
