"""A target in other people's trainers."""
