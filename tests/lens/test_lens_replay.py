"""Replayed from the kept entries alone, a target is the oracle's on full logits, within the error shown."""

import numpy as np
import pytest
import torch

import lens_records
import qtarget as qt
from lens_records import record_from_logits
from published import CASES, label_log_p
from qtarget import ConfigError
from qtarget.lens.replay import Replay
from qtarget.targets.divergence import Divergence, as_divergence

N, V, K = 200, 300, 20
Z = lens_records.random_logits(N, V)
Y = lens_records.random_labels(Z)
generator = torch.Generator().manual_seed(3)
GIVEN = {
    "teacher_logits": Z + lens_records.random_logits(N, V, 1, 1.5),
    "reference_logits": Z + lens_records.random_logits(N, V, 2, 0.3),
    "weight": 3 * torch.rand(N, generator=generator).double(),
    "critical": torch.randint(0, 2, (N,), generator=generator).double(),
    "old_logps": label_log_p(Z, Y) - 0.3 * torch.randn(N, generator=generator).double(),
}


def sinh(d):
    return d.sinh()


def record(k=K):
    return record_from_logits(
        Z,
        Y,
        teacher=GIVEN["teacher_logits"],
        reference=GIVEN["reference_logits"],
        k=k,
        **{name: GIVEN[name] for name in ("weight", "critical", "old_logps")},
    )


REPLAY = Replay(record())
EVERYTHING = Replay(record(k=V))


def oracle(target, needs):
    needed = {name: GIVEN[name] for name in needs if name != "vocab_size"}
    stats = qt.target_loss(Z, Y, target, stats="all", **needed).stats
    return stats, qt.target_distribution(Z, Y, target, **needed).numpy()


def bucketed(replay, q):
    """Q at the record's ids and its mass outside."""
    inside = np.where(replay.there, np.take_along_axis(q, replay.ids.clip(0), 1), 0.0)
    return inside, q.sum(1) - inside.sum(1)


# What a rule makes of a statistic of the whole row has no bound: of these a note is all there is.
OF_ROWS = {"sum_sq", "reference_lower_mass"}
BOUNDED = [case for case in CASES if not qt.preset(case.preset, **case.hyperparameters).needs & OF_ROWS]


@pytest.mark.parametrize("case", BOUNDED, ids=lambda case: case.id)
def test_a_target_is_the_oracles_within_the_error_shown(case):
    target = qt.preset(case.preset, **case.hyperparameters)
    stats, q = oracle(target, case.needs)
    figures = REPLAY.figures(target)
    slack = 1e-9
    assert (np.abs(figures.trust - stats["trust"].numpy()) <= 1e-6 + figures.q_error).all()
    inside, outside = bucketed(REPLAY, q)
    distance = (np.abs(figures.q - inside).sum(1) + np.abs(figures.q_tail - outside)) / 2
    assert (distance <= figures.q_error + slack).all()
    assert (np.abs(figures.update - stats["update"].numpy()) <= figures.update_error + slack).all()
    if not target.residual_terms:
        assert figures.update_error.max() == 0, "a target whose residual is the student has no unknown"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_with_the_whole_vocabulary_nothing_is_unknown(case):
    target = qt.preset(case.preset, **case.hyperparameters)
    stats, q = oracle(target, case.needs)
    figures = EVERYTHING.figures(target)
    assert max(figures.q_error.max(), figures.update_error.max()) < 1e-9
    assert np.abs(figures.q - bucketed(EVERYTHING, q)[0]).max() < 1e-9 * max(1, np.abs(q).max())
    assert np.abs(figures.update - stats["update"].numpy()).max() < 1e-9 * max(1, figures.update.max())
    assert (figures.off_simplex == (q.min(1) < -1e-6)).all()


@pytest.mark.parametrize(
    "divergence", [*map(as_divergence, Divergence.known), qt.divergence.alpha(0), as_divergence(sinh)], ids=str
)
def test_a_divergence_is_the_oracles_within_the_error_shown(divergence):
    for pool in (
        qt.residual.teacher(),
        qt.residual.guided(0.3),
        qt.residual.uniform(),
        qt.residual.pool(reference=0.5),
    ):
        target = qt.Target(0.7, [(0.4, pool, divergence)])
        stats, q = oracle(target, [f"{name}_logits" for name in pool.requires])
        inside, outside = bucketed(REPLAY, q)
        figures = REPLAY.figures(target)
        distance = (np.abs(figures.q - inside).sum(1) + np.abs(figures.q_tail - outside)) / 2
        assert (distance <= figures.q_error + 1e-9).all()
        assert (np.abs(figures.update - stats["update"].numpy()) <= figures.update_error + 1e-9).all()
        bounded = divergence.reach is not None or not pool.nonzero
        assert np.isfinite(figures.q_error).all() == bounded == (not figures.notes)
        assert not bounded or figures.q_error.mean() < 0.15
        whole = EVERYTHING.figures(target)
        assert max(whole.q_error.max(), whole.update_error.max()) < 1e-9 and not whole.notes
        assert np.abs(whole.q - bucketed(EVERYTHING, q)[0]).max() < 1e-9 * max(1, np.abs(q).max())


