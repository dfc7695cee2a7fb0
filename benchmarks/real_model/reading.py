"""What the differences mean for a user, each sentence from the figures: it says what the intervals show and no more."""

from __future__ import annotations

from real_model import results
from real_model.forms import BASE, CLEAN, CONDITIONS, KD, NOISY, SFT, SMALL, TARGET
from real_model.results import Cells, Differences


def sentences(cells: Cells, differences: Differences) -> list[str]:
    made = []
    for condition in CONDITIONS:
        if results.seeds(SMALL, cells, condition):
            made.append(against_sft(condition, differences))
            made += sharpness(condition, cells, differences)
    if any((f"{CLEAN}/{arm}", f"{NOISY}/{arm}", "strict") in differences for arm in SMALL.trained):
        made.append(cost_of_noise(differences))
    for condition in CONDITIONS:
        if results.seeds(SMALL, cells, condition):
            made += doubt_of_form(condition, cells)
    return made


def against_sft(condition: str, differences: Differences) -> str:
    """avg and greedy of each arm against sft."""
    parts = []
    for measure, said in ("strict", "at temperature 1"), ("greedy", "in greedy answers"):
        verdicts = {
            arm: differences[f"{condition}/{SFT}", f"{condition}/{arm}", measure] for arm in SMALL.trained if arm != SFT
        }
        words = [
            f"{listed([arm for arm, d in verdicts.items() if d.shown and (d.value > 0) == higher])} "
            f"{'above' if higher else 'below'} sft"
            for higher in (True, False)
            if any(d.shown and (d.value > 0) == higher for d in verdicts.values())
        ]
        if same := [arm for arm, d in verdicts.items() if not d.shown]:
            words.append(f"no difference shown for {listed(same)}")
        parts.append(f"{said}, {', '.join(words)}")
    return f"**{condition.capitalize()} labels.** {'; '.join(parts)[0].upper()}{'; '.join(parts)[1:]}."


def sharpness(condition: str, cells: Cells, differences: Differences) -> list[str]:
    """Where an arm leads in sampled answers alone, what it gained may be certainty."""
    made = []
    for arm in SMALL.trained:
        pair = f"{condition}/{SFT}", f"{condition}/{arm}"
        if arm == SFT or (*pair, "strict") not in differences:
            continue
        sampled, greedy = differences[*pair, "strict"], differences[*pair, "greedy"]
        if sampled.shown and sampled.value > 0 and not (greedy.shown and greedy.value > 0):
            own, plain = (entropy(cells, condition, name) for name in (arm, SFT))
            made.append(
                f"There {arm} leads in sampled answers and not in greedy ones (entropy {own:.2f} nats a token, sft's "
                f"{plain:.2f}). Its samples are less random; it is not shown to know more sums. With greedy decoding or "
                "a lower temperature, this lead may disappear."
            )
        elif greedy.shown and greedy.value < 0 and not (sampled.shown and sampled.value < 0):
            own, plain = (entropy(cells, condition, name) for name in (arm, SFT))
            made.append(
                f"There {arm} is behind sft in greedy answers ({100 * greedy.value:+.1f}) but not in sampled ones: with "
                f"entropy {own:.2f} (sft {plain:.2f}) it has settled on its first guesses, right or wrong."
            )
    return made


def cost_of_noise(differences: Differences) -> str:
    costs = {arm: differences.get((f"{CLEAN}/{arm}", f"{NOISY}/{arm}", "strict")) for arm in SMALL.trained}
    lost = [arm for arm, d in costs.items() if d is not None and d.shown and d.value < 0]
    kept = [arm for arm, d in costs.items() if d is not None and not d.shown]
    won = [arm for arm, d in costs.items() if d is not None and d.shown and d.value > 0]
    parts = [f"lower for {listed(lost)}" if lost else "", f"higher for {listed(won)}" if won else ""]
    parts.append(f"no difference shown for {listed(kept)}" if kept else "")
    lead = differences[f"{NOISY}/{SFT}", f"{NOISY}/{TARGET}", "strict"]
    said = lead.sentence().partition(";")[0]
    return (
        f"**What wrong labels cost**, at temperature 1: {'; '.join(part for part in parts if part)}. A teacher that has "
        f"read the right answer should help here: {TARGET} against sft on noisy labels, {said} "
        f"({100 * lead.value:+.1f}, {100 * lead.low:+.1f} to {100 * lead.high:+.1f})."
    )


def doubt_of_form(condition: str, cells: Cells) -> list[str]:
    """kd copies the teacher's doubt as well as its knowledge."""
    found = results.of(cells, f"{condition}/{KD}", results.seeds(SMALL, cells, condition))
    cut = sum(cell["scores"]["truncated"] for cell in found) / len(found)
    base = results.of(cells, f"{CLEAN}/{BASE}", [0])[0]["scores"]["entropy"]
    own = entropy(cells, condition, KD)
    if cut < 0.5 or own < base:
        return []
    return [
        f"**A teacher that knows the answer can still be a bad one** ({condition}): kd's samples have entropy {own:.2f}, "
        f"the untrained model's {base:.2f}, and {cut:.0%} of them are cut off. The teacher knows the result but is "
        f"unsure of the form, and kd learns that uncertainty. With the same teacher, {TARGET}'s samples have entropy "
        f"{entropy(cells, condition, TARGET):.2f}."
    ]


def entropy(cells: Cells, condition: str, arm: str) -> float:
    found = results.of(cells, f"{condition}/{arm}", results.seeds(SMALL, cells, condition))
    return sum(cell["scores"]["entropy"] for cell in found) / len(found)


def listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


LIMITS = (
    "One model of 135 million parameters, its weights from a 4-bit file, one task, 12 steps: nothing here ranks targets "
    "elsewhere. Much of what is learned is the form of the answer.",
    "One learning rate for all targets, not tuned for any. Targets differ in the size of their gradients; Adam divides "
    "most of that out, and clipping at 1 affects every step of sft, kd and target-sft and most of dft's. At another rate "
    "the order may differ.",
    "Three training seeds: intervals drawn from so few are too narrow. The untrained model is sampled once and "
    "used for every seed. There are many comparisons, each at 95 %: some may be significant by chance.",
    "The teacher's wording was compared with four others after the first cell of kd, by the nll of 24 training rows. It "
    "had the lowest, and was kept. With a surer teacher, kd would come out differently.",
    "The same number of steps is not the same work: kd and target-sft also run the teacher's forward pass.",
    "Twelve steps are few, and a teacher that reads the answer is only one kind. `make real-model-large` is a larger "
    "version for a GPU, with longer sums, 250 steps of 32 rows, five seeds, and also a teacher that was trained on other "
    "problems. It has not been run.",
)
