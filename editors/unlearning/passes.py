"""Passes of the model in training over the texts of a run, joined with what the untouched model said about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from editors.tuning import TargetLines, target_lines
from editors.unlearning import losses
from editors.unlearning.procedure import Answers
from editors.unlearning.settings import GradientConfig
from editors.unlearning.sides import Kind, Side
from editors.unlearning.subjects import Subjects
from editors.values import Progress
from lab.arch import Role
from lab.handle import ModelHandle
from lab.records import Fact
from lab.trace import Site, Write, trace

MOST_PADDING = 1.1
"""Tokens of one pass over those of a pass per side, padding counted, up to which one pass is taken."""


class Passes:
    """What a trainer asks the model.

    Attributes:
        handle: The model.
        config: Settings.
        forget: The facts to forget.
        progress: Told about passes of the untouched model.
        sides: Texts of the facts to forget, by kind.
        retained: Texts of the retained facts.
        subjects: Where in a text its subject stands.
    """

    handle: ModelHandle
    config: GradientConfig
    forget: Sequence[Fact]
    progress: Progress | None
    sides: dict[Kind, Side]
    retained: Side
    subjects: Subjects

    def remember(self, side: Side, facts: Sequence[int], *, table: bool = False) -> None:
        """Keeps what the model says now about some facts' texts, with whole distributions where asked for."""
        wanted = [
            place for place in side.places(facts) if place not in (side.table if table else side.reference)
        ]
        size = self.config.batch_size
        for start in range(0, len(wanted), size):
            picked = wanted[start : start + size]
            lines, logits, _ = self._run(side, picked, grad=False)
            found = lines.of(logits)
            chosen = found.gather(1, lines.label[:, None])[:, 0]
            lengths = torch.bincount(lines.row, minlength=lines.rows).tolist()
            side.reference |= zip(picked, chosen.cpu().split(lengths), strict=True)
            if table:
                side.table |= zip(picked, found.cpu().split(lengths), strict=True)
            if self.progress is not None:
                self.progress("reference", start + len(picked), len(wanted))

    def _run(
        self,
        side: Side,
        places: Sequence[int],
        *,
        grad: bool,
        reads: Sequence[Site] = (),
        writes: Mapping[Site, Write] | None = None,
    ) -> tuple[TargetLines, Tensor, dict[Site, Tensor]]:
        lines = target_lines(self.handle, [side.pairs[place] for place in places])
        if not reads and not writes:
            return lines, self.handle.logits(lines.batch, grad=grad, logits_to_keep=lines.keep), {}
        with trace(self.handle, reads, writes, detach=not grad) as recording:
            logits = recording.run(lines.batch, logits_to_keep=lines.keep)
            assert logits is not None  # no site stops the pass
            return lines, logits, {site: recording[site] for site in reads}

    def answers(
        self,
        kind: Kind,
        picked: Sequence[int],
        *,
        grad: bool = True,
        reads: Sequence[Site] = (),
        writes: Mapping[Site, Write] | None = None,
    ) -> Answers:
        """Runs the model on some facts to forget.

        Args:
            kind: With which texts.
            picked: Which facts.
            grad: Whether gradients are wanted.
            reads, writes: Hidden states to keep and to change, as in ``lab.trace.trace``.
        """
        side = self.sides[kind]
        if grad and self.config.tokens == "subject":
            held = self.subjects.only(
                [
                    (side.pairs[place][0], self.forget[place // side.copies].subject)
                    for place in side.places(picked)
                ]
            )
            writes = {**(writes or {}), **{Site(Role.MLP_OUT, layer): held for layer in self.config.layers}}
        return self._answers(side, picked, grad, reads, writes)

    def retained_answers(
        self, picked: Sequence[int], *, grad: bool = True, reads: Sequence[Site] = ()
    ) -> Answers:
        """Runs the model on some retained facts; see ``answers``."""
        return self._answers(self.retained, picked, grad, reads, None)

    def together(
        self, kinds: Sequence[Kind], picked: Sequence[int], beside: Sequence[int]
    ) -> tuple[dict[Kind, Answers], Answers | None]:
        """Some facts' texts of several kinds, and retained facts, with gradients: in one pass where that wastes little.

        One pass makes each weight's gradient once where a pass per kind makes it anew and adds.

        Args:
            kinds: Which texts of the facts to forget.
            picked: Which facts to forget.
            beside: Which retained facts; none, and the second result is ``None``.
        """
        sides = [self.sides[kind] for kind in kinds] + ([self.retained] if beside else [])
        drawn = [side.places(beside if side is self.retained else picked) for side in sides]
        alone = len(sides) == 1 or self.config.tokens == "subject"
        parts = None if alone else self._in_one_pass(sides, drawn)
        if parts is None:
            found: dict[Kind, Answers] = {kind: self.answers(kind, picked) for kind in kinds}
            return found, self.retained_answers(beside) if beside else None
        retained = parts.pop() if beside else None
        return dict(zip(kinds, parts, strict=True)), retained

    def _in_one_pass(self, sides: Sequence[Side], drawn: Sequence[Sequence[int]]) -> list[Answers] | None:
        """Every side's answers from one pass; ``None`` where padding to one length would cost more than it saves."""
        sizes = [len(places) for places in drawn]
        whole = target_lines(
            self.handle,
            [side.pairs[place] for side, places in zip(sides, drawn, strict=True) for place in places],
        )
        parts = whole.split(sizes)
        apart = sum(part.rows * int(part.batch.lengths.max()) for part in parts)
        if whole.batch.input_ids.numel() > MOST_PADDING * apart:
            return None
        logits = self.handle.logits(whole.batch, grad=True, logits_to_keep=whole.keep)
        return [
            self._remembered(side, places, lines, piece, {})
            for side, places, lines, piece in zip(sides, drawn, parts, logits.split(sizes), strict=True)
        ]

    def _answers(
        self,
        side: Side,
        picked: Sequence[int],
        grad: bool,
        reads: Sequence[Site],
        writes: Mapping[Site, Write] | None,
    ) -> Answers:
        places = side.places(picked)
        lines, logits, states = self._run(side, places, grad=grad, reads=reads, writes=writes)
        return self._remembered(side, places, lines, logits, states)

    def _remembered(
        self,
        side: Side,
        places: Sequence[int],
        lines: TargetLines,
        logits: Tensor,
        states: Mapping[Site, Tensor],
    ) -> Answers:
        """A batch with what the untouched model said about it."""
        labels = torch.full(logits.shape[:2], losses.IGNORED, device=logits.device)
        labels[lines.row, lines.column] = lines.label
        wide = torch.promote_types(logits.dtype, torch.float32)
        reference = torch.zeros(labels.shape, dtype=wide, device=logits.device)
        if all(place in side.reference for place in places):
            known = torch.cat([side.reference[place] for place in places]).to(reference)
            reference[lines.row, lines.column] = known
        return Answers(logits, labels, reference, self.table_of(side, places, logits), lines, states)

    def table_of(self, side: Side, places: Sequence[int], like: Tensor) -> Tensor:
        """Remembered distributions of some pairs, ``[answer token, vocabulary]``; without rows where there are none."""
        tables = [side.table[place] for place in places if place in side.table]
        return torch.cat(tables).to(like.device) if tables else like.new_zeros(0, like.shape[-1])
