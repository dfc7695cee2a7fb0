"""Checkpoints, models and cards are TRL's, and a run goes on from either's."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM

import tiny_models
from beside_trl import CLOSE, OURS, TRL, assert_same_way, make_trainer, side_by_side, train_and_record
from quick_runs import logits_of, tokenised_rows

LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
PROMPT = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
# A large epsilon, for Adam makes a whole step of a gradient that is nothing but rounding.
RESUMED = {
    "optim": "adamw_torch",
    "adam_epsilon": 1e-3,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
}
MODELS = {"plain": {}, "lora": {"peft_config": LORA}, "prompt tuning": {"peft_config": PROMPT}}


@pytest.mark.parametrize("given", MODELS.values(), ids=MODELS)
def test_a_run_goes_on_from_the_others_checkpoint(given, tmp_path):
    """Half of a run by TRL and half by ours, either way round: a user may change trainers in mid-run."""
    whole, _ = side_by_side(tmp_path, tiny_models.conversation_dataset, given=given, **RESUMED)
    for first, second in (("trl", OURS), ("ours", TRL), ("ours", OURS)):
        made = make_trainer(
            second,
            tiny_models.trained_model(),
            tmp_path / "again",
            tiny_models.conversation_dataset(),
            given,
            **RESUMED,
        )
        resumed = train_and_record(made, resume_from_checkpoint=str(tmp_path / first / "checkpoint-2"))
        assert made.state.global_step == 4 and len(resumed.steps) == 4
        assert [step["loss"] for step in resumed.steps[2:]] == pytest.approx(
            [step["loss"] for step in whole.steps[2:]], rel=CLOSE
        )
        assert_same_way(whole, resumed)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("given", MODELS.values(), ids=MODELS)
def test_what_is_saved(given, tmp_path):
    """The same files as TRL's, which load without qtarget, adapters by PEFT; a checkpoint may hold one more."""
    (tmp_path / "base").mkdir()
    tiny_models.trained_model().save_pretrained(tmp_path / "base")
    path = str(tmp_path / "base")
    theirs, ours = side_by_side(
        tmp_path, tiny_models.conversation_dataset, lambda: path, given, **(RESUMED | {"max_steps": 2})
    )
    for made, name in ((theirs, "trl"), (ours, "ours")):
        made.trainer.save_model(str(tmp_path / name / "saved"))
    assert files(tmp_path / "ours" / "saved") == files(tmp_path / "trl" / "saved")
    assert set(files(tmp_path / "trl" / "checkpoint-2")) <= set(files(tmp_path / "ours" / "checkpoint-2"))
    for config in (tmp_path / "trl" / "saved").glob("*config.json"):
        assert (tmp_path / "ours" / "saved" / config.name).read_text() == config.read_text()
    load = AutoPeftModelForCausalLM if given else AutoModelForCausalLM
    loaded = load.from_pretrained(tmp_path / "ours" / "saved").eval()
    row = tokenised_rows(tiny_models.conversation_dataset(1))[0]
    with torch.no_grad():
        assert torch.allclose(logits_of(loaded, row), logits_of(ours.trainer.model.eval(), row), atol=1e-5)
        assert not torch.allclose(logits_of(loaded, row), logits_of(tiny_models.trained_model().eval(), row), atol=1e-4)


def test_a_model_card(tmp_path):
    """Written with every checkpoint and on request, with what TRL's says of data and tags."""
    for kind in (TRL, OURS):
        made = train_and_record(
            make_trainer(
                kind,
                tiny_models.trained_model(),
                tmp_path / "run",
                tiny_models.text_dataset(),
                {},
                save_strategy="steps",
                save_steps=2,
            )
        )
        assert "trl" in (tmp_path / "run" / "README.md").read_text()
        made.trainer.create_model_card(model_name="a-name", dataset_name="some/data", tags=["mine"])
        card = (tmp_path / "run" / "README.md").read_text()
        for part in ("a-name", "some/data", "- mine", "- sft", "- trl", "### Framework versions"):
            assert part in card, part
