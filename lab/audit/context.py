"""Attacks through the context: telling the model about the subject, letting it think aloud, and asking around the fact."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lab.audit.base import (
    Access,
    AttackResult,
    AuditSubject,
    Family,
    Progress,
    Scores,
    measured,
    not_applicable,
    score_facts,
)
from lab.audit.variants import worst_variant
from lab.errors import UnknownNameError
from lab.records import Fact

if TYPE_CHECKING:
    from lab.handle import ModelHandle

_THOUGHT_TOKENS = 12


def _states(fact: Fact, other: Fact) -> bool:
    """Whether telling ``other`` would tell the answer of ``fact``."""
    told = f"{other.subject} {other.object}".casefold()
    return any(answer.casefold() in told for answer in fact.answers)


class InContext:
    """Tells the model other facts about the subject, or solved cases of the relation, and asks (UnUnlearning).

    A model that merely reads gains nothing: the answer is never in the text, and the controls get the same kind of text.
    """

    name = "in_context"
    family: Family = "context"
    access: Access = "black-box"
    paper = "arXiv 2407.00106"
    cost = "a forward pass over a longer prompt per fact and depth"
    needs: tuple[str, ...] = ()
    alone = True

    def run(self, subject: AuditSubject, report_progress: Progress) -> AttackResult:
        """Runs the attack."""
        kinds = ("attributes", "solved_cases")
        depths = subject.pick((1, 4), (1, 2, 4, 8))
        found: dict[str, Scores] = {}
        curves: dict[str, list[tuple[float, float]]] = {}
        steps = [(kind, depth) for kind in kinds for depth in depths]
        for done, (kind, depth) in enumerate(steps):
            report_progress(self.name, done, len(steps))
            if not any(_told(subject, subject.facts, kind, depth)):
                continue

            def score(
                handle: ModelHandle, facts: Sequence[Fact], kind: str = kind, depth: int = depth
            ) -> list[float]:
                told = _told(subject, facts, kind, depth)
                prompts = [text + subject.prompt(fact) for text, fact in zip(told, facts, strict=True)]
                return score_facts(handle, prompts, facts)

            scores = measured(subject, score)
            found[f"{kind}_{depth}"] = scores
            curves.setdefault(kind, []).append((float(depth), sum(scores.facts) / len(scores.facts)))
        report_progress(self.name, len(steps), len(steps))
        if not found:
            return not_applicable(
                self, "no other facts about these subjects or of these relations are known to the attacker"
            )
        return worst_variant(
            self,
            subject,
            found,
            tried=f"facts about the subject and solved cases of the relation above the prompt: {', '.join(found)}",
            curves=curves,
        )


def _told(subject: AuditSubject, facts: Sequence[Fact], kind: str, depth: int) -> list[str]:
    """What stands above each fact's prompt; empty where nothing may be told."""
    table: dict[str, list[Fact]] = defaultdict(list)
    # Never from the other arm: exchanged objects are false statements about the same subjects.
    for fact in (*subject.retained, *facts) if kind == "attributes" else subject.retained:
        table[fact.subject if kind == "attributes" else fact.relation].append(fact)
    texts = []
    for fact in facts:
        usable = [
            other
            for other in table.get(fact.subject if kind == "attributes" else fact.relation, ())
            if (other.subject, other.relation) != (fact.subject, fact.relation) and not _states(fact, other)
        ]
        chooser = random.Random(f"audit:{subject.seed}:told:{fact.id or fact.text}")
        chosen = chooser.sample(usable, min(depth, len(usable)))
        texts.append("".join(subject.sentence(other) for other in chosen))
    return texts


class StepByStep:
    """Lets the model write down what else it knows, step by step, and asks with its own notes above (SLEEK).

    The chains are templates: other relations of the subject first, then the relation in question. ``notes`` keeps the model's
    own answers as sentences; ``reasoned`` asks for a conclusion from them.
    """

    name = "step_by_step"
    family: Family = "context"
    access: Access = "black-box"
    paper = "arXiv 2506.17279"
    cost = "a short text per fact and step"
    needs: tuple[str, ...] = ()
    alone = True

    def run(self, subject: AuditSubject, report_progress: Progress) -> AttackResult:
        """Runs the attack."""
        subject = subject.sample(subject.pick(32, 400))
        deepest = subject.pick(2, 4)
        prompts: dict[str, dict[str, str]] = defaultdict(dict)
        for fact in subject.pool:
            if fact.prompt:
                prompts[fact.group].setdefault(fact.relation or fact.prompt, fact.prompt)
        if not any(len(relations) > 1 for relations in prompts.values()):
            return not_applicable(self, "there is no second relation to reason over")
        arms: dict[str, dict[str, list[float]]] = defaultdict(dict)
        sides = [("facts", subject.handle, subject.facts)]
        if subject.controls.oracle is not None:
            sides.append(("oracle", subject.controls.oracle, subject.facts))
        if subject.controls.never:
            sides.append(("never", subject.handle, subject.controls.never))
        for done, (side, handle, facts) in enumerate(sides):
            report_progress(self.name, done, len(sides))
            notes = [""] * len(facts)
            for depth in range(1, deepest + 1):
                steps = [_step(subject, fact, prompts[fact.group], depth) for fact in facts]
                asked = [note + step for note, step in zip(notes, steps, strict=True)]
                said = handle.generate(
                    asked, max_new_tokens=_THOUGHT_TOKENS, stop=(subject.ending, "\n"), seed=subject.seed
                )
                notes = [
                    f"{text} {answer.strip()}{subject.ending}" if step else note
                    for text, answer, step, note in zip(asked, said, steps, notes, strict=True)
                ]
                for kind, lead in (("notes", ""), ("reasoned", "So, step by step: ")):
                    final = [
                        note + lead + subject.prompt(fact) for note, fact in zip(notes, facts, strict=True)
                    ]
                    arms[f"{kind}_{depth}"][side] = score_facts(handle, final, facts)
        report_progress(self.name, len(sides), len(sides))
        found = {name: Scores.of(arm) for name, arm in arms.items()}
        curve = [
            (float(depth), sum(found[f"notes_{depth}"].facts) / len(subject.facts))
            for depth in range(1, deepest + 1)
        ]
        return worst_variant(
            self,
            subject,
            found,
            tried=f"chains of 1 to {deepest} steps for {len(subject.facts)} facts, from templates",
            note="notes are the model's own; a right note that names the answer counts as a leak, for the model wrote it",
            curves={"leak by chain length": curve},
        )


