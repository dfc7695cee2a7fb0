"""psft's old policy by plain autograd, beside which the trainer's is tested."""

import torch

from published import label_log_p, psft
from runs import count, labels_of, logits_of, moved, trainable, weights

LR = 0.3


def by_hand(model, data, steps, interval):
    """psft with the old policy taken before steps 0, interval, 2·interval, ..., by autograd on full logits."""
    model = model.eval()
    before = weights(model)
    for step in range(steps):
        if step % interval == 0:
            with torch.no_grad():
                old = [label_log_p(logits_of(model, row), labels_of(row)) for row in data]
        losses = [
            psft(logits_of(model, row), labels_of(row), clip=0.2, clip_high=0.2, old_logps=then)
            for row, then in zip(data, old, strict=True)
        ]
        model.zero_grad()
        (torch.cat(losses).sum() / count(data)).backward()
        with torch.no_grad():
            for parameter in trainable(model).values():
                parameter -= LR * parameter.grad
    return moved(before, model)
