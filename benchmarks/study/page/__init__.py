"""What docs/study.md and docs/choosing.md are made of: their text, tables and pictures."""
