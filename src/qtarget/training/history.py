"""A map of (p_y, entropy) every few steps, for the lens page to play.

Made from the statistics of the loss itself, at no second forward pass. ``lens_history.parquet`` in the run's folder has a
line per cell that holds a token:

    step, p_bin, entropy_bin, count, trust, update        trust and update are means over the cell's tokens

p_bin counts twentieths of p_y, entropy_bin twentieths of log(vocabulary). At most ``MAPS`` maps are kept: a run that
would make more keeps every second one, then every fourth and so on, so that neither the file nor the time to write it
grows with the run. Which maps are kept depends on the step alone, so a resumed run keeps the same ones.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import TrainerCallback

from qtarget import files
from qtarget.errors import StorageError, reason

BINS = 20
MAPS = 256
FILE = "lens_history.parquet"
SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("p_bin", pa.int8()),
        ("entropy_bin", pa.int8()),
        ("count", pa.int64()),
        ("trust", pa.float32()),
        ("update", pa.float32()),
    ]
)


class History(TrainerCallback):
    """Collects the maps of a run; as a callback it writes one at the end of each step that is due.

    Args:
        folder: the run's. vocab_size: real tokens, whose logarithm is the largest entropy. every: optimiser steps between
            two maps, while there are at most ``MAPS``. accelerator: the run's.
    """

    def __init__(self, folder: str | Path, vocab_size: int, every: int, accelerator: Any):
        self._accelerator = accelerator
        self._file, self._largest, self._every = Path(folder) / FILE, math.log(vocab_size), every
        self._sums: Tensor | None = None

    def wants(self, step: int) -> bool:
        """Whether a map is due for optimiser step ``step`` (1 is the first)."""
        return step % self.stride(step) == 0

    def stride(self, step: int) -> int:
        """Steps between the maps kept of a run up to ``step``: every, doubled until there are at most ``MAPS``."""
        stride = self._every
        while step // stride > MAPS:
            stride *= 2
        return stride

    def add(self, stats: dict[str, Tensor]) -> None:
        """Add a micro-batch: nll, entropy, trust and update of the labels' shape, NaN where nothing is trained."""
        trained = ~torch.isnan(stats["nll"])
        p = (-stats["nll"][trained]).exp()
        p_bin = (p * BINS).long().clamp(0, BINS - 1)
        entropy_bin = (stats["entropy"][trained] / self._largest * BINS).long().clamp(0, BINS - 1)
        values = torch.stack([torch.ones_like(p), stats["trust"][trained], stats["update"][trained]]).double()
        sums = torch.zeros(3, BINS * BINS, dtype=torch.float64, device=p.device)
        sums.index_add_(1, p_bin * BINS + entropy_bin, values)
        self._sums = sums if self._sums is None else self._sums + sums

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.flush(state.global_step)

    def flush(self, step: int) -> None:
        """Sum over processes and append the map of this step; the main process writes."""
        if self._sums is None:
            return
        sums, self._sums = self._accelerator.reduce(self._sums, reduction="sum").cpu(), None
        if not self._accelerator.is_main_process:
            return
        (cells,) = (sums[0] > 0).nonzero(as_tuple=True)
        count, trust, update = sums[:, cells]
        columns = torch.full_like(cells, step), cells // BINS, cells % BINS, count.long(), trust / count, update / count
        named = zip(SCHEMA.names, (column.tolist() for column in columns), strict=True)
        table = pa.Table.from_pydict(dict(named), schema=SCHEMA)
        if self._file.is_file():  # a resumed run continues, and what it repeats is written again
            earlier = pq.read_table(self._file)
            stay = [known for known in pc.unique(earlier["step"]).to_pylist() if known % self.stride(step) == 0]
            stays = pc.is_in(earlier["step"], pa.array(stay, pa.int32()))
            table = pa.concat_tables([earlier.filter(pc.and_(pc.less(earlier["step"], step), stays)), table])
        with files.whole(self._file, report=False) as partial:
            pq.write_table(table, partial, compression="zstd")


def frames(folder: str | Path) -> list[dict[str, Any]]:
    """The maps of a run as the page plays them: [{step, count, trust, update}], 20 × 20 lists each, rows are p_y."""
    file = Path(folder) / FILE
    try:
        cells = pq.read_table(file).select(SCHEMA.names).cast(SCHEMA).to_pylist()
    except (OSError, ValueError, pa.ArrowException, KeyError) as error:
        raise StorageError(f"{file} cannot be read ({reason(error)}); train again with lens_every") from None
    maps: dict[int, dict[str, Any]] = {}
    for cell in cells:
        p_bin, entropy_bin = place = cell["p_bin"], cell["entropy_bin"]
        if None in cell.values() or not all(0 <= number < BINS for number in place):
            raise StorageError(
                f"{file} has a cell at p_bin {p_bin}, entropy_bin {entropy_bin}, which the map of {BINS} by {BINS} "
                "does not have; train again with lens_every"
            )
        empty = {name: [[0] * BINS for _ in range(BINS)] for name in ("count", "trust", "update")}
        frame = maps.setdefault(cell["step"], {"step": cell["step"], **empty})
        for name in empty:
            frame[name][p_bin][entropy_bin] = cell[name]
    return [maps[step] for step in sorted(maps)]
