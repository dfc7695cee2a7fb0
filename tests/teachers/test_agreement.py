"""What is said of a teacher before training is what plain forward passes say, wherever the teacher comes from."""

import copy
import io
import json
import math
import random
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from rich.console import Console

import tiny_models
from qtarget import ConfigError
from qtarget.cli import __main__ as cli
from qtarget.cli.verbs import teacher as verb
from qtarget.teachers.agreement import measure as agreement
from qtarget.teachers.cache import build as cache_build
from quick_runs import copied_weights, labels_of, logits_of, quick_trainer, tokenised_dataset, tokenised_rows

END = tiny_models.tokenizer().eos_token_id
OTHER_END = tiny_models.tokenizer().convert_tokens_to_ids("<|endoftext|>")
VOCAB = len(tiny_models.tokenizer())


def other(**settings):
    return tiny_models.trained_model(seed=7, width=48, **settings)


def sure(model, factor=3.0):
    """The model with sharper predictions: confident enough to be in conflict."""
    model.model.norm.weight.data *= factor
    return model


def full_logits(model):
    """row → [n, vocab] float64 at the supervised positions, of a row alone and without padding."""
    double = copy.deepcopy(model).double().eval()
    return lambda row: logits_of(double, row).detach()[:, :VOCAB]


# -- the same by hand ------------------------------------------------------------------------------


def by_hand(student, teacher, data, top_k=(1, 16, 64), skip=None, likeliest=None):
    """Every figure, token by token. student, teacher: row → logits. skip: a label that is left out. likeliest: row →
    the teacher's, where it is not that of its logits."""
    lines, clusters = [], []
    for number, row in enumerate(data):
        p, t = student(row).softmax(-1), teacher(row).softmax(-1)
        tops = t.argmax(-1).tolist() if likeliest is None else likeliest(row)
        labels = labels_of(row).tolist()
        plain = [label for label in labels if label != END]
        seen = 0
        for i, y in enumerate(labels):
            if y == END:
                place = 3
            else:
                place = 0 if seen < len(plain) / 3 else 1 if seen < 2 * len(plain) / 3 else 2
                seen += 1
            if y != skip:
                lines.append({"row": number, "y": y, "p": p[i], "t": t[i], "top": tops[i], "place": place})
    for line in lines:
        p, t, y = line["p"], line["t"], line["y"]
        line["student"] = {"nll": -math.log(p[y]), "p": float(p[y]), "accuracy": int(p.argmax()) == y}
        line["teacher"] = {"nll": -math.log(t[y]), "p": float(t[y]), "accuracy": line["top"] == y}
        line["student"]["entropy"] = -sum(x * math.log(x) for x in p.tolist() if x)
        line["teacher"]["entropy"] = -sum(x * math.log(x) for x in t.tolist() if x)
        line["match"] = line["top"] == int(p.argmax())
        line["kl_tp"] = sum(b * math.log(b / a) for a, b in zip(p.tolist(), t.tolist(), strict=True) if b)
        line["kl_pt"] = sum(a * math.log(a / b) for a, b in zip(p.tolist(), t.tolist(), strict=True) if a)
        line["conflict"] = float(t[line["top"]]) >= 0.5 and line["top"] != y
        line["gap"] = line["teacher"]["nll"] - line["student"]["nll"]

    def mean(of, among=lines):
        return sum(float(of(line)) for line in among) / len(among) if among else None

    def side(who, among=lines):
        return {name: sum(line[who][name] for line in among) / len(among) for name in among[0][who]} if among else None

    gap = mean(lambda line: line["gap"])
    for number in {line["row"] for line in lines}:
        clusters.append(sum(line["gap"] - gap for line in lines if line["row"] == number))
    n = len(clusters)
    conflicting = [line for line in lines if line["conflict"]]
    counts = Counter(line["y"] for line in conflicting)
    return {
        "rows": n,
        "tokens": len(lines),
        "student": side("student"),
        "teacher": side("teacher"),
        "nll_gap": gap,
        "nll_gap_error": math.sqrt(n / (n - 1) * sum(c * c for c in clusters)) / len(lines) if n > 1 else None,
        "top1_match": mean(lambda line: line["match"]),
        "kl_teacher_student": mean(lambda line: line["kl_tp"]),
        "kl_student_teacher": mean(lambda line: line["kl_pt"]),
        "top_k_mass": {str(k): sum(sum(sorted(line["t"].tolist())[-k:]) for line in lines) / len(lines) for k in top_k},
        "conflicts": mean(lambda line: line["conflict"]),
        "sides_with_teacher": mean(lambda line: line["match"], conflicting),
        "denied": mean(lambda line: line["teacher"]["p"] < 0.01),
        "places": [
            {
                "name": name,
                "tokens": len(here),
                "student": side("student", here),
                "teacher": side("teacher", here),
                "conflicts": mean(lambda line: line["conflict"], here),
            }
            for place, name in enumerate(agreement.PLACES)
            for here in [[line for line in lines if line["place"] == place]]
        ],
        "conflicting": [
            {
                "token": y,
                "text": tiny_models.tokenizer().decode([y]),
                "conflicts": counts[y],
                "tokens": sum(line["y"] == y for line in lines),
                "instead": Counter(line["top"] for line in conflicting if line["y"] == y),
            }
            for y in sorted(counts, key=lambda y: (-counts[y], y))[:10]
        ],
    }


