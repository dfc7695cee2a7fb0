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
    import rates

    assert rates.best({1e-3: [0.4, 0.6], 1e-4: [0.5, 0.5], 1e-2: [0.9, 0.0]}) == 1e-4
    assert rates.next_of({1e-3: [0.1], 3e-3: [0.3], 1e-2: [0.2]}) is None
    assert rates.next_of({1e-3: [0.1], 3e-3: [0.3], 1e-2: [0.4]}) == 3e-2
    assert rates.next_of({1e-3: [0.5], 3e-3: [0.3], 1e-2: [0.4]}) == 3e-4
    assert rates.next_of({rate: [rate] for rate in rates.LADDER}) is None  # the ladder ends
    assert rates.next_of({rate: [-rate] for rate in rates.LADDER}) is None


def test_rates_are_tried_until_the_best_is_at_no_edge(chains, tmp_path):
    """Scores with a top at 0.03: the record asks for it, and then for the one beyond it, and then for none."""
    from dataclasses import replace

    import records
    from cells import CELLS, Plan
    from settings import FULL_GRID

    cell = replace(CELLS["weak-sharp"], arms=("sft",))
    record = records.Record(Plan("one", replace(FULL_GRID, dev_seeds=(7, 8)), {cell.name: cell}, {}), tmp_path)
    asked = []
    while wanted := record.rates_to_try():
        asked.append([rate for _, _, rate in wanted])
        for run in record.plan.dev_runs(wanted):
            record.add("dev", run, {"dev": {"1.0": 0.5 - abs(run.rate - 0.03) + run.seed / 100}})
    assert asked == [[1e-3, 3e-3, 1e-2], [3e-2], [1e-1]]
    assert record.rates() == {("weak-sharp", "sft"): 3e-2}
    assert [run.rate for run in record.plan.test_runs(record.rates(), [1])] == [3e-2]


def test_a_plan_from_its_models_to_its_end(chains, tmp_path):
    """Really trained: rates are tried on the dev seeds and further at an edge; stopped in between, it goes on."""
    from dataclasses import replace
    from multiprocessing.pool import ThreadPool

    import records
    import run
    from cells import CELLS, Plan
    from settings import QUICK

    cell = replace(CELLS["weak-sharp"], arms=("sft",))
    settings = replace(QUICK, pretraining_steps=40, teacher_steps=5, steps=4, rates=(1e-2,), widen=True)
    record = records.Record(Plan("one", settings, {cell.name: cell}, {}), tmp_path)
    with ThreadPool(1) as pool:
        while not run.perform(record, tmp_path / "build", pool, ends=0.0):
            pass  # stopped after each part
    (scores,) = record.scores().values()
    assert len(scores) >= 3  # one at least on each side of the best, or the end of the ladder
    (test,) = record.finished("test", record.plan.test_runs(record.rates())).values()
    assert test["rate"] == record.rates()["weak-sharp", "sft"] and test["training"]["nll_last"] > 0
    tried = record.finished("dev", [run.Run(101, cell.name, "sft", test["rate"])])
    assert [content["dev"]["1.0"] for content in tried.values()] == scores[test["rate"]]


def test_the_two_plans(chains):
    """Rates are chosen at the centre, and in each cell of the grid; arms without a teacher run once for all teachers."""
    import arms
    import cells

    axes, grid = cells.plans(quick=False)
    assert {cell for cell, _ in axes.tuned} == {"centre"} and len(axes.tuned) == len(arms.PRESETS) == 15
    assert {cell for cell, _ in grid.tuned} == {*grid.cells}
    assert [*grid.cells] == [
        f"{b}-{t}" for b in ("weak", "middle", "strong") for t in ("sharp", "good", "cold", "bad")
    ] + [f"weak-sharp-{variant}" for variant in ("noise-0", "noise-30", "long")]
    for cell in grid.cells.values():
        there = {arm: cell.where(arm) for arm in (*arms.LABELS, *arms.TEACHERS)}
        assert all(arm in grid.cells[name].arms for arm, name in there.items())
        assert all(grid.cells[name].base == cell.base for name in there.values())
        assert all((arm in arms.WITH_TEACHER) <= (name == cell.name) for arm, name in there.items())
    assert "teacher" not in arms.ARMS["asft"].build().requires and "teacher" in arms.ARMS["gift"].build().requires


