"""Which models and which tokenizer a signal comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qtarget.errors import loading
from qtarget.teachers.fingerprints import Model, named


def model_of(model: Any) -> Model:
    """A run's model as it starts. ``model``: TRL's ModelConfig."""
    return named(model.model_name_or_path, model.model_revision or "main")


def reference_of(config: Any, model: Any) -> Model:
    """A run's reference: its own, or the model as it starts."""
    if config.reference_model_name_or_path:
        return named(config.reference_model_name_or_path, config.reference_model_revision or "main")
    return model_of(model)


def tokenizer_of(config: Any, model: Any) -> Any:
    """A run's tokenizer with its chat template, loaded without the model.

    Tokens that a template cloned from elsewhere brings along are left out; the template's own hash tells them apart.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    def load(field: str, name: str, revision: str | None = None) -> Any:
        with loading(field, name, "tokenizer"):
            trusted = config.trust_remote_code
            return AutoTokenizer.from_pretrained(name, revision=revision or "main", trust_remote_code=trusted)

    tokenizer = load("model_name_or_path", model.model_name_or_path, model.model_revision)
    path = config.chat_template_path
    if path and Path(path).is_file():
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    elif path:
        tokenizer.chat_template = load("chat_template_path", path).chat_template
    return tokenizer


def other_model(was: Model, now: Model) -> bool:
    """Told by the weights where both are known, for a folder may move; else by name and revision."""
    if was["weights"] and now["weights"]:
        return was["weights"] != now["weights"]
    return (was["name"], was["revision"]) != (now["name"], now["revision"])
