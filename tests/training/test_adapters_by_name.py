"""An adapter named like a model: loaded as PEFT loads it, trained on, merged, and its own reference."""

import json

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_models
from adapter_folders import logits, lora, write_adapter, write_base
from published import CASES
from qtarget import ConfigError
from qtarget.models.loading import find_adapter, load_causal_lm, load_tokenizer, merged, starts_as_its_base
from qtarget.teachers.fingerprints import weights_hash
from quick_runs import (
    as_it_is_now,
    assert_same_change,
    change_by_autograd,
    copied_weights,
    quick_trainer,
    tokenised_rows,
    train_quickly,
)

MERGED = 1e-5  # of logits of size 10, in float32
KINDS = {
    "lora": (lora(), None),
    "dora": (lora(use_dora=True), None),
    "pissa": (lora(init_lora_weights="pissa"), None),
    "biases": (lora(bias="all"), None),
    "on the head": (lora(target_modules=["q_proj", "lm_head"]), None),
    "on the embedding": (lora(target_modules=["q_proj", "embed_tokens"]), None),
    "and the head": (lora(modules_to_save=["lm_head"]), None),
    "and both ends": (lora(modules_to_save=["embed_tokens", "lm_head"]), None),
    "and some tokens": (lora(trainable_token_indices=[11, 12]), None),
    "new tokens": (lora(), 340),
    "new tokens, trained": (lora(trainable_token_indices=[321, 322]), 340),
    "new tokens and both ends": (lora(modules_to_save=["embed_tokens", "lm_head"]), 340),
    "ia3": (IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM"), None),
    "loha": (LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), None),
}
PROMPTS = {
    "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {tied: write_base(root / str(tied), tied=tied) for tied in (True, False)}


@pytest.fixture(scope="module")
def adapter(bases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    write_adapter(folder, bases[True])
    return folder


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_loaded_and_merged_it_says_what_it_said(kind, tied, bases, tmp_path):
    config, rows = KINDS[kind]
    wanted = logits(write_adapter(tmp_path / "adapter", bases[tied], config, rows))
    frozen, trainable = (load_causal_lm(str(tmp_path / "adapter"), trainable=so) for so in (False, True))
    assert torch.equal(logits(frozen), wanted) and torch.equal(logits(trainable), wanted)
    assert not any(p.requires_grad for p in frozen.parameters()) and any(
        p.requires_grad for p in trainable.parameters()
    )
    plain = merged(frozen)
    plain.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(plain), wanted, atol=MERGED) and torch.allclose(logits(again), wanted, atol=MERGED)


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_prompt_is_loaded_and_neither_trained_on_nor_merged(kind, bases, tmp_path):
    wanted = logits(write_adapter(tmp_path / "adapter", bases[True], PROMPTS[kind]))
    loaded = load_causal_lm(str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), wanted)
    with pytest.raises(ValueError, match="which PEFT cannot merge"):
        merged(loaded)
    with pytest.raises(ConfigError, match="which PEFT cannot train further"):
        quick_trainer(str(tmp_path / "adapter"), tmp_path)
    with pytest.raises(ConfigError, match=r"the teacher is an adapter of kind .* whose virtual prompt would be shared"):
        quick_trainer(tiny_models.llama(), tmp_path, target="kd", teacher_model_name_or_path=str(tmp_path / "adapter"))


def test_the_tokenizer_is_its_own_else_its_bases(adapter, tmp_path):
    assert load_tokenizer(str(adapter)).get_vocab() == tiny_models.tokenizer().get_vocab()
    own = AutoTokenizer.from_pretrained(find_adapter(str(adapter)).base)
    own.add_tokens(["<new>"])
    write_adapter(tmp_path / "adapter", find_adapter(str(adapter)).base)
    own.save_pretrained(tmp_path / "adapter")
    assert "<new>" in load_tokenizer(str(tmp_path / "adapter")).get_vocab()


def test_other_weights_settings_and_bases_have_other_fingerprints(adapter, bases, tmp_path):
    def changed(name, **values):
        write_adapter(tmp_path / name, find_adapter(str(adapter)).base)
        file = tmp_path / name / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
        return weights_hash(str(tmp_path / name))

    assert changed("same", inference_mode=False) == weights_hash(str(adapter))
    others = [changed("alpha", lora_alpha=1), changed("base", base_model_name_or_path=str(bases[False]))]
    write_adapter(tmp_path / "weights", bases[True], seed=2)
    others.append(weights_hash(str(tmp_path / "weights")))
    assert len({weights_hash(str(adapter)), *others}) == 4
    (tmp_path / "same/training_args.bin").write_bytes(b"of another run")  # no weights, though named as they are
    assert weights_hash(str(tmp_path / "same")) == weights_hash(str(adapter))


# -- going on ------------------------------------------------------------------------------------------------------


