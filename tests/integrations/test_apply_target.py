"""``apply_target``: the model's own forward returns the target's loss, with Transformers' semantics."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import qtarget as qt
import tiny_models
from published import CASES
from qtarget import ConfigError, DataError
from quick_runs import quick_trainer, tokenised_rows

CASE = {case.id: case for case in CASES}
LABELS = torch.tensor([[-100, -100, 5, 9, 3, 7], [-100, 4, 8, 2, -100, -100]])
IDS = torch.tensor([[1, 6, 5, 9, 3, 7], [2, 4, 8, 2, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
INPUTS = {"input_ids": IDS, "attention_mask": MASK}
COLUMNS = {
    "weight": torch.tensor([[0.5] * 6, [2.0] * 6], dtype=torch.float64),
    "critical": torch.tensor([[1, 1, 1, 0, 1, 0], [0, 1, 0, 1, 1, 1]]).bool(),
    "old_logps": -torch.rand(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 8,
}


def student(**settings):
    return tiny_models.trained_model(**settings).double().train()


def teacher():
    return tiny_models.llama(seed=3).double()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_autograd(target, num_items=None, model=None):
    """Loss and gradients of the oracle on the model's own logits, shifted here."""
    model = student() if model is None else model
    logits = model(**INPUTS).logits[:, :-1]
    given = {}
    if "teacher" in target.requires:
        given["teacher_logits"] = teacher()(**INPUTS).logits[:, :-1].detach()
    if "reference" in target.requires:
        given["reference_logits"] = logits.detach()
    names = {"weight": "weight", "critical": "critical", "old_policy": "old_logps"}
    given |= {column: COLUMNS[column][:, 1:] for need, column in names.items() if need in target.requires}
    out = qt.target_loss(logits, LABELS[:, 1:], target, num_items=num_items, **given)
    out.loss.backward()
    return out.loss.detach(), gradients(model)


def assert_same(found, wanted):
    assert {*found} == {*wanted}
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("preset", qt.presets.names())
@pytest.mark.parametrize("num_items", [None, 11])
def test_loss_and_gradients_are_the_oracles(preset, num_items):
    target = qt.preset(preset)
    columns = COLUMNS if {"old_policy", "critical", "weight"} & target.requires else {}
    loss, wanted = by_autograd(target, num_items)
    model = qt.apply_target(student(), target, **({"teacher": teacher()} if "teacher" in target.requires else {}))
    count = {} if num_items is None else {"num_items_in_batch": torch.tensor(num_items)}
    out = model(**INPUTS, labels=LABELS, **columns, **count)
    assert out.logits is None
    torch.testing.assert_close(out.loss.detach(), loss, rtol=1e-9, atol=1e-12)
    out.loss.backward()
    assert_same(gradients(model), wanted)


def test_sft_is_the_models_own_loss():
    model = student()
    own = model(**INPUTS, labels=LABELS).loss.double()  # Transformers takes it in float32
    qt.apply_target(model, "sft")
    torch.testing.assert_close(model(**INPUTS, labels=LABELS).loss, own, rtol=1e-6, atol=0)
    torch.testing.assert_close(model(IDS, MASK, labels=LABELS).loss, own, rtol=1e-6, atol=0)  # given by position


@pytest.mark.parametrize("by_config", [True, False])
def test_experts_are_balanced_where_the_host_asks_for_it(by_config):
    """In the config, or in the call, as ms-swift does."""
    model = tiny_models.trained_model(tiny_models.qwen3_moe).train()
    model.config.output_router_logits = by_config
    asked = {} if by_config else {"output_router_logits": True}
    balanced, plain = INPUTS | {"labels": LABELS} | asked, INPUTS | {"labels": LABELS, "output_router_logits": False}
    own = [model(**inputs).loss for inputs in (balanced, plain)]
    assert own[0] > own[1] + 1e-3
    qt.apply_target(model, "sft")
    torch.testing.assert_close([model(**inputs).loss for inputs in (balanced, plain)], own, rtol=1e-6, atol=0)


