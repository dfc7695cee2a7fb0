"""``qtarget targets``: shows the targets: as a table, one in full, or side by side.

What each trusts, where the rest of the probability goes, defaults, what it needs and where it comes from.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from qtarget.cli import terminal
from qtarget.cli.arguments import NAME, TEXT, Option, Verb, only
from qtarget.errors import ConfigError, raise_together, unknown

if TYPE_CHECKING:
    from torch import Tensor

    from qtarget.targets import Target
    from qtarget.targets.presets.entry import Preset

VERB = Verb("targets", __doc__, bare=True)
_JSON = Option("json", "as JSON")
_PROBABILITIES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
_COLUMNS = 60
_OTHERS = 999  # tokens beside the label where weights are compared, each as likely as the next


@VERB.command(
    _JSON,
    Option("group", "only those of one group: label, selection, anchor, distillation, own", NAME),
    Option("search", "only those whose name, summary, formula or source contains this text", TEXT),
)
def every(options: Any) -> int:
    """All of them, one per line."""
    from rich.text import Text

    from qtarget.targets import presets
    from qtarget.targets.presets.entry import GROUPS

    if options.group not in (None, *GROUPS):
        raise unknown("group", options.group, GROUPS)
    records = [_record(name) for name in presets.names()]
    records = [record for record in records if options.group in (None, record["group"])]
    if options.search is not None:
        searched = [record for record in records if _mentions(record, options.search)]
        if not searched:
            names = (record["name"] for record in records)
            raise ConfigError(f"search is {options.search!r}, which none of these contains: {', '.join(names)}")
        records = searched
    if options.json:
        print(terminal.as_json(records), end="")
        return 0
    headings = ("target", "trusts", "the rest goes to", "needs", "source")
    table = terminal.table(*headings, left=headings, overflow="fold")
    for group in GROUPS:
        if of_group := [record for record in records if record["group"] == group]:
            table.add_row(Text(f"{group}:", style="bold"))
        for record in of_group:
            needs = ", ".join(record["needs"]) or "-"
            cells = (record["name"], record["trusts"], record["rest"], needs, record["source"])
            table.add_row(*map(Text, cells))  # a bracket in it is no markup
    console = terminal.console(80)
    console.print(table)
    console.print("\nformula and parameters: qtarget targets show NAME", style="dim")
    return 0


@VERB.command(_JSON, word="show", takes="NAME")
def one(options: Any) -> int:
    """Shows one in full, or a target of your own: my_pkg.my_module:my_target."""
    record = _record(only(options.words, "one target, as in: qtarget targets show target-sft"))
    if options.json:
        print(terminal.as_json(record), end="")
    else:
        _show(record)
    return 0


@VERB.command(_JSON, word="compare", takes="NAME NAME ...")
def compare(options: Any) -> int:
    """Shows the label's weight a over its probability p_y, as a plot and a table. A NAME can be a mapping, as in
    '{preset: beyond-log, alpha: 2}'. Anything else that a weight reads is that of 999 other tokens, all equally
    likely.
    """
    import torch

    if not options.words:
        raise ConfigError("nothing was named to compare; name targets, as in: qtarget targets compare dft beyond-log")
    targets, faults = {}, []
    for word in options.words:
        try:
            targets[word] = _drawable(word)
        except ConfigError as error:
            faults += error.faults
    raise_together(faults)
    table = {word: _label_weights(target, torch.tensor(_PROBABILITIES)) for word, target in targets.items()}
    if options.json:
        print(terminal.as_json({"p_y": _PROBABILITIES, "a": table, "other_tokens": _OTHERS}), end="")
        return 0
    points = (torch.arange(_COLUMNS) + 0.5) / _COLUMNS
    curves = {word: _label_weights(target, points) for word, target in targets.items()}
    console = terminal.console(80)
    console.print(terminal.plot(curves, "p_y"), markup=False, soft_wrap=True)
    shown = terminal.table("p_y", *targets)
    for row, p_y in enumerate(_PROBABILITIES):
        shown.add_row(f"{p_y:g}", *(f"{weights[row]:.4g}" for weights in table.values()))
    console.print("\na, the weight of the label in g = a (p − δ) + ..., at")
    console.print(shown)
    console.print(f"\nthe rest of p is spread evenly over {_OTHERS} other tokens", style="dim")
    return 0


@VERB.command(_JSON, word="divergences")
def divergences(options: Any) -> int:
    """The divergences by which a target can pull the student to a residual: write divergence: NAME next to it, or in a
    preset that accepts one.
    """
    records = _divergences()
    if options.json:
        print(terminal.as_json(records), end="")
        return 0
    console = terminal.console(80)
    for record in records:
        reach, summary = record["reach"], record["summary"]
        lines = [f"{record['name']} {_flow(record['parameters'])}" if record["parameters"] else record["name"]]
        lines += [] if summary.startswith(record["equation"]) else [record["equation"]]
        simplex = "Q may leave the simplex" if reach is None else f"Q stays on the simplex while a + {reach:.3g} b ≤ 1"
        needs = "; R must be above 0 everywhere" if record["needs_full_support"] else ""
        console.print("\n    ".join([*lines, summary, simplex + needs]), markup=False, soft_wrap=True)
    return 0


def _record(name: str) -> dict[str, Any]:
    from qtarget.targets import Target, presets

    entry, target = _own(name) if ":" in name else presets.describe(name), Target.from_config(name)
    written = ("name", "group", "summary", "formula", "trusts", "rest", "parameters", "defaults", "schedule", "traps")
    return {
        **{field: getattr(entry, field) for field in written},
        "gradient": _gradient(target, entry.parameters),
        "parts": target.to_config(composed=True),
        "needs": sorted(target.requires),
        "source": entry.source,
        "aliases": list(entry.aliases),
    }


def _own(path: str) -> Preset:
    """What the code of the user's own target says of it, as an entry."""
    from qtarget.targets import Target, presets
    from qtarget.targets.parts import load_object
    from qtarget.targets.presets.entry import Preset

    made = load_object(path, "target")
    if (entry := presets.written_as(path)) is not None:
        return entry
    target = Target.from_config(path)
    parts: Any = target.to_config(composed=True)
    file = getattr(sys.modules[path.partition(":")[0]], "__file__", "")
    build = (lambda: target) if isinstance(made, Target) else made
    trusts, rest = _flow(parts["trust"]), _flow(parts["residual"])
    return Preset(path, build, target.formula, trusts, rest, f"your own code, {file}")


