"""Whether a model answers rightly: tasks, seeded sampling, verdicts in killable processes, scores, paired comparison."""
