"""Two processes train every objective in every layout; the first writes how far each is from autograd. Run by torchrun.

    torchrun --nproc_per_node 2 tests/helpers/two_process_training.py LAYOUT_OF_PROCESSES OUT.json

ddp: the trainer's own ``train``. fsdp2: torch's ``fully_shard`` on student and teacher and the trainer's own
``compute_loss``, since Accelerate turns FSDP into DDP where there is no accelerator.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import batch_layouts
import tiny_models
from old_policy import LR, old_policy_by_autograd
from qtarget.models import forward
from qtarget.teachers.cache import build as cache_build
from qtarget.training import history
from qtarget.training import trainer as trainer_module
from qtarget.training.preparing import RowsTrainer
from quick_runs import Weights, copied_weights, largest_difference, quick_trainer, weight_change

FOLDER = Path(tempfile.mkdtemp())
# As Accelerate makes it for bf16, with what leaves a module rounded too.
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.bfloat16)


def untied() -> nn.Module:
    return batch_layouts.layout_student(tied=False)


def in_float32() -> nn.Module:
    return tiny_models.trained_model(tied=False)


# -- DDP -------------------------------------------------------------------------------------------


def ddp() -> Iterator[tuple[str, Weights, Weights]]:
    yield "map of both", *map_of_both()
    yield from from_a_cache()
    for layout in batch_layouts.LAYOUTS:
        for name in batch_layouts.OBJECTIVES:
            wanted = batch_layouts.layout_change_by_autograd(name, layout)
            for accumulation in (1, 2, 4):
                got = batch_layouts.layout_change_by_trainer(name, layout, accumulation, FOLDER, processes=2)
                yield f"{name}, {layout}, accumulation {accumulation}", got, wanted


def from_a_cache() -> Iterator[tuple[str, Weights, Weights]]:
    """The teacher read by uid in both processes, from a cache of the whole vocabulary in float32."""
    folder = Path(os.environ["QTARGET_TEST_CACHE"])
    saved = folder / "teacher"
    if not int(os.environ["RANK"]):
        batch_layouts.layout_teacher().save_pretrained(saved)
        tiny_models.tokenizer().save_pretrained(saved)
    dist.barrier()
    named = {"teacher_model_name_or_path": str(saved), "teacher_model_init_kwargs": {"dtype": "float64"}}
    for layout in ("padded", "bfd", "wrapped", "padding_free"):
        length = batch_layouts.LAYOUTS[layout].get("max_length", 1024) if layout in ("padded", "bfd") else None
        rows = batch_layouts.layout_dataset().remove_columns(["old_logps"])
        made = quick_trainer(
            batch_layouts.layout_student(), FOLDER, rows, kind=RowsTrainer, target="kd", max_length=length, **named
        )
        plan = cache_build.plan(made, 100)
        if not int(os.environ["RANK"]):
            settings = {"dtype": "float32", "about": cache_build.about(made)}
            cache_build.build(made, folder / layout, plan, made.vocab_size, **settings)
        dist.barrier()
        wanted = batch_layouts.layout_change_by_autograd("target-sft", layout) if layout != "wrapped" else None
        for accumulation in (1, 2):
            made = quick_trainer(
                batch_layouts.layout_student(),
                FOLDER,
                rows,
                target={"preset": "target-sft", **batch_layouts.CASE["target-sft"].hyperparameters},
                teacher_cache=str(folder / layout),
                **batch_layouts.LAYOUTS[layout],
            )
            batch_layouts.in_one_step(made, accumulation, processes=2)
            before = copied_weights(made.model)
            made.train()
            got = weight_change(before, made.model)
            # Where rows go on in the next sequence the live teacher has not read their beginning: no oracle, one split
            # against the other.
            wanted = got if wanted is None else wanted
            yield f"cached, {layout}, accumulation {accumulation}", got, wanted


def map_of_both() -> tuple[Weights, Weights]:
    """``lens_every``: the main process writes the tokens of both, cell by cell their mean trust."""
    made = batch_layouts.trainer_for_layout("dft", "padded", FOLDER / "map", lens_every=1)
    batch_layouts.in_one_step(made, 1, processes=2)
    made.train()
    tokens = sum(label != -100 for row in batch_layouts.layout_dataset() for label in row["labels"][1:])
    wanted = torch.tensor([tokens, made.state.log_history[0]["trust"]]).double()
    if int(os.environ["RANK"]):
        return {"tokens": wanted}, {"tokens": wanted}
    lines = pq.read_table(FOLDER / "map" / history.FILE).to_pylist()
    count = sum(line["count"] for line in lines)
    trust = sum(line["count"] * line["trust"] for line in lines) / count
    return {"tokens": torch.tensor([count, trust]).double()}, {"tokens": wanted}


# -- FSDP2 -----------------------------------------------------------------------------------------


# Who else is in the head's group: the root, nobody, or the last norm, as Accelerate 1.15 groups them.
HEADS = ("root", "own", "with the norm")


def shard(model: nn.Module, head: str, policy: MixedPrecisionPolicy | None) -> None:
    more = {} if policy is None else {"mp_policy": policy}
    for layer in model.model.layers:
        fully_shard(layer, **more)
    if head == "own":
        fully_shard(model.lm_head, **more)
    if head == "with the norm":
        fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False, **more)
    fully_shard(model, **more)


def sharded(
    name: str, layout: str, accumulation: int, head: str, policy: MixedPrecisionPolicy | None = None, **settings
):
    """A trainer whose models are sharded, the micro-batches of a step, and their denominator."""
    made = batch_layouts.trainer_for_layout(name, layout, FOLDER, untied if policy is None else in_float32, **settings)
    batch_layouts.in_one_step(made, accumulation, processes=2)
    shard(made.model.train(), head, policy)
    for other in made.aux.models:
        shard(other.model if policy is None else other.model.float(), head, policy)
    made.current_gradient_accumulation_steps = accumulation
    batches = [made._prepare_inputs(batch) for batch in made.get_train_dataloader()]
    assert len(batches) == accumulation
    return made, batches, made.denominator(batches)


def by_fully_shard(
    name: str, layout: str, accumulation: int, head: str, policy: MixedPrecisionPolicy | None = None
) -> Weights:
    """One step of SGD at learning rate 1 moves a weight by minus its gradient."""
    made, batches, count = sharded(name, layout, accumulation, head, policy)
    for batch in batches:
        made.compute_loss(made.model, batch, num_items_in_batch=count).backward()
    return {n: -p.grad.full_tensor() for n, p in made.model.named_parameters() if isinstance(p, DTensor)}


def three_steps(name: str, head: str, **settings) -> Weights:
    """How far three steps of SGD move the weights: what was gathered for one step must not serve the next."""
    made, batches, count = sharded(name, "padded", 2, head, **settings)
    before = {n: p.detach().full_tensor() for n, p in made.model.named_parameters()}
    for _ in range(3):
        for batch in batches:
            made.compute_loss(made.model, dict(batch), num_items_in_batch=count).backward()
        with torch.no_grad():
            for parameter in made.model.parameters():
                parameter -= LR * parameter.grad
                parameter.grad = None
        made.state.global_step += 1
    return {n: p.detach().full_tensor() - before[n] for n, p in made.model.named_parameters()}


def fsdp2() -> Iterator[tuple[str, Weights, Weights]]:
    yield from mutants()
    for head in HEADS:
        for name in ("dft", "asft:kl_weight=0.8", "target-sft"):
            wanted = batch_layouts.layout_change_by_autograd(name, "padded", untied, steps=3, lr=LR)
            yield f"{name}, three steps, head {head}", three_steps(name, head), wanted
        wanted = old_policy_by_autograd(untied(), batch_layouts.layout_documents("padded"), steps=3, interval=2)
        yield f"psft refreshed every 2 steps, head {head}", three_steps("psft", head, psft_refresh=2), wanted
    for layout in batch_layouts.LAYOUTS:
        for name in batch_layouts.OBJECTIVES:
            wanted = batch_layouts.layout_change_by_autograd(name, layout, untied)
            for head in HEADS if layout == "padded" or name == "target-sft" else HEADS[:2]:
                for accumulation in (1, 2, 4):
                    got = by_fully_shard(name, layout, accumulation, head)
                    yield f"{name}, {layout}, accumulation {accumulation}, head {head}", got, wanted


def fsdp2_bf16() -> Iterator[tuple[str, Weights, Weights]]:
    """Under a bf16 policy, where logits have two or three digits and psft's clip falls otherwise: left out here."""
    for name in [name for name in batch_layouts.OBJECTIVES if name != "psft"]:
        wanted = batch_layouts.layout_change_by_autograd(name, "bfd", untied)
        for head in HEADS:
            yield f"{name}, bfd, bf16, head {head}", by_fully_shard(name, "bfd", 2, head, BF16), wanted
    yield "digits: old_logps under bf16", *columns_under_bf16()
    yield "digits: figures under bf16", *figures_under_bf16()
    with looked_into():
        yield "mutant: old_logps under bf16 in a dataclass", *columns_under_bf16()


