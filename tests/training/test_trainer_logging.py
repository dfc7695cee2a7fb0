"""What is logged and evaluated, against the same numbers from full logits."""

import pytest
import torch

import qtarget as qt
import tiny_models
from published import CASES
from qtarget import ConfigError
from quick_runs import (
    count_supervised,
    labels_of,
    logged_values,
    logits_of,
    per_row_losses,
    quick_trainer,
    tokenised_dataset,
    tokenised_rows,
    train_quickly,
)

CASE = {case.id: case for case in CASES}
STATISTICS = {
    *("nll", "ce_q", "kl_q", "trust", "residual_mass", "strength", "update"),
    *("entropy", "accuracy", "off_simplex_fraction"),
}


def teacher():
    return tiny_models.trained_model(seed=7, width=48).double().eval()


def student():
    return tiny_models.trained_model().double().eval()


def by_hand(case, data, model=None, other=None):
    """Per-token statistics of each row: all that follows from p, the label and the gradient on the logits."""
    made = []
    for row in data:
        kept = {}

        def loss(logits, labels, kept=kept, **given):
            kept["z"] = logits.detach().requires_grad_()
            kept["loss"] = case.loss(kept["z"], labels, given)
            return kept["loss"]

        list(per_row_losses(student() if model is None else model, [row], loss, other))
        (g,) = torch.autograd.grad(kept["loss"].sum(), kept["z"])
        p = kept["z"].detach().softmax(-1)
        y, Q = labels_of(row), p - g
        off = (Q < -1e-12).any(-1)
        nll = -p.gather(1, y[:, None]).squeeze(1).log()
        made.append(
            {
                "loss": kept["loss"].detach(),
                "nll": nll,
                "ce_q": -(Q * p.log()).sum(-1),
                "kl_q": torch.special.xlogy(Q.clamp(min=0), Q.clamp(min=0) / p).sum(-1).where(~off, torch.nan),
                "update": g.abs().sum(-1) / 2,
                "entropy": -(p * p.log()).sum(-1),
                "accuracy": (p.argmax(-1) == y).double(),
                "off_simplex_fraction": off.double(),
            }
        )
    return made


def over_tokens(per_row):
    return {name: float(torch.cat([row[name] for row in per_row]).nanmean()) for name in per_row[0]}


