"""Models and tokenizers on disk."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from bench import Bench, Case

import tiny_models


class Boom:
    """A pickle that runs code when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


def model(id: str, wrong: str, damage: Any, *says: str, reads: bool = False, **settings: Any) -> Case:
    """The world's model, damaged."""

    def do(bench: Bench) -> list[object]:
        folder = bench.copy("model")
        damage(folder)
        return bench.train(model_name_or_path=folder, **settings)

    return Case(id, wrong, do, says, reads)


def write(name: str, content: str | bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def change(name: str, **values: Any) -> Any:
    def damage(folder: Path) -> None:
        held = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(held | values))

    return damage


def without(*names: str) -> Any:
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(name: str, to: float = 0.5) -> Any:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * to)])

    return damage


def pickled(folder: Path) -> None:
    """Weights as a pickle that writes a file when it is loaded."""
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as stream:
        pickle.dump({"a": Boom(folder / "ran")}, stream)


def custom_code(folder: Path) -> None:
    change("config.json", auto_map={"AutoModelForCausalLM": "code.Mine", "AutoConfig": "code.C"}, model_type="mine")(
        folder
    )
    (folder / "code.py").write_text("open(__file__ + '.ran', 'w')\n")


def with_template(text: str) -> Any:
    def damage(folder: Path) -> None:
        (folder / "chat_template.jinja").write_text(text)

    return damage


def nan_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    held = load_file(folder / "model.safetensors")
    held["model.norm.weight"] = torch.full_like(held["model.norm.weight"], float("nan"))
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def added_token(folder: Path) -> None:
    """A token that the tokenizer has and the model has not."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(folder)


def new_tokens(bench: Bench) -> Path:
    """A tokenizer with a template and a token more."""
    folder = bench.copy("model")
    added_token(folder)
    return folder


def gpt2(folder: Path) -> Path:
    """A model with 256 learned positions."""
    tiny_models.gpt2().save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


def long_rows(bench: Bench) -> Path:
    return bench.rows({"text": "Tom has 3 apples. "}, {"text": "Tom has 3 apples. " * 60}, name="long")


TEACHER = "teacher_model_name_or_path"


def too_long(id: str, wrong: str, verb: list[str], *says: str, **settings: Any) -> Case:
    """A row longer than a model's positions, met by a verb."""

    def do(bench: Bench) -> list[object]:
        folder = gpt2(bench.folder / "gpt2")
        own = {name: folder if value == "gpt2" else value for name, value in settings.items()}
        config = bench.config(dataset_name=long_rows(bench), max_length=None, **own)
        return [*verb, "--config", config]

    return Case(id, wrong, do, says)