def _gradient(target: Target, parameters: dict[str, object]) -> str:
    """In its general form where a divergence is or may be another than forward KL."""
    if "divergence" in parameters or not all(term.divergence.is_forward_kl for term in target.residual):
        return (
            "g = a (p − δ) + Σ b p ⊙ (s − E_p[s]), by forward KL a (p − δ) + Σ b (p − R); a, b, R and s held constant"
        )
    return "g = a (p − δ) + Σ b (p − R), with a, b and R held constant"


def _mentions(record: dict[str, Any], word: str) -> bool:
    text = " ".join([record["name"], record["summary"], record["formula"], record["source"], *record["aliases"]])
    return word.casefold() in text.casefold()


def _drawable(word: str) -> Target:
    """The target whose label weight is that of the one named, without models. Raises where it reads what p has not."""
    from qtarget.cli import yaml_text
    from qtarget.targets import Target
    from qtarget.targets.stats import STATISTICS

    target = Target.from_config(yaml_text.load(word, f"target is {word!r}"))
    if read := sorted(name for name in target.needs if STATISTICS[name] is not None):
        raise ConfigError(
            f"target is {word!r}, whose weight reads {', '.join(read)}: it is not a curve over p_y; leave it out"
        )
    if not target.requires:
        return target
    return Target(trust=target.trust, scale=target.scale, share=target.share)


def _label_weights(target: Target, p_y: Tensor) -> list[float]:
    """a at each p_y."""
    import torch

    from qtarget.losses import target_loss

    p_y = p_y.double()[:, None]
    logits = torch.cat([p_y, ((1 - p_y) / _OTHERS).expand(-1, _OTHERS)], 1).log()
    labels = torch.zeros(len(p_y), dtype=torch.long)
    return target_loss(logits, labels, target, reduction="none").stats["trust"].tolist()


def _divergences() -> list[dict[str, Any]]:
    import inspect

    from qtarget.targets.divergence import Divergence

    records = []
    for name, kind in Divergence.known.items():
        divergence = kind()
        records.append(
            {
                "name": name,
                "parameters": dict(vars(divergence)),
                "equation": divergence.equation,
                "summary": (inspect.getdoc(kind) or "").partition("\n")[0],
                "reach": divergence.reach,
                "needs_full_support": divergence.needs_full_support,
            }
        )
    return records


def _flow(value: object) -> str:
    """YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return "null" if value is None else str(value)


def _show(record: dict[str, Any]) -> None:
    parameters = ", ".join(f"{key}: {value}" for key, value in record["parameters"].items())
    name = record["name"]
    written = f"{{preset: {name}, {parameters}}}" if parameters else name
    console = terminal.console(80)
    console.print(f"{name}  {record['summary']}".rstrip() + "\n", soft_wrap=True, markup=False)
    rows = [
        ("group", record["group"]),
        ("formula", record["formula"]),
        ("gradient", record["gradient"]),
        ("trusts", record["trusts"]),
        ("the rest", record["rest"]),
        ("defaults", parameters or "no parameters"),
        ("whose", record["defaults"]),
        ("schedule", _flow(dict(record["schedule"])) if record["schedule"] else ""),
        ("divergence", _divergence_choices() if "divergence" in record["parameters"] else ""),
        ("traps", record["traps"]),
        ("needs", ", ".join(record["needs"]) or "nothing but labels"),
        ("source", record["source"]),
        ("also called", ", ".join(record["aliases"])),
        ("in a config", f"target: {written}"),
        ("or in parts", f"target: {_flow(record['parts'])}"),
    ]
    for heading, text in rows:
        if text:
            console.print(f"{heading:<12} {text}", soft_wrap=True, markup=False)


def _divergence_choices() -> str:
    from qtarget.targets.divergence import Divergence

    return f"{', '.join(Divergence.known)} (qtarget targets divergences)"
