"""What is saved loads without qtarget, and a run goes on where it stopped."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import qtarget as qt
import tiny_models
from qtarget import QTargetConfig
from quick_runs import logits_of, quick_config, quick_trainer, single_target, tokenised_rows, train_quickly

RESUMED = {
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 1,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 2,
}
MINE = qt.Target(trust=qt.trust.probability_power(0.5), residual=qt.residual.guided(eta=0.25))


def doubt(stats):
    """A trust rule of one's own."""
    return 0.5 * stats.log_p_y.exp()


@pytest.mark.parametrize("make", [tiny_models.llama, tiny_models.gpt2], ids=lambda make: make.__name__)
def test_a_saved_model_is_a_plain_one(make, tmp_path):
    row = tokenised_rows(tiny_models.conversation_dataset(1))[0]
    made = train_quickly(tiny_models.trained_model(make), tmp_path, target="dft", max_steps=2)
    made.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert type(loaded) is type(make()) and "qtarget" not in (tmp_path / "saved" / "config.json").read_text()
    with torch.no_grad():
        assert torch.equal(logits_of(loaded, row), logits_of(made.model.eval(), row))
        assert not torch.allclose(
            logits_of(loaded, row), logits_of(tiny_models.trained_model(make).eval(), row), atol=1e-3
        )


def test_a_model_in_training_still_generates_and_has_its_own_loss(tmp_path):
    """The trainer leaves ``model(...)`` and ``generate`` as they were."""
    made = quick_trainer(tiny_models.trained_model(), tmp_path)
    ids = torch.tensor([tokenised_rows(tiny_models.conversation_dataset(1))[0]["input_ids"]])
    model, plain = made.model.eval(), tiny_models.trained_model().eval()
    with torch.no_grad():
        ours, own = (m(input_ids=ids, labels=ids) for m in (model, plain))
        assert torch.equal(ours.loss, own.loss) and torch.equal(ours.logits, own.logits)
        mine, theirs = (m.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (model, plain))
        assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match="not_an_input"):
        model.generate(ids, not_an_input=1)


@pytest.mark.parametrize("target", ["dft", "asft"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(target, tmp_path):
    """4 steps against 2, a new trainer, and 2 more; asft's reference is the start in both."""
    data = tiny_models.conversation_dataset(12)
    whole = train_quickly(tiny_models.trained_model(), tmp_path, data, target=target, **RESUMED)
    again = quick_trainer(tiny_models.trained_model(), tmp_path, data, target=target, **RESUMED)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4
    start = tiny_models.trained_model().state_dict()
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight), name
        assert not torch.equal(weight, start[name]), name
    assert again.state.log_history[1]["nll"] == whole.state.log_history[1]["nll"]


@pytest.mark.parametrize(
    "target", ["dft", {"preset": "eaft", "top_k": 5}, qt.preset("target-sft", eta=0.0), MINE], ids=str
)
def test_settings_survive_json_and_pickle(target, tmp_path):
    made = quick_config(tmp_path, target=target, eval_target=qt.preset("gem"))
    as_json = json.loads(made.to_json_string())
    for form in (as_json, made.to_dict()):
        assert qt.Target.from_config(form["target"]) == qt.Target.from_config(target)
        assert qt.Target.from_config(form["eval_target"]) == qt.preset("gem")
    made.to_sanitized_dict()
    repr(made)
    torch.save(made, tmp_path / "args.bin")
    loaded = torch.load(tmp_path / "args.bin", weights_only=False)
    assert single_target(loaded) == single_target(made)
    assert single_target(QTargetConfig(str(tmp_path), target=as_json["target"])) == single_target(made)


def saved_arguments(folder):
    return torch.load(folder / "checkpoint-1" / "training_args.bin", weights_only=False)


def test_a_checkpoint_with_a_rule_of_ones_own(tmp_path):
    target = qt.Target(trust=doubt)
    made = train_quickly(tiny_models.llama(), tmp_path, target=target, save_strategy="steps", save_steps=1)
    assert single_target(saved_arguments(tmp_path)) == target == single_target(made.args)


def test_a_checkpoint_with_a_rule_that_cannot_be_pickled(tmp_path):
    """A lambda must not end the run when it is first saved; what is kept of it is its written form."""
    target = qt.Target(trust=lambda stats: 0.5 * stats.log_p_y.exp())
    made = train_quickly(tiny_models.llama(), tmp_path, target=target, save_strategy="steps", save_steps=1)
    assert single_target(made.args) is target
    assert saved_arguments(tmp_path).target == target.to_config()


def test_the_model_card_says_what_trained_it(tmp_path):
    train_quickly(tiny_models.llama(), tmp_path, save_strategy="steps", save_steps=1)
    assert "qtarget" in (tmp_path / "README.md").read_text()
