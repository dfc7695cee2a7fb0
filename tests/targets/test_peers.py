"""What peers call the same objectives: each spelling is read as that peer means it, or refused with the nearest."""

import functools

import pytest
import torch
import yaml

import qtarget as qt
from engine_and_oracle import assert_engine_is_oracle, ordinary_batch
from qtarget.targets import peers
from qtarget.targets.presets.printed import nll


def peer(text):
    return qt.Target.from_config(yaml.safe_load(text))


@pytest.mark.parametrize(
    "text, name, hyperparameters",
    [
        ("{use_dft_loss: true}", "dft", {}),
        ("{enable_dft_loss: true}", "dft", {}),
        ("{liger_use_token_scaling: true}", "dft", {}),
        # LLaMA-Factory divides by 3.0, axolotl by nothing; both keep 20
        ("{use_eaft_loss: true}", "eaft", {"top_k": 20, "power": 1.0, "normalizer": 3.0}),
        ("{use_eaft_loss: true, eaft_alpha: 2.0}", "eaft", {"top_k": 20, "power": 2.0, "normalizer": 3.0}),
        ("{use_eaft: true}", "eaft", {"top_k": 20, "power": 1.0, "normalizer": "none"}),
        (
            "{use_eaft: true, eaft_alpha: 0.5, eaft_k: 8}",
            "eaft",
            {"top_k": 8, "power": 0.5, "normalizer": "none"},
        ),
        ("{use_asft_loss: true}", "asft", {"kl_weight": 0.1}),
        ("{use_asft_loss: true, asft_alpha: 0.03}", "asft", {"kl_weight": 0.03}),
        ("{mode: sft}", "sft", {}),
        ("{mode: dft}", "dft", {}),
        ("{mode: sft+kl}", "sft-kl", {"kl_weight": 0.1}),
        ("{mode: asft, kl_weight: 0.03}", "asft", {"kl_weight": 0.03}),
        ("{loss: ce}", "sft", {}),
        ("{loss: gem}", "gem", {"beta": 0.7, "h": "linear"}),
        ("{loss: gem, gem_beta: 0.3, gem_h: logsigmoid}", "gem", {"beta": 0.3, "h": "logsigmoid"}),
        ("{loss: gem_triton, gem_beta: 0.5}", "gem", {"beta": 0.5, "h": "linear"}),
        ("{gem_beta: 0.5}", "gem", {"beta": 0.5, "h": "linear"}),
        ("{prob_threshold: 0.1}", "profit", {"tau": 0.1}),
        ("{prob_threshold: 0.2, threshold_direction: lower}", "profit", {"tau": 0.2, "direction": "lower"}),
        (
            "{prob_threshold: [0.1, 0.8], threshold_direction: middle}",
            "profit",
            {"direction": "middle", "tau_low": 0.1, "tau_high": 0.8},
        ),
        ("{objective_trans: original}", "sft", {}),
        ("{objective_trans: logp}", "sft", {}),
        ("{objective_trans: p}", "beyond-log", {"alpha": 1.0}),
        ("{objective_trans: GeneralFamily-8}", "beyond-log", {"alpha": 8.0}),
        ("{objective_trans: GeneralFamily-0.5}", "beyond-log", {"alpha": 0.5}),
        # strings, as the repository's shell passes them
        ('{prob_threshold: "0.1"}', "profit", {"tau": 0.1}),
        (
            '{prob_threshold: "0.3,0.7", threshold_direction: middle}',
            "profit",
            {"direction": "middle", "tau_low": 0.3, "tau_high": 0.7},
        ),
        ("{mode: asft, kl_direction: reverse}", "asft", {"kl_weight": 0.1, "direction": "reverse"}),
        ("{mode: sft+kl, kl_direction: forward}", "sft-kl", {"kl_weight": 0.1}),
        ("{objective_trans: DEFT}", "deft", {}),
        # no power of a doubt: plain cross-entropy in both
        ("{use_eaft_loss: true, eaft_alpha: 0}", "sft", {}),
        ("{use_eaft: true, eaft_alpha: 0, eaft_k: 8}", "sft", {}),
        # distillation on a fixed dataset: TRL's beta and its defaults, ms-swift's, axolotl's
        ("{lmbda: 0}", "kd", {"divergence": {"jsd": {"beta": 0.5}}}),
        ("{lmbda: 0, beta: 0}", "kd", {}),
        ("{lmbda: 0, beta: 1, temperature: 2.0, seq_kd: false}", "kd", {"divergence": "reverse_kl"}),
        ("{rlhf_type: gkd, lmbda: 0, temperature: 1, beta: 0.1}", "kd", {"divergence": {"jsd": {"beta": 0.1}}}),
        ("{kd_trainer: true, kd_ce_alpha: 0.1, kd_alpha: 0.9}", "kd-hybrid", {"kd_weight": 0.9}),
        ("{kd_trainer: true, kd_ce_alpha: 0, kd_alpha: 1, kd_temperature: 1}", "kd", {}),
        (
            "{kd_trainer: true, kd_ce_alpha: 0.5, kd_alpha: 0.5, kd_beta: 1, kd_normalize_topk: false}",
            "kd-hybrid",
            {"kd_weight": 0.5, "divergence": "reverse_kl"},
        ),
        # saying the same twice, and a flag that is off beside its parameter
        ("{use_dft_loss: true, enable_dft_loss: true}", "dft", {}),
        ("{use_eaft_loss: false, eaft_alpha: 1.0, use_dft_loss: true}", "dft", {}),
    ],
)
def test_peer_spelling(text, name, hyperparameters):
    assert peer(text) == qt.preset(name, **hyperparameters)


