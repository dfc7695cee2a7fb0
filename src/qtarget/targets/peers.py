"""Other libraries' settings for an objective, read with that library's defaults.

Each reader returns the target and a note saying what the spelling became. A spelling that no preset gives exactly is
refused with the nearest one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qtarget.errors import ConfigError, check_range, unknown
from qtarget.targets import presets, trust
from qtarget.targets.divergence import as_divergence
from qtarget.targets.schedule import ScheduledTarget
from qtarget.targets.target import Target


@dataclass(frozen=True)
class Spelling:
    """A peer's spelling, read: the target, and a note for the user on what it became."""

    target: Target
    note: str


def _switch(flag: str, peer: str, build: Callable[[Mapping], tuple[Target, str]], *parameters: str):
    """A boolean flag with parameters beside it. ``build``: to the target, and how to say it."""

    def read(config: Mapping) -> Spelling | None:
        if config.get(flag) is None:
            stray = [name for name in parameters if config.get(name) is not None and not _owned(name, flag, config)]
            if stray:
                raise ConfigError(f"{stray[0]} is {config[stray[0]]!r} without {flag}: true; add it, or use target:")
            return None
        if config[flag] not in (True, False):
            raise ConfigError(f"{flag} is {config[flag]!r}; use true or false")
        if not config[flag]:
            return None
        target, words = build(config)
        return Spelling(target, f"{flag} ({peer}) is read as {words}")

    return (flag, *parameters), read


def _owned(name: str, flag: str, config: Mapping) -> bool:
    """Whether another flag that shares this parameter is there, be it false."""
    return any(name in keys and config.get(keys[0]) is not None for keys, _ in _READERS if keys[0] != flag)


def _said(target: Target, caveat: str = "") -> tuple[Target, str]:
    return target, f"{target}{caveat}"


def _asft_mode(config: Mapping) -> Spelling | None:
    """``kl_direction`` is of unsloth's port (its pull request #4239); the repository is forward only."""
    mode, weight, direction = (config.get(key) for key in ("mode", "kl_weight", "kl_direction"))
    if mode is None:
        for key, parameter in (("kl_weight", "kl_weight"), ("kl_direction", "direction")):
            if (value := config.get(key)) is not None:
                raise ConfigError(
                    f"{key} is {value!r} without mode; write target: {{preset: asft, {parameter}: {value}}}"
                )
        return None
    if direction not in (None, "forward", "reverse"):
        raise unknown("kl_direction", direction, ("forward", "reverse"))
    if mode in ("sft", "dft"):
        target = presets.build(mode)
    elif mode in ("sft+kl", "asft"):
        numbers = {"kl_weight": 0.1 if weight is None else weight, "direction": direction or "forward"}
        target = presets.build("sft-kl" if mode == "sft+kl" else "asft", **numbers)
    else:
        raise ConfigError(f"mode is {mode!r}; the ASFT repository knows sft, dft, sft+kl and asft")
    return Spelling(target, f"mode: {mode} (ASFT repository) is read as {target}")


def _gem(config: Mapping) -> Spelling | None:
    loss, beta, h = (config.get(key) for key in ("loss", "gem_beta", "gem_h"))
    if loss is None and beta is None and h is None:
        return None
    if loss == "ce":
        return Spelling(presets.build("sft"), "loss: ce (GEM repository) is read as sft")
    if loss not in (None, "gem", "gem_triton"):
        raise ConfigError(f"loss is {loss!r}; the GEM repository knows ce, gem and gem_triton; otherwise use target:")
    if loss == "gem_triton" and h == "logsigmoid":
        raise ConfigError("loss is 'gem_triton' with gem_h 'logsigmoid'; that kernel is linear only, use loss: gem")
    target = presets.build("gem", beta=0.7 if beta is None else beta, h="linear" if h is None else h)
    return Spelling(target, f"the GEM repository's settings are read as {target}")


