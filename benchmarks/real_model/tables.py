"""What both pages are made of: prose, scores, differences, and what came of expectations."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from real_model import results
from real_model.expectations import SCORES, Expectation
from real_model.forms import BASE, CLEAN, CONDITIONS, NOISY, Cell, Form
from real_model.results import Cells, Differences


def prose(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def bullets(sentences: Sequence[str]) -> str:
    return "\n".join(prose(f"- {said}").replace("\n", "\n  ") for said in sentences)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def finished(form: Form, folder: Path, command: str) -> tuple[Cells, Differences]:
    """What is on record. Raises SystemExit where there is nothing to report yet; ``command`` makes it."""
    cells = results.read(folder)
    if not results.seeds(form, cells, CLEAN) or Cell(0, CLEAN, BASE) not in cells:
        raise SystemExit(
            f"{folder} holds no training seed of which every arm is finished, and no page is written; run: {command}"
        )
    return cells, results.differences(form, cells)


def found(
    form: Form,
    cells: Cells,
    differences: Differences,
    times: str,
    expectations: Sequence[Expectation],
    file: str,
) -> list[str]:
    """The parts of a page that say what came out. times: what is said of seconds. file: of the expectations."""
    return [
        "## What came out",
        scores_table(form, cells, times),
        "## Differences",
        prose(
            f"Scores in per cent. Paired by problem and training seed; intervals are 95 %, of {results.DRAWS:,} "
            "bootstrap draws of training seeds, problems and samples, by `qtarget compare`. If an interval contains "
            "zero, no difference is shown." + one_run(form, cells)
        ),
        *(
            differences_table(form, differences, condition)
            for condition in CONDITIONS
            if results.seeds(form, cells, condition)
        ),
        noise_table(form, differences),
        "## What was expected",
        expectations_table(form, cells, differences, expectations, file),
    ]


def scores_table(form: Form, cells: Cells, times: str) -> str:
    """times: the rest of the sentence on how long training took."""
    heads = ["labels", "arm", "avg@4", "by seed", "lenient", "greedy", "pass@4", "entropy", "cut off", "nll", "seconds"]
    heads[2] = f"avg@{next(iter(cells.values()))['eval']['n']}"
    heads[6] = heads[2].replace("avg", "pass")
    base = cells[Cell(0, CLEAN, BASE)]
    before = next(cell for cell in cells.values() if "training" in cell)["training"]["before"]
    rows = [["none", BASE, *score_cells([base]), f"{before['nll']:.3f}", "-"]]
    for condition in CONDITIONS:
        wanted = results.seeds(form, cells, condition)
        for arm in form.trained if wanted else ():
            found = results.of(cells, f"{condition}/{arm}", wanted)
            nll = mean([cell["training"]["after"]["nll"] for cell in found])
            seconds = mean([cell["train_seconds"] for cell in found])
            rows.append([condition, arm, *score_cells(found), f"{nll:.3f}", f"{seconds:.0f}"])
    held_out = base["settings"]["held_out"]
    about = prose(
        "Means over training seeds, in per cent; *by seed* is avg of each. Entropy: of the sampled answers, in nats per "
        f"token. nll: of {held_out} clean test answers, in nats per token. Seconds: of a training run, loading "
        f"included{times}"
    )
    return f"{table(heads, rows)}\n\n{about}"


def score_cells(found: list[dict[str, Any]]) -> list[str]:
    scores = [cell["scores"] for cell in found]
    return [
        percent(mean([s["strict"]["avg"] for s in scores])),
        " / ".join(percent(s["strict"]["avg"]) for s in scores),
        percent(mean([s["lenient"]["avg"] for s in scores])),
        percent(mean([s["strict"]["greedy"] for s in scores])),
        percent(mean([s["strict"]["pass"][-1] for s in scores])),
        f"{mean([s['entropy'] for s in scores]):.3f}",
        percent(mean([s["truncated"] for s in scores])),
    ]


def differences_table(form: Form, differences: Differences, condition: str) -> str:
    rows = []
    for first, others in form.compared.items():
        for other in others:
            if (f"{condition}/{first}", f"{condition}/{other}", "strict") in differences:
                found = [differences[f"{condition}/{first}", f"{condition}/{other}", m] for m in results.MEASURES]
                rows.append([f"{other} − {first}", *map(shown, found), found[0].sentence()])
    return table([condition, "avg", "lenient", "greedy", "pass", "reading of avg"], rows)


def noise_table(form: Form, differences: Differences) -> str:
    rows = []
    for arm in form.trained:
        if (f"{CLEAN}/{arm}", f"{NOISY}/{arm}", "strict") in differences:
            found = [differences[f"{CLEAN}/{arm}", f"{NOISY}/{arm}", m] for m in results.MEASURES]
            rows.append([arm, *map(shown, found), found[0].sentence()])
    if not rows:
        return ""
    heads = ["noisy − clean", "avg", "lenient", "greedy", "pass", "reading of avg"]
    return "What the wrong labels cost each target:\n\n" + table(heads, rows)


def shown(difference: Any) -> str:
    return f"{100 * difference.value:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"


def expectations_table(
    form: Form, cells: Cells, differences: Differences, expectations: Sequence[Expectation], file: str
) -> str:
    rows = []
    for expected in expectations:
        found = outcome(form, expected, cells, differences)
        if found is not None:
            came, met = found
            what = f"{name(expected.other)} against {name(expected.first)}"
            measure = {"strict": "avg", "lenient": "lenient avg"}.get(expected.measure, expected.measure)
            rows.append([what, measure, expected.wanted, expected.why, came, "met" if met else "**not met**"])
    met = sum(row[-1] == "met" for row in rows)
    intro = prose(
        f"Written and committed before the first result "
        f"([{file}](../benchmarks/real_model/{file})). {met} of {len(rows)} were met. An expected "
        "difference counts as met if its interval lies on the expected side of zero; for entropy and nll, if every "
        "training seed does. 'No difference shown' counts as met if the interval contains zero, which does not prove "
        "that there is none."
    )
    return intro + "\n\n" + table(["arm", "score", "expected", "because", "came out", "verdict"], rows)


def name(arm: str) -> str:
    condition, _, own = arm.partition("/")
    return own if own == BASE else f"{own} ({condition})"


def outcome(form: Form, expected: Expectation, cells: Cells, differences: Differences) -> tuple[str, bool] | None:
    """(what came out, whether it was met); None where the cells are not there."""
    if expected.measure in SCORES:
        difference = differences.get((expected.first, expected.other, expected.measure))
        if difference is None:
            return None
        said = difference.sentence().split(";")[0]
        return f"{shown(difference)}: {said}", said == expected.wanted
    conditions = {arm.partition("/")[0] for arm in (expected.first, expected.other)}
    wanted = [
        seed
        for seed in results.seeds(form, cells, CLEAN)
        if all(seed in results.seeds(form, cells, c) for c in conditions)
    ]
    if not wanted or not {arm.partition("/")[2] for arm in (expected.first, expected.other)} <= {*form.arms}:
        return None
    pairs = [
        [figure(cell, expected.measure) for cell in results.of(cells, arm, wanted)]
        for arm in (expected.first, expected.other)
    ]
    apart = [b - a for a, b in zip(*pairs, strict=True)]
    met = all(d > 0 if expected.wanted == "higher" else d < 0 for d in apart)
    return "by seed " + " / ".join(f"{d:+.3f}" for d in apart), met


def figure(cell: dict[str, Any], measure: str) -> float:
    return cell["training"]["after"]["nll"] if measure == "nll" else cell["scores"][measure]


def one_run(form: Form, cells: Cells) -> str:
    if min(len(results.seeds(form, cells, condition)) for condition in CONDITIONS) > 1:
        return ""
    return " With one training seed they apply only to these models, and say nothing about another training run."


def describe(machine: dict[str, Any]) -> str:
    threads = "thread" if machine["threads"] == 1 else "threads"
    packages = ", ".join(f"{p} {machine[p]}" for p in ("torch", "transformers", "trl", "reasoning-gym"))
    return f"{machine['cpu']}, {machine['threads']} {threads}, {packages}"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def percent(value: float) -> str:
    return f"{100 * value:.1f}"
