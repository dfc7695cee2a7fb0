"""Row mathematics for devices: two passes over the logits, as Triton kernels and as functions for inductor."""
