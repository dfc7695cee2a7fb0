"""axolotl 0.19: a target in its trainer, by ``plugins`` in its YAML."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, model_validator
from transformers import Trainer

from qtarget.data.columns import columns_for
from qtarget.errors import ConfigError, faults_of, loading, raise_together, unknown
from qtarget.hub import nowhere
from qtarget.integrations.callback import TargetCallback
from qtarget.models.loading import load_tokenizer
from qtarget.targets.schedule import ScheduledTarget
from qtarget.teachers.vocabulary import vocabulary_difference

try:
    from axolotl.integrations.base import BasePlugin
except ImportError:  # only axolotl makes a plugin; settings and checks can be read without it
    BasePlugin = object

_NAME = f"{__name__}.QTargetPlugin"
# axolotl's own losses: a target would replace some of them in silence, others would replace the target.
_LOSSES = (
    "chunked_cross_entropy",
    "flash_attn_cross_entropy",
    "kd_trainer",
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "orpo_alpha",
    "process_reward_model",
    "reward_model",
    "rl",
    "use_eaft",
)
_PARALLEL = ("context_parallel_size", "sequence_parallel_degree")
# A trainer class with a compute_loss in neither of these computes its own. The callback would not notice one that still
# asks the model and adds to its loss.
_ASK_THE_MODEL = ("axolotl.core.trainers.base", "transformers.trainer")


class QTargetArgs(BaseModel):
    """The plugin's keys in axolotl's YAML; the rest of the YAML is checked for settings that would train another loss.

    Attributes:
        qtarget_target: what to learn, as in a qtarget recipe: a preset's name or its YAML form.
        qtarget_teacher, qtarget_reference: names or paths of models, for a target that needs them.
        qtarget_vocab_size: number of tokens in the tokenizer, if the head is padded beyond them.
        qtarget_backend: as in ``qtarget.linear_target_loss``.
    """

    qtarget_target: str | dict[str, Any] | None = None
    qtarget_teacher: str | None = None
    qtarget_reference: str | None = None
    qtarget_vocab_size: int | None = None
    qtarget_backend: str = "auto"

    @model_validator(mode="before")
    @classmethod
    def check_qtarget(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Refuse what cannot be trained, with all faults in one message.

        Raises:
            ConfigError: a misspelt key, an invalid target, or another loss.
        """
        if _in_use(data):
            raise_together([*_key_faults(data), *_target_faults(data), *_loss_faults(data)])
        return data


def _in_use(settings: Any) -> bool:
    """axolotl also asks the plugins of an earlier run in the same process."""
    return _NAME in (settings.get("plugins") or [])


def _key_faults(data: dict[str, Any]) -> list[str]:
    ours = [*QTargetArgs.model_fields]
    strays = [key for key in data if str(key).startswith("qtarget_") and key not in ours]
    return [fault for key in strays for fault in unknown("key", key, ours).faults]


def _target_faults(data: dict[str, Any]) -> list[str]:
    written = data.get("qtarget_target")
    if written is None:
        return [f"{_NAME} is among the plugins without a target; set qtarget_target, as in qtarget_target: dft"]
    if faults := faults_of(ScheduledTarget.read, written):
        return [f"qtarget_target: {fault}" for fault in faults]
    target = ScheduledTarget.read(written)
    faults = [
        f"target {target} reads the column {column!r}, which axolotl does not bring to its batches; use QTargetTrainer"
        for column in columns_for(target.requires)
    ]
    if "teacher" in target.requires and not data.get("qtarget_teacher"):
        faults.append(f"target {target} needs a teacher; name one in qtarget_teacher")
    for key in ("qtarget_teacher", "qtarget_reference"):
        if data.get(key) and (why := nowhere(data[key])):
            faults.append(f"{key} is {data[key]!r}, which cannot be loaded: {why}")
    return faults


def _loss_faults(data: dict[str, Any]) -> list[str]:
    found = [f"{key} is {data[key]!r}" for key in _LOSSES if data.get(key)]
    cut = [name for name in data["plugins"] if name.endswith("CutCrossEntropyPlugin")]
    if data.get("cut_cross_entropy", True):
        found += [f"plugins has {name}" for name in cut]
    faults = [f"{one}, a loss of axolotl's own beside qtarget_target; keep one of the two" for one in found]
    return faults + [
        f"{key} is {data[key]!r}, which cuts each sequence into pieces; a target needs it whole, so leave {key} out"
        for key in _PARALLEL
        if (data.get(key) or 1) > 1
    ]


class QTargetPlugin(BasePlugin):
    """Trains a target in axolotl's own trainer.

    Name it in ``plugins``; its settings are keys of the same file (``QTargetArgs``). ``qtarget.TargetCallback`` applies
    the target when the trainer is created: after adapters are added, and before anything wraps the model.

    Raises:
        ConfigError: an invalid setting, or one of axolotl's own losses.
    """

    def get_input_args(self) -> str:
        return f"{__name__}.{QTargetArgs.__name__}"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[TargetCallback]:
        if not _in_use(cfg):
            return []
        written = cfg.qtarget_target
        others = {name: cfg[f"qtarget_{name}"] for name in ("teacher", "reference", "vocab_size", "backend")}
        # axolotl's own mapping answers None for a key that is not there
        return [TargetCallback(written if isinstance(written, str) else written.to_dict(), **others)]

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:
        if not _in_use(cfg):
            return
        refuse_another_loss(trainer)
        if teacher := cfg.qtarget_teacher:
            with loading("qtarget_teacher", teacher, "tokenizer"):
                tokenizer = load_tokenizer(teacher)
            if difference := vocabulary_difference(trainer.processing_class, tokenizer):
                raise ConfigError(
                    f"qtarget_teacher is {teacher!r}, which has another tokenizer: {difference}; use a teacher of the "
                    "same family"
                )


def refuse_another_loss(trainer: Trainer) -> None:
    """Raise where a trainer would train anything but the loss that its model returns.

    Raises:
        ConfigError: a class or a function that computes a loss, or label smoothing.
    """
    owner = next(kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind))
    if owner.__module__ not in _ASK_THE_MODEL:
        raise ConfigError(
            f"the trainer class {owner.__module__}.{owner.__qualname__} computes a loss of its own, so that the target "
            "would not be trained; leave out trainer_cls or the plugin that brings it"
        )
    for name in ("compute_loss_func", "label_smoother"):
        if getattr(trainer, name, None) is not None:
            raise ConfigError(f"the trainer has a {name}, which computes another loss than qtarget_target; turn it off")