def figures_under_bf16() -> tuple[Weights, Weights]:
    """sft's loss is the mean of the nll, and both leave the forward with all their digits."""
    made, batches, count = sharded("sft", "bfd", 1, "root", BF16)
    loss = made.compute_loss(made.model, batches[0], num_items_in_batch=count)
    loss = made.accelerator.reduce(loss.detach(), "mean")  # as the figures are: over the tokens of both processes
    return {"loss": loss[None]}, {"loss": torch.tensor([made.meter.read("train")["nll"]]).double()}


def columns_under_bf16() -> tuple[Weights, Weights]:
    """psft's column as the loss gets it, and as the dataset holds it."""
    got: list[torch.Tensor] = []
    real = forward.linear_target_loss

    def watched(*args, **kwargs):
        got.append(kwargs["old_logps"])
        return real(*args, **kwargs)

    forward.linear_target_loss = watched
    try:
        by_fully_shard("psft", "bfd", 1, "root", BF16)
    finally:
        forward.linear_target_loss = real
    wanted = {number for row in batch_layouts.layout_dataset()["old_logps"] for number in row}
    wanted = torch.tensor(sorted(wanted), dtype=torch.float32)
    arrived = got[0].flatten().float().unique()
    nearest = wanted[(arrived[:, None] - wanted).abs().argmin(1)]
    return {"old_logps": arrived}, {"old_logps": nearest.double()}


