"""What Transformers would refuse only late in a run: optimiser, schedule, tracker, metric."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Trainer, get_scheduler
from transformers.integrations.integration_utils import get_available_reporting_integrations

from qtarget.errors import reason, unknown
from qtarget.losses.output import ALL_STATISTICS
from qtarget.targets.objective import Objective

# Trackers whose package has another name.
_PACKAGES = {"comet_ml": "comet-ml", "azure_ml": "azureml-mlflow", "flyte": "flytekitplugins-deck-standard"}
_NOT_LISTED = ("flyte",)  # among what Transformers says is there
_LOW_RANK = ("galore", "apollo")
# What evaluation reports beside statistics of tokens.
_OF_EVALUATION = ("loss", "mean_token_accuracy", "num_tokens", "runtime", "samples_per_second", "steps_per_second")


def faults(args: Any, eval_objective: Objective, evaluated: Any, own_metrics: bool, own_optimizer: bool) -> list[str]:
    """Sentences on what can be known before weights are loaded.

    Args:
        args: the run's. eval_objective: what evaluation reports. evaluated: the evaluation data, or None.
        own_metrics, own_optimizer: whether the trainer was given compute_metrics, and optimizers.
    """
    found = [*_trackers(args), *_kernels(args), *_evaluation(args, evaluated)]
    if not own_optimizer:
        found += [*_optimizer(args), *_schedule(args)]
    if evaluated is not None and not own_metrics:
        found += _metric(args, eval_objective, [*evaluated] if isinstance(evaluated, dict) else [])
    return found


def _trackers(args: Any) -> Iterator[str]:
    here = get_available_reporting_integrations()
    for name in args.report_to:
        if name not in here and name not in _NOT_LISTED:
            package = _PACKAGES.get(name, name)
            yield f"report_to is {name!r}, whose package is not installed; pip install {package}, or report_to: none"


def _kernels(args: Any) -> Iterator[str]:
    if args.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        yield "use_liger_kernel is true, but its package is not installed; pip install liger-kernel, or leave it out"
    if args.activation_offloading and args.device.type == "cpu":
        yield "activation_offloading is true, but there is no accelerator to take activations from; leave it out"
    attention = (args.model_init_kwargs or {}).get("attn_implementation")
    if attention == "flash_attention_2" and not any(map(importlib.util.find_spec, ("flash_attn", "kernels"))):
        yield f"attn_implementation is {attention!r}, whose package is not installed; pip install flash-attn, or use sdpa"


def _optimizer(args: Any) -> Iterator[str]:
    name = str(getattr(args.optim, "value", args.optim))
    given = f"optim is {name!r}" + (f" with optim_args {args.optim_args!r}" if args.optim_args else "")
    try:
        cls, settings = Trainer.get_optimizer_cls_and_kwargs(args, nn.Linear(1, 1))  # type: ignore[arg-type]
        if getattr(cls, "__module__", "").startswith("torch.optim"):
            cls([nn.Parameter(torch.zeros(1))], **settings)
    except ImportError as error:
        yield f"{given}, whose package is not installed: {reason(error)}; or use optim: adamw_torch"
    except Exception as error:  # each optimiser refuses in its own way
        if not (name.startswith(_LOW_RANK) and args.optim_target_modules):  # these look for layers in the model
            yield f"{given}, which cannot be made: {reason(error)}"


def _schedule(args: Any) -> Iterator[str]:
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        get_scheduler(name, optimizer, 0, 10, args.lr_scheduler_kwargs)
    except Exception as error:  # each schedule refuses in its own way
        yield f"lr_scheduler_type is {name!r} with lr_scheduler_kwargs {args.lr_scheduler_kwargs!r}: {reason(error)}"


def _evaluation(args: Any, evaluated: Any) -> Iterator[str]:
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    if evaluated is None and strategy != "no":
        yield (
            f"eval_strategy is {strategy!r}, but there is no evaluation data; give the dataset a test split "
            "(dataset_test_split), or set eval_strategy: no"
        )
    elif strategy == "no" and str(getattr(args.save_strategy, "value", args.save_strategy)) == "best":
        yield "save_strategy is 'best', but nothing is evaluated; set eval_strategy: steps"
    elif strategy == "no" and args.load_best_model_at_end:
        yield "load_best_model_at_end is true, but nothing is evaluated; set eval_strategy and save_strategy: steps"


def _metric(args: Any, objective: Objective, sets: Sequence[str]) -> list[str]:
    """A metric for the best model that no evaluation will report."""
    if args.metric_for_best_model is None:
        return []
    figures = [*ALL_STATISTICS, "update_vs_sft", "supervised_tokens"]
    names = [*figures, *_OF_EVALUATION, *(f"{source}/{name}" for source in objective.sources for name in figures)]
    names = [f"{name}_{figure}" for name in sets for figure in names] or names
    asked = str(args.metric_for_best_model)
    return [] if asked.removeprefix("eval_") in names else unknown("metric_for_best_model", asked, names).faults