@pytest.mark.parametrize(
    "text, note",
    [
        ("{use_dft_loss: true}", "use_dft_loss (LLaMA-Factory) is read as dft"),
        ("{use_eaft: true}", "whose trust reaches log k, about three times the paper's"),
        (
            "{use_asft_loss: true}",
            "LLaMA-Factory averages it per micro-batch, here the denominator is the one of this",
        ),
        ("{mode: asft}", "mode: asft (ASFT repository) is read as asft(kl_weight=0.1, direction=forward)"),
        ("{gem_beta: 0.7}", "the GEM repository's settings are read as gem(beta=0.7, h=linear)"),
        ("{prob_threshold: 0.1}", "prob_threshold (ProFiT) is read as profit(tau=0.1"),
        (
            "{objective_trans: p}",
            "objective_trans: p (Beyond-Log-Likelihood) is read as beyond-log(alpha=1.0)",
        ),
    ],
)
def test_peer_spelling_says_what_became_of_it(text, note):
    assert note in peers.read(yaml.safe_load(text)).note


def _printed_at(temperature, label_weight, kd_weight, logits, labels, teacher):
    """label_weight CE + kd_weight KL(t^T ‖ p^T), with no T² before it: the gradient of ms-swift 4.6 and axolotl 0.19."""
    t, log_p = (teacher / temperature).softmax(-1), (logits / temperature).log_softmax(-1)
    return label_weight * nll(logits, labels) + kd_weight * (t * (t.log() - log_p)).sum(-1)


def _printed_reverse(label_weight, kd_weight, logits, labels, teacher):
    log_p = logits.log_softmax(-1)
    reverse = (log_p.exp() * (log_p - teacher.log_softmax(-1))).sum(-1)
    return label_weight * nll(logits, labels) + kd_weight * reverse


@pytest.mark.parametrize(
    "text, printed, note",
    [
        (
            "{rlhf_type: gkd, lmbda: 0, beta: 0}",  # ms-swift's temperature is 0.9 where nothing is said
            functools.partial(_printed_at, 0.9, 0, 1),
            "beta: 0 (ms-swift) is read as 1 forward_kl at temperature 0.9, without T² before it; ms-swift",
        ),
        (
            "{rlhf_type: gkd, lmbda: 0, beta: 0, temperature: 1, sft_alpha: 0.3}",
            functools.partial(_printed_at, 1, 0.3, 1),
            "is read as 0.3 sft + 1 forward_kl; ms-swift averages",
        ),
        (
            "{kd_trainer: true, kd_ce_alpha: 0.2, kd_alpha: 0.5, kd_temperature: 2}",
            functools.partial(_printed_at, 2, 0.2, 0.5),
            "(axolotl) is read as 0.2 sft + 0.5 forward_kl at temperature 2, without T² before it (axolotl has",
        ),
        (
            "{kd_trainer: true, kd_ce_alpha: 1, kd_alpha: 0.25, kd_beta: 1}",
            functools.partial(_printed_reverse, 1, 0.25),
            "is read as 1 sft + 0.25 reverse_kl; axolotl leaves out what is beyond the teacher's top k, here",
        ),
    ],
)
def test_a_peers_distillation_with_weights_of_its_own(text, printed, note):
    batch, read = ordinary_batch(), peers.read(yaml.safe_load(text))
    logits = batch.logits().requires_grad_()
    inputs = batch.oracle_inputs(read.target)
    wanted = printed(logits, batch.labels, inputs["teacher_logits"])
    (g,) = torch.autograd.grad(wanted.sum(), logits)
    oracle = qt.target_loss(logits, batch.labels, read.target, reduction="none", **inputs)
    (got,) = torch.autograd.grad(oracle.loss.sum(), logits)
    assert torch.allclose(got, g, rtol=1e-10, atol=1e-12) and torch.allclose(oracle.loss, wanted, rtol=1e-10)
    assert note in read.note
    assert qt.Target.from_config(read.target.to_config()) == read.target