def assert_same(got, wanted, tolerance=2e-4, name=""):
    """Equal numbers up to float32; ``instead`` is checked as what it is, the most frequent."""
    if name.endswith("instead"):
        assert [count for _, _, count in got] == sorted(wanted.values(), reverse=True)[:3], name
        for token, text, count in got:
            assert wanted[token] == count and "\ufffd" not in text, name
    elif isinstance(wanted, dict):
        for key, value in wanted.items():
            assert_same(got[key], value, tolerance, f"{name}.{key}")
    elif isinstance(wanted, list):
        assert len(got) == len(wanted), name
        for number, value in enumerate(wanted):
            assert_same(got[number], value, tolerance, f"{name}.{number}")
    elif isinstance(wanted, float):
        assert got == pytest.approx(wanted, rel=tolerance, abs=tolerance), name
    elif name.endswith("text") and "\ufffd" in wanted:  # part of a character: the tokenizer's own symbol
        assert got and "\ufffd" not in got
    else:
        assert got == wanted, name


# -- figures ---------------------------------------------------------------------------------------


def test_every_figure_is_what_plain_forwards_say(tmp_path, monkeypatch):
    """Padded batches of unequal rows, a few tokens' log-probabilities at a time, against single rows in float64."""
    monkeypatch.setattr(agreement, "_CHUNK", 5)
    data, teacher = tiny_models.conversation_dataset(7), sure(other())
    made = quick_trainer(
        tiny_models.trained_model(), tmp_path, data, target="target-sft", teacher_model=copy.deepcopy(teacher)
    )
    got = agreement.measure(made, 7).to_dict()
    wanted = by_hand(full_logits(tiny_models.trained_model()), full_logits(teacher), tokenised_rows(data))
    assert wanted["conflicts"] > 0.05 and wanted["sides_with_teacher"] > 0.05 and wanted["denied"] > 0.05
    assert all(place["tokens"] for place in wanted["places"]) and len(wanted["conflicting"]) == 10
    assert_same(got, wanted)
    assert got["end_token"] is None and got["cached_k"] is None and got["own_average"] is False


def test_a_larger_head_has_no_more_tokens(tmp_path):
    """Rows of either head beyond the real vocabulary are no tokens."""
    student, teacher, data = (
        tiny_models.llama(vocab=VOCAB + 13),
        tiny_models.llama(seed=3, vocab=VOCAB + 5),
        tiny_models.conversation_dataset(3),
    )
    made = quick_trainer(student, tmp_path, data, target="kd", teacher_model=teacher)
    wanted = by_hand(full_logits(student), full_logits(teacher), tokenised_rows(data), (VOCAB,))
    got = agreement.measure(made, 3, top_k=(VOCAB, VOCAB + 1)).to_dict()
    assert_same(got, wanted)
    assert got["top_k_mass"].keys() == {str(VOCAB)}


