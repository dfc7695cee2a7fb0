"""Tokens as text: bytes that are part of a character, in every alphabet tokenizers write them in."""

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import lens_records
import qtarget as qt
import tiny_models
from qtarget.data.text import characters, text_of
from qtarget.lens import terminal


def byte_fallback() -> PreTrainedTokenizerFast:
    """As SentencePiece's: a token <0xA9> for each byte."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁a": 256, "<unk>": 257}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("make", [tiny_models.tokenizer, byte_fallback], ids=["byte-level", "byte fallback"])
def test_bytes_are_shown_as_bytes(make):
    tokenizer = make()
    ids = tokenizer("😀é", add_special_tokens=False)["input_ids"]
    texts = [text_of(tokenizer, index) for index in ids]
    assert texts == ["<F0>", "<9F>", "<98>", "<80>", "<C3>", "<A9>"]
    assert characters(texts) == [(0, 4, "😀"), (4, 6, "é")]


def test_text_is_shown_as_text():
    """A byte that is a character by itself, a special token, a replacement character that is really there."""
    tokenizer = tiny_models.tokenizer()
    ids = tokenizer("a\n<|im_end|>")["input_ids"]
    assert [text_of(tokenizer, index) for index in ids] == ["a", "\n", "<|im_end|>"]
    assert [text_of(byte_fallback(), index) for index in (10, 65)] == ["\n", "A"]


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (["so ", "<F0><9F>", "<98><80>", "!"], [(1, 3, "😀")]),
        (["a<C3>", "<A9>b"], [(0, 2, "aéb")]),
        (["<C3>", "<A9><C3>", "<A9>"], [(0, 3, "éé")]),
        (["<A9>", "<C3>"], []),
        (["<F0>", "<C3>", "<A9>"], [(1, 3, "é")]),
        (["<F0>", "so", "<C3>", "<A9>"], [(2, 4, "é")]),
        (["é", "<b>", "<41>"], []),
        ([], []),
    ],
    ids=str,
)
def test_characters_over_several_tokens(texts, found):
    assert characters(texts) == found


def test_a_character_stands_before_its_tokens_in_the_terminal():
    z = lens_records.random_logits(4, 60)
    record = lens_records.record_from_logits(z, lens_records.random_labels(z), rows=1)
    ids = record.rows[0]["input_ids"]
    record.rows[0]["input_ids"] = [ids[0], *range(1, 5)]
    record.vocab |= {index: (text, False) for index, text in enumerate(["so", "<C3>", "<A9>", "!"], 1)}
    with open("/dev/null", "w") as nowhere:
        console = Console(width=160, record=True, file=nowhere)
        terminal.show(record, qt.preset("sft"), 0, console)
    assert "é([<C3>]#[<A9>]#)[!]#" in console.export_text()
