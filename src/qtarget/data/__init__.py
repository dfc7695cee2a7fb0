"""Rows → token ids, labels and per-token columns. TRL tokenises and labels; what it does not carry is carried here."""