def test_rows_are_evenly_spread(tmp_path):
    data = tiny_models.conversation_dataset(7)
    made = quick_trainer(tiny_models.trained_model(), tmp_path, data, target="kd", teacher_model=other())
    some = [tokenised_rows(data)[number] for number in (0, 2, 4)]
    wanted = by_hand(full_logits(tiny_models.trained_model()), full_logits(other()), some)
    assert agreement.estimate(made, 3) == (3, wanted["tokens"])
    assert_same(agreement.measure(made, 3).to_dict(), wanted)
    assert agreement.evenly_spaced(10, 4) == [0, 2, 5, 7] and agreement.evenly_spaced(3, 200) == [0, 1, 2]


@pytest.mark.parametrize(
    "settings",
    [
        {"packing": True, "packing_strategy": "bfd", "max_length": 90, "per_device_train_batch_size": 1},
        {"packing": True, "packing_strategy": "bfd", "max_length": 90, "per_device_train_batch_size": 3},
        {"padding_free": True, "max_length": None},
    ],
)
def test_packed_rows_give_the_figures_of_padded_ones(settings, tmp_path):
    """Documents are rows: for the thirds of an answer, for the standard error, and in number."""
    data = tiny_models.conversation_dataset(9)
    made = quick_trainer(
        tiny_models.trained_model(), tmp_path, data, target="kd", teacher_model=sure(other()), **settings
    )
    if "packing" in settings:
        assert 1 < len(made.train_dataset) < 9
    wanted = by_hand(full_logits(tiny_models.trained_model()), full_logits(sure(other())), tokenised_rows(data))
    assert agreement.estimate(made, 9) == (9, wanted["tokens"])
    assert_same(agreement.measure(made, 9).to_dict(), wanted)


def test_few_rows_of_a_packed_dataset_are_few_sequences(tmp_path):
    packed = {"packing": True, "max_length": 200, "per_device_train_batch_size": 1}
    made = quick_trainer(
        tiny_models.trained_model(),
        tmp_path,
        tiny_models.conversation_dataset(40),
        target="kd",
        teacher_model=other(),
        **packed,
    )
    documents = [len(lengths) for lengths in made.train_dataset["seq_lengths"]]
    assert min(documents) > 1
    assert 5 <= agreement.measure(made, 5).rows <= 5 + max(documents) < 40


@pytest.mark.parametrize("packing", [False, True])
def test_nothing_predicts_a_first_token(packing, tmp_path):
    """Every token of plain text has a label, those of a document's first tokens are not trained."""
    data = tiny_models.text_dataset(6)
    settings = {"packing": packing, "max_length": 60, "per_device_train_batch_size": 1 + (not packing)}
    made = quick_trainer(tiny_models.trained_model(), tmp_path, data, target="kd", teacher_model=other(), **settings)
    wanted = by_hand(full_logits(tiny_models.trained_model()), full_logits(other()), tokenised_rows(data))
    assert agreement.estimate(made, 6) == (6, wanted["tokens"])
    assert_same(agreement.measure(made, 6).to_dict(), wanted)


def test_a_stream_is_read_from_its_beginning(tmp_path):
    data = tiny_models.conversation_dataset(6)
    made = quick_trainer(
        tiny_models.trained_model(), tmp_path, data.to_iterable_dataset(), target="kd", teacher_model=other()
    )
    wanted = by_hand(full_logits(tiny_models.trained_model()), full_logits(other()), tokenised_rows(data)[:4])
    assert_same(agreement.measure(made, 4).to_dict(), wanted)


def test_the_standard_error_takes_rows_together():
    """With rows of equal length it is that of the mean of their means."""
    values = torch.randn(12, 5, dtype=torch.float64) + 3 * torch.randn(12, 1, dtype=torch.float64)
    row = torch.arange(12).repeat_interleave(5)
    mean, error = agreement._clustered(values.flatten(), row)
    assert mean == pytest.approx(float(values.mean()))
    assert error == pytest.approx(float(values.mean(1).std() / math.sqrt(12)))
    assert error > 1.3 * float(values.std() / math.sqrt(60)), "else tokens might as well be independent"
    assert agreement._clustered(values[0], row[:5]) == (pytest.approx(float(values[0].mean())), None)


