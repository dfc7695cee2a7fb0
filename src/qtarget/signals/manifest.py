"""``signal.json``: what a folder of signals was made from; can a run train on it?

The file is written when the work starts, with ``finished: false``, and again when the data files stand: a folder
without it, or with other settings, is somebody else's.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, with_config
from typing_extensions import TypedDict

from qtarget import __version__, files
from qtarget.errors import ConfigError, StorageError, loading
from qtarget.models.loading import load_tokenizer
from qtarget.teachers.fingerprints import Model, named, template_hash, tokenizer_hash

FILE = "signal.json"
# Settings of a run that decide which tokens a row becomes and which of them are labels.
PREPROCESSING = (
    "max_length",
    "truncation_mode",
    "completion_only_loss",
    "assistant_only_loss",
    "dataset_text_field",
    "eos_token",
)
# kind → the word after ``qtarget data``.
VERBS = {"weights": "weights", "old_logps": "oldlogps", "critical": "critical"}
# What two manifests of one command may differ in.
_RESULTS = ("finished", "rows", "dropped", "files", "report", "program")
_MEND = "make the folder again with qtarget data"


@with_config(**files.CLOSED)
class Source(TypedDict):
    """The dataset whose rows were measured, and how many each split has."""

    name: str | None
    config: str | None
    rows: dict[str, int]


@with_config(**files.CLOSED)
class Manifest(TypedDict):
    """``signal.json``: what every kind has; then what weights, what critical, and what a finished folder has."""

    kind: Literal["weights", "old_logps", "critical"]
    columns: Annotated[list[str], Field(min_length=1)]
    program: str
    model: Model
    tokenizer: str
    chat_template: str | None
    preprocessing: dict[str, Any]
    chat_template_path: str | None
    dataset: Source
    dtype: str | None
    finished: bool
    reference: NotRequired[Model]
    weights_temperature: NotRequired[float | None]
    verifier: NotRequired[str]
    verifier_timeout: NotRequired[float]
    alternatives: NotRequired[int]
    max_new_tokens: NotRequired[int]
    content: NotRequired[str]
    dropped: NotRequired[dict[str, int]]
    report: NotRequired[dict[str, Any]]
    rows: NotRequired[dict[str, int]]
    files: NotRequired[dict[str, str]]


# -- made from ---------------------------------------------------------------------------------------------------


def model_of(model: Any) -> Model:
    """A run's model as it starts. ``model``: TRL's ModelConfig."""
    return named(model.model_name_or_path, model.model_revision or "main")


def reference_of(config: Any, model: Any) -> Model:
    """A run's reference: its own, or the model as it starts."""
    if config.reference_model_name_or_path:
        return named(config.reference_model_name_or_path, config.reference_model_revision or "main")
    return model_of(model)


def tokenizer_of(config: Any, model: Any) -> Any:
    """A run's tokenizer with its chat template, loaded without the model.

    Tokens that a template cloned from elsewhere brings along are left out; the template's own hash tells them apart.

    Raises:
        ConfigError: it cannot be loaded.
    """

    def load(field: str, name: str, revision: str | None = None) -> Any:
        with loading(field, name, "tokenizer"):
            return load_tokenizer(name, revision, trust_remote_code=config.trust_remote_code)

    tokenizer = load("model_name_or_path", model.model_name_or_path, model.model_revision)
    path = config.chat_template_path
    if path and Path(path).is_file():
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    elif path:
        tokenizer.chat_template = load("chat_template_path", path).chat_template
    return tokenizer


def other_model(was: Model, now: Model) -> bool:
    """Told by the weights where both are known, for a folder may move; else by name and revision."""
    if was["weights"] and now["weights"]:
        return was["weights"] != now["weights"]
    return (was["name"], was["revision"]) != (now["name"], now["revision"])


def describe(kind: str, column: str, config: Any, model: Any, about: dict[str, Any]) -> dict[str, Any]:
    """The settings part of a manifest.

    Args:
        kind: weights, old_logps or critical. column: the one added to the rows.
        config: the run's QTargetConfig. model: TRL's ModelConfig. about: further settings of the verb.

    Raises:
        ConfigError: the tokenizer cannot be loaded.
    """
    tokenizer = tokenizer_of(config, model)
    return {
        "kind": kind,
        "columns": [column],
        "program": f"qtarget {__version__}",
        "model": model_of(model),
        "tokenizer": tokenizer_hash(tokenizer),
        "chat_template": template_hash(tokenizer),
        "preprocessing": {name: getattr(config, name) for name in PREPROCESSING},
        "chat_template_path": config.chat_template_path,
        **about,
    }


