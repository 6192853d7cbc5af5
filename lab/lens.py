"""The logit lens: what each block's output already says, through the model's own final norm and head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lab.arch import Role
from lab.errors import ConfigError, NumericalError
from lab.scoring import log_probs
from lab.tokens import encode_ids, join_target, pad_rows
from lab.trace import Site, trace

if TYPE_CHECKING:
    from lab.handle import ModelHandle

# Logits held at once, in numbers: bounds memory for wide vocabularies.
_MOST_LOGITS = 1 << 26


@dataclass(frozen=True, eq=False)
class LogitLens:
    """The next token as each block sees it.

    Attributes:
        tokens: Text of each prompt token.
        top_ids: ``[layer, token, k]``, most probable next tokens after each block.
        top_probabilities: The same shape.
        top_texts: The same, decoded.
        target: Probability of the target's first token, ``[layer, token]``, where a target was given.
    """

    tokens: tuple[str, ...]
    top_ids: Tensor
    top_probabilities: Tensor
    top_texts: tuple[tuple[tuple[str, ...], ...], ...]
    target: Tensor | None

    def to_json(self) -> dict[str, Any]:
        """All numbers as plain values."""
        return {
            "tokens": list(self.tokens),
            "top": [[list(texts) for texts in layer] for layer in self.top_texts],
            "probabilities": self.top_probabilities.tolist(),
            "target": None if self.target is None else self.target.tolist(),
        }

    def plot(self, path: str | Path) -> Path:
        """Writes a PNG of the target's probability, or of the most probable token's where no target was given."""
        from lab.plots import heat_map

        shown = self.top_probabilities[..., 0] if self.target is None else self.target
        return heat_map(
            path,
            shown,
            title="Logit lens",
            rows="layer",
            columns="",
            bar="probability of the target" if self.target is not None else "largest probability",
            column_labels=self.tokens,
            limits=(0.0, 1.0),
        )


def logit_lens(handle: ModelHandle, prompt: str, *, target: str | None = None, top_k: int = 5) -> LogitLens:
    """Reads every block's output as if it were the last one's.

    The output of each block replaces that of the last block in a row of its own, and the model itself does the rest: final
    norm, head, bias and soft cap are the family's. The last layer's row is the model's plain prediction.

    Args:
        handle: The model, with whatever is applied to it.
        prompt: The text.
        target: A continuation; the probability of its first token is reported.
        top_k: How many tokens to name at each place.

    Raises:
        ConfigError: ``top_k`` is not positive, or the prompt has no token.
        EmptyTargetError: The target has no tokens.
    """
    ids = encode_ids(handle.tokenizer, prompt)
    if top_k < 1 or not ids:
        raise ConfigError("the logit lens needs a prompt with at least one token and top_k of at least 1")
    wanted = None if target is None else join_target(handle.tokenizer, prompt, target)[1][0]
    depth = handle.n_layers
    sites = [Site(Role.BLOCK, layer) for layer in range(depth)]
    vocabulary = int(handle.config.vocab_size)
    step = max(1, _MOST_LOGITS // (len(ids) * vocabulary))
    top_ids, top_values, targets = [], [], []
    with handle.writing(), torch.no_grad():
        with trace(handle, sites) as recording:
            recording.run(pad_rows([ids], handle.pad_id, device=handle.device), logits_to_keep=1)
            states = torch.cat([recording[site] for site in sites])
        for start in range(0, depth, step):
            chosen = states[start : start + step]
            batch = pad_rows([ids] * len(chosen), handle.pad_id, device=handle.device)
            with trace(handle, writes={sites[-1]: _constant(chosen)}) as recording:
                logits = recording.run(batch)
            if logits is None:
                raise NumericalError("the forward pass gave no logits")
            table = log_probs(logits).exp()
            best = table.topk(min(top_k, table.shape[-1]), dim=-1)
            top_ids.append(best.indices.cpu())
            top_values.append(best.values.double().cpu())
            if wanted is not None:
                targets.append(table[..., wanted].double().cpu())
    indices = torch.cat(top_ids)
    tokenizer = handle.tokenizer
    texts = tuple(
        tuple(tuple(str(tokenizer.decode([token])) for token in place) for place in layer)
        for layer in indices.tolist()
    )
    tokens = tuple(str(tokenizer.decode([token])) for token in ids)
    return LogitLens(tokens, indices, torch.cat(top_values), texts, torch.cat(targets) if targets else None)


def _constant(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda output: value.to(output.dtype)
