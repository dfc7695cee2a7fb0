"""Targets by data source and numbers on a schedule, in the trainer."""

import dataclasses

import pytest
import torch

import qtarget as qt
import tiny_models
from published import CASES, KINDS, dft, sft, target_sft
from qtarget import ConfigError
from qtarget.targets.schedule import ScheduledTarget
from quick_runs import (
    assert_same_change,
    change_by_training,
    copied_weights,
    count_supervised,
    labels_of,
    logged_values,
    logits_of,
    quick_config,
    quick_trainer,
    tokenised_dataset,
    tokenised_rows,
    train_quickly,
    trainable_parameters,
    weight_change,
)

CASE = {case.id: case for case in CASES}
LR = 0.3


def steps_by_hand(model, data, losses):
    """One step of SGD for each of ``losses``, which give per-token losses of a row."""
    model = model.eval()
    before = copied_weights(model)
    for loss in losses:
        model.zero_grad()
        (torch.cat([loss(model, row) for row in data]).sum() / count_supervised(data)).backward()
        with torch.no_grad():
            for parameter in trainable_parameters(model).values():
                parameter -= LR * parameter.grad
    return weight_change(before, model)


def several(**more):
    return {"max_steps": 4, "num_train_epochs": 9, "learning_rate": LR} | more


# -- schedules -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, etas", [("linear", [0.0, 0.25, 0.5, 0.5]), ("cosine", [0.0, 0.25, 0.5, 0.5]), ("constant", [0.5] * 4)]
)
def test_eta_moves_with_the_steps(kind, etas, tmp_path):
    teacher = tiny_models.trained_model(seed=7, width=48).double().eval()

    def at(eta):
        def loss(model, row):
            with torch.no_grad():
                other = logits_of(teacher, row)
            return target_sft(
                logits_of(model, row), labels_of(row), eta=eta, teacher_temperature=1.0, teacher_logits=other
            )

        return loss

    data = tiny_models.conversation_dataset(4)
    wanted = steps_by_hand(tiny_models.trained_model().double(), tokenised_rows(data), [at(eta) for eta in etas])
    schedule = {"schedule": kind, "from": 0.0, "to": 0.5, "steps": 2}
    target = {"preset": "target-sft", "eta": schedule}
    got = change_by_training(
        tiny_models.trained_model().double(), tmp_path, data, target=target, teacher_model=teacher, **several()
    )
    assert_same_change(got, wanted)