def test_a_tail_in_the_students_shape_is_exact_as_one_token():
    top = Z.topk(K, dim=-1).indices
    log_t = GIVEN["teacher_logits"].log_softmax(-1)
    rest = torch.log1p(-log_t.exp().gather(1, top).sum(-1, keepdim=True)) - Z.scatter(1, top, -torch.inf).logsumexp(
        -1, keepdim=True
    )
    shaped = (Z + rest).scatter(1, top, log_t.gather(1, top))
    replay = Replay(record_from_logits(Z, Y, teacher=shaped, k=K))
    for name in Divergence.known:
        target = qt.preset("kd", divergence=name)
        q = qt.target_distribution(Z, Y, target, teacher_logits=shaped).numpy()
        assert np.abs(replay.figures(target).q - bucketed(replay, q)[0]).max() < 1e-12 * max(1, np.abs(q).max())


def test_a_small_k_says_so():
    """Label smoothing spreads over the whole vocabulary; a flat teacher's top is little of it."""
    few = Replay(record_from_logits(Z, Y, teacher=0.01 * GIVEN["teacher_logits"], k=5))
    assert not few.summary(few.figures(qt.preset("kd"))).reliable
    assert few.summary(few.figures(qt.preset("dft"))).reliable
    assert few.summary(few.figures(qt.preset("label-smoothing", smoothing=0.9))).update_error > 0.05
    wide = Replay(record(k=200))
    errors = [replay.summary(replay.figures(qt.preset("kd"))).update_error for replay in (few, wide)]
    assert errors[1] < errors[0] / 3


def test_an_entropy_over_more_than_was_kept():
    notes = REPLAY.figures(qt.preset("eaft", top_k=50)).notes
    assert notes == ["top_k is 50, but only the 20 likeliest tokens were captured; capture with --top_k 50"]
    assert REPLAY.figures(qt.preset("eaft", top_k=20)).notes == []


def test_columns_that_were_not_captured():
    plain = Replay(record_from_logits(Z, Y))
    for name, told in (("iw-sft", "weight"), ("cft", "critical"), ("psft", "old_logps")):
        figures = plain.figures(qt.preset(name))
        assert len(figures.notes) == 1 and figures.notes[0].startswith(
            f"column {told} was not captured and is assumed to be"
        )
        assert np.allclose(figures.trust, 1), "each is plain SFT then"


def test_a_model_that_was_not_captured():
    plain = Replay(record_from_logits(Z, Y))
    with pytest.raises(
        ConfigError, match=r"target kd.* needs a teacher, which this capture does not have; capture again with"
    ):
        plain.figures(qt.preset("kd"))
    assert plain.figures(qt.preset("target-sft", eta=0.0)).notes == []


def test_the_summary_is_that_of_the_tokens():
    target = qt.preset("dft")
    figures = REPLAY.figures(target)
    summary = REPLAY.summary(figures)
    p = label_log_p(Z, Y).exp()
    assert summary.update_vs_sft == pytest.approx(float((p * (1 - p)).sum() / (1 - p).sum()), rel=1e-9)
    ordered = (p * (1 - p)).sort(descending=True).values
    carriers = int((ordered.cumsum(0) < 0.9 * ordered.sum()).sum()) + 1
    assert summary.carries_90 == carriers / N


def test_a_target_of_ones_own():
    target = qt.Target(trust=qt.trust.entropy(top_k=10), residual=qt.residual.tempered(2.0))
    stats, q = oracle(target, ())
    figures = REPLAY.figures(target)
    inside, outside = bucketed(REPLAY, q)
    distance = (np.abs(figures.q - inside).sum(1) + np.abs(figures.q_tail - outside)) / 2
    assert (distance <= figures.q_error + 1e-9).all() and figures.q_error.max() > 0
    assert np.abs(figures.trust - stats["trust"].numpy()).max() < 1e-9


WHOLE_ROWS = ("sum_sq", "rank", "lower_mass", "top_k_mass", "teacher_entropy", "reference_lower_mass", "kl_reference")


def reads(name):
    def rule(stats):
        return stats.top_k_mass(10) if name == "top_k_mass" else getattr(stats, name)

    return qt.Target(qt.trust.needs(name)(rule))


def off(replay, name):
    """What is replayed of the statistic less what it is, [N]."""
    target = reads(name)
    needs = [f"{model}_logits" for model in ("teacher", "reference") if model in target.requires]
    return replay.figures(target).trust - oracle(target, needs)[0]["trust"].numpy()


@pytest.mark.parametrize("name", WHOLE_ROWS)
def test_a_statistic_of_whole_rows_with_nothing_unknown(name):
    assert np.abs(off(EVERYTHING, name)).max() < 1e-9


@pytest.mark.parametrize("name", WHOLE_ROWS)
def test_a_statistic_of_whole_rows_is_noted_where_it_is_unsure(name):
    few = Replay(record(k=10))
    error, notes = off(few, name), few.figures(reads(name)).notes
    if name in ("rank", "top_k_mass"):
        assert np.abs(error).max() < 1e-9 and notes == []
    elif name == "kl_reference":
        assert error.max() < 1e-9 and notes == ["kl_reference is at least what is shown: each tail counts as one token"]
    else:
        said = float(notes[0].split("may be off by ")[1].split()[0]) if notes else 0.01
        assert np.abs(error).mean() <= 1.05 * said


@pytest.mark.parametrize("name", ["lower_mass", "teacher_entropy"])
def test_a_statistic_of_which_the_tails_hold_much_says_so(name):
    (note,) = Replay(record(k=5)).figures(reads(name)).notes
    assert note.startswith(f"{name} may be off by ") and note.endswith("; capture with a larger --top_k")


def test_the_mass_of_more_than_was_kept():
    target = qt.Target(qt.trust.needs("top_k_mass")(lambda stats: stats.top_k_mass(50)))
    assert REPLAY.figures(target).notes == [
        "top_k is 50, but only the 20 likeliest tokens were captured; capture with --top_k 50"
    ]
