"""Gradients of the token embeddings by rows: a batch reads few of them, and autograd makes the whole table's gradient for it.

On a table that is also the output head, autograd fills a second table with zeros, adds the rows that were read, and adds the two
tables. Here the rows' gradients are added to the table's own where they belong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class EmbeddingRows:
    """What was read of a table since the last update.

    Attributes:
        table: ``[vocabulary, width]``, the parameter.
        padding: A token whose row gets no gradient by way of reading, as ``nn.Embedding`` has it, or ``None``.
        read: Token ids and, as a leaf of the graph, what the embedding gave for them; one pair per pass.
    """

    table: Tensor
    padding: int | None = None
    read: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def take(self, _module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A forward hook: cuts the graph behind the table, where there is one."""
        if not output.requires_grad:
            return output
        leaf = output.detach().requires_grad_()
        self.read.append((arguments[0], leaf))
        return leaf

    @torch.no_grad()
    def add(self) -> None:
        """Adds what the rows got to the table's gradient, behind the backward pass, and forgets them."""
        for tokens, leaf in self.read:
            if leaf.grad is None:
                continue
            if self.table.grad is None:
                self.table.grad = torch.zeros_like(self.table)
            flat, got = tokens.reshape(-1), leaf.grad.reshape(-1, self.table.shape[1]).to(self.table)
            if self.padding is not None:
                counted = flat != self.padding
                flat, got = flat[counted], got[counted]
            self.table.grad.index_add_(0, flat, got)
        self.read.clear()


@contextmanager
def embedding_rows(model: Any) -> Iterator[EmbeddingRows | None]:
    """Gives the rows' keeper while the hook is in; ``None`` where the table is not trained or its module does more than look up."""
    module = model.get_input_embeddings()
    simple = (
        type(module) is nn.Embedding
        and module.weight.requires_grad
        and module.max_norm is None
        and not module.scale_grad_by_freq
    )
    if not simple:
        yield None
        return
    rows = EmbeddingRows(module.weight, module.padding_idx)
    hook = module.register_forward_hook(rows.take)
    try:
        yield rows
    finally:
        hook.remove()
