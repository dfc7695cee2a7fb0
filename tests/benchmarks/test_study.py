"""The controlled study: its task is what it says, and its quick form holds the identities. No order of methods."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "benchmarks" / "study"


@pytest.fixture(scope="module")
def chains():
    sys.path.insert(0, str(STUDY))
    try:
        import chains

        yield chains
    finally:
        sys.path.remove(str(STUDY))


# -- the task ------------------------------------------------------------------------------------------------------


def text(chains, ids):
    return "".join(chains.TOKENS[i] for i in ids)


def test_a_problem_and_its_layouts(chains):
    asked = chains.Problem(7, (("+", 3), ("*", 4), ("-", 2)))
    assert text(chains, asked.prompt) == "7+3*4-2>"
    assert asked.answer == (((7 + 3) * 4) - 2) % 10 == 8
    written = {
        layout: text(chains, chains.solve(asked, random.Random(0), chains.Style(layout, "w")).ids) for layout in "ABC"
    }
    assert written == {
        "A": "w7+3=0;w0*4=0;w0-2=8;#8<eos>",
        "B": "w0=7+3;w0=0*4;w8=0-2;#8<eos>",
        "C": "w+73:0;w*04:0;w-02:8;#8<eos>",
    }


@pytest.mark.parametrize("layout", "ABC")
@pytest.mark.parametrize("kind", ["carried", "isolated"])
def test_wrong_tokens_are_where_they_are_said_to_be(chains, layout, kind):
    """Read back with an independent calculator: a step's result is wrong exactly where the token is marked noisy."""
    rng = random.Random(3)
    style = chains.Style(layout, "wx")
    noisy = lines = 0
    for _ in range(300):
        asked = chains.problem(rng, 3, "train")
        made = chains.solve(asked, rng, style, 0.3, kind)
        value = asked.start
        for step, (operator, digit) in enumerate(asked.steps):
            at = step * chains.LINE
            line = text(chains, made.ids[at : at + chains.LINE])
            a, result = {"A": (line[1], line[5]), "B": (line[3], line[1]), "C": (line[2], line[5])}[layout]
            place = at + (1 if layout == "B" else 5)
            true = eval(f"({a} {operator} {digit}) % 10")
            assert int(a) == value
            assert (int(result) != true) == (made.kinds[place] == chains.NOISY)
            assert made.right[place] >= {chains.ID[str(true)]}
            noisy, lines = noisy + (int(result) != true), lines + 1
            value = int(result) if kind == "carried" else true
        assert text(chains, made.ids[-2:-1]) == str(value)
    assert 0.25 < noisy / lines < 0.35


def test_what_is_right_is_what_any_writer_could_write(chains):
    """In the mixed style without noise, every token written is among the right ones, and free ones have several."""
    rng = random.Random(5)
    for _ in range(100):
        made = chains.solve(chains.problem(rng, 3, "train"), rng, chains.MIXED)
        for token, kind, right in zip(made.ids, made.kinds, made.right, strict=True):
            assert token in right
            assert (kind == chains.FREE) == (len(right) > 1)


def test_splits_do_not_meet_and_noise_leaves_the_problems(chains):
    seen = {p for p, _ in chains.demonstrations("x", 500, (3,), chains.ONE)}
    assert seen == {p for p, _ in chains.demonstrations("x", 500, (3,), chains.MIXED, 0.5)}
    test = {*chains.problems("test", 100, (3,))}
    assert len(test) == 100 and not test & seen and not test & {*chains.problems("dev", 60, (3,))}


def test_the_checker(chains):
    asked = chains.Problem(1, (("+", 1),))
    right = chains.solve(asked, random.Random(0), chains.ONE).ids
    assert chains.is_right(asked, right)
    assert chains.is_right(asked, [*right, chains.PAD, chains.ID["7"]])
    assert not chains.is_right(asked, right[:-1])
    assert not chains.is_right(asked, [*right[:-2], chains.ID["3"], chains.EOS])
    assert not chains.is_right(asked, [])


def test_sampling_with_a_cache_is_sampling_without(chains):
    """Greedy tokens are the likeliest of a whole forward; sampled ones have the seed's digits, whatever stands beside."""
    import models
    import torch
    from settings import QUICK

    model = models.build(QUICK, "student", 3).eval()
    asked = [*chains.problems("dev", 4, (2,)), *chains.problems("dev", 3, (3,))]
    completions, _ = models.sample(model, asked, 1, 0.0, "")
    for problem, (tokens,) in zip(asked, completions, strict=True):
        ids = torch.tensor([problem.prompt + tokens])
        likeliest = model(ids).logits[0, len(problem.prompt) - 1 : -1].argmax(-1).tolist()
        end = tokens.index(chains.EOS) + 1 if chains.EOS in tokens else len(tokens)
        assert tokens[:end] == likeliest[:end]
    one, entropy = models.sample(model, asked, 2, 1.0, "a")
    assert (one, entropy) == models.sample(model, asked, 2, 1.0, "a")
    assert one != models.sample(model, asked, 2, 1.0, "b")[0]


def test_the_rate_of_an_arm(chains):
    import arms

    scores = {("a", 1e-3): [0.4, 0.6], ("a", 1e-4): [0.5, 0.5], ("a", 1e-2): [0.9, 0.0], ("b", 1e-3): [0.0]}
    assert arms.chosen_rates(scores) == {"a": 1e-4, "b": 1e-3}
    assert {arm.name for arm in arms.PRESETS} <= {*arms.CELLS["centre"].arms}
    assert len(arms.PRESETS) == 15


