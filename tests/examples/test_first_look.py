"""The notebook: what it shows is what its code gives today, and its page on the site says the same."""

from __future__ import annotations

import base64
import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import notebook_page
import run_notebook
import stage

NOTEBOOK = json.loads(run_notebook.NOTEBOOK.read_text(encoding="utf-8"))
RUNNER = [sys.executable, run_notebook.__file__]


def outputs_of(name: str) -> list[dict]:
    (cell,) = [cell for cell in NOTEBOOK["cells"] if cell["id"] == name]
    return cell["outputs"]


def written(folder: Path, *sources: str) -> Path:
    """A notebook of code cells, without outputs."""
    cells = [
        {
            "cell_type": "code",
            "id": f"c{number}",
            "metadata": {},
            "execution_count": None,
            "outputs": [],
            "source": source,
        }
        for number, source in enumerate(sources)
    ]
    file = folder / "small.ipynb"
    file.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return file


def test_every_cell_runs_and_gives_what_is_stored():
    """In a process of its own, from the first cell to the last, without a warning."""
    done = subprocess.run([*RUNNER, "--check"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_what_the_text_says_of_the_result_is_in_the_table():
    lines = [line.split() for line in run_notebook.printed(outputs_of("result")).splitlines()[1:]]
    after = {name: [float(number) for number in numbers] for name, *numbers in lines}
    before, sft, dft, mine = (after[name] for name in ("before", "sft", "dft", "mine"))
    melbourne, canberra, astana, _ = range(4)
    assert sft[astana] - before[astana] > 0.05 and sft[melbourne] - before[melbourne] > 0.05
    assert before[canberra] - sft[canberra] > 0.1
    assert dft == pytest.approx(before, abs=0.011)
    assert mine[astana] - before[astana] > 0.05 and mine[canberra] >= before[canberra]
    assert mine[melbourne] == pytest.approx(before[melbourne], abs=0.011)


def test_a_stored_output_that_is_not_the_codes_is_noticed():
    now = [cell["outputs"] for cell in run_notebook.code_cells(NOTEBOOK)]
    assert run_notebook.differences(NOTEBOOK, now) == []
    stale = copy.deepcopy(NOTEBOOK)
    by_name = {cell["id"]: cell for cell in run_notebook.code_cells(stale)}
    (result,) = by_name["result"]["outputs"]
    result["text"] = [line.replace("0.46", "0.49") for line in result["text"]]
    by_name["targets"]["outputs"][0]["text"][0] = "sft   L = log p_y;  a = 1\n"
    by_name["train"]["outputs"][0]["text"].pop()
    by_name["picture"]["outputs"] = []
    said = run_notebook.differences(stale, now)
    assert [fault.partition(":")[0] for fault in said] == [
        f"cell {n}" for n in ("targets", "picture", "train", "result")
    ]
    assert "make notebook" in said[0]


@pytest.mark.parametrize(
    ("stored", "given", "same"),
    [
        ("p 0.48", "p 0.49", True),  # one in the last digit
        ("p 0.48", "p 0.50", False),
        ("p 0.480", "p 0.489", True),  # two percent
        ("p 0.480", "p 0.492", False),
        ("p 0.48", "q 0.48", False),
        ("p -0.48", "p 0.48", False),
        ("14 tokens", "15 tokens", False),
        ("weights 46e21deb", "weights 1a734cdb", True),
    ],
)
def test_numbers_may_differ_by_rounding_alone(stored, given, same):
    cell = {"cell_type": "code", "id": "a", "outputs": [{"output_type": "stream", "name": "stdout", "text": [stored]}]}
    now = [[{"output_type": "stream", "name": "stdout", "text": [given]}]]
    assert (run_notebook.differences({"cells": [cell]}, now) == []) == same


def test_a_bar_of_another_length_is_noticed(tmp_path):
    def shown(length: float) -> list:
        lines = ["pyplot.figure(figsize=(5.6, 5.6))", f"pyplot.barh([0, 1, 2], [0.5, {length}, 1])", "pyplot.show()"]
        file = written(tmp_path, "\n".join(["from matplotlib import pyplot", *lines]))
        return run_notebook.run(json.loads(file.read_text()))

    stored = {"cells": [{"cell_type": "code", "id": "a", "outputs": shown(0.5)[0]}]}
    assert run_notebook.differences(stored, shown(0.501)) == []
    assert "pixels differ" in run_notebook.differences(stored, shown(0.6))[0]


def test_outputs_are_stored_in_the_order_in_which_they_came(tmp_path):
    file = written(
        tmp_path, "x = 1", "from matplotlib import pyplot\nprint(x)\npyplot.plot([x])\npyplot.show()\nprint('end')"
    )
    notebook = json.loads(file.read_text())
    run_notebook.store(file, notebook, run_notebook.run(notebook))
    first, second = json.loads(file.read_text())["cells"]
    assert (first["execution_count"], first["outputs"]) == (1, [])
    assert [output["output_type"] for output in second["outputs"]] == ["stream", "display_data", "stream"]
    assert run_notebook.printed(second["outputs"]) == "1\nend\n"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = 2\nx", "cell c0 ends in the value 2; print it, or give it a name"),
        ("import sys\nprint('careful', file=sys.stderr)", "cell c0 wrote to stderr:\ncareful\n"),
    ],
)
def test_what_a_kernel_would_show_besides_is_refused(source, said, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run_notebook.run(json.loads(written(tmp_path, source).read_text()))
    assert str(stopped.value) == said


def test_the_page_has_every_cell_its_outputs_and_links_of_the_site(tmp_path):
    page = stage.moved(run_notebook.NOTEBOOK, Path("first-look.md"), tmp_path)
    fences = re.findall(r"^```(.*?)\n(.*?)^```$", page, re.S | re.M)
    code = [text for language, text in fences if language == "python"]
    outputs = [text for language, text in fences if language == "{ .text .qt-output }"]
    cells = run_notebook.code_cells(NOTEBOOK)
    assert code == ["".join(cell["source"]) + "\n" for cell in cells]
    assert [text.strip() for text in outputs] == [
        text.strip() for cell in cells if (text := run_notebook.printed(cell["outputs"]))
    ]
    (picture,) = run_notebook.pictures(outputs_of("picture"))
    said, data = re.search(r"!\[(.*)\]\(data:image/png;base64,(.*)\)", page).groups()
    assert base64.b64decode(data) == picture and said.startswith("The same numbers as bars")
    assert "](how-to/reading-the-log.md)" in page and "../docs" not in page


def test_code_is_no_place_for_links():
    cell = {"cell_type": "code", "outputs": [], "source": ["rows[0](a)"]}
    text = {"cell_type": "markdown", "source": ["rows[0](a)"]}
    page = notebook_page.markdown(json.dumps({"cells": [cell, text]}), lambda text: text.replace("(a)", "(b)"))
    assert page == "```python\nrows[0](a)\n```\n\nrows[0](b)\n"
