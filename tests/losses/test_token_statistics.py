"""Statistics that trust rules read: each against its formula, and every way to compute it against the oracle."""

import pytest
import torch
from test_engine_memory import LargestTensor
from test_engine_topk import padded, with_topk

import qtarget as qt
from engine_and_oracle import assert_engine_is_oracle, hard_batch, ordinary_batch, run_engine, run_oracle
from qtarget.losses.engine import sizes, token_statistics, who
from qtarget.losses.engine.buffers import Rows
from qtarget.losses.engine.device import passes

pytestmark = pytest.mark.usefixtures("one_thread")

N, V, REAL, COVERED, K = 7, 13, 11, 9, 4


def logits(seed: int, width: int) -> torch.Tensor:
    z = 3 * torch.randn(N, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    z[0, 1] = z[0, 2]  # a tie with the label
    z[1, 3] += 60  # nearly certain
    return z


LABELS = torch.tensor([2, 3, 0, 4, 10, 9, 5])  # 9 and 10 are tokens that the reference does not have
Z, TEACHER, REFERENCE = logits(0, V), logits(1, V), logits(2, COVERED)
P, T = Z.softmax(-1), TEACHER[:, :REAL].softmax(-1)
R = torch.cat([REFERENCE.softmax(-1), torch.zeros(N, V - COVERED)], 1)
P_Y, R_Y = P.gather(1, LABELS[:, None]), R.gather(1, LABELS[:, None])
P_COVERED = P[:, :COVERED] / P[:, :COVERED].sum(-1, keepdim=True)
FORMULAS = {
    "sum_sq": (P**2).sum(-1),
    "rank": 1 + (P > P_Y).sum(-1).double(),
    "lower_mass": (P * (P < P_Y)).sum(-1),
    "top_k_mass": P.sort(-1, descending=True).values[:, :K].sum(-1),
    "teacher_entropy": -(T * T.log()).sum(-1),
    "reference_lower_mass": (R * (R < R_Y)).sum(-1),
    "kl_reference": (P_COVERED * (P_COVERED / R[:, :COVERED]).log()).sum(-1),
}


def reads(name: str) -> qt.Target:
    """A target whose trust is a statistic."""

    @qt.trust.needs(name)
    def rule(stats):
        value = getattr(stats, name)
        return value(K) if name.startswith("top_k") else value

    return qt.Target(rule)


@pytest.mark.parametrize("name", FORMULAS)
def test_the_oracle_computes_the_formula(name):
    out = qt.target_loss(
        Z, LABELS, reads(name), teacher_logits=TEACHER, reference_logits=REFERENCE, vocab_size=REAL, reduction="none"
    )
    torch.testing.assert_close(out.stats["trust"], FORMULAS[name], rtol=1e-12, atol=1e-13)


def test_a_reference_that_rules_out_a_token_is_infinitely_far():
    reference = REFERENCE.clone()
    reference[0, 0] = -torch.inf
    doubt = qt.trust.needs("kl_reference")(lambda stats: (-stats.kl_reference).exp())
    out = qt.target_loss(Z, LABELS, qt.Target(doubt), reference_logits=reference, vocab_size=REAL, reduction="none")
    assert out.stats["trust"][0] == 0 and out.stats["trust"][1] > 0


# ---- the engine


@qt.trust.needs(*FORMULAS)
def everything(stats):
    read = (getattr(stats, name) for name in FORMULAS if name != "top_k_mass")
    return sum(read, stats.top_k_mass(K)) / 10


EVERYTHING = qt.Target(everything, qt.residual.guided(0.3))
BATCHES = {
    "plain": ordinary_batch,
    "hard, capped": lambda: hard_batch(softcap=40.0, with_bias=True),
    "padded": lambda: padded(ordinary_batch()),
    "top-k": lambda: with_topk(padded(ordinary_batch()), 5),
    "top-k, even tail": lambda: with_topk(padded(ordinary_batch()), 5, tail="even"),
}
every_batch = pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)


@every_batch
@pytest.mark.parametrize("name", FORMULAS)
def test_plain_pytorch(name, batch):
    assert_engine_is_oracle(batch(), reads(name), chunk_rows=10)


@every_batch
def test_pure_functions(batch, monkeypatch):
    monkeypatch.setattr(who, "FunctionPasses", lambda: passes.FunctionPasses(compiled=False))
    assert_engine_is_oracle(batch(), EVERYTHING, backend="compiled", chunk_rows=10)


@pytest.mark.triton
@pytest.mark.parametrize("name", ["hard, capped", "top-k"])
def test_kernels(name):
    assert_engine_is_oracle(BATCHES[name](), EVERYTHING, backend="triton", chunk_rows=10)


@pytest.mark.parametrize("name", FORMULAS)
def test_single_precision(name):
    batch = ordinary_batch(v=503).to(torch.float32).to(torch.float64)
    truth = run_oracle(batch, reads(name), reduction="none", stats="all")
    got = run_engine(batch.to(torch.float32), reads(name), reduction="none")
    torch.testing.assert_close(got.stats["trust"].double(), truth.stats["trust"], rtol=2e-5, atol=1e-7)


def test_a_reference_near_the_student_keeps_the_digits_of_its_divergence():
    """Of 5e-9 nats: a sum of p log(p/r) would round to some 1e-7."""
    batch = ordinary_batch().to(torch.float32).to(torch.float64)
    batch.dense["reference"] = (batch.logits() + 1e-4 * batch.dense["reference"]).float().double()
    truth = run_oracle(batch, reads("kl_reference"), reduction="none").stats["trust"]
    got = run_engine(batch.to(torch.float32), reads("kl_reference"), reduction="none").stats["trust"]
    assert truth.max() < 1e-7
    torch.testing.assert_close(got.double(), truth, rtol=0.05, atol=1e-11)


def test_only_what_is_asked_for_is_computed():
    rows = Rows(Z, {}, LABELS, {})

    def refuse(rows, name):
        raise AssertionError(f"the {name}'s logits were read")

    assert token_statistics.of_rows(rows, {"entropy", "top_k_mass"}, REAL, refuse) == {}
    assert token_statistics.of_rows(rows, {"log_p_y", "rank"}, REAL, refuse).keys() == {"rank"}


def test_temporaries_stay_within_the_budget(monkeypatch):
    rows = Rows(Z, {"teacher": TEACHER, "reference": REFERENCE}, LABELS, {})
    whole = token_statistics.of_rows(rows, FORMULAS, REAL, lambda rows, name: rows.aux[name])
    monkeypatch.setattr(sizes, "_SCRATCH_BYTES", 2 * V * 8)
    with LargestTensor() as seen:
        blocks = token_statistics.of_rows(rows, FORMULAS, REAL, lambda rows, name: rows.aux[name])
    assert seen.elements <= 2 * V
    assert all(torch.equal(blocks[name], whole[name]) for name in whole)
