"""The page of ``qtarget lens report`` in a real browser: its numbers are Python's, its text is inert, its keys work."""

import base64
import json
import math
import re

import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe

import lens_records
import qtarget as qt
from lens_pages import JS_FIGURES, Opened, chromium, near
from lens_records import record_from_logits
from qtarget import ConfigError
from qtarget.lens import page
from qtarget.lens.replay import Replay

N, V, K = 1000, 300, 20
Z = lens_records.random_logits(N, V, 7)
Y = lens_records.random_labels(Z)
MODELS = {
    "teacher": Z + lens_records.random_logits(N, V, 1, 1.5),
    "reference": Z + lens_records.random_logits(N, V, 2, 0.3),
}
RECORD = lens_records.of_everything(N, V, K)
REPLAY = Replay(RECORD)

# What a token may hold. Each is the text of one id in the row of test_text_is_inert.
NASTY = {
    "script": "</script><script>window.pwned=1</script>",
    "markup": "<b>bold</b>",
    "image": "<img src=x onerror=window.pwned=1>",
    "comment": "<!--<script>",
    "override": "abc\u202edef",
    "arabic": "مرحبا",
    "emoji": "👩\u200d🚀",
    "surrogate": "x\ud800y",
    "nul": "\x00",
    "control": "\x1b[31m\x07",
    "newline": "line\nbreak",
    "spaces": "  \t\u00a0\u200b",
    "quote": "\"'`${alert(1)}&amp;",
    "separator": "\u2028",
    "accent": "\u0301",
    "nothing": "",
}


@pytest.fixture(scope="session")
def file(tmp_path_factory):
    return page.write(RECORD, tmp_path_factory.mktemp("page") / "lens.html")


@pytest.fixture(scope="module")
def shared(browser, file):
    """One page for the tests that only compute."""
    opened = Opened(browser, file)
    yield opened.page
    opened.close()


@pytest.mark.browser
def test_every_preset_and_parameter_has_its_control(shared):
    missing = shared.evaluate(
        """(presets) => {
      const choose = (name) => {
        const select = document.getElementById('name-A');
        select.value = name;
        select.dispatchEvent(new Event('change'));
      };
      const lacking = [];
      for (const [name, parameters] of presets) {
        choose(name);
        const hidden = parameters.filter((key) => !document.getElementById(`${key}-A`));
        lacking.push(...hidden.map((key) => `${name}.${key}`));
      }
      return lacking;
    }""",
        [[name, [*qt.presets.describe(name).parameters]] for name in qt.presets.names()],
    )
    # ProFiT's bounds come with its direction "middle"; the others are noted to stay as they are.
    assert missing == ["talr.tau", "symmetric-ce.beta", "profit.tau_low", "profit.tau_high", "prift.threshold"]
    assert shared.evaluate("lens.D.targets.map((p) => p.name)") == qt.presets.names()


@pytest.mark.browser
def test_without_the_other_models(open_page, tmp_path):
    view = open_page(page.write(record_from_logits(Z[:50], Y[:50]), tmp_path / "lens.html"))
    options = view.eval_on_selector_all(
        "#name-A option", "found => found.map(o => [o.value, o.disabled, o.textContent])"
    )
    disabled = {name for name, off, _ in options if off}
    assert disabled == {name for name in qt.presets.names() if qt.preset(name).requires & {"teacher", "reference"}}
    assert ["kd", True, "kd (no teacher captured)"] in options
    assert view.input_value("#name-A") == "dft" and view.input_value("#name-B") == "sft"
    view.evaluate("() => lens.ready.then(() => 0)")
    assert "no reference captured" in view.inner_text("#compare-view")
    assert "unknown: the capture does not say" in view.inner_text("#mask-view")


