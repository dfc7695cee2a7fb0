"""The command line: one file for each verb; heavy imports wait until a verb runs."""
