"""What a run leaves on the disk: checkpoints, weights, the files beside them, and what it was."""
