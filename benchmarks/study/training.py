"""One run: train an arm in a cell, then measure everything that is reported of it."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cells
import chains
import models
import torch
from arms import ARMS
from cells import CELLS, Cell, Plan, Run
from chains import IGNORED, KINDS, ONE, OTHER, Problem, Rows, Solution
from models import Model, hidden, sample, verdicts
from settings import Settings
from torch import Tensor

import qtarget as qt
from qtarget.losses.log_probs import importance_weight

SFT = qt.preset("sft")


class Lesson:
    """What all arms of a cell and seed share: base, teacher and demonstrations, in batches."""

    def __init__(self, settings: Settings, cell: Cell, seed: int, folder: Path):
        self.cell = cell
        self.base = models.made(settings, seed, cell.base, folder)
        self.teacher = models.made(settings, seed, cell.teacher, folder)
        self.steps = settings.steps * cell.times
        pairs = cells.demonstrations(cell, seed, self.steps * settings.batch, settings.lengths)
        data = chains.rows(_own(self.base, pairs, seed) if cell.own_samples else pairs)
        self.tokens = int((data.ids != chains.PAD).sum())
        self.batches = [data[step * settings.batch : (step + 1) * settings.batch] for step in range(self.steps)]

    @functools.cached_property
    def taught(self) -> list[Tensor]:
        """The teacher's hidden states, one tensor a batch."""
        with torch.no_grad():
            return [hidden(self.teacher, batch) for batch in self.batches]


@functools.lru_cache(maxsize=1)
def lesson(settings: Settings, cell: Cell, seed: int, folder: Path) -> Lesson:
    """The runs of a cell and seed follow one another, so that the last one is enough."""
    return Lesson(settings, cell, seed, folder)


class Signals:
    """What an arm's target needs beside the labels, of a batch."""

    def __init__(self, requires: frozenset[str], given: Lesson, refresh: int):
        self.requires, self.cell, self.teacher, self.base = requires, given.cell, given.teacher, given.base
        self.refresh, self.old = refresh, copy.deepcopy(given.base) if "old_policy" in requires else None

    @torch.no_grad()
    def of(self, student: Model, rows: Rows, states: Tensor, step: int, taught: Tensor | None = None) -> dict[str, Any]:
        """taught: the teacher's hidden states of these rows, where they are known."""
        made: dict[str, Any] = {}
        labels = rows.labels[:, 1:]
        if "teacher" in self.requires:
            made["teacher"] = qt.Head(
                hidden(self.teacher, rows) if taught is None else taught,
                self.teacher.lm_head.weight,
                logit_scale=self.cell.teacher_scale,
            )
        if "reference" in self.requires:
            made["reference"] = qt.Head(hidden(self.base, rows), self.base.lm_head.weight)
        if "critical" in self.requires:  # by construction: another token there would make the answer wrong
            made["critical"] = rows.kinds[:, 1:] != chains.FREE
        if "weight" in self.requires:  # exp(mean log p − log p of the base), as the library's column of that name
            ours, theirs = (
                logps(m, rows, h) for m, h in ((student, states.detach()), (self.base, hidden(self.base, rows)))
            )
            counts = (labels != IGNORED).sum(1)
            gaps = (ours - theirs).sum(1) / counts
            made["weight"] = importance_weight(gaps, 1.0)[:, None].expand_as(labels)
        if self.old is not None:
            if step % self.refresh == 0:
                self.old.load_state_dict(student.state_dict())
            made["old_logps"] = logps(self.old, rows, hidden(self.old, rows))
        return made


@torch.no_grad()
def logps(model: Model, rows: Rows, states: Tensor) -> Tensor:
    """[rows, length − 1] log p of the labels, 0 where ignored."""
    stats = qt.linear_target_loss(states, model.lm_head.weight, rows.labels[:, 1:], SFT).stats
    return -stats["nll"].nan_to_num(0.0)


