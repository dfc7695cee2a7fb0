"""A teacher behind HTTP: true log-probabilities in vLLM's wire format, and one sentence for everything else."""

import itertools
import math
import re
import time

import numpy as np
import pytest
import torch

import fake_server
import tiny_models
from fake_server import FakeServer, status
from qtarget.errors import ConfigError
from qtarget.teachers.server.client import TeacherServer

V, K = len(tiny_models.tokenizer()), 8


@pytest.fixture(scope="module")
def model():
    return tiny_models.trained_model().eval()


@pytest.fixture(autouse=True)
def no_key_and_no_proxy(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def serve(model):
    """Starts servers, which end with the test."""
    running = []

    def start(**settings):
        running.append(FakeServer(model, **settings).__enter__())
        return running[-1]

    yield start
    for server in running:
        server.__exit__()


def sequences():
    """Four of different lengths, the last of a single token."""
    return [
        *(
            tiny_models.tokenizer()(sentence)["input_ids"][: 9 + 4 * i]
            for i, sentence in enumerate(tiny_models.SENTENCES[:3])
        ),
        [7],
    ]


def client(url, **settings):
    server = TeacherServer(url, **({"k": K, "vocab_size": V, "timeout": 30.0, "retries": 3} | settings))
    server.server.backoff = 0.01
    return server


def ready(server, **settings):
    """A client that has checked, of a server that has not been asked for completions yet."""
    asking = client(server.url, **settings)
    asking.check()
    server.asked.clear()
    return asking


def refused(call, pattern):
    """One sentence that matches."""
    with pytest.raises(ConfigError) as caught:
        call()
    message = str(caught.value)
    assert re.search(pattern, message), message
    assert "\n" not in message and not message.endswith(".")
    return message


# What is asked and answered


@pytest.mark.parametrize("k", [1, 8, 20])
def test_scores_are_the_models_own(model, serve, k):
    server = serve()
    scored = ready(server, k=k).score(sequences())
    assert len(server.asked) == 1
    inside = []
    for ids, got in zip(sequences(), scored, strict=True):
        with torch.no_grad():
            logp_nv = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        top = logp_nv.topk(k)
        own = logp_nv.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert (got.ids.dtype, got.logprobs.dtype, got.label_logprobs.dtype) == (np.int32, np.float32, np.float32)
        assert got.ids.shape == got.logprobs.shape == (len(ids) - 1, k)
        np.testing.assert_array_equal(got.ids, top.indices.numpy())
        np.testing.assert_allclose(got.logprobs, top.values.numpy(), atol=1e-5)
        np.testing.assert_allclose(got.label_logprobs, own.numpy(), atol=1e-5)
        inside += [label in row for label, row in zip(ids[1:], got.ids, strict=True)]
    assert any(inside) and not all(inside)  # so both k and k + 1 entries were read


def test_what_is_sent(serve):
    server = serve()
    ready(server).score(sequences())
    body = server.asked[0]
    assert body.pop("prompt") == sequences()
    common = {"model": "teacher", "max_tokens": 1, "temperature": 0, "add_special_tokens": False}
    assert body == common | {"prompt_logprobs": K}


def test_choices_in_another_order(serve):
    server = serve()
    asking = ready(server)
    plain = asking.score(sequences())
    moved = []
    server.tamper = lambda choices: (choices.reverse(), moved.extend(choice["index"] for choice in choices))
    for a, b in zip(plain, asking.score(sequences()), strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
    assert moved == [3, 2, 1, 0]


@pytest.mark.parametrize("tail", ["", "/", "/v1", "/v1/"])
def test_check_names_the_model(serve, tail):
    assert client(serve().url + tail).check().name == "teacher"


def test_score_checks_first(serve):
    server = serve()
    assert len(client(server.url).score(sequences())) == 4
    assert len(server.asked) == 2  # the probe, and the one request


def test_nothing_to_score(serve):
    server = serve()
    assert ready(server).score([]) == [] and server.asked == []


# What is refused before anything is sent


@pytest.mark.parametrize(
    "settings, pattern",
    [
        ({"url": "localhost:8000"}, r"^server is 'localhost:8000'; write it as http://"),
        ({"url": "http://localhost:port"}, r"^server is 'http://localhost:port'; write it as http://"),
        ({"url": "http://me:secret@localhost"}, r"^server holds a user name or a query; .* as api_key"),
        ({"k": 0}, rf"^k is 0; use a whole number from 1 to the vocabulary's {V}"),
        ({"k": V + 1}, rf"^k is {V + 1}; use a whole number from 1"),
        ({"vocab_size": 0}, r"^vocab_size is 0; use the number of tokens"),
        ({"timeout": 0}, r"^server_timeout is 0; use a number of seconds above 0"),
        ({"retries": -1}, r"^retries is -1; use a whole number from 0"),
        ({"api_key": "sk-secret\u2026"}, r"^api_key holds .*; copy the key again"),
    ],
)
def test_settings_that_cannot_work(settings, pattern):
    message = refused(lambda: client(**({"url": "http://localhost"} | settings)), pattern)
    assert "secret" not in message


def test_sequences_that_cannot_be_sent(serve):
    server = serve()
    asking = ready(server)
    refused(lambda: asking.score([[1], []]), r"^sequences\[1\] is empty; ")
    refused(lambda: asking.score([[1], [2, V]]), rf"^sequences\[1\] has token {V} at position 1, outside .* of {V}; ")
    refused(lambda: asking.score([[-1]]), r"^sequences\[0\] has token -1 at position 0, ")
    assert server.asked == []


# What check refuses


def test_a_model_that_is_not_served(serve):
    asking = client(serve(names=["big", "small"]).url, model="bigger")
    refused(asking.check, r"^server_model is 'bigger', which http://\S+/v1 does not serve; name one of: big, small$")


def test_one_of_several_models_must_be_named(serve):
    server = serve(names=["big", "small"])
    refused(client(server.url).check, r"^server_model is not set and \S+ serves big, small; name one of them$")
    asking = ready(server, model="small")
    asking.score(sequences())
    assert server.asked[0]["model"] == "small"


def test_another_service_at_the_address(serve):
    refused(
        client(serve().url + "/v2").check, r"^server is '\S+/v2/v1', where no completions server answers \(404, \"Not "
    )
    refused(client(serve(names=[]).url).check, r"^server is '\S+', which lists no model at /models; ")


def test_nothing_listens():
    url = f"http://127.0.0.1:{fake_server.free_port()}"
    pattern = rf"^server is '{url}/v1', which cannot be reached \(Connection refused\) after 3 tries; start the server"
    refused(client(url, retries=2).check, pattern)


def test_a_server_without_prompt_logprobs(serve):
    pattern = r"^server is '\S+', which gives no prompt_logprobs with token ids \(.* no such list\); serve .* vLLM$"
    refused(client(serve(speaks=False).url).check, pattern)
    strict = client(serve(speaks=False, strict=True).url)
    refused(strict.check, r"\(it refuses with 400, \"unknown field prompt_logprobs\"\); serve the teacher with vLLM$")


def test_a_server_that_no_longer_gives_them(serve):
    server = serve()
    asking = ready(server)
    server.speaks = False
    refused(lambda: asking.score(sequences()), r"^prompt_logprobs was answered by \S+ before and now .* no such list; ")


@pytest.mark.parametrize("missing", ["the list", "a position"])
def test_a_prompt_that_is_half_in_the_servers_cache(missing, serve):
    """vLLM leaves out what it took from its prefix cache."""
    server = serve()
    asking = ready(server)

    def tamper(choices):
        if missing == "the list":
            choices[1]["prompt_logprobs"] = None
        else:
            choices[1]["prompt_logprobs"][3] = None

    server.tamper = tamper
    refused(lambda: asking.score(sequences()), r"before and now .*; start vLLM with --no-enable-prefix-caching")
    server.tamper = lambda choices: choices[0].update(prompt_logprobs=None)
    refused(client(server.url).check, r"serve the teacher with vLLM, started with --no-enable-prefix-caching$")


def test_text_for_an_id(serve):
    """The text "five" is no id."""
    server = serve()
    server.tamper = lambda choices: choices[0]["prompt_logprobs"][1].update(five={"logprob": -1.0})
    refused(client(server.url).check, r"\(position 1 has 'five', which is text, not a token id\); serve ")


def test_a_limit_below_k(serve):
    server = serve(max_logprobs=5)
    pattern = (
        rf"^k is {K}, and \S+ was started with a smaller --max-logprobs \(400, \".* logprobs of {K}, which is greater "
        rf"than max allowed: 5\"\); start it with --max-logprobs {K}, or ask for a smaller k$"
    )
    refused(client(server.url).check, pattern)
    assert {body["prompt_logprobs"] for body in server.asked} == {K}  # never with a smaller k


def keep(entries, n):
    for key in list(entries)[n:]:
        del entries[key]


def test_a_server_that_caps_k_in_silence(serve):
    server = serve()
    server.tamper = lambda choices: [keep(row, 5) for c in choices for row in c["prompt_logprobs"] if row]
    pattern = rf"^prompt_logprobs of sequence 0 has 5 entries at position 1 where k is {K}; .*--max-logprobs {K}"
    refused(client(server.url).check, pattern)


# Answers that do not fit what was sent. `rows` is the list of positions of the second sequence, 13 tokens long.


def put(rows, token, logprob):
    """One more entry at position 4."""
    rows[4][str(token)] = {"logprob": logprob, "rank": 1, "decoded_token": "x"}


def change(rows, logprob):
    """The last entry of position 4, which is not the sequence's own token."""
    rows[4][list(rows[4])[-1]] = {"logprob": logprob, "rank": K}


TAMPERED = {
    "too few": (
        lambda rows: rows.__delitem__(slice(12, None)),
        r"sequence 1 has 12 positions where 13 tokens were sent; .*truncates",
    ),
    "too few entries": (lambda rows: keep(rows[4], 5), rf"has 5 entries at position 4 where k is {K}; "),
    "id above": (lambda rows: put(rows, V, -1.0), rf"names token {V} at position 4, outside .* of {V}; "),
    "id below": (lambda rows: put(rows, -1, -1.0), rf"names token -1 at position 4, outside .* of {V}; "),
    "id huge": (lambda rows: put(rows, 2**40, -1.0), rf"names token {2**40} at position 4, outside "),
    "NaN": (lambda rows: change(rows, math.nan), r"log-probability nan at position 4, .* finite .*; check"),
    "infinite": (lambda rows: change(rows, -math.inf), r"log-probability -inf at position 4, "),
    "huge": (lambda rows: change(rows, -(10**400)), r"log-probability -10+ at position 4, "),
    "positive": (lambda rows: change(rows, 0.5), r"log-probability 0\.5 at position 4, "),
    "null": (lambda rows: change(rows, None), r"log-probability None at position 4, "),
    "text": (lambda rows: change(rows, "-1"), r"log-probability '-1' at position 4, "),
    "ruled out": (
        lambda rows: change(rows, -9999.0),
        r"log-probability -9999 at position 4, .* ruled out.*raw_logprobs",
    ),
    "ruled out otherwise": (lambda rows: change(rows, -1e4), r"log-probability -10000 at position 4, "),
    "least of a dtype": (lambda rows: change(rows, -65504.0), r"log-probability -65504 at position 4, "),
    "mass": (
        lambda rows: change(rows, 0.0),
        r"likeliest tokens at position 4 a probability of 1\.\d+ together",
    ),
}


@pytest.mark.parametrize("tamper, pattern", TAMPERED.values(), ids=TAMPERED)
def test_an_answer_that_does_not_fit(serve, tamper, pattern):
    server = serve()
    asking = ready(server)
    server.tamper = lambda choices: tamper(choices[1]["prompt_logprobs"])
    message = refused(lambda: asking.score(sequences()), pattern)
    assert "prompt_logprobs" in message and "sequence 1" in message
    assert len(server.asked) == 1  # a whole answer is not asked for again


def test_too_many_positions(serve):
    server = serve()
    asking = ready(server)
    server.tamper = lambda choices: choices[1]["prompt_logprobs"].append({})
    refused(lambda: asking.score(sequences()), r"^prompt_logprobs of sequence 1 has 14 positions where 13 tokens were ")


def test_other_tokens_in_prompt_logprobs(serve):
    server = serve()
    asking = ready(server)
    own = sequences()[1][4]
    server.tamper = lambda choices: (
        put(choices[1]["prompt_logprobs"], V - 1, -30.0) or choices[1]["prompt_logprobs"][4].pop(str(own))
    )
    pattern = rf"^prompt_logprobs of sequence 1 has no such entry at position 4 where token {own} was sent, so "
    refused(lambda: asking.score(sequences()), pattern + r"http\S+ answers with other tokens; serve a model with the ")


def test_positions_one_early(serve):
    server = serve()
    asking = ready(server)
    server.tamper = lambda choices: choices[1]["prompt_logprobs"].append(choices[1]["prompt_logprobs"].pop(0))
    refused(
        lambda: asking.score(sequences()), r"^prompt_logprobs of sequence 1 has entries at position 0, .* other tokens"
    )


@pytest.mark.parametrize(
    "tamper, pattern",
    [
        (
            lambda choices: choices.pop(),
            r"^choices has index \[0, 1, 2\] in the answer of \S+ where 4 prompts were sent; ",
        ),
        (lambda choices: choices[3].update(index=0), r"^choices has index \[0, 1, 2, 0\] "),
        (lambda choices: choices[3].pop("index"), r"^choices has index \[0, 1, 2, None\] "),
    ],
)
def test_choices_that_are_not_the_prompts(serve, tamper, pattern):
    server = serve()
    asking = ready(server)
    server.tamper = tamper
    refused(lambda: asking.score(sequences()), pattern)


def test_json_of_something_else(serve):
    server = serve()
    asking = ready(server)
    failing(server, fake_server.answer(b'{"object": "error"}'))
    refused(
        lambda: asking.score(sequences()), r"^choices is missing from the answer of \S+ \(\{\"object\": \"error\"\}\); "
    )


# What is asked again, and what is not


def failing(server, *faults):
    """The next requests for completions get ``faults``."""
    server.faults = iter(faults)


def passing(server, asking, *faults):
    """Requests it took to get the scores, after these faults."""
    failing(server, *faults)
    assert [len(got.ids) for got in asking.score(sequences())] == [len(ids) - 1 for ids in sequences()]
    return len(server.asked)


@pytest.mark.parametrize(
    "fault",
    [
        *(status(code) for code in (429, 500, 502, 503, 504)),
        fake_server.reset,
        fake_server.cut,
        fake_server.answer(b"<p>"),
    ],
    ids=["429", "500", "502", "503", "504", "reset", "cut", "not JSON"],
)
def test_what_passes_is_asked_again(serve, fault):
    server = serve()
    assert passing(server, ready(server), fault, fault) == 3


def test_a_hang_is_asked_again(serve):
    server = serve()
    asking = ready(server, timeout=0.5)

    def hang(handler):
        asking._timeout = 600.0  # of the next try
        fake_server.hang(handler)

    assert passing(server, asking, hang) == 2


def waits(caplog):
    """Seconds, as the log says them."""
    return re.findall(r"retrying in (\S+) s \(retry \d of 3\)", caplog.text)


def test_waits_double(serve, caplog):
    server = serve()
    asking = ready(server)
    asking.server.backoff = 0.1
    assert passing(server, asking, status(503), status(503)) == 3
    assert waits(caplog) == ["0.1", "0.2"]


def test_retry_after_is_waited_for(serve, caplog):
    server = serve()
    asking = ready(server)
    assert passing(server, asking, status(429, Retry_After="1")) == 2
    assert waits(caplog) == ["1.0"]


def test_retry_after_as_a_date(serve):
    server = serve()
    asking = ready(server)
    failing(server, status(503, Retry_After="Fri, 01 Jan 2100 00:00:00 GMT"))
    refused(lambda: asking.score(sequences()), r"answers 503, .* and asks to wait \d{4,} s; try again later$")


def test_retry_after_of_hours_is_reported(serve, monkeypatch):
    server = serve()
    asking = ready(server)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"slept for {seconds} s"))
    failing(server, status(429, "quota used up", Retry_After="7200"))
    pattern = r"which answers 429, \"quota used up\" and asks to wait 7200 s; try again later$"
    refused(lambda: asking.score(sequences()), pattern)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "fault, pattern",
    [
        (
            status(500, "out of memory"),
            r"which answers 500, \"out of memory\" after 4 tries; check the server's log$",
        ),
        (status(429), r"which answers 429, \"not now\" after 4 tries; wait, or use a smaller batch_size"),
        (fake_server.reset, r"which cannot be reached \(.*Connection reset by peer.*\) after 4 tries; "),
        (fake_server.answer(b'{"choices": ['), r"which answers with what is not JSON after 4 tries; "),
    ],
    ids=["500", "429", "reset", "not JSON"],
)
def test_what_does_not_pass(serve, fault, pattern):
    server = serve()
    asking = ready(server)
    server.faults = itertools.repeat(fault)
    refused(lambda: asking.score(sequences()), rf"^server is '{server.url}/v1', {pattern}")
    assert len(server.asked) == 4


