"""A file a verb. No verb imports another: what they share stands one folder up."""
