"""Loads any causal language model by its name: a plain one, or a PEFT adapter on its base."""

from __future__ import annotations

import copy
import functools
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qtarget import hub
from qtarget.errors import QTargetError, reason

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
_PIP = "install it: pip install 'qtarget[peft]'"


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter: what its adapter_config.json says.

    Attributes:
        name, revision: where it is. base: folder or hub id of the model it belongs to; base_revision: of that, or None.
        settings: the whole file.
    """

    name: str
    revision: str | None
    base: str
    base_revision: str | None
    settings: dict[str, Any]

    @property
    def kind(self) -> str:
        """LORA, IA3, PROMPT_TUNING and so on, as PEFT calls them."""
        return str(self.settings.get("peft_type"))

    @property
    def learns_a_prompt(self) -> bool:
        """Whether it stands before the text instead of changing the model: prompt and prefix tuning."""
        return "num_virtual_tokens" in self.settings

    def file(self, *names: str) -> Path | None:
        """The first of these files that it has; fetched from the hub where it is an id."""
        return next((found for name in names if (found := _file(self.name, name, self.revision))), None)

    @functools.cached_property
    def weight_shapes(self) -> dict[str, list[int]]:
        """Name → shape of each of its weights, read from the file's header; empty for weights in a pickle."""
        from safetensors import safe_open

        weights = self.file(_WEIGHTS[0])
        if weights is None:
            return {}
        with safe_open(weights, "pt") as held:
            return {name: held.get_slice(name).get_shape() for name in held.keys()}  # noqa: SIM118  no mapping

    @property
    def parameters(self) -> int:
        """How many numbers it holds; 0 where that is not known."""
        return sum(math.prod(shape) for shape in self.weight_shapes.values())


def find_adapter(name: str, revision: str | None = None) -> Adapter | None:
    """The adapter that a folder or hub id holds; None for a plain model, and for a name that leads nowhere.

    A folder that holds a whole model beside the adapter is the adapter's base itself, as for Transformers.

    Raises:
        ValueError: its adapter_config.json cannot be read, or names no base.
    """
    file = _file(name, _CONFIG, revision)
    if file is None:
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"its {_CONFIG} cannot be read ({error})") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("peft_type"), str):
        raise ValueError(f"its {_CONFIG} is not one that PEFT writes: it has no peft_type")
    if (Path(name) / "config.json").is_file() and any(
        file.name not in _WEIGHTS for pattern in ("*.safetensors", "*.bin") for file in Path(name).glob(pattern)
    ):
        return Adapter(name, revision, name, None, settings)
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            "it is an adapter that does not name its base model; write its folder or hub id into "
            f"base_model_name_or_path of {_CONFIG}"
        )
    return Adapter(name, revision, base, settings.get("revision"), settings)


def _file(name: str, file: str, revision: str | None) -> Path | None:
    if Path(name).is_dir():
        return found if (found := Path(name) / file).is_file() else None
    return _hub_file(name, file, revision)


