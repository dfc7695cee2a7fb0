"""What is evaluated and predicted is TRL's: every figure, every logit, at every time it can be asked for."""

import functools

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from peft import LoraConfig, PromptTuningConfig

import tiny_models
from beside_trl import (
    CLOSE,
    OURS,
    OVER_TOKENS,
    TIMES,
    TRL,
    assert_same_run,
    assert_same_way,
    make_trainer,
    our_name,
    side_by_side,
)
from dataset_shapes import streamed
from quick_runs import tokenised_dataset, tokenised_rows

LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
PROMPT = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
WHOLE = {"per_device_eval_batch_size": 8}  # one batch: TRL's mean over batches is then qtarget's over tokens


def both(folder, data, given=None, model=tiny_models.trained_model, **settings):
    """TRL's trainer and ours, not yet trained."""
    return [make_trainer(kind, model(), folder, data, given or {}, **settings) for kind in (TRL, OURS)]


def assert_holds(ours, theirs, prefix="eval_"):
    """Every figure TRL gives, ours gives too. Left out: times, and num_tokens, which is no figure of an evaluation.

    TRL gives the entropy and accuracy of every set under the same names, qtarget under those of the set.
    """
    assert theirs
    for name, value in theirs.items():
        if name.startswith("eval_") and name[5:] in OVER_TOKENS:
            name = prefix + name[5:]
        if not name.endswith((*TIMES, "num_tokens")):
            assert our_name(name) in ours, f"{name} is not logged"
            assert ours[our_name(name)] == pytest.approx(value, rel=CLOSE, abs=1e-7), name


EVALUATED = {
    "text": (tiny_models.text_dataset, {}),
    "completions": (tiny_models.conversation_dataset, {}),
    "dft": (tiny_models.conversation_dataset, {"loss_type": "dft"}),
    "bfd": (tiny_models.conversation_dataset, {"packing": True, "max_length": 64}),
    "bfd in training only": (
        tiny_models.conversation_dataset,
        {"packing": True, "max_length": 64, "eval_packing": False},
    ),
    "wrapped in evaluation only": (
        tiny_models.conversation_dataset,
        {"packing_strategy": "wrapped", "max_length": 64, "eval_packing": True},
    ),
    "padding_free": (tiny_models.message_dataset, {"padding_free": True, "max_length": None}),
    "a stream": (streamed(tiny_models.text_dataset), {}),
}


@pytest.mark.parametrize("case", EVALUATED)
def test_evaluation(case, tmp_path):
    data, settings = EVALUATED[case]
    theirs, ours = both(tmp_path, data(), {"eval_dataset": data()}, **WHOLE, **settings)
    before = ours.evaluate()
    assert_holds(before, theirs.evaluate())
    for made in (theirs, ours):
        made.train()
    after = ours.evaluate()
    assert_holds(after, theirs.evaluate())
    assert after["eval_loss"] != before["eval_loss"]
    assert_holds(ours.state.log_history[-1], theirs.state.log_history[-1])


def test_evaluation_logs_how_many_tokens_were_trained(tmp_path):
    data = tiny_models.conversation_dataset()
    theirs, ours = side_by_side(
        tmp_path, lambda: data, given={"eval_dataset": data}, eval_strategy="steps", eval_steps=3
    )
    wanted, got = (
        [entry["eval_num_tokens"] for entry in made.trainer.state.log_history if "eval_num_tokens" in entry]
        for made in (theirs, ours)
    )
    assert wanted[0] > 0 and got == wanted


def test_evaluation_of_a_mixture_of_experts(tmp_path):
    data = tiny_models.conversation_dataset()
    theirs, ours = both(tmp_path, data, {"eval_dataset": data}, tiny_models.qwen3_moe, **WHOLE)
    assert_holds(ours.evaluate(), theirs.evaluate())
    assert_holds(ours.state.log_history[-1], theirs.state.log_history[-1])


@pytest.mark.parametrize("kind", [dict, DatasetDict], ids=lambda kind: kind.__name__)
def test_several_evaluation_sets(kind, tmp_path):
    """While training and after it."""
    sets = kind(
        {"seen": tiny_models.conversation_dataset(4), "prose": tiny_models.conversation_dataset(8).select(range(4, 8))}
    )
    settings = {"eval_strategy": "steps", "eval_steps": 2, **WHOLE}
    theirs, ours = side_by_side(
        tmp_path, lambda: tiny_models.conversation_dataset(4), given={"eval_dataset": sets}, **settings
    )
    assert_same_run(theirs, ours)
    found = []
    for trls, mine in zip(theirs.trainer.state.log_history, ours.trainer.state.log_history, strict=True):
        for name in sets:
            if f"eval_{name}_loss" in trls:
                found.append(name)
                assert_holds(mine, trls, f"eval_{name}_")
    assert found == ["seen", "prose"] * 2


