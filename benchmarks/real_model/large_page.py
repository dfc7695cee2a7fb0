"""docs/real-model-large.md, from the large form's results; it tells no meaning yet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from real_model import results
from real_model.expectations_large import EXPECTATIONS
from real_model.forms import CONDITIONS, CUDA, LARGE, ROOT
from real_model.results import Cells
from real_model.tables import (
    bullets,
    describe,
    finished,
    found,
    prose,
    table,
)

PAGE = ROOT / "docs" / "real-model-large.md"
LIMITS = (
    "One model of 135 million parameters, its weights from a 4-bit file, and one task: nothing here ranks targets "
    "elsewhere.",
    "One learning rate for all arms, tuned for none, and one number of steps. The teacher that was trained knows what "
    "sft on clean labels knows, from as many other rows; a better one would make another kd.",
    "Few training seeds: intervals drawn from them are too narrow. The untrained model is sampled once, and stands "
    "for every seed. Many differences are shown, each at 95 %: some may stand out by chance.",
    "The same number of steps is not the same work: with a teacher there is a forward pass more, and one that is trained "
    "has cost a run before.",
)


def page(folder: Path) -> str:
    """The whole page. Raises SystemExit where there is nothing to report yet."""
    cells, differences = finished(LARGE, folder, "make real-model-large")
    parts = [
        asked(cells),
        *found(LARGE, cells, differences, ".", EXPECTATIONS, "expectations_large.py"),
        teachers(folder),
        "## Limits",
        bullets(LIMITS),
        again(cells),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def asked(cells: Cells) -> str:
    one = next(iter(cells.values()))
    settings, sampled = one["settings"], one["eval"]
    sums, trained = settings["sums"], settings["train"]
    steps = -(-settings["rows"] // settings["batch"])
    done = ", ".join(f"{condition} {len(results.seeds(LARGE, cells, condition))}" for condition in CONDITIONS)
    precision = "bfloat16 under float32 weights, answers in bfloat16" if settings["device"] == CUDA else "float32"
    rows = [
        [
            "problems",
            f"reasoning-gym's `chain_sum` with {sums['fewest_terms']} to {sums['most_terms']} terms, a third of "
            f"{sums['short_digits']} digits and the rest of {sums['long_digits']}; {settings['problems']} for the test, "
            "none of which, nor the same numbers in another order, is trained on",
        ],
        [
            "training",
            f"{settings['rows']:,} rows, {steps} steps of {settings['batch']}, AdamW at {trained['learning_rate']:g}, "
            f"{trained['lr_scheduler_type']}, {precision}; rows, order, steps and rate are the same for every arm, "
            "and the rate was tuned for none",
        ],
        [
            "kd, target-sft",
            f"their teacher was trained by sft on {settings['teacher_rows']:,} right demonstrations of other problems, "
            "once for each training seed",
        ],
        ["kd-context, target-sft-context", "their teacher is the untrained model with the right answer in its prompt"],
        ["training seeds", f"{done}; each draws its own demonstrations, order and wrong results"],
        [
            "answers",
            f"{sampled['n']} samples a problem at temperature {sampled['temperature']:g} and a greedy one, up to "
            f"{sampled['max_new_tokens']} tokens, with the same sampling seeds for every arm",
        ],
        [
            "strict (avg, greedy, pass)",
            "the answer is the steps that were asked, each from the result before it, with the right end; or the result "
            "alone",
        ],
        ["lenient", "the last number of the answer is the result"],
    ]
    about = prose(
        f"SmolLM2-135M-Instruct learns longer sums from {settings['rows']:,} worked demonstrations, `12 + 34 - 5 = ?` "
        "answered by `12 + 34 = 46, 46 - 5 = 41`. As in [real-model.md](real-model.md): does a target beat plain SFT "
        f"when the labels are right (clean), and when {settings['noise']:.0%} of the steps have a wrong result, from "
        "which the rest goes on (noisy)? Here there are more rows, and two kinds of teacher."
    )
    return f"""\
# A real model, longer sums and two kinds of teacher

<!-- written by benchmarks/real_model/large_page.py from benchmarks/results/real_model_large; change those -->

{about}

{table(["what", "how"], rows)}"""


def teachers(folder: Path) -> str:
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("teacher_seed*.json"))]
    rows = [
        [str(made["seed"]), *(f"{made['training'][when]['nll']:.3f}" for when in ("before", "after")), made["weights"]]
        for made in found
    ]
    about = prose(
        "Those that were trained, on clean test answers; nll in nats a token. A cell names its teacher's weights."
    )
    return f"## The teachers\n\n{about}\n\n{table(['seed', 'nll before', 'nll after', 'weights'], rows)}"


def again(cells: Cells) -> str:
    machines = sorted({name(cell["machine"]) for cell in cells.values()})
    minutes = sum(cell["seconds"] for cell in cells.values()) / 60
    about = prose(
        f"The {len(cells)} cells took {minutes:.0f} minutes on {'; '.join(machines)}. Each is one file in "
        "[benchmarks/results/real_model_large](../benchmarks/results/real_model_large) with its seed, settings, every "
        "answer and verdict; this page is written from them by `python -m real_model.report --large`. What is run is "
        "said in [forms.py](../benchmarks/real_model/forms.py), the rows' rules in "
        "[problems.py](../benchmarks/real_model/problems.py)."
    )
    return f"""\
## Again

    make real-model-large BENCH_ARGS="--device cuda --minutes 8"    # goes on where it stopped

{about}"""


def name(machine: dict[str, Any]) -> str:
    card = f"{machine['gpu']} with CUDA {machine['cuda']}, " if "gpu" in machine else ""
    return card + describe(machine)
