"""Other libraries' settings for an objective, read with that library's defaults.

Each reader returns the target and a note saying what the spelling became. A spelling that no preset gives exactly is
refused with the nearest one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qtarget.errors import ConfigError, check_range
from qtarget.targets import presets
from qtarget.targets.schedule import ScheduledTarget
from qtarget.targets.target import Target


@dataclass(frozen=True)
class Spelling:
    """A peer's spelling, read: the target, and a note for the user on what it became."""

    target: Target
    note: str


def _switch(flag: str, peer: str, build: Callable[[Mapping], Target], *parameters: str, caveat: str = ""):
    """A boolean flag with parameters beside it."""

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
        target = build(config)
        return Spelling(target, f"{flag} ({peer}) is read as {target}{caveat}")

    return (flag, *parameters), read


def _owned(name: str, flag: str, config: Mapping) -> bool:
    """Whether another flag that shares this parameter is there, be it false."""
    return any(name in keys and config.get(keys[0]) is not None for keys, _ in _READERS if keys[0] != flag)


def _asft_mode(config: Mapping) -> Spelling | None:
    mode, weight = config.get("mode"), config.get("kl_weight")
    if mode is None:
        if weight is not None:
            raise ConfigError(
                f"kl_weight is {weight!r} without mode; write target: {{preset: asft, kl_weight: {weight}}}"
            )
        return None
    kl_weight = 0.1 if weight is None else weight
    if mode in ("sft", "dft"):
        target = presets.build(mode)
    elif mode in ("sft+kl", "asft"):
        target = presets.build("sft-kl" if mode == "sft+kl" else "asft", kl_weight=kl_weight)
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
    if direction == "middle" or isinstance(threshold, (list, tuple)):
        if direction != "middle" or not isinstance(threshold, (list, tuple)) or len(threshold) != 2:
            raise ConfigError(f"prob_threshold is {threshold!r}; 'middle' takes two numbers, the other directions one")
        target = presets.build("profit", direction="middle", tau_low=threshold[0], tau_high=threshold[1])
    else:
        target = presets.build("profit", tau=threshold, direction=direction or "higher")
    return Spelling(target, f"prob_threshold (ProFiT) is read as {target}")


def _objective_trans(config: Mapping) -> Spelling | None:
    spelled = config.get("objective_trans")
    if spelled is None:
        return None
    if spelled in ("original", "logp"):
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
    return Spelling(target, f"objective_trans: {spelled} (Beyond-Log-Likelihood) is read as {target}")


def _number(config: Mapping, key: str, default: float) -> float:
    value = config.get(key)
    return default if value is None else check_range(key, value)


_MEAN = "; LLaMA-Factory averages it per micro-batch, here the denominator is the one of this run"

# (the keys a reader owns, the first being its flag; the reader)
_READERS: list[tuple[tuple[str, ...], Callable[[Mapping], Spelling | None]]] = [
    _switch("use_dft_loss", "LLaMA-Factory", lambda config: presets.build("dft")),
    _switch("enable_dft_loss", "ms-swift", lambda config: presets.build("dft")),
    _switch("liger_use_token_scaling", "axolotl with Liger", lambda config: presets.build("dft")),
    _switch(
        "use_eaft_loss",
        "LLaMA-Factory",
        lambda config: presets.build("eaft", power=_number(config, "eaft_alpha", 1.0), normalizer=3.0),
        "eaft_alpha",
    ),
    _switch(
        "use_eaft",
        "axolotl",
        lambda config: presets.build(
            "eaft",
            top_k=20 if config.get("eaft_k") is None else config["eaft_k"],
            power=_number(config, "eaft_alpha", 1.0),
            normalizer="none",
        ),
        "eaft_alpha",
        "eaft_k",
        caveat=", whose trust reaches log k, about three times the paper's",
    ),
    _switch(
        "use_asft_loss",
        "LLaMA-Factory",
        lambda config: presets.build("asft", kl_weight=_number(config, "asft_alpha", 0.1)),
        "asft_alpha",
        caveat=_MEAN,
    ),
    (("mode", "kl_weight"), _asft_mode),
    (("loss", "gem_beta", "gem_h"), _gem),
    (("prob_threshold", "threshold_direction"), _profit),
    (("objective_trans",), _objective_trans),
]

KEYS: frozenset[str] = frozenset(key for keys, _ in _READERS for key in keys)


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
