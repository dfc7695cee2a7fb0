"""How a single token is shown as text."""

from __future__ import annotations

from typing import Any


def text_of(tokenizer: Any, index: int) -> str:
    """What a token reads as; one that is part of a character as the tokenizer's own symbol; no lone surrogates."""
    text = tokenizer.decode([index], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if "\ufffd" in text or not text:
        text = tokenizer.convert_ids_to_tokens(index) or f"<{index}>"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def visible(text: str) -> str:
    """A token's text with spaces, breaks and control characters to be seen, and nothing a terminal would obey."""
    shown = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else f"\\u{{{ord(c):x}}}" for c in shown)