@pytest.mark.browser
def test_a_page_of_some_rows_and_fewer_ids(open_page, tmp_path, monkeypatch):
    """Thinned, a page says so and is the replay of a record with those ids in the tail: wider errors, still true."""
    monkeypatch.setattr(page, "_ENTRIES", 26 * N // 2)
    view = open_page(page.write(RECORD, tmp_path / "lens.html", max_rows=2))
    facts = view.inner_text("#facts")
    assert "the first 2 of 4 captured rows" in facts and "ids a token went into its tail" in facts
    assert view.evaluate("lens.D.widest") == 26 and view.evaluate("lens.D.topK") == 20
    for name in ("target-sft", "eaft", "gem", "kd"):
        got = view.evaluate(JS_FIGURES.replace("{ length: 40 }", "{ length: 0 }"), [name, {}])
        figures = REPLAY.figures(qt.preset(name))
        n = len(got["update"])
        assert n == 500
        apart = np.abs(np.asarray(got["update"]) - figures.update[:n])
        assert (apart <= np.asarray(got["updateError"]) + figures.update_error[:n] + 1e-4).all()
        near(got["trust"], figures.trust[:n], "trust")
        assert np.mean(got["updateError"]) >= figures.update_error[:n].mean() - 1e-4


def test_no_browser_is_said_and_not_skipped(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CHROMIUM", raising=False)
    with pytest.raises(pytest.fail.Exception, match="no Chromium found; install one with: make browser"):
        chromium()


def test_what_cannot_be_shown():
    with pytest.raises(ConfigError, match="rows is 0; show one row or more"):
        page.html(RECORD, max_rows=0)
    few = record_from_logits(Z[:8], Y[:8], rows=2)
    few.tokens["row"] = [1] * 8
    with pytest.raises(ConfigError, match="the first 1 rows of this capture have no supervised token"):
        page.html(few, max_rows=1)


# -- the file ----------------------------------------------------------------------------------------------------


def test_the_file_stands_alone(file):
    text = file.read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", text)
    block = text.split('id="data">')[1].split("</script>")[0]
    assert "<" not in block and block.isascii()
    assert json.loads(block)["topK"] == K
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "fetch("):
        assert word not in text


def test_one_log_probability_is_kept_to_four_digits():
    log_p = -np.concatenate([np.linspace(0, 3, 5000), np.geomspace(3, 59, 5000)])
    codes = np.frombuffer(base64.b64decode(page._codes(log_p)), dtype="<u2")
    back = -0.2 * np.expm1(codes / (65535 / math.log1p(300)))
    assert np.abs(np.exp(back) - np.exp(log_p)).max() < 3e-5
    assert (np.abs(back - log_p) <= 5e-5 * (0.2 - log_p)).all()


# -- the text ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nasty_file(tmp_path_factory):
    n = len(NASTY)
    z = lens_records.random_logits(n, 60, 5)
    labels = torch.arange(n) + 1
    record = record_from_logits(z, labels, teacher=z + lens_records.random_logits(n, 60, 6), k=10, rows=1)
    for index, text in enumerate(NASTY.values(), 1):
        record.vocab[index] = (text, False)
    record.vocab[0] = ("<|im_start|>", True)
    record.manifest |= {"model": "<img src=x onerror=window.pwned=1>", "eos_token_ids": [n], "program": "</script>"}
    return page.write(record, tmp_path_factory.mktemp("nasty") / "lens.html")


@pytest.mark.browser
def test_text_is_inert(open_page, nasty_file):
    view = open_page(nasty_file)
    view.evaluate("() => lens.ready.then(() => 0)")
    assert view.evaluate("window.pwned") is None
    assert view.evaluate("document.querySelectorAll('img, b, main script').length") == 0
    shown = view.eval_on_selector_all(
        "#panes > div:first-child [role=option]", "found => found.map(e => e.textContent)"
    )
    by_name = dict(zip(NASTY, shown, strict=True))
    assert by_name["script"] == "</script><script>window.pwned=1</script>"
    assert by_name["image"] == "<img␣src=x␣onerror=window.pwned=1>"
    assert by_name["override"] == r"abc\u{202e}def"
    assert by_name["arabic"] == "مرحبا"
    assert by_name["emoji"] == "👩\\u{200d}🚀"
    assert by_name["surrogate"] == r"x\u{d800}y"
    assert by_name["nul"] == r"\u{0}"
    assert by_name["control"] == r"\u{1b}[31m\u{7}"
    assert by_name["newline"] == "line⏎break"
    assert by_name["spaces"] == r"␣␣⇥\u{a0}\u{200b}"
    assert by_name["separator"] == r"\u{2028}"
    assert by_name["accent"] == "◌\u0301"
    assert by_name["nothing"] == "∅"
    isolated = "found => found.every(e => getComputedStyle(e).unicodeBidi === 'isolate')"
    assert view.eval_on_selector_all(".token", isolated)
    assert "<img src=x onerror=window.pwned=1>" in view.inner_text("#facts")
    assert "yes, in every row; the last trained token in 1 of them" in view.inner_text("#mask-view")


# -- the views ---------------------------------------------------------------------------------------------------


def figure(view, key, name):
    """A figure of a card, as it is written there."""
    script = """([key, name]) => [...document.querySelectorAll(`#figures-${key} div`)]
      .find((pair) => pair.firstChild.textContent === name).lastChild.textContent"""
    return view.evaluate(script, [key, name])


def settled(view):
    view.wait_for_function("() => lens.state.A.summary && lens.state.B.summary")


def levels(view, key):
    return view.eval_on_selector_all(f"[id^=t-{key}-]", "found => found.map(e => /l(\\d)/.exec(e.className)[1])")


def expected_levels(view, values):
    tokens = view.eval_on_selector_all("[id^=t-A-]", "found => found.map(e => Number(e.dataset.token))")
    return [str(min(8, max(0, math.floor(9 * values[i])))) for i in tokens]


@pytest.mark.browser
def test_the_first_screen(open_page, file):
    view = open_page(file)
    settled(view)
    assert view.input_value("#name-A") == "target-sft" and view.input_value("#name-B") == "sft"
    apart = view.evaluate("[...lens.D.disagreement]")
    sums = np.bincount(RECORD.tokens["row"], weights=apart)
    assert int(view.input_value("#row")) == sums.argmax()
    chosen = int(view.evaluate("lens.state.token"))
    row = [i for i in range(N) if RECORD.tokens["row"][i] == sums.argmax()]
    assert apart[chosen] == max(apart[i] for i in row)
    teacher = MODELS["teacher"].double().softmax(-1)
    p, i = Z.softmax(-1), chosen
    truth = (1 - p[i, Y[i]] + 1 - teacher[i, Y[i]] + (p[i] - teacher[i]).abs().sum() / 2) / 3
    assert apart[i] == pytest.approx(float(truth), abs=0.03), "the tails' own differences are not known"


@pytest.mark.browser
def test_another_objective_and_a_moved_eta(open_page, file):
    view = open_page(file)
    settled(view)
    before = levels(view, "A"), view.inner_text("#token-bars"), figure(view, "A", "mean update")
    view.select_option("#colour", "update")
    view.fill("#eta-A", "0.9")
    settled(view)
    truth = REPLAY.figures(qt.preset("target-sft", eta=0.9))
    summary = REPLAY.summary(truth)
    assert figure(view, "A", "mean update") == f"{summary.update:.3f} ± {summary.update_error:.3f}" != before[2]
    assert figure(view, "A", "mean trust") == f"{summary.trust:.3f}"
    carry = int(figure(view, "A", "tokens that carry 90 %").split()[0])
    assert carry == pytest.approx(100 * summary.carries_90, abs=0.5 + 200 / N)
    got, wanted = levels(view, "A"), expected_levels(view, np.sqrt(truth.update))
    assert np.mean(np.asarray(got) == wanted) > 0.99 and got != before[0]
    assert view.inner_text("#token-bars") != before[1]
    view.select_option("#name-A", "gem")
    settled(view)
    summary = REPLAY.summary(REPLAY.figures(qt.preset("gem")))
    assert figure(view, "A", "off the simplex") == f"{100 * summary.off_simplex:.0f} %"
    assert view.is_visible("#beta-A") and not view.query_selector("#eta-A")
    assert figure(view, "B", "of sft’s update") == "1.00"


@pytest.mark.browser
def test_an_upper_clip_follows_the_lower_one_until_it_is_moved(open_page, file):
    view = open_page(file)
    view.select_option("#name-B", "psft")
    for clip, high, given in (("0.5", "0.5", {"clip": 0.5}), ("0.05", "0.05", {"clip": 0.05})):
        view.fill("#clip-B", clip)
        settled(view)
        assert view.input_value("#clip_high-B") == high
        truth = REPLAY.summary(REPLAY.figures(qt.preset("psft", **given)))
        assert figure(view, "B", "mean trust") == f"{truth.trust:.3f}"
    view.fill("#clip_high-B", "1.5")
    view.fill("#clip-B", "0.3")
    settled(view)
    assert view.input_value("#clip_high-B") == "1.5"
    truth = REPLAY.summary(REPLAY.figures(qt.preset("psft", clip=0.3, clip_high=1.5)))
    assert figure(view, "B", "mean trust") == f"{truth.trust:.3f}"


@pytest.mark.browser
def test_a_number_out_of_range_changes_nothing(open_page, file):
    view = open_page(file)
    settled(view)
    before = figure(view, "A", "mean update")
    field = view.locator("[aria-label='eta of A, as a number']")
    for wrong in ("7", "-1", ""):
        field.fill(wrong)
        assert field.get_attribute("aria-invalid") == "true" and figure(view, "A", "mean update") == before
    field.fill("0.25")
    settled(view)
    assert field.get_attribute("aria-invalid") is None and view.input_value("#eta-A") == "0.25"
    truth = REPLAY.summary(REPLAY.figures(qt.preset("target-sft", eta=0.25)))
    assert figure(view, "A", "mean update") == f"{truth.update:.3f} ± {truth.update_error:.3f}"


@pytest.mark.browser
def test_a_figure_with_a_large_error_is_marked(open_page, tmp_path):
    record = record_from_logits(0.02 * Z[:100], Y[:100], teacher=0.01 * MODELS["teacher"][:100], k=3)
    view = open_page(page.write(record, tmp_path / "lens.html"))
    settled(view)
    assert "k is too small" in view.inner_text("#notes-A")
    assert "k is too small" not in view.inner_text("#notes-B")
    view.evaluate("() => lens.ready.then(() => 0)")
    marked = view.eval_on_selector_all("tr.doubtful th", "found => found.map(e => e.textContent)")
    replay = Replay(record)
    names = [name for name in qt.presets.names() if "reference" not in qt.preset(name).requires]
    assert (
        [text.removesuffix(" *") for text in marked]
        == [n for n in names if not replay.summary(replay.figures(qt.preset(n))).reliable]
        != []
    )


@pytest.mark.browser
def test_clicking_a_token_shows_its_bars(open_page, file):
    view = open_page(file)
    settled(view)
    target = view.query_selector_all("[id^=t-A-]")[7]
    token = int(target.get_attribute("data-token"))
    target.click()
    assert view.evaluate("lens.state.token") == token
    label = view.inner_text("#token-bars tbody tr:first-child th")
    assert label == f"tok{int(Y[token])}␣label"
    values = view.eval_on_selector_all(
        "#token-bars tbody tr:first-child .value", "found => found.map(e => e.textContent)"
    )
    shown = [float(value.replace("−", "-")) for value in values]
    a = REPLAY.figures(qt.preset("target-sft"))
    at = np.flatnonzero(REPLAY.is_label[token])[0]
    p = REPLAY.p[token, at]
    truth = [p, *(np.exp(REPLAY.logps[m][token, at]) for m in ("teacher", "reference"))]
    truth += [a.residual[token, at], a.q[token, at], p - a.q[token, at], 1.0, p - 1.0]
    assert shown == pytest.approx(truth, abs=6e-4)
    sums = view.evaluate("""() => {
      const rows = [...document.querySelectorAll('#token-bars tbody tr')];
      const number = (row, c) => parseFloat(row.querySelectorAll('.value')[c].textContent);
      return [0, 3, 4].map((c) => rows.reduce((sum, row) => sum + number(row, c), 0));
    }""")
    assert sums == pytest.approx([1, 1, 1], abs=8e-3), "with the other ids and the tail each distribution is whole"


@pytest.mark.browser
def test_by_keyboard_alone(open_page, file):
    view = open_page(file)
    settled(view)
    for _ in range(60):
        view.keyboard.press("Tab")
        if view.evaluate("document.activeElement.id") == "eta-A":
            break
    else:
        pytest.fail("Tab does not reach the slider of eta")
    before = figure(view, "A", "mean update")
    view.keyboard.press("ArrowRight")
    settled(view)
    assert view.input_value("#eta-A") == "0.51" and figure(view, "A", "mean update") != before
    for _ in range(60):
        view.keyboard.press("Tab")
        if view.evaluate("document.activeElement.getAttribute('role')") == "listbox":
            break
    else:
        pytest.fail("Tab does not reach the text")
    view.keyboard.press("Home")
    first = view.evaluate("lens.state.token")
    view.keyboard.press("ArrowRight")
    assert view.evaluate("lens.state.token") == first + 1
    view.keyboard.press("ArrowDown")
    assert view.evaluate("lens.state.token") > first + 2
    view.keyboard.press("ArrowUp")
    view.keyboard.press("ArrowLeft")
    assert abs(view.evaluate("lens.state.token") - first) <= 1
    view.keyboard.press("End")
    assert view.evaluate("lens.state.token") > first + 100
    active = view.evaluate("document.activeElement.getAttribute('aria-activedescendant')")
    assert active == f"t-A-{view.evaluate('lens.state.token')}"
    outline = view.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus is seen"
    row = view.evaluate("lens.state.row")
    view.keyboard.press("PageDown" if row < 3 else "PageUp")
    assert abs(view.evaluate("lens.state.row") - row) == 1
    view.keyboard.press("Enter")
    assert view.evaluate("document.activeElement.id") == "token"


def in_area(p_from, p_to, e_from, e_to):
    p, entropy = np.exp(REPLAY.log_p_y), REPLAY.record.numbers("entropy")
    return int(((p >= p_from) & (p < p_to) & (entropy >= e_from) & (entropy <= e_to)).sum())


@pytest.mark.browser
def test_the_map_and_an_area_of_it(open_page, file):
    view = open_page(file)
    view.fill("#area-pFrom", "0.2")
    view.fill("#area-pTo", "0.6")
    view.fill("#area-eTo", "4")
    assert view.inner_text("#map-list h3").startswith(f"{in_area(0.2, 0.6, 0, 4)} tokens")
    view.locator("svg.map").scroll_into_view_if_needed()
    box = view.locator("svg.map").bounding_box()
    x, y = box["x"], box["y"]
    view.mouse.move(x + 0.2 * box["width"], y + 0.3 * box["height"])
    view.mouse.down()
    view.mouse.move(x + 0.7 * box["width"], y + 0.7 * box["height"], steps=3)
    view.mouse.up()
    area = [float(view.input_value(f"#area-{name}")) for name in ("pFrom", "pTo", "eFrom", "eTo")]
    assert area[0] == pytest.approx((0.2 * 500 - 46) / 440, abs=0.02)
    assert view.inner_text("#map-list h3").startswith(f"{in_area(*area)} tokens")
    view.click("#map-list .jump >> nth=0")
    i = view.evaluate("lens.state.token")
    assert area[0] <= math.exp(REPLAY.log_p_y[i]) < area[1]
    cells = view.evaluate("document.querySelectorAll('svg.map .cell').length")
    assert 20 < cells <= 36 * 36
    for colour in ("log", "trust A", "update B"):
        view.select_option("#map-figure select", colour)
        assert view.evaluate("document.querySelectorAll('svg.map .cell').length") == cells


@pytest.mark.browser
def test_the_history_of_a_run(open_page, tmp_path):
    record = record_from_logits(Z[:60], Y[:60], teacher=MODELS["teacher"][:60])
    frames = []
    for step in (10, 20, 30):
        cells = [[0] * 20 for _ in range(20)]
        cells[step // 10][3] = 5 * step
        frames.append({"step": step, "count": cells, "trust": [[0.5] * 20] * 20, "update": [[float("nan")] * 20] * 20})
    record.manifest["history"] = frames
    view = open_page(page.write(record, tmp_path / "lens.html"))
    view.fill("#history-step", "1")
    assert view.inner_text("#history-said") == "step 20"
    assert view.evaluate("document.querySelectorAll('svg.map .cell').length") == 1
    assert "100 tokens" in view.get_attribute("svg.map", "aria-label")
    view.select_option("#map-figure select", "trust A")
    assert view.evaluate("document.querySelector('svg.map .cell').getAttribute('class')") == "cell l4"
    view.click("#history-play")
    view.wait_for_function("() => document.getElementById('history-said').textContent === 'step 30'")
    view.click("text=Back to the capture")
    assert view.inner_text("#history-said") == "this capture"


@pytest.mark.browser
def test_the_list_of_disagreements_jumps(open_page, file):
    view = open_page(file)
    shown = view.eval_on_selector_all(
        "#conflicts-list tbody td:nth-last-child(2)", "found => found.map(e => Number(e.textContent))"
    )
    apart = sorted(view.evaluate("[...lens.D.disagreement]"), reverse=True)
    assert shown == pytest.approx(apart[: len(shown)], abs=6e-3)
    view.click("#conflicts-list .jump >> nth=3")
    assert view.evaluate("lens.D.disagreement[lens.state.token]") == pytest.approx(apart[3])
    assert view.evaluate("document.activeElement.getAttribute('role')") == "listbox"
    view.click("#conflicts-list > button")
    assert view.evaluate("document.querySelectorAll('#conflicts-list tbody tr').length") == 30


@pytest.mark.browser
def test_all_methods_on_one_screen(open_page, file):
    view = open_page(file)
    results = view.evaluate("() => lens.ready")
    assert list(results) == qt.presets.names()
    for name, got in results.items():
        truth = REPLAY.summary(REPLAY.figures(qt.preset(name)))
        assert got["update_vs_sft"] == pytest.approx(truth.update_vs_sft, abs=1e-4)
        assert got["carries_90"] == pytest.approx(truth.carries_90, abs=2 / N)
    lines = view.eval_on_selector_all("table.compare tbody tr", "found => found.map(e => e.innerText)")
    assert [line.split()[0] for line in lines] == qt.presets.names()


# -- how it looks, and for whom ------------------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.parametrize(
    "width, scheme",
    [
        (400, "light"),
        (1600, "dark"),
        pytest.param(400, "dark", marks=pytest.mark.full),
        pytest.param(1600, "light", marks=pytest.mark.full),
    ],
)
def test_wide_and_narrow_light_and_dark(open_page, file, nasty_file, width, scheme):
    for path in (file, nasty_file):
        view = open_page(path, viewport={"width": width, "height": 900}, color_scheme=scheme)
        view.evaluate("() => lens.ready.then(() => 0)")
        assert view.evaluate("document.documentElement.scrollWidth") <= width, "nothing runs out of the page"
        background = view.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(re.findall(r"\d+", background)[0]) < 128) == (scheme == "dark")
        found = Axe().run(view)
        said = [
            f"{v['id']}: {v['nodes'][0]['html'][:200]} {v['nodes'][0].get('failureSummary', '')}"
            for v in found.response["violations"]
        ]
        assert said == []
    view.click("#theme")
    background = view.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", background)[0]) < 128) == (scheme == "light")


