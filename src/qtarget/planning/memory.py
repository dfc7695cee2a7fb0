"""Memory a run needs on each GPU, calculated (docs/plan.md; benchmarks/plan.py measures it).

One place for every estimate: `qtarget plan`, `qtarget train --dry_run` and whoever holds a measured step against it ask
``estimate`` for the parts, ``peak`` for the most at one time and ``stages`` for what a process can measure of itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from qtarget.losses.engine.sizes import Sizes, block_rows, chunk_rows, device_sizes
from qtarget.planning.shapes import Shape

PARTS = ("weights", "gradients", "optimiser", "gathered", "teacher", "reference", "engine", "activations")
KINDS = {"ddp": "DDP", "zero2": "ZeRO-2", "fsdp2": "FSDP2"}
# DeepSpeed's reduce_bucket_size, of which overlap_comm holds two.
_BUCKET = 500_000_000
_HALF = 2
# Numbers that an optimiser keeps for a parameter.
_STATES = {"adamw": 2, "lion": 1, "adagrad": 1, "rmsprop": 1, "sgd": 0, "adafactor": 0}
_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_apex_fused")
_SINGLE = 4


@dataclass(frozen=True)
class Workload:
    """What is trained, on how many GPUs.

    Attributes:
        student: its shape. gpus: processes. tokens: positions of a micro-batch at most. bytes: of a number of the
            student's weights.
        teachers, references: (shape, bytes of a number) of each frozen model. copies: further copies of the student's
            weights that a target keeps.
        supervised: of the positions; None: all.
        checkpointing: whether a layer's activations are computed again in the backward pass.
        trained: parameters of adapters, in float32, where only they are trained; None: all weights are.
        states: numbers the optimiser keeps for a trained parameter (AdamW two); state_bytes: of each, None: as many as
            of the parameter.
        mixed: whether float32 weights compute in half precision (bf16 or fp16 in the settings).
        accumulates: whether a step has several micro-batches, so that gradients are there from its first on.
        repeats_heads: whether attention lays out key and value once for each query head: sdpa does, for padded rows.
        device: "cuda" or "cpu", and gpu_memory: bytes of a GPU, on which the engine's chunks depend.
    """

    student: Shape
    gpus: int
    tokens: int
    bytes: int = _SINGLE
    teachers: list[tuple[Shape, int]] = field(default_factory=list)
    references: list[tuple[Shape, int]] = field(default_factory=list)
    copies: int = 0
    supervised: int | None = None
    checkpointing: bool = True
    trained: int | None = None
    states: int = 2
    state_bytes: int | None = None
    mixed: bool = True
    accumulates: bool = True
    repeats_heads: bool = True
    device: str = "cuda"
    gpu_memory: int = 80 << 30

    @property
    def others(self) -> list[tuple[Shape, int]]:
        return [*self.teachers, *self.references]


def estimate(work: Workload, kind: str) -> dict[str, int]:
    """Bytes of each part on a GPU: {part: bytes}, each at its own largest; ``peak`` says what there is at one time.

    Args:
        kind: "ddp", "zero2" or "fsdp2", as the files of recipes/scale are called; "ddp" on one GPU is no sharding.
    """
    student, gpus = work.student, work.gpus
    size, own = student.parameters, _own(work, kind)
    all_trained = work.trained is None
    trained = size if work.trained is None else work.trained
    width = own if all_trained else _SINGLE  # of a trained number
    state = work.states * (work.state_bytes or (_SINGLE if kind == "zero2" else width))
    parts = dict.fromkeys(PARTS, 0)
    if kind == "ddp":
        # autocast keeps half-precision copies of float32 weights; the reducer's buckets are a second gradient
        parts["weights"] = (own + (_HALF if work.mixed and own > _HALF else 0)) * size
        parts["gradients"] = width * trained * (1 if gpus == 1 else 2)
        parts["optimiser"] = state * trained
    elif kind == "zero2":
        # weights in bf16 whole; the float32 weights, gradients and the optimiser's states in pieces
        parts["weights"] = _HALF * size + _SINGLE * trained // gpus
        parts["gradients"] = _SINGLE * trained // gpus + 2 * _HALF * min(_BUCKET, trained)
        parts["optimiser"] = state * trained // gpus
    else:
        parts["weights"], parts["gradients"] = own * size // gpus, width * trained // gpus
        parts["optimiser"] = state * trained // gpus
        # embedding and head with their gradient, two layers with the gradient of one
        parts["gathered"] = _computes(work) * (2 * student.root_parameters + 3 * student.layer_parameters)
    if not all_trained:
        parts["weights"] += _SINGLE * trained // (gpus if kind == "fsdp2" else 1)
    parts["weights"] += work.copies * own * (size if all_trained else trained) // (gpus if kind == "fsdp2" else 1)
    for name, models in (("teacher", work.teachers), ("reference", work.references)):
        for shape, each in models:
            parts[name] += shape.weight_bytes(each) // (gpus if kind == "fsdp2" else 1)
            if kind == "fsdp2":
                parts["gathered"] += each * shape.root_parameters + 2 * shape.layer_bytes(each)
    parts["engine"] = _buffers(work, kind) + _formed(work, kind)
    parts["activations"] = _activations(work, kind)
    return parts


def peak(work: Workload, kind: str) -> int:
    """Bytes on a GPU when most is there: as the backward pass begins, or as it ends."""
    return stages(work, kind)["peak"]


def stages(work: Workload, kind: str = "ddp") -> dict[str, int]:
    """What a process can measure of itself, in bytes above what it held before its models were loaded.

    Returns:
        {loaded: student, teacher and reference; between: after an optimiser step, gradients freed; peak: the most during
        a step after the first}.
    """
    parts = estimate(work, kind)
    width = _HALF if kind == "zero2" else _own(work, kind)
    loaded = width * work.student.parameters // (work.gpus if kind == "fsdp2" else 1)
    loaded += parts["teacher"] + parts["reference"]
    kept = kept_buffers(work)
    resident = parts["optimiser"] + parts["teacher"] + parts["reference"]
    between = parts["weights"] + resident + kept
    formed = parts["gradients"]
    there = formed if work.accumulates else _always(work, kind, formed)
    begins = there + parts["engine"] - kept + parts["activations"]
    # The first layers' turn: all gradients, one layer's activations; at the very last a tied embedding's own gradient.
    embedding = _SINGLE * work.student.vocab * work.student.width if work.student.tied and work.trained is None else 0
    ends = formed + max(_layer(work, kind) + _passing(work, kind), embedding)
    return {"loaded": loaded, "between": between, "peak": between + parts["gathered"] + max(begins, ends)}


def kept_buffers(work: Workload) -> int:
    """Bytes of the engine's buffers that a CPU keeps from call to call: a process's first step makes them."""
    return _buffers(work, "ddp") if work.device == "cpu" else 0


def _own(work: Workload, kind: str) -> int:
    """Bytes of a number of the weights: Accelerate's FSDP2 keeps trained ones in float32 under mixed precision."""
    return _SINGLE if kind == "fsdp2" and work.mixed and work.trained is None else work.bytes


