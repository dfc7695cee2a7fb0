"""Row mathematics for devices: two passes, as Triton kernels and as functions for inductor."""
