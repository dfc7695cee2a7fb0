"""Edge values of the loss: handled to finite gradients that are right, or refused by name."""

from __future__ import annotations

from typing import Any

import torch
from bench import Bench, Case

import qtarget as qt
from qtarget.losses.engine import sizes

NEEDS = {"weight": "weight", "critical": "critical", "old_policy": "old_logps"}


def objective(name: str, vocab: int) -> qt.Target:
    return qt.preset(name, top_k=min(20, vocab)) if name == "eaft" else qt.preset(name)


def given(target: qt.Target, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the target needs, of the right shapes."""
    made: dict[str, torch.Tensor] = {}
    other = logits.flip(-1) * 0.5
    for need in target.requires:
        if need in ("teacher", "reference"):
            made[f"{need}_logits"] = other
        elif need == "old_policy":
            made["old_logps"] = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0].clamp(min=-50)
        else:
            made[NEEDS[need]] = torch.ones(labels.shape)
    return made


def gradient(name: str, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    target = objective(name, logits.shape[-1])
    leaf = logits.clone().requires_grad_()
    out = qt.target_loss(leaf, labels, target, **given(target, logits, labels))
    out.loss.backward()
    return out.loss.detach(), leaf.grad


def _for_engine(more: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(heads that give these logits, what is no logits)."""
    heads = {
        name.removesuffix("_logits"): qt.Head(value, torch.eye(value.shape[-1]))
        for name, value in more.items()
        if name.endswith("_logits")
    }
    return heads, {name: value for name, value in more.items() if not name.endswith("_logits")}


def finite(logits: list[list[float]], labels: list[int], dtype: torch.dtype = torch.float32) -> Any:
    """Every objective: a finite loss, a finite gradient of float64's value, and the engine's equal to the oracle's."""

    def do(bench: Bench) -> None:
        for name in qt.presets.names():
            z, y = torch.tensor(logits, dtype=dtype), torch.tensor(labels)
            loss, g = gradient(name, z, y)
            assert torch.isfinite(loss).all() and torch.isfinite(g).all(), (name, loss, g)
            _, exact = gradient(name, z.double(), y)
            assert torch.allclose(g.double(), exact, atol=1e-5 if dtype == torch.float32 else 2e-2), (name, g, exact)
            target = objective(name, z.shape[-1])
            more = given(target, z.float(), y)
            heads, rest = _for_engine(more)
            hidden = z.float().clone().requires_grad_()
            qt.linear_target_loss(hidden, torch.eye(z.shape[-1]), y, target, **heads, **rest).loss.backward()
            assert torch.allclose(hidden.grad.double(), exact, atol=2e-2 if dtype != torch.float32 else 1e-5), (
                name,
                hidden.grad,
                exact,
            )

    return do


def oracle(name: str = "sft", **how: Any) -> Any:
    """The oracle on two tokens of three, with these inputs in place of good ones."""

    def do(bench: Bench) -> None:
        asked = {"logits": torch.zeros(2, 3), "labels": torch.tensor([0, 1]), **how}
        qt.target_loss(asked.pop("logits"), asked.pop("labels"), qt.preset(name), **asked)

    return do


def engine(name: str = "kd", **how: Any) -> Any:
    def do(bench: Bench) -> None:
        asked = {"hidden": torch.zeros(2, 3), "head": torch.eye(3), "labels": torch.tensor([0, 1]), **how}
        hidden = asked.pop("hidden").requires_grad_()
        out = qt.linear_target_loss(hidden, asked.pop("head"), asked.pop("labels"), qt.preset(name), **asked)
        out.loss.backward()
        teacher = asked.get("teacher")
        if name == "kd" and isinstance(teacher, qt.TopK):  # p − R, where nothing is left over
            R = torch.zeros_like(hidden).scatter_(-1, teacher.ids, teacher.logprobs.exp())
            assert torch.allclose(hidden.grad, (hidden.detach().softmax(-1) - R) / len(hidden), atol=1e-5), hidden.grad
        assert torch.isfinite(out.loss) and torch.isfinite(hidden.grad).all()

    return do


def top_k(ids: list[list[int]], logprobs: list[list[float]], **more: Any) -> Any:
    """Made when the case runs: it may be refused itself."""

    def do(bench: Bench) -> None:
        engine(teacher=qt.TopK(torch.tensor(ids), torch.tensor(logprobs), **more))(bench)

    return do


def minus_infinity(bench: Bench) -> None:
    """A teacher that gives tokens a probability of 0: the gradient is that of float64 with −1e4 in its place."""
    z = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([[0.0, -float("inf"), 1, -float("inf"), 0], [0.0, 1, 2, 3, -float("inf")]], dtype=torch.float64)
    for name in ("kd", "kd-hybrid", "target-sft"):
        made = []
        for teacher in (t, t.clamp(min=-1e4)):
            leaf = z.clone().requires_grad_()
            qt.target_loss(leaf, torch.tensor([1, 4]), qt.preset(name), teacher_logits=teacher).loss.backward()
            made.append(leaf.grad)
        assert torch.isfinite(made[0]).all() and torch.allclose(*made, atol=1e-12), (name, made)


def nothing_supervised(bench: Bench) -> None:
    """No token: a loss of 0 and a gradient of zeros, through both."""
    for name in qt.presets.names():
        z, y = torch.randn(3, 4), torch.full((3,), -100)
        loss, g = gradient(name, z, y)
        assert loss == 0 and not g.any(), name
        hidden = z.clone().requires_grad_()
        heads, rest = _for_engine(given(objective(name, 4), z, y))
        out = qt.linear_target_loss(hidden, torch.eye(4), y, objective(name, 4), **heads, **rest)
        out.loss.backward()
        assert out.loss == 0 and not hidden.grad.any(), name


def chunks(tokens: int, vocab: int) -> Any:
    """Simulated sizes: no chunk has 2^31 elements, and rows are never 0."""

    def do(bench: Bench) -> None:
        for device in (torch.device("cpu"), torch.device("cuda")):
            for itemsize in (2, 4, 8):
                rows = sizes.chunk_rows(tokens, vocab, 2, itemsize, device)
                assert 1 <= rows <= max(1, tokens) and (rows * vocab < 2**31 or rows == 1), (device, itemsize, rows)
                block = sizes.block_rows(rows, vocab, itemsize, device)
                assert 1 <= block <= rows

    return do


INF, NAN = float("inf"), float("nan")
CASES = [
    Case(
        "a-sure-label",
        "p_y = 1 to the last digit: finite, for every objective",
        finite([[200.0, 0, -3], [90.0, 1, 2]], [0, 0]),
    ),
    Case(
        "an-impossible-label",
        "p_y = 0 to the last digit: finite, for every objective",
        finite([[0.0, 80, 3], [0, 95, 2]], [0, 0]),
    ),
    Case("both", "p_y = 1 beside p_y = 0: finite, for every objective", finite([[60.0, 0, 0], [0.0, 60, 0]], [0, 0])),
    Case("two-tokens", "a vocabulary of 2: finite, for every objective", finite([[0.3, -0.2], [2.0, 1.0]], [0, 1])),
    Case("all-the-same", "uniform logits: finite, for every objective", finite([[0.0] * 4, [7.0] * 4], [3, 0])),
    Case("one-token", "one supervised token: finite, for every objective", finite([[0.5, 1.0, -1.0]], [2])),
    Case(
        "one-of-two",
        "one supervised, one ignored: finite, for every objective",
        finite([[0.5, 1.0, -1.0], [1.0, 2.0, 3.0]], [2, -100]),
    ),
    Case(
        "bfloat16",
        "half precision: near float64's, for every objective",
        finite([[2.0, 0.5, -1], [0.25, 1, 3]], [0, 1], torch.bfloat16),
    ),
    Case("no-token", "nothing supervised: a loss of 0, a gradient of zeros", nothing_supervised),
    Case("a-teacher-of-zeros", "-inf teacher log-probabilities: the limit's gradient", minus_infinity),
    Case("many-tokens", "2^31 tokens of a vocabulary of 2^18, by sizes alone", chunks(2**31, 2**18)),
    Case("a-large-vocabulary", "2^24 tokens of a vocabulary of 2^22, by sizes alone", chunks(2**24, 2**22)),
    Case("a-vast-vocabulary", "a vocabulary of 2^31, by sizes alone: a row at a time", chunks(2**10, 2**31)),
    Case("no-rows-to-chunk", "0 tokens, by sizes alone", chunks(0, 2**18)),
    Case(
        "nan-logits",
        "NaN",
        oracle(logits=torch.tensor([[NAN, 0, 0], [0, 0, 0]])),
        ("logits are NaN or infinite at row 0",),
    ),
    Case(
        "infinite-logits",
        "infinity",
        oracle(logits=torch.tensor([[0.0, 0, 0], [INF, 0, 0]])),
        ("logits are NaN or infinite at row 1",),
    ),
    Case(
        "a-label-of-minus-infinity",
        "a label whose logit is -inf",
        oracle(logits=torch.tensor([[-INF, 0, 0], [0, 0, 0]])),
        ("logits are NaN or infinite at row 0",),
    ),
    Case(
        "nan-hidden",
        "NaN in hidden states",
        engine("sft", hidden=torch.full((2, 3), NAN)),
        ("logits are NaN or infinite at row 0",),
    ),
    Case(
        "a-teacher-of-nan",
        "NaN in the teacher",
        oracle("kd", teacher_logits=torch.full((2, 3), NAN)),
        ("teacher_logits are NaN or infinite at row 0",),
    ),
    Case(
        "a-teacher-of-minus-infinity-alone",
        "a teacher that gives nothing to any token",
        oracle("kd", teacher_logits=torch.full((2, 3), -INF)),
        ("teacher_logits are NaN or infinite at row 0",),
    ),
    Case(
        "a-label-outside",
        "label 3 of 3",
        oracle(labels=torch.tensor([0, 3])),
        ("labels holds 3, outside the vocabulary of 3",),
    ),
    Case(
        "labels-of-fractions",
        "fractions for labels",
        oracle(labels=torch.tensor([0.0, 1.0])),
        ("labels has dtype torch.float32; use torch.int64",),
    ),
    Case(
        "labels-of-another-shape",
        "three labels for two tokens",
        oracle(labels=torch.tensor([0, 1, 2])),
        ("labels has shape [3]",),
    ),
    Case(
        "a-smaller-teacher",
        "a teacher of two tokens: it gives the third nothing",
        oracle("kd", teacher_logits=torch.zeros(2, 2)),
    ),
    Case(
        "an-infinite-column",
        "an infinite weight",
        oracle("iw-sft", weight=torch.tensor([1.0, INF])),
        ("weight holds NaN or infinity",),
    ),
    Case(
        "a-negative-column",
        "a negative weight",
        oracle("iw-sft", weight=torch.tensor([1.0, -2.0])),
        ("weight holds -2; weights must be 0 or more",),
    ),
    Case(
        "a-mask-of-halves",
        "0.5 in a mask",
        oracle("cft", critical=torch.tensor([1.0, 0.5])),
        ("critical holds 0.5; it is a mask",),
    ),
    Case(
        "a-vocabulary-of-nothing", "vocab_size 0", oracle(vocab_size=0), ("vocab_size is 0; use a whole number from 1",)
    ),
    Case(
        "an-unknown-reduction",
        "no such reduction",
        oracle(reduction="avg"),
        ("reduction is 'avg'; use one of mean, sum, none",),
    ),
    Case(
        "no-rows-a-chunk",
        "chunks of 0 rows",
        engine("sft", chunk_rows=0),
        ("chunk_rows is 0; use a whole number from 1",),
    ),
    Case(
        "a-cap-of-zero",
        "a softcap of 0",
        engine("sft", logit_softcap=0.0),
        ("logit_softcap is 0.0; use a number above 0",),
    ),
    Case(
        "an-infinite-cap",
        "a softcap of infinity",
        engine("sft", logit_softcap=INF),
        ("logit_softcap is inf; use a finite number",),
    ),
    Case(
        "top-k-of-everything",
        "k is the vocabulary, nothing is left over: finite",
        top_k([[0, 1, 2]] * 2, [[-1.0986123, -1.0986123, -1.0986123]] * 2),
    ),
    Case("top-k-of-one", "k = 1 with probability 1: finite", top_k([[0]] * 2, [[0.0]] * 2)),
    Case(
        "top-k-twice",
        "an id twice",
        top_k([[0, 0]] * 2, [[-1.0, -2.0]] * 2),
        ("teacher: TopK ids hold 0 twice for one token",),
    ),
    Case(
        "top-k-outside",
        "an id of another vocabulary",
        top_k([[0, 7]] * 2, [[-1.0, -2.0]] * 2),
        ("teacher: TopK ids run from 0 to 7; use ids from 0 to 2",),
    ),
    Case(
        "top-k-above-one",
        "probabilities that sum to 2",
        top_k([[0, 1]] * 2, [[0.0, 0.0]] * 2),
        ("TopK logprobs sum to a probability of 2",),
    ),
    Case(
        "top-k-of-nan", "NaN", top_k([[0, 1]] * 2, [[NAN, -1.0]] * 2), ("teacher logits are NaN or infinite at row 0",)
    ),
    Case(
        "top-k-of-nothing",
        "k = 0",
        lambda b: engine(teacher=qt.TopK(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0)))(b),
        ("TopK: ids has shape [2, 0]; the last axis holds one token or more",),
    ),
    Case("top-k-of-minus-infinity", "a kept token of probability 0: finite", top_k([[0, 1]] * 2, [[0.0, -INF]] * 2)),
    Case(
        "top-k-of-two-shapes",
        "more ids than log-probabilities",
        top_k([[0, 1]] * 2, [[0.0]] * 2),
        ("TopK: ids has shape [2, 2], logprobs [2, 1]; they must agree",),
    ),
]
