"""Small real models and a small real tokenizer, made on the spot: seconds, no download."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = [
    "Tom has 3 apples and buys 4 more, so he has 7 apples.",
    "A box holds 12 pens. Two boxes hold 24 pens.",
    "If 5 birds sit on a wire and 2 fly away, 3 are left.",
    "She reads 10 pages a day for 6 days, which makes 60 pages.",
    "The train leaves at 9 and arrives at 11, after 2 hours.",
    "Half of 18 is 9, and 9 plus 1 is 10.",
    "Ann is 8. In 5 years she will be 13 years old.",
    "A cake cut in 8 slices feeds 4 people 2 slices each.",
]


@functools.cache
def tokenizer(extra: str = "") -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few sentences; ``extra`` changes what it learns."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator([*SENTENCES, extra * 50], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    return fast


def llama(seed: int = 0, width: int = 32, tied: bool = True, vocab: int | None = None) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer()) if vocab is None else vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer()),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.3,
    )
    return GPT2LMHeadModel(config)


class NoKwargs(LlamaForCausalLM):
    """A model whose forward takes exactly what it names."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def no_kwargs(seed: int = 0) -> NoKwargs:
    twin = llama(seed)
    model = NoKwargs(twin.config)
    model.load_state_dict(twin.state_dict())
    return model


def conversation_dataset(rows: int = 8) -> Dataset:
    """Prompt and completion pairs of different lengths."""
    pairs = [
        {
            "prompt": [{"role": "user", "content": sentence[: 10 + 3 * (i % 5)]}],
            "completion": [
                {"role": "assistant", "content": SENTENCES[(i * 3 + 1) % len(SENTENCES)][: 14 + 7 * (i % 6)]}
            ],
        }
        for i, sentence in enumerate((SENTENCES * (1 + rows // len(SENTENCES)))[:rows])
    ]
    return Dataset.from_list(pairs)


def text_dataset(rows: int = 8) -> Dataset:
    """Plain text of different lengths, every token supervised."""
    many = (SENTENCES * (1 + rows // len(SENTENCES)))[:rows]
    return Dataset.from_list([{"text": sentence[: 20 + 5 * (i % 7)]} for i, sentence in enumerate(many)])


def save_trained(folder: Path) -> Path:
    """Write ``trained_model`` and its tokenizer there."""
    trained_model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_sums(file: Path) -> Path:
    """Write five problems for ``qtarget eval``."""
    rows = [{"prompt": sentence[: 8 + 2 * i], "answer": str(i)} for i, sentence in enumerate(SENTENCES[:5])]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def trained_model(make: Callable[..., PreTrainedModel] = llama, **settings) -> PreTrainedModel:
    """A model after a few steps on the conversations: label probabilities from 0.01 to 0.9 instead of 1e-4.

    Each call makes a new model; equal settings give equal weights.
    """
    model = make(**settings)
    model.load_state_dict(_trained_weights(make, **settings))
    return model


@functools.cache
def _trained_weights(make: Callable[..., PreTrainedModel], **settings) -> dict[str, torch.Tensor]:
    model = make(**settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for row in conversation_dataset(30):
        ids = tokenizer().apply_chat_template(row["prompt"] + row["completion"], return_tensors="pt")["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def gemma2(seed: int = 0) -> Gemma2ForCausalLM:
    """Its logits end in a softcap, low enough here to bend them."""
    torch.manual_seed(seed)
    return Gemma2ForCausalLM(
        Gemma2Config(vocab_size=len(tokenizer()), head_dim=8, final_logit_softcapping=3.0, **SMALL)
    )


def cohere(seed: int = 0) -> CohereForCausalLM:
    """Its logits are multiplied."""
    torch.manual_seed(seed)
    return CohereForCausalLM(CohereConfig(vocab_size=len(tokenizer()), logit_scale=0.25, **SMALL))


def granite(seed: int = 0) -> GraniteForCausalLM:
    """Its logits are divided."""
    torch.manual_seed(seed)
    return GraniteForCausalLM(GraniteConfig(vocab_size=len(tokenizer()), logits_scaling=4.0, **SMALL))


def qwen3_moe(seed: int = 0) -> Qwen3MoeForCausalLM:
    """Four experts of which each token asks two; the routers have an auxiliary loss that balances them."""
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(tokenizer()),
            head_dim=8,
            moe_intermediate_size=32,
            num_experts=4,
            num_experts_per_tok=2,
            output_router_logits=True,
            router_aux_loss_coef=0.02,
            **SMALL,
        )
    )


# Marks what the assistant says, its end of turn included.
MARKED_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def message_dataset(rows: int = 8) -> Dataset:
    """Messages of one or two rounds, some with a system prompt first."""
    made = []
    for i in range(rows):
        said = [SENTENCES[(i + k) % len(SENTENCES)][: 8 + 3 * ((i + k) % 5)] for k in range(2 + 2 * (i % 2))]
        roles = ["user", "assistant"] * 2
        messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
        made.append({"messages": [{"role": "system", "content": "Count."}] * (i % 3 == 0) + messages})
    return Dataset.from_list(made)


def from_value_dataset(rows: int = 8) -> Dataset:
    """The same, as ``conversations`` of from and value."""
    return Dataset.from_list(
        [
            {"conversations": [{"from": m["role"], "value": m["content"]} for m in row["messages"]]}
            for row in message_dataset(rows)
        ]
    )


def prompt_dataset(rows: int = 8) -> Dataset:
    """Prompt and completion as plain text, of different lengths."""
    many = (SENTENCES * (1 + rows // len(SENTENCES)))[:rows]
    return Dataset.from_list(
        [{"prompt": s[: 6 + 3 * (i % 5)], "completion": s[6 + 3 * (i % 5) :]} for i, s in enumerate(many)]
    )
