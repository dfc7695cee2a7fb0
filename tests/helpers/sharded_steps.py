"""Ten steps in two processes, however the work is cut, against ten steps in one. Run by torchrun; see test_cuts.py.

    torchrun --nproc_per_node 2 tests/helpers/sharded_steps.py FOLDER OUT.json

In float32: models of two layers, four rows a step, each step other rows, SGD (Adam would divide the rounding of a tiny
gradient by itself). ddp: the trainer's own ``train``. fsdp2: torch's ``fully_shard`` on student and teacher, and the
trainer's own ``compute_loss``, since Accelerate turns FSDP into DDP where there is no accelerator.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM

import tiny_models
from qtarget import ConfigError, presets
from qtarget.models import forward
from qtarget.models.causal_lm import CausalLM
from qtarget.models.forward import LossCall, add_target_forward
from qtarget.targets.target import Target
from qtarget.teachers.cache import build as cache_build
from qtarget.training.preparing import RowsTrainer
from quick_runs import Weights, copied_weights, largest_difference, quick_trainer, tokenised_rows, weight_change

STEPS, ROWS = 10, 4
# name → (head tied, teacher from a cache, adapters)
CASES = {
    f"{'tied' if tied else 'untied'}, {'cached' if cached else 'online'} teacher{', adapters' if peft else ''}": (
        tied,
        cached,
        peft,
    )
    for tied, cached, peft in itertools.product((True, False), (True, False), (False, True))
}


def step_dataset() -> Dataset:
    """Two sources, of which each has a target of its own."""
    made = tiny_models.conversation_dataset(STEPS * ROWS)
    return made.add_column("source", [("math", "chat", "math")[i % 3] for i in range(len(made))])


def step_teacher() -> nn.Module:
    return tiny_models.trained_model(seed=7, width=48, tied=False).eval()


def trainer_for_case(case: str, folder: Path, processes: int, **settings: Any):
    """A trainer of a case on its share of the rows; ``folder`` holds teacher and cache."""
    tied, cached, peft = CASES[case]
    torch.manual_seed(11)  # adapters begin at random
    lora = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    names = {"teacher_model_name_or_path": str(folder / "teacher"), "teacher_cache": str(folder / "cache")}
    return quick_trainer(
        tiny_models.trained_model(tied=tied),
        Path(tempfile.mkdtemp()),
        step_dataset(),
        targets={"math": {"preset": "target-sft", "eta": 0.6}, "chat": "dft"},
        teacher_model=None if cached else step_teacher(),
        peft_config=lora if peft else None,
        max_steps=STEPS,
        learning_rate=0.3,
        per_device_train_batch_size=ROWS // processes,
        gradient_accumulation_steps=1,
        train_sampling_strategy="sequential",
        **(names if cached else {}),
        **settings,
    )


def prepare(folder: Path) -> None:
    """Teacher and cache on disk, and where one process ends: FOLDER/wanted.pt."""
    step_teacher().save_pretrained(folder / "teacher")
    tiny_models.tokenizer().save_pretrained(folder / "teacher")
    tiny_models.llama(tied=False).save_pretrained(folder / "plain")
    named = {"teacher_model_name_or_path": str(folder / "teacher"), "target": "kd"}
    asking = quick_trainer(tiny_models.trained_model(), folder / "asking", step_dataset(), kind=RowsTrainer, **named)
    plan = cache_build.plan(asking, 1000)
    settings = {"dtype": "float32", "about": cache_build.about(asking)}
    cache_build.build(asking, folder / "cache", plan, 16, **settings)
    wanted = {}
    for case in CASES:
        made = trainer_for_case(case, folder, processes=1)
        before = copied_weights(made.model)
        made.train()
        wanted[case] = weight_change(before, made.model)
    torch.save(wanted, folder / "wanted.pt")


# -- the cuts --------------------------------------------------------------------------------------------------------


def by_ddp(case: str, folder: Path) -> Weights:
    made = trainer_for_case(case, folder, processes=2)
    before = copied_weights(made.model)
    made.train()
    return weight_change(before, made.model)


def shard(model: nn.Module, head: str) -> None:
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in plain.model.layers:
        fully_shard(layer)
    if head == "own":
        fully_shard(plain.lm_head)
    fully_shard(model)


def sharded(case: str, folder: Path, head: str):
    made = trainer_for_case(case, folder, processes=2)
    before = copied_weights(made.model)
    shard(made.model.train(), head)
    for other in made.aux.models:
        shard(other.model, head)
    made.current_gradient_accumulation_steps = 1
    return made, before


def train_step(made: Any, batch: dict[str, Any]) -> None:
    batch = made._prepare_inputs(batch)
    count = made.denominator([batch])
    made.compute_loss(made.model, batch, num_items_in_batch=count).backward()


def by_fsdp2(case: str, folder: Path, head: str) -> Weights:
    made, before = sharded(case, folder, head)
    optimizer = torch.optim.SGD([p for p in made.model.parameters() if p.requires_grad], lr=made.args.learning_rate)
    for batch in itertools.islice(made.get_train_dataloader(), STEPS):
        train_step(made, batch)
        optimizer.step()
        optimizer.zero_grad()
        made.state.global_step += 1
    now = {name: p for name, p in made.model.named_parameters() if p.requires_grad}
    return {name: p.detach().full_tensor() - before[name] for name, p in now.items()}


def a_denominator_of_ones_own(folder: Path) -> Weights:
    """Each process divides by its own labels, as if by all: the mistake that the rest would show."""
    case = "untied, online teacher"
    made = trainer_for_case(case, folder, processes=2)
    made._get_num_items_in_batch = lambda batch, device: (
        sum((one["labels"][:, 1:] != -100).sum() for one in batch) * 2.0
    )
    before = copied_weights(made.model)
    made.train()
    return weight_change(before, made.model)


# -- the head --------------------------------------------------------------------------------------------------------


def gathers(folder: Path, head: str) -> dict[str, list[int]]:
    """How often a whole head is asked for in each of two steps: by shape, in forward and backward."""
    made, _ = sharded("untied, online teacher", folder, head)
    real, counted = DTensor.full_tensor, []
    small, chunks = forward.linear_target_loss, []

    def counting(self, *args, **kwargs):
        counted.append(self.shape)
        return real(self, *args, **kwargs)

    def chunked(*args, **kwargs):
        chunks.append(int((args[2] != -100).sum()))
        return small(*args, **kwargs, chunk_rows=1)

    DTensor.full_tensor, forward.linear_target_loss = counting, chunked
    try:
        found: dict[str, list[int]] = {"student": [], "teacher": [], "chunks": []}
        made._heads_checked = True  # a check of the first batch, which asks once more
        for batch in itertools.islice(made.get_train_dataloader(), 2):
            counted.clear(), chunks.clear()
            train_step(made, batch)
            (teacher,) = made.aux.teacher.models
            shapes = {"student": made.model.lm_head.weight.shape, "teacher": teacher.base.lm_head.weight.shape}
            for name, shape in shapes.items():
                found[name].append(counted.count(shape))
            found["chunks"].append(sum(chunks))
    finally:
        DTensor.full_tensor, forward.linear_target_loss = real, small
    return found


def loss_and_gradients(model: nn.Module, target: Target) -> Weights:
    """Of a padded batch, the same in every process; what backward leaves in each weight, whole."""
    row = tokenised_rows(tiny_models.conversation_dataset(1))[0]
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    count = (labels[:, 1:] != -100).sum()
    model(input_ids=ids, qtarget=LossCall([target], labels, {}, {}, None, count, "basic")).exact_loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in named.items()}


def vocabulary_parallel() -> tuple[Weights, Weights]:
    """A head in pieces of the vocabulary over a mesh of two, each process with the same batch."""
    plain, split = tiny_models.llama(tied=False), tiny_models.llama(tied=False)
    for model in (plain, split):
        add_target_forward(model.train())
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    parallelize_module(split, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    weight: Any = split.lm_head.weight
    assert isinstance(weight, DTensor) and weight.placements[0].is_shard(0)
    ids = torch.tensor([tokenised_rows(tiny_models.conversation_dataset(1))[0]["input_ids"]])
    CausalLM(split, len(tiny_models.tokenizer())).check_head({"input_ids": ids})
    return loss_and_gradients(split, presets.build("dft")), loss_and_gradients(plain, presets.build("dft"))


def by_a_tp_plan(folder: Path) -> dict[str, str]:
    """A model split by Transformers' own tensor parallelism: trained right, or refused in a sentence."""
    plain = AutoModelForCausalLM.from_pretrained(folder / "plain").train()
    try:
        split = AutoModelForCausalLM.from_pretrained(folder / "plain", tp_plan="auto").train()
    except Exception as error:
        return {"not loaded": " ".join(str(error).split())}
    for model in (plain, split):
        add_target_forward(model)
    ids = {"input_ids": torch.tensor([tokenised_rows(tiny_models.conversation_dataset(1))[0]["input_ids"]])}
    try:
        CausalLM(split, len(tiny_models.tokenizer())).check_head(ids)
    except ConfigError as error:
        return {"refused": str(error)}
    got, wanted = (loss_and_gradients(model, presets.build("dft")) for model in (split, plain))
    return {"trained": repr(largest_difference(got, wanted)[0]), "head": type(split.lm_head.weight).__name__}


def compared_weights(folder: Path, wanted: dict[str, Weights]) -> Iterator[tuple[str, Weights, Weights]]:
    for case, (tied, _, _) in CASES.items():
        yield f"ddp, {case}", by_ddp(case, folder), wanted[case]
        for head in ("root",) if tied else ("root", "own"):
            yield f"fsdp2, head {head}, {case}", by_fsdp2(case, folder, head), wanted[case]
    yield "mutant: own denominator", a_denominator_of_ones_own(folder), wanted["untied, online teacher"]
    yield "vocabulary-parallel head", *vocabulary_parallel()


def main(folder: Path, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    wanted = torch.load(folder / "wanted.pt", weights_only=True)
    found: dict[str, Any] = {}
    for name, got, right in compared_weights(folder, wanted):
        found[name] = largest_difference(got, right)
        if int(os.environ["RANK"]) == 0:
            print(name, found[name], flush=True)
    about: dict[str, Any] = {f"gathers, head {head}": gathers(folder, head) for head in ("root", "own")}
    about["tp_plan"] = by_a_tp_plan(folder)
    if int(os.environ["RANK"]) == 0:
        Path(out).write_text(json.dumps({"errors": found, "about": about}, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