@functools.cache
def _hub_file(name: str, file: str, revision: str | None) -> Path | None:
    from transformers.utils import cached_file

    how: dict[str, Any] = {"revision": revision or "main", "local_files_only": not hub.answers()}
    how |= {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    try:
        found = cached_file(name, file, **how)
    except (OSError, ValueError):  # no name of the hub, no such model: whoever loads it says so
        return None
    return None if found is None else Path(found)


def _of_base(found: Adapter, load: Callable[..., Any], **kwargs: Any) -> Any:
    """Something of an adapter's base; an error says that it is the base that is missing."""
    if found.base != found.name and _file(found.base, _CONFIG, found.base_revision) is not None:
        raise ValueError(
            f"it is an adapter for {found.base!r}, which is an adapter too; merge that one first: qtarget merge "
            f"{found.base} -o FOLDER"
        )
    where = f"put that model there, or write where it is into base_model_name_or_path of {_CONFIG}"
    if nowhere := hub.nowhere(found.base):
        raise ValueError(f"it is an adapter for {found.base!r}, and {nowhere}; {where}")
    if found.base_revision:
        kwargs["revision"] = found.base_revision
    try:
        return load(found.base, **kwargs)
    except QTargetError:
        raise
    except Exception as error:  # as errors.loading, which would say the cause once more
        raise ValueError(
            f"it is an adapter for {found.base!r}, which cannot be loaded ({reason(error)}); {where}"
        ) from None


def load_config(name: str, revision: str | None = None, **kwargs: Any) -> Any:
    """The configuration of a model; of an adapter its base's. ``kwargs``: of Transformers' ``from_pretrained``."""
    from transformers import AutoConfig

    if (found := find_adapter(name, revision)) is not None:
        return _of_base(found, AutoConfig.from_pretrained, **kwargs)
    return AutoConfig.from_pretrained(name, revision=revision or "main", **kwargs)


def load_tokenizer(name: str, revision: str | None = None, **kwargs: Any) -> Any:
    """The tokenizer of a model; of an adapter its own, and its base's where it has none."""
    from transformers import AutoTokenizer

    found = find_adapter(name, revision)
    if found is not None and found.file(*_TOKENIZER) is None:
        return _of_base(found, AutoTokenizer.from_pretrained, **kwargs)
    return AutoTokenizer.from_pretrained(name, revision=revision or "main", **kwargs)


def load_causal_lm(
    name: str,
    revision: str | None = None,
    *,
    trainable: bool = False,
    load: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> Any:
    """A causal language model with its weights; an adapter as a PeftModel on its base, both under their own names.

    Args:
        name, revision: folder or hub id. trainable: whether an adapter's weights ask for gradients.
        load: what loads a plain model, by default Transformers. kwargs: its own, such as ``dtype``.

    Raises:
        ValueError: an adapter whose base is missing or has other shapes, or of a kind that cannot be loaded so.
        Others as the libraries raise them; wrap the call in ``errors.loading``.

    Example:
        >>> model = load_causal_lm("runs/lora", dtype="bfloat16")  # doctest: +SKIP
    """
    from transformers import AutoModelForCausalLM

    load = load or AutoModelForCausalLM.from_pretrained
    found = find_adapter(name, revision)
    if found is None:
        return load(name, **({} if revision is None else {"revision": revision}), **kwargs)
    kind = _peft_config(found, trainable)
    model = _of_base(found, load, **kwargs)
    _resize_as_trained(model, found)
    return _with_adapter(model, found, kind, trainable)


def _peft_config(found: Adapter, trainable: bool) -> Any:
    """PEFT's own configuration of an adapter that can be loaded."""
    try:
        from peft import PeftConfig
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError:
        raise ValueError(f"it is an adapter, but the package peft is not installed; {_PIP}") from None
    if found.kind not in [str(getattr(known, "value", known)) for known in PEFT_TYPE_TO_CONFIG_MAPPING]:
        raise ValueError(f"it is an adapter of kind {found.kind!r}, which this version of peft does not know")
    if found.settings.get("task_type") not in (None, "CAUSAL_LM"):
        raise ValueError(f"it is an adapter for {found.settings['task_type']}; only CAUSAL_LM can be used here")
    if trainable and found.learns_a_prompt:
        raise ValueError(
            f"it is an adapter of kind {found.kind}, which PEFT cannot train further; train from the base "
            f"{found.base!r}, or resume the run that made it with resume_from_checkpoint"
        )
    if found.file(*_WEIGHTS) is None:
        raise ValueError(f"it is an adapter without its weights ({_WEIGHTS[0]}); copy that file there")
    kind = PeftConfig.from_pretrained(found.name, revision=found.revision)
    kind.inference_mode = not trainable
    return kind


def _resize_as_trained(model: Any, found: Adapter) -> None:
    """Give embedding and head as many rows as the adapter was trained with: tokens may have been added."""
    embedding = model.get_input_embeddings()
    names = {name for name, module in model.named_modules() if module in (embedding, model.get_output_embeddings())}
    rows, width = embedding.weight.shape
    trained = {
        shape[0]
        for key, shape in found.weight_shapes.items()
        if len(shape) == 2 and shape[1] == width and "lora_" not in key and "delta" not in key
        if any(f".{name}." in key for name in names)
    }
    indices = found.settings.get("trainable_token_indices") or []
    several = indices.values() if isinstance(indices, dict) else [indices]
    trained |= {1 + max(one) for one in several if one and 1 + max(one) > rows} if not trained else set()
    if trained and max(trained) != rows:
        model.resize_token_embeddings(max(trained), mean_resizing=False)


def _with_adapter(model: Any, found: Adapter, kind: Any, trainable: bool) -> Any:
    """The base with its adapter, whose every weight is found and fits."""
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    mapping = {} if kind.is_prompt_learning else getattr(model, "_checkpoint_conversion_mapping", {})
    # ZeRO-3 gathers weights of one dtype only, as TRL says where it makes adapters.
    autocast: Any = {"autocast_adapter_dtype": not is_deepspeed_zero3_enabled()}
    named: Any = {"is_trainable": trainable, "revision": found.revision, "key_mapping": mapping}
    try:
        with warnings.catch_warnings():  # PEFT asks Transformers by a name that is going away
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            whole = get_peft_model(model, copy.copy(kind), **autocast)
            loaded = whole.load_adapter(found.name, "default", **named, **autocast)
    except (RuntimeError, ValueError, IndexError, KeyError, AttributeError) as error:
        why = "its weights have different shapes" if "size mismatch" in str(error) else reason(error)
        raise ValueError(_belongs_elsewhere(found, why)) from None
    # Beside the adapter's own weights stand copies of the base's, and of tied ones, which may find no place.
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(kind.peft_type)
    odd = [*loaded.missing_keys, *(key for key in loaded.unexpected_keys if prefix and prefix in key)]
    if odd:
        raise ValueError(_belongs_elsewhere(found, f"{len(odd)} weights match no layer, such as {odd[0]}"))
    whole.loaded_from = found.name
    if not trainable:
        whole.requires_grad_(False)
    _take_generation_config(whole, found)
    return whole


def _belongs_elsewhere(found: Adapter, why: str) -> str:
    return (
        f"it is an adapter that does not fit its base {found.base!r}: {why}; name its base model in "
        f"base_model_name_or_path of {_CONFIG}"
    )


def _take_generation_config(model: Any, found: Adapter) -> None:
    """An adapter's own generation settings, where it has some, win over its base's."""
    from transformers import GenerationConfig

    if (file := found.file("generation_config.json")) is not None:
        model.get_base_model().generation_config = GenerationConfig.from_pretrained(file.parent)


def starts_as_its_base(model: Any) -> bool:
    """Whether a PeftModel still computes what its base does, so that with adapters off it is what it started as.

    So it is with LoRA whose second matrices are zero and nothing else is trained. A prompt stands before the text:
    without it the model is its base, as ever.
    """
    from peft.utils import ModulesToSaveWrapper

    if model.active_peft_config.is_prompt_learning:
        return True
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    pairs = [(wrapper.original_module, own) for wrapper in wrappers for own in wrapper.modules_to_save.values()]
    untouched = all(
        torch.equal(was.detach(), now.detach().to(was.dtype))
        for original, own in pairs
        for was, now in zip(original.parameters(), own.parameters(), strict=True)
    )
    first, second = {"lora_A", "lora_embedding_B", "modules_to_save"}, {"lora_B", "lora_embedding_A"}
    for name, value in model.named_parameters():
        parts = {*name.split(".")}
        if value.requires_grad and not parts & first and (not parts & second or bool(value.detach().any())):
            return False
    return untouched


# -- one model of both -------------------------------------------------------------------------------------------


def merged(model: Any) -> Any:
    """The adapter's base with the adapter in its weights, a plain model of Transformers. The adapter is used up.

    Head and embedding that are one matrix in the base are two where the adapter trained only one of them.

    Args:
        model: a PeftModel.

    Raises:
        ValueError: PEFT cannot merge this kind of adapter.
    """
    base = model.get_base_model()
    ends: list[Any] = [base.get_input_embeddings(), base.get_output_embeddings()]
    if any(hasattr(end, "get_base_layer") for end in ends):  # merging into a matrix that both share would change both
        inner = getattr(ends[1], "get_base_layer", lambda: ends[1])()
        inner.weight = nn.Parameter(inner.weight.detach().clone(), requires_grad=False)
    try:
        plain: Any = model.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, TypeError) as error:
        kind = model.active_peft_config.peft_type.value
        raise ValueError(f"it is an adapter of kind {kind}, which PEFT cannot merge ({reason(error)})") from None
    return plain.requires_grad_(False)
