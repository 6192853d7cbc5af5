"""Drawing cases: in seeded order, without what the model or the method cannot take, each left-out row with its reason."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

from lab.data.cases import CaseSet, EditCase, Skip
from lab.errors import RequestError
from lab.eval.probe import Observation, Probe
from lab.eval.suite import Suite
from lab.handle import ModelHandle
from lab.tokens import encode_ids, subject_span

KNOWN = "known"
_LOOK_AHEAD = 64


def taught_cases(handle: ModelHandle, cases: CaseSet) -> frozenset[str] | None:
    """Ids of the cases that a bed was taught; ``None`` for any other model, and for a file that it was not made from."""
    from lab.atlas.bed import known_cases

    return None if handle.folder is None else known_cases(handle.folder, cases.source)


class Draw:
    """Cases in seeded order.

    Args:
        suite: Says what will be asked, and so what has to fit into the model's context.
        handle: The model.
        cases: What to draw from.
        seed: Orders the cases; ``None`` keeps their order.
        unique: At most one case per subject.
        known_only: Only cases whose old answer is the model's greedy answer.
        taught: Ids of the cases that the model was taught, where that is written down; what it answers of others is luck.
        ask: Asks the unedited model.

    Attributes:
        skipped: Cases left out so far, each with its reason.
        passed_over: Cases left out because their subject was taken.
        heavy: Whether the suite keeps whole distributions.
        too_long: Prompts taken out of cases because they do not fit into the context.
    """

    def __init__(
        self,
        suite: Suite,
        handle: ModelHandle,
        cases: Sequence[EditCase],
        *,
        seed: int | None,
        unique: bool,
        known_only: bool,
        ask: Callable[[Sequence[Probe]], list[Observation]],
        taught: Collection[str] | None = None,
    ) -> None:
        self.taught = taught
        self.suite, self.handle, self.known_only = suite, handle, known_only
        self.skipped: list[Skip] = []
        self.passed_over = 0
        self.too_long = 0
        self._ask = ask
        self._unique = unique
        self._subjects: set[str] = set()
        first = next((case for case in cases if not case.unsupported), None)
        self.heavy = first is not None and any(probe.distribution for probe in suite.probes(first))
        order = list(cases)
        if seed is not None:
            random.Random(seed).shuffle(order)
        self._order = iter(order)

    def take(self, count: int) -> list[EditCase]:
        """The next ``count`` cases that can be tried; fewer when the source runs dry."""
        found: list[EditCase] = []
        while len(found) < count:
            fresh = list(self._candidates(count - len(found) if not self.known_only else _LOOK_AHEAD))
            if not fresh:
                break
            if self.known_only:
                keep = [case for case, known in zip(fresh, self.known(fresh), strict=True) if known]
                for case in (case for case in fresh if case not in keep):
                    self._subjects -= set(case.subjects)
                # What this round does not need goes back, or a shorter run would not be the beginning of a longer one.
                keep, rest = keep[: count - len(found)], keep[count - len(found) :]
                self._give_back(rest)
                found += keep
            else:
                found += fresh
        return found

    def _give_back(self, cases: Sequence[EditCase]) -> None:
        for case in cases:
            self._subjects -= set(case.subjects)
        remaining = self._order
        self._order = iter([*cases, *remaining])

    def _candidates(self, count: int) -> Iterator[EditCase]:
        found = 0
        for case in self._order:
            reason = case.unsupported or self._obstacle(case)
            if reason:
                self.skip(case, reason)
                continue
            if self._unique and self._subjects & set(case.subjects):
                self.passed_over += 1
                continue
            fitted = self._fitted(case)
            if fitted is None:
                self.skip(case, "its prompt is longer than the model's context")
                continue
            self._subjects |= set(case.subjects)
            found += 1
            yield fitted
            if found == count:
                return

    def _obstacle(self, case: EditCase) -> str:
        """Why this model cannot take a case, found out before any time is spent on it."""
        tokenizer = self.handle.tokenizer
        for request in case.requests:
            try:
                start = request.prompt.find("{}")
                subject_span(tokenizer, request.text, request.subject, start=start)
            except RequestError as error:
                return str(error)
        return ""

    def _fitted(self, case: EditCase) -> EditCase | None:
        """The case without the prompts that do not fit into the model's context; ``None`` where an edit itself does not."""
        longest = getattr(self.handle.config, "max_position_embeddings", None)
        if not isinstance(longest, int):
            return case
        long = [probe.prompt for probe in self.suite.probes(case) if self._tokens(probe, longest) > longest]
        if not long:
            return case
        if any(
            request.text in long or self._count(request.text, longest) > longest for request in case.requests
        ):
            return None
        # A prompt asked after the edited statement ends in the case's own prompt.
        kept = tuple(p for p in case.probes if not any(text.endswith(p.prompt) for text in long))
        self.too_long += len(case.probes) - len(kept)
        return replace(case, probes=kept)

    def _tokens(self, probe: Probe, longest: int) -> int:
        texts = (
            [f"{probe.prompt} {target}" for target in probe.targets]
            if probe.task == "score"
            else [probe.prompt]
        )
        more = 0 if probe.task == "score" or probe.whole else probe.tokens
        return more + max((self._count(text, longest - more) for text in texts), default=0)

    def _count(self, text: str, longest: int) -> int:
        # A token stands for one byte at least, so most texts need no counting.
        bound = len(text.encode()) + 1
        return bound if bound <= longest else len(encode_ids(self.handle.tokenizer, text))

    def known(self, cases: Sequence[EditCase]) -> list[bool | None]:
        """Per case, whether it was taught and every old answer (or an alias) is the greedy one; ``None`` where the file gives none."""
        asked: list[list[Probe]] = []
        for case in cases:
            pairs = zip(case.requests, case.old_answers, strict=True)
            asked.append(
                [Probe(f"{KNOWN}/{i}", KNOWN, r.text, answers=old) for i, (r, old) in enumerate(pairs) if old]
            )
        flat = iter(self._ask([probe for probes in asked for probe in probes]))
        found: list[bool | None] = []
        for case, probes in zip(cases, asked, strict=True):
            seen = [next(flat) for _ in probes]
            right = [any(rating.all_correct for rating in observation.ratings) for observation in seen]
            taught = self.taught is None or case.id in self.taught
            found.append(all(right) and taught if len(right) == len(case.requests) else None)
        return found

    def skip(self, case: EditCase, reason: str) -> None:
        """Leaves a case out."""
        self.skipped.append(Skip(case.file, case.line, reason, case.id))
