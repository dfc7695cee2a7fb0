"""Rows to token ids, labels and per-token columns: what TRL's preparation leaves behind."""
