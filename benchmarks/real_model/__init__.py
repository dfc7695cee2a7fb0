"""Real training of a small model on sums: does a designed target help, with clean labels and with wrong ones?"""
