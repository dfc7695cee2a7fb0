"""The rows a trainer trains are those that TRL would have made of the same dataset, in the same order."""

import functools

import pytest

import tiny_models
from beside_trl import OURS, TRL, make_trainer
from dataset_shapes import SHAPES, Shape, many_rows, rows_of

CUTS = {
    "cut at the end": {},
    "cut at the start": {"truncation_mode": "keep_end"},
    "bfd": {"packing": True},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split"},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
}
ALL_SHAPES = {shape.name: shape for shape in [*SHAPES, Shape("1100 rows", many_rows, max_length=9)]}


@functools.cache
def model():
    return tiny_models.llama()


@functools.cache
def data_of(shape):
    return ALL_SHAPES[shape].data()


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated")
@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_prepared_rows(shape, cut, shuffle, tmp_path):
    case = ALL_SHAPES[shape]
    settings = {"max_length": case.max_length, "shuffle_dataset": shuffle, **CUTS[cut], **case.settings}
    theirs, ours = (
        rows_of(make_trainer(kind, model(), tmp_path, data_of(shape), case.given(), **settings).train_dataset)
        for kind in (TRL, OURS)
    )
    assert max(len(row["input_ids"]) for row in theirs) == case.max_length, "no row is as long as to be cut"
    assert ours == theirs
