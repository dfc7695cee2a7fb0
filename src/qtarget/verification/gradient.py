"""Is the gradient p − Q: by token, by published formula, through the whole model?"""

from __future__ import annotations

import torch

from qtarget.targets.presets import printed_loss
from qtarget.verification.check import FAIL, Finding, check, not_applicable, within, worst
from qtarget.verification.expected import Expected, logits_of, through_head
from qtarget.verification.subject import Subject, distance, relative


@check(
    "gradient is p - Q",
    "the loss does not teach the target that is named: check labels and their shift, the denominator, and what "
    "teacher and reference are given",
    of_gradient=True,
)
def tokens(subject: Subject) -> Finding:
    """What backward leaves on the last hidden states is (p - Q), and what z_loss adds, times the head over N, and nothing
    where no token is trained.
    """
    expected, step, samples = Expected(subject), subject.step, subject.samples
    got = torch.cat([sample.gradient.double() for sample in samples])
    z_loss = subject.trainer.args.z_loss
    wanted = torch.cat([expected.hidden_gradient(sample, expected.given(sample), z_loss=z_loss) for sample in samples])
    wanted = wanted / expected.denominator(subject.rows)
    error = relative(got, wanted)
    trained = torch.zeros(step.hidden_gradient.shape[:2], dtype=torch.bool)
    trained[:, :-1] = step.batch["labels"][:, 1:] != -100
    stray = float(step.hidden_gradient.masked_fill(trained[..., None].to(subject.device), 0).abs().max())
    told = f"{len(got)} tokens, relative error {error:.1e}"
    figures = {"tokens": len(got), "gradient_where_nothing_is_trained": stray}
    if stray:
        told += f"; a gradient of {stray:.1e} where nothing is trained"
        return Finding(FAIL, told, {"error": error, "allowed": subject.rounding, **figures})
    if not error <= subject.rounding:
        where = [token for s in samples for token in zip(s.labels.tolist(), s.row.tolist(), strict=True)]
        label, row = where[int((got - wanted).norm(dim=-1).argmax())]
        told += f"; worst at {subject.text_of([label])}, row {row}"
    return within(error, subject.rounding, told, **figures)


@check(
    "published formula",
    "the target's trust, residual or temperature is not the paper's: see qtarget targets show NAME",
    of_gradient=True,
)
def published(subject: Subject) -> Finding:
    """The gradient equals autograd's gradient of the loss as its paper prints it."""
    expected, errors, without = Expected(subject), {}, []
    for sample in subject.samples:
        loss = printed_loss(sample.target)
        if loss is None:
            without.append(f"{sample.target} has no printed loss")
            continue
        given = expected.given(sample)
        logits = logits_of(sample.student).requires_grad_()
        with torch.enable_grad():
            losses = loss(logits, sample.labels, {**given, "vocab_size": subject.vocab})
        (g,) = torch.autograd.grad(losses.sum(), logits)
        got, _ = subject.engine(sample, given)
        errors[str(sample.target)] = relative(got, through_head(sample.student, logits.detach(), g))
    if not errors:
        return not_applicable("; ".join(without))
    error = errors[worst(errors)]
    told = "; ".join([f"{', '.join(errors)}: relative error {error:.1e}", *without])
    return within(error, subject.rounding, told, **errors)


@check(
    "step is autograd's",
    "if the gradient is p - Q token by token, something between the model's input and its last hidden states "
    "differs: padding, attention masks, position ids, adapters",
    of_gradient=True,
)
def step(subject: Subject) -> Finding:
    """A step moves the weights as autograd does through the model's own logits, document by document, in float64."""
    error, most_of_it = distance(subject.step.gradient, Expected(subject).gradient(subject.rows))
    weights = sum(value.numel() for value in subject.step.gradient.values())
    told = f"{weights:,} weights, relative error {error:.1e}"
    if not error <= subject.rounding:
        told += f", most of it in {most_of_it}"
    return within(error, subject.rounding, told, worst=most_of_it)


CHECKS = [tokens, published, step]
