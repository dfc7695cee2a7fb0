"""What the doctor says of a cache, against the same by hand; a cache that a server filled."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset

import teacher_caches
import tiny_models
from fake_server import FakeServer, status
from qtarget.cli.__main__ import main
from qtarget.models.server import Server
from qtarget.teachers.cache.index import supervised_positions
from qtarget.teachers.cache.reader import CachedTeacher
from quick_runs import labels_of, logits_of, tokenised_rows
from teacher_caches import VOCAB, build_cache, file_contents, refusal_of, rows_with_hints, wider_teacher

K = 16


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return teacher_caches.write_world(tmp_path_factory.mktemp("doctor"))


@pytest.fixture(scope="module")
def some(world) -> Path:
    return build_cache(world, world / "some", "--k", K, "--shard_tokens", 100)


def examined(world: Path, folder: Path, out: Path, *more: object) -> dict:
    words = ["cache", "doctor", "--config", world / "config.yaml", "--cache", folder, "--json", out, *more]
    assert main([str(word) for word in words]) == 0
    return json.loads(out.read_text())


def taught(p: torch.Tensor, p_y: torch.Tensor, delta: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
    mixed = p.sqrt() * t.sqrt()
    guided = mixed / mixed.sum(-1, keepdim=True)
    d = p.log() - t.log()
    reverse = p - p * (d - (p * d).sum(-1, keepdim=True))
    own = {"kd": t, "kd-hybrid": 0.5 * delta + 0.5 * t, "target-sft": p_y * delta + (1 - p_y) * guided}
    return own | {"kd(temperature=1.0, divergence=reverse_kl)": reverse}


def by_hand(folder: Path) -> dict[tuple[str, str], dict[str, float]]:
    """Errors of Q and of the gradient in float64, one row at a time, from the definitions."""
    cache, student, live = (
        CachedTeacher(folder),
        tiny_models.trained_model().double().eval(),
        wider_teacher(torch.float64),
    )
    weight = student.lm_head.weight.detach()
    made: dict[tuple[str, str], dict[str, list]] = {}
    for row in tokenised_rows(Dataset.from_list(rows_with_hints())):
        got = cache.gather(torch.tensor(cache.places(row["input_ids"], row["labels"])))
        at, y = supervised_positions(row["labels"]), labels_of(row)
        ids, kept = got["teacher_ids"][at].long(), got["teacher_logprobs"][at].double().exp()
        mass = got["teacher_tail_logprob"][at].double().exp()
        p = logits_of(student, row).detach().softmax(-1)
        t = logits_of(live, row).detach().softmax(-1)
        delta = torch.nn.functional.one_hot(y, VOCAB).double()
        outside = torch.ones_like(p).scatter(1, ids, 0.0)
        p_y = p.gather(1, y[:, None])
        for tail, shape in (("student", p * outside), ("even", outside)):
            c = (shape / shape.sum(-1, keepdim=True) * mass[:, None]).scatter(1, ids, kept)
            c = c / c.sum(-1, keepdim=True)  # what was kept was rounded
            live_q, cached_q = taught(p, p_y, delta, t), taught(p, p_y, delta, c)
            for name, q in live_q.items():
                parts = made.setdefault((name, tail), {"off": [], "g": []})
                parts["off"].append(cached_q[name] - q)
                parts["g"].append(p - q)
    return {
        key: {
            "q_mean": float(torch.cat(parts["off"]).abs().sum(-1).mean() / 2),
            "q_max": float(torch.cat(parts["off"]).abs().sum(-1).max() / 2),
            "logit_gradient": float(torch.cat(parts["off"]).norm() / torch.cat(parts["g"]).norm()),
            "hidden_gradient": float(
                (torch.cat(parts["off"]) @ weight).norm() / (torch.cat(parts["g"]) @ weight).norm()
            ),
        }
        for key, parts in made.items()
    }


def test_errors_are_those_of_the_definitions(world, some, tmp_path, capsys):
    reverse = "{preset: kd, divergence: reverse_kl}"
    report = examined(world, some, tmp_path / "report.json", "--target", reverse)
    assert report["rows"] == 24 and report["same_teacher"]
    wanted = by_hand(some)
    assert {(line["target"], line["tail"]) for line in report["targets"]} == set(wanted)
    for line in report["targets"]:
        for name, value in wanted[line["target"], line["tail"]].items():
            assert line[name] == pytest.approx(value, rel=1e-3), (line["target"], line["tail"], name)
    said = capsys.readouterr().out
    assert "mass outside the k" in said and "target-sft" in said and "bound" in said


def test_the_bound_holds_and_is_no_larger_than_the_mass_outside(world, some, tmp_path):
    report = examined(world, some, tmp_path / "report.json")
    by_name = {(line["target"], line["tail"]): line for line in report["targets"]}
    for (target, tail), line in by_name.items():
        assert line["holds"] == (None if tail == "even" else True), target
        if tail == "student":
            assert line["q_mean"] < line["bound_mean"] and line["q_max"] <= line["bound_max"]
    assert by_name["kd", "student"]["bound_mean"] == pytest.approx(report["lost_mass"]["mean"], rel=0.02)


def test_the_whole_vocabulary_has_no_error(world, tmp_path):
    folder = build_cache(world, tmp_path / "whole", "--k", VOCAB, "--cache_dtype", "float32")
    report = examined(world, folder, tmp_path / "report.json", "--rows", 5)
    assert report["rows"] == 5 and report["lost_mass"]["max"] < 1e-6
    assert all(line["q_max"] < 1e-5 and line["logit_gradient"] < 1e-4 for line in report["targets"])


def test_the_runs_own_target_is_looked_at_too(world, some, tmp_path):
    own = "{preset: target-sft, eta: 0.9}"
    report = examined(world, some, tmp_path / "report.json", "--target", own, "--rows", 3)
    names = [line["target"] for line in report["targets"]]
    assert any("eta=0.9" in name for name in names) and "target-sft" in names


def test_a_teacher_that_is_the_student(world, tmp_path, capsys):
    """Its gradient is nothing, and nothing is divided by it."""
    itself = ["--teacher_model_name_or_path", world / "model"]
    folder = build_cache(world, tmp_path / "itself", "--k", K, *itself)
    report = examined(world, folder, tmp_path / "report.json", "--rows", 4, *itself)
    gradients = {line["target"]: (line["logit_gradient"], line["hidden_gradient"]) for line in report["targets"]}
    assert gradients["kd"] == (None, None) and all(0 < error < 1 for error in gradients["kd-hybrid"])
    assert "none: kd has no gradient on these rows" in capsys.readouterr().out


def test_another_live_teacher(world, some, tmp_path, capsys):
    report = examined(world, some, tmp_path / "r.json", "--teacher_model_name_or_path", world / "other", "--rows", 4)
    assert not report["same_teacher"]
    assert "NOT THE ONE THIS CACHE WAS BUILT WITH" in capsys.readouterr().out


def test_rows_it_does_not_have(world, some, tmp_path, capsys):
    changed = rows_with_hints()
    changed[0]["completion"][0]["content"] += "!"
    folder = teacher_caches.write_rows(tmp_path / "changed", changed)
    words = ["cache", "doctor", "--config", world / "config.yaml", "--cache", some, "--dataset_name", folder]
    assert "row 0 of the train dataset is not in the teacher cache" in refusal_of(capsys, *words)
    assert "rows is 0" in refusal_of(capsys, *words, "--rows", 0)


# -- from a server -------------------------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(Server, "backoff", 0.01)
    with FakeServer(wider_teacher(), names=["large"], max_logprobs=20) as server:
        yield server


@pytest.mark.parametrize("context", [None, "{{ prompt }} ({{ hint }})"])
def test_filled_by_a_server(context, world, served, tmp_path):
    """The same tokens as from the loaded teacher, and the same log-probabilities to float32."""
    more = ["--k", K, "--cache_dtype", "float32", *(["--teacher_context", context] if context else [])]
    live = build_cache(world, tmp_path / "live", *more)
    asked = build_cache(world, tmp_path / "asked", *more, "--server", served.url)
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (live, asked)]
    assert manifests[0]["tokens"] == manifests[1]["tokens"]
    assert manifests[1]["teacher"]["served_as"] == "large"
    a, b = CachedTeacher(live), CachedTeacher(asked)
    assert a.index.keys.tolist() == b.index.keys.tolist()
    every = torch.arange(len(a))
    one, other = a.gather(every), b.gather(every)
    assert (one["teacher_ids"] == other["teacher_ids"]).double().mean() > 0.999, "ties may fall otherwise"
    assert torch.allclose(one["teacher_logprobs"], other["teacher_logprobs"], atol=2e-5)
    assert torch.allclose(one["teacher_tail_logprob"].exp(), other["teacher_tail_logprob"].exp(), atol=1e-5)


def test_a_server_with_too_small_a_context(world, tmp_path, capsys, monkeypatch):
    """Known before it is asked about a row."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    words = ["cache", "build", "--config", world / "config.yaml", "-o", tmp_path / "cache", "--k", K]
    with FakeServer(wider_teacher(), max_model_len=30) as server:
        said = refusal_of(capsys, *words, "--server", server.url)
        assert len(server.asked) == 1  # the probe
    found = re.search(
        r"the longest row has (\d+) tokens, and the server has --max-model-len 30; start it with (\d+)", said
    )
    assert found is not None and int(found[2]) == int(found[1]) + 1 > 31, said
    assert not (tmp_path / "cache").exists()


