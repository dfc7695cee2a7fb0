"""sft and dft follow TRL's own SFTTrainer step by step."""

import pytest
from trl import SFTConfig, SFTTrainer

import tiny_models
from qtarget import QTargetTrainer
from quick_runs import quick_config, quick_settings, tokenised_dataset

STEPS = 20
TRAINING = {
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "max_grad_norm": 1.0,
    "max_steps": STEPS,
    "seed": 3,
}


def six_labels_a_row():
    """Rows of different lengths with six labels each: TRL's metrics are means over micro-batches, which weigh
    tokens alike only where every micro-batch has as many."""
    return tokenised_dataset(
        tiny_models.conversation_dataset(10),
        labels=lambda number, row: [-100] * (len(row["labels"]) - 6) + row["input_ids"][-6:],
    )


def run(made):
    made.train()
    return made.state.log_history[:-1], made.model.state_dict()


@pytest.mark.parametrize("target, loss_type", [("sft", "nll"), ("dft", "dft")])
def test_twenty_steps_of_adamw(target, loss_type, tmp_path):
    """Accumulation (5 micro-batches an epoch: one is left over), clipping, shuffling, a warm-up."""
    schedule = TRAINING | {"lr_scheduler_type": "cosine", "warmup_steps": 3}
    theirs, their_weights = run(
        SFTTrainer(
            tiny_models.trained_model(),
            SFTConfig(**quick_settings(tmp_path, **schedule, loss_type=loss_type, bf16=False)),
            train_dataset=six_labels_a_row(),
            processing_class=tiny_models.tokenizer(),
        )
    )
    ours, our_weights = run(
        QTargetTrainer(
            tiny_models.trained_model(),
            quick_config(tmp_path, **schedule, target=target),
            train_dataset=six_labels_a_row(),
            processing_class=tiny_models.tokenizer(),
        )
    )
    assert len(ours) == len(theirs) == STEPS
    for mine, trls in zip(ours, theirs, strict=True):
        mine |= {"mean_token_accuracy": mine["accuracy"]}
        for name in trls:
            assert mine[name] == pytest.approx(trls[name], rel=1e-5), name
    start = tiny_models.trained_model().state_dict()
    for name, weight in their_weights.items():
        error = (our_weights[name] - weight).norm() / (weight - start[name]).norm()
        assert error < 2e-5, f"{name}: {error:.1e} of its way"
