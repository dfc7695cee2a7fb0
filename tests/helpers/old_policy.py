"""psft's old policy by plain autograd, beside which the trainer's is tested."""

import torch

from published import label_log_p, psft
from quick_runs import copied_weights, count_supervised, labels_of, logits_of, trainable_parameters, weight_change

LR = 0.3


def old_policy_by_autograd(model, data, steps, interval):
    """psft with the old policy taken before steps 0, interval, 2·interval, ..., by autograd on full logits."""
    model = model.eval()
    before = copied_weights(model)
    for step in range(steps):
        if step % interval == 0:
            with torch.no_grad():
                old = [label_log_p(logits_of(model, row), labels_of(row)) for row in data]
        losses = [
            psft(logits_of(model, row), labels_of(row), clip=0.2, clip_high=0.2, old_logps=then)
            for row, then in zip(data, old, strict=True)
        ]
        model.zero_grad()
        (torch.cat(losses).sum() / count_supervised(data)).backward()
        with torch.no_grad():
            for parameter in trainable_parameters(model).values():
                parameter -= LR * parameter.grad
    return weight_change(before, model)
