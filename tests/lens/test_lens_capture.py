"""A capture holds what plain forward passes say; a record that is not one is refused in a sentence."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from rich.console import Console

import lens_records
import qtarget as qt
import tiny_models
from qtarget import ConfigError
from qtarget.lens import capture, record, terminal
from qtarget.lens.advise import advise
from qtarget.lens.replay import Replay
from quick_runs import labels_of, logits_of, quick_trainer, supervised_positions, tokenised_dataset, tokenised_rows

K = 7


def captured(folder, model=None, data=None, rows_=5, k=K, **settings):
    made = quick_trainer(
        model or tiny_models.trained_model(),
        folder / "run",
        tiny_models.conversation_dataset(5) if data is None else data,
        **settings,
    )
    return record.read(capture.capture(made, folder / "capture", rows=rows_, top_k=k))


def check(got, data, models, k=K):
    """Every number against softmax and sorting on the full logits of single rows."""
    number = 0
    for index, row in enumerate(tokenised_rows(data)):
        log_p = {name: logits_of(model.eval(), row).double().log_softmax(-1) for name, model in models.items()}
        for place, label in zip(supervised_positions(row).tolist(), labels_of(row).tolist(), strict=True):
            at = number - sum(r < index for r in got.tokens["row"])
            line = {name: values[number] for name, values in got.tokens.items()}
            assert (line["row"], line["position"], line["label"]) == (index, place + 1, label)
            mine = log_p["student"][at]
            assert line["log_p_y"] == pytest.approx(float(mine[label]), abs=1e-4)
            assert line["rank"] == int((mine > mine[label]).sum())
            assert line["entropy"] == pytest.approx(float(-(mine.exp() * mine).sum()), abs=1e-4)
            tops = {label}.union(*(values[at].topk(k).indices.tolist() for values in log_p.values()))
            assert line["ids"] == sorted(tops)
            for name, values in log_p.items():
                assert np.allclose(line[name], values[at][line["ids"]].detach(), atol=1e-4)
                outside = 1 - float(values[at][line["ids"]].exp().sum())
                assert np.exp(line[f"{name}_tail"]) == pytest.approx(outside, abs=1e-5)
                assert line[f"{name}_floor"] == pytest.approx(float(values[at].topk(k).values[-1]), abs=1e-4)
            number += 1
    assert number == len(got) == got.manifest["tokens"]


def test_a_capture_is_what_plain_forwards_say(tmp_path, monkeypatch):
    """Of student, teacher and reference, padded batches of different rows, a few tokens' logits at a time."""
    monkeypatch.setattr(capture, "_CHUNK", 3)
    teacher, data = tiny_models.trained_model(seed=7, width=48), tiny_models.conversation_dataset(5)
    target = qt.Target(trust=0.5, residual=[(0.5, qt.residual.teacher()), (0.5, qt.residual.reference())])
    got = captured(tmp_path, data=data, target=target, teacher_model=teacher)
    check(
        got,
        data,
        {
            "student": tiny_models.trained_model(),
            "teacher": tiny_models.trained_model(seed=7, width=48),
            "reference": tiny_models.trained_model(),
        },
    )
    assert got.others == ("teacher", "reference")


def test_rows_masks_and_words(tmp_path):
    data = tiny_models.conversation_dataset(5)
    got = captured(tmp_path, data=data)
    for line, row in zip(got.rows, tokenised_rows(data), strict=True):
        assert line["input_ids"] == row["input_ids"]
        assert line["supervised"] == [i > 0 and label != -100 for i, label in enumerate(row["labels"])]
    tokenizer = tiny_models.tokenizer()
    end = tokenizer.eos_token_id
    assert got.vocab[end] == ("<|im_end|>", True) and got.manifest["eos_token_ids"] == [end]
    text = "".join(got.vocab[index][0] for index in got.rows[0]["input_ids"])
    assert text == tokenizer.decode(got.rows[0]["input_ids"])