def test_a_server_that_gives_up_in_the_middle(world, served, tmp_path, capsys):
    """What was captured stays, and the next build asks only for the rest."""
    more = ["--k", K, "--shard_tokens", 60, "--server", served.url]
    uninterrupted = build_cache(world, tmp_path / "whole", *more)
    all_asked = len(served.asked)
    served.asked.clear()
    count = iter(range(100))
    served.tamper = lambda choices: choices.clear() if next(count) > 5 else None
    words = ["cache", "build", "--config", world / "config.yaml", "-o", tmp_path / "c", *more]
    said = refusal_of(capsys, *words)
    assert "choices" in said or "answer" in said
    there = [*(tmp_path / "c").glob("shard-*")]
    assert there and json.loads((tmp_path / "c" / "manifest.json").read_text())["state"] == "building"
    served.asked.clear()
    served.tamper = lambda choices: None
    build_cache(world, tmp_path / "c", *more)
    assert len(served.asked) < all_asked
    assert file_contents(tmp_path / "c") == file_contents(uninterrupted)


def every_position(change):
    """Changes the entries of all positions of all choices."""
    return lambda choices: [change(entries) for one in choices for entries in one["prompt_logprobs"] if entries]


def test_a_server_that_answers_after_sampling_settings(world, served, tmp_path, capsys):
    """Greedy: 0 for one token and -9999 for the rest. A low temperature: all the mass is kept. Refused, told."""
    words = ["cache", "build", "--config", world / "config.yaml", "--k", K, "--server", served.url]

    def greedy(entries):
        best = max(entries, key=lambda token: entries[token]["logprob"])
        for token, entry in entries.items():
            entry["logprob"] = 0.0 if token == best else -9999.0

    def cold(entries):
        best = max(entries, key=lambda token: entries[token]["logprob"])
        for token, entry in entries.items():
            entry["logprob"] = 0.0 if token == best else -40.0 + entry["logprob"]

    served.tamper = every_position(greedy)
    said = refusal_of(capsys, *words, "-o", tmp_path / "greedy")
    assert "-9999" in said and "--logprobs-mode raw_logprobs" in said and not (tmp_path / "greedy").exists()
    served.tamper = every_position(cold)
    assert main([str(word) for word in [*words, "-o", tmp_path / "cold"]]) == 0
    said = capsys.readouterr().out
    assert "kept       100.000% of the teacher's probability on average, 100.000% at least" in said
    assert "the kept tokens have all the probability at every position" in said