# -- end tokens ------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["label", "keep", "map"])
def test_a_teacher_that_ends_otherwise(setting, tmp_path):
    data, teacher = tiny_models.conversation_dataset(5), other()
    teacher.generation_config.eos_token_id = OTHER_END
    made = quick_trainer(
        tiny_models.trained_model(), tmp_path, data, target="kd", teacher_model=teacher, teacher_end_token=setting
    )

    def exchanged(row):
        z = full_logits(teacher)(row)
        z[:, [END, OTHER_END]] = z[:, [OTHER_END, END]]
        return z

    own = exchanged if setting == "map" else full_logits(teacher)
    wanted = by_hand(
        full_logits(tiny_models.trained_model()), own, tokenised_rows(data), skip=END if setting == "label" else None
    )
    got = agreement.measure(made, 5)
    assert_same(got.to_dict(), wanted)
    assert (got.places[3].tokens == 0) == (setting == "label")
    touched = sum(labels_of(row).tolist().count(END) for row in tokenised_rows(data))
    left = touched if setting == "label" else 0
    assert got.end_token == agreement.EndToken(END, "<|im_end|>", OTHER_END, "<|endoftext|>", setting, touched, left)
    (note,) = got.notes()
    assert f"touches {touched} tokens" in note and f"teacher_end_token: {setting}" in note


# -- other teachers --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("teacher_check")
    for name, model in (("model", tiny_models.trained_model()), ("teacher", other()), ("sure", sure(other()))):
        model.save_pretrained(root / name)
        tiny_models.tokenizer().save_pretrained(root / name)
    (root / "data").mkdir()
    lines = [json.dumps(row) for row in tiny_models.conversation_dataset(9).to_list()]
    (root / "data" / "train.jsonl").write_text("\n".join(lines))
    config = {
        "model_name_or_path": str(root / "model"),
        "teacher_model_name_or_path": str(root / "sure"),
        "dataset_name": str(root / "data"),
        "output_dir": str(root / "run"),
        "target": "target-sft",
        "use_cpu": True,
        "report_to": "none",
        "eval_strategy": "epoch",
    }
    (root / "config.yaml").write_text(json.dumps(config))
    return root


def test_a_cached_teacher(world, tmp_path):
    """Its figures are those of its k tokens and a tail in the student's shape; what it lost is said."""
    k, data = 2, tiny_models.conversation_dataset(6)
    build = {"target": "kd", "teacher_model_name_or_path": str(world / "teacher")}
    builder = quick_trainer(tiny_models.trained_model(), tmp_path / "a", data, **build)
    plan = cache_build.plan(builder)
    about = cache_build.about(builder)
    folder = cache_build.build(builder, tmp_path / "cache", plan, k, dtype="float32", about=about)
    made = quick_trainer(tiny_models.trained_model(), tmp_path / "b", data, target="kd", teacher_cache=str(folder))
    student, teacher = full_logits(tiny_models.trained_model()), full_logits(other())

    def dense(row):
        p, t = student(row).softmax(-1), teacher(row).softmax(-1)
        ids = t.topk(k).indices
        outside = p.scatter(1, ids, 0.0)
        lost = 1 - t.gather(1, ids).sum(-1, keepdim=True)
        return (outside / outside.sum(-1, keepdim=True) * lost).scatter(1, ids, t.gather(1, ids)).log()

    def likeliest(row):
        return teacher(row).argmax(-1).tolist()

    wanted = by_hand(student, dense, tokenised_rows(data), (1,), likeliest=likeliest)
    chosen = tokenised_rows(data)
    t = torch.cat([teacher(row).softmax(-1) for row in chosen])
    top, labels = t.topk(k), torch.cat([labels_of(row) for row in chosen])
    wanted["top_k_mass"] = {"1": float(top.values[:, 0].mean()), "2": float(top.values.sum(-1).mean())}
    wanted |= {
        "cached_k": k,
        "lost_mass": 1 - wanted["top_k_mass"]["2"],
        "labels_outside_k": float((top.indices != labels[:, None]).all(-1).double().mean()),
    }
    assert any(likeliest(row) != dense(row).argmax(-1).tolist() for row in chosen), "a tail that peaks above the k"
    assert wanted["lost_mass"] > 0.02 and 0 < wanted["labels_outside_k"] < 1
    got = agreement.measure(made, 6)
    assert_same(got.to_dict(), wanted)
    assert got.top_k_mass.keys() == {1, 2}, "no more than the cache has"
    assert any(what == "mass lost outside the cache's 2" for what, _, _ in got.figures())