CASES = [
    *(
        model(f"generation-settings-{id}", wrong, change("generation_config.json", **values), *says)
        for id, wrong, values, says in (
            ("that-contradict", "a temperature without sampling", {"do_sample": False, "temperature": 0.6}, ()),
            ("below-zero", "-5 new tokens", {"max_new_tokens": -5}, ("whose generation_config.json cannot be loaded",)),
        )
    ),
    Case(
        "a-misspelt-folder",
        "a folder that is not there",
        lambda b: b.train(model_name_or_path=b.world / "modle"),
        ("model_name_or_path is", "no such folder exists here; did you mean", "/model'?"),
    ),
    Case(
        "a-misspelt-folder-without-a-slash",
        "it could be a hub id",
        lambda b: b.train(model_name_or_path="modle"),
        ("model_name_or_path is 'modle', which cannot be loaded",),
    ),
    Case(
        "tokens-without-rows",
        "a token added to the tokenizer alone",
        lambda b: b.train(model_name_or_path=new_tokens(b), dataset_name=b.rows({"text": "Tom <|new|> has 3."})),
        ("row 0 of the train dataset holds token '<|new|>' (id 320)", "model.resize_token_embeddings(len(tokenizer))"),
    ),
    Case(
        "tokens-without-rows-that-no-row-uses",
        "the same, and no row has it",
        lambda b: b.train(model_name_or_path=new_tokens(b), dataset_name=b.rows({"text": "Tom has 3."})),
    ),
    Case(
        "new-tokens-beside-adapters",
        "a template's tokens, LoRA and a tied head",
        lambda b: b.train(use_peft=True, chat_template_path=new_tokens(b)),
        ("new ones of chat_template_path", "head is tied to its embedding"),
    ),
    Case(
        "a-template-that-is-no-jinja-file",
        "a text file",
        lambda b: b.train(chat_template_path=b.file("template.txt", "{{ messages }}")),
        ("chat_template_path is", "name a file that ends in .jinja"),
    ),
    Case(
        "half-a-template-file",
        "a template that does not parse",
        lambda b: b.train(chat_template_path=b.file("t.jinja", "{% for m in messages %}")),
        ("chat_template_path is", "which cannot be read as a chat template"),
    ),
    too_long(
        "longer-than-its-positions",
        "a row of 500 tokens for 256 positions",
        ["train"],
        "max_length is null and row 1 of the train dataset has",
        "but the model takes 256 positions; set max_length: 256",
        model_name_or_path="gpt2",
    ),
    too_long(
        "longer-than-a-teachers-positions",
        "the same for a teacher",
        ["train"],
        "but the teacher",
        "takes 256 positions",
        target="kd",
        teacher_model_name_or_path="gpt2",
    ),
    too_long(
        "longer-than-its-positions-in-a-check",
        "the same when a teacher is checked",
        ["teacher", "check"],
        "but the teacher",
        "takes 256 positions",
        target="kd",
        teacher_model_name_or_path="gpt2",
    ),
    Case(
        "longer-than-its-positions-in-a-cache",
        "the same when a cache is built",
        lambda b: [
            *("cache", "build", "-o", b.folder / "cache", "--k", 4, "--config"),
            b.config(dataset_name=long_rows(b), max_length=None, target="kd", **{TEACHER: gpt2(b.folder / "gpt2")}),
        ],
        ("but the teacher", "takes 256 positions"),
    ),
    too_long(
        "longer-than-its-positions-in-verify",
        "the same when a run is verified",
        ["verify"],
        "but the model takes 256 positions",
        model_name_or_path="gpt2",
    ),
    too_long(
        "longer-than-its-window",
        "a RoPE model beyond its window: it is warned of",
        ["train"],
    ),
    Case(
        "no-folder",
        "no such model",
        lambda b: b.train(model_name_or_path=b.folder / "no"),
        ("model_name_or_path is", "cannot be loaded"),
    ),
    Case(
        "an-empty-folder",
        "nothing in it",
        lambda b: b.train(model_name_or_path=b.file("m/.keep", "").parent),
        ("model_name_or_path is", "cannot be loaded"),
    ),
    Case(
        "a-hub-id-without-a-network",
        "a model that is not here",
        lambda b: b.train(model_name_or_path="nobody/nothing"),
        ("model_name_or_path is 'nobody/nothing', which cannot be loaded",),
    ),
    Case(
        "an-id-that-climbs",
        "a path out of the folder",
        lambda b: b.train(model_name_or_path="../../etc/passwd"),
        ("model_name_or_path is '../../etc/passwd', which cannot be loaded",),
    ),
    model("a-broken-config", "half a config.json", cut("config.json"), "model_name_or_path is", "cannot be loaded"),
    model(
        "a-config-that-is-a-list", "a list", write("config.json", "[1]"), "model_name_or_path is", "cannot be loaded"
    ),
    model(
        "an-unknown-architecture",
        "a type nobody knows",
        change("config.json", model_type="lama"),
        "model_name_or_path is",
        "lama",
    ),
    model(
        "a-config-in-words",
        "a word for a width",
        change("config.json", hidden_size="wide"),
        "model_name_or_path is",
        "cannot be loaded",
    ),
    model("no-weights", "no weights", without("model.safetensors"), "model_name_or_path is", "cannot be loaded"),
    model(
        "half-the-weights", "a file cut in half", cut("model.safetensors"), "model_name_or_path is", "cannot be loaded"
    ),
    model(
        "other-weights",
        "a picture",
        write("model.safetensors", b"\x89PNG" * 50),
        "model_name_or_path is",
        "cannot be loaded",
    ),
    model(
        "weights-of-another-shape",
        "a wider config",
        change("config.json", intermediate_size=128),
        "model_name_or_path is",
        "cannot be loaded",
    ),
    model("a-pickle", "weights that would run code: not run", pickled, "model_name_or_path is", "cannot be loaded"),
    model(
        "code-of-its-own",
        "code that came with the model: not run",
        custom_code,
        "model_name_or_path is",
        "trust_remote_code",
    ),
    model("nan-weights", "NaN in the weights", nan_weights, "NaN or infinite at row 0, position", reads=True),
    model(
        "no-tokenizer",
        "no tokenizer",
        without("tokenizer.json", "tokenizer_config.json"),
        "model_name_or_path is",
        "cannot be loaded",
    ),
    model(
        "half-a-tokenizer",
        "a tokenizer cut in half",
        cut("tokenizer.json"),
        "model_name_or_path is",
        "cannot be loaded",
    ),
    model(
        "a-tokenizer-config-that-is-a-list",
        "a list",
        write("tokenizer_config.json", "[]"),
        "model_name_or_path is",
        "cannot be loaded",
    ),
    model(
        "a-template-that-does-not-parse",
        "a broken chat template",
        with_template("{% for m in messages %}{{ m.role }"),
        "chat template",
    ),
    model(
        "a-template-that-raises",
        "a template that refuses the row",
        with_template("{{ raise_exception('no user turn') }}"),
        "row 0 of the train dataset: the chat template cannot be applied: TemplateError: no user turn",
    ),
    model(
        "a-template-that-climbs",
        "a template that looks for Python's own objects",
        with_template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        "row 0 of the train dataset: the chat template cannot be applied",
        "unsafe",
    ),
    model("a-template-of-nothing", "a template that says nothing", with_template(" "), "the train dataset"),
    Case(
        "no-template",
        "a chat without a template",
        lambda b: b.train(chat_template_path=b.folder / "no.jinja"),
        ("chat_template_path",),
    ),
    model(
        "a-smaller-head",
        "fewer rows than tokens",
        change("config.json", vocab_size=100),
        "model_name_or_path is",
        "cannot be loaded",
    ),
    Case(
        "an-unknown-attention",
        "no such attention",
        lambda b: b.train(attn_implementation="flash9"),
        ("attn_implementation", "flash9"),
    ),
    Case(
        "a-quantisation-that-is-not-here",
        "bitsandbytes without a GPU",
        lambda b: b.train(load_in_4bit=True, use_peft=True),
        ("bitsandbytes",),
    ),
    Case(
        "an-adapter-of-no-module",
        "modules the model has not",
        lambda b: b.train(use_peft=True, lora_target_modules=["nowhere"]),
        ("nowhere",),
    ),
    Case("an-adapter-of-rank-zero", "rank 0", lambda b: b.train(use_peft=True, lora_r=0), ("`r`", "0")),
    Case(
        "an-adapter-on-the-head",
        "an adapter the loss would miss",
        lambda b: b.train(use_peft=True, lora_target_modules=["q_proj", "lm_head"]),
        ("lora_target_modules holds 'lm_head'",),
    ),
]