def train(
    settings: Settings, run: Run, folder: Path, watch: Callable[[int, Model], None] | None = None
) -> tuple[Model, Signals, dict[str, float]]:
    """The trained student, its signals, and the mean update norms before and after clipping.

    watch: called after each step with the steps done and the student.
    """
    start = time.perf_counter()
    cell, arm = CELLS[run.cell], ARMS[run.arm].build()
    given = lesson(settings, cell, run.seed, folder)
    student = copy.deepcopy(given.base)
    signals = Signals(arm.requires, given, settings.psft_refresh)
    adam, at = models.optimiser(student.train(), run.rate, given.steps)
    norms, clipped, first, last, updates = 0.0, 0.0, math.nan, math.nan, 0.0
    for step, batch in enumerate(given.batches):
        states = hidden(student, batch)
        taught = given.taught[step] if "teacher" in arm.requires else None
        out = qt.linear_target_loss(
            states,
            student.lm_head.weight,
            batch.labels[:, 1:],
            arm.at(step, given.steps),
            **signals.of(student, batch, states, step, taught),
        )
        out.loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(student.parameters(), math.inf if cell.clip is None else cell.clip))
        norms += norm / given.steps
        clipped += (norm if cell.clip is None else min(norm, cell.clip)) / given.steps
        updates += float(out.stats["update"].nanmean()) / given.steps
        nll = float(out.stats["nll"].nanmean())
        first, last = nll if step == 0 else first, nll
        for group in adam.param_groups:
            group["lr"] = at(step)
        adam.step()
        adam.zero_grad()
        if watch is not None:
            watch(step + 1, student)
    if not all(bool(p.isfinite().all()) for p in student.parameters()):
        raise RuntimeError(f"{run} has weights that are not finite")
    figures = {
        "norm": norms,
        "norm_clipped": clipped,
        "update": updates,
        "nll_first": first,
        "nll_last": last,
        "tokens": given.tokens,
        # 6 N D for the student; 2 N D for each other model's forward
        "flops": given.tokens
        * (
            6 * models.parameters(student)
            + 2 * models.parameters(given.teacher) * ("teacher" in arm.requires)
            + 2 * models.parameters(given.base) * len({"reference", "weight", "old_policy"} & set(arm.requires))
        ),
        "seconds": time.perf_counter() - start,
    }
    return student.eval(), signals, figures


def _own(base: Model, pairs: list[tuple[Problem, Solution]], seed: int) -> list[tuple[Problem, Solution]]:
    """The problems with the base's own samples, right or wrong; what follows the end is cut off."""
    asked = [p for p, _ in pairs]
    completions, _ = sample(base, asked, 1, 1.0, f"own {seed}")
    made = []
    for p, (tokens,) in zip(asked, completions, strict=True):
        ids = tokens[: tokens.index(chains.EOS) + 1] if chains.EOS in tokens else tokens
        made.append((p, Solution(ids, [chains.UNIQUE] * len(ids), [{i} for i in ids])))
    return made


# -- measuring -----------------------------------------------------------------------------------------------------


def bits(right: Tensor) -> list[int]:
    """Verdicts [problems, n] as a number a problem: sample i is bit i."""
    return [sum(int(v) << i for i, v in enumerate(row)) for row in right.tolist()]