def test_evaluation_of_a_set_that_comes_later(tmp_path):
    """Raw, as a user has it: evaluate prepares it as it would have been at the start."""
    theirs, ours = both(tmp_path, tiny_models.conversation_dataset(), {}, max_length=30, **WHOLE)
    assert_holds(
        ours.evaluate(tiny_models.conversation_dataset(4)), theirs.evaluate(tiny_models.conversation_dataset(4))
    )
    sets = {"a": tiny_models.message_dataset(4), "b": tiny_models.conversation_dataset(4)}
    assert_holds(ours.evaluate(sets), theirs.evaluate(sets), "eval_b_")
    mine, trls = (made.evaluate(tiny_models.message_dataset(4), metric_key_prefix="x") for made in (ours, theirs))
    assert_holds(mine, trls, "x_")


@pytest.mark.parametrize("best", ["loss", "mean_token_accuracy"])
def test_the_best_of_a_run(best, tmp_path):
    """It is the second step of three."""
    settings = {
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": best,
        **WHOLE,
    }
    given = {"eval_dataset": tiny_models.conversation_dataset(4)}
    theirs, ours = side_by_side(tmp_path, tiny_models.conversation_dataset, given=given, **settings)
    assert ours.trainer.state.best_global_step == theirs.trainer.state.best_global_step == 2
    assert_same_way(theirs, ours)


# -- logits for metrics and predictions ------------------------------------------------------------


def hits(prediction):
    """Next tokens that are predicted; a mean over all rows."""
    guessed, labels = prediction.predictions[:, :-1].argmax(-1), prediction.label_ids[:, 1:]
    return {"hits": float((guessed == labels)[labels != -100].mean()), "shape": prediction.predictions.ndim}


def best(logits, labels):
    return logits.argmax(-1)


def hits_of_best(prediction):
    labels = prediction.label_ids[:, 1:]
    return {"hits": float((prediction.predictions[:, :-1] == labels)[labels != -100].mean())}


class Running:
    """Metrics batch by batch, as batch_eval_metrics asks."""

    def __init__(self):
        self.found, self.all = 0.0, 0.0

    def __call__(self, prediction, compute_result):
        labels = prediction.label_ids[:, 1:]
        found = (prediction.predictions[:, :-1].argmax(-1) == labels)[labels != -100].float()
        self.found, self.all = self.found + float(found.sum()), self.all + len(found)
        return {"hits": self.found / self.all} if compute_result else {}


METRICS = {
    "of logits": ({"compute_metrics": hits}, {}),
    "of what is left of logits": ({"compute_metrics": hits_of_best, "preprocess_logits_for_metrics": best}, {}),
    "batch by batch": ({"compute_metrics": Running()}, {"batch_eval_metrics": True, "per_device_eval_batch_size": 3}),
    "in several steps": ({"compute_metrics": hits}, {"eval_accumulation_steps": 1, "per_device_eval_batch_size": 3}),
}


@pytest.mark.parametrize("case", METRICS)
def test_metrics_of_ones_own(case, tmp_path):
    given, settings = METRICS[case]
    data = tiny_models.conversation_dataset()
    theirs, ours = (
        made.evaluate() for made in both(tmp_path, data, {"eval_dataset": data, **given}, **(WHOLE | settings))
    )
    assert 0 < theirs["eval_hits"] < 1 and ours["eval_hits"] == theirs["eval_hits"]
    assert ours.get("eval_shape") == theirs.get("eval_shape")


@pytest.mark.parametrize("given", [{}, {"peft_config": LORA}, {"peft_config": PROMPT}], ids=["plain", "lora", "prompt"])
def test_predictions_are_the_logits(given, tmp_path):
    data = tiny_models.conversation_dataset()
    theirs, ours = both(tmp_path, data, given, functools.partial(tiny_models.trained_model, tied=False), **WHOLE)
    theirs, ours = (made.predict(made.train_dataset) for made in (theirs, ours))
    assert ours.predictions.shape == theirs.predictions.shape
    assert np.allclose(ours.predictions, theirs.predictions, atol=1e-5) and theirs.predictions.std() > 0.1
    assert (ours.label_ids == theirs.label_ids).all()
    assert_holds(ours.metrics, theirs.metrics)


def test_predictions_are_the_models_own(tmp_path):
    """Row by row, as the model by itself answers: nothing between them."""
    data = tokenised_dataset(tiny_models.conversation_dataset(3))
    _, ours = both(tmp_path, data, **WHOLE)
    predictions = ours.predict(ours.train_dataset).predictions
    model = tiny_models.trained_model().eval()
    for got, row in zip(predictions, tokenised_rows(data), strict=True):
        with torch.no_grad():
            own = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        assert torch.allclose(torch.as_tensor(got[: len(own)]), own, atol=1e-4)
