"""What is trained and what is not: labels, masks, templates, cuts."""

from __future__ import annotations

from typing import Any

from bad_rows import ANSWER, GOOD, IDS, USER, case_of_rows, talk
from bench import Case

N = len(IDS)


def tokens(**columns: Any) -> dict[str, Any]:
    return {"input_ids": IDS, **columns}


def of_classes(column: str, *values: Any, **row: Any) -> Case:
    """Raw rows beside a column that holds numbers of tokens where there are input_ids."""
    rows = [{**(row or {"text": "Tom has 3 apples."}), column: value} for value in values]
    shape = "-".join(row) or "text"
    id = f"{column}-beside-{shape}-{'-'.join(map(str, values))}"
    says = f"the train dataset has a column {column!r} and no input_ids", "rename it or drop it"
    return case_of_rows(id, f"{column} of rows that are not tokenised", rows, *says)


CASES = [
    of_classes("labels", [27], [2]),
    of_classes("labels", [2, 14], [3], [1, 2]),
    of_classes("labels", 3, 1),
    of_classes("labels", "joy", "grief"),
    of_classes("labels", None, [1]),
    of_classes("labels", ["joy"], ["grief"]),
    of_classes("labels", 1, 0, messages=[USER, ANSWER]),
    of_classes("labels", [1], [0], prompt="1 + 1?", completion="2"),
    of_classes("completion_mask", [0, 1], [1]),
    of_classes("assistant_masks", [0, 1], [1], messages=[USER, ANSWER]),
    of_classes("seq_lengths", [5], [7]),
    of_classes("attention_mask", [1, 1], [1]),
    case_of_rows(
        "hidden-between-tokens",
        "an attention mask with a hole",
        [tokens(attention_mask=[1] * N), tokens(attention_mask=[0, 1, 0, *[1] * (N - 4), 0])],
        "row 1 of the train dataset: attention_mask hides token 2 between others",
    ),
    case_of_rows(
        "an-attention-mask-too-short",
        "an attention mask of another length",
        [tokens(attention_mask=[1] * (N - 1))] * 2,
        f"row 0 of the train dataset: attention_mask has {N - 1} entries for {N} input_ids",
    ),
    case_of_rows(
        "an-attention-mask-of-two",
        "2 in an attention mask",
        [tokens(attention_mask=[2] * N)] * 2,
        "row 0 of the train dataset: attention_mask holds 2; write 0 and 1",
    ),
    case_of_rows(
        "an-attention-mask-of-rows",
        "a square attention mask",
        [tokens(attention_mask=[[1] * N] * N)] * 2,
        "row 0 of the train dataset: attention_mask holds [1, 1",
        "write 0 and 1",
    ),
    case_of_rows(
        "an-attention-mask-that-shows-nothing",
        "rows of nothing but padding",
        [tokens(attention_mask=[0] * N)] * 2,
        "the train dataset has no supervised token",
    ),
    case_of_rows(
        "hidden-in-packed-rows",
        "padding in rows that are packed already",
        [tokens(labels=IDS, seq_lengths=[8, 12], attention_mask=[1] * (N - 1) + [0])] * 2,
        "row 0 of the train dataset: attention_mask hides token 19",
        packing=True,
        max_length=20,
    ),
    *(
        case_of_rows(
            f"the-completion-of-{name}",
            "the completion's loss alone, of rows without one",
            [row] * 2,
            f"completion_only_loss is true, but the rows of the train dataset are {name}",
            "prompt and completion",
            "assistant_only_loss",
            completion_only_loss=True,
            **how,
        )
        for name, row, how in (
            ("text", {"text": "a b c"}, {}),
            ("messages", talk(USER, ANSWER), {}),
            ("conversations", {"conversations": [USER, ANSWER]}, {}),
            ("words", {"words": "a b c"}, {"dataset_text_field": "words"}),
        )
    ),
    case_of_rows(
        "the-completion-of-a-stream",
        "the completion's loss alone, of a stream of text",
        [{"text": "a b c"}] * 2,
        "completion_only_loss is true, but the rows of the train dataset are text",
        completion_only_loss=True,
        dataset_streaming=True,
    ),
    case_of_rows(
        "the-completion-of-token-ids",
        "the completion's loss alone, of token ids without a mask",
        [tokens()] * 2,
        "completion_only_loss is true, but the rows of the train dataset are input_ids",
        "completion_mask, or labels",
        completion_only_loss=True,
    ),
    case_of_rows(
        "the-assistant-of-a-prompt-as-text",
        "the assistant's part of prompt and completion as text",
        [{"prompt": "1 + 1?", "completion": "2"}] * 2,
        "assistant_only_loss",
        assistant_only_loss=True,
    ),
    case_of_rows(
        "nothing-trained",
        "every label is -100",
        [tokens(labels=[-100] * N)] * 2,
        "the train dataset has no supervised token",
        "max_length",
    ),
    case_of_rows(
        "only-the-first",
        "a label at position 0, which nothing predicts",
        [tokens(labels=[IDS[0], *[-100] * (N - 1)])] * 2,
        "the train dataset has no supervised token",
    ),
    case_of_rows(
        "one-token-trained", "one supervised token in all: it is trained", [tokens(labels=[*[-100] * (N - 1), IDS[-1]])]
    ),
    case_of_rows(
        "nothing-of-one-row",
        "a row without labels beside a good one: dropped, and said",
        [tokens(labels=[-100] * N), tokens(labels=IDS)],
    ),
    case_of_rows(
        "everything-cut", "prompts that fill max_length", [GOOD] * 2, "no supervised token", "max_length", max_length=4
    ),
    case_of_rows(
        "a-mask-too-short",
        "a completion mask of another length",
        [tokens(completion_mask=[0] * (N - 3) + [1])] * 2,
        "row 0 of the train dataset: completion_mask has 18 entries for 20 input_ids",
        completion_only_loss=True,
    ),
    case_of_rows(
        "a-mask-of-words",
        "words in a mask",
        [tokens(completion_mask=["yes"] * N)] * 2,
        "row 0 of the train dataset: completion_mask holds 'yes'; write 0 and 1",
        completion_only_loss=True,
    ),
    case_of_rows(
        "a-mask-of-two",
        "2 in a mask",
        [tokens(completion_mask=[0] * (N - 1) + [2])] * 2,
        "row 0 of the train dataset: completion_mask holds 2; write 0 and 1",
        completion_only_loss=True,
    ),
    case_of_rows(
        "a-mask-of-nothing",
        "a completion mask of zeros",
        [tokens(completion_mask=[0] * N)] * 2,
        "the train dataset has no supervised token",
        completion_only_loss=True,
    ),
    case_of_rows(
        "an-assistant-mask-of-nothing",
        "an assistant mask of zeros",
        [tokens(assistant_masks=[0] * N)] * 2,
        "has no {% generation %} markers",
        assistant_only_loss=True,
    ),
    case_of_rows(
        "an-assistant-mask-too-long",
        "an assistant mask of another length",
        [tokens(assistant_masks=[1] * (N + 1))] * 2,
        "row 0 of the train dataset: assistant_masks has 21 entries for 20 input_ids",
    ),
    case_of_rows(
        "no-markers",
        "a template that does not mark the assistant",
        [talk(USER, ANSWER)] * 2,
        "the chat template has no {% generation %} markers",
        assistant_only_loss=True,
    ),
    case_of_rows(
        "assistant-of-text",
        "the assistant's part of plain text",
        [{"text": "a b c"}] * 2,
        "assistant_only_loss",
        assistant_only_loss=True,
    ),
    case_of_rows(
        "packed-under-ones",
        "documents that would see each other",
        [tokens(labels=IDS, seq_lengths=[8, 12])] * 2,
        "is packed (column seq_lengths)",
        "all-ones mask",
    ),
    case_of_rows(
        "packed-lengths-that-differ",
        "lengths that do not add up",
        [tokens(labels=IDS, seq_lengths=[8, 8])] * 2,
        "row 0 of the train dataset: seq_lengths sum to 16 for 20 input_ids",
        packing=True,
        max_length=20,
    ),
    case_of_rows(
        "packing-without-a-length",
        "no length of a packed sequence",
        [GOOD] * 4,
        "max_length",
        packing=True,
        max_length=None,
    ),
    case_of_rows(
        "padding-free-with-a-length", "padding_free cuts nothing", [GOOD] * 2, "max_length", padding_free=True
    ),
    case_of_rows(
        "packing-rows-that-are-too-long",
        "rows longer than a packed sequence: cut, and trained",
        [GOOD] * 4,
        packing=True,
        max_length=30,
    ),
    case_of_rows(
        "a-stream-without-an-end", "no number of steps", [GOOD] * 4, "max_steps", dataset_streaming=True, max_steps=-1
    ),
    case_of_rows(
        "a-bad-row-in-a-stream",
        "the second row is null",
        [GOOD, {**GOOD, "completion": None}],
        "row 1 of the train dataset: completion is None",
        dataset_streaming=True,
        reads=True,
    ),
    case_of_rows(
        "a-bad-id-in-a-stream",
        "the second row is of another vocabulary",
        [tokens(labels=IDS), {"input_ids": [9999] * 5, "labels": [5] * 5}],
        "row 1 of the train dataset: input_ids holds 9999",
        dataset_streaming=True,
        reads=True,
    ),
    Case(
        "an-eos-that-is-no-token",
        "an end that is not in the vocabulary",
        lambda b: b.train(eos_token="<none>"),
        ("eos_token", "<none>"),
    ),
    Case(
        "a-pad-that-is-no-token",
        "padding that is not in the vocabulary",
        lambda b: b.train(pad_token="<none>"),
        ("pad_token", "<none>"),
    ),
]
