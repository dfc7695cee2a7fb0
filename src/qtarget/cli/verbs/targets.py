"""``qtarget targets``: the objectives, as a table or one by one.

What each trusts, where the rest goes, defaults, what it needs and where it comes from.
"""

from __future__ import annotations

from typing import Any

from qtarget.cli import terminal
from qtarget.cli.arguments import Option, Verb, only

VERB = Verb("targets", __doc__, bare=True)
_JSON = Option("json", "as JSON")


@VERB.command(_JSON)
def every(options: Any) -> int:
    """All of them, a line each."""
    from qtarget.targets import presets

    records = [_record(name) for name in presets.names()]
    if options.json:
        print(terminal.as_json(records), end="")
        return 0
    headings = ("target", "trusts", "the rest goes to", "needs", "source")
    table = terminal.table(*headings, left=headings, overflow="fold")
    for record in records:
        needs = ", ".join(record["needs"]) or "-"
        table.add_row(record["name"], record["trusts"], record["rest"], needs, record["source"])
    console = terminal.console(80)
    console.print(table)
    console.print("\nformula and parameters: qtarget targets show NAME", style="dim")
    return 0


@VERB.command(_JSON, word="show", takes="NAME")
def one(options: Any) -> int:
    """One of them in full."""
    from qtarget.targets import presets

    name = only(options.words, "one target is asked for, as in: qtarget targets show target-sft")
    record = _record(presets.describe(name).name)
    if options.json:
        print(terminal.as_json(record), end="")
    else:
        _show(record)
    return 0


def _record(name: str) -> dict[str, Any]:
    from qtarget.targets import presets

    entry, target = presets.describe(name), presets.build(name)
    written = ("name", "summary", "formula", "trusts", "rest", "parameters")
    return {
        **{field: getattr(entry, field) for field in written},
        "parts": target.to_config(composed=True),
        "needs": sorted(target.requires),
        "source": entry.source,
        "aliases": list(entry.aliases),
    }


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
    console.print(f"[bold]{name}[/bold]  {record['summary']}\n", soft_wrap=True)
    rows = [
        ("formula", record["formula"]),
        ("gradient", "g = a (p − δ) + Σ b (p − R), with a, b and R held constant"),
        ("trusts", record["trusts"]),
        ("the rest", record["rest"]),
        ("defaults", parameters or "no parameters"),
        ("needs", ", ".join(record["needs"]) or "nothing but labels"),
        ("source", record["source"]),
        ("also called", ", ".join(record["aliases"])),
        ("in a config", f"target: {written}"),
        ("or in parts", f"target: {_flow(record['parts'])}"),
    ]
    for heading, text in rows:
        if text:
            console.print(f"{heading:<12} {text}", soft_wrap=True, markup=False)
