"""The plain evaluation of single edits: one patch at a time, one group of prompts at a time, before and after every edit.

Nothing is shared: the unedited model is asked again for every case, every row is scored over its whole length, every text is
written alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from lab.data.cases import EditCase
from lab.eval.probe import Observation, Probe, Rating
from lab.eval.suite import Suite, Values
from lab.handle import ModelHandle
from lab.patch import WeightPatch
from lab.tokens import encode_ids, join_target


@torch.no_grad()
def plain_ratings(handle: ModelHandle, probes: Sequence[Probe]) -> list[Observation]:
    """Rates all targets of one group of probes in one pass over padded rows."""
    rows = [
        join_target(handle.tokenizer, probe.prompt, target) for probe in probes for target in probe.targets
    ]
    width = max(len(head) + len(tail) for head, tail in rows)
    ids = torch.full((len(rows), width), handle.pad_id)
    mask = torch.zeros_like(ids)
    for number, (head, tail) in enumerate(rows):
        ids[number, : len(head) + len(tail)] = torch.tensor([*head, *tail])
        mask[number, : len(head) + len(tail)] = 1
    logits = handle.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    table = torch.log_softmax(logits, dim=-1)
    ratings = []
    for number, (head, tail) in enumerate(rows):
        places = table[number, len(head) - 1 : len(head) + len(tail) - 1]
        predicted = places.argmax(-1).tolist()
        scores = [float(places[step, token]) for step, token in enumerate(tail)]
        correct = [said == token for said, token in zip(predicted, tail, strict=True)]
        ratings.append(Rating(tuple(scores), tuple(correct), tuple(predicted)))
    found = iter(ratings)
    return [Observation(probe.id, ratings=tuple(next(found) for _ in probe.targets)) for probe in probes]


def plain_text(handle: ModelHandle, probe: Probe) -> Observation:
    """Writes one text."""
    ids = encode_ids(handle.tokenizer, probe.prompt)
    length = max(1, probe.tokens - len(ids)) if probe.whole else probe.tokens
    temperature = 0.0 if probe.top_k is None else 1.0
    (text,) = handle.generate(
        [probe.prompt], max_new_tokens=length, temperature=temperature, top_k=probe.top_k, seed=probe.seed
    )
    return Observation(
        probe.id, text=text, text_tokens=tuple(encode_ids(handle.tokenizer, text, special=False))
    )


def plain_answers(handle: ModelHandle, probes: Sequence[Probe]) -> dict[str, Observation]:
    """Answers of the model as it stands, group by group."""
    found: list[Observation] = []
    for _, members in groupby(probes, key=lambda probe: probe.group):
        group = list(members)
        if group[0].task == "generate":
            found += [plain_text(handle, probe) for probe in group]
        else:
            found += plain_ratings(handle, group)
    return {answer.probe_id: answer for answer in found}


def plain_single_edits(
    handle: ModelHandle, suite: Suite, cases: Sequence[EditCase], patches: Sequence[WeightPatch]
) -> list[Values]:
    """The values of each case under its own patch."""
    values = []
    for case, patch in zip(cases, patches, strict=True):
        probes = suite.probes(case)
        before = plain_answers(handle, probes)
        with patch.applied(handle):
            after = plain_answers(handle, probes)
        values.append(suite.values(case, after, before))
    return values
