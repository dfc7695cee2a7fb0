"""A teacher behind an inference server."""
