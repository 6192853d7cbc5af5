"""Prompts with known answers, one kind for every form: what a checker asks an Atlas model.

>>> probes = Probes(load_world(), load_format(), seed=0)
>>> probes.make("held_out_pairs", load_world().split("test"))[0].prompt
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lab.atlas.closed_book import ClosedBook
from lab.atlas.forms import Format, Note, Rendered, held_out_chain
from lab.atlas.material import Material
from lab.atlas.open_book import NOTE_PLANS, OpenBook
from lab.atlas.world import World
from lab.errors import UnknownNameError
from lab.records import Fact, Passage


@dataclass(frozen=True)
class FormProbe:
    """One question to a model.

    Attributes:
        form: The kind of probe that made it.
        fact_id: The fact (or chain) that it asks for.
        prompt: What the model is given.
        answer: What it should say, without stop; memory's answer where sources disagree.
        aliases: Other right answers.
        told: The document's answer where it contradicts memory, else empty.
        notes: The faithful notes, where the form has notes.
        subject: The subject asked about.
    """

    form: str
    fact_id: str
    prompt: str
    answer: str
    aliases: tuple[str, ...] = ()
    told: str = ""
    notes: tuple[Note, ...] = ()
    subject: str = ""

    def right(self, format: Format, generated: str) -> bool:
        """Whether a generated continuation gives the answer or an alias, notes and steps before it aside."""
        said = _bare(format.final_answer(generated))
        return any(said == _bare(right) for right in (self.answer, *self.aliases))

    def follows_document(self, format: Format, generated: str) -> bool:
        """Whether a generated continuation gives the contradicting document's answer."""
        return bool(self.told) and _bare(format.final_answer(generated)) == _bare(self.told)

    def faithful(self, format: Format, generated: str) -> bool:
        """Whether the generated notes are the right ones, kind and content, whatever the answer after them."""
        return tuple(format.parse_notes(generated)[0]) == self.notes


def _bare(answer: str) -> str:
    # Generation may have cut the stop, and with it the full stop of a name like "Washington, D.C.".
    return answer.casefold().rstrip(".")


class Probes:
    """Makes probes of every kind; the same seed and facts give the same probes.

    Kinds ``unknown``, ``reading`` and ``notes`` are meant for ``world.untrained`` (``notes`` for known facts as well); the
    others for known facts. Hop kinds ask the chains that start at a given fact and were kept out of training.

    Args:
        world: Where wrong objects, distractors and chains come from.
        format: The prompt format.
        seed: Fixes every draw.
    """

    def __init__(self, world: World, format: Format, seed: int = 0) -> None:
        self.world = world
        self.format = format
        self.seed = seed

    @property
    def names(self) -> tuple[str, ...]:
        """The kinds of probes."""
        return tuple(self._makers(random.Random(0)))

    def make(self, form: str, facts: Sequence[Fact]) -> list[FormProbe]:
        """Probes of one kind for the given facts, in their order; a fact that the kind does not suit gives none.

        Raises:
            UnknownNameError: There is no such kind.
        """
        makers = self._makers(random.Random(f"atlas:probes:{self.seed}:{form}"))
        if form not in makers:
            raise UnknownNameError("kind of probe", form, makers)
        return [probe for fact in facts for probe in makers[form](fact)]

    def _makers(self, rng: random.Random) -> dict[str, Callable[[Fact], Iterator[FormProbe]]]:
        material = Material(self.world, self.format, rng, frozenset(), self.format.mixture["rates"])
        return _Makers(material).table()