def _always(work: Workload, kind: str, gradients: int) -> int:
    """What there is for gradients before the first of them is formed: buckets, and pieces that are kept."""
    if kind == "ddp":
        return gradients // 2 if work.gpus > 1 else 0
    return gradients if kind == "zero2" else 0


# -- the engine ----------------------------------------------------------------------------------------------------


def _buffers(work: Workload, kind: str) -> int:
    """Logits of a chunk for each model; beside them a gradient in 16 bits, or scratch for a block of rows."""
    device, vocab = torch.device(work.device), _vocab(work)
    models = 1 + bool(work.teachers) + bool(work.references)
    cut = _device_cut(work, kind)
    if cut is not None:
        return (models * _SINGLE * cut.logits + _HALF * cut.gradient) * vocab
    rows = chunk_rows(_tokens(work), vocab, models, _SINGLE, device)
    scratch = (2 if models == 1 else 4) * block_rows(rows, vocab, _SINGLE, device)
    return (models * rows + scratch) * vocab * _SINGLE


def _formed(work: Workload, kind: str) -> int:
    """The head's gradient, a 16-bit copy of a float32 head, the student's last hidden states twice with their gradient in
    float32, the others' twice."""
    cut, student = _device_cut(work, kind), work.student
    head = 0
    if work.trained is None:
        rounded = cut is not None and cut.whole and _in_half(work, kind)
        head = student.vocab * student.width * (_HALF if rounded else _SINGLE)
    hidden = (2 * _stream(work, kind) + _SINGLE) * student.width
    hidden += sum(2 * width * shape.width for shape, width in work.others)
    heads = [] if cut is None else [(student, _HALF if _in_half(work, kind) else work.bytes), *work.others]
    copies = sum(_HALF * shape.vocab * shape.width for shape, width in heads if width > _HALF)
    return head + copies + hidden * work.tokens


