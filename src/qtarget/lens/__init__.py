"""What a target teaches, token by token: capture once, replay any target without a model."""
