"""What a run needs, calculated: memory, steps, floating-point operations."""
