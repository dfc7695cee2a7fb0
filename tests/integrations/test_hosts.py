"""What is on record of other people's trainers says what the documentation says of them."""

import json
import re
import shlex
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
HOSTS = json.loads((ROOT / "benchmarks/results/hosts.json").read_text(encoding="utf-8"))
BESIDE = json.loads((ROOT / "benchmarks/results/beside.json").read_text(encoding="utf-8"))
PAGES = ROOT / "docs" / "trainers"
INDEX = (PAGES / "index.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("host", ["LLaMA-Factory", "Lightning", "ms-swift"])
def test_each_step_is_that_of_the_trainers_own_loss(host):
    found = HOSTS[host]
    assert {"dft", "sft"} <= {*found["steps"]}
    for name, runs in found["steps"].items():
        ours = runs["ours"]
        (whose,) = {*runs} - {"ours"}
        assert len(ours) == len(runs[whose]) == 3
        for one, other in zip(ours, runs[whose], strict=True):
            assert {*one} == {"loss", "grad_norm"}
            assert one == pytest.approx(other, rel=1e-5), name
    assert found["steps"]["dft"]["ours"] != found["steps"]["sft"]["ours"]


@pytest.mark.parametrize(
    "host, package",
    [("LLaMA-Factory", "llamafactory"), ("Lightning", "lightning"), ("ms-swift",) * 2, ("axolotl",) * 2],
)
def test_the_pages_name_the_version_that_was_run(host, package):
    named = f"{host} {HOSTS[host]['versions'][package]}"
    assert f"| {named} |" in INDEX
    assert named in (PAGES / f"{host.lower()}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "host, package", [("Transformers", "transformers"), ("Accelerate", "accelerate"), ("torch",) * 2]
)
def test_the_index_names_the_versions_of_the_tests(host, package):
    pinned = re.search(rf"^{package}==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    assert pinned and f"| {host} {pinned[1]} |" in INDEX


@pytest.mark.parametrize("host", ["LLaMA-Factory", "ms-swift"])
def test_a_loss_of_its_own_is_refused_and_the_page_says_which(host):
    page = (PAGES / f"{host.lower()}.md").read_text(encoding="utf-8")
    for setting, said in HOSTS[host]["its own loss beside a target"].items():
        assert "step 1: the trainer did not train the loss of target dft" in said
        assert f"`{setting}`" in page


def test_lightning_ends_in_the_weights_of_our_trainer():
    weights = HOSTS["Lightning"]["weights against QTargetTrainer"]
    assert {*weights} == {"dft", "schedule", "accumulation, each micro-batch's own mean"}
    assert max(weights.values()) < 1e-5


@pytest.mark.parametrize("host", ["Lightning", "ms-swift"])
def test_the_figures_of_a_target_are_logged(host):
    names = {f"target/{name}" for name in ("nll", "trust", "update", "entropy", "accuracy")}
    assert {*HOSTS[host]["logged"]} - {"loss"} == names


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
    assert "everything that each of the three requires. The core does with all of them, `.[train]` with none." in page


def test_axolotl_trains_the_target_and_refuses_its_own_losses():
    """The page's figures, too, are those on record."""
    found = HOSTS["axolotl"]
    for name, steps in found["steps"].items():
        assert len(steps["own"]) == len(steps["ours"]) == 3, name
        for own, ours in zip(steps["own"], steps["ours"], strict=True):
            assert all(abs(ours[key] - own[key]) <= 1e-5 * abs(own[key]) for key in ("loss", "grad_norm")), name
    assert len({steps["own"][0]["loss"] for name, steps in found["steps"].items() if "LoRA" not in name}) == 5
    held_out = found["held-out loss"]
    assert held_out["ours"] == pytest.approx(held_out["own"], rel=1e-6)
    assert len(held_out["own"]) == 2  # before the first step, and after the last
    for line, step in zip(found["logged"], found["steps"]["target-sft"]["ours"], strict=True):
        assert {*line} == {f"target/{figure}" for figure in ("nll", "trust", "update", "entropy", "accuracy")}
        assert line["target/nll"] != step["loss"]
    assert found["moved by LoRA"]["base"] == []
    assert len(found["moved by LoRA"]["adapters"]) == 4
    assert "computes a loss of its own, so that the target would not be trained" in found["refused"]["trainer_cls"]
    assert "which has another tokenizer" in found["refused"]["another tokenizer"]
    assert found["dft by a plugin that cannot be imported"] == found["steps"]["sft"]["own"]  # the page warns of it
    page = (ROOT / "docs/trainers/axolotl.md").read_text(encoding="utf-8")
    assert f"axolotl {found['versions']['axolotl']} with Transformers {found['versions']['transformers']}" in page
    differences = [f"{value:.0e}" for value in found["largest relative difference"].values()]
    assert re.findall(r"\| (\S+e-\d+) \|$", page, re.M) == differences
