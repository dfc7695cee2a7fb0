"""Teachers that are no model of their own, a pool and the student's average, and iw-sft's reference as a column."""

import copy
import functools
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import PhiConfig, PhiForCausalLM, TrainerCallback

import batch_layouts
import tiny_models
from batch_layouts import CASE, case_loss
from published import kd, label_log_p, target_sft
from qtarget import ConfigError
from qtarget.training.saving import checkpoints
from quick_runs import (
    assert_same_change,
    change_by_autograd,
    change_by_training,
    copied_weights,
    count_supervised,
    labels_of,
    largest_difference,
    logged_values,
    logits_of,
    quick_config,
    quick_trainer,
    tokenised_rows,
    train_quickly,
    trainable_parameters,
    weight_change,
)

REAL = len(tiny_models.tokenizer())
DOUBLE = {"dtype": "float64"}
LR = 0.3


def saved(model, folder, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or tiny_models.tokenizer()).save_pretrained(folder)
    return str(folder)


def target_of(name):
    return {"preset": CASE[name].preset, **CASE[name].hyperparameters}


def refused(match, call):
    """The faults of what is refused: each one sentence."""
    with pytest.raises(ConfigError, match=match) as error:
        call()
    assert all("\n" not in fault and not fault.endswith(".") for fault in error.value.faults)
    return error.value.faults


# -- a pool ----------------------------------------------------------------------------------------


def wide():
    """Its own head, padded."""
    return tiny_models.llama(seed=3, width=48, tied=False, vocab=REAL + 5)


def tied():
    return tiny_models.trained_model(seed=7, width=64)