def over_rows(per_row):
    return {name: float(torch.stack([row[name].nanmean() for row in per_row]).mean()) for name in per_row[0]}


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "dft", "target-sft", "gem", "kd:temperature=2.0", "label-smoothing"])
def test_statistics_are_means_over_tokens(name, tmp_path):
    """Two steps of 1 x 4 rows with nothing learned: eight unequal rows, once each, in one line."""
    case, data = CASE[name], tiny_models.conversation_dataset(8)
    other = teacher() if "teacher_logits" in case.needs else None
    per_row = by_hand(case, tokenised_rows(data), other=other)
    wanted = over_tokens(per_row)
    assert wanted["nll"] != pytest.approx(over_rows(per_row)["nll"], rel=1e-3), "rows alike cannot tell the two apart"
    made = train_quickly(
        student(),
        tmp_path,
        data,
        target={"preset": case.preset, **case.hyperparameters},
        teacher_model=teacher() if other is not None else None,
        learning_rate=0.0,
        max_steps=2,
        logging_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    line = made.state.log_history[0]
    for statistic in STATISTICS - {"trust", "residual_mass", "strength", "kl_q"}:
        assert line[statistic] == pytest.approx(wanted[statistic], rel=1e-6, abs=1e-12), statistic
    assert line["supervised_tokens"] == count_supervised(tokenised_rows(data))
    assert "mean_token_accuracy" not in line, "TRL's name of it: logged once"
    assert line["strength"] == pytest.approx(line["trust"] + line["residual_mass"])


def test_parts_of_the_target(tmp_path):
    """trust is the mean of a, residual_mass that of b: for target-sft p_y and 1 − p_y."""
    data = tiny_models.conversation_dataset(4)
    made = train_quickly(student(), tmp_path, data, target="target-sft", teacher_model=teacher())
    p_y = torch.cat([(-row["nll"]).exp() for row in by_hand(CASE["sft"], tokenised_rows(data))]).mean()
    line = made.state.log_history[0]
    assert not STATISTICS - line.keys()
    assert line["trust"] == pytest.approx(float(p_y)) and line["residual_mass"] == pytest.approx(1 - float(p_y))
    assert line["strength"] == pytest.approx(1)


def test_the_first_loss_is_the_objectives_value(tmp_path):
    case, data = CASE["target-sft"], tiny_models.conversation_dataset(4)
    made = train_quickly(student(), tmp_path, data, target="target-sft", teacher_model=teacher())
    wanted = over_tokens(by_hand(case, tokenised_rows(data), other=teacher()))["loss"]
    assert logged_values(made, "loss")[0] == pytest.approx(wanted, rel=1e-6)


def test_kl_q_on_logging_steps_and_where_it_is_defined(tmp_path):
    """It costs a logarithm per entry. A token whose Q leaves the simplex has none and takes no part; where no
    token has one, the name is absent instead of a zero."""
    data = tokenised_dataset(tiny_models.conversation_dataset(4), weight=lambda number, row: 3.0 if number % 2 else 0.5)
    settings = {"learning_rate": 0.0, "max_steps": 2, "logging_steps": 2, "logging_first_step": True}
    first, second, _ = train_quickly(student(), tmp_path, data, target="iw-sft", **settings).state.log_history
    wanted = over_tokens(by_hand(CASE["iw-sft"], tokenised_rows(data)))
    assert 0 < wanted["off_simplex_fraction"] < 1
    for line in (first, second):
        assert line["kl_q"] == pytest.approx(wanted["kl_q"], rel=1e-6)
        assert line["off_simplex_fraction"] == pytest.approx(wanted["off_simplex_fraction"])
    heavy = tokenised_dataset(tiny_models.conversation_dataset(4), weight=lambda number, row: 3.0)
    line = train_quickly(student(), tmp_path, heavy, target="iw-sft", **settings).state.log_history[0]
    assert line["off_simplex_fraction"] == 1 and "kl_q" not in line


@pytest.mark.parametrize(
    "settings, parts",
    [
        ({"target": "dft"}, ["target dft: L = −sg(p_y) log p_y;  a = p_y", "denominator all_labels"]),
        (
            {"target": "kd", "teacher_model": "made", "denominator": "micro_batch"},
            [
                "target kd(temperature=1.0): L = CE(t, p)",
                "denominator micro_batch",
                "teacher LlamaForCausalLM, weights ",
            ],
        ),
        (
            {"target": "asft"},
            ["target asft(kl_weight=0.05", "λ KL(ref ‖ p)", "reference the weights at the start"],
        ),
    ],
    ids=["dft", "kd", "asft"],
)
def test_the_first_line_says_what_is_trained(settings, parts, tmp_path, capsys):
    if "teacher_model" in settings:
        settings = settings | {"teacher_model": tiny_models.llama(1)}
    made = quick_trainer(tiny_models.llama(), tmp_path, **settings)
    capsys.readouterr()
    made.train()
    first = capsys.readouterr().out.splitlines()[0]
    assert all(part in first for part in parts), first


# -- evaluation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "sft",
        "dft",
        "gem",
        "target-sft",
        "kd",
        "sft-kl:kl_weight=3.0",
        "label-smoothing",
        "eaft",
        "profit",
        "iw-sft",
    ],
)
def test_evaluation_is_a_mean_over_tokens(name, tmp_path):
    """Batches of three rows out of seven: the last one is short. nll is there whatever the target."""
    case = CASE[name]
    data = tokenised_dataset(tiny_models.conversation_dataset(7), weight=lambda number, row: number / 4)
    other = teacher() if "teacher_logits" in case.needs else None
    made = quick_trainer(
        student(),
        tmp_path,
        data,
        eval_dataset=data,
        target={"preset": case.preset, **case.hyperparameters},
        teacher_model=teacher() if other is not None else None,
        per_device_eval_batch_size=3,
    )
    if "reference_logits" in case.needs:
        made.aux.reference.model.load_state_dict(tiny_models.trained_model(seed=9).state_dict())
        reference = tiny_models.trained_model(seed=9).double().eval()
        case_loss = case.loss

        class Anchored:
            @staticmethod
            def loss(logits, labels, given):
                return case_loss(logits, labels, given | {"reference_logits": given["teacher_logits"]})

        per_row = by_hand(Anchored, tokenised_rows(data), other=reference)
    else:
        per_row = by_hand(case, tokenised_rows(data), other=other)
    wanted, metrics = over_tokens(per_row), made.evaluate()
    assert wanted["nll"] != pytest.approx(over_rows(per_row)["nll"], rel=1e-3)
    for statistic, value in wanted.items():
        if value == value:
            assert metrics[f"eval_{statistic}"] == pytest.approx(value, rel=1e-6, abs=1e-12), statistic
        else:
            assert f"eval_{statistic}" not in metrics
    assert metrics["eval_supervised_tokens"] == count_supervised(tokenised_rows(data))
    assert "eval_mean_token_accuracy" not in metrics


