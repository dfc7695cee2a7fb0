"""What a run leaves on the disk: checkpoints, weights, and the files beside them."""
