"""How any causal language model is asked: hidden states and head, in a forward of its own."""
