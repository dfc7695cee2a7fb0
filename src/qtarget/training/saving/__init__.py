"""What a run leaves on disk: checkpoints, weights, and the files next to them."""
