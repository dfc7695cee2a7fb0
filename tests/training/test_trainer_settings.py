"""What the settings say, what is refused, and when."""

import logging
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainingArguments
from trl import SFTConfig

import qtarget as qt
import tiny_models
from qtarget import ConfigError, QTargetConfig, QTargetTrainer
from qtarget.targets.objective import Objective
from qtarget.training import checks
from quick_runs import quick_config, quick_settings, quick_trainer, single_target, tokenised_dataset, train_quickly

NOWHERE = "no/such-model"


def refused(match=None, **kwargs):
    """The faults of a trainer that was never made."""
    with pytest.raises(ConfigError, match=match) as error:
        QTargetTrainer(**kwargs)
    return error.value.faults


# -- which target ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, target",
    [
        ({}, "sft"),
        ({"target": "dft"}, "dft"),
        ({"target": {"preset": "eaft", "top_k": 5}}, {"preset": "eaft", "top_k": 5}),
        ({"target": qt.preset("gem")}, "gem"),
        ({"loss_type": "nll"}, "sft"),
        ({"loss_type": "dft"}, "dft"),
        ({"label_smoothing_factor": 0.2}, {"preset": "label-smoothing", "smoothing": 0.2}),
        ({"target": "dft", "loss_type": "dft"}, "dft"),
        ({"target": "nll", "loss_type": "nll"}, "sft"),
        (
            {"target": {"preset": "label-smoothing", "smoothing": 0.1}, "label_smoothing_factor": 0.1},
            {"preset": "label-smoothing", "smoothing": 0.1},
        ),
    ],
    ids=str,
)
def test_the_target_that_settings_name(settings, target, tmp_path):
    made = quick_config(tmp_path, **settings)
    assert single_target(made) == made.resolve_eval_objective().targets[None].final == qt.Target.from_config(target)


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"target": "gem", "loss_type": "dft"}, r"target means gem\(.*\), loss_type dft means dft"),
        ({"target": "dft", "loss_type": "nll"}, "target means dft, loss_type nll means sft"),
        (
            {"loss_type": "nll", "label_smoothing_factor": 0.1},
            r"loss_type nll means sft, label_smoothing_factor 0.1 means label-smoothing\(smoothing=0.1\)",
        ),
        (
            {"target": {"preset": "label-smoothing", "smoothing": 0.2}, "label_smoothing_factor": 0.1},
            r"smoothing=0.2\), label_smoothing_factor 0.1 means label-smoothing\(smoothing=0.1\)",
        ),
    ],
    ids=str,
)
def test_contradictions_are_refused(settings, told, tmp_path):
    with pytest.raises(ConfigError, match=f"contradict each other: .*{told}; keep one of them"):
        quick_config(tmp_path, **settings)


def test_unknown_names_come_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="target is 'eatf'; did you mean 'eaft'"):
        quick_config(tmp_path, target="eatf")
    with pytest.raises(ConfigError, match="loss_type is 'ddft'; did you mean 'dft'"):
        quick_config(tmp_path, loss_type="ddft")
    with pytest.raises(ConfigError, match=r"eval_target: .*'kdd'; did you mean 'kd'"):
        quick_config(tmp_path, eval_target="kdd")


def test_faults_of_the_settings_are_shown_together(tmp_path):
    with pytest.raises(ConfigError) as error:
        quick_config(tmp_path, target="eatf", eval_target="kdd", denominator="everything")
    assert len(error.value.faults) == 3


@pytest.mark.parametrize(
    "settings, target",
    [({}, "sft"), ({"loss_type": "dft"}, "dft"), ({"label_smoothing_factor": 0.1}, "label-smoothing")],
    ids=str,
)
def test_settings_of_trl_are_converted(settings, target, tmp_path):
    """TRL's loss_type is nll where nobody chose it: that contradicts nothing."""
    args = SFTConfig(**quick_settings(tmp_path, bf16=False, max_length=33, **settings))
    made = QTargetTrainer(
        tiny_models.llama(), args, train_dataset=tiny_models.text_dataset(4), processing_class=tiny_models.tokenizer()
    )
    assert isinstance(made.args, QTargetConfig) and single_target(made.args) == qt.preset(target)
    assert made.args.max_length == 33 and not made.args.bf16
    made.train()