def _profit(config: Mapping) -> Spelling | None:
    threshold, direction = config.get("prob_threshold"), config.get("threshold_direction")
    if threshold is None and direction is None:
        return None
    if threshold is None:
        raise ConfigError(f"threshold_direction is {direction!r} without prob_threshold; add it (the recipe's is 0.1)")
    if direction == "random":
        raise ConfigError(
            "threshold_direction is 'random'; no preset drops tokens at random, the nearest is target: profit"
        )
    if isinstance(threshold, str):  # as the repository's shell passes it
        threshold = _numbers("prob_threshold", threshold)
    if direction == "middle" or isinstance(threshold, (list, tuple)):
        if direction != "middle" or not isinstance(threshold, (list, tuple)) or len(threshold) != 2:
            raise ConfigError(f"prob_threshold is {threshold!r}; 'middle' takes two numbers, the other directions one")
        target = presets.build("profit", direction="middle", tau_low=threshold[0], tau_high=threshold[1])
    else:
        target = presets.build("profit", tau=threshold, direction=direction or "higher")
    return Spelling(target, f"prob_threshold (ProFiT) is read as {target}")


def _objective_trans(config: Mapping) -> Spelling | None:
    spelled, peer = config.get("objective_trans"), "Beyond-Log-Likelihood"
    if spelled is None:
        return None
    if spelled == "DEFT":
        target, peer = presets.build("deft"), "DEFT"
    elif spelled == "Cayley_Trans":
        raise ConfigError(
            "objective_trans is 'Cayley_Trans'; its weight depends on the mean p_y of a micro-batch, so splitting a "
            "batch differently would change the gradient; the nearest is target: deft"
        )
    elif spelled in ("original", "logp"):
        target = presets.build("sft")
    elif spelled == "p":
        target = presets.build("beyond-log", alpha=1.0)
    elif isinstance(spelled, str) and spelled.startswith("GeneralFamily-"):
        try:
            alpha = float(spelled.removeprefix("GeneralFamily-"))
        except ValueError:
            raise ConfigError(f"objective_trans is {spelled!r}; write a number, as in GeneralFamily-8") from None
        target = presets.build("beyond-log", alpha=check_range("objective_trans", alpha))
    else:
        raise ConfigError(
            f"objective_trans is {spelled!r}; its thresholded forms divide by the kept tokens, which no preset does; "
            "the nearest is target: {preset: profit, tau: 0.1}; exact are original, logp, p and GeneralFamily-ALPHA"
        )
    return Spelling(target, f"objective_trans: {spelled} ({peer}) is read as {target}")


_GKD = ("rlhf_type", "lmbda", "beta", "temperature", "seq_kd", "sft_alpha", "gkd_logits_topk")
_AXOLOTL_KD = ("kd_ce_alpha", "kd_alpha", "kd_temperature", "kd_beta", "kd_normalize_topk")
_TOP_K = (
    "it renormalises both models over the teacher's top k and never teaches the rest; a teacher_cache keeps the k "
    "likeliest with their tail: leave it out"
)


def _gkd(config: Mapping) -> Spelling | None:
    """TRL's ``GKDTrainer`` and ms-swift's ``rlhf_type: gkd``, on a fixed dataset."""
    given = {key: config[key] for key in _GKD if config.get(key) is not None}
    if not given:
        return None
    peer = "ms-swift" if "rlhf_type" in given else "TRL"
    _refuse_other_gkd(given, peer)
    label_weight, beta = _number(config, "sft_alpha", 0.0, low=0), _number(config, "beta", 0.5, low=0, high=1)
    temperature, caveat = 1.0, "; its temperature is only for sampling" if "temperature" in given else ""
    if peer == "ms-swift":  # which divides both models' logits by it
        temperature, caveat = _number(config, "temperature", 0.9, low=0, open_low=True), _per_micro_batch(peer)
    if temperature != 1 and beta != 0:
        raise ConfigError(
            f"temperature is {temperature:g} (ms-swift's default is 0.9) with beta {beta:g}; a temperature other than "
            "1 works only with beta: 0; set temperature: 1"
        )
    target, words = _distilled(label_weight, 1.0, temperature, beta)
    return Spelling(target, f"beta: {beta:g} ({peer}) is read as {words}{caveat}")


