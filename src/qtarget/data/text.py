"""How a single token is shown as text, and which tokens are parts of one character."""

from __future__ import annotations

import codecs
import contextlib
import functools
import re
from collections.abc import Sequence
from typing import Any

# A byte that is no character by itself, as text_of writes it.
_BYTES = re.compile(r"<([89A-F][0-9A-F])>")


def text_of(tokenizer: Any, index: int) -> str:
    """What a token reads as; bytes that are part of a character as <F0><9F>; no lone surrogates."""
    text = tokenizer.decode([index], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if "\ufffd" in text or not text:
        symbol = tokenizer.convert_ids_to_tokens(index) or f"<{index}>"
        data = _bytes_of(symbol) if "\ufffd" in text else None
        text = str(symbol) if data is None else data.decode("utf-8", "qtarget-bytes")
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _bytes_of(symbol: str | bytes) -> bytes | None:
    """Of a tokenizer's symbol for bytes: bytes themselves, SentencePiece's <0xA9>, GPT-2's alphabet; else None."""
    if isinstance(symbol, bytes):
        return symbol
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", symbol):
        return bytes([int(symbol[3:5], 16)])
    alphabet = _alphabet()
    return bytes(alphabet[letter] for letter in symbol) if all(letter in alphabet for letter in symbol) else None


@functools.cache
def _alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes, which byte-level tokenizers share."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}


def _shown(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "".join(f"<{byte:02X}>" for byte in error.object[error.start : error.end]), error.end


codecs.register_error("qtarget-bytes", _shown)


def characters(texts: Sequence[str]) -> list[tuple[int, int, str]]:
    """Characters that are spread over several tokens: (first, one past the last, the text they are together).

    Args:
        texts: of consecutive tokens, as ``text_of`` writes them.

    >>> characters(["so ", "<F0><9F>", "<98>", "<80>", "!"])
    [(1, 4, '😀')]
    """
    found: list[tuple[int, int, str]] = []
    decoder, begin, whole = codecs.getincrementaldecoder("utf-8")(), 0, ""
    for place, text in enumerate(texts):
        is_inside = bool(decoder.getstate()[0])
        if not is_inside and not _BYTES.search(text):
            continue
        pieces = enumerate(_BYTES.split(text))  # text and hexadecimal digits in turn
        data = b"".join(bytes.fromhex(p) if i % 2 else p.encode("utf-8", "replace") for i, p in pieces)
        begin, whole = (begin, whole) if is_inside else (place, "")
        try:
            whole += decoder.decode(data)
        except UnicodeDecodeError:  # no character so far; one may begin here
            decoder.reset()
            begin, whole = place, ""
            with contextlib.suppress(UnicodeDecodeError):
                whole = decoder.decode(data)
        if not decoder.getstate()[0] and place > begin:
            found.append((begin, place + 1, whole))
    return found


def visible(text: str) -> str:
    """A token's text with spaces, breaks and control characters to be seen, and nothing a terminal would obey."""
    shown = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else f"\\u{{{ord(c):x}}}" for c in shown)
