"""What peers call the same objectives: each spelling is read as that peer means it, or refused with the nearest."""

import pytest
import yaml

import qtarget as qt
from qtarget.targets import peers


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
    ["{use_eaft: true, preset: dft}", "{use_dft_loss: true, trust: 0.5}", "{gem_beta: 0.5, preset: gem, beta: 0.7}"],
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
    }
