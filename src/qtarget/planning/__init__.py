"""What a run takes, by arithmetic, before anything is loaded: memory, steps, floating-point operations."""
