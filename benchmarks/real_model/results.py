"""From cell files to paired differences: ``qtarget eval``'s folders are rebuilt and given to ``qtarget compare``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from real_model import judge, judge_worked, problems
from real_model.forms import BASE, CLEAN, CONDITIONS, LARGE, NOISY, SMALL, Cell, Form
from real_model.problems import answer
from real_model.record import TASK

DRAWS = 4000  # of each bootstrap
MEASURES = ("strict", "lenient", "greedy", "pass@n")
JUDGES = {SMALL.settings.verifier: judge.result, LARGE.settings.verifier: judge_worked.result}

Cells = dict[Cell, dict[str, Any]]
Differences = dict[tuple[str, str, str], Any]  # of (first, other, measure)


def read(folder: Path) -> Cells:
    """Every finished cell."""
    made = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    return {Cell(cell["seed"], cell["condition"], cell["arm"]): cell for cell in made if "arm" in cell}


def seeds(form: Form, cells: Cells, condition: str) -> list[int]:
    """Training seeds of which every arm is finished."""
    there = sorted({cell.seed for cell in cells if cell.condition == condition and cell.arm != BASE})
    return [seed for seed in there if all(Cell(seed, condition, arm) in cells for arm in form.trained)]


def of(cells: Cells, arm: str, wanted: list[int]) -> list[dict[str, Any]]:
    """The cells of CONDITION/ARM, a training seed each; the base, which is not trained, stands for every seed."""
    condition, _, name = arm.partition("/")
    return [cells[Cell(0, CLEAN, BASE) if name == BASE else Cell(seed, condition, name)] for seed in wanted]


def groups(form: Form, cells: Cells) -> list[tuple[list[int], str, list[str]]]:
    """(training seeds, first arm, others) of every comparison on the page."""
    made: list[tuple[list[int], str, list[str]]] = []
    for condition in CONDITIONS:
        if own := seeds(form, cells, condition):
            pairs = form.compared.items()
            made += [(own, f"{condition}/{a}", [f"{condition}/{b}" for b in others]) for a, others in pairs]
    if both := [seed for seed in seeds(form, cells, NOISY) if seed in seeds(form, cells, CLEAN)]:
        made += [(both, f"{CLEAN}/{arm}", [f"{NOISY}/{arm}"]) for arm in form.trained]
    return made


def differences(form: Form, cells: Cells, draws: int = DRAWS) -> Differences:
    """By ``qtarget compare``; pass@n under that name, whatever n."""
    from qtarget.evaluation import compare

    made = {}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {cell: unpack(found, Path(scratch) / cell.name) for cell, found in cells.items()}
        for wanted, first, others in groups(form, cells):
            words = [f"{arm}={','.join(str(folders[key(arm, seed)]) for seed in wanted)}" for arm in (first, *others)]
            for difference in compare.compare(words, draws).differences:
                measure = "pass@n" if difference.measure.startswith("pass@") else difference.measure
                made[first, difference.arm, measure] = difference
    return made


def key(arm: str, seed: int) -> Cell:
    condition, _, name = arm.partition("/")
    return Cell(0, CLEAN, BASE) if name == BASE else Cell(seed, condition, name)


def unpack(cell: dict[str, Any], folder: Path) -> Path:
    """The result folder of ``qtarget eval`` again."""
    from qtarget import files
    from qtarget.evaluation import records, sampling

    about = cell["eval"]["tasks"][TASK]
    judged = JUDGES[about["verifier"]]
    rows = [{"id": name, "prompt": problems.prompt(name), "answer": answer(name)} for name in cell["answers"]]
    asked = [{"id": row["id"], "prompt": row["prompt"], "row": row} for row in rows]
    samples = []
    for row in rows:
        for number, (text, tokens, ended, entropy, strict, lenient) in enumerate(cell["answers"][row["id"]], start=-1):
            said = judged(text, row)
            sample = "greedy" if number < 0 else number
            samples.append(
                {
                    "task": TASK,
                    "problem": row["id"],
                    "sample": sample,
                    "seed": None
                    if sample == "greedy"
                    else sampling.seed_of(cell["eval"]["seed"], TASK, row["id"], number),
                    "text": text,
                    "finish": "stop" if ended else "length",
                    "tokens": tokens,
                    "entropy": entropy,
                    "parsed": said["parsed"],
                    "lenient_parsed": said["lenient_parsed"],
                    "strict": strict,
                    "lenient": lenient,
                    "fault": None,
                    "verifier_version": about["verifier_version"],
                }
            )
    files.write(folder / "problems" / f"{TASK}.jsonl", "".join(map(files.line, asked)))
    files.write(folder / "samples" / f"{TASK}.jsonl", "".join(map(files.line, samples)))
    records.write_manifest(folder, cell["eval"])
    return folder