def test_without_labels_and_after_removal_the_model_is_as_it_was():
    model = student()
    logits, own = model(**INPUTS).logits, model(**INPUTS, labels=LABELS)
    qt.apply_target(model, "dft")
    assert model(**INPUTS, labels=LABELS).loss != own.loss
    torch.testing.assert_close(model(**INPUTS).logits, logits)
    assert model.generate(IDS[:1], max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (1, 8)
    assert qt.remove_target(model) is model
    assert "forward" not in model.__dict__ and "_qtarget_forward" not in model.__dict__
    again = model(**INPUTS, labels=LABELS)
    assert torch.equal(again.loss, own.loss) and torch.equal(again.logits, own.logits)
    qt.apply_target(model, "eaft")  # and takes another


def test_a_forward_that_was_there_before_comes_back():
    model = student()
    own = model.forward
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)  # as Accelerate's hooks stand on a model
    there = model.__dict__["forward"]
    qt.remove_target(qt.apply_target(model, "dft"))
    assert model.__dict__["forward"] is there


def test_figures_are_means_over_the_labels_of_training():
    model = qt.apply_target(student(), "dft")
    model(**INPUTS, labels=LABELS)
    model.eval()
    model(**INPUTS, labels=LABELS.clamp(max=3))  # evaluation is not counted
    with torch.no_grad():
        logits = model(**INPUTS).logits[:, :-1]
    stats = qt.target_loss(logits, LABELS[:, 1:], qt.preset("dft")).stats
    figures = qt.applied_to(model).figures()
    for name in ("nll", "trust", "update", "entropy"):
        assert figures[name] == pytest.approx(stats[name].nanmean().item(), rel=1e-6), name
    assert qt.applied_to(model).figures() == {}


def test_logits_in_evaluation_when_asked():
    model = qt.apply_target(student(), "dft", eval_logits=True)
    assert model(**INPUTS, labels=LABELS).logits is None
    model.eval()
    torch.testing.assert_close(model(**INPUTS, labels=LABELS).logits, model(**INPUTS).logits)


@pytest.mark.parametrize(
    "kept, labelled",
    [(5, [1, 2, 3, 4, 5]), (torch.tensor([False, True, True, False, True, True]), [0, 2, 3, 5])],
    ids=["last", "mask"],
)
def test_labels_cut_with_the_logits_train_the_same(kept, labelled):
    """As ms-swift calls a model: logits_to_keep, and the labels of those logits alone, the first of which is not read."""
    cut = {"labels": LABELS[:, labelled], "logits_to_keep": kept}
    model = student()
    own = model(**INPUTS, **cut).loss.double()
    qt.apply_target(model, "sft")
    torch.testing.assert_close(model(**INPUTS, **cut).loss, own, rtol=1e-6, atol=0)
    embedded = {"inputs_embeds": model.get_input_embeddings()(IDS), "attention_mask": MASK}  # as for pictures
    unread = {"weight": torch.ones(2)}  # a number a row, which sft does not read
    torch.testing.assert_close(model(**embedded, **cut, **unread).loss, own, rtol=1e-6, atol=0)
    qt.apply_target(qt.remove_target(model), "iw-sft", eval_logits=True).eval()
    whole = torch.full_like(LABELS, -100)
    whole[:, labelled[1:]] = LABELS[:, labelled[1:]]
    weight = COLUMNS["weight"] * torch.arange(1, 7)
    found = model(**INPUTS, **cut, weight=weight[:, labelled])
    torch.testing.assert_close(found.loss, model(**INPUTS, labels=whole, weight=weight).loss, rtol=1e-12, atol=0)
    assert found.logits.shape[1] == len(labelled)


@pytest.mark.parametrize("preset", ["dft", "target-sft", "asft"])
def test_adapters(preset):
    """Trained beside a frozen base; the reference is the model with its adapters off."""
    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(student(), lora, autocast_adapter_dtype=False)
    target = qt.preset(preset)
    with torch.no_grad(), model.disable_adapter():
        reference = model(**INPUTS).logits[:, :-1]
    given = {"teacher_logits": teacher()(**INPUTS).logits[:, :-1].detach()} if "teacher" in target.requires else {}
    given |= {"reference_logits": reference} if "reference" in target.requires else {}
    qt.target_loss(model(**INPUTS).logits[:, :-1], LABELS[:, 1:], target, **given).loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    qt.apply_target(model, preset, **({"teacher": teacher()} if "teacher" in target.requires else {}))
    model(**INPUTS, labels=LABELS).loss.backward()
    assert_same(gradients(model), wanted)
    qt.remove_target(model)


