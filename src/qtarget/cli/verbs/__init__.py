"""One file per verb. No verb imports another: what they share is one folder up."""
