"""Teachers whose texts end otherwise, and teachers whose vocabulary is not quite the student's."""

import copy
import functools
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import batch_layouts
import tiny_models
from batch_layouts import CASE, case_loss
from published import sft
from qtarget import ConfigError, QTargetTrainer
from quick_runs import (
    assert_same_change,
    change_by_autograd,
    change_by_training,
    copied_weights,
    count_supervised,
    largest_difference,
    logits_of,
    quick_config,
    quick_trainer,
    tokenised_rows,
    weight_change,
)

REAL = len(tiny_models.tokenizer())
ENDS = tiny_models.tokenizer().convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
DOUBLE = {"teacher_model_init_kwargs": {"dtype": "float64"}}
LR = 0.3
TWO = {"max_steps": 2, "num_train_epochs": 9, "learning_rate": LR}


def saved(model, folder, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def target_of(name):
    return {"preset": CASE[name].preset, **CASE[name].hyperparameters}


def refused(match, call):
    """One sentence on what is wrong."""
    with pytest.raises(ConfigError, match=match) as error:
        call()
    (fault,) = error.value.faults
    assert "\n" not in fault
    return fault


# -- end tokens ------------------------------------------------------------------------------------

CHAT = tiny_models.tokenizer()
BASE = copy.deepcopy(CHAT)
BASE.eos_token = "<|endoftext|>"


def teacher():
    return tiny_models.trained_model(seed=7, width=48)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Teachers that end a text as a chat model and as a base model."""
    folder = tmp_path_factory.mktemp("ends")
    return {
        "chat": saved(teacher(), folder / "chat", CHAT),
        "base": saved(tiny_models.trained_model(seed=9, width=48), folder / "base", BASE),
    }


@pytest.fixture
def base(monkeypatch):
    """A student whose texts end with the end of text."""
    monkeypatch.setattr(tiny_models, "tokenizer", lambda extra="": BASE)


def ended(data):
    """The rows by hand; each ends with the student's end token."""
    made = tokenised_rows(data)
    assert all(row["labels"][-1] == ENDS[0] and ENDS[1] not in row["labels"] for row in made)
    return made


class Exchanged:
    """The teacher with the logits of the two end tokens exchanged."""

    def __init__(self, model):
        self.model = model

    def __call__(self, input_ids):
        logits = self.model(input_ids=input_ids).logits.clone()
        logits[..., ENDS] = logits[..., ENDS[::-1]]
        return SimpleNamespace(logits=logits)


def label_alone(name):
    """The target's loss, and plain SFT's where the label is the student's end token."""

    def loss(logits, labels, **given):
        return torch.where(labels == ENDS[0], sft(logits, labels), case_loss(name)(logits, labels, **given))

    return loss


@functools.cache
def by_hand(name, setting):
    assert tiny_models.tokenizer() is BASE
    model = teacher().double().eval()
    return change_by_autograd(
        tiny_models.trained_model().double(),
        ended(tiny_models.text_dataset(4)),
        label_alone(name) if setting == "label" else case_loss(name),
        lr=LR,
        steps=2,
        teacher=Exchanged(model) if setting == "map" else model,
    )


def test_the_three_differ(base):
    for name in ("kd", "target-sft"):
        for one, other in (("label", "map"), ("map", "keep"), ("keep", "label")):
            assert largest_difference(by_hand(name, one), by_hand(name, other))[0] > 1e-3


@pytest.mark.parametrize("setting", ["label", "map", "keep"])
@pytest.mark.parametrize("name", ["kd", "target-sft"])
def test_a_teacher_that_ends_otherwise(name, setting, base, folders, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "qtarget")
    got = change_by_training(
        tiny_models.trained_model().double(),
        tmp_path,
        tiny_models.text_dataset(4),
        target=target_of(name),
        teacher_model_name_or_path=folders["chat"],
        teacher_end_token=setting,
        **DOUBLE,
        **TWO,
    )
    assert_same_change(got, by_hand(name, setting))
    (told,) = [record.getMessage() for record in caplog.records if "teacher_end_token" in record.getMessage()]
    assert "'<|endoftext|>' (id 0)" in told and "'<|im_end|>' (id 2)" in told
    assert told.endswith(f"(teacher_end_token: {setting})") and "\n" not in told


def test_label_is_what_happens_unless_told_otherwise(base, folders, tmp_path):
    got = change_by_training(
        tiny_models.trained_model().double(),
        tmp_path,
        tiny_models.text_dataset(4),
        target="target-sft",
        teacher_model_name_or_path=folders["chat"],
        **DOUBLE,
        **TWO,
    )
    assert_same_change(got, by_hand("target-sft", "label"))


@pytest.mark.parametrize("setting", ["label", "map", "keep"])
def test_a_teacher_handed_over(setting, base, tmp_path):
    """How it ends is in its configuration."""
    model = teacher().double()
    model.config.eos_token_id = model.generation_config.eos_token_id = ENDS[1]
    got = change_by_training(
        tiny_models.trained_model().double(),
        tmp_path,
        tiny_models.text_dataset(4),
        target="target-sft",
        teacher_model=model,
        teacher_end_token=setting,
        **TWO,
    )
    assert_same_change(got, by_hand("target-sft", setting))


@pytest.mark.parametrize("layout", ["bfd", "padding_free"])
@pytest.mark.parametrize("setting", ["label", "map"])
def test_ends_in_the_middle_of_a_sequence(layout, setting, base, folders, tmp_path):
    made = quick_trainer(
        tiny_models.trained_model().double(),
        tmp_path,
        tiny_models.text_dataset(4),
        target="target-sft",
        teacher_model_name_or_path=folders["chat"],
        teacher_end_token=setting,
        **DOUBLE,
        **TWO,
        **batch_layouts.LAYOUTS[layout],
    )
    batch_layouts.in_one_step(made, 1)
    before = copied_weights(made.model)
    made.train()
    assert_same_change(weight_change(before, made.model), by_hand("target-sft", setting))


def test_what_evaluation_reports(base, folders, tmp_path):
    made = quick_trainer(
        tiny_models.trained_model().double(),
        tmp_path,
        tiny_models.text_dataset(4),
        eval_dataset=tiny_models.text_dataset(6),
        target="kd",
        teacher_model_name_or_path=folders["chat"],
        **DOUBLE,
    )
    model, student = teacher().double().eval(), tiny_models.trained_model().double().eval()
    with torch.no_grad():
        losses = torch.cat(
            [
                label_alone("kd")(
                    logits_of(student, row),
                    torch.tensor(row["labels"][1:]),
                    teacher_logits=logits_of(model, row),
                    vocab_size=REAL,
                )
                for row in ended(tiny_models.text_dataset(6))
            ]
        )
    assert made.evaluate()["eval_loss"] == pytest.approx(float(losses.mean()), rel=1e-5)


@pytest.mark.parametrize("student, name", [(BASE, "base"), (CHAT, "chat")], ids=["base", "chat"])
def test_the_same_end_is_left_alone(student, name, folders, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(tiny_models, "tokenizer", lambda extra="": student)
    caplog.set_level(logging.WARNING, "qtarget")
    model = {"base": tiny_models.trained_model(seed=9, width=48), "chat": teacher()}[name].double().eval()
    got = [
        change_by_training(
            tiny_models.trained_model().double(),
            tmp_path,
            tiny_models.text_dataset(4),
            target="target-sft",
            teacher_model_name_or_path=folders[name],
            teacher_end_token=setting,
            **DOUBLE,
        )
        for setting in ("keep", "label", "map")
    ]
    assert all(torch.equal(got[0][weight], other[weight]) for other in got[1:] for weight in got[0])
    assert_same_change(
        got[0],
        change_by_autograd(
            tiny_models.trained_model().double(),
            tokenised_rows(tiny_models.text_dataset(4)),
            case_loss("target-sft"),
            teacher=model,
        ),
    )
    assert not [record for record in caplog.records if "teacher_end_token" in record.getMessage()]


SOURCES = {"math": "target-sft", "chat": "sft", "old": "dft", "far": {"preset": "kd", "temperature": 2.0}}


def loss_by_source(source):
    name = {"far": "kd:temperature=2.0"}.get(source, SOURCES[source])
    return label_alone(name) if source in ("math", "far") else case_loss(name)


def by_source(made, model):
    """Each row with its source's loss; the end token is taught by its label alone where a teacher is asked."""

    def loss(logits, labels, reference_logits, **given):
        row, logits_of_teacher = reference_logits
        return loss_by_source(row["source"])(logits, labels, **{**given, "teacher_logits": logits_of_teacher})

    return change_by_autograd(
        tiny_models.trained_model().double(), made, loss, reference=lambda row: (row, logits_of(model, row))
    )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_only_sources_that_ask_a_teacher(accumulation, base, folders, tmp_path):
    data = tiny_models.text_dataset(8).add_column("source", [*SOURCES] * 2)
    made = quick_trainer(
        tiny_models.trained_model().double(),
        tmp_path,
        data,
        targets=SOURCES,
        teacher_model_name_or_path=folders["chat"],
        **DOUBLE,
    )
    batch_layouts.in_one_step(made, accumulation)
    before = copied_weights(made.model)
    made.train()
    wanted = by_source(ended(data), teacher().double().eval())
    assert_same_change(weight_change(before, made.model), wanted)
    renamed = [{**row, "source": {"old": "chat"}.get(row["source"], row["source"])} for row in ended(data)]
    assert largest_difference(by_source(renamed, teacher().double().eval()), wanted)[0] > 1e-3


def pooled(folders):
    return [
        {"model_name_or_path": folders[name], "weight": 0.5, "init_kwargs": {"dtype": "float64"}}
        for name in ("chat", "base")
    ]


def test_members_that_end_differently(base, folders, tmp_path):
    refused(
        r"^teacher_end_token is 'map', but the teachers end with different tokens \(.*\); use 'label'$",
        lambda: quick_trainer(
            tiny_models.trained_model(),
            tmp_path,
            tiny_models.text_dataset(4),
            target="kd",
            teachers=pooled(folders),
            teacher_end_token="map",
        ),
    )
    got = change_by_training(
        tiny_models.trained_model().double(),
        tmp_path,
        tiny_models.text_dataset(4),
        target="kd",
        teachers=pooled(folders),
    )
    one, other = teacher().double().eval(), tiny_models.trained_model(seed=9, width=48).double().eval()

    def both(input_ids):
        return SimpleNamespace(logits=(one(input_ids=input_ids).logits + other(input_ids=input_ids).logits) / 2)

    assert_same_change(
        got,
        change_by_autograd(
            tiny_models.trained_model().double(), ended(tiny_models.text_dataset(4)), label_alone("kd"), teacher=both
        ),
    )


def test_members_that_end_alike(base, folders, tmp_path):
    """Exchanged in the pool as in one teacher."""
    shares = {folders["chat"]: 0.6, saved(tiny_models.trained_model(seed=9, width=48), tmp_path / "second", CHAT): 0.4}
    teachers = [
        {"model_name_or_path": name, "weight": share, "init_kwargs": {"dtype": "float64"}}
        for name, share in shares.items()
    ]
    got = change_by_training(
        tiny_models.trained_model().double(),
        tmp_path / "out",
        tiny_models.text_dataset(4),
        target="kd",
        teachers=teachers,
        teacher_end_token="map",
        **TWO,
    )
    one, other = teacher().double().eval(), tiny_models.trained_model(seed=9, width=48).double().eval()

    def both(input_ids):
        logits = 0.6 * one(input_ids=input_ids).logits + 0.4 * other(input_ids=input_ids).logits
        return SimpleNamespace(logits=logits)

    wanted = change_by_autograd(
        tiny_models.trained_model().double(),
        ended(tiny_models.text_dataset(4)),
        case_loss("kd"),
        lr=LR,
        steps=2,
        teacher=Exchanged(both),
    )
    assert_same_change(got, wanted)


def test_the_student_as_teacher_ends_as_it_does(base, tmp_path, caplog):
    """Whatever its configuration says."""
    model = tiny_models.trained_model().double()
    model.config.eos_token_id = ENDS[1]
    caplog.set_level(logging.WARNING, "qtarget")
    got = change_by_training(model, tmp_path, tiny_models.text_dataset(4), target="target-sft", teacher_ema_decay=0)
    assert not [record for record in caplog.records if "teacher_end_token" in record.getMessage()]
    assert_same_change(
        got,
        change_by_autograd(tiny_models.trained_model().double(), ended(tiny_models.text_dataset(4)), case_loss("dft")),
    )


def test_a_word_that_is_none_of_the_three(tmp_path):
    refused(
        r"^teacher_end_token is 'maps'; did you mean 'map'",
        lambda: quick_config(tmp_path, target="kd", teacher_model_name_or_path="x", teacher_end_token="maps"),
    )


# -- vocabulary ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kd", "kd:temperature=2.0", "target-sft"])
@pytest.mark.parametrize("student, other", [(0, 5), (13, 0), (13, 5), (5, 13)])
def test_heads_padded_otherwise(name, student, other, tmp_path):
    """The teacher is a softmax over the real vocabulary, whatever its matrix holds beyond."""
    folder = saved(tiny_models.llama(seed=3, width=48, vocab=REAL + other), tmp_path / "teacher", CHAT)
    got = change_by_training(
        tiny_models.llama(vocab=REAL + student).double(),
        tmp_path / "out",
        target=target_of(name),
        teacher_model_name_or_path=folder,
        **DOUBLE,
        **TWO,
    )
    model = tiny_models.llama(seed=3, width=48, vocab=REAL + other).double().eval()
    more = {"lr": LR, "steps": 2, "teacher": model}
    wanted = change_by_autograd(
        tiny_models.llama(vocab=REAL + student).double(),
        tokenised_rows(tiny_models.conversation_dataset(4)),
        case_loss(name),
        **more,
    )
    assert_same_change(got, wanted)


def test_a_teacher_over_its_padded_rows_is_noticed():
    """Mutant: mass on rows that are no token."""
    model = tiny_models.llama(seed=3, width=48, vocab=REAL + 13).double().eval()
    losses = (
        case_loss("kd"),
        lambda logits, labels, **given: case_loss("kd")(logits, labels, **{**given, "vocab_size": None}),
    )
    changes = [
        change_by_autograd(
            tiny_models.llama(vocab=REAL + 13).double(),
            tokenised_rows(tiny_models.conversation_dataset(4)),
            loss,
            teacher=model,
        )
        for loss in losses
    ]
    assert largest_difference(*changes)[0] > 1e-2


def differing(other):
    """The first id that means another token, and both."""
    ours, theirs = ({i: token for token, i in t.get_vocab().items()} for t in (CHAT, other))
    first = min(i for i in {*ours, *theirs} if ours.get(i) != theirs.get(i))
    return first, ours.get(first), theirs.get(first)


def with_other_special_token():
    text = CHAT.backend_tokenizer.to_str()
    assert "<|im_start|>" in text
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text.replace("<|im_start|>", "<|begin|>")),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


def with_one_more():
    made = copy.deepcopy(CHAT)
    made.add_tokens(["<|tool|>"])
    return made


def with_a_special_one_more():
    made = copy.deepcopy(CHAT)
    made.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    return made


def with_its_own_pad():
    made = copy.deepcopy(CHAT)
    made.add_special_tokens({"pad_token": "<pad>"})
    return made


OTHERS = {
    "trained on other text": lambda: tiny_models.tokenizer("zebra crossing"),
    "a special token with another content": with_other_special_token,
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("setting", ["teacher_model_name_or_path", "teachers"])
def test_another_tokenizer(kind, setting, tmp_path):
    """Seen before the teacher's weights are looked for: there are none."""
    other = OTHERS[kind]()
    folder = str(tmp_path / "teacher")
    other.save_pretrained(folder)
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(tiny_models.llama().config.to_dict(), default=str))
    number, ours, theirs = differing(other)
    told = refused(
        rf"^{setting} is '.*/teacher', which has another tokenizer: id {number} is ",
        lambda: quick_trainer(
            tiny_models.llama(),
            tmp_path / "out",
            target="target-sft",
            **{setting: folder if setting != "teachers" else {folder: 1.0}},
        ),
    )
    ours, theirs = (repr(token) if token is not None else "no token" for token in (ours, theirs))
    assert f"id {number} is {ours} for the student and {theirs} for the teacher; use a teacher of the same" in told


@pytest.mark.parametrize("beyond", [0, 13], ids=["no row for it", "padded rows"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_pad_token_of_its_own(beyond, streaming, tmp_path, caplog):
    """The gradient is that of a softmax over the teacher's own tokens; the token is told once."""
    folder = saved(tiny_models.llama(seed=3, width=48, vocab=REAL + beyond), tmp_path / "teacher", CHAT)
    model, data = tiny_models.llama(vocab=REAL + 1).double(), tiny_models.conversation_dataset(4)
    settings = {"target": target_of("kd"), "teacher_model_name_or_path": folder, **DOUBLE}
    made = QTargetTrainer(
        model,
        quick_config(tmp_path, **settings, max_steps=1),
        train_dataset=data.to_iterable_dataset() if streaming else data,
        processing_class=with_its_own_pad(),
    )
    before = copied_weights(made.model)
    made.train()
    assert caplog.text.count(f"id {REAL} is '<pad>' for the student and no token for {folder}") == 1
    teacher = tiny_models.llama(seed=3, width=48, vocab=REAL + beyond).double().eval()
    wanted = change_by_autograd(
        tiny_models.llama(vocab=REAL + 1).double(),
        tokenised_rows(data),
        lambda logits, labels, **given: case_loss("kd")(logits, labels, **given),
        teacher=OnItsOwnTokens(teacher),
    )
    assert_same_change(weight_change(before, made.model), wanted)


class OnItsOwnTokens:
    """A teacher that gives nothing to the student's further token."""

    def __init__(self, model):
        self.model = model

    def __call__(self, input_ids):
        logits = self.model(input_ids=input_ids).logits[..., :REAL]
        return SimpleNamespace(logits=torch.nn.functional.pad(logits, (0, 1), value=-torch.inf))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_with_a_token_that_the_teacher_does_not_know(streaming, tmp_path):
    folder = saved(tiny_models.llama(1), tmp_path / "teacher", CHAT)
    rows = [{"text": "a row"}, {"text": "a row with <|tool|> in it"}]
    data = Dataset.from_list(rows)

    def train():
        QTargetTrainer(
            tiny_models.llama(vocab=REAL + 1),
            quick_config(tmp_path, target="kd", teacher_model_name_or_path=folder, max_steps=1),
            train_dataset=data.to_iterable_dataset() if streaming else data,
            processing_class=with_one_more(),
        ).train()

    refused(
        rf"^row 1 of the train dataset: it holds '<\|tool\|>' \(id {REAL}\), an added token that the teacher", train
    )


@pytest.mark.parametrize("more", [with_one_more, with_a_special_one_more])
def test_a_teacher_with_a_token_more(more, tmp_path):
    """Its mass there is cut off, as that of a head's padded rows."""
    folder = saved(tiny_models.llama(seed=3, width=48, vocab=REAL + 1), tmp_path / "teacher", more())
    settings = {"target": target_of("kd"), "teacher_model_name_or_path": folder, **DOUBLE}
    got = change_by_training(tiny_models.llama().double(), tmp_path / "out", **settings)
    wanted = change_by_autograd(
        tiny_models.llama().double(),
        tokenised_rows(tiny_models.conversation_dataset(4)),
        case_loss("kd"),
        teacher=tiny_models.llama(seed=3, width=48, vocab=REAL + 1).double().eval(),
    )
    assert_same_change(got, wanted)


def test_an_end_of_turn_that_only_the_student_has(tmp_path):
    """An added token that every row holds: refused with the row."""
    base = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(CHAT.backend_tokenizer.to_str()), eos_token="<|endoftext|>"
    )
    student = copy.deepcopy(CHAT)
    student.add_special_tokens({"eos_token": "<|eot|>"})
    student.chat_template = student.chat_template.replace("<|im_end|>", "<|eot|>")
    folder = saved(tiny_models.llama(1), tmp_path / "teacher", base)
    refused(
        r"^row 0 of the train dataset: it holds '<\|eot\|>'",
        lambda: QTargetTrainer(
            tiny_models.llama(vocab=REAL + 1),
            quick_config(tmp_path, target="kd", teacher_model_name_or_path=folder),
            train_dataset=tiny_models.conversation_dataset(4),
            processing_class=student,
        ),
    )


def test_ids_in_another_order(tmp_path):
    """Every token is there, two of them exchanged."""
    state = json.loads(CHAT.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    swapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    folder = saved(tiny_models.llama(1), tmp_path / "teacher", swapped)
    number, ours, theirs = differing(swapped)
    told = refused(
        r"which has another tokenizer: id \d+ is ",
        lambda: quick_trainer(tiny_models.llama(), tmp_path / "out", target="kd", teacher_model_name_or_path=folder),
    )
    assert f"id {number} is {ours!r} for the student and {theirs!r} for the teacher" in told


# -- a teacher's head that is narrower than the vocabulary -----------------------------------------

NARROW = REAL - 10


def few_ids(rows_wanted=4):
    """Rows of token ids that a narrow teacher knows, all of them trained."""
    made = [
        {"input_ids": [i if i < NARROW else 5 for i in row["input_ids"]]}
        for row in tokenised_rows(tiny_models.text_dataset(rows_wanted))
    ]
    return Dataset.from_list([{**row, "labels": row["input_ids"]} for row in made])


class Narrow:
    """Nothing of its mass is beyond its head."""

    def __init__(self, model):
        self.model = model

    def __call__(self, input_ids):
        logits = self.model(input_ids=input_ids).logits
        return SimpleNamespace(logits=torch.nn.functional.pad(logits, (0, REAL - NARROW), value=-torch.inf))


@pytest.mark.parametrize("name", ["kd:temperature=2.0", "target-sft"])
@pytest.mark.parametrize("named", [True, False], ids=["by name", "as a model"])
def test_a_narrow_head_is_right(name, named, tmp_path):
    model = tiny_models.llama(seed=3, width=48, vocab=NARROW)
    folder = saved(model, tmp_path / "teacher", CHAT)
    other = (
        {"teacher_model_name_or_path": folder, **DOUBLE} if named else {"teacher_model": copy.deepcopy(model.double())}
    )
    got = change_by_training(
        tiny_models.trained_model().double(), tmp_path / "out", few_ids(), target=target_of(name), **other
    )
    teacher = Narrow(model.double().eval())
    wanted = change_by_autograd(
        tiny_models.trained_model().double(), [dict(row) for row in few_ids()], case_loss(name), teacher=teacher
    )
    assert_same_change(got, wanted)


def test_ids_that_a_narrow_teacher_does_not_know(tmp_path):
    data = tiny_models.text_dataset(4)
    assert any(i >= NARROW for row in tokenised_rows(data) for i in row["input_ids"])
    folder = saved(tiny_models.llama(seed=3, width=48, vocab=NARROW), tmp_path / "teacher", CHAT)
    for other in (
        {"teacher_model_name_or_path": folder},
        {"teacher_model": tiny_models.llama(seed=3, width=48, vocab=NARROW)},
    ):
        with pytest.raises(ConfigError, match=rf"{NARROW}.*{REAL}|{REAL}.*{NARROW}"):
            change_by_training(tiny_models.trained_model(), tmp_path / "out", data, target="kd", **other)


def test_a_narrow_member_of_a_pool(tmp_path):
    """Where one member knows no token, neither does the pool."""
    narrow, full = tiny_models.llama(seed=3, width=48, vocab=NARROW), tiny_models.trained_model(seed=7, width=64)
    teachers = [
        {
            "model_name_or_path": saved(model, tmp_path / name, CHAT),
            "weight": share,
            "init_kwargs": {"dtype": "float64"},
        }
        for name, model, share in (("narrow", narrow, 0.4), ("full", full, 0.6))
    ]
    got = change_by_training(
        tiny_models.trained_model().double(),
        tmp_path / "out",
        few_ids(),
        target=target_of("kd:temperature=2.0"),
        teachers=teachers,
    )
    one, other = Narrow(narrow.double().eval()), full.double().eval()

    def pool(input_ids):
        return SimpleNamespace(logits=0.4 * one(input_ids).logits + 0.6 * other(input_ids=input_ids).logits)

    data = [dict(row) for row in few_ids()]
    assert count_supervised(data) > 0
    assert_same_change(
        got,
        change_by_autograd(tiny_models.trained_model().double(), data, case_loss("kd:temperature=2.0"), teacher=pool),
    )


def test_a_narrow_head_that_has_no_row_for_an_end_token(base, tmp_path):
    """Exchanging a row that is not there is refused in a sentence."""
    far = copy.deepcopy(CHAT)
    last = {i: token for token, i in far.get_vocab().items()}[REAL - 1]
    far.eos_token = last
    folder = saved(tiny_models.llama(seed=3, width=48, vocab=NARROW), tmp_path / "teacher", far)
    settings = {"target": target_of("kd:temperature=2.0"), "teacher_end_token": "map", **DOUBLE}
    with pytest.raises(ConfigError):
        change_by_training(
            tiny_models.trained_model().double(),
            tmp_path / "out",
            few_ids(),
            teacher_model_name_or_path=folder,
            **settings,
        )
