"""The map of (p_y, entropy) that training leaves, beside the same counted by hand."""

import math

import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator

import tiny_models
from qtarget import ConfigError
from qtarget.training import history
from quick_runs import labels_of, logits_of, quick_config, quick_trainer, tokenised_rows, train_quickly

LONG = {"max_steps": 6, "num_train_epochs": 9, "learning_rate": 0.05, "save_strategy": "steps", "save_steps": 3}


def by_hand(model, data):
    """{(p_bin, entropy_bin): [count, Σ p_y, Σ p_y (1 − p_y)]} of dft at the start."""
    cells = {}
    for row in tokenised_rows(data):
        log_p = logits_of(model.eval(), row).log_softmax(-1)
        for line, label in zip(log_p, labels_of(row).tolist(), strict=True):
            p, entropy = float(line[label].exp()), float(-(line.exp() * line).sum())
            cell = min(19, int(20 * p)), min(19, int(20 * entropy / math.log(len(tiny_models.tokenizer()))))
            sums = cells.setdefault(cell, [0, 0.0, 0.0])
            sums[0] += 1
            sums[1] += p
            sums[2] += p * (1 - p)
    return cells


def test_a_map_is_that_of_the_steps_tokens(tmp_path):
    """All micro-batches of the step, without a second forward pass."""
    data = tiny_models.conversation_dataset(4)
    made = quick_trainer(tiny_models.trained_model(), tmp_path, data, target="dft", lens_every=1)
    calls = []
    made.model.model.register_forward_hook(lambda *args: calls.append(1))
    made.train()
    lines = pq.read_table(tmp_path / history.FILE).to_pylist()
    wanted = by_hand(tiny_models.trained_model(), data)
    assert {(line["p_bin"], line["entropy_bin"]): line["count"] for line in lines} == {
        c: w[0] for c, w in wanted.items()
    }
    for line in lines:
        count, trust, update = wanted[line["p_bin"], line["entropy_bin"]]
        assert line["step"] == 1
        assert line["trust"] == pytest.approx(trust / count, rel=1e-4)
        assert line["update"] == pytest.approx(update / count, rel=1e-4)
    assert len(calls) == 2 + 2, "two micro-batches, and the two short passes that check the head once"


def test_every_so_many_steps_and_resumed(tmp_path):
    data = tiny_models.conversation_dataset(8)
    whole = train_quickly(tiny_models.trained_model(), tmp_path / "whole", data, target="dft", lens_every=2, **LONG)
    assert whole.state.global_step == 6
    wanted = pq.read_table(tmp_path / "whole" / history.FILE)
    assert sorted(set(wanted["step"].to_pylist())) == [2, 4, 6]
    first = quick_trainer(tiny_models.trained_model(), tmp_path / "run", data, target="dft", lens_every=2, **LONG)
    first.train()
    again = quick_trainer(tiny_models.trained_model(), tmp_path / "run", data, target="dft", lens_every=2, **LONG)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert pq.read_table(tmp_path / "run" / history.FILE).equals(wanted)
    assert (tmp_path / "run" / history.FILE).stat().st_size < 20_000


def test_frames_for_the_page(tmp_path):
    train_quickly(
        tiny_models.trained_model(), tmp_path, tiny_models.conversation_dataset(8), target="dft", lens_every=3, **LONG
    )
    frames = history.frames(tmp_path)
    assert [frame["step"] for frame in frames] == [3, 6]
    assert all(len(frame[name]) == 20 and len(frame[name][0]) == 20 for frame in frames for name in ("count", "trust"))
    assert sum(map(sum, frames[0]["count"])) > 0


def test_off_by_default_and_refused_below_one(tmp_path):
    train_quickly(tiny_models.llama(), tmp_path)
    assert not (tmp_path / history.FILE).exists()
    with pytest.raises(ConfigError, match="lens_every is 0; use a whole number from 1"):
        quick_config(tmp_path, lens_every=0)


def test_a_long_run_keeps_so_many_maps_and_no_more(tmp_path, monkeypatch):
    """Every second one is left out when there would be too many, whether the run was stopped in between or not."""
    monkeypatch.setattr(history, "MAPS", 16)
    seen = {}

    def run(folder, stops=()):
        made = None
        for step in range(1, 201):
            if made is None or step in stops:  # a resumed run makes its own
                made = history.History(folder, 100, 1, Accelerator(cpu=True))
            if made.wants(step):
                one = torch.ones(1, 1)
                made.add({"nll": one, "entropy": one, "trust": one, "update": one * step})
            made.flush(step)
            seen[step] = sorted(set(pq.read_table(folder / history.FILE)["step"].to_pylist()))
        return pq.read_table(folder / history.FILE)

    table = run(tmp_path / "whole")
    assert seen[17] == list(range(1, 17))
    assert seen[18] == list(range(2, 19, 2)), "from here on every second step"
    assert seen[200] == list(range(16, 201, 16)) and max(map(len, seen.values())) == 16
    assert table["update"].to_pylist() == table["step"].to_pylist()
    assert run(tmp_path / "stopped", stops=(10, 18, 70, 199)) == table
