"""From a loss to its target, for every published loss and for some that no preset has."""

import pytest
import torch
import torch.nn.functional as F

import qtarget as qt
from published import CASES, label_log_p
from qtarget import ConfigError
from qtarget.targets.induced import RULES

N, V = 40, 23
generator = torch.Generator().manual_seed(11)
Z = 2 * torch.randn(N, V, generator=generator).double()
Z[0, 3] += 30  # sure of itself
Z[1, 4] -= 30  # hopeless
Y = torch.randint(0, V, (N,), generator=generator)
Y[0], Y[1] = 3, 4
GIVEN = {
    "vocab_size": V,
    "weight": torch.rand(N, generator=generator).double() * 3,
    "critical": torch.randint(0, 2, (N,), generator=generator).double(),
    "teacher_logits": 2 * torch.randn(N, V, generator=generator).double(),
    "reference_logits": 2 * torch.randn(N, V, generator=generator).double(),
}
GIVEN["old_logps"] = label_log_p(Z, Y) - 0.4 * torch.randn(N, generator=generator).double()


def gradient(loss):
    leaf = Z.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, Y), leaf)[0]


def check(made, loss):
    """Q is p − g; trust and residual make it up again wherever they are given."""
    p = Z.softmax(-1)
    assert torch.allclose(made.q, p - gradient(loss), rtol=1e-12, atol=1e-12)
    known = made.rule >= 0
    delta = F.one_hot(Y, V).double()
    again = made.trust[:, None] * delta + (1 - made.trust)[:, None] * made.residual
    assert torch.allclose(again[known], made.q[known], rtol=1e-8, atol=1e-8)
    assert torch.isnan(made.trust[~known]).all() and not made.on_simplex[~known].any()
    assert (made.residual[known] >= 0).all()
    assert torch.allclose(made.residual[known].sum(-1), torch.ones(int(known.sum())).double(), atol=1e-8)
    return made


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_published_losses(case):
    def loss(logits, labels):
        return case.loss(logits, labels, GIVEN).sum()

    made = check(qt.induced_target(loss, Z, Y), loss)
    needed = {name: GIVEN[name] for name in case.needs if name != "vocab_size"}
    target = qt.preset(case.preset, **case.hyperparameters)
    oracle = qt.target_loss(Z, Y, target, stats="all", **needed).stats
    assert torch.allclose(made.q, qt.target_distribution(Z, Y, target, **needed), rtol=1e-9, atol=1e-10)
    assert torch.equal(~made.on_simplex, oracle["off_simplex_fraction"] > 0)
    if not target.residual_terms:  # the student gets the rest: the trust is a, inside the simplex or not
        assert (made.rule == RULES.index("student")).all()
        assert torch.allclose(made.trust, oracle["trust"], rtol=1e-6, atol=1e-8)


def focal(logits, labels):
    """(1 − p)² (−log p), arXiv:1708.02002"""
    log_p = label_log_p(logits, labels)
    return (-((1 - log_p.exp()) ** 2) * log_p).sum()


def poly1(logits, labels):
    """−log p + ε (1 − p), arXiv:2204.12511"""
    log_p = label_log_p(logits, labels)
    return (-log_p + 2.0 * (1 - log_p.exp())).sum()


def unlikelihood(logits, labels):
    """−log(1 − p), arXiv:1908.04319: away from the label"""
    return -(1 - label_log_p(logits, labels).exp().clamp(max=1 - 1e-9)).log().sum()


def confidence_penalty(logits, labels):
    """−log p − λ H, arXiv:1701.06548"""
    log_p = logits.log_softmax(-1)
    return -label_log_p(logits, labels).sum() + 0.3 * (log_p.exp() * log_p).sum()


def reverse_kl(logits, labels):
    """KL(p ‖ t)"""
    log_p = logits.log_softmax(-1)
    return (log_p.exp() * (log_p - GIVEN["teacher_logits"].log_softmax(-1))).sum()


def skewed(logits, labels):
    """KL(t ‖ 0.1 t + 0.9 p), arXiv:2402.03898"""
    t, p = GIVEN["teacher_logits"].softmax(-1), logits.softmax(-1)
    return (t * (t.log() - (0.1 * t + 0.9 * p).log())).sum()


