"""The engine against the oracle in float64: every preset and option, every way to cut the work."""

import functools

import pytest
import torch

import qtarget as qt
from engine_cases import assert_same, case_named, engine, hard, ignoring, oracle, preset_of
from published import CASES
from qtarget.losses.backends import torch_chunked

pytestmark = pytest.mark.usefixtures("one_thread")

# rows of a chunk, and of the blocks that a chunk is cut into (None: what the library chooses)
CHUNKS = {
    "chunks of 2": (2, None),
    "of 10 in blocks of 4": (10, 4),
    "one chunk": (64, None),
    "default": (None, None),
}

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@functools.cache
def prepared(softcap, with_bias, tied, share):
    scale = 1.0 if softcap else 1.3
    return ignoring(hard(tied=tied, with_bias=with_bias, softcap=softcap, scale=scale), share)


@functools.lru_cache(maxsize=4)  # the chunk varies fastest: one truth serves all of its ways
def truth(case_id, *setting):
    return oracle(prepared(*setting), preset_of(case_named(case_id)), reduction="sum", stats="all")


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("share", ["none ignored", "some ignored", "all ignored"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("softcap", [None, 40.0], ids=["no softcap", "softcap"])
@every_case
def test_engine_is_the_oracle(case, softcap, with_bias, tied, share, chunk, monkeypatch):
    rows, block = CHUNKS[chunk]
    if block is not None:
        monkeypatch.setattr(torch_chunked, "block_rows", lambda *_: block)
    batch = prepared(softcap, with_bias, tied, share)
    got = engine(batch, preset_of(case), reduction="sum", stats="all", chunk_rows=rows)
    assert_same(got, truth(case.id, softcap, with_bias, tied, share))
