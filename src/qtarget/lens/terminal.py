"""Shows a record in the terminal: coloured tokens, what is taught most, all targets."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qtarget.data.text import characters, visible
from qtarget.errors import ConfigError
from qtarget.lens.record import Record, rows_of
from qtarget.lens.replay import Replay, ReplayedTarget
from qtarget.targets import Target, presets

# From little to much, told apart by lightness alone: colour-blind readers and grey printers see the same order.
_RAMP = ("grey35", "grey50", "steel_blue", "deep_sky_blue1", "khaki1")
_LEVELS = " .:+#"  # the same in plain text


def show(record: Record, target: Target, row: int | None, console: Console) -> None:
    """Print a row's tokens coloured by trust, and a table of those that are taught most.

    Raises:
        ConfigError: a row that was not captured, or a target that needs a model that was not.
    """
    replay = Replay(record)
    figures = replay.figures(target)
    chosen = [(entry, tokens) for entry, tokens in rows_of(record) if tokens and row in (None, entry["row"])]
    if not chosen:
        have = ", ".join(str(entry["row"]) for entry, tokens in rows_of(record) if tokens)
        raise ConfigError(f"row is {row}, for which this capture has no supervised token; it has {have}")
    entry, tokens = chosen[0] if row is not None else max(chosen, key=lambda c: figures.update[c[1]].sum())
    console.print(f"target {target}: {target.formula}", markup=False, highlight=False)
    console.print(f"row {entry['row']}, {len(tokens)} supervised of {len(entry['input_ids'])} tokens\n", markup=False)
    console.print(_text(record, entry, tokens, figures, console.is_terminal))
    console.print(_legend(console))
    console.print(_most_taught(record, replay, figures, tokens))
    for note in figures.notes:
        console.print(f"note: {note}", markup=False)


def _text(record: Record, entry: dict[str, Any], tokens: list[int], figures: ReplayedTarget, coloured: bool) -> Text:
    by_position = {record.tokens["position"][token]: token for token in tokens}
    texts = [record.vocab[index][0] for index in entry["input_ids"]]
    spread = {begin: (end, whole) for begin, end, whole in characters(texts)}
    line, end = Text(), -1
    for position, text in enumerate(map(visible, texts)):
        if position in spread:  # the character, then the tokens that its bytes are in
            end, whole = spread[position]
            line.append(f"{visible(whole)}(")
        if position not in by_position:
            line.append(text, style="dim italic" if coloured else "")
        else:
            level = min(len(_RAMP) - 1, int(np.clip(figures.trust[by_position[position]], 0, 1) * len(_RAMP)))
            if coloured:
                line.append(text, style=f"bold {_RAMP[level]}")
            else:  # a pipe has no colour: the level stands behind the token
                line.append(f"[{text}]{_LEVELS[level]}")
        if position + 1 == end:
            line.append(")")
    return line


def _legend(console: Console) -> Text:
    legend = Text("\ntrust in the label: ")
    for level, style in enumerate(_RAMP):
        low, high = level / len(_RAMP), (level + 1) / len(_RAMP)
        mark = "" if console.is_terminal else f"{_LEVELS[level]!r} "
        legend.append(f" {mark}{low:.1f}–{high:.1f} ", style=style)
    legend.append("  masked", style="dim italic")
    if not console.is_terminal:
        legend.append(" tokens have no brackets")
    return legend


def _most_taught(record: Record, replay: Replay, figures: ReplayedTarget, tokens: list[int], count: int = 12) -> Table:
    headings = ("position", "label", "p_y", "rank", "entropy", "trust", "update", "Q asks for")
    table = _table("taught most", headings, left=("label", "Q asks for"))
    for token in sorted(tokens, key=lambda t: -figures.update[t])[:count]:
        top = np.argsort(-figures.q[token])[:3]
        asks = ", ".join(
            f"{visible(record.vocab[int(replay.ids[token, i])][0])} {figures.q[token, i]:.2f}"
            for i in top
            if replay.ids[token, i] >= 0
        )
        table.add_row(
            str(record.tokens["position"][token]),
            Text(visible(record.vocab[record.tokens["label"][token]][0])),
            f"{np.exp(replay.log_p_y[token]):.3f}",
            str(record.tokens["rank"][token] + 1),
            f"{record.tokens['entropy'][token]:.2f}",
            f"{figures.trust[token]:.3f}",
            f"{figures.update[token]:.3f} ± {figures.update_error[token]:.3f}",
            Text(asks),
        )
    return table


def _table(title: str, headings: tuple[str, ...], left: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right")
    return table


def comparison(record: Record, extra: Target | None = None) -> Table:
    """Every preset that this capture can replay, beside plain SFT."""
    replay = Replay(record)
    headings = ("target", "trust", "update", "of sft's", "90 % on", "off simplex", "error")
    table = _table("targets on these tokens", headings, left=("target",))
    targets = ([] if extra is None else [extra]) + [presets.build(name) for name in presets.names()]
    for target in targets:
        if not {"teacher", "reference"} & target.requires <= set(record.others):
            table.add_row(str(target), *["-"] * 5, "not captured")
            continue
        summary = replay.summary(replay.figures(target))
        error = f"{summary.error:.3f}" if summary.error < np.inf else "no bound"
        table.add_row(
            str(target),
            f"{summary.trust:.3f}",
            f"{summary.update:.3f}",
            "-" if np.isnan(summary.update_vs_sft) else f"{summary.update_vs_sft:.2f}",  # sft has nothing left to ask
            f"{summary.carries_90:.0%}",
            f"{summary.off_simplex:.0%}",
            f"{error} k is too small" if summary.k_is_too_small else error,
        )
    return table
