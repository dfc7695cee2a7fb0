"""qtarget plan: its operations against counted ones, its memory against measured memory, its refusals."""

import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

import qtarget as qt
import tiny_models
from hub_configs import CONFIGS
from qtarget.cli import __main__ as cli
from qtarget.planning import flops, memory, shapes
from qtarget.planning.shapes import Shape

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "recipes" / "paper"
DISK = json.loads((ROOT / "benchmarks" / "results" / "cache.json").read_text())["disk"]
MEASURED = next(line["bytes_per_token"] for line in DISK if (line["k"], line["dtype"]) == (64, "float16"))
SMALL = Shape(4, 64, 128, 4, 2, 16, 1000, True)


@pytest.fixture(scope="module")
def benchmark():
    """benchmarks/plan.py as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("benchmark_of_plan", ROOT / "benchmarks" / "plan.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def plan(capsys, *words) -> tuple[int, str, str]:
    """(exit status, output, errors) of ``qtarget plan``."""
    capsys.readouterr()
    status = cli.main(["plan", *map(str, words)])
    said, errors = capsys.readouterr()
    return status, " ".join(said.split()), errors


# -- operations ----------------------------------------------------------------------------------------------------


def test_a_forward_and_a_backward_pass_are_those_torch_counts():
    length, rows = 48, 3
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        attn_implementation="eager",
    )
    model = AutoModelForCausalLM.from_config(config).model
    ids = torch.randint(0, 1000, (rows, length))
    with FlopCounterMode(display=False) as once:
        out = model(input_ids=ids).last_hidden_state
    # Eager attention forms all scores, which is twice what a causal mask needs.
    wanted = flops.forward(SMALL, rows * length, 2 * length)
    assert once.get_total_flops() == pytest.approx(wanted, rel=0.01)
    with FlopCounterMode(display=False) as back:
        out.sum().backward()
    assert back.get_total_flops() == pytest.approx(2 * wanted, rel=0.01)


@pytest.mark.parametrize("teacher", [False, True])
def test_the_engines_products_are_those_torch_counts(teacher):
    hidden = torch.randn(40, 64, requires_grad=True)
    weight = torch.randn(1000, 64, requires_grad=True)
    labels = torch.randint(0, 1000, (40,))
    labels[:8] = -100
    other = {"teacher": qt.Head(torch.randn(40, 64), torch.randn(1000, 64))} if teacher else {}
    in_place = {torch.ops.aten.addmm_: lambda into, a, b, **kwargs: 2 * a[0] * a[1] * b[1]}  # which torch leaves out
    with FlopCounterMode(display=False, custom_mapping=in_place) as counted:
        target = qt.preset("target-sft" if teacher else "sft")
        qt.linear_target_loss(hidden, weight, labels, target, **other).loss.backward()
    parts = flops.of_step(flops.Work(SMALL, 40, 40, 32, [SMALL] if teacher else []))
    assert counted.get_total_flops() == pytest.approx(parts["student head"] + parts["teacher head"])


def test_parts_of_a_step():
    usual = flops.of_step(flops.Work(SMALL, 100, 50, 60, [SMALL]))
    assert usual["student backward"] == 2 * usual["student forward"] == 2 * usual["recomputation"]
    assert usual["teacher"] == usual["student forward"]
    assert 3 * usual["teacher head"] == usual["student head"]
    share = (usual["teacher"] + usual["teacher head"]) / sum(usual.values())
    assert flops.teacher_share(usual) == pytest.approx(share) and 0.1 < share < 0.3
    frozen = flops.of_step(flops.Work(SMALL, 100, 50, 60, adapters=True, checkpointing=False, copies=1))
    assert frozen["student backward"] == frozen["student forward"] and not frozen["recomputation"]
    once = frozen["student forward"] + flops.head(SMALL, 60)
    assert frozen["student head"] == 2 * flops.head(SMALL, 60) and frozen["reference and copies"] == once
    average = flops.of_step(flops.Work(SMALL, 100, 50, 60, own_teacher=True))
    assert (average["teacher"], average["teacher head"]) == (usual["teacher"], usual["teacher head"])


# -- memory --------------------------------------------------------------------------------------------------------


def test_the_recorded_measurements_are_within_the_limit_of_todays_formulas(benchmark):
    record = json.loads(benchmark.RESULTS.read_text())
    assert {case["case"] for case in record["cases"]} == set(benchmark.CASES)
    for entry in record["cases"]:
        now = benchmark.planned(benchmark.CASES[entry["case"]], record["vocab"])
        for figure, measured in entry["measured"].items():
            assert now[figure] == pytest.approx(measured, rel=benchmark.LIMIT), (entry["case"], figure)


def test_the_documentation_shows_the_recorded_measurements(benchmark):
    lines = ["| run | figure | planned, MB | measured, MB | off by |", "|---|---|---|---|---|"]
    for entry in json.loads(benchmark.RESULTS.read_text())["cases"]:
        for figure, measured in entry["measured"].items():
            planned, off = entry["planned"][figure], entry["off"][figure]
            lines.append(f"| {entry['case']} | {figure} | {planned / 1e6:.0f} | {measured / 1e6:.0f} | {off:+.1%} |")
    table = "\n".join(lines)
    text = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    shown = text.split("results/plan.json -->\n")[1].split("\n<!-- end of measured")[0]
    assert shown == table, f"write this into docs/plan.md:\n{table}"


def test_a_measured_run_is_within_the_limit(benchmark, tmp_path):
    """In a process of its own, with a vocabulary of 320: nearly all of it activations."""
    tiny_models.tokenizer().save_pretrained(tmp_path / benchmark.MODEL)
    found = benchmark.measured("17M sft", tmp_path)
    wanted = benchmark.planned(benchmark.CASES["17M sft"], len(tiny_models.tokenizer()))
    assert wanted["peak"] == pytest.approx(found["peak"], rel=benchmark.LIMIT)


def test_what_shrinks_memory_shrinks_the_estimate(hub_configs):
    shape = shapes.find("model", "meta-llama/Llama-3.1-8B")

    def most(kind="fsdp2", gpus=8, **settings):
        return memory.peak(memory.Workload(shape, gpus, 8192, **settings), kind)

    usual = most()
    assert most(gpus=16) < usual < most("zero2") < most("ddp")
    assert most(checkpointing=False) > usual > most(trained=memory.adapter_parameters(shape, 16, "all-linear"))
    assert most(teachers=[(shape, 2)]) > usual + 2 * shape.parameters // 8
    assert most("ddp", repeats_heads=False, checkpointing=False) < most("ddp", checkpointing=False)
    assert most("ddp", states=0) == most("ddp") - 8 * shape.parameters
    assert most("ddp", copies=1) == most("ddp") + 4 * shape.parameters


def test_adapters_are_counted_as_peft_makes_them():
    from peft import LoraConfig, get_peft_model

    shape = shapes.of_config(tiny_models.llama().config)
    for modules in (None, "all-linear", ["q_proj", "down_proj"]):
        with torch.device("meta"):
            bare = AutoModelForCausalLM.from_config(tiny_models.llama().config)
        model = get_peft_model(bare, LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM"))
        wanted = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert memory.adapter_parameters(shape, 4, modules) == wanted, modules
    assert memory.adapter_parameters(shape, 4, ["strange"]) is None


def test_states_of_optimisers():
    asked = ("adamw_torch_fused", "adamw_bnb_8bit", "sgd", "lion_32bit", "galore_adamw")
    assert [memory.optimiser_states(name) for name in asked] == [(2, None), (2, 1), (0, None), (1, None), None]
    work = memory.Workload(SMALL, 1, 64, bytes=2)
    assert memory.estimate(work, "ddp")["optimiser"] == 4 * SMALL.parameters
    # Accelerate's FSDP2 makes float32 of trained weights; an 8-bit state is a byte wherever it is.
    assert memory.estimate(work, "fsdp2")["optimiser"] == 8 * SMALL.parameters
    eight = memory.Workload(SMALL, 1, 64, bytes=2, state_bytes=1)
    assert (
        memory.estimate(eight, "fsdp2")["optimiser"]
        == memory.estimate(eight, "ddp")["optimiser"]
        == 2 * SMALL.parameters
    )


# -- the verb ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def at_hand(tmp_path_factory) -> Path:
    """A config whose model, teacher and data are folders."""
    root = tmp_path_factory.mktemp("plan")
    tiny_models.llama().save_pretrained(root / "model")
    tiny_models.tokenizer().save_pretrained(root / "model")
    (root / "data").mkdir()
    rows = [{**row, "weight": 0.5} for row in tiny_models.conversation_dataset(8).to_list()]
    (root / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model_name_or_path": str(root / "model"),
        "teacher_model_name_or_path": str(root / "model"),
        "target": "target-sft",
        "dataset_name": str(root / "data"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3,
        "max_length": 64,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "output_dir": str(root / "run"),
    }
    (root / "config.yaml").write_text(yaml.safe_dump(settings))
    return root


@pytest.mark.parametrize("name, target", [("m23k_llama-3.1-8b", "target-sft"), ("numina-67k_qwen2.5-math-1.5b", "sft")])
def test_paper_recipes_without_a_network(name, target, capsys, tmp_path, monkeypatch, hub_configs):
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("what the hub's cache has is not asked for"))
    file = tmp_path / "plan.json"
    recipe = ["--config", PAPER / f"{name}.yaml", "--target", target, "--gpus", 8, "--gpu_memory", 80]
    status, said, errors = plan(capsys, *recipe, "--tflops", 400, "--json", file)
    assert (status, errors) == (0, "")
    figures = json.loads(file.read_text())
    assert figures["step"]["rows"] == 256 and figures["steps"] in (91, 264)
    assert figures["flops"] == figures["steps"] * sum(figures["step"]["flops"].values())
    assert figures["gpu_hours"] == pytest.approx(figures["flops"] / 400e12 / 3600)
    assert figures["memory"]["fsdp2"]["fits"] and "FSDP2: fits" in said
    assert (target == "target-sft") == (figures["cache"] is not None)
    # The documentation shows these very lines.
    shown = " ".join((ROOT / "docs" / "plan.md").read_text().split())
    status, said, _ = plan(capsys, *recipe)
    assert said in shown


def test_rows_at_hand_are_measured_as_training_prepares_them(at_hand, capsys, tmp_path):
    before = sorted(at_hand.rglob("*"))
    file = tmp_path / "plan.json"
    words = ["--config", at_hand / "config.yaml", "--gpus", 1, "--gpu_memory", 4]
    status, said, errors = plan(capsys, *words, "--json", file)
    assert (status, errors) == (0, "")
    assert sorted(at_hand.rglob("*")) == before, "nothing is written beside the run"
    figures = json.loads(file.read_text())
    ids = [
        tiny_models.tokenizer().apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
        for row in tiny_models.conversation_dataset(8)
    ]
    lengths = [len(row) for row in ids]
    assert figures["row"]["tokens"] == sum(lengths) / 8
    padded = [max(pair) for pair in itertools.combinations(lengths, 2)]  # two are trained together, any two
    assert figures["row"]["with_padding"] == pytest.approx(sum(padded) / len(padded), rel=1e-12)
    assert 0 < figures["row"]["supervised"] < figures["row"]["tokens"]
    assert figures["steps"] == 6 and figures["step"]["rows"] == 4
    cache = figures["cache"]
    each = cache["bytes_per_token"]
    assert each == pytest.approx(MEASURED, rel=1e-3), "what a cache of 64 tokens was measured to take"
    assert cache["bytes"] == pytest.approx(8 * figures["row"]["supervised"] * each)
    assert cache["passes"] == pytest.approx(3)
    assert cache["most"]["ddp"] < figures["memory"]["ddp"]["most"]
    assert "this run asks about each row 3.00 times" in said
    saved = 2 * cache["build_flops"] / figures["flops"]
    assert f"a cache saves {saved:.1%} of it" in said


@pytest.mark.parametrize(
    ("quantisation", "bits"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8),
        ({"quant_method": "gptq", "bits": 4}, 4),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, 4),
        ({"quant_method": "bitsandbytes", "_load_in_8bit": True}, 8),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}, 8),
        ({"quant_method": "mxfp4"}, 4),
        ({"quant_method": "mxfp4", "dequantize": True}, None),
        ({"quant_method": "quanto", "weights": "int2"}, 2),
        ({"quant_method": "somebodys"}, None),
    ],
    ids=str,
)
def test_bits_of_a_quantised_model(quantisation, bits):
    assert shapes.quantised_by(quantisation)[1] == bits


@pytest.mark.parametrize("where", ["config.json", "init_kwargs"])
def test_a_quantised_teacher_is_counted_as_it_is_held(where, at_hand, capsys, tmp_path):
    """Its layers at 8 or 4 bits, embedding and head in full; a method without known bits is told."""
    file, words = tmp_path / "plan.json", ["--config", at_hand / "config.yaml", "--gpus", 1]
    teacher = shutil.copytree(at_hand / "model", tmp_path / "teacher")
    config = json.loads((teacher / "config.json").read_text())
    given = {"config.json": {"quant_method": "fp8"}, "init_kwargs": None}[where]
    (teacher / "config.json").write_text(json.dumps(config | ({"quantization_config": given} if given else {})))
    if where == "init_kwargs":
        words += ["--teacher_model_init_kwargs", '{"load_in_4bit": true}']
    words += ["--teacher_model_name_or_path", teacher]
    assert plan(capsys, *words, "--json", file)[0] == 0
    shape = shapes.find("model", str(at_hand / "model"))
    rest = shape.parameters - shape.root_parameters
    held = json.loads(file.read_text())["memory"]["ddp"]["parts"]["teacher"]
    assert held == 4 * shape.root_parameters + rest // (1 if given else 2)
    said = plan(capsys, *words)[1]
    assert "layers quantised by" in said and "the scales of teacher" in said
    (teacher / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "somebodys"}}))
    status, said, _ = plan(capsys, "--config", at_hand / "config.yaml", "--teacher_model_name_or_path", teacher)
    assert (
        status == 0
        and "quantised by somebodys: they are counted in full, because its bits are not known" in " ".join(said.split())
    )


def test_what_is_told_of_the_rows_wins(at_hand, capsys, tmp_path):
    file = tmp_path / "plan.json"
    words = ["--config", at_hand / "config.yaml", "--gpus", 2, "--row_tokens", 40, "--supervised_tokens", 10]
    assert plan(capsys, *words, "--json", file)[0] == 0
    figures = json.loads(file.read_text())
    assert (figures["row"]["tokens"], figures["row"]["supervised"]) == (40, 10)
    assert plan(capsys, *words, "--packing", "true", "--json", file)[0] == 0
    packed = json.loads(file.read_text())
    assert packed["step"]["tokens"] == pytest.approx(8 * 64), "a packed row is full"
    assert packed["step"]["supervised"] == pytest.approx(8 * 64 / 4)


def test_other_targets_need_other_forwards(at_hand, capsys, tmp_path):
    file = tmp_path / "plan.json"

    def parts(*words):
        status, said, errors = plan(capsys, "--config", at_hand / "config.yaml", "--gpus", 1, *words, "--json", file)
        assert status == 0, errors
        figures = json.loads(file.read_text())
        return figures, figures["step"]["flops"], said

    figures, step, _ = parts("--target", "sft")
    assert step["teacher"] == 0 and figures["cache"] is None
    _, asft, _ = parts("--target", "asft")
    assert asft["reference and copies"] == pytest.approx(step["student forward"] + step["student head"] / 3)
    weighted = parts("--target", "iw-sft", "--denominator", "kept", "--weights", "column")[1]
    assert weighted == step, "a weight changes no product"
    words = ["--teacher_ema_decay", "0.99", "--target", "kd", "--teacher_model_name_or_path", "none"]
    figures, average, said = parts(*words)
    assert average["teacher"] == step["student forward"] and figures["cache"] is None
    assert "which cannot be cached" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--gpus", 0], "gpus is 0; use a whole number from 1"),
        (["--gpus", "two"], "gpus is 'two'; use a whole number from 1"),
        (["--gpu_memory", -1], "gpu_memory is -1; use a number above 0"),
        (["--gpu_memory", "nan"], "gpu_memory is nan; use a number"),
        (["--gpu_memory", "much"], "gpu_memory is 'much'; use a number"),
        (["--tflops", 0], "tflops is 0; use a number above 0"),
        (["--k", 0], "k is 0; use a whole number from 1"),
        (["--supervised_tokens", 5], "supervised_tokens is 5 without row_tokens; give row_tokens"),
        (["--row_tokens", 4, "--supervised_tokens", 5], "supervised_tokens is 5, more than row_tokens, 4; give"),
        (["--gpus"], "--gpus has no value; write --gpus VALUE"),
        (["--max_length", "none"], "max_length is not set, so rows have any length; set it"),
        (["--model_name_or_path", "nobody/has-this-model", "--target", "sft"], "the shape of nobody/has-this-model is"),
        (["--model_name_or_path", "./nowhere"], "model_name_or_path is './nowhere', which is not a folder here"),
        (["--json", "/nowhere/at/all.json"], "json is '/nowhere/at/all.json', which cannot be written"),
        (["--num_layers", 3], "num_layers"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_input_gets_one_sentence(words, sentence, at_hand, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, _, errors = plan(capsys, "--config", at_hand / "config.yaml", *words)
    assert status == 2
    assert len(errors.splitlines()) == 1 and sentence in errors, errors


class Hub(BaseHTTPRequestHandler):
    """One model's config.json, and nothing else; every address that was asked for is noted."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self):
        self.asked.append(self.path)
        body = json.dumps(CONFIGS["Qwen/Qwen3-1.7B-Base"]).encode() if self.path.endswith("/config.json") else b""
        self.send_response(200 if body else 404)
        for name, value in {"ETag": '"1"', "X-Repo-Commit": "0" * 40, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD

    def log_message(self, *args):
        pass


def test_a_config_is_asked_of_the_hub(tmp_path):
    """Of a server that speaks its protocol, by a process that has no cache."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
        }
        words = ["plan", "--config", str(PAPER / "openr1-15k_qwen3-1.7b.yaml"), "--target", "sft"]
        command = [sys.executable, "-m", "qtarget", *words]
        ran = subprocess.run(command, env=os.environ | home, capture_output=True, text=True)
        server.shutdown()
    assert ran.returncode == 0, ran.stderr
    assert "Qwen/Qwen3-1.7B-Base, revision main; 1.72 billion parameters" in ran.stdout
    files = {path for path in Hub.asked if "/resolve/" in path}
    asked = {f"/Qwen/Qwen3-1.7B-Base/resolve/main/{name}" for name in ("config.json", "adapter_config.json")}
    assert files == asked


def test_help(capsys):
    assert plan(capsys, "--help")[1].startswith("usage: qtarget plan --config FILE")
    assert plan(capsys)[0] == 0
