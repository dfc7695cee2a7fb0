"""Sampling: randomness belongs to the sample, whatever shares its batch; and it is the model's own distribution."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch

import tiny_models
from qtarget.errors import ConfigError
from qtarget.evaluation import sampling
from qtarget.evaluation.sampling import Request, Sampler, Uniforms, choose, end_tokens, generation_config, seed_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_models.save_trained(tmp_path_factory.mktemp("model")))


def sampler(folder, **settings):
    return Sampler(folder, **{"max_new_tokens": 24, "temperature": 1.0, "top_p": 1.0, **settings})


def requests(count=12):
    """Prompts of different lengths, some greedy."""
    made = []
    for i in range(count):
        ids = tiny_models.tokenizer()(tiny_models.SENTENCES[i % 8][: 6 + 4 * (i % 7)])["input_ids"]
        made.append(Request(tuple(ids), None if i % 4 == 0 else seed_of(0, "task", f"p{i}", i)))
    return made


# -- choice --------------------------------------------------------------------------------------------------------


def test_a_seed_belongs_to_run_task_problem_and_sample():
    seeds = {
        seed_of(*key)
        for key in [(0, "t", "p", 1), (1, "t", "p", 1), (0, "u", "p", 1), (0, "t", "q", 1), (0, "t", "p", 2)]
    }
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(0, "gsm_symbolic", "0fc2b3ac28fd", 3) == 4457450621354177071  # or resumed runs mix two kinds


def test_a_number_belongs_to_its_position():
    forward, backward = Uniforms(7), Uniforms(7)
    late = backward[700]
    assert [forward[i] for i in (0, 300, 700)] == [backward[0], backward[300], late]
    assert Uniforms(7)[0] != Uniforms(8)[0]


def test_ids_are_read_off_the_cumulative_distribution():
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    numbers = [0.0, 0.24, 0.26, 0.74, 0.76, 1 - 1e-16]
    got = choose(p.log().expand(6, -1), numbers, 1.0, 1.0)
    assert got.tolist() == [1, 1, 3, 3, 4, 4]


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25], dtype=torch.float64).log().expand(101, -1)
    numbers = [i / 101 for i in range(101)]
    assert set(choose(logits, numbers, 1.0, 0.75).tolist()) == {1, 3}
    assert set(choose(logits, numbers, 1.0, 0.76).tolist()) == {1, 2, 3}
    assert set(choose(logits, numbers, 1.0, 1e-9).tolist()) == {1}
    shares = choose(logits, numbers, 1.0, 0.75).bincount(minlength=4) / 101
    assert shares[1] == pytest.approx(2 / 3, abs=0.02)


def test_temperature_sharpens_and_greedy_ignores_it():
    logits = torch.tensor([0.2, 0.8], dtype=torch.float64).log().expand(1000, -1)
    numbers = [(i + 0.5) / 1000 for i in range(1000)]
    assert choose(logits, numbers, 0.5, 1.0).double().mean() == pytest.approx(0.64 / 0.68, abs=2e-3)
    assert choose(logits[:2], [None, 0.01], 1.0, 1.0).tolist() == [1, 0]


# -- batches -------------------------------------------------------------------------------------------------------


def test_batches_of_1_and_of_8_give_the_same_samples(folder):
    one = sampler(folder)
    asked = requests()
    alone = [one([request])[0] for request in asked]
    together = one(asked[:8]) + one(asked[8:])
    assert [(c.text, c.tokens, c.finish) for c in alone] == [(c.text, c.tokens, c.finish) for c in together]
    assert [c.entropy for c in alone] == pytest.approx([c.entropy for c in together], abs=1e-4)
    assert len({c.text for c in alone}) > 6  # the test would see samples exchanged


def test_order_does_not_matter(folder):
    one = sampler(folder)
    asked = requests()
    assert [c.text for c in one(asked[::-1])] == [c.text for c in one(asked)][::-1]


def test_greedy_is_transformers_own(folder):
    one = sampler(folder)
    asked = [Request(request.prompt, None) for request in requests(4)]
    for request, got in zip(asked, one(asked), strict=True):
        ids = torch.tensor([request.prompt])
        out = one.model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=sorted(one.ends), pad_token_id=0)
        assert got.text == one.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_first_tokens_follow_the_models_distribution(folder):
    one = sampler(folder, max_new_tokens=1, temperature=2.0)
    prompt = requests(2)[1].prompt
    with torch.no_grad():
        p = (one.model(torch.tensor([prompt])).logits[0, -1].double() / 2).softmax(-1)
    texts = [c.text for c in one([Request(prompt, seed_of(0, "t", "p", i)) for i in range(3000)])]
    likeliest = p.topk(5).indices.tolist()
    for index in likeliest:
        text = one.tokenizer.decode([index], skip_special_tokens=True)
        same = [i for i in range(len(p)) if one.tokenizer.decode([i], skip_special_tokens=True) == text]
        expected = float(p[same].sum())
        assert texts.count(text) / 3000 == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 3000) ** 0.5)


def test_entropy_is_that_of_the_model_itself(folder):
    one = sampler(folder, max_new_tokens=1, temperature=3.0, top_p=0.5)
    prompt = requests(2)[1].prompt
    with torch.no_grad():
        p = one.model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    assert one([Request(prompt, 1)])[0].entropy == pytest.approx(float(-(p * p.log()).sum()), abs=1e-5)


def test_the_padding_of_a_head_is_never_sampled(tmp_path):
    wide = tiny_models.llama(vocab=len(tiny_models.tokenizer()) + 64, tied=False)
    with torch.no_grad():
        wide.lm_head.weight[len(tiny_models.tokenizer()) :] = 10 * wide.lm_head.weight[:64]  # tempting
    wide.save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    one = sampler(str(tmp_path))
    seen = []
    own = one.model.generate
    one.model.generate = lambda **inputs: seen.append(own(**inputs)) or seen[-1]
    one(requests(8))
    assert int(seen[0].max()) < len(tiny_models.tokenizer())


def test_a_model_that_never_stops_is_cut_off(tmp_path):
    endless = tiny_models.llama(tied=False)
    with torch.no_grad():
        endless.lm_head.weight[:3] = 0  # all its end tokens: never the likeliest
    endless.save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    got = sampler(str(tmp_path), max_new_tokens=40)([Request(r.prompt, None) for r in requests(3)])
    assert [(c.finish, c.tokens) for c in got] == [("length", 40)] * 3


def test_end_tokens_stop_by_what_the_tokenizer_has(folder):
    names = {tiny_models.tokenizer().decode([index]) for index in sampler(folder).ends}
    assert names == {"<|im_end|>", "<|endoftext|>"}


ENDS = {
    "a turn's own end": ("<|{role}|>\n{content}<|end|>\n", "<|end|>"),
    "the next turn's start": ("<|{role}|>\n{content}", "<|user|>"),
    "words alone": ("{role}: {content}\n", None),
}


@pytest.mark.parametrize("name", ENDS)
def test_the_template_tells_what_ends_a_turn(name):
    form, end = ENDS[name]
    tokenizer = copy.deepcopy(tiny_models.tokenizer())
    tokenizer.add_tokens(["<|end|>", "<|user|>", "<|assistant|>"], special_tokens=True)
    said = form.replace("{role}", "{{ m['role'] }}").replace("{content}", "{{ m['content'] }}")
    tokenizer.chat_template = "{% for m in messages %}" + said + "{% endfor %}"
    wanted = None if end is None else tokenizer.convert_tokens_to_ids(end)
    assert sampling.turn_end(tokenizer) == wanted
    assert wanted is None or wanted in sampling.end_tokens(tokenizer)
    tokenizer.chat_template = None
    assert sampling.turn_end(tokenizer) is None


def test_a_broken_model_is_named(tmp_path):
    broken = tiny_models.llama()
    with torch.no_grad():
        broken.model.embed_tokens.weight.fill_(float("nan"))
    broken.save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="logits are NaN or infinite"):
        sampler(str(tmp_path))(requests(1))
    with pytest.raises(ConfigError, match="model is '/nowhere'"):
        sampler("/nowhere")


def test_ends_are_known_without_the_weights(folder, tmp_path):
    """For a server, which has them: those of a model that has generation settings, and of one that has a config alone."""
    assert end_tokens(tiny_models.tokenizer(), generation_config(folder)) == sampler(folder).ends
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").unlink()
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"eos_token_id": 9}))
    ends = end_tokens(tiny_models.tokenizer(), generation_config(str(tmp_path / "m")))
    assert 9 in ends and ends == sampler(str(tmp_path / "m")).ends