def test_settings_of_transformers_are_converted(tmp_path):
    args = TrainingArguments(**quick_settings(tmp_path, label_smoothing_factor=0.1, weight_decay=0.125))
    made = QTargetTrainer(
        tiny_models.llama(), args, train_dataset=tiny_models.text_dataset(4), processing_class=tiny_models.tokenizer()
    )
    assert single_target(made.args) == qt.preset("label-smoothing", smoothing=0.1)
    assert made.args.weight_decay == 0.125 and made.args.max_length == QTargetConfig.max_length
    assert made.label_smoother is None, "the smoothing is the target's: twice would be too much"
    made.train()


def test_no_settings_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = QTargetTrainer(
        tiny_models.llama(), train_dataset=tiny_models.text_dataset(4), processing_class=tiny_models.tokenizer()
    )
    assert single_target(made.args) == qt.preset("sft")


def test_arguments_by_position_as_in_trl(tmp_path):
    made = QTargetTrainer(
        tiny_models.llama(), quick_config(tmp_path), None, tiny_models.text_dataset(4), None, tiny_models.tokenizer()
    )
    assert len(made.train_dataset) == 4


# -- the teacher as one mapping ------------------------------------------------------------------------------------


def test_a_teacher_as_one_mapping_is_stored_flat(tmp_path):
    mapping = {"model": "org/a", "init_kwargs": {"dtype": "bfloat16"}, "tail": "even", "ema_decay": None}
    made = quick_config(tmp_path, teacher=mapping)
    beside = quick_config(
        tmp_path,
        teacher_model_name_or_path="org/a",
        teacher_model_init_kwargs={"dtype": "bfloat16"},
        teacher_tail="even",
    )
    assert made == beside and made.to_dict() == beside.to_dict() and made.teacher is None
    assert quick_config(tmp_path, teacher="org/a").teacher_model_name_or_path == "org/a"
    assert quick_config(tmp_path, teacher='{"cache": "kept"}').teacher_cache == "kept"
    assert [member.name for member in quick_config(tmp_path, teacher={"models": {"a": 1.0}}).pool_members()] == ["a"]
    assert replace(made, max_steps=3).teacher_model_name_or_path == "org/a"


def test_a_teacher_in_both_forms(tmp_path):
    assert quick_config(tmp_path, teacher={"tail": "even"}, teacher_tail="even").teacher_tail == "even"
    with pytest.raises(ConfigError) as error:
        quick_config(tmp_path, teacher={"model": "org/a", "cache": "kept"}, teacher_model_name_or_path="org/b")
    assert error.value.faults == [
        "teacher.model is 'org/a' and teacher_model_name_or_path is 'org/b'; keep one of them"
    ]


@pytest.mark.parametrize(
    "value, sentence",
    [
        ({"modle": "org/a"}, "teacher's key is 'modle'; did you mean 'model'?"),
        (["org/a"], "teacher is ['org/a']; write a folder or hub id, or a mapping"),
        ({"ema_decay": 2}, "teacher_ema_decay is 2; use a number from 0 below 1"),
        ({"tail": "evne"}, "teacher_tail is 'evne'; did you mean 'even'?"),
    ],
)
def test_a_teacher_mapping_that_is_wrong(value, sentence, tmp_path):
    with pytest.raises(ConfigError) as error:
        quick_config(tmp_path, teacher=value)
    assert error.value.faults[0].startswith(sentence) and len(error.value.faults) == 1


def test_a_teacher_mapping_trains(tmp_path):
    """Its settings are the ones that a checkpoint holds."""
    tiny_models.llama(1).save_pretrained(tmp_path / "teacher")
    tiny_models.tokenizer().save_pretrained(tmp_path / "teacher")
    made = train_quickly(tiny_models.llama(), tmp_path, target="kd", teacher=str(tmp_path / "teacher"))
    assert made.args.teacher_model_name_or_path == str(tmp_path / "teacher")


# -- precision -------------------------------------------------------------------------------------


def test_bf16_left_alone_is_off_on_a_cpu(tmp_path, caplog):
    assert quick_config(tmp_path).bf16 is False
    assert not caplog.records


def test_bf16_asked_for_is_kept_and_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="qtarget"):
        made = quick_config(tmp_path, bf16=True)
    assert made.bf16 is True
    assert "bf16=True is kept, but this device has no bfloat16 units" in caplog.text


def test_bf16_trains_with_weights_in_float32(tmp_path):
    made = train_quickly(tiny_models.llama(), tmp_path, bf16=True, target="sft-kl", max_steps=2)
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}
    assert made.state.log_history[0]["loss"] == pytest.approx(made.state.log_history[0]["nll"], abs=1e-3)