class Pool:
    """Answers as a model whose logits are a combination of its members' over the real vocabulary."""

    def __init__(self, *members, of_probabilities=False):
        self.members = [(weight, model.double().eval()) for weight, model in members]
        self.of_probabilities = of_probabilities

    def __call__(self, input_ids):
        logits = [(weight, model(input_ids=input_ids).logits[..., :REAL]) for weight, model in self.members]
        if self.of_probabilities:
            return SimpleNamespace(logits=sum(weight * z.softmax(-1) for weight, z in logits).log())
        return SimpleNamespace(logits=sum(weight * z for weight, z in logits))


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Folders of the two, as their names."""
    folder = tmp_path_factory.mktemp("members")
    return saved(wide(), folder / "wide"), saved(tied(), folder / "tied")


def listed(*pairs, **more):
    return [{"model_name_or_path": name, "weight": weight, "init_kwargs": DOUBLE, **more} for name, weight in pairs]


@functools.cache
def by_the_pool(name, *shares, of_probabilities=False, steps=2):
    pool = Pool((shares[0], wide()), (shares[1], tied()), of_probabilities=of_probabilities)
    student = tiny_models.trained_model().double()
    return change_by_autograd(
        student, tokenised_rows(tiny_models.conversation_dataset(4)), case_loss(name), lr=LR, steps=steps, teacher=pool
    )


def test_wrong_pools_are_noticed():
    for name in ("kd", "target-sft"):
        wanted = by_the_pool(name, 0.7, 0.3)
        assert largest_difference(by_the_pool(name, 0.3, 0.7), wanted)[0] > 1e-2
        assert largest_difference(by_the_pool(name, 1.0, 0.0), wanted)[0] > 1e-2
        assert largest_difference(by_the_pool(name, 0.7, 0.3, of_probabilities=True), wanted)[0] > 1e-2


@pytest.mark.parametrize("name", ["kd", "kd:temperature=2.0", "target-sft"])
def test_a_pool_is_one_softmax_of_the_sum_of_logits(name, members, tmp_path):
    got = change_by_training(
        tiny_models.trained_model().double(),
        tmp_path,
        target=target_of(name),
        teachers=listed((members[0], 0.7), (members[1], 0.3)),
        max_steps=2,
        learning_rate=LR,
    )
    assert_same_change(got, by_the_pool(name, 0.7, 0.3))


@pytest.mark.parametrize("written", [dict, json.dumps], ids=["mapping", "text"])
def test_names_and_weights_alone(written, members, tmp_path):
    """Models are loaded in float32 on a CPU."""
    got = change_by_training(
        tiny_models.trained_model().double(),
        tmp_path,
        target="target-sft",
        teachers=written({members[0]: 0.7, members[1]: 0.3}),
        max_steps=2,
        learning_rate=LR,
    )
    assert_same_change(got, by_the_pool("target-sft", 0.7, 0.3), 1e-5)


def test_one_step_of_a_pool_packed(members, tmp_path):
    made = quick_trainer(
        tiny_models.trained_model().double(),
        tmp_path,
        batch_layouts.layout_dataset().remove_columns(["weight", "critical", "old_logps"]),
        target="target-sft",
        teachers=listed((members[0], 0.7), (members[1], 0.3)),
        **batch_layouts.LAYOUTS["bfd"],
    )
    batch_layouts.in_one_step(made, 2)
    before = copied_weights(made.model)
    made.train()
    pool = Pool((0.7, wide()), (0.3, tied()))
    wanted = change_by_autograd(
        tiny_models.trained_model().double(),
        batch_layouts.layout_documents("bfd"),
        case_loss("target-sft"),
        teacher=pool,
    )
    assert_same_change(weight_change(before, made.model), wanted)


@pytest.mark.parametrize("make", [tiny_models.cohere, tiny_models.granite], ids=lambda make: make.__name__)
def test_a_member_that_scales_its_logits(make, members, tmp_path):
    name = saved(make(), tmp_path / "scaled")
    got = change_by_training(
        tiny_models.trained_model().double(),
        tmp_path / "out",
        target="kd",
        teachers=listed((name, 0.6), (members[1], 0.4)),
    )
    pool = Pool((0.6, make()), (0.4, tied()))
    assert_same_change(
        got,
        change_by_autograd(
            tiny_models.trained_model().double(),
            tokenised_rows(tiny_models.conversation_dataset(4)),
            case_loss("kd"),
            teacher=pool,
        ),
    )


def phi():
    """Its head has a bias."""
    torch.manual_seed(4)
    small = {name: value for name, value in tiny_models.SMALL.items() if name != "num_key_value_heads"}
    model = PhiForCausalLM(PhiConfig(vocab_size=REAL + 3, **small))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def test_a_member_whose_head_has_a_bias(members, tmp_path):
    name = saved(phi(), tmp_path / "biased")
    data = tokenised_rows(tiny_models.conversation_dataset(4))
    for pair in (((name, 0.6), (members[0], 0.4)), ((members[0], 0.4), (name, 0.6))):
        got = change_by_training(
            tiny_models.trained_model().double(), tmp_path / "out", target="kd", teachers=listed(*pair)
        )
        pool = Pool((0.6, phi()), (0.4, wide()))
        assert_same_change(
            got, change_by_autograd(tiny_models.trained_model().double(), data, case_loss("kd"), teacher=pool)
        )


def test_a_pool_of_one_is_that_teacher(members, tmp_path):
    both = [
        change_by_training(tiny_models.trained_model().double(), tmp_path, target="kd", **settings)
        for settings in (
            {"teachers": listed((members[1], 1.0))},
            {"teacher_model_name_or_path": members[1], "teacher_model_init_kwargs": DOUBLE},
        )
    ]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


def test_revision_and_init_kwargs_arrive(members, tmp_path, monkeypatch):
    asked = []
    real = transformers.AutoModelForCausalLM.from_pretrained

    def watched(name, **kwargs):
        asked.append((name, kwargs.get("revision"), kwargs.get("dtype"), kwargs.get("attn_implementation")))
        return real(name, **kwargs)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", watched)
    teachers = [
        {"model_name_or_path": members[0], "weight": 0.7, "revision": "v2", "init_kwargs": DOUBLE},
        {"model_name_or_path": members[1], "weight": 0.3, "init_kwargs": {"attn_implementation": "eager"}},
    ]
    made = quick_trainer(tiny_models.trained_model(), tmp_path, target="kd", teachers=teachers)
    assert asked == [(members[0], "v2", "float64", None), (members[1], None, torch.float32, "eager")]
    assert "0.7 " in made.describe() and "0.3 " in made.describe() and "v2" in made.describe()


@pytest.mark.parametrize(
    "teachers, told",
    [
        ({"a": 0.7, "b": 0.2}, r"^teachers: the weights sum to 0\.9; let them sum to 1"),
        ({"a": 0.7, "b": 0.7}, r"^teachers: the weights sum to 1\.4; let them sum to 1"),
        ({"a": 1.0, "b": 0}, r"^teachers: the weight of b is 0; use a number above 0, below 1e9$"),
        ({"a": 1.5, "b": -0.5}, r"^teachers: the weight of b is -0\.5; use a number above 0, below 1e9$"),
        ({"a": "half", "b": 0.5}, r"^teachers: the weight of a is 'half'; use a number above 0, below 1e9$"),
        ({"a": True}, r"^teachers: the weight of a is True; use a number above 0, below 1e9$"),
        ({"a": float("nan"), "b": 1.0}, r"^teachers: the weight of a is nan; use a number above 0, below 1e9$"),
        (
            [{"model_name_or_path": "a", "weight": 1.0, "dtype": "x"}],
            r"^teachers holds \{.*'dtype'.*\}; write model_na",
        ),
        ([{"model_name_or_path": "a"}], r"^teachers holds \{'model_name_or_path': 'a'\}; write model_name_or_path and"),
        (["a", "b"], r"^teachers holds 'a'; write model_name_or_path and weight"),
        ({}, r"^teachers is (\{\}|\[\]); write a weight for each, as in \{org/large: 0\.7, org/maths: 0\.3\}$"),
        ([], r"^teachers is \[\]; write a weight for each"),
        ("a", r"^teachers is 'a'; write a weight for each"),
    ],
    ids=str,
)
def test_a_pool_that_is_not_one(teachers, told, tmp_path):
    refused(told, lambda: quick_config(tmp_path, target="kd", teachers=teachers))


def test_every_fault_of_a_pool_at_once(tmp_path):
    faults = refused(
        r"weight of b is -1",
        lambda: quick_config(tmp_path, target="kd", teachers={"a": 0, "b": -1}, teacher_tail="odd"),
    )
    assert len(faults) == 3


def test_a_softcapped_member(members, tmp_path):
    name = saved(tiny_models.gemma2(), tmp_path / "capped")
    refused(
        r"^(step 1: )?teachers holds .*softcap on its logits, which cannot be pooled; leave it out$",
        lambda: train_quickly(
            tiny_models.trained_model(), tmp_path / "out", target="kd", teachers={name: 0.5, members[1]: 0.5}
        ),
    )
    alone = change_by_training(
        tiny_models.trained_model().double(), tmp_path / "out", target="kd", teachers=listed((name, 1.0))
    )
    wanted = change_by_autograd(
        tiny_models.trained_model().double(),
        tokenised_rows(tiny_models.conversation_dataset(4)),
        case_loss("kd"),
        teacher=tiny_models.gemma2().double().eval(),
    )
    assert_same_change(alone, wanted, 1e-6)  # its norms are computed in float32


def test_a_member_with_another_tokenizer(members, tmp_path):
    other = saved(tiny_models.llama(), tmp_path / "other", tiny_models.tokenizer("zebra"))
    (fault,) = refused(
        r"^teachers is '.*/other', which has another tokenizer: id \d+ is '.*' for the student and '.*' for the "
        r"teacher; use a teacher of the same family$",
        lambda: quick_trainer(
            tiny_models.llama(), tmp_path / "out", target="kd", teachers={members[0]: 0.5, other: 0.5}
        ),
    )
    assert members[0] not in fault


def test_a_member_that_is_not_there(members, tmp_path):
    gone = str(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"^teachers is .*/gone', which cannot be loaded: no such folder exists here"):
        quick_trainer(tiny_models.llama(), tmp_path / "out", target="kd", teachers={members[0]: 0.5, gone: 0.5})


@pytest.mark.parametrize(
    "settings, told",
    [
        (
            {"teachers": {"a": 1.0}, "teacher_model_name_or_path": "b"},
            r"^teacher_model_name_or_path and teachers are set; a run has one teacher: keep one of them$",
        ),
        (
            {"teacher_cache": "c", "teacher_ema_decay": 0.9},
            r"^teacher_cache and teacher_ema_decay are set; a run has one teacher: keep one of them$",
        ),
        (
            {"teachers": {"a": 1.0}, "teacher_cache": "c", "teacher_ema_decay": 0.9},
            r"^teachers and teacher_cache and teacher_ema_decay are set; a run has one teacher",
        ),
        ({"teacher_model_name_or_path": "b", "teacher_ema_decay": 0}, r"and teacher_ema_decay are set; a run has one"),
    ],
    ids=str,
)
def test_two_sources(settings, told, tmp_path):
    refused(told, lambda: quick_config(tmp_path, target="kd", **settings))


@pytest.mark.parametrize("name", ["teachers", "teacher_ema_decay", "teacher_cache"])
def test_a_model_beside_a_setting(name, members, tmp_path):
    value = {"teachers": {members[0]: 1.0}, "teacher_ema_decay": 0.9, "teacher_cache": str(tmp_path / "c")}[name]
    refused(
        rf"^teacher_model is given together with {name}; a run has one teacher: keep one$",
        lambda: quick_trainer(
            tiny_models.llama(), tmp_path, target="kd", teacher_model=tiny_models.llama(1), **{name: value}
        ),
    )


def test_another_pool_than_the_checkpoints(members, tmp_path):
    settings = {"target": "kd", "save_strategy": "steps", "save_steps": 1}
    train_quickly(tiny_models.trained_model(), tmp_path, teachers={members[0]: 0.7, members[1]: 0.3}, **settings)
    other = quick_trainer(
        tiny_models.trained_model(), tmp_path, teachers={members[0]: 0.6, members[1]: 0.4}, **settings
    )
    refused(
        r"^teacher is '0\.6 .*', but the checkpoint .* was trained with '0\.7 .*'; resume with that",
        lambda: other.train(resume_from_checkpoint=True),
    )


# -- the average of the student --------------------------------------------------------------------


def averaged(model, decay, loss, steps=3, updates=1):
    """(the weights' change, the average after the last update) of steps of SGD whose teacher is the average.

    ``updates``: how often the average moves before a step; more than once is wrong.
    """
    model = model.eval()
    kept = copy.deepcopy(model)
    before = copied_weights(model)

    def update():
        with torch.no_grad():
            for old, new in zip(kept.parameters(), model.parameters(), strict=True):
                old.copy_(decay * old + (1 - decay) * new)

    for _ in range(steps):
        for _ in range(updates):
            update()
        change_by_autograd(model, tokenised_rows(tiny_models.conversation_dataset(4)), loss, lr=LR, teacher=kept)
    return weight_change(before, model), {name: value.detach() for name, value in trainable_parameters(kept).items()}


STEPS = {"max_steps": 3, "num_train_epochs": 9, "learning_rate": LR}


def kept_of(made):
    return made.aux.average._copies


@functools.cache
def three_steps(name, decay, updates=1):
    return averaged(tiny_models.trained_model().double(), decay, case_loss(name), updates=updates)


def test_wrong_averages_are_noticed():
    wanted, kept = three_steps("target-sft", 0.6)
    start = dict(tiny_models.trained_model().double().named_parameters())
    for wrong in (three_steps("target-sft", 0.4), three_steps("target-sft", 0.6, updates=2)):
        assert largest_difference(wrong[0], wanted)[0] > 1e-4
    assert all(float((kept[n] - start[n]).norm()) > 1e-3 for n in kept), "an average that stays behind would be right"


@pytest.mark.parametrize("name", ["target-sft", "kd-hybrid:kd_weight=0.5,temperature=2.0"])
@pytest.mark.parametrize("batch, accumulation", [(2, 2), (1, 4), (4, 1)])
def test_three_steps_with_the_average_as_teacher(name, batch, accumulation, tmp_path):
    """However many micro-batches a step has, the average moves once before it."""
    made = quick_trainer(
        tiny_models.trained_model().double(),
        tmp_path,
        target=target_of(name),
        teacher_ema_decay=0.6,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **STEPS,
    )
    before = copied_weights(made.model)
    made.train()
    wanted, kept = three_steps(name, 0.6)
    assert_same_change(weight_change(before, made.model), wanted)
    assert largest_difference(kept_of(made), kept)[0] < 1e-12


def test_the_average_of_adapters(tmp_path):
    torch.manual_seed(5)
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_models.trained_model().double(), lora, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    wanted, kept = averaged(copy.deepcopy(model), 0.6, case_loss("target-sft"))
    made = quick_trainer(model, tmp_path, target="target-sft", teacher_ema_decay=0.6, **STEPS)
    before = copied_weights(made.model)
    made.train()
    assert_same_change(weight_change(before, made.model), wanted)
    assert all("lora_" in name for name in kept_of(made))
    assert largest_difference(kept_of(made), kept)[0] < 1e-12


@pytest.mark.parametrize("layout", ["padded", "bfd", "padding_free"])
def test_the_student_as_it_is(layout, tmp_path):
    """target-sft's residual is the student then, and pulls nowhere: dft, to the last digit."""
    data = batch_layouts.layout_dataset().remove_columns(["weight", "critical", "old_logps"])
    got = []
    for settings in ({"target": "target-sft", "teacher_ema_decay": 0}, {"target": "dft"}):
        made = quick_trainer(
            tiny_models.trained_model().double(), tmp_path, data, **STEPS, **settings, **batch_layouts.LAYOUTS[layout]
        )
        before = copied_weights(made.model)
        made.train()
        got.append(weight_change(before, made.model))
    assert largest_difference(*got)[0] < 1e-13


def test_evaluation_leaves_the_average_where_it_is(tmp_path):
    runs = [
        quick_trainer(
            tiny_models.trained_model().double(),
            tmp_path,
            eval_dataset=tiny_models.conversation_dataset(6),
            target="target-sft",
            eval_target="kd",
            teacher_ema_decay=0.6,
            **STEPS,
            **more,
        )
        for more in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True})
    ]
    for made in runs:
        made.train()
    assert len(logged_values(runs[1], "eval_loss")) == 4
    for got, wanted in (
        (kept_of(runs[1]), kept_of(runs[0])),
        (copied_weights(runs[1].model), copied_weights(runs[0].model)),
    ):
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    made = runs[0]
    kept, now = copy.deepcopy(kept_of(made)), copied_weights(made.model)
    loss = made.evaluate()["eval_loss"]
    assert all(torch.equal(kept_of(made)[name], kept[name]) for name in kept)
    assert all(torch.equal(value, now[name]) for name, value in made.model.named_parameters())
    teacher = copy.deepcopy(made.model).eval()
    teacher.__dict__.pop("forward", None)
    teacher.load_state_dict(kept, strict=False)
    data = tokenised_rows(tiny_models.conversation_dataset(6))
    with torch.no_grad():
        wanted = [
            kd(logits_of(made.model, row), labels_of(row), temperature=1.0, teacher_logits=logits_of(teacher, row))
            for row in data
        ]
    assert loss == pytest.approx(float(torch.cat(wanted).mean()), rel=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["weights", "adapters"])
