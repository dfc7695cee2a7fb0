"""A long run on a CPU compiles its targets' row mathematics; a short one does not wait for a compiler."""

import pytest
import torch
from datasets import Dataset

import qtarget as qt
import tiny_models
from qtarget.losses.engine.device import passes
from qtarget.training import compiling
from quick_runs import quick_trainer

CPU = torch.device("cpu")
SHORT = {"teacher_model": tiny_models.trained_model(seed=9), "target": "target-sft", "max_steps": 2}


@pytest.mark.parametrize(
    "name, logits, device, expected",
    [
        ("target-sft", 1e12, CPU, "compiled"),
        ("kd", 1e12, CPU, "compiled"),
        ("target-sft", 1e9, CPU, "auto"),
        ("target-sft", None, CPU, "auto"),  # a stream
        ("dft", 1e12, CPU, "auto"),  # nothing to gain
        ("target-sft", 1e12, torch.device("cuda"), "auto"),
    ],
)
def test_where_it_pays(name, logits, device, expected):
    assert compiling.backend([qt.preset("sft"), qt.preset(name)], device, logits) == expected


def test_not_without_a_compiler(monkeypatch):
    monkeypatch.setattr(compiling.engine, "no_compiler", lambda device: "needs a C++ compiler on a CPU")
    assert compiling.backend([qt.preset("kd")], CPU, 1e12) == "auto"


def test_logits_of_a_run():
    rows = Dataset.from_dict({"labels": [[-100, 1, 2], [3, -100, -100]]})
    assert compiling.logits_of_run(rows, 10, 100) == 1.5 * 10 * 100
    assert compiling.logits_of_run(rows.to_iterable_dataset(), 10, 100) is None
    assert compiling.logits_of_run(None, 10, 100) is None


@pytest.fixture
def compiled(monkeypatch):
    """How often a pass was run through inductor."""
    calls = []
    real = passes.FunctionPasses._run
    monkeypatch.setattr(
        passes.FunctionPasses, "_run", lambda self, name, *args: calls.append(name) or real(self, name, *args)
    )
    return calls


def losses_of(tmp_path, **options):
    made = quick_trainer(tiny_models.trained_model(), tmp_path, tiny_models.text_dataset(4), **(SHORT | options))
    made.train()
    return [line["loss"] for line in made.state.log_history if "loss" in line], made


def test_a_short_run_compiles_nothing(tmp_path, compiled):
    losses_of(tmp_path)
    assert not compiled


def test_a_long_run_is_compiled_and_trains_the_same(tmp_path, compiled, monkeypatch):
    plain, _ = losses_of(tmp_path / "plain")
    monkeypatch.setattr(compiling, "PAYS_FROM", 1.0)
    got, made = losses_of(tmp_path / "long")
    assert {"sums", "gradient"} <= set(compiled)
    assert got == pytest.approx(plain, rel=1e-5)
    assert made._engine_backend() == "compiled"


def test_a_backend_that_is_named_is_kept(tmp_path, compiled, monkeypatch):
    monkeypatch.setattr(compiling, "PAYS_FROM", 1.0)
    _, made = losses_of(tmp_path, loss_backend="torch")
    assert made._engine_backend() == "torch" and not compiled


def test_a_backend_that_cannot_run_is_refused_before_the_model_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling.engine, "no_triton", lambda device: "needs a CUDA device and hidden is on cpu")
    with pytest.raises(qt.ConfigError, match="loss_backend is 'triton', which needs a CUDA device"):
        quick_trainer("no such model", tmp_path, tiny_models.text_dataset(4), loss_backend="triton")
    with pytest.raises(qt.ConfigError, match="loss_backend is 'trition'; did you mean 'triton'"):
        quick_trainer(tiny_models.trained_model(), tmp_path, tiny_models.text_dataset(4), loss_backend="trition")