# -- before any weights are loaded -----------------------------------------------------------------


def test_missing_teacher(tmp_path):
    faults = refused(
        model=NOWHERE,
        args=quick_config(tmp_path, target="target-sft"),
        train_dataset=tiny_models.text_dataset(2),
        processing_class=tiny_models.tokenizer(),
    )
    assert faults == [
        "target target-sft(eta=0.5, teacher_temperature=1.0) needs a teacher and got none; "
        "set teacher_model_name_or_path, or teachers, teacher_cache or teacher_ema_decay"
    ]


@pytest.mark.parametrize(
    "target, column, what, mend",
    [
        ("iw-sft", "weight", "weights", "add it, set weights: online, or choose another target"),
        ("cft", "critical", "a mask of critical tokens", "add it, or choose another target"),
        (
            "psft",
            "old_logps",
            "the old policy's log-probabilities",
            "add it, set psft_refresh to a number of steps, or choose another target",
        ),
    ],
)
def test_missing_column(target, column, what, mend, tmp_path):
    faults = refused(
        model=NOWHERE,
        args=quick_config(tmp_path, target=target, psft_refresh="never"),
        train_dataset=tiny_models.text_dataset(2),
        eval_dataset={
            "short": tiny_models.text_dataset(2),
            "long": tiny_models.text_dataset(3).add_column(column, [1.0] * 3),
        },
        processing_class=tiny_models.tokenizer(),
    )
    assert faults == [
        f"target {qt.preset(target)} needs {what}, but the {name} dataset has no column '{column}' "
        f"(it has text); {mend}" + instead
        for name, instead in (("train", ""), ("short", ", or report another objective there: eval_target: sft"))
    ]


def test_a_loss_of_ones_own_beside_the_target(tmp_path):
    faults = refused(
        model=NOWHERE,
        args=quick_config(tmp_path),
        train_dataset=tiny_models.text_dataset(2),
        processing_class=tiny_models.tokenizer(),
        compute_loss_func=lambda *args, **kwargs: 0,
    )
    assert len(faults) == 1 and faults[0].startswith(
        "compute_loss_func is given together with target; a run trains one"
    )


def test_a_dataset_of_another_shape(tmp_path):
    faults = refused(
        model=NOWHERE,
        args=quick_config(tmp_path, dataset_text_field="content"),
        train_dataset=Dataset.from_dict({"question": ["a"], "answer": ["b"]}),
        processing_class=tiny_models.tokenizer(),
    )
    assert faults == [
        "the train dataset has columns answer, question; give it one of messages, prompt and completion, "
        "content (dataset_text_field), conversations, or input_ids and labels"
    ]


def test_a_weight_per_sequence_where_sequences_run_together(tmp_path):
    faults = refused(
        model=NOWHERE,
        args=quick_config(tmp_path, target="iw-sft", weights="online", packing=True, packing_strategy="wrapped"),
        train_dataset=tiny_models.text_dataset(2),
        processing_class=tiny_models.tokenizer(),
    )
    assert len(faults) == 1 and faults[0].startswith("weights is 'online' and packing_strategy is 'wrapped', which")


def test_several_faults_are_shown_together(tmp_path):
    faults = refused(
        model=NOWHERE,
        args=quick_config(tmp_path, target="iw-sft", eval_target="kd"),
        train_dataset=Dataset.from_dict({"question": ["a"]}),
        processing_class=tiny_models.tokenizer(),
        peft_config=LoraConfig(target_modules=["lm_head"]),
        compute_loss_func=print,
    )
    starts = [
        "compute_loss_func is given",
        "target kd(temperature=1.0) needs a teacher",
        "lora_target_modules holds 'lm_head'",
        "target iw-sft needs weights",
        "the train dataset has columns question",
    ]
    assert len(faults) == len(starts)
    assert all(fault.startswith(start) for fault, start in zip(faults, starts, strict=True)), faults


# -- the teacher -----------------------------------------------------------------------------------