def test_gradient_checkpointing_changes_nothing():
    _, wanted = by_autograd(qt.preset("dft"))
    model = student()
    model.gradient_checkpointing_enable()
    qt.apply_target(model, "dft")(**INPUTS, labels=LABELS).loss.backward()
    assert_same(gradients(model), wanted)


@pytest.mark.parametrize(
    "ask, says",
    [
        (lambda m: qt.apply_target(m, "kd"), r"target kd\(.*\) needs a teacher; give one"),
        (lambda m: qt.apply_target(m, "no-such"), "no-such"),
        (lambda m: qt.apply_target(qt.apply_target(m, "sft"), "dft"), "has target sft already; remove it first"),
        (lambda m: qt.remove_target(m), "has no target; apply one with"),
        (lambda m: qt.apply_target(torch.nn.DataParallel(m), "sft"), "a DataParallel, not a causal language model"),
        (lambda m: qt.apply_target(m, "iw-sft")(**INPUTS, labels=LABELS), "needs the column 'weight'"),
        (
            lambda m: qt.apply_target(m, "iw-sft")(**INPUTS, labels=LABELS, weight=torch.ones(2)),
            r"the column 'weight' has shape \(2,\), labels \(2, 6\)",
        ),
        (lambda m: qt.apply_target(m, "sft")(**INPUTS, labels=LABELS, shift_labels=LABELS), "shift_labels is given"),
        (
            lambda m: qt.apply_target(
                m, {"preset": "beyond-log", "alpha": {"schedule": "linear", "from": 1.0, "to": 2.0}}
            )(**INPUTS, labels=LABELS),
            "has a schedule, but the length of the run is not known",
        ),
    ],
)
def test_what_cannot_be_is_said(ask, says):
    with pytest.raises((ConfigError, DataError), match=says):
        ask(student())


# -- in Transformers' trainer --------------------------------------------------------------------------------------


def arguments(folder, **more):
    settings = dict(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        weight_decay=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=3,
        remove_unused_columns=False,
    )
    return TrainingArguments(str(folder), **{**settings, **more})


def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        name: torch.tensor([list(row[name]) + [value] * (width - len(row[name])) for row in rows])
        for name, value in fill.items()
    }


def rows():
    made = tokenised_rows(tiny_models.conversation_dataset(8))
    return [
        {"input_ids": row["input_ids"], "labels": row["labels"], "attention_mask": [1] * len(row["input_ids"])}
        for row in made
    ]


def test_the_callback_trains_as_a_qtarget_trainer(tmp_path):
    """Two steps of two uneven micro-batches each: the same weights, from the host's own Trainer."""
    target = {"preset": "target-sft", "eta": {"schedule": "linear", "from": 0.0, "to": 1.0}}
    data = rows()
    model = tiny_models.trained_model().double()
    callback = qt.TargetCallback(target, teacher=teacher())
    trainer = Trainer(model, arguments(tmp_path), train_dataset=data, data_collator=collate, callbacks=[callback])
    trainer.train()
    ours = quick_trainer(
        tiny_models.trained_model().double(),
        tmp_path / "ours",
        Dataset.from_list(data),
        target=target,
        teacher_model=teacher(),
        max_steps=2,
        learning_rate=1e-2,
        optim="adamw_torch",
        seed=3,
    )
    ours.train()
    for (name, found), wanted in zip(model.named_parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(found, wanted.to(found.dtype), rtol=1e-7, atol=1e-9, msg=name)
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert [{*line} >= {"target/nll", "target/trust", "target/update"} for line in logged] == [True, True]


def test_a_host_with_a_loss_of_its_own_is_stopped(tmp_path):
    settings = dict(train_dataset=rows(), data_collator=collate, callbacks=[qt.TargetCallback("dft")])
    model = tiny_models.trained_model()
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(model, arguments(tmp_path, label_smoothing_factor=0.1), **settings)
    with pytest.raises(ConfigError, match="step 1: the trainer did not train the loss of target dft"):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_callback_that_comes_too_late(tmp_path):
    trainer = Trainer(tiny_models.trained_model(), arguments(tmp_path), train_dataset=rows(), data_collator=collate)
    trainer.add_callback(qt.TargetCallback("dft"))
    with pytest.raises(ConfigError, match="added after the trainer was made"):
        trainer.train()
