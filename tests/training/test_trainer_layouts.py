"""One step of the trainer, padded, packed in three ways and padding-free, against autograd on single documents."""

import functools

import pytest

import batch_layouts
from batch_layouts import LAYOUTS, OBJECTIVES
from quick_runs import assert_same_change, largest_difference


@functools.cache
def wanted(name, layout):
    return batch_layouts.layout_change_by_autograd(name, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_is_that_of_autograd(name, layout, tmp_path):
    """The same rows in one, two and four micro-batches."""
    for accumulation in (1, 2, 4):
        got = batch_layouts.layout_change_by_trainer(name, layout, accumulation, tmp_path)
        assert_same_change(got, wanted(name, layout))


@pytest.mark.parametrize("layout", ["bfd", "padding_free"])
def test_documents_that_see_each_other_are_noticed(layout):
    """Mutant: a packed row under an all-ones mask."""
    joined = batch_layouts.layout_documents("wrapped")
    real, batch_layouts.layout_documents = batch_layouts.layout_documents, lambda _: joined
    try:
        leaking = batch_layouts.layout_change_by_autograd("sft", layout)
    finally:
        batch_layouts.layout_documents = real
    assert largest_difference(leaking, wanted("sft", layout))[0] > 1e-2


def test_a_column_at_full_length_is_noticed(tmp_path):
    """Mutant: TRL's own cutting, which leaves the column as it was."""
    cut = batch_layouts.layout_documents("bfd")
    full = [
        dict(row, weight=whole["weight"][-len(row["weight"]) :])
        for row, whole in zip(cut, batch_layouts.layout_dataset(), strict=True)
    ]
    real, batch_layouts.layout_documents = batch_layouts.layout_documents, lambda _: full
    try:
        late = batch_layouts.layout_change_by_autograd("iw-sft", "bfd")
    finally:
        batch_layouts.layout_documents = real
    assert largest_difference(late, wanted("iw-sft", "bfd"))[0] > 1e-2
