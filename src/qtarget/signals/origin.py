"""Which models and which tokenizer a signal comes from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtarget.errors import ConfigError
from qtarget.teachers.fingerprints import weights_hash


def named(name: str, revision: str | None) -> dict[str, Any]:
    """A model by its name and, where they are known, what tells its weights from others."""
    return {"name": name, "revision": revision or "main", "weights": weights_hash(name, revision)}


def reference_of(config: Any, model: Any) -> dict[str, Any]:
    """``named`` of a run's reference: its own, or the model as it starts."""
    if config.reference_model_name_or_path:
        return named(config.reference_model_name_or_path, config.reference_model_revision)
    return named(model.model_name_or_path, model.model_revision)


def tokenizer_of(config: Any, model: Any) -> Any:
    """A run's tokenizer with its chat template, loaded without the model.

    Tokens that a template cloned from elsewhere brings along are left out; the template's own hash tells them apart.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    def load(field: str, name: str, revision: str | None = None) -> Any:
        try:
            return AutoTokenizer.from_pretrained(
                name, revision=revision or "main", trust_remote_code=config.trust_remote_code
            )
        except (OSError, ValueError) as error:
            why = " ".join(str(error).split())
            raise ConfigError(f"{field} is {name!r}, whose tokenizer cannot be loaded: {why}") from error

    tokenizer = load("model_name_or_path", model.model_name_or_path, model.model_revision)
    path = config.chat_template_path
    if path and Path(path).is_file():
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    elif path:
        tokenizer.chat_template = load("chat_template_path", path).chat_template
    return tokenizer


def other_model(was: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Told by the weights where both are known, for a folder may move; else by name and revision."""
    if was["weights"] and now["weights"]:
        return was["weights"] != now["weights"]
    return (was["name"], was["revision"]) != (now["name"], now["revision"])
