"""Where a subject stands in a prompt, so that a change is learned there and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lab.tokens import subject_span
from lab.trace import Write

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Subjects:
    """Finds subjects' tokens, each once.

    Args:
        tokenizer: Of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._found: dict[tuple[str, str], range] = {}

    def span(self, prompt: str, subject: str) -> range | None:
        """The subject's token positions; ``None`` in a prompt that does not name it."""
        if subject not in prompt:
            return None
        if (prompt, subject) not in self._found:
            self._found[prompt, subject] = subject_span(self._tokenizer, prompt, subject)
        return self._found[prompt, subject]

    def only(self, rows: Sequence[tuple[str, str]]) -> Write:
        """A write that lets no gradient through but at the subjects' tokens; everywhere in prompts that do not name theirs.

        Args:
            rows: Prompt and subject of each row of the batch, which is padded on the right.
        """
        spans = [self.span(prompt, subject) for prompt, subject in rows]

        def write(states: Tensor) -> Tensor:
            free = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
            for row, span in enumerate(spans):
                if span is None:
                    free[row] = True
                else:
                    free[row, span.start : span.stop] = True
            return torch.where(free[..., None], states, states.detach())

        return write