# loss → whether all its tokens have a target on the simplex, and the rule of the tokens that have parts
OTHERS = {
    focal: (False, "student"),
    poly1: (False, "student"),
    unlikelihood: (True, "student"),
    confidence_penalty: (False, "largest"),
    reverse_kl: (False, "largest"),
    skewed: (True, "largest"),
}


@pytest.mark.parametrize("loss", OTHERS, ids=lambda loss: loss.__name__)
def test_losses_that_no_preset_has(loss):
    inside, rule = OTHERS[loss]
    made = check(qt.induced_target(loss, Z, Y), loss)
    assert RULES.index(rule) in made.rule
    if inside:
        assert made.on_simplex.all()
    else:
        outside = ~made.on_simplex
        assert outside.any() and (made.off_by[outside] > 0).all()
    assert torch.allclose(made.q.sum(-1), torch.ones(N).double(), atol=1e-10)


def test_trust_of_the_others_by_hand():
    """a = −p f′(p) for a loss f(p_y)."""
    p = label_log_p(Z, Y).exp()
    assert torch.allclose(qt.induced_target(poly1, Z, Y).trust, 1 + 2 * p, atol=1e-8)
    assert torch.allclose(qt.induced_target(focal, Z, Y).trust, (1 - p) ** 2 - 2 * p * (1 - p) * p.log(), atol=1e-8)


def test_a_mean_is_a_sum_times_the_tokens():
    """Ignored positions count in neither and are missing in what comes back."""
    labels = Y.clone()
    labels[::3] = -100

    def mean(logits, labels):
        return F.cross_entropy(logits, labels)

    made = qt.induced_target(mean, Z, labels, reduction="mean")
    assert torch.allclose(made.trust[labels != -100], torch.ones(int((labels != -100).sum())).double())
    ignored = labels == -100
    assert torch.isnan(made.q[ignored]).all() and torch.isnan(made.off_by[ignored]).all()
    assert not made.on_simplex[ignored].any() and (made.rule[ignored] == -1).all()
    wrong = qt.induced_target(mean, Z, labels)
    assert not torch.allclose(wrong.trust[~ignored], made.trust[~ignored])


def test_batches_and_float32():
    made = qt.induced_target(
        lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum"),
        Z.float().view(4, 10, V),
        Y.view(4, 10),
    )
    assert made.q.shape == (4, 10, V) and made.trust.shape == (4, 10) and made.on_simplex.all()
    assert torch.allclose(made.trust, torch.ones(4, 10), atol=1e-3)


def changes_logits(logits, labels):
    with torch.no_grad():
        logits.mul_(2)
    return F.cross_entropy(logits, labels, reduction="sum")


def changes_labels(logits, labels):
    labels.zero_()
    return F.cross_entropy(logits, labels, reduction="sum")


@pytest.mark.parametrize(
    "loss, told",
    [
        (lambda z, y: F.cross_entropy(z, y, reduction="none"), r"returned a tensor of shape \[40\]; return a scalar"),
        (lambda z, y: 1.0, "the loss returned 'float'; return a scalar"),
        (lambda z, y: (z * float("nan")).sum(), "the loss is nan; every number of its input is finite"),
        (lambda z, y: F.cross_entropy(z.detach(), y), "has no gradient with respect to the logits"),
        (lambda z, y: (z.softmax(-1) * 0).sum().sqrt(), "the gradient of the loss holds NaN or infinity"),
        (changes_logits, "the loss changed the logits or labels it was given"),
        (changes_labels, "the loss changed the logits or labels it was given"),
        (lambda z, y: F.cross_entropy(z.mul_(2), y), "the loss changes its logits in place"),
    ],
)
def test_a_loss_that_makes_no_sense(loss, told):
    with pytest.raises(ConfigError, match=told):
        qt.induced_target(loss, Z, Y.clone())
    with pytest.raises(ConfigError, match="reduction is 'average'; use 'sum' or 'mean'"):
        qt.induced_target(loss, Z, Y, reduction="average")
    with pytest.raises(ConfigError, match=r"labels has shape \[3\], but logits requires \[40\]"):
        qt.induced_target(loss, Z, Y[:3])
