"""What users and their files rely on: public names, settings, verbs and their flags, and the formats left on disk.

``contract.json`` holds it. A change there is a change for somebody: it belongs in CHANGELOG.md. To rewrite it:
``python tests/test_contract.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from trl import SFTConfig

import qtarget as qt
import teacher_caches
from qtarget.cli.__main__ import HELP, main

FILE = Path(__file__).with_name("contract.json")
VERBS = re.findall(r"^  ([a-z]+)  ", HELP, re.MULTILINE)


def public_names() -> list[str]:
    return sorted(qt.__all__)


def signatures() -> dict[str, list[str]]:
    """Parameters of every public function and class, and of the trust rules and residuals."""
    called = {name: getattr(qt, name) for name in qt.__all__ if callable(getattr(qt, name))}
    for module in (qt.trust, qt.residual):
        short = module.__name__.rpartition(".")[2]
        called |= {f"{short}.{name}": getattr(module, name) for name in _called_in_lower_case(module)}
    found = {}
    for name, what in called.items():
        if not (inspect.isclass(what) and issubclass(what, Exception)):
            found[name] = [given for given in inspect.signature(what).parameters if not given.startswith("_")]
    del found["QTargetConfig"]  # its fields are listed by themselves
    return found


def _called_in_lower_case(module: Any) -> list[str]:
    return sorted(
        name
        for name in vars(module)
        if name.islower()
        and not name.startswith("_")
        and f"{getattr(getattr(module, name), '__module__', '')}.".startswith(f"{module.__name__}.")
    )


def presets() -> dict[str, dict[str, Any]]:
    """Each preset's hyperparameters with their defaults, and its written form."""
    return {
        name: {"defaults": qt.preset(name).to_config(), "requires": sorted(qt.preset(name).requires)}
        for name in qt.presets.names()
    }


def settings() -> dict[str, Any]:
    """Fields of QTargetConfig that are not TRL's, with their defaults."""
    inherited = {field.name for field in dataclasses.fields(SFTConfig)}
    return {field.name: field.default for field in dataclasses.fields(qt.QTargetConfig) if field.name not in inherited}


def flags(verb: str) -> list[str]:
    """The flags that a verb's help names."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert main([verb, "--help"]) == 0
    return sorted(set(re.findall(r"(?<![\w-])--?[a-z]\w*", text.getvalue())))


def left_behind(root: Path) -> dict[str, Any]:
    """Files, and the shape of their manifests, of a run, a cache, a capture, a signal and results."""
    config = str(teacher_caches.write_world(root) / "config.yaml")
    tasks = root / "sums.jsonl"
    tasks.write_text("".join(json.dumps({"prompt": f"{i} plus 1?", "answer": str(i + 1)}) + "\n" for i in range(3)))
    for words in (
        f"train --config {config} --max_steps 2 --save_steps 1 --lens_every 1 --teacher_ema_decay 0.5 "
        "--teacher_model_name_or_path none --teacher_check_rows 2",
        f"cache build --config {config} -o {root}/cache --k 8",
        f"lens capture --config {config} -o {root}/capture --rows 4 --top_k 4",
        f"data oldlogps --config {config} --target psft --psft_refresh never -o {root}/signal",
        f"eval --model {root}/model --tasks {tasks} --verifier signal_verifiers:last_number --n 2 --max_new_tokens 4 "
        f"-o {root}/results",
        f"compare a={root}/results b={root}/results --bootstrap 100 -o {root}/report",
    ):
        assert main(words.split()) == 0, words
    return {name: folder(root / name) for name in ("run", "cache", "capture", "signal", "results", "report")}


def folder(root: Path) -> dict[str, Any]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): shape_of(path) for path in files if not _of_the_host(path)}


def _of_the_host(path: Path) -> bool:
    """What Transformers, TRL and datasets write is theirs."""
    return path.name in (
        "trainer_state.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "state.json",
        "dataset_info.json",
    )


def shape_of(path: Path) -> Any:
    """Of one of our own JSON files its keys, and the kind of each value; of any other file nothing."""
    if path.suffix == ".jsonl":
        return _shape(json.loads(path.read_text(encoding="utf-8").splitlines()[0]))
    if path.suffix == ".json" and path.name not in ("config.json", "generation_config.json", "adapter_config.json"):
        return _shape(json.loads(path.read_text(encoding="utf-8")))
    return "file"


def _shape(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _shape(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_shape(value[0])] if value else []
    return type(value).__name__


@pytest.fixture(scope="module")
def contract() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def test_public_names(contract):
    assert public_names() == contract["names"]


def test_signatures(contract):
    assert signatures() == contract["signatures"]


def test_presets(contract):
    assert json.loads(json.dumps(presets())) == contract["presets"]
    assert qt.presets.names() == list(contract["presets"])


def test_settings(contract):
    assert settings() == contract["settings"]


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_and_their_flags(verb, contract):
    assert list(contract["flags"]) == VERBS
    assert set(contract["flags"][verb]) <= set(flags(verb)), "help no longer names a flag"


def test_what_is_left_on_disk(contract, tmp_path):
    assert left_behind(tmp_path) == contract["left behind"]


def _write() -> None:
    found = {"names": public_names(), "signatures": signatures(), "presets": presets(), "settings": settings()}
    found["flags"] = {verb: flags(verb) for verb in VERBS}
    with tempfile.TemporaryDirectory() as root:
        found["left behind"] = left_behind(Path(root))
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _write()
