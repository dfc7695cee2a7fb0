"""Is the gradient p − Q: by token, by published formula, through the whole model?"""

from __future__ import annotations

import torch

from qtarget.data.columns import columns_of
from qtarget.targets.presets import printed_loss
from qtarget.verification.check import FAIL, Check, Finding, not_applicable, within, worst
from qtarget.verification.expected import Oracle, at
from qtarget.verification.subject import Subject, distance, relative


def tokens(subject: Subject) -> Finding:
    """What backward left on the trainer's hidden states, against (p − Q)·head / N in float64."""
    sample, oracle, step = subject.sample, Oracle(subject), subject.step
    others, columns = oracle.sampled
    logits = oracle.sampled_logits
    wanted = torch.zeros(len(sample.labels), step.hidden.shape[-1], dtype=torch.float64, device=logits.device)
    for chosen, target in oracle.of_target():
        on = chosen.to(logits.device)
        labels = sample.labels[chosen].to(logits.device)
        g = oracle.p_minus_q(logits[on], labels, target, at(others, chosen), at(columns, chosen))
        wanted[on] = oracle.to_hidden(logits[on], g / oracle.denominator)
    offset = torch.tensor(subject.offsets(step.batch))
    got = step.hidden_gradient[sample.row, sample.place + offset[sample.row] - 1].double()
    error = relative(got, wanted)
    labels = step.batch["labels"].to(step.hidden_gradient.device)
    untrained = torch.ones_like(labels, dtype=torch.bool)
    untrained[:, :-1] = labels[:, 1:] == -100
    stray = float(step.hidden_gradient[untrained].abs().max()) if bool(untrained.any()) else 0.0
    told = f"{len(sample.labels)} tokens, relative error {error:.1e}"
    figures = {"tokens": len(sample.labels), "gradient_where_nothing_is_trained": stray}
    if stray:
        told += f"; a gradient of {stray:.1e} where nothing is trained"
        return Finding(FAIL, told, {"error": error, "allowed": subject.rounding, **figures})
    if not error <= subject.rounding:
        worst = int((got - wanted).norm(dim=-1).argmax())
        told += f"; worst at {subject.text_of([int(sample.labels[worst])])}, row {int(sample.row[worst])}"
    return within(error, subject.rounding, told, **figures)


def published(subject: Subject) -> Finding:
    """The engine's gradient against autograd of each objective's printed loss."""
    sample, oracle = subject.sample, Oracle(subject)
    others, columns = oracle.sampled
    errors, without = {}, []
    for chosen, target in oracle.of_target():
        loss = printed_loss(target)
        if loss is None:
            without.append(f"{target} has no printed loss")
            continue
        on = chosen.to(subject.device)
        labels = sample.labels[chosen].to(subject.device)
        logits = oracle.sampled_logits[on].clone().requires_grad_()
        models = {f"{name}_logits": z for name, z in at(others, chosen).items()}
        given = {**models, **at(columns, chosen), "vocab_size": subject.vocab}
        with torch.enable_grad():
            (g,) = torch.autograd.grad(loss(logits, labels, given).sum(), logits)
        wanted = oracle.to_hidden(logits.detach(), g)
        read = {name: column for name, column in at(columns, chosen).items() if name in columns_of(target)}
        got, _ = subject.engine(sample.hidden[on], labels, target, subject.heads_at(chosen), read)
        errors[str(target)] = relative(got, wanted)
    if not errors:
        return not_applicable("; ".join(without))
    error = errors[worst(errors)]
    told = "; ".join([f"{', '.join(errors)}: relative error {error:.1e}", *without])
    return within(error, subject.rounding, told, **errors)


def step(subject: Subject) -> Finding:
    """The weights' gradient of a step, against autograd through the model's own logits."""
    error, most_of_it = distance(subject.step.gradient, Oracle(subject).gradient(subject.rows))
    weights = sum(value.numel() for value in subject.step.gradient.values())
    told = f"{weights:,} weights, relative error {error:.1e}"
    if not error <= subject.rounding:
        told += f", most of it in {most_of_it}"
    return within(error, subject.rounding, told, worst=most_of_it)


CHECKS = [
    Check(
        "gradient is p - Q",
        "what backward leaves on the last hidden states is (p - Q) times the head over N, and nothing where no token is "
        "trained",
        "the loss does not teach the target that is named: look at labels and their shift, the denominator, and what "
        "teacher and reference are given",
        tokens,
    ),
    Check(
        "published formula",
        "the gradient is autograd's of the loss as its paper prints it",
        "the target's trust, residual or temperature is not the paper's: see qtarget targets show NAME",
        published,
    ),
    Check(
        "step is autograd's",
        "a step moves the weights as autograd does through the model's own logits, document by document, in float64",
        "if the gradient is p - Q token by token, something between the model's input and its last hidden states "
        "differs: padding, attention masks, position ids, adapters",
        step,
    ),
]
