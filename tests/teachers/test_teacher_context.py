"""A teacher that reads another prompt: against its ids written out by hand and forwarded alone."""

import copy
import functools
import json

import pytest
import torch
from datasets import Dataset

import batch_layouts
import tiny_models
from batch_layouts import CASE, case_loss
from qtarget import ConfigError
from quick_runs import (
    assert_same_change,
    change_by_autograd,
    change_by_training,
    copied_weights,
    count_supervised,
    labels_of,
    largest_difference,
    logits_of,
    quick_config,
    quick_trainer,
    supervised_positions,
    tokenised_rows,
    train_quickly,
    weight_change,
)

LR = 0.3
LAYOUTS = {
    "padded": {},
    "padding_free": {"padding_free": True, "max_length": None},
    "bfd": {"packing": True, "max_length": 200},
}
MARKED = copy.deepcopy(tiny_models.tokenizer())
MARKED.chat_template = tiny_models.MARKED_TEMPLATE
ASKED = "Q: {{ prompt }} Say: {{ solution }}"
SAID = "Like {{ solution }}"


def asked(row, prompt=""):
    """``ASKED`` of a row."""
    return f"Q: {prompt} Say: {row['solution']}"


def said(row):
    return f"Like {row['solution']}"


def solved(data):
    """With a column that the teacher may read."""
    solutions = [tiny_models.SENTENCES[(3 * i + 2) % 8][: 9 + 4 * (i % 4)] for i in range(len(data))]
    return data.add_column("solution", solutions)


def chat(turns):
    return tiny_models.tokenizer().apply_chat_template(turns, add_generation_prompt=True)["input_ids"]


def says(role, content):
    return {"role": role, "content": content}


# -- each shape of rows: data, settings, and by hand ids, labels and what the teacher reads before the answer --------


def in_chat(row):
    """The last question of a prompt is asked otherwise."""
    *before, last = row["prompt"]
    return chat([*before, says("user", asked(row, last["content"]))])


def with_system(row):
    *before, last = row["prompt"]
    if before and before[0]["role"] == "system":
        system, before = before[0]["content"] + "\n\n" + said(row), before[1:]
    else:
        system = said(row)
    return chat([says("system", system), *before, last])


def with_both(row):
    *before, last = row["prompt"]
    return with_system({**row, "prompt": [*before, says("user", asked(row, last["content"]))]})


def rounds(rows=4):
    """Prompts of one or several turns, every other with a system message."""
    made = []
    for i, row in enumerate(tiny_models.conversation_dataset(rows)):
        earlier = [says("user", "Is 5 odd?"), says("assistant", tiny_models.SENTENCES[i][:12])] * (i % 3)
        system = [says("system", "Count.")] * (i % 2)
        made.append({**row, "prompt": [*system, *earlier, *row["prompt"]]})
    return Dataset.from_list(made)


def messages_by_hand(data):
    """Whole conversations; what the assistant says is trained, and the teacher's first question is another."""
    made = []
    for row in data:
        whole = MARKED.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = whole["input_ids"], whole["assistant_masks"]
        first = next(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
        before = in_chat({"prompt": row["messages"][:first], "solution": row["solution"]})
        labels = [token if own else -100 for token, own in zip(ids, mask, strict=True)]
        made.append({"input_ids": ids, "labels": labels, "before": before})
    return made


def prompts_by_hand(data):
    tokenizer = tiny_models.tokenizer()
    made = []
    for row in data:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        assert ids[: len(prompt)] == prompt, "nothing merges here"
        before = tokenizer(asked(row, row["prompt"]))["input_ids"]
        made.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :], "before": before})
    return made


PLAIN = "Say: {{ solution }}"


def before_all_of_it(data):
    """Text and token ids: what the teacher reads, then the row's own tokens up to the first that is trained."""
    made = []
    for row in tokenised_rows(data):
        first = first_of(row)
        context = tiny_models.tokenizer()(f"Say: {row['solution']}")["input_ids"]
        made.append({**row, "before": context + row["input_ids"][:first]})
    return made


