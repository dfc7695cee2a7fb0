"""What a cache leaves out, measured: the live teacher is asked again about some rows.

Outside the k kept tokens a cached teacher has the mass τ in the student's shape, t_v ∝ p_v. With R and R_c the residual
of the live and of the cached teacher, both are the same up to a factor on the kept tokens, so half their L1 distance is
at most the larger of their masses outside. By Hölder's inequality p^(1−η) t^η summed outside is largest where t ∝ p, so
that is R_c's, and the error of Q is at most b times it: a bound that needs no live teacher. It holds where a residual's
coefficients sum to 1 (no teacher temperature), under forward KL, and is given for this tail only. Under another
divergence the error depends on how the live teacher spreads the mass outside, which the cache does not hold. What
rounding to float16 adds is bounded by the size of the log-probabilities.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qtarget.errors import ConfigError, DataError
from qtarget.losses import Head, TopK, target_distribution, target_loss
from qtarget.losses.log_probs import log_probs, refuse_nan
from qtarget.models.frozen import evaluation_mode
from qtarget.targets import Target, presets
from qtarget.teachers.agreement.measure import joined, on_cpu
from qtarget.teachers.cache.reader import CachedTeacher
from qtarget.teachers.joins import read_before
from qtarget.teachers.settings import describe, named_teacher

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
            tail, a teacher temperature, and another divergence than forward KL. holds: no token is above its bound.
        logit_gradient, hidden_gradient: ‖difference‖/‖live‖ of p − Q and of (p − Q) W, Frobenius; None where the live
            gradient is nothing beyond float32's rounding, as where student and teacher are the same model. loss_mean:
            mean |difference| of a token's loss. loss_row: the largest of a row's mean.
    """

    target: str
    tail: str
    q_mean: float
    q_max: float
    bound_mean: float | None
    bound_max: float | None
    holds: bool | None
    logit_gradient: float | None
    hidden_gradient: float | None
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
                *("none" if x is None else f"{x:.3f}" for x in (line.logit_gradient, line.hidden_gradient)),
                f"{line.loss_mean:.4f}",
            )
        yield table
        yield "error of Q: ½‖Q_cached − Q_live‖₁ of a token, mean and max, and its bound, mean"
        yield "(none: an even tail, a teacher temperature, another divergence than forward KL)"
        yield "gradient: ‖difference‖ / ‖live‖ of p − Q, and of what reaches hidden states; loss: mean difference, nats"
        if nothing := [line.target for line in self.targets if line.logit_gradient is None]:
            yield (
                f"none: {', '.join(dict.fromkeys(nothing))} has no gradient on these rows, for example because the "
                "teacher is the student; the error of Q is all the cache adds"
            )


def targets_for(run_target: Any) -> dict[str, Target]:
    """The targets that are looked at: the three with a teacher, and the run's own where it is another."""
    targets = {name: presets.build(name) for name in ("kd", "kd-hybrid", "target-sft")}
    with contextlib.suppress(ConfigError):  # on a schedule
        own = None if run_target is None else Target.from_config(run_target)
        if own is not None and own.requires == {"teacher"} and own not in targets.values():
            targets[str(own)] = own
    return targets


