"""What a cache leaves out, measured: the live teacher is asked again about some rows.

Outside the k kept tokens a cached teacher has the mass τ in the student's shape, t_v ∝ p_v. With R and R_c the residual
of the live and of the cached teacher, both are the same up to a factor on the kept tokens, so half their L1 distance is
at most the larger of their masses outside. By Hölder's inequality p^(1−η) t^η summed outside is largest where t ∝ p, so
that is R_c's, and the error of Q is at most b times it: a bound that needs no live teacher. It holds where a residual's
coefficients sum to 1 (no teacher temperature) and is given for this tail only. What rounding to float16 adds is bounded
by the size of the log-probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qtarget.errors import ConfigError, DataError
from qtarget.losses import TopK, target_distribution, target_loss
from qtarget.losses.log_probs import log_probs
from qtarget.models.frozen import evaluation_mode
from qtarget.targets import Target, presets
from qtarget.teachers.cache.reader import IDS, LOGPROBS, TAIL, CachedTeacher
from qtarget.teachers.joins import read_before

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

# Supervised tokens looked at together: a few [64, vocabulary] float32 are held at once.
_CHUNK = 64
# Tokens looked at in all, evenly over the rows: each costs some twenty passes over the vocabulary and a target.
_MOST_TOKENS = 1024
# What float32 adds to sums over a vocabulary.
_SLACK = 2e-5
TAILS = ("student", "even")
# A live teacher further than this from what was kept, in nats at the 99th percentile, is not the one that was asked.
_SAME_TEACHER = 0.05


@dataclass(frozen=True)
class TargetError:
    """What the cache does to one target, over the sampled tokens.

    Attributes:
        q_mean, q_max: ½‖Q_cached − Q_live‖₁ of a token. bound_mean, bound_max: what it can be at most; None for an even
            tail. holds: no token is above its bound. logit_gradient, hidden_gradient: ‖difference‖/‖live‖ of p − Q and of
            (p − Q) W, Frobenius. loss_mean: mean |difference| of a token's loss. loss_row: the largest of a row's mean.
    """

    target: str
    tail: str
    q_mean: float
    q_max: float
    bound_mean: float | None
    bound_max: float | None
    holds: bool | None
    logit_gradient: float
    hidden_gradient: float
    loss_mean: float
    loss_row: float


@dataclass(frozen=True)
class Report:
    """See ``shown``. Masses and errors are shares of probability; log-probabilities in nats."""

    rows: int
    tokens: int
    k: int
    lost_mass: dict[str, float]
    rounding: dict[str, float]
    targets: list[TargetError]

    @property
    def same_teacher(self) -> bool:
        return self.rounding["p99"] <= _SAME_TEACHER

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "same_teacher": self.same_teacher}

    def shown(self) -> Iterator[Any]:
        """Lines and a table for the terminal."""
        from rich.table import Table

        yield f"{self.rows} rows, {self.tokens} supervised tokens, k = {self.k}"
        yield "mass outside the k   " + ", ".join(f"{name} {value:.4f}" for name, value in self.lost_mass.items())
        yield (
            "kept against live    "
            + ", ".join(f"{name} {value:.2g}" for name, value in self.rounding.items())
            + " nats"
        )
        if not self.same_teacher:
            yield "THE LIVE TEACHER IS NOT THE ONE THIS CACHE WAS BUILT WITH, or it is loaded in another precision"
        table = Table(box=None, pad_edge=False, title="what that does to a target", title_justify="left")
        for heading in ("target", "tail", "error of Q", "max", "bound", "holds", "gradient", "of hidden", "loss"):
            table.add_column(heading, justify="left" if heading in ("target", "tail") else "right")
        for line in self.targets:
            bound = "-" if line.bound_mean is None else f"{line.bound_mean:.4f}"
            holds = {None: "-", True: "yes", False: "NO"}[line.holds]
            table.add_row(
                *(line.target, line.tail, f"{line.q_mean:.4f}", f"{line.q_max:.4f}", bound, holds),
                *(f"{line.logit_gradient:.3f}", f"{line.hidden_gradient:.3f}", f"{line.loss_mean:.4f}"),
            )
        yield table
        yield "error of Q: ½‖Q_cached − Q_live‖₁ of a token, mean and max, and its bound, mean (an even tail has none)"
        yield "gradient: ‖difference‖ / ‖live‖ of p − Q, and of what reaches hidden states; loss: mean difference, nats"


def targets_for(asked: Any) -> dict[str, Target]:
    """The targets that are looked at: the three with a teacher, and the run's own where it is another."""
    found = {name: presets.build(name) for name in ("kd", "kd-hybrid", "target-sft")}
    try:
        own = None if asked is None else Target.from_config(asked)
    except ConfigError:  # on a schedule
        own = None
    if own is not None and own.requires == {"teacher"} and own not in found.values():
        found[str(own)] = own
    return found