def test_columns_padding_rows_and_the_first_few(tmp_path):
    data = tokenised_dataset(
        tiny_models.conversation_dataset(6), weight=lambda number, row: [number + 0.5] * len(row["input_ids"])
    )
    got = captured(tmp_path, tiny_models.trained_model(vocab=352), data, rows_=3, target="iw-sft")
    assert got.manifest["rows"] == 3 and got.signals == ("weight",)
    assert got.tokens["weight"] == [row + 0.5 for row in got.tokens["row"]]
    assert got.vocab_size == len(tiny_models.tokenizer()), "padded rows of the head are no tokens"
    replayed = Replay(got).figures(qt.preset("iw-sft"))
    assert np.allclose(replayed.trust, got.tokens["weight"]) and replayed.notes == []


def test_what_is_replayed_is_what_training_reports(tmp_path):
    data = tiny_models.conversation_dataset(5)
    got = captured(tmp_path, data=data, k=320, target="target-sft", teacher_model=tiny_models.trained_model(seed=7))
    summary = Replay(got).summary(Replay(got).figures(qt.preset("target-sft")))
    made = quick_trainer(
        tiny_models.trained_model(),
        tmp_path,
        data,
        eval_dataset=data,
        target="target-sft",
        teacher_model=tiny_models.trained_model(seed=7),
    )
    reported = made.evaluate()
    for name in ("trust", "residual_mass", "update", "update_vs_sft"):
        assert getattr(summary, name) == pytest.approx(reported[f"eval_{name}"], rel=1e-4)


def test_an_interrupted_capture_is_no_record(tmp_path):
    made = quick_trainer(tiny_models.llama(), tmp_path / "run", tiny_models.conversation_dataset(20))

    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture.capture(made, tmp_path / "capture", rows=20, progress=stop)
    with pytest.raises(
        ConfigError, match=r"is not a capture: it has no manifest.json; make one with qtarget lens capture"
    ):
        record.read(tmp_path / "capture")
    capture.capture(made, tmp_path / "capture", rows=20)
    with pytest.raises(ConfigError, match=r"which holds a capture; name another folder, or delete that one"):
        capture.capture(made, tmp_path / "capture", rows=20)


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"rows": 0}, "rows is 0; capture one row or more"),
        ({"top_k": 0}, "top_k is 0; use a number from 1 to the vocabulary's 320 tokens"),
        ({"top_k": 321}, "top_k is 321; use a number from 1 to the vocabulary's 320 tokens"),
    ],
)
def test_a_capture_that_makes_no_sense(settings, told, tmp_path):
    made = quick_trainer(tiny_models.llama(), tmp_path)
    with pytest.raises(ConfigError) as error:
        capture.capture(made, tmp_path / "capture", **settings)
    assert told in str(error.value) and not (tmp_path / "capture").exists()


def test_a_row_longer_than_the_model(tmp_path):
    long = Dataset.from_list([{"input_ids": [5] * 100_000}])
    made = quick_trainer(tiny_models.llama(), tmp_path, long, max_length=None)
    with pytest.raises(
        ConfigError, match="row 0 has 100000 tokens, more than the model's 256 positions; set max_length"
    ):
        capture.capture(made, tmp_path / "capture")


# -- records that are none -------------------------------------------------------------------------


def broken(folder, name, make):
    file = folder / name
    file.write_bytes(make(file.read_bytes()))
    with pytest.raises(ConfigError) as error:
        record.read(folder)
    return str(error.value)


