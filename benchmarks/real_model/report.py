"""Write docs/real-model.md from the committed result files; run again it changes nothing.

python -m real_model.report            # as run.py: from benchmarks/, or with it on PYTHONPATH
python -m real_model.report --large    # docs/real-model-large.md, once there are results of the large form
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from real_model import large_page, reading, results
from real_model.expectations import EXPECTATIONS
from real_model.forms import CONDITIONS, LARGE, ROOT, SMALL
from real_model.results import Cells
from real_model.tables import (
    bullets,
    describe,
    finished,
    found,
    prose,
    table,
)

PAGE = ROOT / "docs" / "real-model.md"
BUSY = ", on a machine that ran other jobs too, so do not compare them."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="of the large form")
    parser.add_argument("--results", type=Path, help="a folder of finished cells")
    parser.add_argument("--page", type=Path, help="where it is written")
    options = parser.parse_args()
    form, write, file = (LARGE, large_page.page, large_page.PAGE) if options.large else (SMALL, page, PAGE)
    made, file = write(options.results or form.results), options.page or file
    file.write_text(made, encoding="utf-8")
    print(f"page  {file}")


def page(folder: Path) -> str:
    """The whole page. Raises SystemExit where there is nothing to report yet."""
    cells, differences = finished(SMALL, folder, "make real-model")
    parts = [
        asked(cells),
        *found(SMALL, cells, differences, BUSY, EXPECTATIONS, "expectations.py"),
        teacher_text(folder),
        "## What it means for you",
        bullets(reading.sentences(cells, differences)),
        "## Limits",
        bullets(reading.LIMITS),
        again(cells),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def asked(cells: Cells) -> str:
    one = next(iter(cells.values()))
    settings, sampled = one["settings"], one["eval"]
    trained = settings["train"]
    steps = -(-settings["rows"] // trained["per_device_train_batch_size"])
    done = ", ".join(f"{condition} {len(results.seeds(SMALL, cells, condition))}" for condition in CONDITIONS)
    rows = [
        [
            "problems",
            "reasoning-gym's `chain_sum` with two terms, a third of one digit and the rest of two; "
            f"{settings['problems']} for the test; none of these is trained on, in either order",
        ],
        [
            "training",
            f"{settings['rows']} rows, {steps} steps of {trained['per_device_train_batch_size']}, AdamW at "
            f"{trained['learning_rate']:g}, {trained['lr_scheduler_type']}; rows, order, steps and rate are the same for "
            "every target (arm), and the rate was not tuned for any",
        ],
        ["training seeds", f"{done}; each draws its own demonstrations, order and wrong results"],
        [
            "answers",
            f"{sampled['n']} samples a problem at temperature {sampled['temperature']:g} and a greedy one, up to "
            f"{sampled['max_new_tokens']} tokens, with the same sampling seeds for every arm",
        ],
        ["strict (avg, greedy, pass)", "the answer is the result, alone or after the repeated sum, and nothing else"],
        ["lenient", "the last number of the answer is the result"],
    ]
    about = prose(
        f"SmolLM2-135M-Instruct learns sums of two numbers from {settings['rows']} demonstrations with four targets. "
        "A prompt is `59 + 63 = ?`, its answer `59 + 63 = 122`. There are two questions. Does any target beat plain SFT "
        "when the labels are right (clean)? And when the result is wrong in "
        f"{settings['noise']:.0%} of the demonstrations (noisy)? kd and target-sft have a teacher that "
        "knows more: the same model with the right answer in its prompt, even if the demonstration is wrong."
    )
    return f"""\
# A real model: does the target matter?

<!-- written by benchmarks/real_model/report.py from benchmarks/results/real_model; change those, not this page -->

{about}

{table(["what", "how"], rows)}"""


def teacher_text(folder: Path) -> str:
    files = [folder / f"teacher_{condition}.json" for condition in CONDITIONS]
    if not all(file.is_file() for file in files):
        return ""
    rows = []
    for condition, file in zip(CONDITIONS, files, strict=True):
        found = json.loads(file.read_text(encoding="utf-8"))["check"]
        rows.append([condition, *teacher_cells(found)])
    about = prose(
        "Output of `qtarget teacher check` on the demonstrations of training seed 1, before training. The teacher's "
        "prompt contains the question, the right answer and a request to write exactly that."
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
        f"The {len(cells)} cells took {hours:.1f} hours on {'; '.join(machines)}, alongside other jobs. Each is one file "
        "in [benchmarks/results/real_model](../benchmarks/results/real_model) with its seed, settings, every answer and "
        "verdict; `python -m real_model.report` writes this page from them. The code that generates the rows is "
        "[problems.py](../benchmarks/real_model/problems.py), and the shared settings are in "
        "[train.yaml](../benchmarks/real_model/train.yaml)."
    )
    return f"""\
## Run it yourself

    make real-model          # resumes where it stopped; finished cells are not run again
    make real-model-quick    # two steps and four problems, to check that it works

{about}"""


if __name__ == "__main__":
    main()
