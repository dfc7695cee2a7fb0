"""``qtarget merge``: merges an adapter into its base, as a plain Transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qtarget import files
from qtarget.cli import terminal
from qtarget.cli.arguments import FOLDER, NAME, Option, Verb, one_of, only
from qtarget.errors import ConfigError, loading

VERB = Verb("merge", __doc__)


@VERB.command(
    Option("output", "folder of the model", FOLDER, mend="name the folder of the merged model, as in: -o my_model"),
    Option("dtype", "precision of the weights; unset: the base's", one_of("float32", "bfloat16", "float16")),
    Option("revision", "branch, tag or commit of the adapter", NAME),
    takes="ADAPTER",
)
def merge(options: Any) -> int:
    name = only(options.words, "one adapter, as in: qtarget merge runs/lora -o my_model")
    folder = options.output
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"output is {str(folder)!r}, which is not an empty folder; name another folder")
    terminal.refuse_processes("qtarget merge")
    from qtarget.models.loading import find_adapter, load_causal_lm, load_config, load_tokenizer, merged
    from qtarget.training.saving.side_files import mend_generation_config

    with loading("adapter", name):
        found = find_adapter(name, options.revision)
        if found is None:
            load_config(name, options.revision)
            raise ConfigError(
                f"adapter is {name!r}, which holds no adapter_config.json; name the folder or hub id of an adapter: a "
                "whole model has nothing to merge"
            )
        if found.learns_a_prompt:
            raise _unmerged(name, f"{found.kind} adds a prompt before the text and changes no weights")
        if getattr(load_config(name, options.revision), "quantization_config", None) is not None:
            raise _unmerged(
                name,
                f"its base {found.base!r} is quantised; write a base of 16 bits or more into base_model_name_or_path "
                "of its adapter_config.json",
            )
        tokenizer = load_tokenizer(name, options.revision)
        model = load_causal_lm(name, options.revision, dtype=options.dtype or "auto")
    try:
        plain = merged(model)
    except ValueError as error:
        raise _unmerged(name, str(error)) from error
    mend_generation_config(plain)
    _end_as(plain.generation_config, tokenizer)
    with files.whole(folder) as partial:
        plain.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(_card(folder, name, found.base), encoding="utf-8")
    millions, dtype = sum(parameter.numel() for parameter in plain.parameters()) / 1e6, str(plain.dtype)[6:]
    print(f"model      {folder}  (plain Transformers files, {millions:,.1f} million parameters in {dtype})")
    print(f"next       qtarget chat {folder}")
    return 0


def _unmerged(name: str, why: str) -> ConfigError:
    return ConfigError(f"adapter is {name!r}, which cannot be merged: {why}")


def _end_as(settings: Any, tokenizer: Any) -> None:
    """Generation also stops where the tokenizer says: an adapter keeps no generation settings of its own."""
    own = settings.eos_token_id
    ends = own if isinstance(own, list) else [] if own is None else [own]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        settings.eos_token_id = [tokenizer.eos_token_id, *ends]


def _card(folder: Path, name: str, base: str) -> str:
    from qtarget import __version__

    on_hub = not Path(base).exists()
    head = ["---", "library_name: transformers", *([f"base_model: {base}"] if on_hub else []), "tags: [qtarget]", "---"]
    said = f"The adapter `{name}` merged into its base `{base}` by `qtarget merge` ({__version__})."
    return "\n".join([*head, "", f"# {folder.name}", "", said, ""])
