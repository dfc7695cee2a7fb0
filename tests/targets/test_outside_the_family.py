"""Published losses that are no target of this library, on the token of test_family.py: the target they hide all the same.

They need a sort of the vocabulary, a support that no softmax has, or a divergence that is no function of p/R.
"""

import pytest
import torch
from test_family import GIVEN, LABEL, SIX_DECIMALS, Z

import qtarget as qt

T = GIVEN["teacher_logits"].softmax(-1)


def kl(q, p):
    return (q * (q / p).log()).sum()


def rank_tuner(z, y):
    """−sg(p_y 2^(f(E R) − f(R))) log p_y, R the label's rank, f(x) = 1 / log₂(x + 1) (arXiv:2602.01745)."""
    p = z.softmax(-1).detach()
    ranks = 1 + (p.unsqueeze(-2) > p.unsqueeze(-1)).sum(-1)
    p_y, rank = p.gather(-1, y[:, None]), ranks.gather(-1, y[:, None])
    f = [1 / (x + 1).log2() for x in ((p * ranks).sum(-1, keepdim=True), rank)]
    return -(p_y * 2 ** (f[0] - f[1]) * z.log_softmax(-1).gather(-1, y[:, None])).sum()


def distillm_2(z, y):
    """KL(p ‖ sg(α p + (1 − α) t)), α = 0.1: the mixture held constant, as in the code of arXiv:2503.07067."""
    p = z.softmax(-1)
    return kl(p, (0.1 * p + 0.9 * T).detach())


def alpha_beta(z, y):
    """−Σ (t^α p^β − (α t^(α+β) + β p^(α+β)) / (α + β)) / (α β), α = 0.2, β = 0.7 (ABKD, arXiv:2505.04560)."""
    p = z.softmax(-1)
    return -(T**0.2 * p**0.7 - (0.2 * T**0.9 + 0.7 * p**0.9) / 0.9).sum() / (0.2 * 0.7)


def adaptive_kl(z, y):
    """w KL(t ‖ p) + (1 − w) KL(p ‖ t), w the share of Σ |t − p| in the teacher's head (arXiv:2404.02657)."""
    p = z.softmax(-1)
    order = T.argsort(-1, descending=True)
    in_head = T.gather(-1, order).cumsum(-1) <= 0.5
    head = torch.zeros_like(in_head).scatter(-1, order, in_head)
    gap = (T - p).abs().detach()
    w = (gap * head).sum() / gap.sum()
    return w * kl(T, p) + (1 - w) * kl(p, T)


def support(z):
    """Of sparsemax: the entries above its threshold, and the threshold."""
    top = z.sort(-1, descending=True).values
    k = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    threshold = (top.cumsum(-1) - 1) / k
    size = (top > threshold).sum(-1, keepdim=True)
    tau = threshold.gather(-1, size - 1)
    return z > tau, tau


def sparsemax(z, y):
    """½ Σ_S (z² − τ²) + ½ − z_y."""
    inside, tau = support(z)
    return (((z**2 - tau**2) * inside).sum() + 1) / 2 - z.gather(-1, y[:, None]).sum()


def entmax(z, y):
    """Fenchel–Young loss of 1.5-entmax, whose maximiser is held constant (Danskin)."""
    low, high = z.detach().amax() / 2 - 1, z.detach().amax() / 2
    for _ in range(100):
        tau = (low + high) / 2
        low, high = (tau, high) if (z.detach() / 2 - tau).clamp(min=0).square().sum() > 1 else (low, tau)
    q = (z.detach() / 2 - tau).clamp(min=0) ** 2
    return (q * z).sum() - z.gather(-1, y[:, None]).sum()


def mass_on_support(z, y):
    """−log of the mass on sparsemax's support and the label, TS²'s second term."""
    inside, _ = support(z)
    return -(z.softmax(-1) * inside.scatter(-1, y[:, None], True)).sum().log()


def expected_cost(z, y):
    """E_p[c]: the number-token loss (arXiv:2411.02083)."""
    return (z.softmax(-1) * torch.tensor([0.0, 1.0, 2.0, 3.0, 3.03], dtype=z.dtype)).sum()


@pytest.mark.parametrize(
    "loss, gradient, on_simplex",
    [
        (rank_tuner, "+0.073136 -0.143711 +0.009898 +0.044359 +0.016319", True),
        (distillm_2, "+0.196047 -0.206094 -0.075818 +0.210866 -0.125002", True),
        (alpha_beta, "+0.255602 -0.266058 -0.105465 +0.283393 -0.167471", False),
        (adaptive_kl, "+0.228668 -0.239774 -0.088208 +0.244744 -0.145430", True),
        (sparsemax, "+0.750000 -1.000000 +0.000000 +0.250000 +0.000000", False),
        (entmax, "+0.623434 -0.916145 +0.000000 +0.291145 +0.001566", False),
        (mass_on_support, "-0.077825 -0.028630 +0.058012 -0.047203 +0.095646", True),
        (expected_cost, "-0.575900 -0.054168 +0.038085 +0.430677 +0.161307", False),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_target_it_hides(loss, gradient, on_simplex):
    found = qt.induced_target(loss, Z, LABEL)
    expected = torch.tensor([[float(number) for number in gradient.split()]], dtype=torch.float64)
    assert torch.allclose(Z.softmax(-1) - found.q, expected, rtol=0, atol=SIX_DECIMALS)
    assert bool(found.on_simplex) is on_simplex