def _refuse_other_gkd(given: Mapping, peer: str) -> None:
    """Raise ConfigError where it is no distillation on a fixed dataset and the full vocabulary."""
    if given.get("rlhf_type", "gkd") != "gkd":
        raise ConfigError(f"rlhf_type is {given['rlhf_type']!r}; only gkd can be read, use target: for another")
    if peer == "TRL" and (stray := {"sft_alpha", "gkd_logits_topk"} & given.keys()):
        raise ConfigError(f"{min(stray)} is {given[min(stray)]!r} without rlhf_type: gkd; add it, or use target:")
    if peer == "TRL" and "lmbda" not in given:
        key = next(iter(given))
        raise ConfigError(
            f"{key} is {given[key]!r} without lmbda: 0, which makes it TRL's GKD on a fixed dataset; add it, or write a "
            "preset's own parameters inside target:"
        )
    if _number(given, "lmbda", 0.5) != 0:
        raise ConfigError(
            f"lmbda is {given.get('lmbda', 'not set, which ms-swift reads as 0.5')}; that share of the data would be "
            "written by the student, but qtarget trains on a fixed dataset only: set lmbda: 0"
        )
    if given.get("seq_kd"):
        raise ConfigError(
            "seq_kd is true; here the teacher writes no completions; train on rows that it has already written"
        )
    if "gkd_logits_topk" in given:
        raise ConfigError(f"gkd_logits_topk is {given['gkd_logits_topk']!r}; {_TOP_K}")


def _axolotl_kd(config: Mapping) -> tuple[Target, str]:
    for key in ("kd_ce_alpha", "kd_alpha"):
        if config.get(key) is None:
            raise ConfigError(f"kd_trainer is true without {key}, which axolotl requires; add it")
    if config.get("kd_normalize_topk"):
        raise ConfigError(f"kd_normalize_topk is {config['kd_normalize_topk']!r}; {_TOP_K}")
    label_weight, kd_weight = (_number(config, key, 0.0, low=0, high=1) for key in ("kd_ce_alpha", "kd_alpha"))
    temperature = _number(config, "kd_temperature", 1.0, low=0, open_low=True)
    target, words = _distilled(label_weight, kd_weight, temperature, _number(config, "kd_beta", 0.0, low=0, high=1))
    if temperature != 1:
        words += " (axolotl has T² in what it logs, not in what it trains)"
    return target, f"{words}; axolotl leaves out what is beyond the teacher's top k, here the tail counts"


def _distilled(label_weight: float, kd_weight: float, temperature: float, beta: float) -> tuple[Target, str]:
    """label_weight · CE + kd_weight · D(t^T, p^T) and how to say it; D by TRL's beta, without T² before it."""
    divergence = "forward_kl" if beta == 0 else "reverse_kl" if beta == 1 else {"jsd": {"beta": beta}}
    target = presets.build("kd-hybrid", kd_weight=kd_weight, temperature=temperature, divergence=divergence)
    if temperature == 1 and math.isclose(label_weight + kd_weight, 1):
        target = target if label_weight else presets.build("kd", divergence=divergence)
        return target, str(target)
    rule = trust.anchored(trust.constant(label_weight), kd_weight / temperature**2)
    at = "" if temperature == 1 else f" at temperature {temperature:g}, without T² before it"
    beside = f"{label_weight:g} sft + " if label_weight else ""
    return replace(target, trust=rule), f"{beside}{kd_weight:g} {as_divergence(divergence)}{at}"


def _axolotl_eaft(config: Mapping) -> tuple[Target, str]:
    top_k = 20 if config.get("eaft_k") is None else config["eaft_k"]
    target = _eaft(config, top_k=top_k, normalizer="none")
    return _said(target, "" if target.name == "sft" else ", whose trust reaches log k, about three times the paper's")


