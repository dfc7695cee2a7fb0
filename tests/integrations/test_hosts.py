"""What is on record of other people's trainers says what the documentation says of them."""

import json
import shlex
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
HOSTS = json.loads((ROOT / "benchmarks/results/hosts.json").read_text(encoding="utf-8"))
BESIDE = json.loads((ROOT / "benchmarks/results/beside.json").read_text(encoding="utf-8"))


def test_llama_factory_trains_the_target_and_is_stopped_with_a_loss_of_its_own():
    found = HOSTS["LLaMA-Factory"]
    for steps in found["steps"].values():
        assert len(steps["own"]) == len(steps["ours"]) == 3
        for own, ours in zip(steps["own"], steps["ours"], strict=True):
            assert all(abs(ours[name] - own[name]) <= 1e-5 * abs(own[name]) for name in ("loss", "grad_norm"))
    assert found["steps"]["dft"]["own"] != found["steps"]["sft"]["own"]
    assert "did not train the loss of target dft" in found["its own loss beside a target"]
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    assert f"LLaMA-Factory {found['versions']['llamafactory']}" in page


@pytest.mark.parametrize("layer", ["core", "train"])
@pytest.mark.parametrize("peer", BESIDE)
def test_a_verdict_beside_a_peer_is_pips_own(peer, layer):
    """The record says what pip's committed words say, and those name the peer's pins."""
    record = BESIDE[peer]["layers"][layer]
    said = (ROOT / "benchmarks" / "results" / "beside" / f"{peer}-{layer}.txt").read_text(encoding="utf-8")
    asked, _, answer = said.rpartition("$ pip install --dry-run")[2].partition("\n")
    assert all(pin in shlex.split(asked) for pin in BESIDE[peer]["pins"])
    if record["resolved"]:
        installed = dict(word.rsplit("-", 1) for word in answer.split() if "-" in word)
        installed = {canonicalize_name(name): version.partition("+")[0] for name, version in installed.items()}
        assert answer.startswith("Would install ")
        assert record["versions"] == {name: installed[name] for name in record["versions"]}
    else:
        assert answer.startswith("ERROR: Cannot install ")


def test_the_page_says_what_resolves():
    verdicts = {layer: {peer["layers"][layer]["resolved"] for peer in BESIDE.values()} for layer in ("core", "train")}
    assert verdicts == {"core": {True}, "train": {False}}
    page = " ".join((ROOT / "docs" / "install.md").read_text(encoding="utf-8").split())
    assert {peer["layers"]["core"]["against"] for peer in BESIDE.values()} == {"all that it requires"}
    assert (
        "The core resolves beside everything that each of the three requires. The trainer resolves beside none of them"
        in page
    )
