"""Pictures of the lens' page for docs/lens.md, taken of the example page in a real browser, and the figures beside them.

    make lens-demo && python docs/make_lens_pictures.py

Copies the demo's page to docs/lens-example.html, photographs it, and writes what docs/lens.md says of three tokens to
docs/assets/lens_examples.json.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
from playwright.sync_api import Page, sync_playwright

import qtarget as qt
from qtarget.lens import record
from qtarget.lens.replay import Replay

HERE = Path(__file__).parent
ASSETS = HERE / "assets"
BUILD = HERE.parent / "build" / "lens"
EXAMPLE = HERE / "lens-example.html"
# (name, row, position of the label): a label no model expects, a phrasing with several good ways on, a sum the student
# is sure of and wrong about.
TOKENS = {"noisy_label": (7, 172), "ambiguous_phrasing": (21, 146), "confident_mistake": (18, 131)}


def number_of(read: record.Record, row: int, position: int) -> int:
    """Which token of the record it is, and of the page, whose rows are the record's first."""
    return [*zip(read.tokens["row"], read.tokens["position"], strict=True)].index((row, position))


def figures() -> dict[str, dict]:
    """What the models hold likely at each token, and what three targets make of it."""
    read = record.read(BUILD / "capture")
    replay = Replay(read)
    targets = {name: replay.figures(qt.preset(name)) for name in ("sft", "dft", "target-sft")}
    made = {}
    for name, (row, position) in TOKENS.items():
        token = next(
            i
            for i, at in enumerate(zip(read.tokens["row"], read.tokens["position"], strict=True))
            if at == (row, position)
        )
        ids = next(line["input_ids"] for line in read.rows if line["row"] == row)
        entry: dict = {
            "row": row,
            "position": position,
            "context": "".join(read.vocab[index][0] for index in ids[position - 14 : position]),
            "label": read.vocab[ids[position]][0],
            "entropy": round(read.tokens["entropy"][token], 2),
        }
        for model in ("student", "teacher"):
            top = np.argsort(-replay.logps[model][token])[:3]
            entry[model] = {
                read.vocab[int(replay.ids[token, i])][0]: round(float(np.exp(replay.logps[model][token, i])), 4)
                for i in top
            }
        entry["p_y"] = round(float(np.exp(replay.log_p_y[token])), 6)
        entry["teacher_p_y"] = round(float(np.exp(read.tokens["teacher_log_p_y"][token])), 6)
        for target, made_of in targets.items():
            entry[target] = {
                "trust": round(float(made_of.trust[token]), 4),
                "update": round(float(made_of.update[token]), 4),
                "update_error": round(float(made_of.update_error[token]), 4),
            }
        made[name] = entry
    return made


def go_to(page: Page, row: int, token: int) -> None:
    """Show a token as a reader would: choose its row, click it."""
    page.select_option("#row", str(row))
    page.locator(f"#panes [data-token='{token}']").first.click()
    page.wait_for_timeout(300)


def pictures() -> None:
    read = record.read(BUILD / "capture")
    places = {name: (row, number_of(read, row, position)) for name, (row, position) in TOKENS.items()}
    with sync_playwright() as playwright:
        path = shutil.which(os.environ.get("CHROMIUM", "chromium"))
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1200, "height": 1000}, color_scheme="light")
        page.goto(EXAMPLE.as_uri())
        page.wait_for_timeout(2000)
        go_to(page, *places["confident_mistake"])
        page.evaluate("window.scrollTo(0, 0)")
        page.screenshot(path=ASSETS / "lens_page.png")
        for name, place in places.items():
            go_to(page, *place)
            page.locator("#token").screenshot(path=ASSETS / f"lens_{name}.png")
        page.locator("#map").screenshot(path=ASSETS / "lens_map.png")
        browser.close()


if __name__ == "__main__":
    shutil.copy(BUILD / "lens.html", EXAMPLE)
    (ASSETS / "lens_examples.json").write_text(json.dumps(figures(), indent=1, ensure_ascii=False) + "\n")
    pictures()