def test_resumed_to_the_last_digit(lora, tmp_path):
    def made():
        peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if lora else None
        torch.manual_seed(1)
        return quick_trainer(
            tiny_models.trained_model(),
            tmp_path,
            tiny_models.conversation_dataset(8),
            peft_config=peft,
            target="target-sft",
            teacher_ema_decay=0.6,
            save_strategy="steps",
            save_steps=2,
            **{**STEPS, "max_steps": 5, "learning_rate": 0.05, "optim": "adamw_torch"},
        )

    whole, again = made(), made()
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged_values(again, "loss")[-3:] == logged_values(whole, "loss")[-3:]
    assert all(torch.equal(value, kept_of(whole)[name]) for name, value in kept_of(again).items())
    ends = copied_weights(whole.model), copied_weights(again.model)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert any(not torch.equal(ends[0][name], value) for name, value in kept_of(whole).items())
    (tmp_path / "checkpoint-4" / "teacher_average_0.pt").unlink()
    (tmp_path / "checkpoint-4" / checkpoints.FILES).unlink()  # as a run without the average leaves it
    refused(
        r"^resume_from_checkpoint is '.*checkpoint-4', which holds no average of the student "
        r"\(teacher_average_0\.pt\); resume from a checkpoint that a run with this teacher_ema_decay wrote",
        lambda: made().train(resume_from_checkpoint=str(tmp_path / "checkpoint-4")),
    )