def test_it_is_trained_on_as_if_peft_had_loaded_it(adapter, bases, tmp_path):
    by_hand = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[True]), adapter, is_trainable=True)
    start = copied_weights(by_hand)
    settings = {"target": "target-sft", "teacher_model_name_or_path": str(bases[True]), "max_steps": 2}
    by_name = train_quickly(str(adapter), tmp_path / "run", **settings)
    train_quickly(by_hand, tmp_path / "other", **settings)
    theirs, ours = dict(by_hand.named_parameters()), dict(by_name.model.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    moved = {name for name in ours if not torch.equal(ours[name], start[name])}
    assert moved == {name for name in ours if "lora_" in name}
    by_name.save_model()
    assert find_adapter(str(tmp_path / "run")).base == str(bases[True])
    assert torch.equal(logits(load_causal_lm(str(tmp_path / "run"))), logits(by_name.model))


@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["lm_head"]}], ids=["adapters", "and the head"])
@pytest.mark.parametrize("name", ["asft:kl_weight=0.8", "sft-kl:kl_weight=3.0"])
def test_its_reference_is_itself_as_it_started(name, more, bases, tmp_path):
    """Base and adapter, not the bare base: by numbers, over three steps."""
    case = next(case for case in CASES if case.id == name)
    write_adapter(tmp_path / "adapter", bases[False], lora(**more))
    init = {"dtype": torch.float64}
    made = quick_trainer(
        str(tmp_path / "adapter"),
        tmp_path / "run",
        target={"preset": case.preset, **case.hyperparameters},
        model_init_kwargs=init,
        learning_rate=0.3,
        max_steps=3,
    )
    twin = load_causal_lm(str(tmp_path / "adapter"), trainable=True, **init)
    before = copied_weights(made.model)
    made.train()
    got = {n: p.detach() - before[n] for n, p in made.model.named_parameters() if p.requires_grad}
    wanted = change_by_autograd(
        twin,
        tokenised_rows(tiny_models.conversation_dataset(4)),
        lambda z, y, **given: case.loss(z, y, given),
        lr=0.3,
        steps=3,
        reference=as_it_is_now(twin),
    )
    assert_same_change(got, wanted)
    assert made.identity()["reference"].startswith("the adapter at the start, ")


def test_resumed_it_has_the_reference_it_began_with(adapter, bases, tmp_path):
    settings = {
        "target": {"preset": "asft", "kl_weight": 2.0},
        "learning_rate": 0.3,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = train_quickly(str(adapter), tmp_path / "run", max_steps=4, **settings)
    resumed = quick_trainer(str(adapter), tmp_path / "run", max_steps=4, **settings)
    resumed.train(str(tmp_path / "run" / "checkpoint-2"))
    ours = dict(resumed.model.named_parameters())
    assert all(torch.equal(ours[name], value) for name, value in whole.model.named_parameters())
    write_adapter(tmp_path / "other", bases[True], seed=2)
    other = quick_trainer(str(tmp_path / "other"), tmp_path / "run", max_steps=4, **settings)
    with pytest.raises(ConfigError, match="reference is 'the adapter at the start"):
        other.train(str(tmp_path / "run" / "checkpoint-2"))


@pytest.mark.parametrize(
    "config, so",
    [
        (lora(), True),
        (lora(use_dora=True), False),
        (lora(init_lora_weights="pissa"), False),
        (lora(init_lora_weights=False), False),
        (lora(modules_to_save=["lm_head"]), True),
        (lora(target_modules=["embed_tokens"]), True),
        (PROMPTS["prompt"], True),
    ],
    ids=["lora", "dora", "pissa", "random", "head", "embedding", "prompt"],
)
def test_adapters_off_is_the_start_of_those_that_do_nothing_yet(config, so):
    model = get_peft_model(tiny_models.trained_model(tied=False), config)
    assert starts_as_its_base(model) is so
    if so and not config.is_prompt_learning:
        now = logits(model)
        with model.disable_adapter():
            assert torch.equal(logits(model), now)


def test_an_adapter_is_teacher_and_reference(adapter, bases, tmp_path):
    """As PEFT's own model handed over."""

    def by_hand():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[True]), adapter)

    student = tiny_models.trained_model(seed=3)
    made = [
        quick_trainer(
            tiny_models.trained_model(seed=3),
            tmp_path,
            target="target-sft",
            reference_model_name_or_path=None,
            **given,
        )
        for given in ({"teacher_model_name_or_path": str(adapter)}, {"teacher_model": by_hand()})
    ]
    for one in made:
        one.train()
    ours, theirs = (dict(one.model.named_parameters()) for one in made)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(not torch.equal(ours[name], value) for name, value in student.named_parameters())
    asft = quick_trainer(
        tiny_models.trained_model(seed=3), tmp_path, target="asft", reference_model_name_or_path=str(adapter)
    )
    row = tokenised_rows(tiny_models.conversation_dataset(1))[0]
    batch = asft.batch([asft.train_dataset[0]])
    head = asft.ask(batch, {"reference"})["reference"]
    with torch.no_grad():
        own = by_hand().eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
    assert torch.allclose((head.hidden @ head.weight.T)[0, : len(own)], own, atol=1e-5)


def test_new_adapters_on_an_adapter_are_refused(adapter, tmp_path):
    with pytest.raises(
        ConfigError, match=r"peft_config asks for a new adapter, but model_name_or_path is .* merge it first"
    ):
        quick_trainer(str(adapter), tmp_path, peft_config=lora())


def test_without_peft_one_sentence_says_what_to_install(adapter, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        ValueError, match=r"the package peft is not installed; install it: pip install 'qtarget\[peft\]'"
    ):
        load_causal_lm(str(adapter))