@pytest.mark.browser
def test_the_scale_runs_from_light_to_dark_in_both_themes(open_page, file):
    for scheme in ("light", "dark"):
        view = open_page(file, color_scheme=scheme)
        colours = view.eval_on_selector_all(
            "#text-legend .step", "found => found.map(e => getComputedStyle(e).backgroundColor)"
        )
        lightness = [
            sum(w * int(c) for w, c in zip((2, 7, 1), re.findall(r"\d+", one), strict=True)) for one in colours
        ]
        assert len(lightness) == 9 and lightness == sorted(lightness, reverse=True), scheme


@pytest.mark.browser
def test_a_token_stays_in_one_line_and_a_characters_bytes_under_it(open_page, tmp_path):
    """However narrow the page is; é is two tokens, and what follows it is none of it."""
    texts = ["so", "<C3>", "<A9>", " many words", " that", "<F0><9F>", "<98>", "<80>", "<9F>", *[" and more"] * 20]
    record = record_from_logits(Z[: len(texts)], torch.arange(len(texts)) + 1, k=K, rows=1)
    record.vocab |= {index: (text, False) for index, text in enumerate(texts, 1)}
    view = open_page(page.write(record, tmp_path / "lens.html"), viewport={"width": 400, "height": 900})
    view.evaluate("() => lens.ready.then(() => 0)")
    lines = view.eval_on_selector_all("#panes .trained", "found => found.map(e => e.getClientRects().length)")
    assert lines and set(lines) == {1}
    glyphs = view.eval_on_selector_all(
        "#panes > :first-child .glyph",
        "found => found.map(e => [e.querySelector('.whole').textContent, "
        "...[...e.querySelectorAll('.token')].map(t => t.textContent)])",
    )
    assert glyphs == [["é", "<C3>", "<A9>"], ["😀", "<F0><9F>", "<98>", "<80>"]]