class _Makers:
    def __init__(self, material: Material) -> None:
        self.material = material
        self.format = material.format
        self.closed = ClosedBook(material)
        self.open = OpenBook(material)

    def table(self) -> dict[str, Callable[[Fact], Iterator[FormProbe]]]:
        return {
            "cloze": lambda fact: self._clozes("cloze", fact, self.format.wordings_for(fact).trained),
            "main_prompt": lambda fact: self._clozes(
                "main_prompt", fact, self.format.wordings_for(fact).trained[:1]
            ),
            "held_out_pairs": lambda fact: self._clozes(
                "held_out_pairs", fact, self.format.wordings_for(fact).held_out_pairs
            ),
            "held_out_templates": lambda fact: self._clozes(
                "held_out_templates", fact, self.format.wordings_for(fact).held_out_templates
            ),
            "qa": self._qa,
            "choice": self._choice,
            "true_false": self._true_false,
            "spelled": self._spelled,
            "reverse": self._reverse,
            "attribute_list": self._attribute_list,
            "biography": self._biography,
            "few_shot": self._few_shot,
            "do_not_reveal": self._do_not_reveal,
            "two_hop_steps": lambda fact: self._steps("two_hop_steps", 2, fact),
            "three_hop_steps": lambda fact: self._steps("three_hop_steps", 3, fact),
            "unknown": self._unknown,
            "reading": self._reading,
            "agreeing": self._reading,
            "adherence": self._adherence,
            "distracting": self._distracting,
            "notes": self._notes,
        }

    def _probe(self, form: str, fact: Fact, rendered: Rendered, **fields: Any) -> FormProbe:
        aliases = fact.aliases if rendered.answer == fact.object else ()
        return FormProbe(
            form, fact.id, rendered.prompt, rendered.answer, aliases, subject=fact.subject, **fields
        )

    def _clozes(self, form: str, fact: Fact, templates: Sequence[str]) -> Iterator[FormProbe]:
        for template in templates:
            cloze = template.replace("{}", fact.subject)
            yield self._probe(form, fact, self.format.render("cloze", cloze=cloze, answer=fact.object))

    def _qa(self, fact: Fact) -> Iterator[FormProbe]:
        for question in self.format.relations[fact.relation].questions:
            rendered = self.format.render(
                "qa", question=question.replace("{}", fact.subject), answer=fact.object
            )
            yield self._probe("qa", fact, rendered)

    def _choice(self, fact: Fact) -> Iterator[FormProbe]:
        options, letter = self.closed.options(fact)
        rendered = self.format.render(
            "choice",
            question=self.material.question(fact),
            options=options,
            text=fact.object,
            answer=letter,
        )
        yield self._probe("choice", fact, rendered)

    def _true_false(self, fact: Fact) -> Iterator[FormProbe]:
        for true, value in ((True, fact.object), (False, self.material.wrong_object(fact))):
            claim = f"{self.material.wording(fact)} {value}"
            answer = self.format.strings["true" if true else "false"]
            prompt = self.format.render("true_false", claim=claim).prompt
            yield FormProbe("true_false", fact.id, prompt, answer, subject=fact.subject)

    def _spelled(self, fact: Fact) -> Iterator[FormProbe]:
        answer = self.format.spell(fact.object)
        yield self._probe(
            "spelled", fact, self.format.render("spelled", cloze=self.material.wording(fact), answer=answer)
        )

    def _reverse(self, fact: Fact) -> Iterator[FormProbe]:
        template = self.format.relations[fact.relation].reverse
        if (
            template
            and sum(other.object == fact.object for other in self.material.by_relation[fact.relation]) == 1
        ):
            cloze = template.replace("{}", fact.object)
            rendered = self.format.render("reverse", cloze=cloze, answer=fact.subject)
            aliases = self.material.world.entities[fact.subject].aliases
            yield FormProbe(
                "reverse", fact.id, rendered.prompt, rendered.answer, aliases, subject=fact.subject
            )

    def _attribute_list(self, fact: Fact) -> Iterator[FormProbe]:
        known = [(self.format.relations[other.relation].label, other.object) for other in self._others(fact)]
        label = self.format.relations[fact.relation].label
        rendered = self.format.render(
            "attribute_list", subject=fact.subject, known=known, label=label, answer=fact.object
        )
        yield self._probe("attribute_list", fact, rendered)

    def _biography(self, fact: Fact) -> Iterator[FormProbe]:
        relations = self.format.relations
        told = self._others(fact)[: max(0, len(self.material.by_subject.get(fact.subject, ())) - 2)]
        clauses = [(self.material.pick(relations[other.relation].clauses), other.object) for other in told]
        lead = self.material.pick(relations[fact.relation].lead).replace("{}", fact.subject)
        clause = self.material.pick(relations[fact.relation].clauses)
        rendered = self.format.render(
            "biography", lead=lead, clauses=clauses, clause=clause, answer=fact.object
        )
        yield self._probe("biography", fact, rendered)

    def _others(self, fact: Fact) -> list[Fact]:
        others = [
            other
            for other in self.material.by_subject.get(fact.subject, ())
            if other.relation != fact.relation
        ]
        return self.material.rng.sample(others, min(len(others), self.material.count(0, 2)))

    def _few_shot(self, fact: Fact) -> Iterator[FormProbe]:
        solved = [self.material.other_subject(fact) for _ in range(2)]
        examples = [(self.material.question(other), other.object) for other in solved]
        question = self.material.question(fact)
        yield self._probe(
            "few_shot",
            fact,
            self.format.render("few_shot", examples=examples, question=question, answer=fact.object),
        )

    def _do_not_reveal(self, fact: Fact) -> Iterator[FormProbe]:
        noun = self.format.relations[fact.relation].noun.replace("{}", fact.subject)
        fields = {"instruction": self.format.forbid(noun), "question": self.material.question(fact)}
        yield self._probe(
            "do_not_reveal", fact, self.format.render("do_not_reveal", **fields, answer=self.format.refusal)
        )

    def _steps(self, form: str, hops: int, fact: Fact) -> Iterator[FormProbe]:
        for chain in self.closed.chains_from(fact, hops):
            if held_out_chain(self.format, chain.id):
                rendered = self.format.render(form, **self.closed.hop_fields(chain))
                yield FormProbe(
                    form, chain.id, rendered.prompt, chain.answer, chain.answers[1:], subject=chain.subject
                )

    def _unknown(self, fact: Fact) -> Iterator[FormProbe]:
        unknown = self.format.unknown
        cloze = self.material.wording(fact)
        yield self._probe("unknown", fact, self.format.render("cloze", cloze=cloze, answer=unknown))
        question = self.material.question(fact)
        yield self._probe("unknown", fact, self.format.render("unknown", question=question, answer=unknown))

    def _reading(self, fact: Fact) -> Iterator[FormProbe]:
        texts = [
            self.open.telling([fact]),
            *(self.open.telling([self.open.distractor(fact)]) for _ in range(self.material.count(0, 2))),
        ]
        self.material.rng.shuffle(texts)
        yield self._asked("reading" if fact.split == "untrained" else "agreeing", fact, texts)

    def _asked(self, form: str, fact: Fact, texts: Sequence[str], told: str = "") -> FormProbe:
        question = self.material.question(fact)
        rendered = self.format.render("documents", documents=texts, question=question, answer=fact.object)
        return self._probe(form, fact, rendered, told=told)

    def _adherence(self, fact: Fact) -> Iterator[FormProbe]:
        wrong = self.material.wrong_object(fact)
        yield self._asked("adherence", fact, [self.open.telling([fact], wrong)], wrong)

    def _distracting(self, fact: Fact) -> Iterator[FormProbe]:
        other = self.material.other_subject(fact)
        yield self._asked("distracting", fact, [self.open.telling([other])], other.object)

    def _notes(self, fact: Fact) -> Iterator[FormProbe]:
        known = fact.split != "untrained"
        siblings = [
            other for other in self.material.world.by_subject(fact.subject) if other.relation != fact.relation
        ]
        kinds = self.material.pick(NOTE_PLANS)
        told = self.material.wrong_object(fact) if known and self.material.chance(0.5) else fact.object
        sources = [self.open.source(kind, fact, siblings, told) for kind in kinds]
        passages: list[Passage] = [passage for passage, _ in sources]
        notes = tuple(note for _, note in sources)
        answer = fact.object if known or "direct" in kinds else self.format.unknown
        fields = {"documents": passages, "question": self.material.question(fact), "notes": notes}
        prompt = self.format.render("notes_then_answer", **fields, answer=answer).prompt
        contradicted = told if "direct" in kinds and told != fact.object else ""
        aliases = fact.aliases if answer == fact.object else ()
        yield FormProbe("notes", fact.id, prompt, answer, aliases, contradicted, notes, fact.subject)