def test_probabilities_that_sum_to_more_than_1(world, served, tmp_path, caplog):
    """Within what a server may round: told, with a count and the first row."""

    def more(entries):
        for token in sorted(entries, key=lambda token: entries[token]["logprob"])[-K:]:
            entries[token]["logprob"] = math.log(1.005 / K)

    served.tamper = every_position(more)
    folder = build_cache(world, tmp_path / "c", "--k", K, "--server", served.url)
    tokens = json.loads((folder / "manifest.json").read_text())["tokens"]
    assert f"the kept probabilities of {tokens} tokens sum to more than 1, to 1.0050 at most (row " in caplog.text
    assert "does not need it" not in caplog.text


def test_the_kept_mass(world, some, capsys):
    """As the files have it: the mean over tokens, and the least."""
    mass = CachedTeacher(some).gather(torch.arange(len(CachedTeacher(some))))["teacher_logprobs"].double().exp().sum(-1)
    assert main(["cache", "inspect", str(some)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mass"))
    mean, least = (float(figure) / 100 for figure in re.findall(r"([0-9.]+)%", line))
    assert mean == pytest.approx(float(mass.mean()), abs=1e-3) and least == pytest.approx(float(mass.min()), abs=2e-3)


def test_a_busy_server_is_asked_again(world, served, tmp_path):
    served.faults = iter([status(429), status(503), status(500)])
    folder = build_cache(world, tmp_path / "c", "--k", K, "--server", served.url)
    assert json.loads((folder / "manifest.json").read_text())["state"] == "complete"


def test_a_server_that_cannot(world, served, tmp_path, capsys):
    words = ["cache", "build", "--config", world / "config.yaml", "-o", tmp_path / "c", "--server", served.url]
    assert "--max-logprobs" in refusal_of(capsys, *words, "--k", 21)
    assert "large" in refusal_of(capsys, *words, "--k", K, "--server_model", "small")
    assert "with --server give --k" in refusal_of(capsys, *words, "--coverage", 0.9)
    said = refusal_of(capsys, *words, "--k", K, "--teacher_model_name_or_path", "none")
    assert "--server needs teacher_model_name_or_path too" in said
    assert not (tmp_path / "c").exists()