def whole_words(rows=4):
    """Prompts that end before a space, where no token goes on."""
    made = []
    for i, sentence in enumerate(tiny_models.SENTENCES[:rows]):
        words = sentence.split(" ")
        made.append({"prompt": " ".join(words[: 3 + i % 2]), "completion": " " + " ".join(words[3 + i % 2 :])})
    return Dataset.from_list(made)


def tokens(rows_of):
    return Dataset.from_list(
        [{name: row[name] for name in ("input_ids", "labels", "solution")} for row in tokenised_rows(rows_of)]
    )


def each(before):
    return lambda data: [{**row, "before": before(row)} for row in tokenised_rows(data)]


SHAPES = {
    "prompt and completion": (tiny_models.conversation_dataset(4), ASKED, {}, each(in_chat)),
    "several turns": (rounds(), ASKED, {}, each(in_chat)),
    "system": (rounds(), {"system": SAID}, {}, each(with_system)),
    "system and prompt": (rounds(), {"prompt": ASKED, "system": SAID}, {}, each(with_both)),
    "messages": (tiny_models.message_dataset(5), ASKED, {"assistant_only_loss": True}, messages_by_hand),
    "plain prompt and completion": (whole_words(), ASKED, {}, prompts_by_hand),
    "text": (tiny_models.text_dataset(4), PLAIN, {}, before_all_of_it),
    "token ids": (tokens(solved(tiny_models.conversation_dataset(4))), PLAIN, {}, before_all_of_it),
}


def case_of(shape):
    """(data, settings, rows by hand)."""
    data, template, settings, by_hand = SHAPES[shape]
    if "solution" not in data.column_names:
        data = solved(data)
    return data, {"teacher_context": template, **settings}, by_hand(data)


@pytest.fixture
def marked(monkeypatch):
    """The same tokenizer with a chat template that marks the assistant's tokens."""
    monkeypatch.setattr(tiny_models, "tokenizer", lambda extra="": MARKED)


# -- the teacher by hand ---------------------------------------------------------------------------


def first_of(row):
    """The first label that is trained."""
    return int(supervised_positions(row)[0]) + 1


def teacher():
    return tiny_models.trained_model(seed=7, width=48).double().eval()


def reading(model):
    """A function of a row: the model's logits for the labels that are trained, after its own prompt."""

    def logits(row):
        first = first_of(row)
        ids = row["before"] + row["input_ids"][first:]
        places = supervised_positions(row) + 1 - first + len(row["before"]) - 1
        return model(input_ids=torch.tensor([ids])).logits[0, places]

    return logits


def by_hand(name, made, other=None, **more):
    """``change_by_autograd`` with a teacher that reads its own ids."""

    def loss(logits, labels, reference_logits, **given):
        return case_loss(name)(logits, labels, **{**given, "teacher_logits": reference_logits})

    made = [row for row in made if count_supervised([row])]
    return change_by_autograd(
        tiny_models.trained_model().double(), made, loss, reference=other or reading(teacher()), **more
    )


def by_trainer(name, data, layout, accumulation, folder, other=True, drawn=None, **settings):
    """How far one step moves the weights. ``drawn``: numbers of the prepared rows, in place of each once."""
    made = quick_trainer(
        tiny_models.trained_model().double(),
        folder,
        data,
        target={"preset": CASE[name].preset, **CASE[name].hyperparameters},
        teacher_model=teacher() if other else None,
        **{**LAYOUTS[layout], **settings},
    )
    if drawn is not None:
        made.train_dataset = made.train_dataset.select(drawn)
    batch_layouts.in_one_step(made, accumulation)
    before = copied_weights(made.model)
    made.train()
    return weight_change(before, made.model)