def _eaft(config: Mapping, **numbers: object) -> Target:
    """At eaft_alpha 0 every weight is 1, and no entropy is needed."""
    power = _number(config, "eaft_alpha", 1.0)
    return presets.build("sft") if power == 0 else presets.build("eaft", power=power, **numbers)


def _number(config: Mapping, key: str, default: float, **limits: Any) -> float:
    value = config.get(key)
    return default if value is None else check_range(key, value, **limits)


def _numbers(key: str, text: str) -> float | list[float]:
    """What a shell passes: one number, or several with commas between them."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{key} is {text!r}; write a number, or two as in 0.3,0.7") from None
    return values[0] if len(values) == 1 else values


def _per_micro_batch(peer: str) -> str:
    return f"; {peer} averages it per micro-batch, here the denominator is the one of this run"


def _asft_flag(config: Mapping) -> tuple[Target, str]:
    target = presets.build("asft", kl_weight=_number(config, "asft_alpha", 0.1))
    return _said(target, _per_micro_batch("LLaMA-Factory"))


# (the keys a reader owns, the first being its flag; the reader)
_READERS: list[tuple[tuple[str, ...], Callable[[Mapping], Spelling | None]]] = [
    _switch("use_dft_loss", "LLaMA-Factory", lambda config: _said(presets.build("dft"))),
    _switch("enable_dft_loss", "ms-swift", lambda config: _said(presets.build("dft"))),
    _switch("liger_use_token_scaling", "axolotl with Liger", lambda config: _said(presets.build("dft"))),
    _switch("use_eaft_loss", "LLaMA-Factory", lambda config: _said(_eaft(config, normalizer=3.0)), "eaft_alpha"),
    _switch("use_eaft", "axolotl", _axolotl_eaft, "eaft_alpha", "eaft_k"),
    _switch("use_asft_loss", "LLaMA-Factory", _asft_flag, "asft_alpha"),
    _switch("kd_trainer", "axolotl", _axolotl_kd, *_AXOLOTL_KD),
    (("mode", "kl_weight", "kl_direction"), _asft_mode),
    (("loss", "gem_beta", "gem_h"), _gem),
    (("prob_threshold", "threshold_direction"), _profit),
    (("objective_trans",), _objective_trans),
    (_GKD, _gkd),
]

KEYS: frozenset[str] = frozenset(key for keys, _ in _READERS for key in keys)
FLAGS: frozenset[str] = frozenset(keys[0] for keys, _ in _READERS)


def refuse_strays(spelled: Iterable[str], others: Iterable[str]) -> None:
    """Raise ConfigError where other keys stand beside a peer's: the nearest of those that go with it is offered."""
    known = {key for keys, _ in _READERS for key in keys if not {*keys}.isdisjoint(spelled)}
    for key in others:
        raise unknown(f"key next to {next(iter(spelled))}", key, known)


def read(config: Mapping, target: object = None) -> Spelling | None:
    """The objective that peers' keys in ``config`` spell, or None where there are none.

    Args:
        config: peers' keys with their values; others are passed over.
        target: what is written beside them as a target, if anything: it must mean the same.

    Raises:
        ConfigError: the keys contradict each other or ``target``, or spell something no preset gives exactly.
    """
    read_ones = [spelling for _, reader in _READERS if (spelling := reader(config)) is not None]
    if not read_ones:
        return None
    if any(one.target != read_ones[0].target for one in read_ones):
        raise ConfigError(
            f"the settings name different objectives: {'; '.join(one.note for one in read_ones)}; keep one"
        )
    spelled = read_ones[0]
    if target is not None:
        beside = ScheduledTarget.read(target)
        if beside.schedules or beside.final != spelled.target:
            raise ConfigError(f"target is {target!r}, but {spelled.note}; keep one of them")
    return spelled
