"""The controls of preference training: SFT alone in as many tokens, with the answers that it prefers or without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lab.tokens import encode_ids
from rag.preference.knowpo import TrainingData
from rag.preference.stage import finish, records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lab.handle import ModelHandle
    from rag.preference.train import TrainConfig


def equal_token_sft(
    handle: ModelHandle, data: TrainingData, config: TrainConfig, *, chosen: bool = True
) -> tuple[TrainingData, TrainConfig]:
    """SFT alone in as many tokens as a two-step training.

    Its epochs are set so that the tokens that it is trained on are those of both steps (a pair has its prompt twice, as the
    trainer reads it; passes of the reference model do not count).

    Args:
        handle: Counts tokens.
        data: What the two steps train on.
        config: Of the two steps.
        chosen: Whether the chosen answer of every pair is taught as well: the control then sees every title and lacks nothing but the
            rejected answers. Off, it is the first step carried on, which lacks all that comes of the second.

    Returns:
        Data without pairs, and the settings with other ``sft_epochs``.
    """
    rows = records(data.sft) if data.sft is not None else []
    pairs = records(data.pairs) if data.pairs is not None else []
    preferred = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs] if chosen else []
    mixed = [{name: row[name] for name in ("prompt", "completion")} for row in rows] + preferred
    tokenizer = handle.tokenizer
    first = trained_tokens(tokenizer, rows, ("completion",))
    second = trained_tokens(tokenizer, pairs, ("chosen", "rejected"))
    once = first + trained_tokens(tokenizer, preferred, ("completion",))
    wanted = first * config.sft_epochs + second * config.dpo_epochs
    epochs = wanted / once if once else config.sft_epochs
    made = finish("equal_tokens", len(mixed), mixed, tokens=round(wanted), epochs=epochs, chosen=chosen)
    return TrainingData(made.data, None, {**data.stages, "equal_tokens": made}), replace(
        config, sft_epochs=epochs
    )


def trained_tokens(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], fields: Sequence[str]
) -> int:
    """Tokens of one pass over rows: the prompt and, for each of ``fields``, what follows it."""
    return sum(len(encode_ids(tokenizer, row["prompt"] + row[field])) for row in rows for field in fields)
