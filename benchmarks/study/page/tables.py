"""The tables of the first plan, in which one thing is changed at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from arms import FEW, PRESETS
from chains import KINDS
from expectations import Expectation
from results import Contrast, Results

TEACHERS = ("good", "sharp", "bad", "misaligned")


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---", *("--:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *lines])


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def signed(found: Contrast, unit: float = 100) -> str:
    mark = "" if found.says == "no difference shown" else " *"
    return f"{unit * found.value:+.1f} [{unit * found.low:+.1f}, {unit * found.high:+.1f}]{mark}"


def model_table(results: Results) -> str:
    names = {"base": "base", "weak": "weak base", **{name: f"{name} teacher" for name in TEACHERS}}
    n = results.settings.samples
    head = [
        "model",
        f"avg@{n}",
        "at its best temperature",
        "greedy",
        f"pass@{n}",
        "entropy",
        "style entropy",
        "other layout",
    ]
    lines = [
        [
            label,
            *(percent(results.mean(name, measure)) for measure in ("avg", "best", "greedy", "pass")),
            f"{results.mean(name, 'entropy'):.3f}",
            f"{results.mean(name, 'style_entropy'):.2f}",
            percent(results.mean(name, "other_layout")),
        ]
        for name, label in names.items()
    ]
    return table(head, lines)


def rate_table(results: Results) -> str:
    lines = []
    for arm in PRESETS:
        found = [results.scores["centre", arm.name][rate] for rate in results.settings.rates]
        means = [sum(scores) / len(scores) for scores in found]
        lines.append([arm.name, *map(percent, means), f"{results.rates['centre', arm.name]:g}"])
    return table(["arm", *(f"{rate:g}" for rate in results.settings.rates), "kept"], lines)


def centre_table(results: Results, names: Sequence[str]) -> str:
    n = results.settings.samples
    head = [
        "arm",
        f"avg@{n}",
        "to sft",
        "seeds",
        "to dft",
        "at best T",
        "greedy",
        f"pass@{n}",
        "to dft",
        "one step more",
    ]
    lines = []
    for name in ("base", *names):
        side = name if name == "base" else f"centre/{name}"
        to_sft, to_dft = (results.contrast(side, f"centre/{other}", "avg") for other in ("sft", "dft"))
        lines.append(
            [
                name,
                percent(results.mean(side, "avg")),
                "" if name == "sft" else signed(to_sft),
                "" if name == "sft" else f"{to_sft.signs[0]}+ {to_sft.signs[1]}−",
                "" if name == "dft" else signed(to_dft),
                *(percent(results.mean(side, m)) for m in ("best", "greedy", "pass")),
                "" if name == "dft" else signed(results.contrast(side, "centre/dft", "pass")),
                percent(results.mean(side, "longer")),
            ]
        )
    return table(head, lines)


def cost_table(results: Results, names: Sequence[str]) -> str:
    head = ["arm", "entropy", "style entropy", "other layout", "KL to base", "gradient norm", "clipped", "GFLOP"]
    lines = []
    for name in names:
        side = f"centre/{name}"
        lines.append(
            [
                name,
                f"{results.mean(side, 'entropy'):.3f}",
                f"{results.mean(side, 'style_entropy'):.2f}",
                percent(results.mean(side, "other_layout")),
                f"{results.mean(side, 'kl'):.3f}",
                f"{results.mean(side, 'norm'):.3f}",
                f"{results.mean(side, 'norm_clipped'):.3f}",
                f"{results.mean(side, 'gflops'):.0f}",
            ]
        )
    return table(head, lines)


def cell_table(results: Results, measure: str) -> str:
    head = ["cell", *FEW, "target-sft − sft", "target-sft − dft", "target-sft − kd"]
    lines = []
    for cell in results.plan.cells.values():
        ours = f"{cell.name}/target-sft"
        if not results.has(ours):
            continue
        values = [percent(results.mean(f"{cell.name}/{arm}", measure)) for arm in FEW]
        lines.append(
            [
                cell.name,
                *values,
                *(signed(results.contrast(ours, f"{cell.name}/{o}", measure)) for o in ("sft", "dft", "kd")),
            ]
        )
    return table(head, lines)


def kind_table(results: Results) -> str:
    head = [
        "arm",
        *(f"{what}, {kind}" for what in ("p before", "trust", "rest on right others", "p after") for kind in KINDS),
    ]
    lines = []
    for arm in FEW:
        cells = []
        for when, figure in (("before", "p"), ("before", "trust"), ("before", "on_right_others"), ("after", "p")):
            for kind in KINDS:
                value = results.kind(f"centre/{arm}", when, kind, figure)
                cells.append("" if value is None else f"{value:.2f}")
        lines.append([arm, *cells])
    return table(head, lines)


def control_table(results: Results) -> str:
    head = ["control", f"avg@{results.settings.samples}", "minus dft at the centre"]
    lines = []
    for label, side in (
        ("base at temperature 1", "base"),
        ("base at the temperature best on dev problems", "base@best"),
        ("sft at the temperature best on dev problems", "centre/sft@best"),
        ("sft on the base's own samples", "own-samples/sft"),
        ("dft on the base's own samples", "own-samples/dft"),
        ("dft at the temperature best on dev problems", "centre/dft@best"),
        ("target-sft at the temperature best on dev problems", "centre/target-sft@best"),
    ):
        lines.append([label, percent(results.mean(side, "avg")), signed(results.contrast(side, "centre/dft", "avg"))])
    return table(head, lines)


def expectation_table(results: Results, expectations: Sequence[Expectation]) -> tuple[str, int]:
    """The table, and how many were met."""
    lines, met = [], 0
    for expected in expectations:
        found = results.contrast(expected.left, expected.right, expected.measure)
        holds = found.says == expected.wanted
        met += holds
        unit = 1 if expected.measure == "entropy" else 100
        lines.append(
            [
                f"{expected.left} **{expected.wanted}** {'from' if 'no' in expected.wanted else 'than'} {expected.right}"
                f" ({expected.measure}): {expected.why}",
                signed(found, unit) if unit == 100 else f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]",
                f"{found.signs[0]}+ {found.signs[1]}−",
                "met" if holds else f"**not met**: {found.says}",
            ]
        )
    return table(["expected", "found", "seeds", ""], lines), met


def losses(results: Results) -> str:
    """Every cell and arm of the five that target-sft is shown to be behind."""
    lines = []
    for cell in results.plan.cells.values():
        if not results.has(f"{cell.name}/target-sft"):
            continue
        for measure in ("avg", "pass"):
            for arm in FEW[:-1]:
                found = results.contrast(f"{cell.name}/target-sft", f"{cell.name}/{arm}", measure)
                if found.says == "lower":
                    name = f"{measure}@{results.settings.samples}"
                    lines.append([cell.name, cell.says, name, arm, signed(found)])
    return table(["cell", "", "measure", "behind", "difference"], lines) if lines else "None was shown."


def identity(results: Results) -> str:
    """target-sft at eta 0 trains as dft does where both have one rate; said only where it was so."""
    assert results.plan.rate_of["target-sft-0.0"] == "target-sft"
    if results.rates["centre", "target-sft"] != results.rates["centre", "dft"]:
        return "the two had different learning rates here, so that they cannot be compared run by run"
    same = sum(
        a["test"] == b["test"]
        for a, b in zip(results.of("centre/target-sft-0.0"), results.of("centre/dft"), strict=True)
    )
    return f"all samples of {same} of {len(results.seeds)} seeds have the same verdicts"