@functools.cache
def wanted(name, shape):
    return by_hand(name, case_of(shape)[2])


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_rows(shape, tmp_path, request):
    if shape == "messages":
        request.getfixturevalue("marked")
    data, settings, made = case_of(shape)
    same = teacher()
    own = by_hand("target-sft", made, other=lambda row: logits_of(same, row))
    assert largest_difference(own, wanted("target-sft", shape))[0] > 1e-2, "the context changes nothing"
    for layout, accumulation in (("padded", 1), ("padding_free", 2), ("bfd", 2)):
        got = by_trainer("target-sft", data, layout, accumulation, tmp_path, **settings)
        assert_same_change(got, wanted("target-sft", shape))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_distillation_in_every_layout(layout, accumulation, tmp_path):
    data, settings, _ = case_of("several turns")
    got = by_trainer("kd", data, layout, accumulation, tmp_path, **settings)
    assert_same_change(got, wanted("kd", "several turns"))


def test_a_position_too_early_is_noticed():
    """Mutant: the teacher's word on the token before."""
    made = case_of("several turns")[2]
    late = by_hand("kd", [{**row, "before": row["before"][:-1]} for row in made])
    assert largest_difference(late, wanted("kd", "several turns"))[0] > 1e-2


@pytest.mark.parametrize("split", [6, 9, 12])
def test_a_plain_prompt_cut_anywhere(split, tmp_path):
    """Where a token goes on over the cut, TRL ends the prompt before it; else the answer begins after the prompt."""
    data = solved(
        Dataset.from_list([{"prompt": s[:split], "completion": s[split:]} for s in tiny_models.SENTENCES[:4]])
    )
    tokenizer = tiny_models.tokenizer()
    made = []
    for row in data:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        same = [a == b for a, b in zip(prompt, ids, strict=False)]
        first = same.index(False) if False in same else len(prompt)
        before = tokenizer(asked(row, row["prompt"]))["input_ids"]
        made.append({"input_ids": ids, "labels": [-100] * first + ids[first:], "before": before})
    got = by_trainer("target-sft", data, "padded", 1, tmp_path, teacher_context=ASKED)
    assert_same_change(got, by_hand("target-sft", made))


def test_a_text_as_the_dataset_holds_it(tmp_path):
    """A template over the row's own text reads no end token that the dataset does not hold."""
    data = tiny_models.text_dataset(4)
    made = [
        {**row, "before": tiny_models.tokenizer()(f"A: {row['text']} B:")["input_ids"] + row["input_ids"][:1]}
        for row in tokenised_rows(data)
    ]
    got = by_trainer("target-sft", data, "padded", 1, tmp_path, teacher_context="A: {{ text }} B:")
    assert_same_change(got, by_hand("target-sft", made))


def test_a_template_that_begins_with_a_column(tmp_path):
    data = tiny_models.conversation_dataset(4)
    got = by_trainer("target-sft", data, "padded", 2, tmp_path, teacher_context="{{ prompt }} Think.")
    made = [
        {**row, "before": chat([says("user", row["prompt"][0]["content"] + " Think.")])} for row in tokenised_rows(data)
    ]
    assert_same_change(got, by_hand("target-sft", made))


@pytest.mark.parametrize("template", [ASKED, {"prompt": ASKED}, json.dumps({"prompt": ASKED})], ids=str)
def test_text_a_mapping_or_json(template, tmp_path):
    data, _, made = case_of("prompt and completion")
    got = by_trainer("target-sft", data, "padded", 2, tmp_path, teacher_context=template)
    assert_same_change(got, by_hand("target-sft", made))


def test_columns_of_a_conversation(tmp_path):
    """Messages of the answer, a loop and a condition."""
    template = "A: {% for m in completion if m.role == 'assistant' %}{{ m['content'] }}{% endfor %} {{ prompt }}"
    data = tiny_models.conversation_dataset(4)
    made = []
    for row in tokenised_rows(data):
        content = f"A: {row['completion'][0]['content']} {row['prompt'][0]['content']}"
        made.append({**row, "before": chat([says("user", content)])})
    got = by_trainer("target-sft", data, "padded", 2, tmp_path, teacher_context=template)
    assert_same_change(got, by_hand("target-sft", made))