@torch.no_grad()
def examine(trainer: QTargetTrainer, cache: CachedTeacher, rows: int, asked: Any = None) -> Report:
    """Ask the live teacher about rows of a trainer's training set and compare.

    Args:
        trainer: a QTargetTrainer with packing off, the cache's teacher loaded and the student in its place.
        cache: opened. rows: how many, evenly over the set. asked: the run's own target.

    Raises:
        DataError: a row that the cache does not have.
    """
    data = trainer.train_dataset
    count = min(rows, len(data))
    chosen = sorted({round(i * (len(data) - 1) / max(1, count - 1)) for i in range(count)})
    targets = targets_for(asked)
    sums = {(name, tail): _Sums() for name in targets for tail in TAILS}
    tails, gaps, row_count = [], [], 0
    size = trainer.args.per_device_eval_batch_size
    with evaluation_mode(trainer.model):
        for begin in range(0, len(chosen), size):
            batch = [dict(data[number]) for number in chosen[begin : begin + size]]
            places = _places(trainer, cache, batch, chosen[begin : begin + size])
            asked = trainer.batch(batch)
            labels = asked.labels
            heads = trainer.ask(asked, {"student", "teacher"})
            student, live = heads["student"], heads["teacher"]
            padded = torch.full(labels.shape, -1)
            for line, own in zip(padded, places, strict=True):
                line[: len(own)] = torch.tensor(own)
            gathered = {name: value.to(labels.device) for name, value in cache.gather(padded).items()}
            row, place = asked.supervised()
            every = max(1, -(-len(row) * len(chosen) // (len(batch) * _MOST_TOKENS)))
            row, place = row[::every], place[::every]
            for start in range(0, len(row), _CHUNK):
                at = row[start : start + _CHUNK], place[start : start + _CHUNK]
                kept = {name: value[:, 1:][at] for name, value in gathered.items()}
                gap = _chunk(trainer, student, live, kept, at, labels, targets, sums, row_count, cache)
                gaps.append(gap)
                tails.append(kept[TAIL].double().exp().cpu())
            row_count += len(batch)
    mass, gap = torch.cat(tails), torch.cat(gaps)
    return Report(
        rows=row_count,
        tokens=len(mass),
        k=cache.k,
        lost_mass=_summary(mass),
        rounding=_summary(gap),
        targets=[total.result(name, tail) for (name, tail), total in sums.items()],
    )


def _places(
    trainer: QTargetTrainer, cache: CachedTeacher, batch: list[dict[str, Any]], numbers: list[int]
) -> list[list[int]]:
    found = []
    for row, number in zip(batch, numbers, strict=True):
        before, _ = read_before(trainer.rows.join, row)
        places = cache.places(row["input_ids"], row["labels"], before)
        if places is None:
            raise DataError(
                f"row {number} of the train dataset is not in the teacher cache {str(cache.folder)!r}: it was added or "
                "changed since; build a cache for these rows"
            )
        found.append(places)
    return found


def _chunk(
    trainer: QTargetTrainer,
    student: Any,
    live: Any,
    kept: dict[str, Tensor],
    at: tuple[Tensor, Tensor],
    labels: Tensor,
    targets: dict[str, Target],
    sums: dict[tuple[str, str], _Sums],
    first_row: int,
    cache: CachedTeacher,
) -> Tensor:
    """Add a few tokens to the sums. Returns the largest gap of each between kept and live log-probabilities."""
    vocab = trainer.vocab_size
    y = labels[:, 1:][at]
    log_p, log_t = log_probs(student, at, vocab), log_probs(live, at, vocab)
    ids, logprobs = kept[IDS].long(), kept[LOGPROBS].float()
    weight = student.weight[:vocab].float()
    one = (torch.arange(len(y), device=y.device),)
    rounding = 2.0**-11 if cache.manifest["dtype"] == "float16" else 2.0**-23
    log_c = {
        tail: log_probs(TopK(kept[IDS], kept[LOGPROBS], kept[TAIL], tail=tail), one, vocab, log_p) for tail in TAILS
    }
    for name, target in targets.items():
        live_q, live_loss, _ = _taught(log_p, y, target, log_t)
        pull = log_p.exp() - live_q
        of_live = _square(pull), _square(pull @ weight)
        bounded = all(term.pool.keeps_student_shape for term in target.residual_terms)
        for tail in TAILS:
            q, loss, trust = _taught(log_p, y, target, log_c[tail])
            off = q - live_q
            bound = None
            if bounded and tail == "student":
                outside = q.scatter(1, ids, 0.0).sum(-1) - torch.where((ids == y[:, None]).any(-1), 0.0, trust)
                bound = outside + rounding * (q.gather(1, ids) * logprobs.abs().clamp(max=100)).sum(-1) + _SLACK
            sums[name, tail].add(
                q=off.abs().sum(-1) / 2,
                bound=bound,
                squares=(_square(off), of_live[0], _square(off @ weight), of_live[1]),
                loss=(loss - live_loss).abs(),
                rows=at[0] + first_row,
            )
    there = logprobs > -1e3
    return torch.where(there, (log_t.gather(1, ids) - logprobs).abs(), 0.0).amax(-1).cpu()


def _square(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))


def _taught(log_p: Tensor, y: Tensor, target: Target, log_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(Q [n, V], loss [n], trust [n]) of the oracle."""
    q = target_distribution(log_p, y, target, teacher_logits=log_t)
    out = target_loss(log_p, y, target, teacher_logits=log_t, reduction="none")
    return q, out.loss.detach(), out.stats["trust"]


class _Sums:
    """What ``TargetError`` needs, summed over tokens."""

    def __init__(self) -> None:
        self.q: list[Tensor] = []
        self.bound: list[Tensor] = []
        self.loss: list[Tensor] = []
        self.rows: list[Tensor] = []
        self.squares = [0.0, 0.0, 0.0, 0.0]

    def add(self, q: Tensor, bound: Tensor | None, squares: tuple[float, ...], loss: Tensor, rows: Tensor) -> None:
        self.q.append(q.double().cpu())
        self.loss.append(loss.double().cpu())
        self.rows.append(rows.cpu())
        if bound is not None:
            self.bound.append(bound.double().cpu())
        self.squares = [have + more for have, more in zip(self.squares, squares, strict=True)]

    def result(self, name: str, tail: str) -> TargetError:
        q, loss, rows = torch.cat(self.q), torch.cat(self.loss), torch.cat(self.rows)
        bound = torch.cat(self.bound) if self.bound else None
        by_row = torch.zeros(int(rows.max()) + 1, dtype=loss.dtype).index_add(0, rows, loss)
        count = torch.zeros_like(by_row).index_add(0, rows, torch.ones_like(loss)).clamp(min=1)
        return TargetError(
            target=name,
            tail=tail,
            q_mean=float(q.mean()),
            q_max=float(q.max()),
            bound_mean=None if bound is None else float(bound.mean()),
            bound_max=None if bound is None else float(bound.max()),
            holds=None if bound is None else bool((q <= bound).all()),
            logit_gradient=(self.squares[0] / max(self.squares[1], 1e-300)) ** 0.5,
            hidden_gradient=(self.squares[2] / max(self.squares[3], 1e-300)) ** 0.5,
            loss_mean=float(loss.mean()),
            loss_row=float((by_row / count).max()),
        )


def _summary(values: Tensor) -> dict[str, float]:
    values = values.double()
    return {"mean": float(values.mean()), "p99": float(values.quantile(0.99)), "max": float(values.max())}
