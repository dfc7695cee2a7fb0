"""Adapters on disk, merged and talked to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from bad_models import change, cut, without, write
from bench import Bench, Case
from peft import PromptTuningConfig

import adapter_folders
import tiny_models


def adapter(id: str, wrong: str, damage: Any, *says: str, do: Any = None) -> Case:
    """An adapter for the world's model, damaged, and trained on unless told otherwise."""

    def make(bench: Bench) -> list[object]:
        folder = bench.folder / "adapter"
        adapter_folders.write_adapter(folder, bench.world / "model")
        damage(folder)
        return bench.train(model_name_or_path=folder) if do is None else do(bench, folder)

    return Case(id, wrong, make, says)


def base_of(folder: Path, **settings: Any) -> Path:
    tiny_models.llama(**settings).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


def other_width(folder: Path) -> None:
    wide = base_of(folder.parent / "wide", width=64)
    change("adapter_config.json", base_model_name_or_path=str(wide))(folder)


def fewer_layers(folder: Path) -> None:
    short = base_of(folder.parent / "short")
    change("config.json", num_hidden_layers=1)(short)
    change("adapter_config.json", base_model_name_or_path=str(short))(folder)


def on_another(folder: Path) -> None:
    first = shutil.copytree(folder, folder.parent / "first")
    change("adapter_config.json", base_model_name_or_path=str(first))(folder)


def unchanged(folder: Path) -> None:
    pass


def a_prompt(folder: Path) -> None:
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    shutil.rmtree(folder)
    adapter_folders.write_adapter(folder, base, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))


def quantised(folder: Path) -> None:
    base = shutil.copytree(
        json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"], folder / "q"
    )
    change("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})(base)
    change("adapter_config.json", base_model_name_or_path=str(base))(folder)


def occupied(bench: Bench, folder: Path) -> list[object]:
    return ["merge", folder, "-o", bench.file("there/notes.txt", "mine").parent]


def merges(bench: Bench, folder: Path) -> list[object]:
    return ["merge", folder, "-o", bench.folder / "one"]


CASES = [
    adapter(
        "half-an-adapter-config",
        "half a file",
        cut("adapter_config.json"),
        "model_name_or_path is",
        "adapter_config.json",
    ),
    adapter(
        "an-adapter-config-that-is-a-list",
        "a list",
        write("adapter_config.json", "[]"),
        "model_name_or_path is",
        "it has no peft_type",
    ),
    adapter(
        "an-adapter-without-its-base",
        "the base is not there",
        change("adapter_config.json", base_model_name_or_path="./moved/away"),
        "model_name_or_path is",
        "it is an adapter for './moved/away', and no such folder exists here",
    ),
    adapter(
        "an-adapter-of-nothing",
        "no base is named",
        change("adapter_config.json", base_model_name_or_path=None),
        "does not name its base model",
    ),
    adapter(
        "an-adapter-on-an-adapter", "its base is one too", on_another, "which is an adapter too; merge that one first"
    ),
    adapter(
        "an-adapter-of-another-base",
        "a wider base",
        other_width,
        "does not fit its base",
        "its weights have different shapes",
    ),
    adapter(
        "an-adapter-of-more-layers",
        "a base of one layer",
        fewer_layers,
        "does not fit its base",
        "match no layer",
    ),
    adapter("an-adapter-without-weights", "no weights", without("adapter_model.safetensors"), "without its weights"),
    adapter(
        "half-the-adapters-weights",
        "a file cut in half",
        cut("adapter_model.safetensors"),
        "model_name_or_path is",
        "cannot be loaded",
    ),
    adapter(
        "an-adapter-of-an-unknown-kind",
        "a kind nobody knows",
        change("adapter_config.json", peft_type="TELEPATHY"),
        "an adapter of kind 'TELEPATHY', which this version of peft does not know",
    ),
    adapter(
        "an-adapter-for-classes",
        "a classifier's",
        change("adapter_config.json", task_type="SEQ_CLS"),
        "an adapter for SEQ_CLS; only CAUSAL_LM",
    ),
    adapter("prompt-tuning-trained-on", "PEFT cannot", a_prompt, "PROMPT_TUNING, which PEFT cannot train further"),
    adapter(
        "new-adapters-on-an-adapter",
        "use_peft beside an adapter",
        unchanged,
        "use_peft asks for a new adapter",
        "qtarget merge",
        do=lambda b, folder: b.train(model_name_or_path=folder, use_peft=True),
    ),
    adapter(
        "another-rank",
        "lora_r beside an adapter of another",
        unchanged,
        "lora_r is 8",
        "whose r is 4",
        do=lambda b, folder: b.train(model_name_or_path=folder, lora_r=8),
    ),
    adapter("a-merge-over-something", "an occupied folder", unchanged, "which is not an empty folder", do=occupied),
    adapter("a-merge-of-a-prompt", "nothing to merge", a_prompt, "which cannot be merged: PROMPT_TUNING", do=merges),
    adapter("a-merge-into-a-quantised-base", "it would be rounded", quantised, "is quantised", do=merges),
    adapter("a-merge-without-the-base", "no base", without("adapter_config.json"), "adapter is", do=merges),
    Case(
        "a-merge-of-a-whole-model",
        "no adapter",
        lambda b: ["merge", b.world / "model", "-o", b.folder / "one"],
        ("which holds no adapter_config.json", "a whole model has nothing to merge"),
    ),
    Case("a-merge-of-nothing", "no name", lambda b: ["merge", "-o", b.folder / "one"], ("name one adapter",)),
    Case("a-merge-to-nowhere", "no folder", lambda b: ["merge", b.world / "model"], ("output is not set",)),
    Case("a-chat-with-nobody", "no model", lambda b: ["chat", "--prompt", "hi"], ("name one model",)),
    Case(
        "a-chat-with-nothing", "no such folder", lambda b: ["chat", b.folder / "no"], ("model is", "cannot be loaded")
    ),
    Case(
        "an-empty-prompt",
        "nothing is asked",
        lambda b: ["chat", b.world / "model", "--prompt", " "],
        ("prompt is ' '; write what the model should answer",),
    ),
    Case(
        "a-long-prompt",
        "no room for the answer",
        lambda b: ["chat", b.world / "model", "--prompt", "apples " * 500],
        ("max_new_tokens is 512, and the prompt has", "positions"),
    ),
    adapter(
        "a-chat-with-half-an-adapter",
        "weights cut in half",
        cut("adapter_model.safetensors"),
        "model is",
        "cannot be loaded",
        do=lambda b, folder: ["chat", folder, "--prompt", "hi"],
    ),
]