def test_a_pool(world, tmp_path):
    """softmax(Σ w z) of its members."""
    data = tiny_models.conversation_dataset(4)
    pool = {str(world / "teacher"): 0.25, str(world / "sure"): 0.75}
    made = quick_trainer(tiny_models.trained_model(), tmp_path, data, target="kd", teachers=pool)
    parts = full_logits(other()), full_logits(sure(other()))
    wanted = by_hand(
        full_logits(tiny_models.trained_model()),
        lambda row: 0.25 * parts[0](row) + 0.75 * parts[1](row),
        tokenised_rows(data),
    )
    assert_same(agreement.measure(made, 4).to_dict(), wanted)


def test_a_teacher_with_a_context(tmp_path):
    """It reads its own prompt and then the student's answer."""
    data, teacher = tiny_models.conversation_dataset(5), other()
    context = "A hint. {{ prompt }}"
    made = quick_trainer(
        tiny_models.trained_model(), tmp_path, data, target="kd", teacher_model=teacher, teacher_context=context
    )

    def informed(row):
        own = {**row, "prompt": [{"role": "user", "content": "A hint. " + row["prompt"][0]["content"]}]}
        (own,) = tokenised_rows(Dataset.from_list([{key: own[key] for key in ("prompt", "completion")}]))
        assert labels_of(own).tolist() == labels_of(row).tolist()
        return full_logits(teacher)(own)

    assert_same(
        agreement.measure(made, 5).to_dict(),
        by_hand(full_logits(tiny_models.trained_model()), informed, tokenised_rows(data)),
    )


def test_the_students_own_average_starts_as_the_student(tmp_path):
    made = quick_trainer(tiny_models.trained_model(), tmp_path, target="kd", teacher_ema_decay=0.9)
    got = agreement.measure(made, 4)
    assert got.own_average and got.kl_teacher_student == 0 and got.judgement == "identical"
    assert "it is the student's own average, which starts as the student" in got.verdict
    assert made.aux.average.taken_at is None, "the average was moved"


