"""Is the commit ready for release? Builds wheel and sdist, installs each away from the repository, and runs them.

    python scripts/release_check.py

Works on the last commit, needs the package index, and takes some minutes; the environments go into a folder that is
deleted. The files that were checked stay in build/release. Exits with 1 at the first check that fails, and names it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from environments import create, install_torch, pip
from lock import ROOT, pinned

DIST = ROOT / "build" / "release"
CONSTRAINTS = ROOT / "constraints.txt"
# In a folder without the repository: what the commands below read.
MAKE = """
import json, pathlib, tiny_models
tiny_models.save_trained(pathlib.Path("model"))
tiny_models.save_sums(pathlib.Path("sums.jsonl"))
pathlib.Path("data").mkdir()
rows = "".join(json.dumps(row) + "\\n" for row in tiny_models.conversation_dataset(8))
pathlib.Path("data/train.jsonl").write_text(rows)
recipe = {"model_name_or_path": "model", "teacher_model_name_or_path": "model", "dataset_name": "data",
          "target": {"preset": "target-sft", "eta": 0.5}, "max_steps": 3, "per_device_train_batch_size": 2,
          "learning_rate": 1e-3, "logging_steps": 1, "report_to": "none", "save_strategy": "no", "bf16": False,
          "output_dir": "run"}
