"""Write docs/real-model.md from the committed result files; run again it changes nothing.

python -m real_model.report        # as run.py: from benchmarks/, or with it on PYTHONPATH
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from real_model import reading, results
from real_model.expectations import EXPECTATIONS, SCORES, Expectation
from real_model.results import Cells
from real_model.run import BASE, CLEAN, CONDITIONS, DFT, KD, NOISY, RESULTS, ROOT, SFT, TARGET, Cell

PAGE = ROOT / "docs" / "real-model.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    options.page.write_text(page(options.results), encoding="utf-8")
    print(f"page  {options.page}")


def page(folder: Path) -> str:
    """The whole page. Raises SystemExit where there is nothing to report yet."""
    cells = results.read(folder)
    if not results.seeds(cells, CLEAN) or Cell(0, CLEAN, BASE) not in cells:
        raise SystemExit(f"{folder} holds no training seed of which every arm is finished; run: make real-model")
    differences = results.differences(cells)
    parts = [
        asked(cells),
        "## What came out",
        scores_table(cells),
        "## Differences",
        prose(
            f"Scores in per cent. Paired by problem and training seed; intervals are 95 %, of {results.DRAWS:,} "
            "bootstrap draws of training seeds, problems and samples, by `qtarget compare`. Where an interval holds "
            "zero, no difference is shown." + one_run(cells)
        ),
        *(differences_table(differences, condition) for condition in CONDITIONS if results.seeds(cells, condition)),
        noise_table(differences),
        "## What was expected",
        expectations_table(cells, differences),
        teacher_text(folder),
        "## What it means for you",
        bullets(reading.sentences(cells, differences)),
        "## Limits",
        bullets(reading.LIMITS),
        again(cells),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def one_run(cells: Cells) -> str:
    if min(len(results.seeds(cells, condition)) for condition in CONDITIONS) > 1:
        return ""
    return " With one training seed they are for these models, and say nothing of training again."


def asked(cells: Cells) -> str:
    one = next(iter(cells.values()))
    settings, sampled = one["settings"], one["eval"]
    trained = settings["train"]
    steps = -(-settings["rows"] // trained["per_device_train_batch_size"])
    done = ", ".join(f"{condition} {len(results.seeds(cells, condition))}" for condition in CONDITIONS)
    rows = [
        [
            "problems",
            "reasoning-gym's `chain_sum` with two terms, a third of one digit and the rest of two; "
            f"{settings['problems']} for the test, none of which, nor the same sum turned round, is trained on",
        ],
        [
            "training",
            f"{settings['rows']} rows, {steps} steps of {trained['per_device_train_batch_size']}, AdamW at "
            f"{trained['learning_rate']:g}, {trained['lr_scheduler_type']}; rows, order, steps and rate are the same for "
            "every arm, and the rate was tuned for none",
        ],
        ["training seeds", f"{done}; each draws its own demonstrations, order and wrong results"],
        [
            "answers",
            f"{sampled['n']} samples a problem at temperature {sampled['temperature']:g} and a greedy one, up to "
            f"{sampled['max_new_tokens']} tokens, with the same sampling seeds for every arm",
        ],
        ["strict (avg, greedy, pass)", "the answer is the result, alone or behind the repeated sum, and nothing else"],
        ["lenient", "the last number of the answer is the result"],
    ]
    about = prose(
        f"SmolLM2-135M-Instruct learns sums of two numbers from {settings['rows']} demonstrations, `59 + 63 = ?` "
        "answered by `59 + 63 = 122`, under four targets. Two questions: does any of them beat plain SFT when the labels "
        f"are right (clean), and when the result is wrong in {settings['noise']:.0%} of the demonstrations (noisy)? kd "
        "and target-sft have a teacher who knows more: the same model with the right answer in its prompt, also where "
        "the demonstration is wrong."
    )
    return f"""\
# A real model: does the target matter?

<!-- written by benchmarks/real_model/report.py from benchmarks/results/real_model; change those, not this page -->

{about}

