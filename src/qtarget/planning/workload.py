"""From a run's settings and the shapes of its models to what is computed and stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qtarget.planning import flops, memory
from qtarget.planning.shapes import Shape, bytes_of


@dataclass(frozen=True)
class Frozen:
    """A teacher or reference that is a model of its own. role: "teacher" or "reference"; bytes: of a number."""

    role: str
    name: str
    revision: str | None
    shape: Shape | None
    bytes: int


@dataclass(frozen=True)
class Rows:
    """Lengths of a run's rows as they are trained on.

    Attributes:
        positions: tokens a row takes in a micro-batch, padding included. length: its own. supervised: with a label.
        source: where that is from.
    """

    positions: float
    length: float
    supervised: float
    source: str


def shapes_of(others: list[Frozen], role: str) -> list[tuple[Shape, int]]:
    return [(other.shape, other.bytes) for other in others if other.role == role and other.shape is not None]


def computes_in_half(config: Any, given: Any) -> bool:
    """Whether matrix products are in bf16 or fp16; where neither is set, as the launchers of recipes/scale say: bf16.

    ``given``: names of the settings that were given. A machine to plan on may have no units that a GPU has.
    """
    if config.use_cpu:
        return False
    return bool(config.bf16 or config.fp16 or not {"bf16", "fp16"} & set(given))


def _optimiser(config: Any) -> str:
    return str(getattr(config.optim, "value", config.optim))


def _needed(config: Any) -> frozenset[str]:
    return config.models_for(config.resolve_objective().requires)


def trains_adapters(model: Any, student: Shape) -> bool:
    """New ones, or one that the run goes on from."""
    return bool(model.use_peft) or student.adapter is not None


def _starts_as_reference(config: Any) -> bool:
    return "reference" in _needed(config) and config.reference_model_name_or_path is None


def of_memory(config: Any, model: Any, given: Any, student: Shape, others: list[Frozen], gpus: int) -> memory.Workload:
    """What each GPU holds.

    Args:
        config: QTargetConfig, with a max_length. model: TRL's ModelConfig. given: names of the settings given.

    It is that of the machine planned for. To hold a measured step against it, replace what is otherwise there:
    ``memory.stages(dataclasses.replace(work, device="cpu", mixed=False, tokens=positions))``.
    """
    copies = int("old_policy" in _needed(config)) + int(config.teacher_ema_decay is not None)
    copies += int(_starts_as_reference(config) and not trains_adapters(model, student))
    width = bytes_of(model.dtype)
    flash = "flash" in str(model.attn_implementation or "") or config.packing or config.padding_free
    trained = student.adapter
    if model.use_peft:
        trained = memory.adapter_parameters(student, model.lora_r, model.lora_target_modules) or 0
    states, state_bytes = memory.optimiser_states(_optimiser(config)) or (2, None)
    return memory.Workload(
        student,
        gpus,
        config.per_device_train_batch_size * config.max_length,
        width,
        shapes_of(others, "teacher"),
        shapes_of(others, "reference"),
        copies,
        checkpointing=bool(config.gradient_checkpointing),
        trained=trained,
        states=states,
        state_bytes=state_bytes,
        mixed=computes_in_half(config, given),
        accumulates=config.gradient_accumulation_steps > 1,
        repeats_heads=not flash,
        device="cpu" if config.use_cpu else "cuda",
    )


def of_flops(config: Any, model: Any, student: Shape, others: list[Frozen], batch: int, rows: Rows) -> flops.Work:
    """What is computed in an optimiser step of ``batch`` rows over all GPUs."""
    needed = _needed(config)
    online = config.weights == "online" and "weight" in config.resolve_objective().requires
    # Online weights ask the student itself once more.
    copies = int("old_policy" in needed) + int(_starts_as_reference(config)) + int(online)
    return flops.Work(
        student,
        batch * rows.positions,
        rows.length,
        batch * rows.supervised,
        [shape for shape, _ in shapes_of(others, "teacher")],
        [shape for shape, _ in shapes_of(others, "reference")],
        config.teacher_ema_decay is not None,
        copies,
        bool(config.gradient_checkpointing),
        trains_adapters(model, student),
    )


def notes(config: Any, model: Any, student: Shape, others: list[Frozen]) -> list[str]:
    """What the formulas do not know about a run."""
    said = []
    if memory.optimiser_states(_optimiser(config)) is None:
        said.append(f"the states of optim {_optimiser(config)}: two per weight are counted, as for AdamW")
    if model.use_peft and memory.adapter_parameters(student, model.lora_r, model.lora_target_modules) is None:
        said.append(f"the size of adapters on {model.lora_target_modules}: none is counted")
    if student.adapter == 0:
        said.append("the size of the adapter: none is counted")
    if config.teacher_context is not None:
        said.append("the teacher's own prompt: it is counted at the student's positions")
    if config.targets is not None:
        said.append("which rows ask the teacher: it is counted on all of them")
    if getattr(model, "load_in_4bit", False) or getattr(model, "load_in_8bit", False) or student.quantised:
        said.append("quantised weights: they are counted in full")
    for other in others:
        if other.shape is not None and other.shape.quantised is not None:
            unknown = other.shape.bits is None
            how = "they are counted in full, because its bits are not known" if unknown else "not counted"
            what = "weights" if other.shape.bits is None else "scales"
            said.append(f"the {what} of {other.role} {other.name}, quantised by {other.shape.quantised}: {how}")
    by_formula = student.layers * student.layer_parameters + student.root_parameters
    if abs(student.parameters / by_formula - 1) > 0.05:
        said.append(
            f"this architecture: its {student.parameters:,} parameters are not those of a dense decoder of its widths "
            f"({by_formula:,}); activations and operations are counted for the latter"
        )
    if config.use_liger_kernel:
        said.append("what Liger's kernels save of activations")
    return said
