"""The command line, a small file a verb. Heavy imports happen inside the verbs, so that --help answers at once."""
