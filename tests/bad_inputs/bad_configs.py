"""Config files, flags, folders and names."""

from __future__ import annotations

from bench import Case, setting

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(8)
)


def text(id: str, wrong: str, content: str | bytes, *says: str) -> Case:
    """A config file of this text."""
    return Case(id, wrong, lambda bench: ["train", "--config", bench.file("c.yaml", content)], says)


def flags(id: str, wrong: str, words: list[str], *says: str) -> Case:
    return Case(id, wrong, lambda bench: bench.train(*words), says)


CASES = [
    setting(
        "a-misspelt-dataset",
        "a folder that is not there",
        "dataset_name is './datax', which cannot be loaded: no such folder exists here",
        dataset_name="./datax",
    ),
    setting(
        "a-misspelt-dataset-without-a-slash",
        "it could be a hub id",
        "dataset_name is 'dataa', which cannot be loaded",
        dataset_name="dataa",
    ),
    setting(
        "a-misspelt-file",
        "a file that is not there",
        "dataset_name is 'rows.jsonl', which cannot be loaded: no such file exists here",
        dataset_name="rows.jsonl",
    ),
    Case(
        "a-dataset-that-is-nearly-there",
        "one letter more",
        lambda b: b.train(dataset_name=b.world / "dataa"),
        ("no such folder exists here; did you mean", "/data'?"),
    ),
    *(
        Case(
            f"a-misspelt-folder-for-{words[0]}",
            "a folder that is not there",
            lambda b, words=words, own=own: [*words, "--config", b.config(**own)],
            (
                f"{[*own][-1]} is './modelx'",
                "not a folder here" if words[0] == "plan" else "no such folder exists here",
            ),
        )
        for words, own in (
            (["verify"], {"model_name_or_path": "./modelx"}),
            (["teacher", "check"], {"target": "kd", "teacher_model_name_or_path": "./modelx"}),
            (["plan", "--gpus", "1"], {"model_name_or_path": "./modelx"}),
        )
    ),
    Case(
        "a-misspelt-folder-for-eval",
        "a folder that is not there",
        lambda b: [
            *("eval", "--model", "./modelx", "--tasks", b.world / "sums.jsonl", "--verifier", "choice"),
            *("-o", b.folder / "results"),
        ],
        ("model is './modelx', which cannot be loaded: no such folder exists here",),
    ),
    # the file
    Case(
        "no-file",
        "no such file",
        lambda b: ["train", "--config", b.folder / "no.yaml"],
        ("config is", "no.yaml", "cannot be read"),
    ),
    Case("a-folder", "a folder", lambda b: ["train", "--config", b.folder], ("config is", "cannot be read")),
    Case(
        "config-without-a-value",
        "--config at the end",
        lambda b: ["train", "--config"],
        ("config", "write --config FILE"),
    ),
    Case(
        "a-nul-in-the-name",
        "NUL in the file's name",
        lambda b: ["train", "--config", "a\0b.yaml"],
        ("config is", "cannot be read"),
    ),
    text("not-yaml", "a list that is not closed", "target: [dft\nmax_steps: 1", "which is not YAML at line 2"),
    text("a-tab", "a tab for indentation", "target:\n\tpreset: dft", "which is not YAML at line 2"),
    text("a-list", "a list of settings", "- target: dft", "holds a list; write lines of name: value"),
    text("a-word", "one word", "dft", "holds a str; write lines of name: value"),
    text("empty", "nothing in it", "", "model_name_or_path is not set", "dataset_name is not set"),
    text("latin-1", "not UTF-8", "run_name: caf\xe9".encode("latin-1"), "config is", "not UTF-8", "save it as UTF-8"),
    text("bytes", "a picture", b"\x89PNG\r\n\x1a\n\x00\x00", "config is", "not UTF-8"),
    text("a-control-character", "a bell", "run_name: a\x07b", "config is", "which is not YAML"),
    text("two-documents", "two documents", "target: dft\n---\ntarget: sft", "which is not YAML at line 2"),
    text(
        "a-python-object",
        "a tag that would run code",
        "target: !!python/object/apply:os.system [echo hi]",
        "which is not YAML at line 1",
        "could not determine a constructor",
    ),
    text(
        "laughs", "aliases that unfold to a billion words", LAUGHS + "target: *i", "unfold to more than", "write it out"
    ),
    text("a-circle", "an alias inside itself", "target: &t {preset: *t}", "holds itself", "write it out"),
    text(
        "twice", "a key twice", "target: dft\nmax_steps: 1\ntarget: sft", "target appears twice", "line 3", "keep one"
    ),
    text(
        "twice-inside",
        "a key twice in a target",
        "target: {preset: eaft, top_k: 3, top_k: 5}",
        "top_k appears twice",
        "keep one",
    ),
    text("deep", "ten thousand brackets", "target: " + "[" * 10_000, "config is", "nested"),
    text("a-key-that-is-a-list", "a list as a key", "[1, 2]: 3\n", "config is"),
    text("a-date-for-a-key", "another type as a key", "2026-01-01: 3", "unknown key in", "2026-01-01"),
    # flags
    flags("a-word-alone", "a word that belongs to nothing", ["--max_steps", "1", "--", "x"], "unknown flag"),
    flags("an-unknown-flag", "a typo", ["--learning_rat", "1"], "--learning_rat; did you mean learning_rate?"),
    flags("a-flag-without-a-value", "a number is missing", ["--learning_rate"], "learning_rate is True; use a number"),
    flags(
        "yaml-in-a-flag",
        "brackets that do not close",
        ["--target", "{preset: dft"],
        "target is '{preset: dft', which is not YAML",
    ),
    flags("deep-yaml-in-a-flag", "a thousand brackets", ["--target", "[" * 5000], "target", "nested"),
    Case(
        "a-lone-word",
        "no dashes",
        lambda b: ["train", "max_steps"],
        ("'max_steps' belongs to no setting; write settings as --name value",),
    ),
    Case("an-unknown-verb", "a typo", lambda b: ["trian"], ("verb is 'trian'; did you mean 'train'?",)),
    Case(
        "gpus-outside-a-dry-run",
        "a setting of the dry run",
        lambda b: b.train("--gpus", "8"),
        ("gpus is '8' without --dry_run",),
    ),
    Case(
        "no-gpus", "zero GPUs", lambda b: b.train("--dry_run", "--gpus", "0"), ("gpus is 0; use a whole number from 1",)
    ),
    # folders
    setting("no-model", "no model named", "model_name_or_path is not set", model_name_or_path=None),
    setting("no-dataset", "no dataset named", "dataset_name is not set", dataset_name=None),
    setting("a-nul-in-output-dir", "NUL in a folder's name", "output_dir is 'a\\x00b'", output_dir="a\0b"),
    setting("a-long-output-dir", "a name of 5,000 letters", "output_dir is", output_dir="x" * 5000),
    Case(
        "output-dir-under-a-file",
        "a file in the way",
        lambda b: b.train(output_dir=b.file("f", "") / "run"),
        ("output_dir is", "cannot be written; choose a folder you own"),
    ),
    Case(
        "output-dir-is-a-file",
        "a file",
        lambda b: b.train(output_dir=b.file("f", "")),
        ("output_dir is", "cannot be written; choose a folder you own"),
    ),
    Case(
        "output-dir-of-another-run",
        "a run that is there",
        lambda b: b.train(output_dir=b.copy("stopped")),
        ("output_dir is", "holds another run (checkpoint-1)", "--resume_from_checkpoint true"),
    ),
    setting(
        "a-run-name-that-climbs",
        "a path out of the folder",
        "run_name is '../../etc/cron.d/x'; use a name without",
        run_name="../../etc/cron.d/x",
    ),
    setting("an-absolute-run-name", "an absolute path", "run_name is '/etc/x'; use a name without", run_name="/etc/x"),
    setting(
        "a-run-name-with-a-nul",
        "NUL",
        "run_name is 'a\\x00b', which holds a NUL character; remove it",
        run_name="a\0b",
    ),
]