TOOLS = [{"name": "add"}, {"name": "count"}]
WITH_TOOLS = "{% if tools %}{% for tool in tools %}{{ tool['name'] }} {% endfor %}{% endif %}" + tiny_models.TEMPLATE


@pytest.mark.parametrize("written", ["list", "JSON"])
def test_tools(written, tmp_path, monkeypatch):
    """The teacher's prompt names the same tools, however the dataset writes them."""
    tokenizer = copy.deepcopy(tiny_models.tokenizer())
    tokenizer.chat_template = WITH_TOOLS
    monkeypatch.setattr(tiny_models, "tokenizer", lambda extra="": tokenizer)
    data, made = [], []
    for row in solved(tiny_models.conversation_dataset(4)):
        prompt, whole = row["prompt"], row["prompt"] + row["completion"]
        other = [says("user", asked(row, prompt[0]["content"]))]
        begin, before = (
            tokenizer.apply_chat_template(turns, tools=TOOLS, add_generation_prompt=True)["input_ids"]
            for turns in (prompt, other)
        )
        ids = tokenizer.apply_chat_template(whole, tools=TOOLS)["input_ids"]
        made.append({"input_ids": ids, "labels": [-100] * len(begin) + ids[len(begin) :], "before": before})
        data.append({**row, "tools": TOOLS if written == "list" else json.dumps(TOOLS)})
    got = by_trainer("target-sft", Dataset.from_list(data), "padded", 2, tmp_path, teacher_context=ASKED)
    assert_same_change(got, by_hand("target-sft", made))


# -- cutting, repeating, steps ---------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["padded", "bfd"])
@pytest.mark.parametrize("shape", ["prompt and completion", "messages", "text"])
def test_rows_that_are_cut(shape, layout, tmp_path, request):
    """At a length where some rows end early and others have nothing left to train."""
    if shape == "messages":
        request.getfixturevalue("marked")
    data, settings, made = case_of(shape)
    length = {"prompt and completion": 32, "messages": 45, "text": 12}[shape]
    cut = [{**row, "input_ids": row["input_ids"][:length], "labels": row["labels"][:length]} for row in made]
    assert 0 < count_supervised(cut) < count_supervised(made)
    got = by_trainer("target-sft", data, layout, 1, tmp_path, **settings, max_length=length)
    assert_same_change(got, by_hand("target-sft", cut))


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated")
def test_rows_whose_beginning_is_cut(tmp_path):
    """The teacher still reads its whole prompt."""
    data, settings, made = case_of("prompt and completion")
    length = 30
    cut = [{**row, "input_ids": row["input_ids"][-length:], "labels": row["labels"][-length:]} for row in made]
    assert any(len(row["input_ids"]) > length for row in made)
    made = [row if row["labels"][0] == -100 else {**row, "before": row["before"] + row["input_ids"][:1]} for row in cut]
    got = by_trainer(
        "target-sft", data, "padded", 1, tmp_path, **settings, max_length=length, truncation_mode="keep_end"
    )
    assert_same_change(got, by_hand("target-sft", made))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_twice_in_the_dataset(layout, tmp_path):
    data, settings, made = case_of("prompt and completion")
    order = [0, 0, 1, 2, 2, 2]
    got = by_trainer("target-sft", data.select(order), layout, 1, tmp_path, **settings)
    assert_same_change(got, by_hand("target-sft", [made[i] for i in order]))


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
def test_a_row_twice_in_a_batch(layout, tmp_path):
    """As a sampler draws it: in one line without padding it follows itself."""
    data, settings, made = case_of("prompt and completion")
    order = [0, 0, 0, 0]
    got = by_trainer("target-sft", data, layout, 1, tmp_path, drawn=order, **settings)
    assert_same_change(got, by_hand("target-sft", [made[0]]))


