"""MkDocs' hook: the pages made of the presets take their places in the navigation of mkdocs.yml."""

from __future__ import annotations

import json
from pathlib import Path


def on_config(config):
    made = json.loads((Path(config.docs_dir) / "navigation.json").read_text(encoding="utf-8"))
    for section in config.nav:
        for name, entries in section.items():
            if isinstance(entries, list):
                section[name] = [one for entry in entries for one in _placed(entry, made)]
    return config


def _placed(entry, made: dict) -> list:
    """``objectives`` and ``divergences`` stand in mkdocs.yml for their pages."""
    if isinstance(entry, dict):
        [(title, inside)] = entry.items()
        if isinstance(inside, list):
            return [{title: [one for each in inside for one in _placed(each, made)]}]
    return made[entry] if isinstance(entry, str) and entry in made else [entry]
