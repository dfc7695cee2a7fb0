"""See what a target teaches, token by token: capture once, then replay any target without a model."""