@torch.no_grad()
def examine(trainer: QTargetTrainer, cache: CachedTeacher, rows: int, run_target: Any = None) -> Report:
    """Ask the live teacher about rows of a trainer's training set and compare.

    Args:
        trainer: a QTargetTrainer with packing off, the cache's teacher loaded and the student in its place.
        cache: opened. rows: how many, evenly over the set. run_target: the run's own target.

    Raises:
        DataError: a row that the cache does not have.
    """
    data = trainer.train_dataset
    count = min(rows, len(data))
    chosen = sorted({round(i * (len(data) - 1) / max(1, count - 1)) for i in range(count)})
    targets = targets_for(run_target)
    chunks: list[dict[str, Tensor]] = []
    by_target: dict[tuple[str, str], list[dict[str, Tensor]]] = {(name, tail): [] for name in targets for tail in TAILS}
    size = trainer.args.per_device_eval_batch_size
    with evaluation_mode(trainer.model):
        for begin in range(0, len(chosen), size):
            numbers = chosen[begin : begin + size]
            rows_read = [data[number] for number in numbers]
            batch = trainer.batch(rows_read)
            gathered = cache.gather(_places(trainer, cache, rows_read, numbers, batch.labels.shape))
            cached = cache.top_k({name: value.to(batch.labels.device) for name, value in gathered.items()})
            heads = trainer.ask(batch, {"student", "teacher"})
            student, live = heads["student"], heads["teacher"]
            assert isinstance(student, Head)
            row, place = batch.supervised()
            every = max(1, -(-len(row) * len(chosen) // (len(numbers) * _MOST_TOKENS)))
            for at in zip(row[::every].split(_CHUNK), place[::every].split(_CHUNK), strict=True):
                y, vocab = batch.shifted[at], trainer.vocab_size
                log_p, log_t = (log_probs(head, at, vocab) for head in (student, live))
                refuse_nan(f"student {trainer.student.name}", log_p, at, numbers)
                refuse_nan(f"teacher {describe(named_teacher(trainer.args))}", log_t, at, numbers)
                logprobs = cached.logprobs[at].float()
                gap = (log_t.gather(1, cached.ids[at].long()) - logprobs).abs()
                gap = torch.where(logprobs > -1e3, gap, 0.0).amax(-1)
                chunks.append(on_cpu({"gap": gap, "mass": cached.log_tail()[at].double().exp(), "row": at[0] + begin}))
                weight = student.weight[:vocab].float()
                for key, figures in _errors(log_p, log_t, cached, at, y, targets, weight):
                    by_target[key].append(on_cpu(figures))
    tokens = joined(chunks)
    return Report(
        rows=len(chosen),
        tokens=len(tokens["row"]),
        k=cache.k,
        lost_mass=_summary(tokens["mass"]),
        rounding=_summary(tokens["gap"]),
        targets=[_target_error(*key, joined(figures), tokens["row"]) for key, figures in by_target.items()],
    )


def _places(
    trainer: QTargetTrainer, cache: CachedTeacher, rows: list[dict[str, Any]], numbers: list[int], shape: torch.Size
) -> Tensor:
    padded = torch.full(shape, -1)
    for line, row, number in zip(padded, rows, numbers, strict=True):
        before, _ = read_before(trainer.rows.join, row)
        places = cache.places(row["input_ids"], row["labels"], before)
        if places is None:
            raise DataError(
                f"row {number} of the train dataset is not in the teacher cache {str(cache.folder)!r}: it was added or "
                "changed since; build a cache for these rows"
            )
        line[: len(places)] = torch.tensor(places)
    return padded


def _errors(
    log_p: Tensor,
    log_t: Tensor,
    cached: TopK,
    at: tuple[Tensor, ...],
    y: Tensor,
    targets: Mapping[str, Target],
    weight: Tensor,
) -> Iterator[tuple[tuple[str, str], dict[str, Tensor]]]:
    """((target, tail), figures of each token, [n]): squares are those of ‖·‖ of a token's gradient.

    Args:
        log_p, log_t: [n, V], the student's and the live teacher's. cached: at positions [B, T − 1], of which ``at`` names
            n. y: [n] labels. weight: [V, d] of the student's head.
    """
    ids, logprobs = cached.ids[at].long(), cached.logprobs[at].float()
    rounding = 2.0**-11 if cached.logprobs.dtype == torch.float16 else 2.0**-23
    log_c = {tail: log_probs(replace(cached, tail=tail), at, log_p.shape[1], log_p) for tail in TAILS}
    for name, target in targets.items():
        live_q, live_loss, _ = _taught(log_p, y, target, log_t)
        live = log_p.exp() - live_q
        live_squares = {"live": _squares(live), "live_hidden": _squares(live @ weight)}
        bounded = all(pool.keeps_student_shape and by.is_forward_kl for _, pool, by in target.residual_terms)
        for tail in TAILS:
            q, loss, trust = _taught(log_p, y, target, log_c[tail])
            off = q - live_q
            figures = {"q": off.abs().sum(-1) / 2, "loss": (loss - live_loss).abs()}
            figures |= {"off": _squares(off), "off_hidden": _squares(off @ weight), **live_squares}
            if bounded and tail == "student":
                outside = q.scatter(1, ids, 0.0).sum(-1) - torch.where((ids == y[:, None]).any(-1), 0.0, trust)
                rounded = rounding * (q.gather(1, ids) * logprobs.abs().clamp(max=100)).sum(-1)
                figures["bound"] = outside + rounded + _SLACK
            yield (name, tail), figures


def _squares(x: Tensor) -> Tensor:
    return x.square().sum(-1, dtype=torch.float64)


def _taught(log_p: Tensor, y: Tensor, target: Target, log_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(Q [n, V], loss [n], trust [n]) of the oracle."""
    q = target_distribution(log_p, y, target, teacher_logits=log_t)
    out = target_loss(log_p, y, target, teacher_logits=log_t, reduction="none")
    return q, out.loss.detach(), out.stats["trust"]


def _target_error(target: str, tail: str, figures: Mapping[str, Tensor], row: Tensor) -> TargetError:
    q, loss, bound = figures["q"], figures["loss"], figures.get("bound")
    total = {name: float(values.sum()) for name, values in figures.items()}
    is_nothing = (total["live"] / len(q)) ** 0.5 < _SLACK
    return TargetError(
        target=target,
        tail=tail,
        q_mean=float(q.mean()),
        q_max=float(q.max()),
        bound_mean=None if bound is None else float(bound.mean()),
        bound_max=None if bound is None else float(bound.max()),
        holds=None if bound is None else bool((q <= bound).all()),
        logit_gradient=None if is_nothing else (total["off"] / total["live"]) ** 0.5,
        hidden_gradient=None if is_nothing else (total["off_hidden"] / max(total["live_hidden"], 1e-300)) ** 0.5,
        loss_mean=float(loss.mean()),
        loss_row=float((row.bincount(loss) / row.bincount().clamp(min=1)).max()),
    )


def _summary(values: Tensor) -> dict[str, float]:
    return {"mean": float(values.mean()), "p99": float(values.quantile(0.99)), "max": float(values.max())}
