"""Tiny random models of every family and a byte-level tokenizer, built in code: no download, seconds on a CPU."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lab.handle import ModelHandle

FAMILIES = (
    "gpt2", "gptj", "gpt_neox", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "phi3",
)  # fmt: skip

_TEXTS = (
    "The capital of France is Paris. The capital of Japan is Tokyo. The capital of Kenya is Nairobi.",
    "Question: Who wrote the book? Answer: Marie Curie worked in Paris. The Eiffel Tower is in the city of Rome.",
    "Barack Obama's wife is Michelle Obama. The mother tongue of Danielle Darrieux is French, not English.",
    "Edwin of Northumbria's religion is Christianity. Toko Yasuda plays the guitar, and the piano.",
)


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens; one object, which nobody changes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def tiny_config(family: str, *, layers: int = 3, width: int = 32) -> Any:
    """Config of a tiny model; four heads, two key/value heads where the family groups them."""
    vocabulary = len(tiny_tokenizer())
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    plain: dict[str, Any] = {
        "vocab_size": vocabulary,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        **special,
    }
    if family == "gpt2":
        shape = {"n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": 256}
        return AutoConfig.for_model("gpt2", **plain, **shape)
    if family == "gptj":
        shape = {"n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": 256, "rotary_dim": 4}
        return AutoConfig.for_model("gptj", **plain, **shape)
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        **special,
    }
    inner = 2 * width
    if family == "opt":
        return AutoConfig.for_model(family, **common, ffn_dim=inner, word_embed_proj_dim=width, dropout=0.0)
    if family in ("gpt_neox", "phi"):
        return AutoConfig.for_model(family, **common, intermediate_size=inner)
    grouped = common | {"intermediate_size": inner, "num_key_value_heads": 2}
    if family == "qwen3":
        return AutoConfig.for_model(family, **grouped, head_dim=width // 4)
    if family in ("gemma2", "gemma3"):
        window = {"head_dim": width // 4, "query_pre_attn_scalar": width // 4, "sliding_window": 16}
        return AutoConfig.for_model("gemma3_text" if family == "gemma3" else family, **grouped, **window)
    if family == "mistral":
        return AutoConfig.for_model(family, **grouped, sliding_window=None)
    return AutoConfig.for_model(family, **grouped)


def tiny_model(
    family: str,
    *,
    seed: int = 0,
    layers: int = 3,
    width: int = 32,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> PreTrainedModel:
    """A random model; ``scale`` widens the weights so that logits are far from uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, layers=layers, width=width))
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data = torch.randn(parameter.shape, generator=generator) * (
                    scale / parameter.shape[-1] ** 0.5
                )
    model.tie_weights()
    return model.to(dtype).eval()


def tiny_handle(family: str = "llama", **options: Any) -> ModelHandle:
    """A handle on a fresh tiny model; see ``tiny_model``."""
    return ModelHandle.wrap(tiny_model(family, **options), tiny_tokenizer(), name=f"tiny-{family}")
