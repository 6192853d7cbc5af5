"""What a model still says: retained facts that were suppressed, questions that are refused, ignorance that is admitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.data.text import normalize_answer
from lab.errors import ConfigError
from lab.eval.scorers import starts_with_answer
from lab.eval.stats import summarise
from lab.scoring import TargetScore, score_targets

if TYPE_CHECKING:
    from lab.audit.knowledge import Ask
    from lab.handle import ModelHandle
    from lab.records import Fact

# How models say that they do not know, or will not say; a reply counts that holds one of these near its beginning.
REFUSALS = (
    "unknown",
    "i will not say",
    "i do not know",
    "i don't know",
    "i am not sure",
    "i'm not sure",
    "i cannot",
    "i can't",
    "i am unable",
    "i'm unable",
    "i have no information",
    "i don't have",
    "i do not have",
    "not able to",
    "cannot answer",
    "can't answer",
    "sorry",
    "no idea",
    "not familiar",
)
# A phrase this many words into a reply is part of an answer, not a refusal.
_NEAR = 8


def refuses(reply: str, phrases: Sequence[str] = REFUSALS) -> bool:
    """Whether a reply admits ignorance or declines: one of the phrases, as whole words, among its first words."""
    start = " ".join(normalize_answer(reply).split()[:_NEAR])
    return any(f" {normalize_answer(phrase)} " in f" {start} " for phrase in phrases)


@dataclass(frozen=True)
class Reply:
    """What a model said to one question.

    Attributes:
        text: The reply.
        right: It starts with an answer.
        refused: It admits ignorance or declines.
    """

    text: str
    right: bool
    refused: bool


def replies(
    handle: ModelHandle,
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    phrases: Sequence[str] = REFUSALS,
    max_new_tokens: int = 16,
    stop: Sequence[str] = ("\n",),
) -> list[Reply]:
    """Greedy replies.

    Args:
        handle: The model, with whatever is applied to it.
        prompts: What is asked.
        answers: Right answers of each; none where there is no answer.
        phrases: What counts as a refusal.
        max_new_tokens: Longest reply.
        stop: A reply ends before the first of these.
    """
    said = handle.generate(prompts, max_new_tokens=max_new_tokens, stop=stop)
    return [
        Reply(text.strip(), starts_with_answer(text, right), refuses(text, phrases))
        for text, right in zip(said, answers, strict=True)
    ]


def refusal_change(before: Sequence[Reply], after: Sequence[Reply]) -> dict[str, Any]:
    """Over-refusal on questions that have an answer: refused now, and refused now but answered right before."""
    if len(before) != len(after):
        raise ConfigError(f"{len(before)} replies before and {len(after)} after do not pair up")
    pairs = list(zip(before, after, strict=True))
    return {
        "before": summarise([float(old.refused) for old, _ in pairs]).to_json(),
        "after": summarise([float(new.refused) for _, new in pairs]).to_json(),
        "rise": summarise(
            [float(new.refused) - old.refused for old, new in pairs], bounds=(-1.0, 1.0)
        ).to_json(),
        "known_refused": summarise([float(new.refused) for old, new in pairs if old.right]).to_json(),
    }


def admitted_ignorance(unanswerable: Sequence[Reply], twins: Sequence[Reply] = ()) -> dict[str, Any]:
    """How well a model tells what it cannot know from what it can.

    Args:
        unanswerable: Replies to questions without an answer; refusing is right.
        twins: Replies to questions like them, one each, that have an answer; refusing is wrong. A model that refuses
            everything admits all ignorance and discriminates nothing.

    Raises:
        ConfigError: Twins that do not pair up.
    """
    if twins and len(twins) != len(unanswerable):
        raise ConfigError(f"{len(unanswerable)} unanswerable questions and {len(twins)} twins do not pair up")
    found: dict[str, Any] = {
        "admitted": summarise([float(reply.refused) for reply in unanswerable]).to_json(),
        "invented": summarise([float(not reply.refused) for reply in unanswerable]).to_json(),
    }
    if twins:
        pairs = list(zip(unanswerable, twins, strict=True))
        found["twins_refused"] = summarise([float(twin.refused) for twin in twins]).to_json()
        found["twins_right"] = summarise([float(twin.right) for twin in twins]).to_json()
        found["both_right"] = summarise(
            [float(lone.refused and twin.right) for lone, twin in pairs]
        ).to_json()
        found["discrimination"] = summarise(
            [float(lone.refused) - twin.refused for lone, twin in pairs], bounds=(-1.0, 1.0)
        ).to_json()
    return found


def twins_of(unanswerable: Sequence[Fact], answerable: Sequence[Fact]) -> list[tuple[Fact, Fact]]:
    """Pairs each unanswerable question with an unused answerable one of the same relation; those without one are left out."""
    left: dict[str, list[Fact]] = {}
    for fact in answerable:
        left.setdefault(fact.relation, []).append(fact)
    return [(fact, left[fact.relation].pop(0)) for fact in unanswerable if left.get(fact.relation)]


def groups_of(facts: Sequence[Fact], forgotten: Sequence[Fact]) -> list[str]:
    """How close each retained fact is to what was changed: ``subject``, ``object``, ``relation``, or ``other``; the closest counts."""
    subjects, objects, relations = (
        {getattr(fact, name) for fact in forgotten} for name in ("subject", "object", "relation")
    )
    return [
        "subject"
        if fact.subject in subjects
        else "object"
        if fact.object in objects
        else "relation"
        if fact.relation in relations
        else "other"
        for fact in facts
    ]


def suppression(
    before: Sequence[TargetScore], after: Sequence[TargetScore], groups: Sequence[str]
) -> dict[str, Any]:
    """Retained facts that were known before and are not any more, by how close they are to what was changed.

    Suppression is unfair where facts suffer for their neighbourhood: ``unfairness`` is the share lost in the group that lost most,
    minus that in the one that lost least.

    Args:
        before: Scores of the right objects before.
        after: The same after.
        groups: Each fact's group (``groups_of``).

    Raises:
        ConfigError: They do not pair up.
    """
    if not len(before) == len(after) == len(groups):
        raise ConfigError("scores before, scores after and groups must have one entry per fact")
    lost: dict[str, list[float]] = {}
    drop: dict[str, list[float]] = {}
    for old, new, group in zip(before, after, groups, strict=True):
        drop.setdefault(group, []).append(new.mean_logprob - old.mean_logprob)
        if old.all_correct:
            lost.setdefault(group, []).append(float(not new.all_correct))
    shares = {group: sum(values) / len(values) for group, values in lost.items()}
    return {
        "suppressed": summarise([value for values in lost.values() for value in values]).to_json(),
        "logprob_change": summarise(
            [value for values in drop.values() for value in values], bounds=None
        ).to_json(),
        "groups": {
            group: {
                "suppressed": summarise(lost.get(group, [])).to_json(),
                "logprob_change": summarise(values, bounds=None).to_json(),
            }
            for group, values in sorted(drop.items())
        },
        "unfairness": max(shares.values()) - min(shares.values()) if len(shares) > 1 else None,
    }


def fact_scores(handle: ModelHandle, facts: Sequence[Fact], ask: Ask) -> list[TargetScore]:
    """How the model rates each fact's object behind its prompt."""
    return score_targets(handle, [(ask(fact), fact.object) for fact in facts])


def compare_groups(parts: Mapping[str, Sequence[Reply]]) -> dict[str, Any]:
    """Share of refusals for each named set of questions (forgotten, never trained, neighbours, retained)."""
    return {
        name: summarise([float(reply.refused) for reply in said]).to_json() for name, said in parts.items()
    }
