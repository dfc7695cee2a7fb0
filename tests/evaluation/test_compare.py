"""``qtarget compare``: paired differences, what is said of them, the page, and what is refused."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import product

import numpy as np
import pytest

from qtarget import files
from qtarget.cli.__main__ import main
from qtarget.errors import ConfigError
from qtarget.evaluation import compare, compare_report, records, scores
from qtarget.evaluation.tasks import Problem, Task

SETTINGS = {
    "model": {"name": "m", "revision": None, "weights": None},
    "n": 4,
    "temperature": 1.0,
    "top_p": 1.0,
    "max_new_tokens": 64,
    "seed": 0,
    "prompt": "auto",
    "prompt_style": "chat",
    "batch_size": 8,
}


def results(folder, right_pn, task="sums", grader="math", version="v1", first=0, tokens=10, **settings):
    """A finished folder of given verdicts."""
    right_pn = np.asarray(right_pn)
    problems, n = right_pn.shape
    made = Task(task, grader, version, [Problem(f"p{first + i}", f"{i}?", {"answer": str(i)}) for i in range(problems)])
    records.begin(folder, records.manifest_of({**SETTINGS, "n": n, **settings}, [made]), [made], writes=True)
    rows = []
    for p, s in product(range(problems), ("greedy", *range(n))):
        right = bool(right_pn[p, 0 if s == "greedy" else s])
        rows.append(
            {
                "task": task,
                "problem": f"p{first + p}",
                "sample": s,
                "seed": None,
                "text": "t",
                "finish": "stop",
                "tokens": tokens + p % 3,
                "entropy": 0.5,
                "parsed": str(right),
                "lenient_parsed": str(right),
                "strict": right,
                "lenient": right,
                "fault": None,
                "verifier_version": version,
            }
        )
    files.write(folder / "samples" / f"{task}.jsonl", "".join(map(files.line, rows)))
    records.finish(folder, {})
    return folder


def verdicts(seed, share, problems=60, n=4):
    return np.random.default_rng(seed).random((problems, n)) < share


def found(made, measure="strict", task="sums", arm=None):
    return next(d for d in made.differences if (d.measure, d.task) == (measure, task) and (arm is None or d.arm == arm))


# -- numbers -------------------------------------------------------------------------------------------------------


def test_a_difference_by_hand(tmp_path):
    a, b = verdicts(0, 0.3), verdicts(1, 0.7)
    made = compare.compare([str(results(tmp_path / "a", a)), str(results(tmp_path / "b", b, tokens=13))])
    strict = found(made)
    assert (strict.first, strict.other) == (pytest.approx(a.mean()), pytest.approx(b.mean()))
    error = (b.mean(1) - a.mean(1)).std(ddof=1) / 60**0.5
    assert strict.high - strict.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert strict.shown and strict.sentence() == "higher" and strict.needed is None
    assert found(made, "pass@4").first == pytest.approx(a.any(1).mean())
    assert found(made, "greedy").other == pytest.approx(b[:, 0].mean())
    length = found(made, "tokens")
    assert (length.value, length.low, length.high) == (3, 3, 3)


def test_the_other_way_round_is_lower(tmp_path):
    folders = [results(tmp_path / "a", verdicts(0, 0.7)), results(tmp_path / "b", verdicts(1, 0.3))]
    assert found(compare.compare([*map(str, folders)])).sentence() == "lower"


def test_pairing_narrows_the_interval(tmp_path):
    """Problems that are hard for both: unpaired, their spread would hide a difference of 0.1."""
    ease = np.repeat([0, 1], 40)[:, None] * np.ones((1, 10))
    a, b = ease.copy(), ease.copy()
    b[:40, 0] = 1
    made = found(compare.compare([str(results(tmp_path / "a", a)), str(results(tmp_path / "b", b))]))
    unpaired = scores.two_level(b).std() ** 2 + scores.two_level(a).std() ** 2
    assert made.shown and made.value == pytest.approx(0.05)
    assert (made.high - made.low) < 0.5 * 2 * 1.96 * unpaired**0.5


def test_no_difference_shown_and_how_many_problems_would_be_needed(tmp_path):
    generator = np.random.default_rng(3)
    a, b = generator.random((50, 1)) < 0.5, generator.random((50, 1)) < 0.55
    b[:2] = ~a[:2]
    folders = [results(tmp_path / "a", a), results(tmp_path / "b", b)]
    made = found(compare.compare([*map(str, folders)]))
    assert made.low < 0 < made.high
    error = (b.astype(float) - a).std() / 50**0.5
    assert made.needed == pytest.approx(50 * ((1.96 + 0.8416) * error / made.value) ** 2, rel=0.05)
    assert made.sentence() == f"no difference shown; about {made.needed:,} problems would be needed"


def test_so_many_problems_show_it_in_about_four_of_five_repetitions(tmp_path):
    generator = np.random.default_rng(0)
    gain, error = 0.2, (0.5 * 0.5 + 0.7 * 0.3) ** 0.5  # of one problem, one sample, unpaired
    problems = round(compare._NEEDED * (error / gain) ** 2)
    shown = 0
    for i in range(300):
        a, b = generator.random((problems, 1)) < 0.5, generator.random((problems, 1)) < 0.7
        low, _ = scores.interval(scores.two_level(b.astype(float) - a, 400, i))
        shown += low > 0
    assert shown / 300 == pytest.approx(0.8, abs=0.08)


def test_equal_arms(tmp_path):
    a = verdicts(0, 0.5)
    made = found(compare.compare([str(results(tmp_path / "a", a)), str(results(tmp_path / "b", a))]))
    assert made.sentence() == "no difference shown; the scores are the same"


def test_one_problem_shows_nothing(tmp_path):
    folders = [results(tmp_path / "a", np.zeros((1, 4))), results(tmp_path / "b", np.ones((1, 4)))]
    made = compare.compare([*map(str, folders)])
    assert not found(made).shown
    assert "Task sums has 1 problems: too few" in made.notes[0]


def test_training_seeds_are_drawn_too(tmp_path):
    """Each seed alone shows a difference; the two of opposite sign together show none."""
    low, high = verdicts(0, 0.3), verdicts(1, 0.7)
    for name, right in {"a0": low, "a1": high, "b0": high, "b1": low}.items():
        results(tmp_path / name, right)
    one = compare.compare([f"a={tmp_path / 'a0'}", f"b={tmp_path / 'b0'}"])
    both = compare.compare([f"a={tmp_path / 'a0'},{tmp_path / 'a1'}", f"b={tmp_path / 'b0'},{tmp_path / 'b1'}"])
    assert found(one).shown and not found(both).shown
    assert found(both).value == pytest.approx(0)
    assert found(both).high > 0.3
    assert any("2 training seeds per arm are few" in note for note in both.notes)
    assert any("One training run per arm" in note for note in one.notes)


def test_several_tasks_have_their_mean(tmp_path):
    for arm, shares in {"a": (0.2, 0.4), "b": (0.6, 0.8)}.items():
        parts = [
            Task(name, "math", "v", [Problem(f"p{i}", "?", {"answer": "1"}) for i in range(size)])
            for name, size in (("short", 20), ("long", 80))
        ]
        folder = tmp_path / arm
        records.begin(folder, records.manifest_of(SETTINGS, parts), parts, writes=True)
        for part, share in zip(parts, shares, strict=True):
            single = results(
                tmp_path / f"{arm}-{part.name}",
                verdicts(len(part.problems), share, len(part.problems)),
                part.name,
                version="v",
            )
            (folder / "samples" / f"{part.name}.jsonl").write_bytes(
                (single / "samples" / f"{part.name}.jsonl").read_bytes()
            )
        records.finish(folder, {})
    made = compare.compare([str(tmp_path / "a"), str(tmp_path / "b")])
    mean = found(made, task="mean of tasks")
    assert mean.value == pytest.approx((found(made, task="short").value + found(made, task="long").value) / 2)
    assert mean.problems == 100


def of_tasks(folder, shares, suite):
    """A finished folder of several tasks; ``suite``: that of each."""
    parts = [
        Task(name, "math", "v", [Problem(f"p{i}", "?", {"answer": "1"}) for i in range(30)], suite=suite.get(name))
        for name in shares
    ]
    records.begin(folder, records.manifest_of(SETTINGS, parts), parts, writes=True)
    for part in parts:
        single = results(
            folder.with_name(f"{folder.name}-{part.name}"), verdicts(3, shares[part.name], 30), part.name, version="v"
        )
        (folder / "samples" / f"{part.name}.jsonl").write_bytes(
            (single / "samples" / f"{part.name}.jsonl").read_bytes()
        )
    records.finish(folder, {})
    return str(folder)


def test_hle_never_enters_the_mean_of_med10(tmp_path):
    suite = {"medqa": "med10", "nejm": "med10"}
    a = of_tasks(tmp_path / "a", {"medqa": 0.2, "nejm": 0.3, "hle": 0.1}, suite)
    b = of_tasks(tmp_path / "b", {"medqa": 0.4, "nejm": 0.7, "hle": 0.9}, suite)
    made = compare.compare([a, b])
    assert {d.task for d in made.differences} == {"medqa", "nejm", "hle", "mean of med10"}
    mean = found(made, task="mean of med10")
    assert mean.other == pytest.approx((found(made, task="medqa").other + found(made, task="nejm").other) / 2)
    assert mean.problems == 60


# -- output --------------------------------------------------------------------------------------------------------


def test_terminal_markdown_and_page(tmp_path, capsys):
    results(tmp_path / "a", verdicts(0, 0.3))
    results(tmp_path / "b", verdicts(1, 0.7))
    out = tmp_path / "out"
    assert main(["compare", str(tmp_path / "a"), f"<b>|x={tmp_path / 'b'}", "-o", str(out), "--bootstrap", "500"]) == 0
    said = capsys.readouterr().out
    assert "higher" in said and "avg@n" in said and "<b>|x" in said
    text = (out / "compare.md").read_text()
    assert "&lt;b>\\|x" in text and "| 95 % |" in text
    numbers = json.loads((out / "compare.json").read_text())
    assert numbers["arms"] == {"a": [str(tmp_path / "a")], "<b>|x": [str(tmp_path / "b")]}
    strict = next(d for d in numbers["differences"] if d["measure"] == "strict")
    assert strict["difference"] == pytest.approx(strict["other"] - strict["first"]) and strict["reading"] == "higher"
    page = (out / "compare.html").read_text()
    assert "<b>|x" not in page and "&lt;b&gt;|x" in page
    assert "<script" not in page and not re.search(r"""(src|href)=|url\(|@import|https?://""", page)
    assert page.count("<polyline") >= 2 + 5 and "pass@k" in page
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(svg)
        assert "nan" not in svg and "inf" not in svg


class Tags(HTMLParser):
    """Every element of a page with its attributes."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_names_of_a_stranger_are_inert(tmp_path):
    hostile = "<script>alert(1)</script>\"' onload=x <img src=x onerror=alert(2)>"
    task = "<svg onload=alert(3)>\"'"
    for name in ("a", "b"):
        results(
            tmp_path / name,
            verdicts(ord(name), 0.5),
            task=task,
            model={**SETTINGS["model"], "name": hostile},
            prompt=hostile,
        )
    arm = "<script>alert(1)</script><img onerror>\"'"  # an = would end the name
    made = compare.compare([str(tmp_path / "a"), f"{arm}={tmp_path / 'b'}"])
    page = compare_report.html(made)
    tags = Tags(page).found
    assert page.count("alert(1)") >= 3 and "alert(3)" in page  # there as text
    assert not {"script", "img", "iframe", "object", "link", "a", "base", "form"} & {tag for tag, _ in tags}
    names = {name for _, attributes in tags for name in attributes}
    assert not [name for name in names if name.startswith("on") or name in ("src", "href", "style", "xlink:href")]
    policy = next(attributes for tag, attributes in tags if "http-equiv" in attributes)
    assert policy["content"].startswith("default-src 'none'; style-src 'sha256-")
    assert "<script" not in compare_report.markdown(made)


def test_the_page_of_greedy_answers_alone(tmp_path):
    for name in ("a", "b"):
        results(tmp_path / name, np.ones((30, 1)))
        manifest = json.loads((tmp_path / name / records.FILE).read_text())
        (tmp_path / name / records.FILE).write_text(json.dumps({**manifest, "n": 0}))
        file = tmp_path / name / "samples" / "sums.jsonl"
        file.write_text("".join(line + "\n" for line in file.read_text().splitlines() if '"greedy"' in line))
    made = compare.compare([str(tmp_path / "a"), str(tmp_path / "b")])
    assert {d.measure for d in made.differences} == {"greedy", "tokens"}
    assert "pass@k, strict" not in compare_report.html(made)
    assert "greedy" in compare_report.markdown(made)


# -- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"temperature": 0.5}, "temperature is 0.5 in"),
        ({"seed": 1}, "seed is 1 in"),
        ({"max_new_tokens": 32, "seed": 1}, "max_new_tokens is 32 in"),
        ({"first": 1}, "tasks.sums.digest is"),
        ({"prompt_style": "plain"}, "prompt_style is 'plain' in"),
        ({"version": "v2"}, "tasks.sums.verifier_version is 'v2'"),
        ({"grader": "choice"}, "tasks.sums.verifier is 'choice'"),
        ({"task": "other"}, "tasks.sums is None"),
    ],
)
def test_other_problems_or_settings_are_refused(tmp_path, capsys, changed, sentence):
    results(tmp_path / "a", verdicts(0, 0.5))
    results(tmp_path / "b", verdicts(1, 0.5), **changed)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert sentence in capsys.readouterr().err


def test_other_models_and_batch_sizes_are_not(tmp_path):
    results(tmp_path / "a", verdicts(0, 0.5))
    results(tmp_path / "b", verdicts(1, 0.5), model={**SETTINGS["model"], "name": "other"}, batch_size=1)
    compare.compare([str(tmp_path / "a"), str(tmp_path / "b")])


def test_more_refusals(tmp_path):
    a = str(results(tmp_path / "a", verdicts(0, 0.5)))
    for words, sentence in [
        ([a], "compare has 1 result folders"),
        ([a, str(tmp_path / "none")], "holds no results"),
        ([a, a], "two arms are called 'a'"),
        ([f"x={a}", f"y={a},{a}"], "different numbers of training seeds"),
        ([a, "y="], "arm 'y' names no folder"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            compare.compare(words)


def test_a_broken_off_rescoring_is_refused(tmp_path):
    """Samples are judged anew, the manifest not yet."""
    folders = [str(results(tmp_path / name, verdicts(0, 0.5))) for name in ("a", "b")]
    file = tmp_path / "b" / "samples" / "sums.jsonl"
    file.write_text(file.read_text().replace('"verifier_version": "v1"', '"verifier_version": "v2"', 3))
    with pytest.raises(ConfigError, match="has verdicts of verifier versions 'v2' and 'v1' in task sums"):
        compare.compare(folders)


def test_folders_that_do_not_tell_their_prompt_style_are_compared(tmp_path):
    folders = [str(results(tmp_path / name, verdicts(0, 0.5))) for name in ("a", "b")]
    manifest = json.loads((tmp_path / "b" / records.FILE).read_text())
    del manifest["prompt_style"]
    (tmp_path / "b" / records.FILE).write_text(json.dumps(manifest))
    compare.compare(folders)
    compare.compare(folders[::-1])


def test_unfinished_or_changed_folders_are_refused(tmp_path):
    folders = [results(tmp_path / name, verdicts(0, 0.5)) for name in ("a", "b")]
    file = folders[1] / "samples" / "sums.jsonl"
    whole = file.read_text().splitlines(keepends=True)
    file.write_text("".join(whole[:-1]))
    with pytest.raises(ConfigError, match="has 4 of 5 answers to problem p59 of task sums"):
        compare.compare([*map(str, folders)])
    file.write_text("".join(whole)[:-20])
    with pytest.raises(ConfigError, match="is damaged in line 300"):
        compare.compare([*map(str, folders)])
    manifest = json.loads((folders[1] / records.FILE).read_text())
    (folders[1] / records.FILE).write_text(json.dumps({**manifest, "finished": False}))
    with pytest.raises(ConfigError, match="is unfinished"):
        compare.compare([*map(str, folders)])
