"""Shapes of models without their weights, from the config.json of a folder or the hub."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qtarget import hub
from qtarget.errors import ConfigError, loading, reason
from qtarget.hub import is_path


@dataclass(frozen=True)
class Shape:
    """What the memory of a decoder depends on.

    Attributes:
        layers, width, ffn, heads, kv_heads, head_dim, vocab: of its config; vocab counts padded rows.
        tied: whether the head is the embedding.
        source: where the numbers are from. counted: the number of parameters, where it was counted.
        dtype: of the checkpoint's numbers; None where it is not known.
        quantised: by which method, None: not at all. bits: of a number of its layers then; None where that is not known.
        adapter: parameters of the adapter on it, where it is named by one.
    """

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    source: str = ""
    counted: int | None = None
    dtype: str | None = None
    quantised: str | None = None
    bits: float | None = None
    adapter: int | None = None

    @property
    def layer_parameters(self) -> int:
        """Attention, a gated feed-forward block and two norms."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.width * self.ffn + 2 * self.width

    @property
    def root_parameters(self) -> int:
        """Embedding, head and last norm."""
        return (1 if self.tied else 2) * self.vocab * self.width + self.width

    @property
    def parameters(self) -> int:
        return self.counted or self.layers * self.layer_parameters + self.root_parameters

    def layer_bytes(self, each: int) -> int:
        """Bytes of a layer, where a number takes ``each`` unless layers are quantised; scales are not counted."""
        return int(self.layer_parameters * (each if self.bits is None else self.bits / 8))

    def weight_bytes(self, each: int) -> int:
        """Bytes of all weights: embedding, head and last norm are not quantised."""
        layers = self.parameters - self.root_parameters
        return each * self.root_parameters + int(layers * (each if self.bits is None else self.bits / 8))


def bytes_of(dtype: Any) -> int:
    """Bytes of a number of a dtype as settings name it; None is float32."""
    return {"bfloat16": 2, "float16": 2, "auto": 2}.get(str(getattr(dtype, "value", dtype)).removeprefix("torch."), 4)


def frozen_bytes(init_kwargs: dict[str, Any] | None, shape: Shape | None, cpu: bool) -> int:
    """Bytes of a number of a teacher or reference, as ``teachers.frozen.load_frozen`` loads it.

    Without a dtype that is the checkpoint's own on an accelerator and float32 on a CPU. A checkpoint whose dtype is not
    known is taken to be in half precision, as most are.
    """
    dtype = (init_kwargs or {}).get("dtype", "float32" if cpu else "auto")
    if getattr(dtype, "value", dtype) == "auto" and shape is not None and shape.dtype is not None:
        dtype = shape.dtype
    return bytes_of(dtype)


# Bits of a weight by quant_method, where the settings name none.
_BITS = {"fp8": 8, "fbgemm_fp8": 8, "eetq": 8, "mxfp4": 4, "nvfp4": 4, "bitnet": 2}


def quantised_by(settings: Any) -> tuple[str | None, float | None]:
    """(method, bits of a weight, None where they are not known) of a ``quantization_config``; (None, None) of none."""
    given = settings if isinstance(settings, dict) else settings.to_dict() if hasattr(settings, "to_dict") else {}
    if not given or given.get("dequantize"):
        return None, None
    method = str(getattr(given.get("quant_method"), "value", given.get("quant_method") or "bitsandbytes"))
    groups = [group.get("weights") or {} for group in (given.get("config_groups") or {}).values()]  # compressed-tensors
    named = [given.get("bits"), given.get("w_bit"), max((group.get("num_bits") or 0 for group in groups), default=0)]
    named += [bits for bits in (4, 8) if given.get(f"load_in_{bits}bit") or given.get(f"_load_in_{bits}bit")]
    named += re.findall(r"(?:int|float)(\d+)", str(given.get("weights") or given.get("quant_type")).lower())
    return method, next((float(bits) for bits in [*named, _BITS.get(method)] if bits), None)


def as_loaded(shape: Shape | None, init_kwargs: dict[str, Any] | None) -> Shape | None:
    """The shape of a model that init_kwargs may quantise as it is loaded."""
    given = init_kwargs or {}
    short = {name: value for name, value in given.items() if name.startswith("load_in_") and value}
    method, bits = quantised_by(given.get("quantization_config") or short)
    return shape if shape is None or method is None else replace(shape, quantised=method, bits=bits)


def find(field: str, name: str, revision: str | None = None, trust_remote_code: bool = False) -> Shape | None:
    """The shape of a model by its config.json: of a folder, of the hub's cache here, or asked of the hub (about 1 kB).

    Returns None where a hub id's config cannot be had; ``why_unknown`` says why.

    Raises:
        ConfigError: ``name`` is a folder that is not there, or holds no model.
    """
    from qtarget.models.loading import find_adapter, load_config

    local = Path(name).is_dir()
    if not local and is_path(name):
        raise ConfigError(f"{field} is {name!r}, which is not a folder here; create it, or name a hub id")
    offline = not local and not hub.answers()
    try:
        found = find_adapter(name, revision)
        config = load_config(name, revision, trust_remote_code=trust_remote_code, local_files_only=offline)
    except Exception as error:  # no network, no such model, no permission, a broken file: many kinds
        if local:
            raise ConfigError(f"{field} is {name!r}, whose config cannot be read: {reason(error)}") from error
        return None
    with loading(field, name, "config"):
        method, bits = quantised_by(getattr(config, "quantization_config", None))
        shape = of_config(config.get_text_config(), "its config.json", trust_remote_code)
        shape = replace(shape, quantised=method, bits=bits)
        if found is None:
            return shape
        told = f"the config.json of its base {found.base}; the adapter has {found.parameters:,}"
        return replace(shape, adapter=found.parameters, source=told)


def why_unknown() -> str:
    """Why ``find`` returned None, and how to fix it."""
    answer = "gives none that you can read (run hf auth login)" if hub.answers() else "does not answer"
    return f"its config.json is not here, and the hub {answer}; name a folder that holds its config.json"


def of_config(config: Any, source: str = "its config", trust_remote_code: bool = False) -> Shape:
    """From a config of Transformers, the parameters counted on a model that has a shape and no numbers."""
    from qtarget.models.positions import without_numbers

    model = without_numbers(config, trust_remote_code)
    heads = getattr(config, "num_attention_heads", 1)
    return Shape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        ffn=getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        source=source,
        counted=sum(parameter.numel() for parameter in model.parameters()),
        dtype=None if config.dtype is None else str(config.dtype).removeprefix("torch."),
    )