pathlib.Path("recipe.yaml").write_text(json.dumps(recipe))  # YAML contains JSON
"""
CORE = """
import importlib.util, pathlib, torch, qtarget as qt
assert "site-packages" in pathlib.Path(qt.__file__).parts, qt.__file__
assert importlib.util.find_spec("transformers") is None
hidden, head, labels = torch.randn(5, 4), torch.randn(7, 4, requires_grad=True), torch.arange(5)
qt.linear_target_loss(hidden, head, labels, qt.preset("dft")).loss.backward()
assert head.grad.abs().sum() > 0
qt.induced_target(lambda z, y: torch.nn.functional.cross_entropy(z, y), torch.randn(5, 7), labels)
print(qt.__version__)
"""
HOST = """
import importlib.util, torch, qtarget as qt
from transformers import LlamaConfig, LlamaForCausalLM
assert importlib.util.find_spec("trl") is None
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                     num_attention_heads=4, num_key_value_heads=2))
ids = torch.arange(12).reshape(2, 6)
plain = model(input_ids=ids, labels=ids).loss
found = qt.apply_target(model, "sft")(input_ids=ids, labels=ids).loss
assert abs(plain - found) < 1e-5, (plain, found)
qt.remove_target(model)
qt.apply_target(model, "dft")(input_ids=ids, labels=ids).loss.backward()
assert model.lm_head.weight.grad.abs().sum() > 0
"""


class Failed(Exception):
    """A check that did not hold."""


def run(words: list[str], folder: Path, status: int = 0) -> str:
    """What a command prints, both streams. Raises Failed where it ends with another status."""
    alone = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    alone |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(words, cwd=folder, env=alone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != status:
        raise Failed(f"{' '.join(words)} ended with {done.returncode} instead of {status}:\n{done.stdout[-3000:]}")
    return done.stdout


def holds(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Failed(otherwise)


class Release:
    """The checks in their order; each leaves what the next ones need."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.source = folder / "source"
        self.wheel = self.sdist = Path()
        self.python = Path()

    def checkout(self) -> str:
        """The commit, in a folder of its own"""
        run(["git", "clone", "--quiet", "--depth", "1", ROOT.as_uri(), str(self.source)], self.folder)
        commit = run(["git", "log", "-1", "--format=%h of %cs"], self.source).strip()
        changed = run(["git", "status", "--porcelain"], ROOT)
        return commit + (", without the changes that are not committed" if changed else "")

    def build(self) -> str:
        """Wheel and sdist build"""
        tools = create(self.folder / "tools")
        run(pip(tools, "build", "twine"), self.folder)
        shutil.rmtree(DIST, ignore_errors=True)
        run([str(tools), "-m", "build", "--wheel", "--sdist", "--outdir", str(DIST), str(self.source)], self.folder)
        (self.wheel,), (self.sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
        return f"{self.wheel.name}, {self.sdist.name}"

    def metadata(self) -> str:
        """Metadata: twine, version, changelog"""
        tools = str(self.folder / "tools" / "bin" / "python")
        run([tools, "-m", "twine", "check", "--strict", str(self.wheel), str(self.sdist)], self.folder)
        version = self.version()
        changelog = (self.source / "CHANGELOG.md").read_text(encoding="utf-8")
        newest = re.findall(r"^## (.*)", changelog, re.M)[0]
        holds(bool(re.fullmatch(rf"{re.escape(version)} - \d{{4}}-\d\d-\d\d", newest)), f"CHANGELOG.md: {newest}")
        return f"{version}, as the newest entry of CHANGELOG.md"

    def contents(self) -> str:
        """The wheel holds the files of src/qtarget, and no others"""
        tracked = run(["git", "ls-files", "src/qtarget"], self.source).split()
        about = f"qtarget-{self.version()}.dist-info"
        beside = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
        expected = {path.removeprefix("src/") for path in tracked} | {f"{about}/{name}" for name in beside}
        found = {*zipfile.ZipFile(self.wheel).namelist()}
        holds(found == expected, f"missing {sorted(expected - found)}, not expected {sorted(found - expected)}")
        data = [path for path in tracked if not path.endswith(".py")]
        return f"{len(tracked)} files, {len(data)} of them data"

    def same(self) -> str:
        """The sdist builds the same wheel"""
        with tarfile.open(self.sdist) as archive:
            archive.extractall(self.folder / "unpacked", filter="data")
        (unpacked,) = (self.folder / "unpacked").iterdir()
        tools = str(self.folder / "tools" / "bin" / "python")
        run([tools, "-m", "build", "--wheel", "--outdir", str(self.folder / "again"), str(unpacked)], self.folder)
        one, other = zipfile.ZipFile(self.wheel), zipfile.ZipFile(self.folder / "again" / self.wheel.name)
        holds(one.namelist() == other.namelist(), "the two wheels hold different files")
        differing = [name for name in one.namelist() if one.read(name) != other.read(name)]
        holds(not differing, f"these files differ: {differing}")
        return f"{len(one.namelist())} files, byte for byte"

    def core_of_the_sdist(self) -> str:
        """pip install SDIST: the core with torch alone"""
        return self.core(self.sdist)

    def core_of_the_wheel(self) -> str:
        """pip install WHEEL: the core with torch alone"""
        return self.core(self.wheel)

    def core(self, file: Path) -> str:
        shutil.rmtree(self.folder / "venv", ignore_errors=True)
        self.python = create(self.folder / "venv")
        build = install_torch(self.python, pinned("torch"), CONSTRAINTS)
        self.install(str(file))
        version = run([str(self.python), "-c", CORE], self.folder).split()[-1]
        holds(version == self.version(), f"qtarget.__version__ is {version}")
        self.qtarget("--help")
        return f"torch's {build}; loss, gradient, induced target, --help"

    def missing(self) -> str:
        """A verb without its packages says how to install them"""
        (self.folder / "empty.yaml").write_text("model_name_or_path: model\n", encoding="utf-8")
        said = self.qtarget("train", "--config", "empty.yaml", status=2)
        holds('pip install "qtarget[train]"' in said and "Traceback" not in said, said)
        return said.strip().splitlines()[-1]

    def host(self) -> str:
        """qt.apply_target beside Transformers, without TRL"""
        self.install("transformers")
        run([str(self.python), "-c", HOST], self.folder)
        return "sft gives the model's own loss, dft a gradient"

    def train(self) -> str:
        """pip install WHEEL[train,peft,plots]: qtarget train, full and LoRA"""
        self.install(f"{self.wheel}[train,peft,plots]")
        shutil.copy(self.source / "tests" / "helpers" / "tiny_models.py", self.folder)
        run([str(self.python), "-c", MAKE], self.folder)
        self.qtarget("train", "--config", "recipe.yaml", "--dry_run")
        self.qtarget("train", "--config", "recipe.yaml")
        lora = ("--use_peft", "--lora_r", "4", "--output_dir", "lora")
        self.qtarget("train", "--config", "recipe.yaml", *lora)
        files = ("run/model.safetensors", "run/README.md", "lora/adapter_model.safetensors")
        lost = [name for name in files if not (self.folder / name).exists()]
        holds(not lost, f"not written: {lost}")
        steps = json.loads((self.folder / "run" / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        return f"{steps} steps each"

    def lens(self) -> str:
        """qtarget lens capture, then report"""
        self.qtarget("lens", "capture", "--config", "recipe.yaml", "-o", "capture")
        self.qtarget("lens", "report", "capture", "-o", "lens.html")
        return f"a page of {(self.folder / 'lens.html').stat().st_size // 1024} KB"

    def cache(self) -> str:
        """qtarget cache build, then doctor, then training from it"""
        self.qtarget("cache", "build", "--config", "recipe.yaml", "-o", "cache", "--k", "16")
        self.qtarget("cache", "doctor", "--config", "recipe.yaml", "--cache", "cache")
        self.qtarget("train", "--config", "recipe.yaml", "--teacher_cache", "cache", "--output_dir", "cached")
        return "16 tokens a label"

    def evaluation(self) -> str:
        """pip install WHEEL[eval]: qtarget eval, then compare"""
        self.install(f"{self.wheel}[eval]")
        asked = ("--n", "2", "--max_new_tokens", "8")
        for model in ("model", "run"):
            words = ("--model", model, "--tasks", "sums.jsonl", "--verifier", "math", *asked)
            self.qtarget("eval", *words, "-o", f"eval-{model}")
        self.qtarget("eval", "--model", "run", "--tasks", "chain_sum", "--problems", "3", *asked, "-o", "generated")
        self.qtarget("compare", "before=eval-model", "after=eval-run", "-o", "report")
        holds((self.folder / "report" / "compare.html").exists(), "report/compare.html was not written")
        return "a file's problems and generated ones"

    def version(self) -> str:
        return self.wheel.name.split("-")[1]

    def install(self, what: str) -> None:
        run(pip(self.python, "--constraint", str(CONSTRAINTS), what), self.folder)

    def qtarget(self, *words: str, status: int = 0) -> str:
        return run([str(self.python.parent / "qtarget"), *words], self.folder, status)

    def checks(self) -> list[Callable[[], str]]:
        built = [self.checkout, self.build, self.metadata, self.contents, self.same]
        installed = [self.core_of_the_sdist, self.core_of_the_wheel, self.missing, self.host]
        return [*built, *installed, self.train, self.lens, self.cache, self.evaluation]


def main() -> int:
    started = time.monotonic()
    print(f"release-check: Python {sys.version.split()[0]}, packages at the versions of constraints.txt", flush=True)
    with tempfile.TemporaryDirectory(prefix="release-") as folder:
        checks = Release(Path(folder)).checks()
        for check in checks:
            began, name = time.monotonic(), (check.__doc__ or "").strip()
            try:
                found = check()
            except (Failed, subprocess.CalledProcessError) as error:
                print(f"FAILED  {name}\n{error}\nrelease-check: failed at: {name}", file=sys.stderr)
                return 1
            print(f"ok  {name}: {found} ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"release-check: {len(checks)} checks passed in {time.monotonic() - started:.0f} s; the files are in {DIST}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
