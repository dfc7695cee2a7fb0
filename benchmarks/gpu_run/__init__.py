"""The parts of the acceptance run on a GPU; the entry is ``benchmarks/gpu.py``."""