def test_another_decay_than_the_checkpoints(tmp_path):
    settings = {"target": "target-sft", "save_strategy": "steps", "save_steps": 1}
    train_quickly(tiny_models.trained_model(), tmp_path, teacher_ema_decay=0.6, **settings)
    other = quick_trainer(tiny_models.trained_model(), tmp_path, teacher_ema_decay=0.7, **settings)
    refused(
        r"decay 0\.7[\"'], but the checkpoint .*decay 0\.6[\"']; resume",
        lambda: other.train(resume_from_checkpoint=True),
    )


def test_steps_that_do_not_ask_the_teacher(tmp_path):
    """The average is over all steps, also where a schedule has not come to the teacher yet."""
    model = tiny_models.trained_model().double().eval()
    kept, before = copy.deepcopy(model), copied_weights(model)
    for eta in (0.0, 0.4, 0.8):
        with torch.no_grad():
            for old, new in zip(kept.parameters(), model.parameters(), strict=True):
                old.copy_(0.6 * old + 0.4 * new)
        loss = functools.partial(target_sft, eta=eta, teacher_temperature=1.0)
        change_by_autograd(model, tokenised_rows(tiny_models.conversation_dataset(4)), loss, lr=LR, teacher=kept)
    got = change_by_training(
        tiny_models.trained_model().double(),
        tmp_path,
        target={"preset": "target-sft", "eta": {"schedule": "linear", "from": 0.0, "to": 0.8, "steps": 2}},
        teacher_ema_decay=0.6,
        **STEPS,
    )
    assert_same_change(got, weight_change(before, model))


