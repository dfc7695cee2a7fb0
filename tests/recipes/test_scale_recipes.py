"""recipes/scale: Accelerate reads every file and makes of it what its name says. Nothing is launched."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp import StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

import tiny_models
from qtarget.cli.__main__ import main

FOLDER = Path(__file__).parents[2] / "recipes" / "scale"
FILES = sorted(FOLDER.glob("*x8.yaml"))
TYPES = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def launch(file: Path, *flags: str):
    """What ``accelerate launch`` hands to torchrun, and the variables it adds to the environment."""
    command = ["--config_file", str(file), *flags, "-m", "qtarget", "train", "--config", "recipe.yaml"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        own_launcher, environment = prepare_deepspeed_cmd_env(args)
        assert own_launcher is None  # torchrun, on each node
    else:
        environment = prepare_multi_gpu_env(args)
    return args, {name: value for name, value in environment.items() if os.environ.get(name) != value}


def unknown_keys(file: Path) -> set[str]:
    """Keys inside fsdp_config and deepspeed_config that no launcher option has: Accelerate passes over them silently."""
    config = load_config_from_file(str(file))
    known = set(vars(launch_command_parser().parse_args(["script.py"])))
    return {key for part in (config.fsdp_config, config.deepspeed_config) for key in part} - known


def process_of(file: Path, monkeypatch, *flags: str) -> None:
    """Take on the environment of a launched process."""
    for name, value in launch(file, *flags)[1].items():
        monkeypatch.setenv(name, value)


def test_one_and_four_nodes():
    assert [file.stem for file in FILES] == [
        "ddp_1x8",
        *(f"{kind}_{nodes}x8" for kind in ("fsdp2", "zero2", "zero3") for nodes in (1, 4)),
    ]


@every_file
def test_accelerate_reads_it_as_named(file):
    kind, nodes, gpus = re.fullmatch(r"(\w+)_(\d)x(\d)", file.stem).groups()
    config = load_config_from_file(str(file))
    assert config.distributed_type.value == TYPES[kind]
    assert config.num_machines == int(nodes)
    assert config.num_processes == int(nodes) * int(gpus)
    assert config.mixed_precision == "bf16"
    assert unknown_keys(file) == set()


@pytest.mark.parametrize("right, wrong", [("num_processes", "num_process"), ("fsdp_version", "fsdp_versoin")])
def test_a_wrong_key_is_seen(tmp_path, right, wrong):
    file = tmp_path / "wrong.yaml"
    file.write_text((FOLDER / "fsdp2_1x8.yaml").read_text().replace(right, wrong))
    if wrong.startswith("fsdp"):
        assert unknown_keys(file) == {wrong}
    else:
        with pytest.raises(ValueError, match=f"unknown keys.*{wrong}"):
            load_config_from_file(str(file))


@pytest.mark.parametrize("name", ["fsdp2_4x8", "zero2_4x8", "zero3_4x8", "ddp_1x8"])
def test_node_and_address_come_from_the_command_line(name):
    flags = ["--machine_rank", "2", "--main_process_ip", "10.0.0.1"]
    if name == "ddp_1x8":
        flags += ["--num_machines", "4", "--num_processes", "32", "--main_process_port", "29500"]
    args, _ = launch(FOLDER / f"{name}.yaml", *flags)
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("4", "8", 2)
    assert args.rdzv_endpoint == "10.0.0.1:29500"
    assert (args.module, args.training_script) == (True, "qtarget")
    assert args.training_script_args == ["train", "--config", "recipe.yaml"]


@pytest.mark.parametrize("name", ["fsdp2_1x8", "fsdp2_4x8"])
def test_fsdp2_plugin_of_a_process(name, monkeypatch):
    process_of(FOLDER / f"{name}.yaml", monkeypatch, "--machine_rank", "1", "--main_process_ip", "10.0.0.1")
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    assert plugin.cpu_ram_efficient_loading is True
    assert plugin.activation_checkpointing is False  # TRL's gradient_checkpointing is on: both are refused


@pytest.mark.parametrize("name", ["zero2_1x8", "zero2_4x8", "zero3_1x8", "zero3_4x8"])
def test_deepspeed_plugin_of_a_process(name, monkeypatch):
    process_of(FOLDER / f"{name}.yaml", monkeypatch, "--machine_rank", "1", "--main_process_ip", "10.0.0.1")
    config = DeepSpeedPlugin().deepspeed_config
    stage = int(name[4])
    assert config["zero_optimization"]["stage"] == stage
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is (stage == 3)
    filled_by_trainer = ("train_batch_size", "train_micro_batch_size_per_gpu")
    filled_by_trainer += ("gradient_accumulation_steps", "gradient_clipping")
    assert {config[key] for key in filled_by_trainer} == {"auto"}


def test_the_readme_names_every_file():
    text = (FOLDER / "README.md").read_text()
    assert {file.name for file in FOLDER.glob("*.yaml")} == set(re.findall(r"`(\w+\.yaml)`", text))


def test_torchrun_lines_set_what_the_launcher_sets():
    text = (FOLDER / "README.md").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("ACCELERATE_USE")]
    assert len(lines) == 3
    for line, name in zip(lines, ("fsdp2_1x8", "zero2_1x8", "zero3_1x8"), strict=True):
        told = dict(re.findall(r"([A-Z_0-9]+)=(\S+)", line))
        _, environment = launch(FOLDER / f"{name}.yaml")
        assert told.items() <= environment.items()


@pytest.mark.parametrize("gpus, accumulation", [(8, 8), (32, 2)])
def test_the_recipe_of_an_8b_student_and_a_32b_teacher(gpus, accumulation, tmp_path, capsys, hub_configs):
    """Checked by the dry run, on rows of our own; its figures are of the models' shapes."""
    tiny_models.conversation_dataset(300).to_json(tmp_path / "train.jsonl")
    words = f"--dataset_name {tmp_path} --dry_run --gpus {gpus} --gradient_accumulation_steps {accumulation}"
    status = main(["train", "--config", str(FOLDER / "8b_from_32b.yaml"), *words.split()])
    said = " ".join(capsys.readouterr().out.split())
    assert status == 0, said
    assert f"{gpus} GPUs x 1 rows x {accumulation} accumulations = 64 rows a step" in said
    assert "its shape is not known" not in said
