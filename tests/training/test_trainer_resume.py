"""A resumed run goes on to the last digit, and is refused where it would train something else. What a run leaves."""

import json

import pytest
import torch
from peft import LoraConfig

import tiny_models
from qtarget import ConfigError, __version__
from qtarget.training.saving import checkpoints, run_identity
from quick_runs import copied_weights, logged_values, quick_trainer, train_quickly

ETA = {"schedule": "linear", "from": 0.0, "to": 0.8, "steps": 5}
RUNS = {
    "sft": {"target": "sft"},
    "target-sft on a schedule": {"target": {"preset": "target-sft", "eta": ETA}, "teacher": True},
    "warm-up": {"target": {"preset": "dft", "warmup_from_sft": 4}},
    "psft in the middle of an interval": {"target": "psft", "psft_refresh": 4},
    "psft, adapters": {"target": "psft", "psft_refresh": 4, "peft": True},
    "asft, reference by name": {"target": "asft", "reference": True},
    "asft, adapters off": {"target": {"preset": "asft", "kl_weight": 0.8}, "peft": True},
    "packed": {"target": "dft", "packing": True, "max_length": 128},
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with the model at the start, which a reference by name is loaded from."""
    folder = tmp_path_factory.mktemp("start")
    tiny_models.trained_model().save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return str(folder)


def made(folder, start, *, teacher=False, peft=False, reference=False, evaluated=False, **settings):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if peft else None
    if reference:
        settings["reference_model_name_or_path"] = start
    return quick_trainer(
        tiny_models.trained_model(),
        folder,
        tiny_models.conversation_dataset(8),
        eval_dataset=tiny_models.conversation_dataset(4) if evaluated else None,
        teacher_model=tiny_models.trained_model(seed=7) if teacher else None,
        peft_config=lora,
        **{
            "max_steps": 6,
            "save_strategy": "steps",
            "save_steps": 3,
            "learning_rate": 0.05,
            "optim": "adamw_torch",
            "lr_scheduler_type": "linear",
            **settings,
        },
    )


@pytest.mark.parametrize("name", RUNS)
def test_to_the_last_digit(name, start, tmp_path):
    whole = made(tmp_path, start, **RUNS[name])
    whole.train()
    again = made(tmp_path, start, **RUNS[name])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    figures = ("loss", "nll", "trust", "update", "target/eta", "target/share")
    for figure in figures:
        assert logged_values(again, figure)[-3:] == logged_values(whole, figure)[-3:]
    assert len(logged_values(whole, "loss")) == 6
    ends = copied_weights(whole.model), copied_weights(again.model)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# -- what must not change on the way ---------------------------------------------------------------


@pytest.mark.parametrize(
    "before, after, told",
    [
        ({"target": "dft"}, {"target": "sft"}, "target is 'sft', but the checkpoint"),
        ({"target": "dft"}, {"target": "dft", "denominator": "micro_batch"}, "denominator is 'micro_batch'"),
        ({"target": "dft"}, {"target": "dft", "z_loss": 1e-4}, "z_loss is 0.0001"),
        (
            {"target": {"preset": "gem", "beta": {"schedule": "linear", "from": 1.0, "to": 0.5, "steps": 4}}},
            {"target": {"preset": "gem", "beta": {"schedule": "linear", "from": 1.0, "to": 0.5, "steps": 8}}},
            '"steps": 8',
        ),
        (
            {"target": "kd", "teacher": True},
            {"target": "kd", "teacher_model_name_or_path": "START"},
            "teacher is '",
        ),
        ({"target": "psft", "psft_refresh": 4}, {"target": "psft", "psft_refresh": 3}, "psft_refresh is 3"),
    ],
)
def test_a_resume_that_would_train_something_else(before, after, told, start, tmp_path):
    made(tmp_path, start, **before).train()
    after = {name: start if value == "START" else value for name, value in after.items()}
    other = made(tmp_path, start, **after)
    kept = copied_weights(other.model)
    with pytest.raises(ConfigError) as error:
        other.train(resume_from_checkpoint=True)
    assert told in str(error.value) and "was trained with" in str(error.value)
    assert "resume with that, or start a new run" in str(error.value)
    assert all(torch.equal(kept[name], value) for name, value in copied_weights(other.model).items())


def test_an_old_policy_that_is_not_there(start, tmp_path):
    made(tmp_path, start, target="psft", psft_refresh=4).train()
    (tmp_path / "checkpoint-6" / "psft_old_policy_0.pt").unlink()
    (tmp_path / "checkpoint-6" / checkpoints.FILES).unlink()  # as a run without psft_refresh leaves it
    with pytest.raises(ConfigError, match=r"holds no old policy \(psft_old_policy_0.pt\)"):
        made(tmp_path, start, target="psft", psft_refresh=4).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_program_is_taken(start, tmp_path):
    """TRL's own, say: nothing is known of what it trained."""
    made(tmp_path, start).train()
    for own in (run_identity.FILE, checkpoints.FILES):
        (tmp_path / "checkpoint-6" / own).unlink()
    made(tmp_path, start, target="dft", max_steps=7).train(resume_from_checkpoint=True)


def test_what_a_checkpoint_says_of_its_run(start, tmp_path):
    made(tmp_path, start, **RUNS["target-sft on a schedule"]).train()
    saved = json.loads((tmp_path / "checkpoint-3" / run_identity.FILE).read_text())
    assert saved.pop("teacher").startswith("LlamaForCausalLM, weights ")
    assert saved == {
        "target": {"preset": "target-sft", "eta": ETA},
        "denominator": "all_labels",
        "reference": None,
    }


def test_a_reference_that_is_not_the_start(start, tmp_path):
    """A run that resumes from the checkpoint's own model would be held near where it stopped."""
    settings = {"target": {"preset": "asft", "kl_weight": 0.8}}
    run = made(tmp_path, start, **settings)
    run.train()
    wrong = quick_trainer(run.model, tmp_path, tiny_models.conversation_dataset(8), **settings)
    with pytest.raises(
        ConfigError, match=r"reference is 'the weights at the start, .* was trained with 'the weights at"
    ):
        wrong.train(resume_from_checkpoint=True)


# -- the model card --------------------------------------------------------------------------------


def test_the_model_card_says_what_was_taught(start, tmp_path):
    run = made(tmp_path, start, **RUNS["target-sft on a schedule"], evaluated=True, eval_strategy="steps", eval_steps=3)
    run.train()
    run.create_model_card(model_name="taught")
    card = (tmp_path / "README.md").read_text()
    for line in (
        "## Target",
        "- target: `target-sft(eta=0.8, teacher_temperature=1.0) with eta 0 → 0.8 (linear, 5 steps)`",
        "- formula: `Q = p_y δ + (1 − p_y) R",
        "- published in: [arXiv:2606.11189](https://arxiv.org/abs/2606.11189)",
        "- teacher_temperature: 1.0",
        "- schedule of eta: 0 → 0.8 (linear, 5 steps)",
        "- denominator: all_labels",
        "- teacher: LlamaForCausalLM, weights ",
        "- train data: 8 rows",
        "| figure | last training log | last evaluation |",
        f"Versions: qtarget {__version__}, trl 1.16",
    ):
        assert line in card, line
    last = run.state.log_history
    evaluated = [entry["eval_nll"] for entry in last if "eval_nll" in entry][-1]
    assert f"| nll | {logged_values(run, 'nll')[-1]:.4f} | {evaluated:.4f} |" in card
    assert card.count("## Target") == 1, "each checkpoint writes the card again"
    assert "### Framework versions" in card


def test_the_card_names_every_source(start, tmp_path):
    data = tiny_models.conversation_dataset(4).add_column("source", ["math", "chat"] * 2)
    run = train_quickly(tiny_models.trained_model(), tmp_path, data, targets={"math": "dft", "chat": "sft"})
    run.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "- target for rows of `math`: `dft`" in card and "- target for rows of `chat`: `sft`" in card


# -- streams, and a run that has ended ---------------------------------------------------------------


def streamed(folder, rows=14, **settings):
    """Fourteen rows: seven micro-batches a pass, three steps and one micro-batch too many."""
    data = tiny_models.conversation_dataset(rows).to_iterable_dataset()
    return quick_trainer(
        tiny_models.trained_model(),
        folder,
        data,
        target="dft",
        **{"save_strategy": "steps", "save_steps": 1, **settings},
    )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stream_that_is_resumed_in_its_third_pass(accumulation, tmp_path):
    """Wherever it stopped: the batches of the rest are those of a run that went through."""
    stops = (7, 9, 16) if accumulation == 1 else (3, 4, 7)
    settings = {"max_steps": stops[-1] + 1, "gradient_accumulation_steps": accumulation}
    whole = streamed(tmp_path, **settings)
    whole.train()
    for step in stops:
        again = streamed(tmp_path / f"from-{step}", **settings)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert logged_values(again, "num_tokens") == logged_values(whole, "num_tokens")
        assert logged_values(again, "nll") == logged_values(whole, "nll")
        ends = copied_weights(whole.model), copied_weights(again.model)
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_stream_that_ended_in_its_first_pass_and_goes_on(tmp_path):
    """Its epoch is a whole number, and yet no pass is over: a longer run goes on with the rows after those trained."""
    settings = {"lr_scheduler_type": "constant"}
    whole = streamed(tmp_path / "whole", max_steps=3, **settings)
    whole.train()
    streamed(tmp_path, max_steps=2, **settings).train()
    longer = streamed(tmp_path, max_steps=3, **settings)
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged_values(longer, "num_tokens")[2] == logged_values(whole, "num_tokens")[2]
    assert logged_values(longer, "nll")[2] == logged_values(whole, "nll")[2]
    ends = copied_weights(whole.model), copied_weights(longer.model)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_end_of_a_pass_is_in_no_other_step(tmp_path, caplog):
    """The fourth step is the first again: a micro-batch that is left over would make it longer."""
    run = streamed(tmp_path, max_steps=4, learning_rate=0.0, save_strategy="no")
    run.train()
    norms = logged_values(run, "grad_norm")
    assert (
        norms[3] == norms[0]
        and logged_values(run, "supervised_tokens")[3] == logged_values(run, "supervised_tokens")[0]
    )
    assert "the last 1 micro-batches of each pass over the stream are left out" in caplog.text


def test_a_stream_of_less_than_a_step(tmp_path):
    """Transformers would pass over it for ever."""
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps is 2, but a pass over the .* holds 1 micro"):
        streamed(tmp_path, rows=2, max_steps=2, save_strategy="no").train()


@pytest.mark.parametrize("rows", [4, 14], ids=["at the end of a pass", "within a pass"])
def test_a_finished_run_trains_no_step_more(rows, tmp_path):
    for make in (streamed, lambda folder, rows: made(folder, None, save_steps=1)):
        run = make(tmp_path / make.__name__[:3], rows=rows)
        run.args.max_steps = 2
        run.train()
        again = make(tmp_path / make.__name__[:3], rows=rows)
        again.args.max_steps = 2
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 2
        ends = copied_weights(run.model), copied_weights(again.model)
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