def answers(settings: Settings, model: Model, seed: int) -> dict[str, Any]:
    """Scores on the test problems, and the temperature chosen on the dev problems."""
    test = chains.problems("test", settings.test_problems, settings.lengths)
    longer = chains.problems("test", settings.test_problems // 2, (settings.longer,))
    completions, entropy = sample(model, test, settings.samples, 1.0, f"test {seed}")
    right = torch.tensor([[chains.is_right(p, c) for c in made] for p, made in zip(test, completions, strict=True)])
    at_dev = {t: _dev(settings, model, seed, t) for t in settings.temperatures}
    best = max(at_dev, key=lambda t: at_dev[t])
    at_best = right if best == 1.0 else verdicts(model, test, settings.samples, best, f"test {seed}")
    return {
        "test": bits(right),
        "best_temperature": best,
        "test_best_temperature": bits(at_best),
        "greedy": bits(verdicts(model, test, 1, 0.0, "")),
        "longer": bits(verdicts(model, longer, 4, 1.0, f"longer {seed}")),
        "dev": at_dev,
        "entropy": entropy,
        "style_entropy": style_entropy([c for made in completions for c in made]),
        "unfinished": sum(chains.EOS not in c for made in completions for c in made) / right.numel(),
    }


def _dev(settings: Settings, model: Model, seed: int, temperature: float) -> float:
    """avg on the dev problems."""
    dev = chains.problems("dev", settings.dev_problems, settings.lengths)
    return float(verdicts(model, dev, settings.dev_samples, temperature, f"dev {seed}").float().mean())


def style_entropy(completions: list[list[int]]) -> float:
    """Nats of (connective, whether the line is in layout A, B or C) over the lines written."""
    counts: dict[tuple[int, int], int] = {}
    for tokens in completions:
        for start in range(0, len(tokens) - chains.LINE + 1, chains.LINE):
            if tokens[start] in (chains.ANSWER, chains.EOS):
                break
            body = tokens[start + 1 : start + chains.LINE]
            layout = next(
                (i for i, (at, sign) in enumerate(((3, "="), (1, "="), (3, ":"))) if body[at] == chains.ID[sign]), 3
            )
            counts[tokens[start], layout] = counts.get((tokens[start], layout), 0) + 1
    total = sum(counts.values())
    return -sum(c / total * math.log(c / total) for c in counts.values()) if total else 0.0


@torch.no_grad()
def probe(settings: Settings, model: Model, signals: Signals, target: qt.Target, seed: int) -> dict[str, Any]:
    """What the target teaches this model on tokens of each kind, on fresh noisy demonstrations.

    Per kind: mean p of the label, trust a, residual mass Σ b, update ½‖g‖₁, and the share of Q off the label that lies on
    other right tokens (for a noisy token that is the true digit). ``kl_to_base`` is the mean KL(p ‖ p_base) in nats.
    """
    style = ONE if signals.cell.own_samples else signals.cell.style
    pairs = chains.demonstrations(f"probe {seed}", settings.probe_rows, settings.lengths, style, settings.probe_noise)
    rows = chains.rows(pairs, right=True)
    assert rows.right is not None
    states, labels = hidden(model, rows), rows.labels[:, 1:]
    given = signals.of(model, rows, states, 0)
    stats = qt.linear_target_loss(states, model.lm_head.weight, labels, target, **given).stats
    logits = states @ model.lm_head.weight.T
    dense = dict(given)
    for name in ("teacher", "reference"):
        if name in dense:
            head = dense.pop(name)
            dense[f"{name}_logits"] = head.logit_scale * (head.hidden @ head.weight.T)
    Q = qt.target_distribution(logits, labels, target, **dense)
    p = logits.softmax(-1)
    safe = labels.clamp(min=0)[..., None]
    others = rows.right[:, 1:].scatter(-1, safe, False)
    off, on_others = 1 - Q.gather(-1, safe)[..., 0], (Q * others).sum(-1)
    base = (hidden(signals.base, rows) @ signals.base.lm_head.weight.T).log_softmax(-1)
    kl = (p * (logits.log_softmax(-1) - base)).sum(-1)
    made: dict[str, Any] = {"kl_to_base": float(kl[labels != IGNORED].mean())}
    for number, kind in enumerate(KINDS):
        at = (rows.kinds[:, 1:] == number) & (labels != IGNORED)
        made[kind] = {
            "p": float(p.gather(-1, safe)[..., 0][at].mean()),
            "trust": float(stats["trust"][at].mean()),
            "residual": float(stats["residual_mass"][at].mean()),
            "update": float(stats["update"][at].mean()),
            # a signed target may leave nothing off the label, or less
            "on_right_others": float(on_others[at].sum() / off[at].sum()) if float(off[at].mean()) > 1e-3 else None,
        }
    return made


@torch.no_grad()
def other_layout(settings: Settings, model: Model, seed: int) -> float:
    """Forgetting: top-1 accuracy on the result digits of clean solutions in the layout that demonstrations lack."""
    pairs = chains.demonstrations(f"other {seed}", settings.probe_rows, settings.lengths, OTHER)
    rows = chains.rows(pairs)
    top = (hidden(model, rows) @ model.lm_head.weight.T).argmax(-1)
    is_result = rows.ids[:, :-1] == chains.ID["="]
    return float((top == rows.labels[:, 1:])[is_result].float().mean())


def tried(settings: Settings, run: Run, folder: Path) -> dict[str, Any]:
    """Train, and score on the dev problems alone: what chooses a learning rate."""
    student, _, figures = train(settings, run, folder)
    return {"target": ARMS[run.arm].target, "training": figures, "dev": {"1.0": _dev(settings, student, run.seed, 1.0)}}


def finished(settings: Settings, run: Run, folder: Path) -> dict[str, Any]:
    """Train and measure; the content of the run's record."""
    start = time.perf_counter()
    arm = ARMS[run.arm].build()
    student, signals, figures = train(settings, run, folder)
    return {
        "target": ARMS[run.arm].target,
        "training": figures,
        **answers(settings, student, run.seed),
        "other_layout": other_layout(settings, student, run.seed),
        "before": probe(settings, signals.base, signals, arm.at(0, 1), run.seed),
        "after": probe(settings, student, signals, arm.final, run.seed),
        "seconds": time.perf_counter() - start,
    }


def models_of(plan: Plan, seed: int, folder: Path) -> dict[str, Any]:
    """The scores of a seed's untrained arms: bases (at several temperatures, the sharpening control) and teachers."""
    settings = plan.settings
    test = chains.problems("test", settings.test_problems, settings.lengths)
    made: dict[str, Any] = {"seed": seed, "settings": settings.record(), "models": {}}
    for name in plan.models:
        model = models.made(settings, seed, name, folder)
        entry = answers(settings, model, seed) | {"other_layout": other_layout(settings, model, seed)}
        entry["parameters"] = models.parameters(model)
        if name in models.BASES:
            entry["at_temperature"] = {
                str(t): bits(verdicts(model, test, settings.samples, t, f"test {seed}")) for t in settings.temperatures
            }
        made["models"][name] = entry
    return made
