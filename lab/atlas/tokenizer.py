"""Byte-level BPE tokenizers for small worlds: every text has tokens, and no text is unknown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lab.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END, PAD = "<|endoftext|>", "<|pad|>"
SMALLEST = 2 + 256


def train_tokenizer(texts: Iterable[str], vocab: int, context: int = 1024) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer.

    Token 0 ends a text, token 1 pads. When the texts have too few different pairs for ``vocab`` tokens the tokenizer is
    smaller; a model may still have ``vocab`` embedding rows.

    Args:
        texts: Training texts.
        vocab: Most tokens, the 256 bytes and two special tokens included.
        context: Longest input of the model, kept as ``model_max_length``.

    Raises:
        ConfigError: ``vocab`` does not hold all bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab < SMALLEST:
        raise ConfigError(f"a byte-level vocabulary needs at least {SMALLEST} tokens, not {vocab}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