def test_nothing_is_changed(tmp_path):
    """In training mode with dropout: the figures are without it, and everything is as before."""
    student = tiny_models.trained_model(tiny_models.gpt2)
    student.transformer.drop.p = 0.5
    student_alone, teacher_alone = full_logits(student), full_logits(other())
    made = quick_trainer(student, tmp_path, target="kd", teacher_model=other())
    made.model.train()
    made.model.transformer.h[0].eval()  # one that was frozen on purpose
    before, modes = copied_weights(student), [module.training for module in made.model.modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    got = agreement.measure(made, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in made.model.modules()] == modes
    assert all(torch.equal(weight, before[name]) for name, weight in copied_weights(student).items())
    assert all(parameter.grad is None for parameter in student.parameters())
    assert made.state.global_step == 0 and torch.is_grad_enabled()
    assert_same(
        got.to_dict(), by_hand(student_alone, teacher_alone, tokenised_rows(tiny_models.conversation_dataset(4)))
    )


# -- the verdict -----------------------------------------------------------------------------------


def trained_on(data, model, steps=4):
    """The model after some passes over rows' supervised labels."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        for row in data:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits_of(model, row), labels_of(row)).backward()
            optimizer.step()
    return model.eval()


def shuffled(data, seed=0):
    """The same rows whose supervised labels are others of the same rows."""
    every = [label for row in data for label in labels_of(row).tolist()]
    random.Random(seed).shuffle(every)
    mixed = iter(every)
    return [{**row, "labels": [-100 if y == -100 else next(mixed) for y in row["labels"]]} for row in data]


def verdict_on(teacher, folder, count=12):
    made = quick_trainer(
        tiny_models.trained_model(), folder, tiny_models.conversation_dataset(count), target="kd", teacher_model=teacher
    )
    return agreement.measure(made, count)


def test_a_teacher_that_is_the_student(tmp_path):
    got = verdict_on(tiny_models.trained_model(), tmp_path)
    assert got.kl_teacher_student == got.kl_student_teacher == 0 and got.top1_match == 1 and got.nll_gap == 0
    assert got.judgement == "identical" and got.verdict.startswith("nearly identical to the student: KL")
    assert "the target is nearly the one without a teacher" in got.verdict


def test_a_teacher_that_knows_the_rows(tmp_path):
    got = verdict_on(trained_on(tokenised_rows(tiny_models.conversation_dataset(12)), other()), tmp_path)
    assert got.judgement == "helps" and got.nll_gap < -0.1 and not got.too_sure
    assert got.verdict.startswith("likely to help: it explains the labels better than the student (nll ")
    assert f"{got.teacher.nll:.3f} against {got.student.nll:.3f}" in got.verdict and "rule of thumb" in got.verdict


def test_a_teacher_of_other_labels(tmp_path):
    got = verdict_on(
        trained_on(shuffled(tokenised_rows(tiny_models.conversation_dataset(12))), other(), steps=8), tmp_path
    )
    assert got.judgement == "misaligned" and got.nll_gap > 0.1
    assert "it pulls away from the demonstrations" in got.verdict and "rule of thumb" in got.verdict
    assert got.teacher.p < got.student.p and "it may only be too sharp" not in got.verdict


def test_a_teacher_that_is_too_sure(tmp_path):
    got = verdict_on(sure(other(), 6.0), tmp_path)
    assert got.conflicts > 0.1 and f"a token other than the label on {got.conflicts:.0%} of the tokens" in got.verdict
    assert f"(the student sides with it on {got.sides_with_teacher:.0%} of these)" in got.verdict
    assert got.judgement == "misaligned" and "although its mean p of the label is higher" in got.verdict


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return verdict_on(other(), tmp_path_factory.mktemp("measured"))


@pytest.mark.parametrize(
    "gap, error, judgement, said",
    [
        (-0.5, 0.1, "helps", "it explains the labels better"),
        (-0.5, 0.3, "mixed", "no clear difference"),
        (0.5, 0.3, "mixed", "no clear difference"),
        (0.5, 0.1, "misaligned", "it explains the labels worse"),
        (0.01, 0.0001, "mixed", "no clear difference"),
        (-0.5, None, "mixed", "-0.500 ± unknown"),
    ],
)
def test_better_and_worse_are_beyond_two_standard_errors(gap, error, judgement, said, measured):
    blunt = replace(measured.teacher, entropy=measured.student.entropy)
    got = replace(measured, nll_gap=gap, nll_gap_error=error, teacher=blunt, kl_teacher_student=0.5)
    assert got.judgement == judgement and said in got.verdict


def test_sharper_and_agreeing(measured):
    entropy = measured.student.entropy
    sharp = {
        "nll_gap": 0.0,
        "nll_gap_error": 0.1,
        "kl_teacher_student": 0.5,
        "top1_match": 0.8,
        "teacher": replace(measured.teacher, entropy=0.5 * entropy),
        "conflicts": 0.05,
    }
    got = replace(measured, **sharp)
    assert got.judgement == "helps" and "clearly sharper than the student" in got.verdict
    for less in (
        {"top1_match": 0.6},
        {"conflicts": 0.2},
        {"teacher": replace(measured.teacher, entropy=0.9 * entropy)},
    ):
        assert replace(measured, **(sharp | less)).judgement == "mixed", less
    # What it says of the labels goes before how sharp it is.
    assert replace(measured, **(sharp | {"nll_gap": 0.5})).judgement == "misaligned"


def test_few_rows_are_doubted(measured):
    assert "look at more" not in measured.verdict
    assert "on 7 rows only: look at more" in replace(measured, rows=7).verdict
    assert "a single row has no standard error" in replace(measured, rows=1, nll_gap_error=None).verdict


def test_in_words(measured):
    said = measured.short()
    assert "\n" not in said and said.startswith(
        f"teacher check (12 rows, {measured.tokens} tokens): nll of the labels "
    )
    assert "by rule of thumb" in said and f"{measured.teacher.nll:.3f}" in said
    assert "too sure of other tokens (30%)" in replace(measured, conflicts=0.3).short()
    strange = agreement.Conflict(5, "\x1b[31m\n", 3, 4, ((6, "[bold]", 3),))
    console = Console(width=160, record=True, force_terminal=True, file=io.StringIO())
    for table in verb.tables(replace(measured, conflicting=(strange,))):
        console.print(table)
    shown = console.export_text()
    assert "\x1b" not in shown and "[bold] 3" in shown and "3 of 4" in shown, "a token is no markup"
    assert f"{measured.student.nll:.3f}" in shown and f"{measured.places[1].teacher.nll:.3f}" in shown


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows_, top_k, told",
    [
        (0, (1,), "rows is 0; use a whole number from 1"),
        (True, (1,), "rows is True; use a whole number from 1"),
        (2.0, (1,), "rows is 2.0; use a whole number from 1"),
        (2, (4, 0), "top_k holds 0; use a whole number from 1"),
    ],
)
def test_numbers_that_make_no_sense(rows_, top_k, told, tmp_path):
    made = quick_trainer(tiny_models.trained_model(), tmp_path, target="kd", teacher_model=other())
    with pytest.raises(ConfigError) as error:
        agreement.measure(made, rows_, top_k)
    assert error.value.faults == [told]


def test_no_teacher(tmp_path):
    with pytest.raises(ConfigError, match=r"^target sft has no teacher to compare with; name a target that needs one"):
        agreement.measure(quick_trainer(tiny_models.trained_model(), tmp_path), 2)


def test_nothing_to_ask_about(tmp_path):
    """The only rows looked at are masked."""
    masked = tokenised_dataset(tiny_models.conversation_dataset(8)).to_list()
    for row in masked[:2]:
        row["labels"] = [-100] * len(row["labels"])
    packed = Dataset.from_list(masked)
    settings = {"target": "kd", "teacher_model": other(), "max_length": None}
    made = quick_trainer(tiny_models.trained_model(), tmp_path, packed, **settings)
    with pytest.raises(ConfigError, match=r"^rows is 1, and none of the rows used has a supervised token"):
        agreement.measure(made, 1)
    assert agreement.measure(made, 8).rows == 6


@pytest.mark.parametrize("who, field", [("student", "model_init_kwargs"), ("teacher", "teacher_model_init_kwargs")])
def test_nan(who, field, tmp_path):
    models = {"student": tiny_models.llama(tied=False), "teacher": tiny_models.llama(1, tied=False)}
    models[who].lm_head.weight.data[5] = torch.nan
    made = quick_trainer(models["student"], tmp_path, target="kd", teacher_model=models["teacher"])
    with pytest.raises(ConfigError, match=rf"^the {who} gives NaN for one of the rows used; .*\({field}: "):
        agreement.measure(made, 4)


# -- the verb --------------------------------------------------------------------------------------


def run_verb(capsys, *words):
    capsys.readouterr()
    status = cli.main(["teacher", *map(str, words)])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_verb(world, capsys, tmp_path):
    out = tmp_path / "figures.json"
    status, said, err = run_verb(capsys, "check", "--config", world / "config.yaml", "--rows", 3, "--json", out)
    assert status == 0, err
    some = [tokenised_rows(tiny_models.conversation_dataset(9))[number] for number in (0, 3, 6)]
    wanted = by_hand(full_logits(tiny_models.trained_model()), full_logits(sure(other())), some)
    got = json.loads(out.read_text())
    assert_same(got, wanted)
    lines = said.splitlines()
    assert lines[0] == f"3 rows, {wanted['tokens']} supervised tokens" and "\x1b" not in said
    assert f"verdict: {got['verdict']}" in lines and got["judgement"] in ("identical", "misaligned", "helps", "mixed")
    assert not [*(world / "run").glob("checkpoint-*")]


def test_another_chat_template(world, capsys, tmp_path):
    """A line, where the teacher's differs, and none where it does not."""
    shutil.copytree(world / "teacher", tmp_path / "teacher")
    tokenizer = copy.deepcopy(tiny_models.tokenizer())
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "ASSISTANT")
    tokenizer.save_pretrained(tmp_path / "teacher")
    words = ["check", "--config", world / "config.yaml", "--rows", 2]
    assert "chat template" not in run_verb(capsys, *words)[1]
    said = run_verb(capsys, *words, "--teacher_model_name_or_path", tmp_path / "teacher")[1]
    assert f"note: {tmp_path / 'teacher'} has another chat template than the student" in said