def test_gift_trusts_a_label_by_what_the_teacher_gives_it(chains):
    """Half of the trust where the teacher gives it 1/(e^4 − 1)."""
    import math

    import arms
    import torch

    import qtarget as qt

    half = 1 / math.expm1(4)
    teacher = torch.tensor([[half, 1 - half]], dtype=torch.float64).log()
    out = qt.target_loss(
        torch.zeros(1, 2, dtype=torch.float64),
        torch.tensor([0]),
        arms.ARMS["gift"].build().final,
        teacher_logits=teacher,
    )
    assert out.stats["trust"].item() == pytest.approx(0.5, abs=1e-9)


def test_regret_by_hand(chains):
    """Two conditions, two seeds, two problems; what is behind the best of each, and of all."""
    from types import SimpleNamespace

    import numpy as np
    from regret import Regret

    scores = {
        "one/a": [[1, 1], [1, 1]],
        "one/b": [[0, 1], [1, 0]],
        "two/a": [[0, 0], [0, 0]],
        "two/b": [[0, 0], [1, 0]],
        "one/c": [[1, 1], [1, 1]],  # not in the other condition, and so no part of it
    }
    results = SimpleNamespace(
        plan=SimpleNamespace(cells=["one", "two"]),
        arms_of=lambda cell: [side.split("/")[1] for side in scores if side.startswith(cell)],
        measure=lambda side, name: np.array(scores[side], float),
    )
    made = Regret(results, "avg")
    assert made.arms == ["a", "b"]
    assert made.behind.tolist() == [[0, 0.5], [0.25, 0]]
    assert (made.mean("a").value, made.mean("b").value) == (0.125, 0.25)
    assert made.worst("b")[0] == "one" and made.worst("b")[1].value == 0.5
    assert (made.best("one"), made.best("two"), made.by_mean) == ("a", "b", ["a", "b"])
    at = made.at("two", "a")
    assert at.low == 0 and 0.25 < at.high <= 1  # both problems may be drawn as the one that b solves
    assert made.at("one", "a").high == 0  # a is best there whatever is drawn


def test_further_arms_are_for_the_quick_form():
    asked = {**os.environ, "STUDY_ARMS": "kd+jsd target-sft+skew_kl"}
    named = (
        "import arms, cells; print([arm.build().final.name for arm in arms.PRESETS[15:]], "
        "'kd+jsd' in cells.CENTRE.arms)"
    )
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
    """Of either plan: the names of cells differ."""
    (path,) = (folder / "results").glob(f"*/test/{cell}/*.json")
    (content,) = [run for run in read(path)["runs"] if run["arm"] == arm]
    return content


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
    path = quick / "results/grid/test/weak-sharp/seed-1.json"
    held = read(path)
    lost = [run for run in held["runs"] if run["arm"] in ("sft", "target-sft")]
    path.write_text(json.dumps({**held, "runs": [run for run in held["runs"] if run not in lost]}))
    for model in (quick / "models").glob("*.safetensors"):
        model.unlink()
    assert study(STUDY / "run.py", "--quick", "--build", quick).returncode == 0
    assert sorted((quick / "results").rglob("*.json")) == paths
    assert {p: p.read_bytes() for p in paths if p != path} == {p: b for p, b in before.items() if p != path}
    again = read(path)["runs"][-2:]
    for content in (*again, *lost):
        content.pop("seconds")
        content["training"].pop("seconds")
    assert again == lost


@pytest.mark.full
def test_the_page_is_drawn_the_same_twice(quick):
    made = []
    for _ in range(2):
        done = study(STUDY / "report.py", "--quick", "--build", quick)
        assert done.returncode == 0, done.stderr
        made.append({p.name: p.read_bytes() for p in [*quick.glob("*.md"), *(quick / "assets").glob("*.svg")]})
    assert made[0] == made[1] and len(made[0]) == 9
    assert not any(b"{{" in content for content in made[0].values())


def test_results_of_other_settings_are_not_mixed_in(quick, tmp_path):
    import shutil

    shutil.copytree(quick, tmp_path / "study")
    path = tmp_path / "study/results/one_at_a_time/models/seed-101.json"
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
        there = ROOT if made.name == "README.md" else ROOT / "docs"
        assert made.read_bytes() == (there / made.relative_to(tmp_path)).read_bytes(), made.name