def test_the_engine_distils_at_a_temperature_without_its_square():
    target = peer("{kd_trainer: true, kd_ce_alpha: 0.2, kd_alpha: 0.5, kd_temperature: 2}")
    assert_engine_is_oracle(ordinary_batch(), target)


@pytest.mark.parametrize(
    "text, told",
    [
        ("{use_dft_loss: 'yes'}", "use_dft_loss is 'yes'; use true or false"),
        ("{eaft_alpha: 2.0}", "eaft_alpha is 2.0 without use_eaft_loss: true; add it, or use target:"),
        ("{eaft_k: 8}", "eaft_k is 8 without use_eaft: true"),
        ("{asft_alpha: 0.1}", "asft_alpha is 0.1 without use_asft_loss: true"),
        ("{use_eaft_loss: true, eaft_alpha: high}", "eaft_alpha is 'high'; use a number"),
        ("{use_eaft: true, eaft_k: 1}", "top_k is 1; use a whole number from 2"),
        ("{use_asft_loss: true, asft_alpha: -1}", "kl_weight is -1.0; use a number from 0"),
        ("{kl_weight: 0.1}", "kl_weight is 0.1 without mode; write target: {preset: asft, kl_weight: 0.1}"),
        ("{mode: asft+}", "mode is 'asft+'; the ASFT repository knows sft, dft, sft+kl and asft"),
        (
            "{loss: focal}",
            "loss is 'focal'; the GEM repository knows ce, gem and gem_triton; otherwise use target:",
        ),
        (
            "{loss: gem_triton, gem_h: logsigmoid}",
            "loss is 'gem_triton' with gem_h 'logsigmoid'; that kernel is linear only, use loss: gem",
        ),
        ("{threshold_direction: lower}", "threshold_direction is 'lower' without prob_threshold; add it"),
        (
            "{prob_threshold: 0.3, threshold_direction: random}",
            "threshold_direction is 'random'; no preset drops tokens at random, the nearest is",
        ),
        (
            "{prob_threshold: 0.3, threshold_direction: middle}",
            "prob_threshold is 0.3; 'middle' takes two numbers, the other directions one",
        ),
        ("{prob_threshold: [0.1, 0.2]}", "prob_threshold is [0.1, 0.2]; 'middle' takes two numbers"),
        (
            "{objective_trans: OnlyTopP-0.1}",
            "objective_trans is 'OnlyTopP-0.1'; its thresholded forms divide by the",
        ),
        ("{objective_trans: GeneralFamily-x}", "objective_trans is 'GeneralFamily-x'; write a number, as in"),
        (
            "{objective_trans: Cayley_Trans}",
            "objective_trans is 'Cayley_Trans'; its weight depends on the mean p_y of a micro-batch",
        ),
        ('{prob_threshold: "0.3;0.7"}', "prob_threshold is '0.3;0.7'; write a number, or two as in 0.3,0.7"),
        ('{prob_threshold: "0.3,0.7"}', "prob_threshold is [0.3, 0.7]; 'middle' takes two numbers"),
        # a key that goes with none of those beside it
        ("{mode: asft, kl_weights: 0.5}", "key next to mode is 'kl_weights'; did you mean 'kl_weight'?"),
        ("{loss: gem, gem_bta: 0.9}", "key next to loss is 'gem_bta'; did you mean 'gem_beta'?"),
        ("{use_dft_loss: true, nonsense: 3}", "key next to use_dft_loss is 'nonsense'; valid: use_dft_loss"),
        ("{rlhf_type: gkd, lmda: 0}", "key next to rlhf_type is 'lmda'; did you mean 'lmbda'?"),
        ("{trust: 0.5, residual: teacher, temperature: 2}", "key of target is 'temperature'; valid: residual"),
        ("{mode: asft, kl_direction: back}", "kl_direction is 'back'; valid: forward, reverse"),
        ("{kl_direction: reverse}", "kl_direction is 'reverse' without mode; write target: {preset: asft, direction:"),
        # distillation that is no term of a fixed dataset and a full vocabulary
        ("{beta: 0.5}", "beta is 0.5 without lmbda: 0, which makes it TRL's GKD on a fixed dataset; add it, or write"),
        ("{temperature: 2}", "temperature is 2 without lmbda: 0"),
        ("{lmbda: 0.5, beta: 0}", "lmbda is 0.5; that share of the data would be written by the student"),
        ("{rlhf_type: gkd, beta: 0}", "lmbda is not set, which ms-swift reads as 0.5; that share of the data"),
        ("{rlhf_type: dpo, lmbda: 0}", "rlhf_type is 'dpo'; only gkd can be read, use target: for another"),
        ("{lmbda: 0, sft_alpha: 0.1}", "sft_alpha is 0.1 without rlhf_type: gkd; add it, or use target:"),
        ("{lmbda: 0, seq_kd: true}", "seq_kd is true; here the teacher writes no completions"),
        ("{lmbda: 0, beta: 2}", "beta is 2; use a number from 0 to 1"),
        (
            "{rlhf_type: gkd, lmbda: 0, beta: 0, gkd_logits_topk: 64}",
            "gkd_logits_topk is 64; it renormalises both models over the teacher's top k and never teaches the rest",
        ),
        (
            "{rlhf_type: gkd, lmbda: 0}",
            "temperature is 0.9 (ms-swift's default is 0.9) with beta 0.5; a temperature other than 1 works only with "
            "beta: 0",
        ),
        ("{kd_trainer: true, kd_alpha: 1}", "kd_trainer is true without kd_ce_alpha, which axolotl requires; add it"),
        ("{kd_alpha: 0.9}", "kd_alpha is 0.9 without kd_trainer: true; add it, or use target:"),
        (
            "{kd_trainer: true, kd_ce_alpha: 0, kd_alpha: 1, kd_normalize_topk: true}",
            "kd_normalize_topk is True; it renormalises both models over the teacher's top k",
        ),
        (
            "{kd_trainer: true, kd_ce_alpha: 0, kd_alpha: 1, kd_beta: 1, kd_temperature: 2}",
            "temperature is 2 with divergence reverse_kl; it works only with forward_kl",
        ),
        ("{kd_trainer: true, kd_ce_alpha: 0, kd_alpha: 1.5}", "kd_alpha is 1.5; use a number from 0 to 1"),
        ("{use_dft_loss: true, use_asft_loss: true}", "the settings name different objectives: use_dft_loss"),
        ("{use_eaft_loss: true, use_eaft: true}", "the settings name different objectives: use_eaft_loss"),
    ],
)
def test_peer_spelling_that_is_refused(text, told):
    with pytest.raises(qt.ConfigError) as caught:
        peer(text)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "{use_dft_loss: true, preset: dft}",
        "{use_dft_loss: true, trust: probability}",
        "{mode: sft+kl, trust: {anchored: {kl_weight: 0.1}}, residual: reference}",
    ],
)
def test_a_peers_key_beside_a_target_that_means_the_same(text):
    config = yaml.safe_load(text)
    beside = {key: value for key, value in config.items() if key not in peers.KEYS}
    assert qt.Target.from_config(config) == qt.Target.from_config(beside)
    spelled = {key: value for key, value in config.items() if key in peers.KEYS}
    assert peers.read(spelled, beside).target == qt.Target.from_config(beside)  # as at the top of a config file