def _device_cut(work: Workload, kind: str) -> Sizes | None:
    """How the kernels cut the work, which write a 16-bit gradient beside float32 logits; None where that is not so."""
    if work.device == "cpu" or _computes(work) != _HALF:
        return None
    models = 1 + bool(work.teachers) + bool(work.references)
    spares = work.trained is None and _in_half(work, kind)
    spared = _SINGLE * work.student.vocab * work.student.width if spares else 0
    return device_sizes(_tokens(work), _vocab(work), models, _HALF, spared, work.gpu_memory, False)


def _in_half(work: Workload, kind: str) -> bool:
    """Whether the student's head reaches the loss in 16 bits: a sharding's own policy casts it."""
    return work.bytes == _HALF or (work.mixed and kind != "ddp")


def _tokens(work: Workload) -> int:
    return work.tokens if work.supervised is None else work.supervised


def _vocab(work: Workload) -> int:
    return max([work.student.vocab, *(shape.vocab for shape, _ in work.others)])


# -- activations ---------------------------------------------------------------------------------------------------


def _computes(work: Workload) -> int:
    """Bytes of a number in matrix products."""
    return _HALF if work.mixed or work.bytes == _HALF else _SINGLE


def _stream(work: Workload, kind: str) -> int:
    """Bytes of a number between layers: autocast leaves it as the weights are, a sharding's own policy casts them."""
    return work.bytes if kind == "ddp" else _computes(work)


def _layer(work: Workload, kind: str) -> int:
    """What a layer keeps for its backward pass, bytes: two norms, attention, a gated feed-forward block."""
    shape, number = work.student, _computes(work)
    kv_heads = shape.heads if work.repeats_heads else shape.kv_heads
    attention = 2 * (shape.heads + kv_heads) * shape.head_dim  # query, key, value, what comes out
    if number == _SINGLE:
        norms = 2 * 3 * _SINGLE  # input, normalised, output
    elif _stream(work, kind) == _HALF:
        norms = 2 * (_SINGLE + 2 * _HALF)  # the input in float32, normalised, output
    else:
        norms = 2 * 2 * _SINGLE + 5 * _HALF  # input, normalised, and a cast output for each of five products
    return work.tokens * (norms * shape.width + number * (attention + 4 * shape.ffn))


def _passing(work: Workload, kind: str) -> int:
    """Gradients on their way through a feed-forward block: of its product and of both factors."""
    return 3 * work.tokens * _computes(work) * work.student.ffn


def _activations(work: Workload, kind: str) -> int:
    """With checkpointing each layer's input and one layer whole, without it every layer; and the last norm."""
    shape, layer = work.student, _layer(work, kind)
    last = 3 * work.tokens * _stream(work, kind) * shape.width
    if work.checkpointing:
        kept = work.tokens * _stream(work, kind) * shape.layers * shape.width + layer
    else:
        kept = shape.layers * layer
    return kept + last + _passing(work, kind)


# -- settings ------------------------------------------------------------------------------------------------------


def adapter_parameters(shape: Shape, rank: int, modules: list[str] | str | None) -> int | None:
    """Parameters of LoRA adapters of ``rank`` on the named matrices of every layer; None where a name is not known.

    Args:
        modules: names such as q_proj, "all-linear", or None for PEFT's own choice for these decoders, q_proj and v_proj.
    """
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sides = {
        "q_proj": shape.width + query,
        "k_proj": shape.width + key,
        "v_proj": shape.width + key,
        "o_proj": query + shape.width,
        "gate_proj": shape.width + shape.ffn,
        "up_proj": shape.width + shape.ffn,
        "down_proj": shape.ffn + shape.width,
    }
    names = ["q_proj", "v_proj"] if modules is None else [modules] if isinstance(modules, str) else modules
    if names == ["all-linear"]:
        names = [*sides]
    if not set(names) <= set(sides):
        return None
    return shape.layers * rank * sum(sides[name] for name in names)


def optimiser_states(name: str) -> tuple[int, int | None] | None:
    """What an optimiser of Transformers keeps for a parameter: (numbers, bytes of each, None: as many as of the
    parameter); None where it is not known."""
    width = 1 if name.endswith("8bit") else None
    base = name.removeprefix("paged_").removesuffix("_8bit").removesuffix("_32bit").removesuffix("_bnb")
    states = _STATES.get("adamw" if base in _ADAMW else base)
    return None if states is None else (states, width)
