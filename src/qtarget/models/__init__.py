"""How any causal language model is called: hidden states and head, in a forward of its own."""
