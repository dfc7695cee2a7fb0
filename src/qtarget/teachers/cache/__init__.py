"""A teacher's answers on disk: built once, read by position, checked against the live teacher."""