# -- writing -----------------------------------------------------------------------------------------------------


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Take a folder for a command, or go on in one that the same command left unfinished. Raises as ``free`` does."""
    free(folder, settings)
    if read(folder) is None:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / FILE, {**settings, "finished": False})


def free(folder: Path, settings: dict[str, Any]) -> None:
    """Whether a command may have a folder: it is empty, or the same command has begun there.

    Raises:
        StorageError: it holds anything else. ConfigError: another run; names the first setting that differs.
    """
    begun = read(folder)
    if begun is None:
        own = {files.partial_of(Path(FILE)).name}  # killed as it began
        if folder.exists() and (not folder.is_dir() or any(file.name not in own for file in folder.iterdir())):
            raise StorageError(f"output is {str(folder)!r}, which is not an empty folder; name another folder")
        return
    if begun["finished"]:
        raise StorageError(
            f"output is {str(folder)!r}, which holds finished rows of qtarget data {VERBS[begun['kind']]}; "
            "name another folder, or delete that one"
        )
    wanted = json.loads(json.dumps(settings))
    for name, now, was in files.differences(wanted, begun, ignored=_RESULTS):
        raise ConfigError(
            f"output is {str(folder)!r}, which holds an unfinished run with {name} {was!r}, and this one has {now!r}; "
            "resume with the settings it was started with, or name another folder"
        )


def finish(folder: Path, settings: dict[str, Any], tables: dict[str, Any], results: dict[str, Any]) -> None:
    """Write the splits and the finished manifest; a run that is killed here is unfinished.

    Args:
        tables: split → datasets.Dataset. results: what else the manifest says, such as counts.
    """
    digests = {}
    for split, table in tables.items():
        with files.whole(folder / f"{split}.parquet") as partial:
            table.to_parquet(partial)
        digests[f"{split}.parquet"] = checksum(folder / f"{split}.parquet")
    rows = {split: len(table) for split, table in tables.items()}
    files.write_json(folder / FILE, {**settings, **results, "rows": rows, "files": digests, "finished": True})


def checksum(file: Path) -> str:
    """sha256 of its bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# -- reading -----------------------------------------------------------------------------------------------------


def read(folder: str | Path) -> Manifest | None:
    """The manifest of a folder; None where there is none.

    Raises:
        StorageError: it cannot be read.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        return None
    manifest: Manifest = files.load(file, Manifest, _MEND)
    if manifest["finished"] and "files" not in manifest:
        raise StorageError(f"{file} cannot be read (it has no files); {_MEND}")
    if foreign := [name for name in manifest.get("files", {}) if not files.is_plain(name)]:
        raise StorageError(f"{file} cannot be read (files names {foreign[0]!r}, which is not a file in it); {_MEND}")
    return manifest


def check(folder: str | Path, config: Any, model: Any) -> list[str]:
    """Sentences on why a run may not train on a folder of signals, what matters most first; none where it may.

    A column that the run's target does not read is not looked at.

    Args:
        config: the run's QTargetConfig. model: TRL's ModelConfig.
    """
    folder = Path(folder)
    try:
        manifest = read(folder)
        if manifest is None:
            return []
        if not manifest["finished"]:
            return [
                f"dataset_name is {str(folder)!r}, which qtarget data {VERBS[manifest['kind']]} has not finished; run "
                "the same command again, it resumes where it stopped"
            ]
        faults = _changed_files(folder, manifest)
        if model.model_name_or_path and _is_read(manifest, config):
            faults += _differences_from_run(folder, manifest, config, model)
        return faults
    except ConfigError as error:
        return error.faults


def _changed_files(folder: Path, manifest: Manifest) -> list[str]:
    faults = []
    for name, digest in manifest["files"].items():
        if not (folder / name).is_file():
            what = "is missing; restore it"
        elif checksum(folder / name) != digest:
            what = "was changed since it was written; restore the original"
        else:
            continue
        faults.append(
            f"dataset_name is {str(folder)!r}, whose file {name} {what}, or {_MEND} {VERBS[manifest['kind']]}"
        )
    return faults


def _is_read(manifest: Manifest, config: Any) -> bool:
    requires = config.resolve_objective().requires | config.resolve_eval_objective().requires
    if manifest["kind"] != "weights":
        return True  # the rows are token ids: another tokenizer would train on other text, whatever the target
    return "weight" in requires and (config.weights == "online") == ("reference_logp" in manifest["columns"])


def _differences_from_run(folder: Path, manifest: Manifest, config: Any, model: Any) -> list[str]:
    kind, column, was, faults = manifest["kind"], manifest["columns"][0], manifest["model"], list[str]()

    def differs(now: str, made_with: str, mend: str) -> None:
        faults.append(
            f"{now}, but column {column} of {str(folder)!r} was made with {made_with}; {mend}, or make it again: "
            f"qtarget data {VERBS[kind]}"
        )

    tokenizer = tokenizer_of(config, model)
    if tokenizer_hash(tokenizer) != manifest["tokenizer"]:
        now = f"model_name_or_path is {model.model_name_or_path!r}"
        differs(now, f"another tokenizer, that of {was['name']!r}", "train a model with that tokenizer")
    if kind == "weights":
        if template_hash(tokenizer) != manifest["chat_template"]:
            template = manifest["chat_template_path"] or "the tokenizer's own, of " + was["name"]
            now = f"chat_template_path is {config.chat_template_path!r}"
            differs(now, f"another chat template ({template})", "name that template")
        for name, before in manifest["preprocessing"].items():
            if before != (value := getattr(config, name)):
                differs(f"{name} is {value!r}", f"{before!r}, so it belongs to other tokens", "set it to that")
    if kind == "old_logps" and "old_policy" in config.resolve_objective().requires and config.psft_refresh == "never":
        start = model_of(model)
        if other_model(was, start):
            differs(
                f"model_name_or_path is {start['name']!r}",
                f"{was['name']!r}, and psft starts from the model its old log-probabilities are of",
                "train that model",
            )
        # A row cut at its beginning once more leaves tokens without what their log-probabilities were measured after.
        longest, before = config.max_length, manifest["preprocessing"]["max_length"]
        if config.truncation_mode == "keep_end" and longest is not None and (before is None or longest < before):
            now = f"max_length is {longest} and truncation_mode 'keep_end'"
            differs(now, f"max_length {before}: its rows would lose their beginnings", "set it to that")
    if column == "reference_logp" and other_model(manifest["reference"], reference := reference_of(config, model)):
        differs(
            f"the reference is {reference['name']!r}",
            repr(manifest["reference"]["name"]),
            "name that one in reference_model_name_or_path",
        )
    return faults