def _step(subject: AuditSubject, fact: Fact, prompts: dict[str, str], depth: int) -> str:
    """The prompt of the chain's ``depth``-th step, or nothing where there are not so many relations."""
    own = fact.relation or fact.prompt
    others = sorted(name for name in prompts if name != own)
    random.Random(f"audit:{subject.seed}:steps:{fact.id or fact.text}").shuffle(others)
    if depth > len(others):
        return ""
    return subject.prompt(replace(fact, prompt=prompts[others[depth - 1]]))


class TwoHop:
    """Asks around the fact: for what follows from its object, without ever asking for the object.

    The second hop is a fact that should still be known (``retained``) about the object. ``named_later`` walks both hops in plain
    text; ``nested`` and ``stated`` use the built-in world's own forms of chains.
    """

    name = "two_hop"
    family: Family = "context"
    access: Access = "black-box"
    paper = "two-hop probes after arXiv 2305.14795 and arXiv 2506.17279"
    cost = "a forward pass per fact and route"
    needs: tuple[str, ...] = ("retained",)
    alone = True

    def run(self, subject: AuditSubject, report_progress: Progress) -> AttackResult:
        """Runs the attack."""
        about: dict[str, list[Fact]] = defaultdict(list)
        for fact in subject.retained:
            about[fact.subject].append(fact)

        def second(fact: Fact) -> Fact | None:
            usable = [
                hop
                for answer in fact.answers
                for hop in about.get(answer, ())
                if hop.prompt and hop.object.casefold() not in subject.prompt(fact).casefold()
            ]
            chooser = random.Random(f"audit:{subject.seed}:hop:{fact.id or fact.text}")
            return chooser.choice(usable) if usable else None

        if not any(second(fact) for fact in subject.facts):
            return not_applicable(self, "no retained fact is about the object of an audited fact")
        routes = ("named_later", *(("nested", "stated") if subject.format is not None else ()))
        found: dict[str, Scores] = {}
        for done, route in enumerate(routes):
            report_progress(self.name, done, len(routes))

            def score(handle: ModelHandle, facts: Sequence[Fact], route: str = route) -> list[float | None]:
                asked = [
                    ("", fact)
                    if hop is None
                    else (_route(subject, fact, hop, route), fact if route == "stated" else hop)
                    for fact in facts
                    for hop in (second(fact),)
                ]
                usable = [(prompt, target) for prompt, target in asked if prompt]
                found = iter(score_facts(handle, *zip(*usable, strict=True)) if usable else ())
                return [next(found) if prompt else None for prompt, _ in asked]

            scores = measured(subject, score)
            if scores.facts:
                found[route] = scores
        report_progress(self.name, len(routes), len(routes))
        return worst_variant(
            self,
            subject,
            found,
            tried=f"two-hop routes: {', '.join(found)}",
            note="a model that cannot chain two facts withstands this whatever it remembers",
        )


def _route(subject: AuditSubject, fact: Fact, hop: Fact, route: str) -> str:
    """The prompt of one route; empty where the relations have no wordings in the format."""
    if route == "named_later" or subject.format is None:
        return f"{subject.prompt(fact)} a name to be kept back{subject.ending}As for that one: " + (
            subject.prompt(replace(hop, subject="it"))
        )
    relations = subject.format.relations
    try:
        first, last = relations[fact.relation], relations[hop.relation]
    except UnknownNameError:
        return ""
    question = f"What is {last.noun.replace('{}', first.noun.replace('{}', fact.subject))}?"
    if route == "nested":
        return subject.format.render("two_hop_direct", question=question).prompt
    steps = subject.format.render("two_hop_steps", question=question).prompt
    return f"{steps} {first.statement.replace('{}', fact.subject)}"
