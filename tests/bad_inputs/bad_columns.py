"""Columns beside the tokens: weight, critical, old_logps, reference_logp, uid and source."""

from __future__ import annotations

from typing import Any

from bad_rows import IDS
from bench import Case

N = len(IDS)


def column(id: str, wrong: str, name: str, values: list[Any], *says: str, target: Any = None, **settings: Any) -> Case:
    """Rows of token ids, one for each value of the column."""
    if "targets" in settings:
        target = "none"
    asked = {"weight": "iw-sft", "critical": "cft", "old_logps": "psft"}.get(name, "sft") if target is None else target
    more = {"psft_refresh": "never"} if name == "old_logps" else {}
    made = [{"input_ids": IDS, "labels": IDS, name: value} for value in values]

    def do(bench: Any) -> list[object]:
        return bench.train(dataset_name=bench.rows(*made), **{"target": asked, **more, **settings})

    return Case(id, wrong, do, says)


NAN, INF = float("nan"), float("inf")
TWO = {"target": None, "targets": {"a": "dft", "b": "sft"}}

CASES = [
    column(
        "no-weight",
        "a target that needs the column",
        "other",
        [1],
        "needs weights",
        "has no column 'weight'",
        target="iw-sft",
    ),
    column(
        "no-critical", "a target that needs the column", "other", [1], "needs a mask of critical tokens", target="cft"
    ),
    column(
        "a-negative-weight",
        "-1",
        "weight",
        [1.0, -1.0],
        "row 1 of the train dataset: column weight holds -1; weights must be 0 or more",
    ),
    column(
        "a-nan-weight", "NaN", "weight", [1.0, NAN], "row 1 of the train dataset: column weight holds", "must be finite"
    ),
    column(
        "an-infinite-weight",
        "infinity",
        "weight",
        [1.0, INF],
        "row 1 of the train dataset: column weight holds",
        "must be finite",
    ),
    column(
        "a-null-weight",
        "null",
        "weight",
        [1.0, None],
        "row 1 of the train dataset: column weight holds None",
        "must be finite",
    ),
    column(
        "a-weight-in-words",
        "a word",
        "weight",
        ["much", "little"],
        "row 0 of the train dataset: column weight",
        "'much'",
    ),
    column(
        "a-weight-in-a-mapping",
        "a mapping",
        "weight",
        [{"a": 1}],
        "row 0 of the train dataset: column weight",
        "number",
    ),
    column(
        "weights-too-short",
        "one number missing",
        "weight",
        [[1.0] * N, [1.0] * (N - 1)],
        f"row 1 of the train dataset: column weight has {N - 1} numbers for {N} tokens",
    ),
    column(
        "weights-too-long",
        "one number more",
        "weight",
        [[1.0] * (N + 1)],
        f"row 0 of the train dataset: column weight has {N + 1} numbers for {N} tokens",
    ),
    column(
        "weights-in-lists",
        "a list in a list",
        "weight",
        [[[1.0]] * N],
        "row 0 of the train dataset: column weight holds [1.0]",
    ),
    column(
        "no-weights",
        "an empty list",
        "weight",
        [[]],
        f"row 0 of the train dataset: column weight has 0 numbers for {N} tokens",
    ),
    column("weights-of-zero", "all 0: nothing is taught, and the weights stay finite", "weight", [0.0, 0.0]),
    column("a-large-weight", "1e30: clipped, and the weights stay finite", "weight", [1e30, 1.0]),
    column("true-for-a-weight", "booleans: 0 and 1", "weight", [True, False]),
    column(
        "nan-where-nothing-is-trained",
        "NaN at a masked token: not looked at",
        "weight",
        [[NAN] + [1.0] * (N - 1)] * 2,
        "row 0 of the train dataset: column weight holds",
    ),
    column(
        "critical-of-two",
        "2 in a mask",
        "critical",
        [[2] + [1] * (N - 1)],
        "row 0 of the train dataset: column critical holds 2; it is a mask of tokens, use 0 and 1",
    ),
    column(
        "critical-of-a-half",
        "0.5 in a mask",
        "critical",
        [[0.5] * N],
        "column critical holds 0.5; it is a mask of tokens",
    ),
    column("critical-in-words", "words in a mask", "critical", [["yes"] * N], "column critical holds 'yes'"),
    column("nothing-critical", "all 0: nothing is taught, and the weights stay finite", "critical", [[0] * N] * 2),
    column(
        "old-logps-for-a-row",
        "one number for a row",
        "old_logps",
        [-1.0],
        "column old_logps holds -1.0 for a whole row; it needs one number per token",
    ),
    column(
        "old-logps-above-zero",
        "a probability above 1",
        "old_logps",
        [[0.5] * N],
        "row 0 of the train dataset: column old_logps holds 0.5; a log-probability is 0 or less",
    ),
    column("old-logps-of-nan", "NaN", "old_logps", [[NAN] * N], "column old_logps holds", "must be finite"),
    column(
        "old-logps-of-minus-infinity",
        "a probability of 0",
        "old_logps",
        [[-INF] * N],
        "column old_logps holds",
        "must be finite",
    ),
    column(
        "old-logps-and-a-policy",
        "a column nobody would read",
        "old_logps",
        [[-1.0] * N],
        "has a column old_logps, but psft_refresh is 8",
        psft_refresh=8,
    ),
    column(
        "old-logps-far-below",
        "e^-200: the ratio is 0 or clipped, and the weights stay finite",
        "old_logps",
        [[-200.0] * N] * 2,
    ),
    column(
        "reference-in-words",
        "a word",
        "reference_logp",
        ["low", "high"],
        "reference_logp",
        target="iw-sft",
        weights="online",
    ),
    column(
        "reference-of-nan",
        "NaN",
        "reference_logp",
        [NAN, NAN],
        "column reference_logp holds",
        "must be finite",
        target="iw-sft",
        weights="online",
    ),
    column(
        "reference-above-zero",
        "a probability above 1",
        "reference_logp",
        [0.5, 0.5],
        "column reference_logp holds 0.5; a log-probability is 0 or less",
        target="iw-sft",
        weights="online",
    ),
    column(
        "reference-twice",
        "a column and a model",
        "reference_logp",
        [-1.0],
        "the reference is read from one of them: keep one",
        target="iw-sft",
        weights="online",
        reference_model_name_or_path="nowhere",
    ),
    column(
        "an-unknown-source",
        "a source without a target",
        "source",
        ["a", "c"],
        "row 1 of the train dataset: source is 'c', which targets does not name; add it there (it has a, b)",
        **TWO,
    ),
    column(
        "a-source-of-null",
        "null",
        "source",
        ["a", None],
        "row 1 of the train dataset: source is None, which targets does not name",
        **TWO,
    ),
    column(
        "no-source",
        "the column is missing",
        "other",
        ["a"],
        "has no column 'source'",
        "name the right one in source_column",
        **TWO,
    ),
    column(
        "kept-without-a-mask",
        "a denominator nobody knows",
        "weight",
        [1.0],
        "denominator is 'kept' with target sft",
        target="sft",
        denominator="kept",
    ),
]