def test_files_that_are_cut_or_strange(tmp_path):
    captured(tmp_path)
    folder = tmp_path / "capture"
    kept = {file.name: file.read_bytes() for file in folder.iterdir()}

    def again():
        for name, content in kept.items():
            (folder / name).write_bytes(content)

    for name in ("rows.parquet", "tokens.parquet", "vocab.parquet"):
        assert f"{name} cannot be read" in broken(folder, name, lambda content: content[: len(content) // 2])
        again()
        assert f"{name} cannot be read" in broken(folder, name, lambda content: b"hello")
        again()
    assert "manifest.json cannot be read" in broken(folder, "manifest.json", lambda content: content[:20])
    again()
    assert "has format 99" in broken(folder, "manifest.json", lambda c: c.replace(b'"format": 1', b'"format": 99'))
    again()
    assert "it was cut short" in broken(folder, "manifest.json", lambda c: c.replace(b'"rows": 5', b'"rows": 6'))
    again()
    assert "lacks the columns" in broken(folder, "tokens.parquet", lambda content: kept["vocab.parquet"])
    again()
    record.read(folder)


def test_another_model_tokenizer_or_template(tmp_path):
    made = captured(tmp_path)
    manifest, model = made.manifest, made.manifest["model"]
    assert capture.differences(manifest, model, tiny_models.tokenizer()) == []
    assert "was made with model" in capture.differences(manifest, "other", tiny_models.tokenizer())[0]
    assert "with tokenizer" in capture.differences(manifest, model, tiny_models.tokenizer(extra="zebra "))[0]
    other = tiny_models.tokenizer(extra="")
    kept, other.chat_template = other.chat_template, "{{ messages }}"
    try:
        assert "with chat_template" in capture.differences(manifest, model, other)[0]
    finally:
        other.chat_template = kept


# -- in words --------------------------------------------------------------------------------------


def printed(call, *arguments, colour=False):
    console = Console(width=160, record=True, force_terminal=colour, file=open("/dev/null", "w"))  # noqa: SIM115
    call(*arguments, console)
    return console.export_text(styles=colour)


def test_show_in_a_pipe_and_on_a_terminal(tmp_path):
    got = captured(tmp_path, target="target-sft", teacher_model=tiny_models.trained_model(seed=7))
    plain = printed(terminal.show, got, qt.preset("target-sft"), 2)
    assert "row 2," in plain and "taught most" in plain and "[<|im_end|>]" in plain and "\x1b" not in plain
    assert "±" in plain
    assert "\x1b[" in printed(terminal.show, got, qt.preset("dft"), None, colour=True)
    with pytest.raises(ConfigError, match="row is 9, for which this capture has no supervised token; it has 0, 1, 2"):
        printed(terminal.show, got, qt.preset("sft"), 9)


def test_nothing_in_a_token_reaches_the_terminal():
    assert terminal.visible("a b\n\t\x1b[31m\u202e\x00") == "a␣b⏎⇥\\u{1b}[31m\\u{202e}\\u{0}"


def test_all_targets_compared():
    z = lens_records.random_logits(50, 60)
    got = lens_records.record_from_logits(z, lens_records.random_labels(z))
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal.comparison(got))
    text = console.export_text()
    assert "sft" in text and "not captured" in text and "1.00" in text


def test_nothing_is_divided_by_nothing():
    """Labels that are certain: sft asks for nothing, and no target for a share of it."""
    z = torch.full((4, 60), -200.0, dtype=torch.float64)
    z[range(4), range(4)] = 200.0
    got = lens_records.record_from_logits(z, torch.arange(4), rows=2)
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal.comparison(got))
    assert " nan " not in console.export_text()


@pytest.mark.parametrize("sharpness, place", [(0.5, "weak"), (12.0, "middle"), (60.0, "strong")])
def test_advice_follows_the_labels_probability(sharpness, place):
    z = lens_records.random_logits(400, 60, sharpness=sharpness)
    labels = z.argmax(-1) if place == "strong" else lens_records.random_labels(z)
    advice = advise(lens_records.record_from_logits(z, labels))
    assert advice.place == place, advice.figures
    said = "\n".join(advice.lines())
    assert "targets that tend to suit" in said and "arXiv:2510.00526" in said and said.count("doubt:") >= 2
    assert not any(word in said for word in ("will ", "best", "guarantee"))


def test_advice_warns_of_settings_that_are_another():
    z = lens_records.random_logits(100, 60)
    got = lens_records.record_from_logits(
        z, lens_records.random_labels(z), teacher=z + lens_records.random_logits(100, 60, 1)
    )
    for target, told in (
        (qt.preset("target-sft", eta=0.0), "is dft on these tokens: every Q is the same"),
        (qt.preset("gem", beta=1.0), "is sft on these tokens"),
        (qt.preset("beyond-log", alpha=80.0), "teaches nothing on these tokens"),
        (qt.preset("asft"), "needs a reference, which was not captured"),
        (qt.preset("psft"), "column old_logps was not captured"),
    ):
        assert any(told in warning for warning in advise(got, target).warnings), told
    assert "k is too small for target-sft" in advise(got, qt.preset("target-sft")).warnings[0]
    whole = lens_records.record_from_logits(
        z, lens_records.random_labels(z), teacher=z + lens_records.random_logits(100, 60, 1), k=60
    )
    assert advise(whole, qt.preset("target-sft")).warnings == []