@pytest.mark.parametrize("decay", [1, 1.0, -0.1, 2, "much", True, float("nan")], ids=str)
def test_a_decay_out_of_range(decay, tmp_path):
    told = r"^teacher_ema_decay is .*; use a number( from 0 below 1)?$"
    refused(told, lambda: quick_config(tmp_path, target="target-sft", teacher_ema_decay=decay))


@pytest.mark.parametrize("decay", [0, 0.6])
def test_modes_are_given_back(decay, tmp_path):
    """Dropout is off in the teacher, on in the student, and off where the user turned it off."""
    model = tiny_models.gpt2()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    made = quick_trainer(model, tmp_path, target="target-sft", teacher_ema_decay=decay)
    batch = next(iter(made.get_train_dataloader()))
    model.train()
    model.transformer.h[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert set(modes.values()) == {True, False}
    hidden = []
    for _ in range(2):
        made.compute_loss(made.model, dict(batch))
        assert {name: module.training for name, module in model.named_modules()} == modes
        hidden.append(made.ask(made.rows.batch(batch), {"teacher"})["teacher"].hidden)
    assert torch.equal(*hidden)
    alive = [model(input_ids=batch["input_ids"]).logits for _ in range(2)]
    assert not torch.equal(*alive), "without dropout this would show nothing"


def test_weights_in_half_precision(tmp_path):
    """The average is kept in float32, so that small steps toward the weights are not rounded away."""
    seen = []

    class Seen(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            seen.append({name: value.float() for name, value in copied_weights(model).items()})

    made = train_quickly(
        tiny_models.trained_model().bfloat16(),
        tmp_path,
        target="target-sft",
        teacher_ema_decay=0.99,
        callbacks=[Seen()],
        **STEPS,
    )
    wanted, rounded = dict(seen[0]), dict(seen[0])
    for now in seen[1:]:
        wanted = {name: 0.99 * value + 0.01 * now[name] for name, value in wanted.items()}
        rounded = {name: (0.99 * value + 0.01 * now[name]).bfloat16().float() for name, value in rounded.items()}
    assert len(seen) == 3 and all(value.dtype == torch.float32 for value in kept_of(made).values())
    assert largest_difference(kept_of(made), wanted)[0] < 1e-6 < 1e-4 < largest_difference(rounded, wanted)[0]
    assert {value.dtype for value in copied_weights(made.model).values()} == {torch.bfloat16}


# -- iw-sft's reference as a column ----------------------------------------------------------------


def reference():
    return tiny_models.trained_model(seed=9).double().eval()


@torch.no_grad()
def means(documents):
    """log p under the reference, its mean over a document's supervised tokens."""
    model = reference()
    return [float(label_log_p(logits_of(model, row), labels_of(row)).mean()) for row in documents]


def online_by_hand(documents, column):
    model = tiny_models.trained_model().double().eval()
    before, losses = copied_weights(model), []
    for row, mean in zip(documents, column, strict=True):
        log_p = label_log_p(logits_of(model, row), labels_of(row))
        losses.append(-(0.5 * (log_p.detach().mean() - mean)).exp().clamp(0, 16) * log_p)
    (torch.cat(losses).sum() / count_supervised(documents)).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= parameter.grad
    return weight_change(before, model)


ONLINE = {"target": "iw-sft", "weights": "online", "weights_temperature": 0.5}


@pytest.fixture(scope="module")
def reference_folder(tmp_path_factory):
    return saved(tiny_models.trained_model(seed=9), tmp_path_factory.mktemp("reference"))


def in_one_step(folder, data, layout, accumulation, **settings):
    made = quick_trainer(
        tiny_models.trained_model().double(), folder, data, **ONLINE, **batch_layouts.LAYOUTS[layout], **settings
    )
    batch_layouts.in_one_step(made, accumulation)
    before = copied_weights(made.model)
    made.train()
    return made, weight_change(before, made.model)


@pytest.mark.parametrize("layout", ["padded", "bfd", "padding_free"])
def test_a_column_in_place_of_the_reference(layout, reference_folder, tmp_path):
    plain = batch_layouts.layout_dataset().remove_columns(["weight", "critical", "old_logps"])
    documents = batch_layouts.layout_documents(layout)
    data = plain.add_column("reference_logp", means(documents))
    named, by_model = in_one_step(
        tmp_path,
        plain,
        layout,
        2,
        reference_model_name_or_path=reference_folder,
        reference_model_init_kwargs=DOUBLE,
    )
    assert named.aux.reference is not None
    wanted = online_by_hand(documents, means(documents))
    for accumulation in (1, 2):
        made, got = in_one_step(tmp_path, data, layout, accumulation)
        assert made.aux.reference is None
        assert_same_change(got, wanted, 1e-6)  # weights and columns cross the loss in float32
        assert largest_difference(got, by_model)[0] < 1e-6
    shifted = means(documents)[1:] + means(documents)[:1]
    assert largest_difference(online_by_hand(documents, shifted), wanted)[0] > 1e-2


def test_a_column_beside_conversations(tmp_path):
    data = tiny_models.conversation_dataset(4)
    documents = tokenised_rows(data)
    made, got = in_one_step(tmp_path, data.add_column("reference_logp", means(documents)), "padded", 2)
    assert made.aux.reference is None
    assert_same_change(got, online_by_hand(documents, means(documents)), 1e-6)


@pytest.mark.parametrize("lora", [False, True], ids=["weights", "adapters"])
def test_who_the_reference_is_said_to_be(lora, tmp_path):
    """Else a resume from the column to the adapters off would not be noticed."""
    peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if lora else None
    data = tiny_models.conversation_dataset(4)
    column = data.add_column("reference_logp", [-1.0] * 4)
    told, by_model = (
        quick_trainer(tiny_models.trained_model(), tmp_path, d, peft_config=peft, **ONLINE).describe()
        for d in (column, data)
    )
    assert "reference_logp" in told and "adapters" not in told and told != by_model, told


def test_both_a_column_and_a_model(reference_folder, tmp_path):
    data = tiny_models.conversation_dataset(4).add_column("reference_logp", [-1.0] * 4)
    refused(
        r"^reference_model_name_or_path is set, and the train dataset has a column 'reference_logp'; the reference is "
        "read from one of them: keep one$",
        lambda: quick_trainer(
            tiny_models.trained_model(), tmp_path, data, reference_model_name_or_path=reference_folder, **ONLINE
        ),
    )


def test_both_a_column_and_a_model_handed_over(tmp_path):
    data = tiny_models.conversation_dataset(4).add_column("reference_logp", [-1.0] * 4)
    refused(
        r"^reference_model is given, and the train dataset has a column 'reference_logp'",
        lambda: quick_trainer(
            tiny_models.trained_model(), tmp_path, data, reference_model=tiny_models.trained_model(seed=9), **ONLINE
        ),
    )


def test_an_evaluation_set_without_the_column(tmp_path):
    data = tiny_models.conversation_dataset(4).add_column("reference_logp", [-1.0] * 4)
    told = (
        r"^weights are measured against column 'reference_logp', which the {} dataset does not have; add it there, or "
        r"report another objective there: eval_target: sft$"
    )
    refused(
        told.format("eval"),
        lambda: quick_trainer(
            tiny_models.trained_model(), tmp_path, data, eval_dataset=tiny_models.conversation_dataset(2), **ONLINE
        ),
    )
    refused(
        told.format("other"),
        lambda: quick_trainer(
            tiny_models.trained_model(),
            tmp_path,
            data,
            eval_dataset={"same": data, "other": tiny_models.conversation_dataset(2)},
            **ONLINE,
        ),
    )
    made = quick_trainer(
        tiny_models.trained_model(),
        tmp_path,
        data,
        eval_dataset=tiny_models.conversation_dataset(2),
        eval_target="sft",
        **ONLINE,
    )
    assert made.evaluate()["eval_loss"] > 0


def test_numbers_that_are_none(tmp_path):
    data = tiny_models.conversation_dataset(4).add_column("reference_logp", [-1.0, -2.0, float("nan"), -1.0])
    refused(
        r"^row 2 of the train dataset: column reference_logp holds nan at a supervised token; every number must be",
        lambda: quick_trainer(tiny_models.trained_model(), tmp_path, data, **ONLINE),
    )


def test_a_column_for_rows_in_pieces(tmp_path):
    data = tiny_models.conversation_dataset(4).add_column("reference_logp", [-1.0] * 4)
    settings = {"packing": True, "packing_strategy": "bfd_split", "max_length": 20}
    refused(r"bfd_split", lambda: quick_trainer(tiny_models.trained_model(), tmp_path, data, **ONLINE, **settings))


def test_a_column_nobody_asked_for(tmp_path):
    """Weights of the dataset's own are not taken against it."""
    data = tiny_models.conversation_dataset(4).add_column("reference_logp", [-1.0] * 4)
    got = change_by_training(
        tiny_models.trained_model().double(), tmp_path, data.add_column("weight", [1.0] * 4), target="iw-sft"
    )
    wanted = change_by_autograd(
        tiny_models.trained_model().double(), tokenised_rows(tiny_models.conversation_dataset(4)), case_loss("sft")
    )
    assert_same_change(got, wanted)
