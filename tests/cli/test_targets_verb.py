"""``qtarget targets``: found by group and word, shown, and compared by the weight of the label."""

import json
import math
import re

import pytest
import yaml

import qtarget as qt
from qtarget.cli.__main__ import main
from qtarget.targets.divergence import Divergence
from qtarget.targets.presets.entry import GROUPS


def answer(capsys, *words):
    assert main(["targets", *words]) == 0
    return capsys.readouterr().out


def refusal(capsys, *words):
    assert main(["targets", *words]) == 2
    return capsys.readouterr().err


def names(capsys, *words):
    return [record["name"] for record in json.loads(answer(capsys, *words, "--json"))]


def test_the_table_goes_group_by_group(capsys):
    lines = answer(capsys).splitlines()
    groups = {name: qt.presets.describe(name).group for name in qt.presets.names()}
    heads = {
        group: lines.index(next(line for line in lines if line.startswith(f"{group}: "))) for group in groups.values()
    }
    assert [*heads] == [group for group in GROUPS if group in heads]
    for name, group in groups.items():
        (at,) = (row for row, line in enumerate(lines) if re.match(rf"{name} ", line))
        assert group == max((head for head in heads if heads[head] < at), key=heads.get)


@pytest.mark.parametrize("group", ["label", "selection", "anchor", "distillation"])
def test_one_group(group, capsys):
    wanted = [name for name in qt.presets.names() if qt.presets.describe(name).group == group]
    assert names(capsys, "--group", group) == wanted


@pytest.mark.parametrize(
    ("word", "name"),
    [("p-loss", "dft"), ("DFT", "dft"), ("2508.05629", "dft"), ("CE(U, p)", "label-smoothing"), ("clip", "psft")],
    ids=["alias", "any case", "source", "formula", "summary"],
)
def test_search(word, name, capsys):
    found = names(capsys, "--search", word)
    assert name in found and len(found) < len(qt.presets.names())


def test_search_within_a_group(capsys):
    assert names(capsys, "--search", "arXiv:1503.02531", "--group", "distillation") == ["kd", "kd-hybrid"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--group", "labels"], "group is 'labels'; did you mean 'label'?"),
        (["--group", "distillation", "--search", "xyzzy"], "search is 'xyzzy', which none of these contains: kd, "),
        (["compare"], "nothing was named to compare; name targets, as in: qtarget targets compare dft beyond-log"),
        (
            ["compare", "dft", "cft"],
            "target is 'cft', whose weight reads critical: it is not a curve over p_y; leave it out",
        ),
        (["compare", "dftt", "eaftt"], "target is 'eaftt'; did you mean 'eaft'?"),
        (["compare", "{preset: dft"], "target is '{preset: dft', which is not YAML"),
    ],
)
def test_what_is_refused(words, sentence, capsys):
    assert sentence in refusal(capsys, *words)


def test_show_says_group_and_divergences(capsys):
    shown = answer(capsys, "show", "kd-hybrid")
    assert re.search(r"^group +distillation$", shown, re.M)
    assert re.search(r"^gradient +g = a \(p − δ\) \+ Σ b p ⊙ \(s − E_p\[s\]\), by forward KL", shown, re.M)
    (listed,) = re.findall(r"^divergence +(.*) \(qtarget targets divergences\)$", shown, re.M)
    assert listed.split(", ") == list(Divergence.known)
    assert "divergence " not in answer(capsys, "show", "asft")


def test_show_says_whose_defaults_and_what_traps(capsys, monkeypatch):
    monkeypatch.setattr("qtarget.targets.presets.entry.ENTRIES", {})
    about = {"formula": "L", "trusts": "1[p_y ≥ 0.1]", "rest": "none", "source": "here", "group": "label"}
    qt.presets.preset("own", **about, defaults="the paper's", traps="its code halves a")(lambda: qt.Target(1.0))
    shown = answer(capsys, "show", "own")
    assert "schedule " not in shown
    assert "1[p_y ≥ 0.1]" in answer(capsys), "a bracket is no markup"
    assert re.search(r"^whose +the paper's$", shown, re.M) and re.search(r"^traps +its code halves a$", shown, re.M)


def test_show_says_what_moves_in_the_published_runs(capsys):
    (written,) = re.findall(r"^schedule +(.*)$", answer(capsys, "show", "idft"), re.M)
    assert yaml.safe_load(written) == qt.presets.describe("idft").schedule


def test_compared_weights_are_those_of_the_formulas(capsys):
    words = ["dft", "{preset: beyond-log, alpha: 2}", "profit", "asft", "eaft"]
    record = json.loads(answer(capsys, "compare", *words, "--json"))
    for row, p in enumerate(record["p_y"]):
        a = {word: weights[row] for word, weights in record["a"].items()}
        assert a["dft"] == a["asft"] == pytest.approx(p, rel=1e-6)
        assert a["{preset: beyond-log, alpha: 2}"] == pytest.approx(p**2, rel=1e-6)
        assert a["profit"] == float(p > 0.05)
        other = (1 - p) / record["other_tokens"]
        top = [max(p, other), *[other] * 19]
        entropy = -sum(x / sum(top) * math.log(x / sum(top)) for x in top)
        assert a["eaft"] == pytest.approx(entropy / math.log(20), rel=1e-6)


def test_the_drawing(capsys):
    shown = answer(capsys, "compare", "dft", "asft", "sft").splitlines()
    rows = [line[10:] for line in shown[:16]]
    assert "a = dft, asft" in shown and "b = sft" in shown
    assert rows[0] == "b" * 58 + "aa" and rows[15] == "aa"
    drawn = [next(at for at, row in enumerate(rows) if row[column : column + 1] == "a") for column in range(60)]
    assert drawn == sorted(drawn, reverse=True), "it rises from the left below to the right above"
    assert " 0.5   0.5   0.5    1" in shown


def test_divergences(capsys):
    records = json.loads(answer(capsys, "divergences", "--json"))
    assert [record["name"] for record in records] == list(Divergence.known)
    jsd = next(record for record in records if record["name"] == "jsd")
    assert jsd["parameters"] == {"beta": 0.5} and jsd["reach"] == pytest.approx(math.log(2) / 2)
    shown = answer(capsys, "divergences")
    for record in records:
        assert re.search(rf"^{record['name']}\b", shown, re.M) and record["equation"] in shown
    assert (
        "Q stays on the simplex while a + 0.347 b ≤ 1" in shown
        and "Q may leave the simplex; R must be above 0" in shown
    )
