"""Write the 40 recipes of this folder: ten settings of the paper x {sft, dft, kd, target-sft}.

    python recipes/paper/generate.py            # writes recipes/paper/*.yaml
    python recipes/paper/generate.py --check    # says whether they are as this file would write them

The paper is *A Unifying Lens on Supervised Fine-Tuning Through Target Distribution Design* (arXiv:2606.11189). Its
code and settings are not published; what its closest relatives published is borrowed, and said so, value by value.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
# Commit of each hub id, once somebody has looked it up; "main" until then, and listed under to_pin.
REVISIONS: dict[str, str] = {}

GPUS = 8
BATCH = 256
# GPUs of Beyond-Log-Likelihood's runs: their number of micro-batches is the factor on its summed gradients.
RELATIVES_GPUS = 2

PUBLISHED, OURS = "published", "ours"
BLL = "borrowed: Beyond-Log-Likelihood"
TEACHER = f"{OURS}; the paper's teachers are not known: the instruct model of the next size in the same family"


@dataclass(frozen=True)
class Data:
    """A training set, and what its relatives' recipe for it is."""

    name: str
    source: str
    columns: dict[str, dict[str, str]]  # family of the model → {prompt, completion}
    prompt: str
    rows: int
    steps: int
    max_length: int
    micro: int
    source_origin: str
    columns_origin: str
    rows_origin: str
    steps_origin: str
    recipe_origin: str
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """A base model and its teacher."""

    slug: str
    name: str
    teacher: str
    family: str = "qwen"


MATH_UNKNOWN = (
    "the evaluation prompt: relatives train on the bare question and ask for a boxed answer in evaluation only"
)
NUMINA = Data(
    name="numina-67k",
    source="gaotang/numina-cot-subset-67k",
    columns={"qwen": {"prompt": "extra_info.question", "completion": "extra_info.answer"}},
    prompt="chat_template",
    rows=67600,
    steps=264,
    max_length=3072,
    micro=4,
    source_origin=f"{BLL}; the paper says NuminaMath-CoT, and this is the public subset of 67k rows",
    columns_origin=f"{BLL}; what its data script writes and its trainer reads",
    rows_origin=f"{BLL}; the listing of the set, rounded to hundreds",
    steps_origin=f"{BLL}; one epoch, the last batch dropped: 67,600 / 256",
    recipe_origin=BLL,
    unknown=(MATH_UNKNOWN, "the exact number of rows: the listing says 67.6k"),
)
OPENR1 = Data(
    name="openr1-15k",
    source="txie/OpenR1-Math-15k-3072",
    columns={"qwen": {"prompt": "messages.0.content", "completion": "messages.1.content"}},
    prompt="chat_template",
    rows=15000,
    steps=58,
    max_length=3072,
    micro=4,
    source_origin=f"{PUBLISHED}; on the hub under the paper's number, taken to be the figure's OpenR1-15k",
    columns_origin=f"{OURS}; its columns were not seen: open-r1/OpenR1-Math-220k, its parent, has messages",
    rows_origin=f"{PUBLISHED}; 15k by the set's name",
    steps_origin=f"{OURS}; one epoch: 15,000 / 256",
    recipe_origin=f"{BLL}; for NuminaMath-CoT",
    unknown=(
        MATH_UNKNOWN,
        "the epochs: one is 58 steps, and two or three are as likely",
        "the columns and the exact number of rows of the set",
    ),
)
M23K = Data(
    name="m23k",
    source="gaotang/medical_sft_processed",
    columns={
        family: {
            "prompt": f"extra_info.{family}_prompt",
            # spelled so in the set
            "completion": f"extra_info.{family}_reponse_no_thinking",
        }
        for family in ("qwen", "llama")
    },
    prompt="as_is",
    rows=23493,
    steps=91,
    max_length=1024,
    micro=16,
    source_origin=f"{BLL}; made from UCSC-VLAA/m23k-tokenized (arXiv:2504.00869). The paper's figure says Medical",
    columns_origin=f"{BLL}; the short distilled answer without the thinking, prompts rendered already",
    rows_origin="borrowed: m1 (arXiv:2504.00869); the rows of m23k-tokenized, of which this set is made",
    steps_origin=f"{BLL}; one epoch, the last batch dropped: 23,493 / 256",
    recipe_origin=BLL,
    unknown=(
        "the evaluation: its temperature, and whether a further benchmark counts in the average",
        "the maximum length: Beyond-Log-Likelihood's paper says 1024, its scripts 800",
    ),
)