def test_two_rows_of_one_prompt(tmp_path):
    """The same student's ids under two contexts: rows are told apart by number, not by what they hold."""
    data, settings, made = case_of("prompt and completion")
    twins = Dataset.from_list([{**row, "solution": text} for row in data.select([0, 1]) for text in ("7", "It is 9.")])
    made = each(in_chat)(twins)
    assert made[0]["input_ids"] == made[1]["input_ids"] and made[0]["before"] != made[1]["before"]
    got = by_trainer("target-sft", twins, "padded", 2, tmp_path, **settings)
    assert_same_change(got, by_hand("target-sft", made))


def test_tokens_between_that_are_not_trained(tmp_path):
    """Of an answer whose beginning is masked the teacher reads the beginning too."""
    made = [dict(row) for row in tokenised_rows(solved(tiny_models.conversation_dataset(4)))]
    for row in made:
        first = first_of(row)
        row["labels"] = [*row["labels"][:first], -100, -100, *row["labels"][first + 2 :]]
    data = Dataset.from_list(made)
    wrong = by_hand("target-sft", each(in_chat)(data))
    made = [{**row, "before": in_chat(row) + row["input_ids"][first_of(row) - 2 : first_of(row)]} for row in made]
    wanted = by_hand("target-sft", made)
    assert largest_difference(wrong, wanted)[0] > 1e-2
    got = by_trainer("target-sft", data, "padded", 1, tmp_path, teacher_context=ASKED)
    assert_same_change(got, wanted)


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
def test_a_batch_without_a_trained_token(layout, tmp_path):
    """One row at a time, one of them with nothing to teach and a solution that is missing."""
    made = [dict(row) for row in tokenised_rows(solved(tiny_models.conversation_dataset(4)))]
    made[1] = {**made[1], "labels": [-100] * len(made[1]["labels"]), "solution": None}
    got = by_trainer("target-sft", Dataset.from_list(made), layout, 4, tmp_path, teacher_context=ASKED, max_length=None)
    assert_same_change(got, by_hand("target-sft", [{**row, "before": in_chat(row)} for row in made]))


def steps_by_hand(made, steps):
    """The teacher is the student as it is before each step."""
    model = tiny_models.trained_model().double().eval()
    before = copied_weights(model)
    for _ in range(steps):
        now = copy.deepcopy(model)

        def loss(logits, labels, reference_logits, **given):
            return case_loss("target-sft")(logits, labels, **{**given, "teacher_logits": reference_logits})

        change_by_autograd(model, made, loss, reference=reading(now), lr=LR)
    return weight_change(before, model)


STEPS = {"max_steps": 2, "num_train_epochs": 9, "learning_rate": LR}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_student_with_the_solution_in_view(layout, tmp_path):
    data, settings, made = case_of("several turns")
    got = by_trainer("target-sft", data, layout, 2, tmp_path, other=False, teacher_ema_decay=0, **settings, **STEPS)
    assert_same_change(got, steps_by_hand(made, 2))


@pytest.mark.parametrize("named", [True, False], ids=["by name", "as a model"])
def test_the_start_with_the_solution_in_view(named, tmp_path):
    data, settings, made = case_of("prompt and completion")
    folder = str(tmp_path / "start")
    tiny_models.trained_model().save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    name = {"teacher_model_name_or_path": folder, "teacher_model_init_kwargs": {"dtype": "float64"}}
    got = change_by_training(
        tiny_models.trained_model().double(),
        tmp_path / "out",
        data,
        target="target-sft",
        teacher_model=None if named else tiny_models.trained_model().double(),
        **(name if named else {}),
        **settings,
        **STEPS,
    )
    start = tiny_models.trained_model().double().eval()
    assert_same_change(got, by_hand("target-sft", made, other=reading(start), steps=2, lr=LR))