def test_evaluation_of_plain_text(tmp_path):
    """The first token of a row is labelled, yet nothing predicts it: it weighs nothing in eval_loss either."""
    data = tiny_models.text_dataset(5)
    made = quick_trainer(student(), tmp_path, data, eval_dataset=data, target="dft", per_device_eval_batch_size=2)
    wanted = over_tokens(by_hand(CASE["dft"], tokenised_rows(data)))
    metrics = made.evaluate()
    assert metrics["eval_loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    assert metrics["eval_nll"] == pytest.approx(wanted["nll"], rel=1e-6)
    assert metrics["eval_supervised_tokens"] == count_supervised(tokenised_rows(data))


def test_another_target_for_evaluation(tmp_path):
    """The training loss stays the target's own; evaluation reports eval_target."""
    data = tiny_models.conversation_dataset(4)
    made = train_quickly(
        student(),
        tmp_path,
        data,
        eval_dataset={"long": data, "short": data.select([0])},
        target="dft",
        eval_target={"preset": "label-smoothing", "smoothing": 0.3},
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=0.0,
        max_steps=2,
    )
    smooth, plain = (
        over_tokens(by_hand(CASE[name], tokenised_rows(data))) for name in ("label-smoothing:smoothing=0.3", "dft")
    )
    assert logged_values(made, "loss") == pytest.approx([plain["loss"]] * 2, rel=1e-6)
    assert logged_values(made, "trust") == pytest.approx([made.state.log_history[0]["trust"]] * 2)
    assert logged_values(made, "supervised_tokens") == [count_supervised(tokenised_rows(data))] * 2, (
        "evaluation's tokens are not training's"
    )
    assert logged_values(made, "eval_long_loss") == pytest.approx([smooth["loss"]] * 2, rel=1e-6)
    assert logged_values(made, "eval_long_nll") == pytest.approx([plain["nll"]] * 2, rel=1e-6)
    first = over_tokens(by_hand(CASE["dft"], tokenised_rows(data.select([0]))))
    assert logged_values(made, "eval_short_nll") == pytest.approx([first["nll"]] * 2, rel=1e-6)


def test_how_far_is_the_teacher(tmp_path):
    """``evaluating("kd")``: the teacher's cross-entropy and KL(teacher ‖ student); then all is as before."""
    data = tiny_models.conversation_dataset(4)
    made = quick_trainer(student(), tmp_path, data, eval_dataset=data, target="target-sft", teacher_model=teacher())
    before = made.evaluate()
    with made.evaluating("kd"):
        metrics = made.evaluate()
    ce, kl = [], []
    for row in tokenised_rows(data):
        with torch.no_grad():
            log_p, log_t = (logits_of(model, row).log_softmax(-1) for model in (student(), teacher()))
        ce.append(-(log_t.exp() * log_p).sum(-1))
        kl.append((log_t.exp() * (log_t - log_p)).sum(-1))
    for name, value in {"loss": ce, "ce_q": ce, "kl_q": kl}.items():
        assert metrics[f"eval_{name}"] == pytest.approx(float(torch.cat(value).mean()), rel=1e-6), name
    after = made.evaluate()
    assert after["eval_loss"] == before["eval_loss"] != metrics["eval_loss"]


def test_evaluating_with_a_model_that_is_not_there(tmp_path):
    data = tiny_models.conversation_dataset(4)
    made = quick_trainer(tiny_models.llama(), tmp_path, data, eval_dataset=data)
    with pytest.raises(ConfigError, match="needs a teacher") as error, made.evaluating("kd"):
        pass
    assert str(error.value).endswith("did not load; name the target in eval_target when you create the trainer")
    for target, what in {"asft": "a reference", "cft": "column 'critical'"}.items():
        with pytest.raises(ConfigError, match=f"needs {what}"), made.evaluating(target):
            pass
    with pytest.raises(ConfigError, match="target is 'kdd'; did you mean 'kd'"), made.evaluating("kdd"):
        pass
    assert made.eval_objective.targets[None].final == qt.preset("sft")


@pytest.mark.parametrize("make", [tiny_models.llama, tiny_models.no_kwargs], ids=lambda make: make.__name__)
def test_evaluating_without_the_column_that_evaluation_reads(make, tmp_path):
    """The column neither reaches the model in between nor is it gone afterwards."""
    data = tokenised_dataset(tiny_models.conversation_dataset(4), weight=lambda number, row: 2.0)
    made = quick_trainer(make(), tmp_path, data, eval_dataset=data, target="dft", eval_target="iw-sft")
    seen = []
    made.model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.extend(kwargs), with_kwargs=True)
    with made.evaluating("sft"):
        assert made.evaluate()["eval_trust"] == 1
    assert made.evaluate()["eval_trust"] == 2
    with made.evaluating("sft"):
        assert made.evaluate()["eval_trust"] == 1
    assert "input_ids" in seen and "weight" not in seen