@pytest.mark.browser
def test_on_paper(open_page, file):
    view = open_page(file, color_scheme="dark")
    view.emulate_media(media="print")
    assert not view.is_visible("nav") and not view.is_visible("#eta-A")
    assert view.is_visible("#figures-A") and view.is_visible("#panes")
    background = view.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(255, 255, 255)"
    assert view.evaluate("getComputedStyle(document.querySelector('.text')).overflowY") == "visible"


@pytest.mark.browser
@pytest.mark.full  # writing 60 MB takes most of its quarter of a minute
def test_many_tokens_open_and_answer_before_all_are_summed(open_page, tmp_path):
    """300 rows of 600 tokens, 33 ids each: 50 MB. A slider's tokens are drawn anew while the sum over all goes on."""
    view = open_page(page.write(lens_records.large_record(300, 600), tmp_path / "lens.html"))
    opened = view.evaluate("lens.state.openedAfter")
    view.evaluate("() => lens.ready.then(() => 0)")
    times = view.evaluate("""async () => {
      const times = [];
      for (let k = 0; k < 9; k++) {
        const slider = document.getElementById('eta-A');
        const from = performance.now();
        slider.value = 0.1 + 0.08 * k;
        slider.dispatchEvent(new Event('input'));
        document.getElementById('panes').getBoundingClientRect(); // laid out as well
        const answered = performance.now() - from;
        const summed = Boolean(lens.state.A.summary);
        while (!lens.state.A.summary) await new Promise((resolve) => setTimeout(resolve, 0));
        times.push([answered, performance.now() - from, summed]);
      }
      return times;
    }""")
    answered, whole, _ = np.median(times, axis=0)
    print(f"\nopened after {opened:.0f} ms; a slider answers in {answered:.0f} ms, over all tokens in {whole:.0f} ms")
    assert not any(summed for *_, summed in times)
