"""``qtarget targets``: the objectives, as a table or one by one.

What each trusts, where the rest goes, defaults, what it needs and where it comes from.
"""

from __future__ import annotations

import json
from typing import Any

from qtarget.cli.arguments import Option, Verb
from qtarget.errors import ConfigError

VERB = Verb("targets", __doc__, bare=True)
_JSON = Option("json", "as JSON")


@VERB.command(_JSON)
def every(options: Any) -> int:
    """All of them, a line each."""
    from qtarget.targets import presets

    _table([_record(name) for name in presets.names()], options.json)
    return 0


@VERB.command(_JSON, word="show", takes="NAME")
def one(options: Any) -> int:
    """One of them in full."""
    from qtarget.targets import presets

    if len(options.words) != 1:
        raise ConfigError("targets show takes one name, as in: qtarget targets show target-sft")
    _show(_record(presets.describe(options.words[0]).name), options.json)
    return 0


def _record(name: str) -> dict:
    from qtarget.targets import presets

    entry = presets.describe(name)
    return {
        "name": entry.name,
        "summary": entry.summary,
        "formula": entry.formula,
        "trusts": entry.trusts,
        "rest": entry.rest,
        "parameters": entry.parameters,
        "parts": presets.build(name).to_config(composed=True),
        "needs": sorted(presets.build(name).requires),
        "source": entry.source,
        "aliases": list(entry.aliases),
    }


def _table(records: list[dict], as_json: bool) -> None:
    if as_json:
        print(json.dumps(records, ensure_ascii=False, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("target", "trusts", "the rest goes to", "needs", "source"):
        table.add_column(heading, overflow="fold")
    for record in records:
        table.add_row(
            record["name"], record["trusts"], record["rest"], ", ".join(record["needs"]) or "-", record["source"]
        )
    console = Console()
    console.print(table)
    console.print("\nformula and parameters: qtarget targets show NAME", style="dim")


def _flow(value: object) -> str:
    """YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return "null" if value is None else str(value)


def _show(record: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(record, ensure_ascii=False, indent=2))
        return
    from rich.console import Console

    parameters = ", ".join(f"{key}: {value}" for key, value in record["parameters"].items())
    name = record["name"]
    written = f"{{preset: {name}, {parameters}}}" if parameters else name
    console = Console(highlight=False)
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
