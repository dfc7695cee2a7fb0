"""What docs/security.md promises. Files that would run code, climb or damage are in tests/bad_inputs too."""

from __future__ import annotations

import ast
import logging
import re
import sys
from itertools import product
from pathlib import Path

import pytest

import qtarget as qt
import tiny_models
from qtarget import files
from qtarget.errors import ConfigError
from qtarget.lens import page
from qtarget.targets.yaml_form import names_code
from qtarget.teachers.context import Context
from quick_runs import quick_trainer, tokenised_dataset

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
# Where a name becomes a module: targets, losses and graders that the user wrote, and qtarget's own lazy names and verbs.
IMPORTERS = {"__init__.py", "cli/__main__.py", "targets/parts.py", "evaluation/graders.py"}


# -- nothing in the source unpickles, evaluates or imports what it should not -----------------------------------------


def unsafe(text: str) -> list[str]:
    """Calls that would run what a file says."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if (
            name in ("eval", "exec", "os.system", "os.popen", "__import__")
            or given.get("shell") == "True"
            or re.fullmatch(r"(pickle|cPickle|dill|joblib|marshal|shelve)\.(load|loads|open|Unpickler)", name)
            or (name == "torch.load" and given.get("weights_only") != "True")
            or (name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False")
            or re.fullmatch(r"yaml\.(load|load_all|unsafe_load|full_load|Loader|UnsafeLoader|FullLoader)", name)
            or name in ("Environment", "jinja2.Environment", "Template", "jinja2.Template")
            or name.endswith((".extractall", "unpack_archive"))
        ):
            found.append(name)
    return found


@pytest.mark.parametrize("file", SOURCES, ids=[str(file.relative_to(ROOT / "src" / "qtarget")) for file in SOURCES])
def test_nothing_runs_what_a_file_says(file):
    text = file.read_text(encoding="utf-8")
    assert not unsafe(text)
    if "import_module" in text:
        assert str(file.relative_to(ROOT / "src" / "qtarget")) in IMPORTERS


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(f)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(t, Loader=yaml.Loader)",
        "eval(t)",
        "exec(t)",
        "subprocess.run(t, shell=True)",
        "jinja2.Environment()",
        "shutil.unpack_archive(f)",
    ],
)
def test_the_search_finds_it(line):
    assert unsafe(line)


def test_what_transformers_reads_of_a_checkpoint_is_read_as_weights_only():
    """The installed version's own lines: docs/security.md says so."""
    import transformers.trainer as theirs

    text = Path(theirs.__file__).read_text(encoding="utf-8")
    calls = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads")
    ]
    assert calls
    for call in calls:
        assert {word.arg: ast.unparse(word.value) for word in call.keywords}.get("weights_only") == "True"
    assert "training_args.bin" not in re.sub(r"#.*", "", text).replace('TRAINING_ARGS_NAME = "training_args.bin"', "")


# -- code by name ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ("dft", False),
        ("this:s", True),
        ({"preset": "this:s"}, True),
        ({"trust": "this:s", "residual": "student"}, True),
        ({"trust": 0.5, "residual": [{"this:s": {}}]}, True),
        ({"a": {"preset": "this:s"}, "b": "sft"}, True),
        ({"preset": "target-sft", "eta": {"schedule": "linear", "from": 0, "to": 1}}, False),
    ],
)
def test_code_in_a_target_is_seen(config, code):
    assert names_code(config) is code
    assert "this" not in sys.modules


def test_remote_code_is_off_and_told_where_it_is_on(tmp_path, caplog):
    data = tokenised_dataset(tiny_models.conversation_dataset(4))
    off = quick_trainer(tiny_models.llama(), tmp_path / "off", data, target="sft")
    assert off.args.trust_remote_code is False
    assert "trust_remote_code" not in off.describe()
    with caplog.at_level(logging.WARNING, logger="qtarget"):
        on = quick_trainer(
            tiny_models.llama(), tmp_path / "on", data, target="sft", trust_remote_code=True, max_steps=1
        )
        on.train()
    assert "trust_remote_code is on" in on.describe()
    on.create_model_card(model_name="on")
    card = (tmp_path / "on" / "README.md").read_text(encoding="utf-8")
    assert "trust_remote_code is on: code that came with the model was run" in card


def test_remote_code_of_a_teacher_is_told():
    from qtarget.training.saving.run_identity import trusted_code

    args = qt.QTargetConfig(
        "x", target="kd", teacher_model_name_or_path="a/b", teacher_model_init_kwargs={"dtype": "auto"}
    )
    assert trusted_code(args) == []
    args.teacher_model_init_kwargs = {"trust_remote_code": True}
    assert trusted_code(args) == ["the teacher"]


# -- templates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ prompt.__class__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ [1] * 10 ** 10 }}",
    ],
)
def test_a_context_template_cannot_climb_or_fill_the_memory(template):
    context = Context({"prompt": template}, tiny_models.tokenizer())
    with pytest.raises(ConfigError, match=r"teacher_context\.prompt"):
        context._render("prompt", {"prompt": "1 + 1?"}, {})


def test_a_context_template_may_still_do_arithmetic():
    context = Context({"prompt": "{{ '-' * 3 }}{{ 2 ** 10 }}{{ prompt }}"}, tiny_models.tokenizer())
    assert context._render("prompt", {"prompt": "?"}, {}) == "---1024?"


# -- pages -----------------------------------------------------------------------------------------------------------

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style><svg onload=alert(1)>", "&lt;b&gt;"]


@pytest.mark.parametrize("text", HOSTILE)
def test_the_lens_page_holds_hostile_text_as_data(text):
    block = page._json({"text": text, text: 1})
    assert "<" not in block
    import json

    assert json.loads(block) == {"text": text, text: 1}


# -- names that lead out of a folder ----------------------------------------------------------------------------------

CLIMBING = ["..", "../x", "../../etc/passwd", "/etc/passwd", "a/../../b", "a/b", "a\\b", "..\\x", "", ".", "a\0b"]


@pytest.mark.parametrize("name", CLIMBING)
def test_a_task_s_name_is_a_file_s_name(name):
    assert not files.is_plain(name)


@pytest.mark.parametrize("name", ["sums", "t[*]", "tom & ann", "...", "a..b", "naïve"])
def test_an_ordinary_name_is_taken(name):
    assert files.is_plain(name)


@pytest.mark.parametrize("name", ["../x", "..", "/x", "a/../../b", "C:\\x", "..\\x", "a\nb", "a\0b"])
def test_a_run_s_name_leads_nowhere(name):
    with pytest.raises(ConfigError, match="run_name is"):
        qt.QTargetConfig("x", run_name=name)


@pytest.mark.parametrize("name", ["dft, lr 1e-5", "org/project", "2026-11-25"])
def test_an_ordinary_run_name_is_taken(name):
    assert qt.QTargetConfig("x", run_name=name).run_name == name


@pytest.mark.parametrize(("name", "what"), list(product(["../x", "/etc/passwd", "a/b", "..\\x"], ["shard", "index"])))
def test_a_cache_reads_files_of_its_folder_only(name, what, tmp_path):
    from qtarget.teachers.cache import shards

    (tmp_path / "x").write_bytes(b"1234")
    folder = tmp_path / "cache"
    folder.mkdir()
    said = shards.fault(folder, {"file": name, "bytes": 4, "checksum": ""})
    assert said is not None and "only a name without folders is read" in said
