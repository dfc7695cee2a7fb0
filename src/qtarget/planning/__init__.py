"""What a run takes, by arithmetic: memory, steps, floating-point operations."""