@contextlib.contextmanager
def looked_into() -> Iterator[None]:
    """What the wrapped forward is called with, in a form that mixed precision looks into."""

    @dataclasses.dataclass
    class Open:
        columns: dict
        call: object
        aux_loss: bool = False

        def __call__(self, *args):
            self.call.columns = self.columns
            return self.call(*args)

    real = trainer_module.LossCall
    trainer_module.LossCall = lambda *args: Open(args[2], real(*args))
    try:
        yield
    finally:
        trainer_module.LossCall = real


def mutants() -> Iterator[tuple[str, Weights, Weights]]:
    """A head in its own group, gathered without a word on its gradient: each process keeps only its own."""
    real = forward.whole
    forward.whole = lambda parameter, like: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    try:
        got = by_fully_shard("dft", "padded", 2, "own")
        yield "mutant: bare full_tensor", got, batch_layouts.layout_change_by_autograd("dft", "padded", untied)
    finally:
        forward.whole = real


def main(kind: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    errors = {}
    for case, got, wanted in {"ddp": ddp, "fsdp2": fsdp2, "fsdp2_bf16": fsdp2_bf16}[kind]():
        got = {name: value.double() for name, value in got.items()}
        errors[case] = largest_difference(got, wanted)
    if int(os.environ["RANK"]) == 0:
        Path(out).write_text(json.dumps(errors))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
