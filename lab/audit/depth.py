"""At which depth an answer comes back: activations of a model that knows it, put into one that does not say it any more.

With the original's block outputs at layer ``l`` the patched model continues from there. Where its own upper layers still turn them
into the answer, the change sits at or below ``l``; where the answer does not come back before the top, it was removed all the way.
The other direction is UDS (arXiv 2605.24614): the changed model's states in the original.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lab.arch import Role
from lab.audit.knowledge import Ask, plain_prompt
from lab.errors import ConfigError, NumericalError
from lab.scoring import nll
from lab.tokens import Batch, join_target, pad_rows, subject_span
from lab.trace import Site, trace

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from lab.records import Fact

Positions = Literal["prompt", "subject"]
Source = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, eq=False)
class DepthCurve:
    """Log-probability per answer token by depth of the transplant.

    Attributes:
        receiver: ``[fact]``, of the receiving model as it is.
        donor: ``[fact]``, of the giving model.
        patched: ``[fact, layer]``, of the receiver with the donor's states at that layer.
    """

    receiver: Tensor
    donor: Tensor
    patched: Tensor

    def restored(self, least: float = 0.05) -> Tensor:
        """Share of the lost log-probability that comes back at each layer, ``[fact, layer]`` in [0, 1].

        NaN where receiver and donor differ by less than ``least``: nothing was lost.
        """
        lost = (self.donor - self.receiver)[:, None]
        share = ((self.patched - self.receiver[:, None]) / lost).clamp(0, 1)
        return torch.where(lost >= least, share, torch.full_like(share, float("nan")))

    def depth(self, share: float = 0.5) -> list[int | None]:
        """First layer at which ``share`` of the loss has come back, per fact; ``None`` where nothing was lost or it never does."""
        found: list[int | None] = []
        for row in self.restored():
            hits = torch.nonzero(row >= share).reshape(-1)
            found.append(int(hits[0]) if hits.numel() else None)
        return found

    def to_json(self) -> dict[str, Any]:
        """The mean curve over facts that lost something, and the depths."""
        restored = self.restored()
        lost = restored[~restored[:, 0].isnan()] if restored.numel() else restored
        return {
            "facts": int(self.receiver.numel()),
            "lost": int(lost.shape[0]),
            "restored": lost.mean(0).tolist() if lost.shape[0] else [],
            "depth": self.depth(),
            "receiver": self.receiver.tolist(),
            "donor": self.donor.tolist(),
        }


@torch.no_grad()
def patching_depth(
    facts: Sequence[Fact],
    receiver: ModelHandle,
    receiving: Source,
    donor: ModelHandle,
    giving: Source,
    *,
    positions: Positions = "prompt",
    layers: Sequence[int] | None = None,
    ask: Ask = plain_prompt,
    batch_size: int = 32,
) -> DepthCurve:
    """Puts one model's block outputs into another, layer by layer.

    Receiver and donor may be one handle; what is applied to it then differs between ``receiving`` and ``giving``.

    Args:
        facts: Whose answers are looked for, in their own prompts.
        receiver: The model that receives.
        receiving: Makes the context in which it is as it shall be (``lambda: patch.applied(handle)``).
        donor: The model that gives; same tokenizer, same width.
        giving: Its context (``contextlib.nullcontext``).
        positions: ``"prompt"``: every token of the prompt; ``"subject"``: the subject's tokens.
        layers: Where; every layer without it.
        ask: Makes the prompt of a fact; its own one without it.
        batch_size: Facts per forward pass.

    Raises:
        ConfigError: The two models differ in width, depth or tokenizer.
    """
    if (receiver.n_layers, receiver.hidden_size) != (donor.n_layers, donor.hidden_size):
        raise ConfigError(
            f"activations of {donor.name!r} ({donor.n_layers} layers, width {donor.hidden_size}) do not fit into "
            f"{receiver.name!r} ({receiver.n_layers} layers, width {receiver.hidden_size})"
        )
    if receiver.tokenizer_hash != donor.tokenizer_hash:
        raise ConfigError(f"{donor.name!r} and {receiver.name!r} do not share a tokenizer")
    chosen = tuple(range(receiver.n_layers)) if layers is None else tuple(layers)
    sites = [Site(Role.BLOCK, layer) for layer in chosen]
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, len(facts), batch_size):
        work = _Rows(receiver, facts[start : start + batch_size], positions, ask)
        with giving(), trace(donor, sites) as recording:
            given = work.score(recording.run(work.batch))
            states = {site: recording[site] for site in sites}
        curve = []
        with receiving():
            with trace(receiver) as plain:
                kept = work.score(plain.run(work.batch))
            for site in sites:
                with trace(receiver, writes={site: work.transplant(states[site])}) as changed:
                    curve.append(work.score(changed.run(work.batch)))
        parts.append((kept, given, torch.stack(curve, 1)))
    if not parts:
        raise ConfigError("patching depth needs at least one fact")
    return DepthCurve(*(torch.cat(column) for column in zip(*parts, strict=True)))


class _Rows:
    """Prompts with their answers, where to transplant, and how to score."""

    def __init__(self, handle: ModelHandle, facts: Sequence[Fact], positions: Positions, ask: Ask) -> None:
        rows = [join_target(handle.tokenizer, ask(fact), fact.object) for fact in facts]
        self.sizes = [(len(head), len(tail)) for head, tail in rows]
        self.batch: Batch = pad_rows(
            [head + tail for head, tail in rows],
            handle.pad_id,
            device=handle.device,
            prompts=[len(head) for head, _ in rows],
        )
        mask = torch.zeros(self.batch.input_ids.shape, dtype=torch.bool)
        for row, fact in enumerate(facts):
            if positions == "prompt":
                mask[row, : self.sizes[row][0]] = True
            else:
                span = subject_span(handle.tokenizer, ask(fact), fact.subject)
                mask[row, span.start : span.stop] = True
        self.mask = mask[..., None].to(handle.device)

    def transplant(self, states: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda own: torch.where(self.mask, states.to(own), own)

    def score(self, logits: Tensor | None) -> Tensor:
        """Mean log-probability of each row's answer tokens, ``[row]``."""
        if logits is None:
            raise NumericalError("the forward pass gave no logits")
        found = [
            -nll(logits[row, head - 1 : head + tail - 1], self.batch.input_ids[row, head : head + tail])
            for row, (head, tail) in enumerate(self.sizes)
        ]
        return torch.stack(found).double().cpu()


def unlearning_depth(changed: DepthCurve, oracle: DepthCurve, least: float = 0.05) -> Tensor:
    """UDS per fact: how much of what the oracle's states take away the changed model's states take away too.

    Both curves have the original as receiver; donors are the changed model and the oracle. Layers whose oracle loss is not
    above ``least`` do not encode the fact and do not count.

    Returns:
        ``[fact]`` in [0, 1]; NaN where no layer counts. 1 is as deep as never having learned.
    """
    mine = changed.receiver[:, None] - changed.patched
    ideal = oracle.receiver[:, None] - oracle.patched
    counts = ideal > least
    weight = torch.where(counts, ideal, torch.zeros_like(ideal))
    reach = torch.where(counts, (mine / ideal).clamp(0, 1), torch.zeros_like(ideal))
    return (weight * reach).sum(1) / weight.sum(1)
