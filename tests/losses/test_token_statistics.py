"""Statistics that trust rules read: each against its formula, and every way to compute it against the oracle."""

import pytest
import torch

import qtarget as qt

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
    with pytest.raises(qt.ConfigError, match="reference_logits"):
        qt.target_loss(Z, LABELS, reads("kl_reference"), reference_logits=reference, vocab_size=REAL)
