"""One step of the trainer, padded, packed in three ways and padding-free, against autograd on single documents."""

import functools

import pytest

import layouts
from layouts import LAYOUTS, OBJECTIVES
from runs import assert_same_change, distance


@functools.cache
def wanted(name, layout):
    return layouts.by_autograd(name, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_is_that_of_autograd(name, layout, tmp_path):
    """The same rows in one, two and four micro-batches."""
    for accumulation in (1, 2, 4):
        got = layouts.by_trainer(name, layout, accumulation, tmp_path)
        assert_same_change(got, wanted(name, layout))


@pytest.mark.parametrize("layout", ["bfd", "padding_free"])
def test_documents_that_see_each_other_are_noticed(layout):
    """Mutant: a packed row under an all-ones mask."""
    joined = layouts.documents("wrapped")
    real, layouts.documents = layouts.documents, lambda _: joined
    try:
        leaking = layouts.by_autograd("sft", layout)
    finally:
        layouts.documents = real
    assert distance(leaking, wanted("sft", layout))[0] > 1e-2


def test_a_column_at_full_length_is_noticed(tmp_path):
    """Mutant: TRL's own cutting, which leaves the column as it was."""
    cut = layouts.documents("bfd")
    full = [
        dict(row, weight=whole["weight"][-len(row["weight"]) :]) for row, whole in zip(cut, layouts.data(), strict=True)
    ]
    real, layouts.documents = layouts.documents, lambda _: full
    try:
        late = layouts.by_autograd("iw-sft", "bfd")
    finally:
        layouts.documents = real
    assert distance(late, wanted("iw-sft", "bfd"))[0] > 1e-2