def test_metrics_of_ones_own_see_real_logits(tmp_path):
    seen = {}

    def compute_metrics(prediction):
        seen["logits"], seen["labels"] = prediction.predictions, prediction.label_ids
        return {"shape": prediction.predictions.ndim}

    data = tokenised_dataset(tiny_models.conversation_dataset(1))
    made = quick_trainer(
        tiny_models.trained_model(), tmp_path, data, eval_dataset=data, target="dft", compute_metrics=compute_metrics
    )
    metrics = made.evaluate()
    row = tokenised_rows(data)[0]
    with torch.no_grad():
        own = tiny_models.trained_model().eval()(input_ids=torch.tensor([row["input_ids"]])).logits
    assert torch.allclose(torch.as_tensor(seen["logits"]), own, atol=1e-5)
    assert seen["labels"].tolist() == [row["labels"]]
    assert metrics["eval_shape"] == 3 and metrics["eval_nll"] > 0


@pytest.mark.parametrize("make", [tiny_models.gpt2, tiny_models.no_kwargs], ids=lambda make: make.__name__)
def test_metrics_of_ones_own_with_other_forwards(make, tmp_path):
    """A forward without ``**kwargs`` refuses what the trainer adds."""
    data = tiny_models.conversation_dataset(2)
    made = quick_trainer(
        tiny_models.trained_model(make),
        tmp_path,
        data,
        eval_dataset=data,
        compute_metrics=lambda p: {"ok": p.predictions.ndim},
    )
    assert made.evaluate()["eval_ok"] == 3


def test_predict_reports_under_its_own_name(tmp_path):
    data = tiny_models.conversation_dataset(4)
    made = quick_trainer(student(), tmp_path, data, eval_dataset=data)
    metrics = made.predict(made.eval_dataset).metrics
    assert metrics["test_loss"] == pytest.approx(
        over_tokens(by_hand(CASE["sft"], tokenised_rows(data)))["loss"], rel=1e-6
    )
    assert metrics["test_nll"] == pytest.approx(metrics["test_loss"])