QWEN3 = Model("qwen3-1.7b", "Qwen/Qwen3-1.7B-Base", "Qwen/Qwen3-8B")
MATH_1B = Model("qwen2.5-math-1.5b", "Qwen/Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-Math-7B-Instruct")
MATH_7B = Model("qwen2.5-math-7b", "Qwen/Qwen2.5-Math-7B", "Qwen/Qwen2.5-Math-72B-Instruct")
LLAMA_3B = Model("llama-3.2-3b", "meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.1-8B-Instruct", "llama")
LLAMA_8B = Model("llama-3.1-8b", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B-Instruct", "llama")
QWEN_1B = Model("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-7B-Instruct")
QWEN_7B = Model("qwen2.5-7b", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-14B-Instruct")


@dataclass(frozen=True)
class Setting:
    """A panel and a line of the paper's figure."""

    data: Data
    model: Model
    learning_rate: float
    rate_origin: str
    unknown: tuple[str, ...] = ()


FIVE, TWO = 5.0e-5, 2.0e-5
NESTED = (
    "relatives' LLaMA prompts: their trainer wraps the rendered prompt in its template once more; not repeated here"
)
SETTINGS = [
    Setting(NUMINA, QWEN3, FIVE, f"{OURS}; no relative trains this model: the rate of the others of its size"),
    Setting(NUMINA, MATH_1B, FIVE, BLL),
    Setting(NUMINA, MATH_7B, FIVE, BLL),
    Setting(OPENR1, QWEN3, FIVE, f"{OURS}; no relative trains this model: the rate of the others of its size"),
    Setting(OPENR1, MATH_1B, FIVE, f"{BLL}; for NuminaMath-CoT"),
    Setting(OPENR1, MATH_7B, FIVE, f"{BLL}; for NuminaMath-CoT"),
    Setting(M23K, LLAMA_3B, FIVE, BLL, (NESTED,)),
    Setting(M23K, LLAMA_8B, TWO, BLL, (NESTED,)),
    Setting(M23K, QWEN_1B, FIVE, BLL),
    Setting(M23K, QWEN_7B, FIVE, f"{BLL}; there of Qwen2.5-Math-7B, another base"),
]

# arm → (target, provenance of it and its parts, whether it has a teacher)
ARMS: dict[str, tuple[Any, dict[str, str], bool]] = {
    "sft": ("sft", {"target": f"{PUBLISHED}; the figure's SFT"}, False),
    "dft": ("dft", {"target": f"{PUBLISHED}; the figure's SFT(p), the gradient of arXiv:2508.05629"}, False),
    "kd": (
        {"preset": "kd", "temperature": 1.0},
        {
            "target": f"{OURS}; the figure's Distill, taken to be forward distillation at every position",
            "target.temperature": OURS,
        },
        True,
    ),
    "target-sft": (
        {"preset": "target-sft", "eta": 0.5, "teacher_temperature": 1.0},
        {
            "target": f"{PUBLISHED}; arXiv:2606.11189",
            "target.eta": f"{OURS}; the paper's is not known",
            "target.teacher_temperature": OURS,
        },
        True,
    ),
}
TEACHER_UNKNOWN = "the paper's teachers and eta, and whether its Distill is distillation alone or mixed with the labels"
SEEDS_UNKNOWN = "the seeds, and how many runs a figure stands for"


def revision(hub_id: str) -> str:
    return REVISIONS.get(hub_id, "main")


def _and(origin: str, note: str) -> str:
    """A provenance with one more note."""
    return f"{origin}{',' if ';' in origin else ';'} {note}"


def name_of(setting: Setting, arm: str) -> str:
    return f"{setting.data.name}_{setting.model.slug}_{arm}"


def parts(setting: Setting, arm: str) -> list[tuple[str, list[tuple[str, Any, str]]]]:
    """[(heading, [(field, value, its provenance)])] of a recipe, in the order of the file."""
    data, model = setting.data, setting.model
    target, origins, taught = ARMS[arm]
    recipe = data.recipe_origin
    rows = [("target", target, origins["target"])]
    if taught:
        rows += [
            ("teacher_model_name_or_path", model.teacher, TEACHER),
            ("teacher_model_revision", revision(model.teacher), f"{OURS}; to pin"),
            ("teacher_model_init_kwargs", {"dtype": "bfloat16"}, OURS),
            ("teacher_end_token", "label", f"{OURS}; instruct teachers end with another token than base models"),
        ]
    return [
        (
            "Student",
            [
                ("model_name_or_path", model.name, f"{PUBLISHED}; by the figure's name, taken to be the base model"),
                ("model_revision", revision(model.name), f"{OURS}; to pin"),
                ("dtype", "float32", f"{OURS}; relatives load bfloat16 weights and seem to keep AdamW's states in it"),
                ("attn_implementation", "flash_attention_2", recipe),
            ],
        ),
        ("Target", rows),
        (
            "Data: python recipes/paper/prepare.py --config THIS_FILE writes dataset_name from dataset_source",
            [
                ("dataset_source", data.source, data.source_origin),
                ("dataset_source_revision", revision(data.source), f"{OURS}; to pin"),
                ("dataset_source_split", "train", recipe),
                ("dataset_source_columns", data.columns[model.family], data.columns_origin),
                (
                    "dataset_source_prompt",
                    data.prompt,
                    _and(recipe, "the tokenizer's chat template on the bare question")
                    if data.prompt == "chat_template"
                    else data.columns_origin,
                ),
                ("dataset_name", f"build/paper/{data.name}_{model.slug}", OURS),
                ("completion_only_loss", True, _and(recipe, "loss on answer and end token")),
                ("packing", False, recipe),
                ("max_length", data.max_length, recipe),
                ("truncation_mode", "keep_start", recipe),
            ],
        ),
        (
            f"Steps: {GPUS} GPUs x {data.micro} rows x {BATCH // GPUS // data.micro} accumulations = {BATCH} rows",
            [
                ("expected_rows", data.rows, data.rows_origin),
                ("expected_batch", BATCH, recipe),
                ("per_device_train_batch_size", data.micro, recipe),
                (
                    "gradient_accumulation_steps",
                    BATCH // GPUS // data.micro,
                    f"{OURS}; relatives' batch on {GPUS} GPUs, which they split over {RELATIVES_GPUS}",
                ),
                ("num_train_epochs", 1, f"{OURS}; not known" if data is OPENR1 else recipe),
                ("max_steps", data.steps, data.steps_origin),
                ("dataloader_drop_last", True, recipe),
                ("denominator", "all_labels", f"{OURS}; relatives sum the means of micro-batches, see above"),
            ],
        ),
        (
            "Optimiser",
            [
                ("learning_rate", setting.learning_rate, setting.rate_origin),
                ("lr_scheduler_type", "cosine", recipe),
                ("warmup_steps", data.steps // 10, _and(recipe, "ratio 0.1, rounded down")),
                ("adam_beta1", 0.9, recipe),
                ("adam_beta2", 0.95, recipe),
                ("adam_epsilon", 1.0e-8, _and(recipe, "torch's default, which it keeps")),
                ("weight_decay", 0.01, recipe),
                ("max_grad_norm", 1.0, recipe),
                ("gradient_checkpointing", True, recipe),
                ("seed", 1, OURS),
            ],
        ),
        (
            "Output",
            [
                ("output_dir", f"runs/paper/{name_of(setting, arm)}", OURS),
                ("save_strategy", "no", _and(recipe, "the last step is evaluated")),
                ("logging_steps", 1, OURS),
                ("report_to", "none", OURS),
            ],
        ),
    ]


def relatives(data: Data) -> list[str]:
    """The flags under which a step is that of the relatives, whose gradients are summed over micro-batches."""
    factor = BATCH // RELATIVES_GPUS // data.micro
    return [
        *("--denominator", "micro_batch"),
        *("--max_grad_norm", f"{1 / factor:g}"),
        *("--adam_epsilon", f"{1e-8 / factor:g}"),
    ]


def text(setting: Setting, arm: str) -> str:
    """The file of a recipe."""
    name = name_of(setting, arm)
    sections = parts(setting, arm)
    origins = {field: origin for _, rows in sections for field, _, origin in rows} | ARMS[arm][1]
    values = {field: value for _, rows in sections for field, value, _ in rows}
    moving = [field for field in values if field.endswith("revision") and values[field] == "main"]
    unknown = [TEACHER_UNKNOWN] * ARMS[arm][2] + [*setting.data.unknown, *setting.unknown, SEEDS_UNKNOWN]
    lines = [
        f"# {name}: written by recipes/paper/generate.py, change it there. How to run it: docs/reproduce.md",
        "#",
        f"#     qtarget train --config recipes/paper/{name}.yaml --dry_run",
        "#",
        "# The steps of the relatives' trainers, whose gradients are summed over micro-batches before the clip:",
        "#",
        f"#     {' '.join(relatives(setting.data))}",
        "#",
        "# Beyond-Log-Likelihood: arXiv:2510.00526 and its code, github.com/GaotangLi/Beyond-Log-Likelihood.",
        "",
        _yaml({"name": name}),
    ]
    for heading, rows in sections:
        lines += [f"# --- {heading}", _yaml({field: value for field, value, _ in rows})]
    lines += ["# --- Where each value comes from", _yaml({"provenance": origins})]
    lines += ["# --- What nobody outside can know, and what is to be pinned"]
    lines += [_yaml({"to_pin": moving, "unknown": unknown})]
    return "\n".join(lines).rstrip() + "\n"


def _yaml(part: dict[str, Any]) -> str:
    """A line for each value; small mappings stay on it, the provenance and lists have a line for each entry."""
    lines = []
    for field, value in part.items():
        if field == "provenance":
            lines += ["provenance:", *(f"  {_line(*entry)}" for entry in value.items())]
        elif isinstance(value, list):
            lines += [f"{field}:", *(f"  - {_dump(entry)}" for entry in value)]
        else:
            lines.append(_line(field, value))
    return "\n".join(lines) + "\n"


def _line(field: str, value: Any) -> str:
    return f"{field}: {_dump(value)}"


def _dump(value: Any) -> str:
    written = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, width=10_000, allow_unicode=True, default_flow_style=True
    )
    return written.removesuffix("...\n").strip()


class _Dumper(yaml.SafeDumper):
    """With numbers that YAML reads as numbers, and text in double quotes where it needs any."""


def _number(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    """1.0e-8 and not 1e-08, which YAML reads as text."""
    digits, e, power = f"{value:g}".partition("e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", f"{float(digits)}e{int(power)}" if e else f"{value}")


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    needs_quotes = ": " in value or value in ("no",)
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if needs_quotes else None)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(float, _number)


def recipes() -> dict[str, str]:
    """{file name: text} of all 40."""
    return {f"{name_of(setting, arm)}.yaml": text(setting, arm) for setting in SETTINGS for arm in ARMS}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the files and write nothing")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to")
    args = parser.parse_args(argv)
    wanted = recipes()
    there = {file.name: file.read_text(encoding="utf-8") for file in args.out.glob("*.yaml")}
    if args.check:
        different = sorted(name for name in {**wanted, **there} if wanted.get(name) != there.get(name))
        print("\n".join(different) or f"{len(wanted)} recipes, as generate.py writes them")
        return int(bool(different))
    for name, written in wanted.items():
        (args.out / name).write_text(written, encoding="utf-8")
    for name in there.keys() - wanted.keys():
        print(f"{name} is none of the recipes; delete it")
    print(f"{len(wanted)} recipes in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