def saved(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A student, a teacher of the family, and one whose tokenizer learned from other text."""
    root = tmp_path_factory.mktemp("models")
    other = tiny_models.tokenizer(extra="zebra quokka ")
    return {
        "student": saved(tiny_models.llama(), tiny_models.tokenizer(), root / "student"),
        "teacher": saved(tiny_models.llama(seed=1, width=48, vocab=333), tiny_models.tokenizer(), root / "teacher"),
        "stranger": saved(tiny_models.llama(seed=2, vocab=len(other)), other, root / "stranger"),
    }


def test_everything_by_name(folders, tmp_path):
    """Student, its tokenizer and the teacher from folders; the teacher's head is padded."""
    args = quick_config(tmp_path, target="kd", teacher_model_name_or_path=folders["teacher"])
    made = QTargetTrainer(folders["student"], args, train_dataset=tiny_models.conversation_dataset(4))
    made.train()
    (teacher,) = (one.model for one in made.aux.teacher.models)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_a_teacher_with_another_tokenizer(folders, tmp_path):
    ours, theirs = (
        {i: t for t, i in tiny_models.tokenizer(extra=e).get_vocab().items()} for e in ("", "zebra quokka ")
    )
    first = next(i for i in range(999) if ours.get(i) != theirs.get(i))
    args = quick_config(tmp_path, target="kd", teacher_model_name_or_path=folders["stranger"])
    data = tiny_models.text_dataset(2)
    for student in ({"model": folders["student"]}, {"model": NOWHERE, "processing_class": tiny_models.tokenizer()}):
        faults = refused(**student, args=args, train_dataset=data)
        assert faults == [
            f"teacher_model_name_or_path is {folders['stranger']!r}, which has another tokenizer: id {first} "
            f"is {ours[first]!r} for the student and {theirs[first]!r} for the teacher; "
            "use a teacher of the same family"
        ]


def test_an_unneeded_teacher_is_not_loaded(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="qtarget"):
        made = quick_trainer(tiny_models.llama(), tmp_path, target="dft", teacher_model_name_or_path=NOWHERE)
        assert made.aux.teacher is None and not caplog.text, "what does not train may ask the teacher itself"
        made.train()
    assert "a teacher is given, but target dft does not need it; it is not loaded" in caplog.text


def test_at_eta_zero_no_teacher_is_needed(tmp_path):
    made = train_quickly(tiny_models.llama(), tmp_path, target={"preset": "target-sft", "eta": 0.0})
    assert made.aux.teacher is None


def test_a_teacher_for_evaluation_only(tmp_path):
    data = tiny_models.conversation_dataset(4)
    made = quick_trainer(
        tiny_models.llama(),
        tmp_path,
        data,
        eval_dataset=data,
        eval_target="kd",
        teacher_model=tiny_models.llama(1, width=48),
    )
    assert made.aux.teacher is not None and made.evaluate()["eval_residual_mass"] == 1


def test_a_reference_by_name(folders, tmp_path):
    """Given as a folder it is that model; by default it is the start."""
    target = {"preset": "sft-kl", "kl_weight": 1.0}
    own = train_quickly(tiny_models.llama(), tmp_path, target=target)
    named = train_quickly(tiny_models.llama(), tmp_path, target=target, reference_model_name_or_path=folders["student"])
    other = train_quickly(tiny_models.llama(), tmp_path, target=target, reference_model=tiny_models.llama(4))
    assert own.state.log_history[0]["loss"] == named.state.log_history[0]["loss"]
    assert own.state.log_history[0]["loss"] != other.state.log_history[0]["loss"]


# -- after the data are tokenised ------------------------------------------------------------------


def test_no_supervised_token_at_all(tmp_path):
    """Labels all ignored, or only at position 0, which nothing predicts."""
    only_first = tokenised_dataset(
        tiny_models.conversation_dataset(3),
        labels=lambda number, row: row["input_ids"][:1] + [-100] * (len(row["labels"]) - 1),
    )
    with pytest.raises(ConfigError, match="the train dataset has no supervised token: none of its first 3 rows has a"):
        quick_trainer(tiny_models.llama(), tmp_path, only_first)
    with pytest.raises(ConfigError, match=r"the eval dataset has no supervised token: .*check completion_only_loss"):
        quick_trainer(tiny_models.llama(), tmp_path, eval_dataset=only_first)


def test_prompts_that_fill_max_length(tmp_path):
    with pytest.raises(ConfigError, match=r"it has no row left with a label to train; check .*max_length"):
        quick_trainer(tiny_models.llama(), tmp_path, max_length=4)


def test_checks_without_columns():
    """A streamed dataset may not know its columns: nothing is refused beforehand."""
    assert checks.missing_columns("train", None, Objective.single("cft"), None) == []
    assert checks.untrainable_rows("train", None, "text") == []