{table(["what", "how"], rows)}"""


def prose(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def bullets(sentences: Sequence[str]) -> str:
    return "\n".join(prose(f"- {said}").replace("\n", "\n  ") for said in sentences)


# -- tables --------------------------------------------------------------------------------------------------------


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def scores_table(cells: Cells) -> str:
    heads = ["labels", "arm", "avg@4", "by seed", "lenient", "greedy", "pass@4", "entropy", "cut off", "nll", "seconds"]
    heads[2] = f"avg@{next(iter(cells.values()))['eval']['n']}"
    heads[6] = heads[2].replace("avg", "pass")
    base = cells[Cell(0, CLEAN, BASE)]
    before = next(cell for cell in cells.values() if "training" in cell)["training"]["before"]
    rows = [["none", BASE, *score_cells([base]), f"{before['nll']:.3f}", "-"]]
    for condition in CONDITIONS:
        wanted = results.seeds(cells, condition)
        for arm in results.TRAINED if wanted else ():
            found = results.of(cells, f"{condition}/{arm}", wanted)
            nll = mean([cell["training"]["after"]["nll"] for cell in found])
            seconds = mean([cell["train_seconds"] for cell in found])
            rows.append([condition, arm, *score_cells(found), f"{nll:.3f}", f"{seconds:.0f}"])
    held_out = base["settings"]["held_out"]
    about = prose(
        "Means over training seeds, in per cent; *by seed* is avg of each. Entropy: of the sampled answers, nats a "
        f"token. nll: of {held_out} clean test answers, nats a token. Seconds: of a training run with its loading, on a "
        "machine that had other work to do: they compare nothing."
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


def differences_table(differences: dict[tuple[str, str, str], Any], condition: str) -> str:
    rows = []
    for first in (BASE, SFT, DFT, KD):
        for other in (SFT, DFT, KD, TARGET):
            if (f"{condition}/{first}", f"{condition}/{other}", "strict") in differences:
                found = [differences[f"{condition}/{first}", f"{condition}/{other}", m] for m in results.MEASURES]
                rows.append([f"{other} − {first}", *map(shown, found), found[0].sentence()])
    return table([condition, "avg", "lenient", "greedy", "pass", "reading of avg"], rows)


def noise_table(differences: dict[tuple[str, str, str], Any]) -> str:
    rows = []
    for arm in results.TRAINED:
        if (f"{CLEAN}/{arm}", f"{NOISY}/{arm}", "strict") in differences:
            found = [differences[f"{CLEAN}/{arm}", f"{NOISY}/{arm}", m] for m in results.MEASURES]
            rows.append([arm, *map(shown, found), found[0].sentence()])
    if not rows:
        return ""
    heads = ["noisy − clean", "avg", "lenient", "greedy", "pass", "reading of avg"]
    return "What the wrong labels cost each arm:\n\n" + table(heads, rows)


def shown(difference: Any) -> str:
    return f"{100 * difference.value:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"


def expectations_table(cells: Cells, differences: dict[tuple[str, str, str], Any]) -> str:
    rows = []
    for expected in EXPECTATIONS:
        found = outcome(expected, cells, differences)
        if found is not None:
            came, met = found
            what = f"{name(expected.other)} against {name(expected.first)}"
            measure = {"strict": "avg", "lenient": "lenient avg"}.get(expected.measure, expected.measure)
            rows.append([what, measure, expected.wanted, expected.why, came, "met" if met else "**not met**"])
    met = sum(row[-1] == "met" for row in rows)
    intro = prose(
        f"Written and committed before the first result "
        f"([expectations.py](../benchmarks/real_model/expectations.py)). {met} of {len(rows)} were met. An expected "
        "difference is met where its interval lies on that side of zero; entropy and nll, where every training seed "
        "does. No difference shown is met where the interval holds zero: that is no proof that there is none."
    )
    return intro + "\n\n" + table(["arm", "score", "expected", "because", "came out", "verdict"], rows)


def name(arm: str) -> str:
    condition, _, own = arm.partition("/")
    return own if own == BASE else f"{own} ({condition})"


def outcome(
    expected: Expectation, cells: Cells, differences: dict[tuple[str, str, str], Any]
) -> tuple[str, bool] | None:
    """(what came out, whether it was met); None where the cells are not there."""
    if expected.measure in SCORES:
        difference = differences.get((expected.first, expected.other, expected.measure))
        if difference is None:
            return None
        said = difference.sentence().split(";")[0]
        return f"{shown(difference)}: {said}", said == expected.wanted
    conditions = {arm.partition("/")[0] for arm in (expected.first, expected.other)}
    wanted = [seed for seed in results.seeds(cells, CLEAN) if all(seed in results.seeds(cells, c) for c in conditions)]
    if not wanted:
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


def teacher_text(folder: Path) -> str:
    files = [folder / f"teacher_{condition}.json" for condition in CONDITIONS]
    if not all(file.is_file() for file in files):
        return ""
    rows = []
    for condition, file in zip(CONDITIONS, files, strict=True):
        found = json.loads(file.read_text(encoding="utf-8"))["check"]
        rows.append([condition, *teacher_cells(found)])
    about = prose(
        "`qtarget teacher check` of the demonstrations of training seed 1, before training. In its "
        "prompt the teacher reads the question and the right answer, with the request to write just that."
    )
    return f"## The teacher\n\n{about}\n\n{table(TEACHER, rows)}"


TEACHER = ("labels", "nll, student", "nll, teacher", "same top token", "teacher sure of another token", "verdict")


def teacher_cells(found: dict[str, Any]) -> list[str]:
    return [
        f"{found['student']['nll']:.3f}",
        f"{found['teacher']['nll']:.3f}",
        f"{found['top1_match']:.0%}",
        f"{found['conflicts']:.1%}",
        found["verdict"],
    ]


def again(cells: Cells) -> str:
    machines = sorted({describe(cell["machine"]) for cell in cells.values()})
    hours = sum(cell["seconds"] for cell in cells.values()) / 3600
    about = prose(
        f"The {len(cells)} cells took {hours:.1f} hours on {'; '.join(machines)}, beside other work. Each is one file in "
        "[benchmarks/results/real_model](../benchmarks/results/real_model) with its seed, settings, every answer and "
        "verdict; this page is written from them by `python -m real_model.report`. The rows' rules are in "
        "[problems.py](../benchmarks/real_model/problems.py), the shared settings in "
        "[train.yaml](../benchmarks/real_model/train.yaml)."
    )
    return f"""\
## Again

    make real-model          # goes on where it stopped; a finished cell is not run again
    make real-model-quick    # two steps and four problems, to see that it works

{about}"""


def describe(machine: dict[str, Any]) -> str:
    threads = "thread" if machine["threads"] == 1 else "threads"
    packages = ", ".join(f"{p} {machine[p]}" for p in ("torch", "transformers", "trl", "reasoning-gym"))
    return f"{machine['cpu']}, {machine['threads']} {threads}, {packages}"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


if __name__ == "__main__":
    main()
