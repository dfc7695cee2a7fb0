"""``qtarget eval --server``: the same prompts, ends and greedy answers as in the process, over HTTP; resume, refusals."""

from __future__ import annotations

import itertools
import json
import re
import shutil

import pytest

import fake_server
import tiny_models
from fake_server import FakeServer, status
from qtarget.cli.__main__ import main
from qtarget.evaluation import records
from qtarget.models.server import Server

N = 3


@pytest.fixture(autouse=True, scope="module")
def no_key_no_proxy_and_short_waits():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OPENAI_API_KEY", raising=False)
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setattr(Server, "backoff", 0.001)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.save_trained(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return tiny_models.save_sums(tmp_path_factory.mktemp("rows") / "sums.jsonl")


@pytest.fixture
def serve(folder):
    """Starts servers of the model, which end with the test."""
    running = []

    def start(**settings):
        model = settings.pop("model", None) or tiny_models.trained_model().eval()
        running.append(FakeServer(model, **{"names": ["m"], "root": str(folder), **settings}).__enter__())
        return running[-1]

    yield start
    for server in running:
        server.__exit__()


def words(tasks, output, **settings):
    given = {"tasks": tasks, "verifier": "math", "n": N, "max_new_tokens": 12, "batch_size": 4, "output": output}
    given |= {"verifier_processes": 1, **settings}
    return ["eval", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]


def lines(folder):
    return [json.loads(line) for line in (folder / "samples" / "sums.jsonl").read_text().splitlines()]


def manifest(folder):
    return json.loads((folder / records.FILE).read_text())


@pytest.fixture(scope="module")
def in_process(folder, tasks, tmp_path_factory):
    output = tmp_path_factory.mktemp("results") / "run"
    assert main(words(tasks, output, model=folder, dtype="float32")) == 0
    return output


@pytest.fixture(scope="module")
def running(folder):
    with FakeServer(tiny_models.trained_model().eval(), names=["m"], root=str(folder)) as server:
        yield server


@pytest.fixture(scope="module")
def whole(running, tasks, tmp_path_factory):
    output = tmp_path_factory.mktemp("results") / "run"
    assert main(words(tasks, output, server=running.url)) == 0
    return output


@pytest.fixture
def finished(running, whole):
    """A server that has not been asked yet, and the folder of a finished run."""
    running.asked.clear()
    return running, whole


# -- what is asked and answered ------------------------------------------------------------------------------------


def test_greedy_answers_are_those_of_the_process(finished, in_process):
    """Text, number of tokens, end and verdict; the prompts are the same ids."""
    rows = [[row for row in lines(run) if row["sample"] == "greedy"] for run in (finished[1], in_process)]
    assert [row | {"entropy": None} for row in rows[1]] == rows[0]
    assert {row["finish"] for row in rows[0]} == {"stop", "length"}
    assert len({row["text"] for row in rows[0]}) > 2


def test_each_sample_is_asked_with_its_own_seed(serve, tasks, tmp_path, in_process):
    server = serve()
    assert main(words(tasks, tmp_path / "run", server=server.url, temperature=0.7, top_p=0.9)) == 0
    probe, *asked = server.asked
    seeds = {row["seed"] for row in lines(in_process)}
    assert len(seeds) == 5 * N + 1 and {body["seed"] for body in asked} == seeds
    for body in asked:
        drawn = body["seed"] is not None
        assert (body["temperature"], body["top_p"]) == ((0.7, 0.9) if drawn else (0.0, 1.0))
        assert body["max_tokens"] == 12 and body["stop_token_ids"] == [0, 2]
        # nothing of the model's own settings
        assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (0, 0.0, 1.0)
    assert probe["max_tokens"] == 1


def test_the_prompt_is_the_chat_template_in_ids(finished, tasks, tmp_path):
    server, _ = finished
    rows = [json.loads(line) for line in tasks.read_text().splitlines()]
    texts = [f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n" for row in rows]
    assert main(words(tasks, tmp_path / "run", server=server.url, n=0, batch_size=1)) == 0
    sent = [body["prompt"] for body in server.asked[1:]]
    assert sent == [[tiny_models.tokenizer()(text)["input_ids"]] for text in texts]


def test_samples_do_not_depend_on_the_batch(finished, tasks, tmp_path):
    server, output = finished
    assert main(words(tasks, tmp_path / "one", server=server.url, batch_size=20)) == 0
    assert lines(tmp_path / "one") == lines(output)
    drawn = [row["text"] for row in lines(output) if row["sample"] != "greedy"]
    assert len(drawn) == 5 * N and len(set(drawn)) > 8


def test_the_server_is_in_the_record(finished, in_process, folder):
    told, plain = manifest(finished[1]), manifest(in_process)
    assert told["server"] == {"model": "m", "root": str(folder), "version": "0.0.fake"}
    assert told["model"] == plain["model"] and "server" not in plain


def test_a_served_folder_elsewhere_has_no_known_weights(serve, tasks, tmp_path, folder, capsys):
    server = serve(root="/models/m")
    assert main(words(tasks, tmp_path / "run", server=server.url, model=folder, n=0)) == 0
    assert manifest(tmp_path / "run")["model"] == {"name": str(folder), "revision": None, "weights": None}
    assert main(words(tasks, tmp_path / "unnamed", server=server.url, n=0)) == 2
    said = capsys.readouterr().err
    assert f"model is not set, and {server.url}/v1 serves 'm', which is not a folder here; name" in said


def test_both_ways_are_compared(finished, in_process, tmp_path, capsys):
    assert main(["compare", f"here={in_process}", f"served={finished[1]}"]) == 0
    assert "served" in capsys.readouterr().out


# -- a server that dies, and a run that goes on --------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_killed_run_ends_with_the_same_bytes(finished, tasks, tmp_path, share):
    server, output = finished
    whole = (output / "samples" / "sums.jsonl").read_bytes()
    run = begun(output, tmp_path / "run")
    (run / "samples" / "sums.0.part").write_bytes(whole[: int(share * len(whole))])
    assert main(words(tasks, run, server=server.url)) == 0
    assert (run / "samples" / "sums.jsonl").read_bytes() == whole


def begun(finished, folder):
    shutil.copytree(finished, folder)
    (folder / "samples" / "sums.jsonl").unlink()
    (folder / "scores.json").unlink()
    (folder / records.FILE).write_text(json.dumps({**manifest(folder), "finished": False}))
    return folder


def test_a_server_that_dies_midway(finished, serve, tasks, tmp_path, capsys):
    """One sentence; what it had answered is kept, and a server at another address goes on."""
    whole = (finished[1] / "samples" / "sums.jsonl").read_bytes()
    dying = serve()
    dying.faults = itertools.chain([None] * 9, itertools.repeat(fake_server.reset))
    assert main(words(tasks, tmp_path / "run", server=dying.url)) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("qtarget")] == [said[-1]]
    assert f"server is '{dying.url}/v1', which cannot be reached (" in said[-1]
    assert "after 7 tries; start the server, or fix the address" in said[-1]
    kept = (tmp_path / "run" / "samples" / "sums.0.part").read_bytes()
    assert kept.count(b"\n") == 8 and whole.startswith(kept)  # two batches of four, and the probe
    server = serve()
    assert main(words(tasks, tmp_path / "run", server=server.url)) == 0
    assert (tmp_path / "run" / "samples" / "sums.jsonl").read_bytes() == whole
    assert len(server.asked) == 1 + 12


def test_what_passes_is_asked_again(finished, serve, tasks, tmp_path):
    server = serve()
    server.faults = iter([None, status(503), status(429, Retry_After="0"), fake_server.cut, fake_server.reset])
    assert main(words(tasks, tmp_path / "run", server=server.url)) == 0
    assert lines(tmp_path / "run") == lines(finished[1])


def test_another_model_does_not_go_on(finished, serve, tasks, tmp_path, folder, capsys):
    run = begun(finished[1], tmp_path / "run")
    before = (run / records.FILE).read_bytes()
    for settings, told in [
        ({"names": ["other"]}, "holds a run with server.model 'm', and this one has 'other'"),
        ({"root": "/models/m"}, "holds a run with model.weights"),
    ]:
        assert main(words(tasks, run, server=serve(**settings).url, model=folder)) == 2
        assert told in capsys.readouterr().err
    assert main(words(tasks, run, model=folder)) == 2
    assert "holds a run with server {'model': 'm'" in capsys.readouterr().err
    assert (run / records.FILE).read_bytes() == before


def test_other_weights_than_the_named_ones_are_refused(serve, tasks, tmp_path, folder, capsys):
    """The results would be called those of another model."""
    other = tmp_path / "other"
    tiny_models.llama(seed=5).save_pretrained(other)
    tiny_models.tokenizer().save_pretrained(other)
    assert main(words(tasks, tmp_path / "run", server=serve(root=str(other)).url, model=folder)) == 2
    said = capsys.readouterr().err
    assert f"model is '{folder}', and " in said and f"serves '{other}', which has other weights" in said
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert main(words(tasks, tmp_path / "run", server=serve(root=str(moved)).url, model=folder, n=0)) == 0


# -- refused before anything is written ----------------------------------------------------------------------------

REFUSED = {
    "another name": (
        {"names": ["big", "small"]},
        {"server_model": "m"},
        "server_model is 'm', which {url} does not serve; name one of: big, small",
    ),
    "several": ({"names": ["big", "small"]}, {}, "server_model is not set and {url} serves big, small; name one"),
    "no ids": ({"speaks": False}, {}, "server is '{url}', which answers without token_ids; serve the model with vLLM"),
    "a short context": (
        {"max_model_len": 32},
        {"max_new_tokens": 20},
        "max_new_tokens is 20: the prompt of problem .* has .* tokens, and the server has --max-model-len 32; use ",
    ),
    "a key": ({"key": "sk-1"}, {}, r"api_key is not set and {url} requires one \(401, "),
    "dtype": (
        {},
        {"dtype": "bfloat16"},
        "dtype is 'bfloat16', but the server has already loaded the model; pass --dtype to",
    ),
    "cold": ({}, {"temperature": 0.001}, "temperature is 0.001, which vLLM raises to 0.01; use that, or --n 0"),
}


@pytest.mark.parametrize("server, settings, told", REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_is_written(serve, tasks, tmp_path, capsys, server, settings, told):
    url = serve(**server).url
    assert main(words(tasks, tmp_path / "run", server=url, **settings)) == 2
    assert_said(capsys, told.replace("{url}", f"{url}/v1"))
    assert not (tmp_path / "run").exists()


def assert_said(capsys, pattern):
    said = capsys.readouterr().err
    sentences = [line for line in said.splitlines() if line.startswith("qtarget eval: ")]
    assert len(sentences) == 1, said
    assert re.search(pattern, sentences[0]), sentences


def test_nobody_is_there(tasks, tmp_path, capsys):
    url = f"http://127.0.0.1:{fake_server.free_port()}"
    assert main(words(tasks, tmp_path / "run", server=url)) == 2
    assert_said(capsys, rf"server is '{url}/v1', which cannot be reached \(Connection refused\) after 3 tries; start")
    assert main(words(tasks, tmp_path / "run", model="m", server_model="m")) == 2
    assert_said(capsys, "server_model is 'm' without a server; name it as --server URL")


# -- answers that do not fit ---------------------------------------------------------------------------------------

TAMPERED = {
    "another prompt": (
        lambda one: one["prompt_token_ids"].pop(),
        "prompt_token_ids .* are not the .* tokens that were",
    ),
    "not whole": (lambda one: one.update(finish_reason="abort"), "finish_reason is 'abort' in the answer of "),
    "text": (lambda one: one.update(token_ids=["a"]), "answers without token_ids"),
    "another end": (
        lambda one: one.update(finish_reason="stop", token_ids=[5]),
        "finish_reason is 'stop' .* last token 5 does not end a turn of --model; serve the model that --model names",
    ),
}


@pytest.mark.parametrize("tamper, told", TAMPERED.values(), ids=TAMPERED)
def test_an_answer_that_does_not_fit(serve, tasks, tmp_path, capsys, tamper, told):
    server = serve()
    server.tamper = lambda choices: tamper(choices[0])
    assert main(words(tasks, tmp_path / "run", server=server.url)) == 2
    assert_said(capsys, told)


def test_answers_that_the_server_cuts(serve, tasks, tmp_path, capsys):
    """vLLM takes max_new_tokens of the model's generation_config.json for a limit of every answer, in silence."""
    server = serve(most=5)
    assert main(words(tasks, tmp_path / "run", server=server.url)) == 2
    assert_said(
        capsys, "max_new_tokens is 12, and .* cuts answers after 5 tokens; start vLLM with --generation-config vllm"
    )
