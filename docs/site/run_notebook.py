"""Runs examples/first_look.ipynb in this process and stores what its cells give; --check: is that what is stored?

    python docs/site/run_notebook.py                 # after a change of the notebook, or of what it shows
    python docs/site/run_notebook.py --check         # writes nothing; exits with 1 where something differs

The cells are plain Python, which needs no Jupyter: nbclient and ipykernel would add 31 packages to the lock. A cell may
print and show figures. What else a kernel would show, the value of a last line or a warning, is refused.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

NOTEBOOK = Path(__file__).resolve().parent.parent.parent / "examples" / "first_look.ipynb"
# Processors differ in the last bits of a float, and training makes more of them: a printed number with a point may
# differ by one in its last digit, or by two percent.
_NUMBER = re.compile(r"\d+\.\d+")
_RELATIVE = 0.02
# Of a model's weights: they change with the last bit of one.
_FINGERPRINT = re.compile(r"\b[0-9a-f]{8}\b")
# The share of a picture's pixels that may have another colour, as where a bar ends half a pixel further.
_PIXELS = 0.001

Output = dict[str, Any]


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(notebook: dict[str, Any]) -> list[list[Output]]:
    """The outputs of each code cell, in order. Raises SystemExit where a cell does what is refused."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    outputs: list[Output] = []
    printed, warned = io.StringIO(), io.StringIO()

    def flush() -> None:
        if text := printed.getvalue():
            outputs.append({"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)})
        printed.seek(0)
        printed.truncate()

    def show() -> None:
        flush()
        for number in pyplot.get_fignums():
            outputs.append(_picture(pyplot.figure(number)))
        pyplot.close("all")

    names: dict[str, Any] = {"__name__": "__main__"}
    found = []
    for cell in code_cells(notebook):
        outputs = []
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(warned),
            mock.patch.object(pyplot, "show", show),
        ):
            value = _execute("".join(cell["source"]), cell["id"], names)
        show()
        if value is not None:
            raise SystemExit(f"cell {cell['id']} ends in the value {value!r}; print it, or give it a name")
        if warned.getvalue():
            raise SystemExit(f"cell {cell['id']} wrote to stderr:\n{warned.getvalue()}")
        found.append(outputs)
    return found


def _execute(source: str, name: str, names: dict[str, Any]) -> object:
    """Run a cell; the value of its last line where that is an expression, which a kernel would show."""
    lines = ast.parse(source, name).body
    last = ast.Expression(lines.pop().value) if lines and isinstance(lines[-1], ast.Expr) else None
    exec(compile(ast.Module(lines, []), name, "exec"), names)
    return None if last is None else eval(compile(last, name, "eval"), names)


def _picture(figure: Any) -> Output:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    width, height = figure.get_size_inches() * figure.dpi
    data = {
        "image/png": base64.b64encode(drawn.getvalue()).decode() + "\n",
        "text/plain": [f"<Figure size {width:.0f}x{height:.0f}>"],
    }
    return {"data": data, "metadata": {}, "output_type": "display_data"}


def differences(notebook: dict[str, Any], now: list[list[Output]]) -> list[str]:
    """A sentence for each cell whose stored outputs are not what it gives now."""
    found = []
    for cell, given in zip(code_cells(notebook), now, strict=True):
        stored = cell["outputs"]
        if fault := _text_difference(printed(stored), printed(given)) or _pictures_difference(stored, given):
            found.append(f"cell {cell['id']}: {fault}; store the outputs anew: make notebook")
    return found


def printed(outputs: list[Output]) -> str:
    return "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


def _text_difference(stored: str, given: str) -> str | None:
    before, after = stored.splitlines(), given.splitlines()
    if len(before) != len(after):
        return f"{len(before)} lines are stored, and it prints {len(after)}"
    pairs = zip(before, after, strict=True)
    return next((f"stored is {a!r}, and it prints {b!r}" for a, b in pairs if not _same_line(a, b)), None)


def _same_line(stored: str, given: str) -> bool:
    if _without_numbers(stored) != _without_numbers(given):
        return False
    return all(
        abs(float(a) - float(b)) <= max(1.01 * 10 ** -len(a.partition(".")[2]), _RELATIVE * float(a))
        for a, b in zip(_NUMBER.findall(stored), _NUMBER.findall(given), strict=True)
    )


def _without_numbers(line: str) -> str:
    return _NUMBER.sub("#", _FINGERPRINT.sub("#", line))


def pictures(outputs: list[Output]) -> list[bytes]:
    """The PNG files among a cell's outputs."""
    return [
        base64.b64decode(output["data"]["image/png"]) for output in outputs if "image/png" in output.get("data", {})
    ]


def _pictures_difference(stored: list[Output], given: list[Output]) -> str | None:
    from matplotlib.image import imread

    before, after = ([imread(io.BytesIO(png)) for png in pictures(outputs)] for outputs in (stored, given))
    if [image.shape for image in before] != [image.shape for image in after]:
        return "it shows pictures of another number or size than are stored"
    shares = [(abs(a - b).max(-1) > 0.5).mean() for a, b in zip(before, after, strict=True)]
    return next((f"{share:.2%} of a picture's pixels differ" for share in shares if share > _PIXELS), None)


def store(path: Path, notebook: dict[str, Any], now: list[list[Output]]) -> None:
    """Write the notebook with these outputs, as Jupyter would."""
    for number, (cell, given) in enumerate(zip(code_cells(notebook), now, strict=True), 1):
        cell |= {"execution_count": number, "outputs": given}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", nargs="?", type=Path, default=NOTEBOOK, help="default: examples/first_look.ipynb")
    parser.add_argument("--check", action="store_true", help="compare with what is stored, and write nothing")
    args = parser.parse_args()
    notebook = json.loads(args.notebook.read_text(encoding="utf-8"))
    now = run(notebook)
    if not args.check:
        store(args.notebook, notebook, now)
        return 0
    wrong = differences(notebook, now)
    print(*wrong, sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