def test_a_target_without_a_teacher_is_checked_with_kd(world, capsys, tmp_path):
    out = tmp_path / "figures.json"
    words = ("check", "--config", world / "config.yaml", "--json", out)
    status, said, err = run_verb(capsys, *words, "--target", "dft", "--packing", "true", "--max_length", 120)
    assert status == 0, err
    assert "target dft needs no teacher; the one that is named is checked with target kd" in said
    wanted = by_hand(
        full_logits(tiny_models.trained_model()),
        full_logits(sure(other())),
        tokenised_rows(tiny_models.conversation_dataset(9)),
    )
    assert_same(json.loads(out.read_text()), wanted)


@pytest.mark.parametrize("named", [{"use_dft_loss": True}, {"loss_type": "dft"}])
def test_another_name_of_the_target(named, world, capsys, tmp_path):
    """A peer's spelling or TRL's, which would contradict target kd were it still there."""
    config = {**json.loads((world / "config.yaml").read_text()), **named}
    del config["target"]
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    status, said, err = run_verb(capsys, "check", "--config", tmp_path / "config.yaml", "--rows", 2)
    assert status == 0, err
    assert "target dft needs no teacher" in said and "verdict: " in said


@pytest.mark.parametrize(
    "words, told",
    [
        (["--rows", "0"], "rows is 0; use a whole number from 1"),
        (["--rows", "many"], "rows is 'many'; use a whole number from 1"),
        (["--rows"], "--rows has no value; write --rows VALUE"),
        (["--json", "/nowhere/at/all.json"], "json is '/nowhere/at/all.json', which cannot be written; name a file in"),
        (["--rowz", "3"], "unknown flag: --rowz; "),
    ],
)
def test_refused_in_a_sentence(words, told, world, capsys):
    status, said, err = run_verb(capsys, "check", "--config", world / "config.yaml", *words)
    assert status == 2 and said == ""
    assert err.startswith(f"qtarget teacher: {told}") and err.count("\n") == 1


@pytest.mark.parametrize(
    "target, told",
    [
        (
            "dft",
            "target dft needs no teacher, and none is named to check; set teacher_model_name_or_path, or teachers, ",
        ),
        (
            "kd",
            "target kd(temperature=1.0) needs a teacher and got none; set teacher_model_name_or_path, or teachers, ",
        ),
    ],
)
def test_no_teacher_named(target, told, world, capsys, tmp_path):
    config = {**json.loads((world / "config.yaml").read_text()), "target": target}
    del config["teacher_model_name_or_path"]
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    status, said, err = run_verb(capsys, "check", "--config", tmp_path / "config.yaml")
    assert status == 2 and said == "" and err.startswith(f"qtarget teacher: {told}") and err.count("\n") == 1


def test_words_after_teacher(capsys):
    status, said, _ = run_verb(capsys)
    assert status == 0 and "usage: qtarget teacher check" in said
    status, _, err = run_verb(capsys, "chek")
    assert status == 2 and err.startswith("qtarget teacher: word after teacher is 'chek'; did you mean 'check'?")