# -- the command line ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("lens")
    for name, model in (("model", tiny_models.trained_model()), ("teacher", tiny_models.trained_model(seed=7))):
        model.save_pretrained(root / name)
        tiny_models.tokenizer().save_pretrained(root / name)
    (root / "data").mkdir()
    lines = [json.dumps(row) for row in tiny_models.conversation_dataset(6).to_list()]
    (root / "data" / "train.jsonl").write_text("\n".join(lines))
    (root / "my_losses.py").write_text(
        "import torch\n"
        "def dft(z, y):\n    return -z.softmax(-1).gather(-1, y[:, None]).sum()\n"
        "def broken(z, y):\n    return (z * float('nan')).sum()\n"
    )
    (root / "config.yaml").write_text(
        f"model_name_or_path: {root}/model\nteacher_model_name_or_path: {root}/teacher\ndataset_name: {root}/data\n"
        "target: target-sft\npacking: true\nmax_length: 128\nreport_to: none\n"
    )
    commands = [
        ["lens", "capture", "--config", "config.yaml", "--rows", "4", "--top_k", "9", "-o", "capture"],
        ["lens", "show", "capture", "--row", "1"],
        ["lens", "show", "capture", "--all"],
        ["lens", "advise", "capture", "--target", "{preset: target-sft, eta: 0.0}"],
        ["lens", "--loss", "my_losses:dft"],
        ["lens", "--loss", "my_losses:broken"],
        ["lens", "capture", "--config", "config.yaml", "-o", "capture"],
        ["lens", "shw", "capture"],
        ["lens", "show", "nowhere"],
        ["lens", "show"],
        ["lens", "show", "capture", "--rwo", "1"],
        ["lens", "capture", "--config", "config.yaml"],
        ["lens", "report", "capture", "--run", "nowhere"],
        ["lens", "--help"],
    ]
    batch = str(lens_records.__file__).replace("lens_records", "cli_batch")
    done = subprocess.run(
        [sys.executable, batch], input=json.dumps(commands), capture_output=True, text=True, timeout=300, cwd=root
    )
    answers = json.loads(done.stdout.splitlines()[-1])
    return {" ".join(command[1:]): answer for command, answer in zip(commands, answers, strict=True)}


@pytest.mark.parametrize(
    "command, told",
    [
        ("capture --config config.yaml --rows 4 --top_k 9 -o capture", "4 rows, "),
        ("show capture --row 1", "taught most"),
        ("show capture --all", "label-smoothing"),
        ("advise capture --target {preset: target-sft, eta: 0.0}", "is dft on these tokens"),
        ("--loss my_losses:dft", "0.5000  the student"),
        ("--help", "See what a target teaches before training with it"),
    ],
)
def test_verbs(command, told, world):
    status, out, err = world[command]
    assert status == 0, err
    assert told in out, out


@pytest.mark.parametrize(
    "command, told",
    [
        ("--loss my_losses:broken", "the loss is nan; every number of its input is finite"),
        ("capture --config config.yaml -o capture", "which holds a capture; name another folder"),
        ("shw capture", "word after lens is 'shw'; did you mean 'show'?"),
        ("show nowhere", "'nowhere' is not a capture: it has no manifest.json"),
        ("show", "nothing was given; name one folder of a capture"),
        ("show capture --rwo 1", "option of lens is '--rwo'; did you mean '--row'?"),
        ("capture --config config.yaml", "output is not set; name the folder of the capture"),
        ("report capture --run nowhere", "has no lens_history.parquet; train with lens_every"),
    ],
)
def test_what_is_refused(command, told, world):
    status, _, err = world[command]
    assert status == 2 and told in err and "Traceback" not in err, err