def test_a_warm_up_from_sft(tmp_path):
    """Shares of 0, ½, 1, 1 of dft, the rest sft."""

    def at(share):
        def loss(model, row):
            z, labels = logits_of(model, row), labels_of(row)
            return share * dft(z, labels) + (1 - share) * sft(z, labels)

        return loss

    data = tiny_models.conversation_dataset(4)
    wanted = steps_by_hand(
        tiny_models.trained_model().double(), tokenised_rows(data), [at(share) for share in (0, 0.5, 1, 1)]
    )
    target = {"preset": "dft", "warmup_from_sft": 2}
    made = quick_trainer(tiny_models.trained_model().double(), tmp_path, data, target=target, **several())
    before = copied_weights(made.model)
    made.train()
    assert_same_change(weight_change(before, made.model), wanted)
    assert logged_values(made, "target/share") == [0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("name", [case.id for case in KINDS if "old_logps" not in case.needs])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_share_of_any_objective(name, share):
    """Oracle and engine against the published losses mixed by hand; value and gradient."""
    case = CASE[name]
    generator = torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(9, 8, generator=generator).double(), torch.randn(31, 8, generator=generator).double()
    z = hidden @ weight.T
    labels = torch.randint(0, 31, (9,), generator=generator)
    given = {
        "vocab_size": 31,
        "weight": torch.rand(9, generator=generator).double(),
        "critical": torch.tensor([0, 1, 1, 0, 1, 0, 1, 1, 0]).double(),
        "teacher_logits": torch.randn(9, 31, generator=generator).double(),
        "reference_logits": torch.randn(9, 31, generator=generator).double(),
    }
    leaf = z.clone().requires_grad_()
    mixed = share * case.loss(leaf, labels, given) + (1 - share) * sft(leaf, labels)
    (wanted,) = torch.autograd.grad(mixed.sum(), leaf)
    target = qt.Target.from_config({"preset": case.preset, **case.hyperparameters, "share": share})
    needed = {name: given[name] for name in case.needs if name != "vocab_size"}
    leaf = z.clone().requires_grad_()
    out = qt.target_loss(leaf, labels, target, reduction="sum", **needed)
    out.loss.backward()
    assert torch.allclose(leaf.grad, wanted, rtol=0, atol=1e-12)
    assert float(out.loss.detach()) == pytest.approx(float(mixed.detach().sum()), rel=1e-9)
    if not any("logits" in name for name in needed):
        leaf = hidden.clone().requires_grad_()
        fused = qt.linear_target_loss(leaf, weight, labels, target, reduction="sum", **needed)
        fused.loss.backward()
        assert torch.allclose(leaf.grad, wanted @ weight, rtol=0, atol=1e-10)
        assert float(fused.loss.detach()) == pytest.approx(float(mixed.detach().sum()), rel=1e-9)


def test_a_share_is_written_back():
    target = qt.Target.from_config({"preset": "gem", "beta": 0.5, "share": 0.25})
    assert qt.Target.from_config(target.to_config()) == target and target.share == 0.25
    assert str(target) == "0.25 gem(beta=0.5, h=linear) + 0.75 sft"
    assert dataclasses.replace(qt.preset("kd"), share=0).requires == frozenset()


@pytest.mark.parametrize(
    "eta, told",
    [
        ({"schedule": "linear", "from": 0, "to": 1.5, "steps": 10}, "eta is 1.5; use a number from 0 to 1"),
        ({"schedule": "linear", "from": -1, "to": 0.5}, "eta is -1.0; use a number from 0 to 1"),
        ({"schedule": "linar", "from": 0, "to": 1}, "schedule of eta is 'linar'; did you mean 'linear'?"),
        ({"schedule": "linear", "to": 1}, "the schedule of eta has no from; give both"),
        (
            {"schedule": "linear", "from": 0, "to": 1, "step": 3},
            "key of the schedule of eta is 'step'; did you mean 'st",
        ),
        ({"schedule": "linear", "from": 0, "to": 1, "steps": 0}, "eta.steps is 0; use a whole number of steps"),
    ],
)
def test_a_schedule_that_makes_no_sense(eta, told, tmp_path):
    with pytest.raises(ConfigError) as error:
        quick_config(tmp_path, target={"preset": "target-sft", "eta": eta})
    assert told in str(error.value)


def test_a_number_of_tokens_has_no_schedule(tmp_path):
    schedule = {"schedule": "linear", "from": 10, "to": 20, "steps": 5}
    with pytest.raises(ConfigError, match=r"on the schedule top_k 10 → 20 \(linear, 5 steps\).*use a whole number"):
        quick_config(tmp_path, target={"preset": "eaft", "top_k": schedule})


def test_without_steps_a_schedule_takes_the_whole_run():
    target = ScheduledTarget.read({"preset": "gem", "beta": {"schedule": "linear", "from": 1.0, "to": 0.5}})
    assert [target.at(step, 10).hyperparameters["beta"] for step in (0, 5, 10, 20)] == [1.0, 0.75, 0.5, 0.5]


def test_a_teacher_is_freed_once_nothing_asks_for_it(tmp_path):
    eta = {"schedule": "linear", "from": 0.5, "to": 0.0, "steps": 2}
    made = quick_trainer(
        tiny_models.trained_model(),
        tmp_path,
        target={"preset": "target-sft", "eta": eta},
        teacher_model=tiny_models.trained_model(seed=7),
        **several(),
    )
    assert made.reads_teacher
    made.train()
    assert not made.reads_teacher and logged_values(made, "residual_mass")[1] > 0


# -- sources ---------------------------------------------------------------------------------------


def mixed(rows_of=8):
    data = tiny_models.conversation_dataset(rows_of)
    return data.add_column("source", ["math" if i % 3 else "chat" for i in range(len(data))])


@pytest.mark.parametrize(
    "settings",
    [{}, {"packing": True, "max_length": 116}, {"padding_free": True, "max_length": None}],
    ids=["padded", "packed", "padding-free"],
)
def test_each_source_has_its_own_target(settings, tmp_path):
    data = tokenised_rows(mixed())
    teacher = tiny_models.trained_model(seed=7, width=48).double().eval()

    def loss(model, row):
        if row["source"] == "chat":
            return sft(logits_of(model, row), labels_of(row))
        with torch.no_grad():
            other = logits_of(teacher, row)
        return target_sft(logits_of(model, row), labels_of(row), eta=0.5, teacher_temperature=1.0, teacher_logits=other)

    wanted = steps_by_hand(tiny_models.trained_model().double(), data, [loss])
    made = quick_trainer(
        tiny_models.trained_model().double(),
        tmp_path,
        mixed(),
        targets={"math": "target-sft", "chat": "sft"},
        teacher_model=teacher,
        learning_rate=LR,
        **settings,
    )
    made.args.per_device_train_batch_size = made._train_batch_size = -(-len(made.train_dataset) // 2)
    before = copied_weights(made.model)
    made.train()
    assert_same_change(weight_change(before, made.model), wanted)
    line = made.state.log_history[0]
    tokens = {name: count_supervised([row for row in data if row["source"] == name]) for name in ("math", "chat")}
    assert {name: line[f"{name}/supervised_tokens"] for name in tokens} == tokens
    assert line["chat/trust"] == 1 and line["math/trust"] < 1
    together = sum(line[f"{name}/nll"] * n for name, n in tokens.items()) / sum(tokens.values())
    assert line["nll"] == pytest.approx(together, rel=1e-9)


def test_sources_in_evaluation_and_on_a_schedule(tmp_path):
    beta = {"schedule": "linear", "from": 1.0, "to": 0.5, "steps": 2}
    made = train_quickly(
        tiny_models.trained_model(),
        tmp_path,
        mixed(),
        eval_dataset=mixed(),
        targets={"math": {"preset": "gem", "beta": beta}, "chat": "dft"},
        **several(),
    )
    assert logged_values(made, "math/target/beta") == [1.0, 0.75, 0.5, 0.5]
    metrics = made.evaluate()
    assert metrics["eval_math/trust"] == 1 > metrics["eval_chat/trust"]


@pytest.mark.parametrize(
    "settings, told",
    [
        (
            {"targets": {"math": "dft"}},
            "row 0 of the train dataset: source is 'chat', which targets does not name; add it",
        ),
        ({"targets": {"math": "dft", "chat": "sfft"}}, "targets.chat: target is 'sfft'; did you mean 'sft'"),
        ({"targets": {"math": "dft", "chat": "sft"}, "target": "dft"}, "the settings name targets and also target"),
        ({"targets": {"math": "dft", "chat": "sft"}, "source_column": "origin"}, "has no column 'origin'"),
        ({"targets": {}}, "targets is {}; write a target for each source"),
        ({"targets": {"math": "cft", "chat": "sft"}}, "no column 'critical'"),
    ],
    ids=str,
)
def test_sources_that_do_not_fit(settings, told, tmp_path):
    with pytest.raises(ConfigError) as error:
        quick_trainer(tiny_models.llama(), tmp_path, mixed(), **settings)
    assert told in str(error.value)


def test_an_evaluation_set_without_sources(tmp_path):
    targets = {"math": "dft", "chat": "sft"}
    with pytest.raises(ConfigError, match=r"the eval dataset has no column 'source'.*eval_target: sft"):
        quick_trainer(
            tiny_models.llama(),
            tmp_path,
            mixed(),
            eval_dataset=tiny_models.conversation_dataset(3),
            targets={"math": "dft", "chat": "sft"},
        )
    made = quick_trainer(
        tiny_models.llama(),
        tmp_path,
        mixed(),
        eval_dataset=tiny_models.conversation_dataset(3),
        targets=targets,
        eval_target="sft",
    )
    assert made.evaluate()["eval_trust"] == 1


def test_kept_tokens_are_counted_by_their_own_target(tmp_path):
    """cft's mask counts for cft's rows only."""
    data = tokenised_dataset(mixed(), critical=lambda number, row: [i % 2 == 0 for i in row["input_ids"]])
    data = data.add_column("source", mixed()["source"])
    made = quick_trainer(
        tiny_models.llama(), tmp_path, data, targets={"math": "cft", "chat": "cft"}, denominator="kept"
    )
    batch = [*made.get_train_dataloader()]
    kept = sum(
        label != -100 and critical
        for row in data
        for label, critical in zip(row["labels"][1:], row["critical"][1:], strict=True)
    )
    assert float(made.denominator(batch)) == kept