def test_a_pool_with_the_solution_in_view(tmp_path):
    data, settings, made = case_of("prompt and completion")
    shares = {}
    for seed, share in ((7, 0.7), (9, 0.3)):
        shares[str(tmp_path / str(seed))] = share
        tiny_models.trained_model(seed=seed).save_pretrained(tmp_path / str(seed))
        tiny_models.tokenizer().save_pretrained(tmp_path / str(seed))
    teachers = [
        {"model_name_or_path": name, "weight": share, "init_kwargs": {"dtype": "float64"}}
        for name, share in shares.items()
    ]
    got = by_trainer("kd", data, "padded", 2, tmp_path / "out", other=False, teachers=teachers, **settings)
    read = [
        (share, reading(tiny_models.trained_model(seed=seed).double().eval())) for seed, share in ((7, 0.7), (9, 0.3))
    ]
    assert_same_change(got, by_hand("kd", made, other=lambda row: sum(w * logits(row) for w, logits in read)))


def test_evaluation_sets_have_contexts_of_their_own(tmp_path):
    data, settings, _ = case_of("prompt and completion")
    others = {
        "one": solved(tiny_models.conversation_dataset(8)).select([5, 6, 7]),
        "two": solved(tiny_models.conversation_dataset(6)).select([4, 5]),
    }
    made = quick_trainer(
        tiny_models.trained_model().double(),
        tmp_path,
        data,
        eval_dataset=others,
        target="kd",
        teacher_model=teacher(),
        **settings,
    )
    metrics = made.evaluate()
    student, read = tiny_models.trained_model().double().eval(), reading(teacher())
    for name, other in others.items():
        with torch.no_grad():
            losses = [
                CASE["kd"].loss(logits_of(student, row), labels_of(row), {"teacher_logits": read(row)})
                for row in each(in_chat)(other)
            ]
        assert metrics[f"eval_{name}_loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_worker_processes_that_prepare_rows(tmp_path):
    data, settings, _ = case_of("prompt and completion")
    got = by_trainer("target-sft", data, "padded", 1, tmp_path, dataset_num_proc=2, shuffle_dataset=True, **settings)
    assert_same_change(got, wanted("target-sft", "prompt and completion"))


# -- what is refused -------------------------------------------------------------------------------


def refused(match, call):
    """One sentence on what is wrong."""
    with pytest.raises(ConfigError, match=match) as error:
        call()
    (fault,) = error.value.faults
    assert "\n" not in fault
    return fault


def attempt(folder, data=None, template=ASKED, **settings):
    data = solved(tiny_models.conversation_dataset(4)) if data is None else data
    return train_quickly(
        tiny_models.trained_model(),
        folder,
        data,
        target="kd",
        teacher_model=tiny_models.trained_model(seed=7),
        teacher_context={"prompt": template} if isinstance(template, str) else template,
        **settings,
    )


def test_a_column_that_is_not_there(tmp_path):
    told = refused(
        r"^row 0 of the train dataset: teacher_context\.prompt: 'solutoin' is undefined; the rows have .*solution",
        lambda: attempt(tmp_path, template="{{ solutoin }}"),
    )
    assert all(name in told for name in ("prompt", "completion", "solution")), told
    refused(
        r"^row 0 of the train dataset: teacher_context\.prompt: 'prompt' is undefined; the rows have .*text",
        lambda: attempt(tmp_path, solved(tiny_models.text_dataset(4))),
    )


def test_prompts_that_are_trained(tmp_path):
    told = (
        r"^row 0 of the train dataset: teacher_context replaces the prompt, but tokens of the prompt are supervised; "
    )
    for data in (solved(tiny_models.conversation_dataset(4)), solved(whole_words())):
        refused(
            told + "set completion_only_loss or assistant_only_loss$",
            lambda data=data: attempt(tmp_path, data, completion_only_loss=False),
        )
    refused(told, lambda: attempt(tmp_path, solved(tiny_models.message_dataset(4))))


def test_a_system_message_for_plain_text(tmp_path):
    told = r"^row 0 of the train dataset: teacher_context\.system is set, but rows of plain text have no system message"
    for data in (
        solved(tiny_models.text_dataset(4)),
        solved(whole_words()),
        tokens(solved(tiny_models.conversation_dataset(4))),
    ):
        refused(told, lambda data=data: attempt(tmp_path, data, {"system": SAID}))


def test_no_question_to_ask_otherwise(tmp_path):
    row = {"prompt": [says("system", "Count.")], "completion": [says("assistant", "1, 2, 3.")]}
    refused(
        r"^row 0 of the train dataset: teacher_context\.prompt is set, but a row has no user message before its answer$",
        lambda: attempt(tmp_path, solved(Dataset.from_list([row] * 2))),
    )


@pytest.mark.parametrize("strategy", ["wrapped", "bfd_split"])
def test_rows_that_go_on_in_the_next_sequence(strategy, tmp_path):
    refused(
        rf"^packing_strategy is '{strategy}', which continues a row in the next sequence, without its teacher_context "
        "before it; use bfd",
        lambda: attempt(tmp_path, packing=True, packing_strategy=strategy, max_length=64),
    )


def test_a_stream(tmp_path):
    refused(
        r"^dataset_streaming is on with teacher_context, which stores its texts with the rows; read the dataset whole",
        lambda: attempt(tmp_path, solved(tiny_models.conversation_dataset(4)).to_iterable_dataset()),
    )


def test_rows_that_are_not_prepared(tmp_path):
    refused(
        r"^dataset_kwargs\.skip_prepare_dataset is on, but teacher_cache and teacher_context find the teacher of a row "
        r"while rows are prepared; leave it out$",
        lambda: attempt(
            tmp_path,
            tokens(solved(tiny_models.conversation_dataset(4))),
            PLAIN,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
    )


def test_rows_that_are_packed_already(tmp_path):
    packed = attempt(tmp_path, packing=True, max_length=128).train_dataset
    packed = packed.select_columns(["input_ids", "labels", "seq_lengths"])
    refused(
        r"^the train dataset is packed already \(column seq_lengths\), so its teacher cannot be found row by row; give",
        lambda: attempt(tmp_path, packed.add_column("solution", ["x"] * len(packed)), PLAIN, packing=True),
    )


@pytest.mark.parametrize(
    "template, told",
    [
        ("{{ prompt ", r"^teacher_context\.prompt is not a template: .*; the syntax is Jinja's$"),
        ({"system": "{% if %}"}, r"^teacher_context\.system is not a template: .*; the syntax is Jinja's$"),
        ({"sistem": "x"}, r"^teacher_context's key is 'sistem'; did you mean 'system'"),
        ({"prompt": ""}, r"^teacher_context\.prompt is ''; write a template"),
        ({"prompt": 3}, r"^teacher_context\.prompt is 3; write a template"),
        ({}, r"^teacher_context is \{\}; write text, or \{system: text, prompt: text\}$"),
        ("", r"^teacher_context\.prompt is ''; write a template"),
        (["x"], r"^teacher_context is \['x'\]; write text"),
    ],
    ids=str,
)
def test_a_template_that_cannot_be_read(template, told, tmp_path):
    """Seen before weights are loaded."""
    refused(
        told,
        lambda: quick_config(tmp_path, target="kd", teacher_model_name_or_path="no/such", teacher_context=template),
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ prompt.__class__.__mro__ }}",
        "{{ prompt.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'] }}",
        "{{ (prompt|attr('__class__')).__name__ }}",
        "{{ '%s'.format.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format(prompt) }}",
        "{{ completion.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include '/etc/hostname' %}",
        "{% import 'os' as os %}{{ os }}",
    ],
    ids=str,
)
def test_a_template_that_looks_behind_the_row(template, tmp_path):
    fault = refused(
        r"^row 0 of the train dataset: teacher_context\.prompt.*", lambda: attempt(tmp_path, None, template)
    )
    assert "<class" not in fault


@pytest.mark.parametrize("template", ["{{ prompt + 3 }}", "{{ 1 // 0 }}", "{{ prompt | batch }}", "{{ range(10**9) }}"])
def test_a_template_that_fails_on_a_row(template, tmp_path):
    refused(
        r"^row 0 of the train dataset: teacher_context\.prompt cannot be filled in: ",
        lambda: attempt(tmp_path, None, template),
    )
