"""Trackers get one run: what is evaluated before and after training stands with the training."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from transformers.integrations import integration_utils

import teacher_caches
from qtarget.cli.__main__ import main

WORDS = "--target sft --teacher_model_name_or_path none --max_steps 2 --logging_steps 1 --save_strategy no"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return teacher_caches.write_world(tmp_path_factory.mktemp("trackers"))


def train(world: Path, folder: Path, tracker: str) -> int:
    words = ["train", "--config", world / "config.yaml", "--output_dir", folder, *WORDS.split()]
    return main([str(word) for word in [*words, "--report_to", tracker, "--run_name", "first"]])


def stand_in(monkeypatch, package: str, available: str, **names: object) -> None:
    """Put a module in place of a tracker's package."""
    module = ModuleType(package)
    module.__spec__ = ModuleSpec(package, None)
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, package, module)
    monkeypatch.setattr(integration_utils, available, lambda: True)


class Writer:
    """What TensorBoard's callback writes to: folder → figure → steps."""

    written: dict[str, dict[str, list[int]]]

    def __init__(self, log_dir: str | None = None):
        self.figures = self.written.setdefault(str(log_dir), {})

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.figures.setdefault(name, []).append(step)

    def add_text(self, *_: object) -> None:
        pass

    flush = close = add_text


def test_tensorboard_has_one_folder_in_the_runs(world, tmp_path, monkeypatch):
    Writer.written = {}
    stand_in(monkeypatch, "tensorboardX", "is_tensorboard_available", SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as where the package is not installed
    assert train(world, tmp_path / "run", "tensorboard") == 0
    ((folder, figures),) = Writer.written.items()
    assert Path(folder).parent == tmp_path / "run" / "runs"
    assert figures["train/nll"] == [1, 2] and figures["eval/nll"] == [0, 2]


class MLflow:
    """MLflow's calls as its documentation has them: a figure without a run begins one."""

    __version__ = "3.0.0"
    utils = SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100))

    def __init__(self) -> None:
        self.runs: list[tuple[str | None, dict[str, list[int]]]] = []
        self.active: int | None = None
        self.last: int | None = None

    def start_run(self, run_name: str | None = None, nested: bool = False, run_id: int | None = None) -> None:
        assert self.active is None
        if run_id is None:
            self.runs.append((run_name, {}))
        self.active = self.last = len(self.runs) - 1 if run_id is None else run_id

    def end_run(self) -> None:
        self.active = None

    def active_run(self):
        return None if self.active is None else SimpleNamespace(info=SimpleNamespace(run_id=self.active))

    def last_active_run(self):
        return SimpleNamespace(info=SimpleNamespace(run_id=self.last))

    def log_metrics(self, metrics: dict[str, float], step: int, synchronous: bool) -> None:
        if self.active is None:
            self.start_run()
        assert self.active is not None
        for name in metrics:
            self.runs[self.active][1].setdefault(name, []).append(step)

    def log_params(self, *_: object, **__: object) -> None:
        pass

    def is_tracking_uri_set(self) -> bool:
        return True

    def get_tracking_uri(self) -> str:
        return "stand-in"


def test_mlflow_has_one_run_which_is_ended(world, tmp_path, monkeypatch):
    mlflow = MLflow()
    names = {name: getattr(mlflow, name) for name in dir(mlflow) if name == "__version__" or not name.startswith("_")}
    stand_in(monkeypatch, "mlflow", "is_mlflow_available", **names)
    assert train(world, tmp_path / "run", "mlflow") == 0
    ((name, figures),) = mlflow.runs
    assert name == "first" and mlflow.active is None
    assert figures["nll"] == [1, 2] and figures["eval_nll"] == [0, 2]