@pytest.mark.parametrize(
    "text",
    [
        "{use_eaft: true, preset: dft}",
        "{use_dft_loss: true, trust: 0.5}",
        "{gem_beta: 0.5, preset: gem, h: logsigmoid}",
    ],
)
def test_a_peers_key_beside_another_target(text):
    """Told alike inside ``target:`` and at the top of a config file."""
    config = yaml.safe_load(text)
    spelled = {key: value for key, value in config.items() if key in peers.KEYS}
    beside = {key: value for key, value in config.items() if key not in peers.KEYS}
    with pytest.raises(qt.ConfigError) as inside:
        qt.Target.from_config(config)
    with pytest.raises(qt.ConfigError) as above:
        peers.read(spelled, beside)
    assert str(inside.value) == str(above.value)
    assert str(inside.value).startswith(f"target is {beside!r}, but ")
    assert str(inside.value).endswith("keep one of them")


@pytest.mark.parametrize("text", ["{}", "{use_dft_loss: false}", "{use_eaft_loss: false, eaft_alpha: 1.0}", "{lr: 1}"])
def test_settings_that_spell_no_objective(text):
    assert peers.read(yaml.safe_load(text)) is None


def test_every_peer_key_is_known():
    assert set(peers.KEYS) == {
        "use_dft_loss",
        "enable_dft_loss",
        "liger_use_token_scaling",
        "use_eaft_loss",
        "eaft_alpha",
        "eaft_k",
        "use_eaft",
        "use_asft_loss",
        "asft_alpha",
        "mode",
        "kl_weight",
        "loss",
        "gem_beta",
        "gem_h",
        "prob_threshold",
        "threshold_direction",
        "objective_trans",
        "kl_direction",
        "rlhf_type",
        "lmbda",
        "beta",
        "temperature",
        "seq_kd",
        "sft_alpha",
        "gkd_logits_topk",
        "kd_trainer",
        "kd_ce_alpha",
        "kd_alpha",
        "kd_temperature",
        "kd_beta",
        "kd_normalize_topk",
    }
