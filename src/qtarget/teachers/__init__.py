"""Where other distributions come from: a live teacher, a frozen reference."""
