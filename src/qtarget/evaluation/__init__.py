"""Does a model answer rightly: tasks, seeded sampling, verdicts, scores, comparison."""