def test_a_server_that_hangs(serve):
    server = serve()
    asking = ready(server, timeout=0.2, retries=1)
    server.faults = itertools.repeat(fake_server.hang)
    refused(
        lambda: asking.score(sequences()), r"which gives no answer within 0\.2 s after 2 tries; raise server_timeout, "
    )
    assert len(server.asked) == 2


def test_no_retries(serve):
    server = serve()
    asking = ready(server, retries=0)
    failing(server, status(503))
    refused(lambda: asking.score(sequences()), r"answers 503, \"not now\" after 1 try; ")


@pytest.mark.parametrize(
    "code, pattern",
    [
        (400, r"^server is '\S+', which refuses the request \(400, \"so it is\"\); .*--max-model-len"),
        (401, r"^api_key is not set and \S+ requires one \(401, \"so it is\"\); .*OPENAI_API_KEY$"),
        (403, r"^api_key is not set and \S+ requires one \(403, \"so it is\"\); "),
        (404, r"^server_model is 'teacher', for which \S+ has no completions \(404, \"so it is\"\); "),
        (307, r"^server is '\S+', where no completions server answers \(307, \"so it is\"\); "),
    ],
)
def test_a_refusal_is_not_asked_again(serve, code, pattern):
    server = serve()
    asking = ready(server)
    failing(server, status(code, "so\n it is.", Location=server.url))
    refused(lambda: asking.score(sequences()), pattern)
    assert len(server.asked) == 1


# The key


def test_the_key_is_sent_and_not_told(serve, caplog):
    server = serve(key="sk-right")
    caplog.set_level("DEBUG")
    asking = ready(server, api_key="sk-right")
    assert passing(server, asking, status(503, "busy with sk-right")) == 2
    assert "busy with ***" in caplog.text and "sk-right" not in caplog.text
    message = refused(client(server.url, api_key="sk-wrong").check, r"^api_key is refused by \S+ \(401, \"wrong key: ")
    assert "sk-wrong" not in message + caplog.text


def test_the_key_of_the_environment(serve, monkeypatch, tmp_path):
    server = serve(key="sk-right")
    refused(client(server.url).check, r"^api_key is not set and \S+ requires one \(401, ")
    # requests would send this in place of a header
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-right\n")
    assert client(server.url).check().name == "teacher"
    refused(client(server.url, api_key="").check, r"^api_key is not set ")
