"""Lens pages in a real browser, and their figures beside those of the replay in Python."""

import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import qtarget as qt
from qtarget import Target
from qtarget.lens.replay import Replay, ReplayedTarget

FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"


def chromium() -> str:
    named = os.environ.get("CHROMIUM", "")
    for name in (named, "chromium", "chromium-browser", "google-chrome"):
        if name and (found := shutil.which(name)):
            return found
    pytest.fail("no Chromium found; install one with: make browser (or name yours: CHROMIUM=/path/to/chromium)")


class Opened:
    """A page from its file, with all it said and asked for."""

    def __init__(self, browser, file, **context):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
        self.page = self.context.new_page()
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.url = Path(file).as_uri()
        self.page.goto(self.url)
        self.page.wait_for_selector("html[data-ready]", timeout=600_000)

    def close(self):
        self.context.close()
        assert self.said == [], "the console is empty"
        assert [url for url in self.asked if not url.startswith("data:")] == [self.url], (
            "nothing but the file is asked for"
        )


JS_FIGURES = """([name, given]) => {
  const { D } = lens;
  const target = lens.buildTarget(D, name, { ...lens.startOf(D, name), ...given });
  const out = lens.figuresFor(D);
  lens.replay(D, target, 0, D.n, out, lens.scratchFor(D));
  const tokens = Array.from({ length: 40 }, (_, k) => k * 25).map((i) => {
    const f = lens.tokenFigures(D, target, i);
    const ids = Array.from(D.ids.slice(D.start[i], D.start[i + 1]), (id) => parseInt(D.vocab[id].slice(3)));
    return { i, ids, q: [...f.q], qTail: f.qTail, residual: f.residual && [...f.residual], residualTail: f.residualTail };
  });
  const plain = Object.fromEntries(Object.entries(out).map(([key, values]) => [key, [...values]]));
  return { ...plain, tokens, summary: lens.summarise(D, out), notes: target.notes };
}"""


def near(got, truth, what, weights=1.0):
    """Within 1e-4, what the page's coding of log-probabilities is made for, times the weights where they exceed 1."""
    got, truth = np.asarray(got, dtype=float), np.asarray(truth, dtype=float)
    with np.errstate(invalid="ignore"):
        off = np.abs(got - truth) / np.maximum(np.maximum(1, np.abs(truth)), weights)
    off = np.where(got == truth, 0.0, off)  # ∞ where there is no bound
    worst = off.argmax()
    assert off.max() <= 1e-4, f"{what}: entry {worst} is {got.flat[worst]}, Python has {truth.flat[worst]}"


def undecided(target: Target, figures: ReplayedTarget, replay: Replay) -> np.ndarray:
    """[tokens], where a score jumps and the page's digits may put an id on the other side: p is R but for these."""
    if not any(isinstance(term.divergence, qt.divergence.total_variation) for term in target.residual_terms):
        return np.zeros(len(figures.trust), bool)
    p, R = (
        np.column_stack(both)
        for both in ((replay.p, replay.tail["student"]), (figures.residual, figures.residual_tail))
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        return (np.abs(np.log(p / R)) < 1e-3).any(1)


def agrees(got: dict, target: Target, replay: Replay) -> None:
    """Every figure of a page, as ``JS_FIGURES`` gives them, is that of the replay in Python."""
    figures = replay.figures(target)
    skipped = undecided(target, figures, replay)
    # A pool's coefficient multiplies the log-probabilities, and with them what they are off by.
    sharper = max([1.0, *(c for term in target.residual_terms for c in term.pool.nonzero.values())])
    weights = (np.abs(figures.trust) + np.abs(figures.residual_mass)) * sharper
    near(got["trust"], figures.trust, "trust")
    near(got["mass"], figures.residual_mass, "residual mass")
    assert skipped.mean() < 0.3
    near(np.asarray(got["update"])[~skipped], figures.update[~skipped], "update", weights[~skipped])
    if not skipped.any():  # a bound is also made of other R, where p is elsewhere beside them
        near(got["updateError"], figures.update_error, "error of the update", weights)
        near(got["qError"], figures.q_error, "error of Q", weights)
    # Q is off the simplex from −1e-6 on; an entry that close to the bound may fall on either side.
    assert np.sum(np.asarray(got["off"]) != figures.off_simplex) <= 2
    for token in got["tokens"]:
        i = token["i"]
        if skipped[i]:
            continue
        place = [int(np.flatnonzero(replay.ids[i] == index)[0]) for index in token["ids"]]
        assert len(place) == replay.there[i].sum()
        near(token["q"], figures.q[i, place], f"Q of token {i}", weights[i])
        near(token["qTail"], figures.q_tail[i], f"tail of Q of token {i}", weights[i])
        if token["residual"] is None:
            assert np.isnan(figures.residual[i]).all()
        else:
            near(token["residual"], figures.residual[i, place], f"residual of token {i}", sharper)
            near(token["residualTail"], figures.residual_tail[i], f"tail of the residual of token {i}", sharper)
    summary = vars(replay.summary(figures))
    for key, value in summary.items():
        if skipped.any() and key not in ("trust", "residual_mass"):
            continue
        if key in ("carries_90", "off_simplex"):  # counts of tokens
            assert abs(got["summary"][key] - value) <= 2 / len(figures.trust)
        elif not math.isnan(value):
            near(got["summary"][key], value, key)
    own = [note for note in got["notes"] if "was evaluated in Python" in note or note.endswith("on this page")]
    assert len(got["notes"]) == len(figures.notes) + len(own)