def test_further_arms_are_for_the_quick_form():
    asked = {**os.environ, "STUDY_ARMS": "kd+jsd target-sft+skew_kl"}
    named = "import arms; print([arm.build().name for arm in arms.PRESETS[15:]], 'kd+jsd' in arms.CELLS['centre'].arms)"
    shown = subprocess.run([sys.executable, "-c", named], cwd=STUDY, env=asked, capture_output=True, text=True)
    assert shown.stdout == "['kd', 'target-sft'] True\n", shown.stderr
    refused = subprocess.run(
        [sys.executable, STUDY / "run.py", "--status"], cwd=ROOT, env=asked, capture_output=True, text=True
    )
    assert refused.returncode == 2 and "STUDY_ARMS is 'kd+jsd target-sft+skew_kl'" in refused.stderr


# -- the quick form ------------------------------------------------------------------------------------------------


def study(*words, folder=None):
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    done = study(STUDY / "run.py", "--quick", "--build", folder)
    assert done.returncode == 0, done.stderr
    return folder


def read(path):
    return json.loads(path.read_text())


def runs(folder, cell, arm):
    (path,) = (folder / "results/test" / cell / arm).glob("*.json")
    return read(path)


def figures(content):
    return {k: v for k, v in content.items() if k not in ("seconds", "training", "arm", "target", "before", "after")}


def test_eta_0_is_dft(quick):
    assert figures(runs(quick, "centre", "target-sft-0.0")) == figures(runs(quick, "centre", "dft"))
    assert figures(runs(quick, "centre", "target-sft-1.0")) != figures(runs(quick, "centre", "dft"))


def test_losses_fall_and_trust_is_what_it_is_named(quick):
    sft, dft = runs(quick, "centre", "sft"), runs(quick, "centre", "dft")
    assert sft["training"]["nll_last"] < sft["training"]["nll_first"]
    for kind in ("unique", "free", "noisy"):
        assert sft["before"][kind]["trust"] == 1
        assert dft["before"][kind]["trust"] == pytest.approx(dft["before"][kind]["p"], rel=1e-4)
        target = runs(quick, "centre", "target-sft")["before"][kind]
        assert target["residual"] == pytest.approx(1 - target["p"], rel=1e-4)
    assert sft["before"]["unique"]["p"] == pytest.approx(dft["before"]["unique"]["p"], rel=1e-6)


def test_clipping(quick):
    off = runs(quick, "clip-off", "sft")["training"]
    on = runs(quick, "centre", "sft")["training"]
    assert off["norm"] == off["norm_clipped"]
    assert on["norm_clipped"] < on["norm"]  # some of its steps are clipped
    assert off["norm"] != on["norm"] and off["nll_last"] != on["nll_last"]  # and go another way without


@pytest.mark.full
def test_it_goes_on_where_it_was_and_redoes_the_same(quick):
    """A result that is lost comes again with the same figures, the models being made anew; the others are not touched."""
    paths = sorted((quick / "results").rglob("*.json"))
    before = {path: path.read_bytes() for path in paths}
    lost = quick / "results/test/centre/target-sft"
    (path,) = lost.glob("*.json")
    path.unlink()
    for model in (quick / "models").glob("*.safetensors"):
        model.unlink()
    assert study(STUDY / "run.py", "--quick", "--build", quick).returncode == 0
    assert sorted((quick / "results").rglob("*.json")) == paths
    assert {p: p.read_bytes() for p in paths if p != path} == {p: b for p, b in before.items() if p != path}
    again, was = json.loads(path.read_bytes()), json.loads(before[path])
    for content in (again, was):
        content.pop("seconds")
        content["training"].pop("seconds")
    assert again == was


@pytest.mark.full
def test_the_page_is_drawn_the_same_twice(quick):
    made = []
    for _ in range(2):
        done = study(STUDY / "report.py", "--quick", "--build", quick)
        assert done.returncode == 0, done.stderr
        made.append({p.name: p.read_bytes() for p in [*quick.glob("*.md"), *(quick / "assets").glob("*.svg")]})
    assert made[0] == made[1] and len(made[0]) == 6
    assert not any(b"{{" in content for content in made[0].values())


def test_results_of_other_settings_are_not_mixed_in(quick, tmp_path):
    import shutil

    shutil.copytree(quick, tmp_path / "study")
    path = tmp_path / "study/results/models/seed-101.json"
    content = read(path)
    content["settings"]["batch"] = 7
    path.write_text(json.dumps(content))
    done = study(STUDY / "run.py", "--quick", "--build", tmp_path / "study")
    assert done.returncode == 1
    assert "batch 7, now 32" in done.stderr


# -- the page on record --------------------------------------------------------------------------------------------


def test_the_page_on_record_is_that_of_the_results_on_record(tmp_path):
    done = study(STUDY / "report.py", "--docs", tmp_path)
    assert done.returncode == 0, done.stderr
    for made in [*tmp_path.glob("*.md"), *(tmp_path / "assets").glob("study_*.svg")]:
        assert made.read_bytes() == (ROOT / "docs" / made.relative_to(tmp_path)).read_bytes(), made.name
