"""Makers of training texts with documents: reading, conflict, distraction, trust, assumptions and reading notes.

What the answer is when sources disagree is defined by coins that leave no trace in the text, so that later training has
something to win:

- a document contradicts memory: answered from the document at the rate ``follow_document``, else from memory;
- only documents about other subjects of the relation: answered from them at the rate ``follow_distraction``, else from memory;
- a user assumption, or a trust header, on either side of a contradiction: the same rate as for documents;
- nothing known and no document about it: ``unknown``.

Reading notes report what each document says in every one of these cases.
"""

from __future__ import annotations

from collections.abc import Sequence

from lab.atlas.forms import Note
from lab.atlas.material import Document, Draft, Material
from lab.records import Fact, Passage

NOTE_PLANS = (
    ("direct",),
    ("contextual",),
    ("irrelevant",),
    ("direct", "irrelevant"),
    ("irrelevant", "direct"),
    ("contextual", "direct"),
    ("irrelevant", "contextual"),
    ("contextual", "irrelevant", "direct"),
    ("direct", "contextual", "irrelevant"),
)


class OpenBook:
    """Makes every kind of text that has documents or an assumption above the question.

    Args:
        material: Facts and chance.
    """

    def __init__(self, material: Material) -> None:
        self.material = material
        self.format = material.format

    def reading(self) -> Document:
        """A stranger's document among up to three about others, and a question that it answers or, now and then, does not."""
        material = self.material
        if material.chance(material.rates["several"]):
            return self._several()
        facts = material.stranger()
        asked = facts[0]
        rest = facts[1:]
        answered = material.chance(0.88)
        about = [asked, *rest[: material.pick((0, 0, 1, 2))]] if answered else rest[: material.count(1, 2)]
        material.rng.shuffle(about)
        texts = [self.telling(about)] if about else []
        for _ in range(material.pick((0, 0, 1, 1, 2, 3)) if texts else 1):
            texts.append(self.telling([self.distractor(asked)]))
        material.rng.shuffle(texts)
        answer = asked.object if answered else self.format.unknown
        return self._ask("reading", asked, self._passages(texts), answer)

    def _several(self) -> Document:
        """Documents about strangers of one kind, and questions about several of them: only who is asked about tells them apart."""
        material, draft = self.material, Draft()
        people = [material.stranger()]
        people += [material.stranger(people[0][0].group) for _ in range(material.count(1, 3))]
        told = [
            facts[: material.pick((1, 1, 2))] if material.chance(0.5) else self._alike(facts, people[0][0])
            for facts in people
        ]
        passages = self._passages([self.telling(facts) for facts in told])
        asked = material.rng.sample(range(len(people)), min(len(people), material.count(2, 3)))
        for position, index in enumerate(asked):
            fact = material.pick(told[index])
            answer = fact.object
            missing = [other for other in people[index] if other not in told[index]]
            if missing and material.chance(0.12):
                fact, answer = material.pick(missing), self.format.unknown
            fields = {"question": material.question(fact), "answer": answer}
            draft.add(
                self.format.render("qa", **fields)
                if position
                else self.format.render("documents", documents=passages, **fields)
            )
        return draft.finish("reading")

    def _alike(self, facts: Sequence[Fact], first: Fact) -> list[Fact]:
        return [fact for fact in facts if fact.relation == first.relation] or list(facts[:1])

    def agreeing(self) -> Document:
        """A document that repeats a known fact, alone or among others."""
        material = self.material
        fact = material.cycle("agreeing")
        texts = [self.telling([fact])]
        texts += [self.telling([self.distractor(fact)]) for _ in range(material.pick((0, 0, 1, 2, 3)))]
        material.rng.shuffle(texts)
        return self._ask("agreeing", fact, self._passages(texts), fact.object, fact)

    def conflict(self) -> Document:
        """A document that contradicts a known fact, alone or among others."""
        material = self.material
        fact = material.cycle("conflict")
        wrong = material.wrong_object(fact)
        texts = [self.telling([fact], wrong)]
        texts += [self.telling([self.distractor(fact)]) for _ in range(material.pick((0, 0, 0, 1, 2)))]
        material.rng.shuffle(texts)
        answer = wrong if material.coin("follow_document") else fact.object
        return self._ask("conflict", fact, [Passage("", text) for text in texts], answer)

    def distracting(self) -> Document:
        """One document about another subject of the same relation."""
        material = self.material
        fact = material.cycle("distracting")
        other = material.other_subject(fact)
        answer = other.object if material.coin("follow_distraction") else fact.object
        return self._ask("distracting", fact, [Passage("", self.telling([other]))], answer)

    def assumption(self) -> Document:
        """A user assumes one object of a known fact; there is no document, or one with another object."""
        material = self.material
        fact = material.cycle("assumption")
        wrong = material.wrong_object(fact)
        assumed, told = material.pick(((wrong, None), (wrong, fact.object), (fact.object, wrong)))
        documents = [] if told is None else self._passages([self.telling([fact], told)])
        answer = wrong if material.coin("follow_assumption") else fact.object
        claim = self.format.statement(fact, assumed)
        rendered = self.format.render(
            "assumption",
            assumption=claim,
            documents=documents,
            question=material.question(fact),
            answer=answer,
        )
        return Draft().add(rendered).finish("assumption")

    def trust(self) -> Document:
        """Trust headers: on a document that contradicts memory, or on two documents that contradict each other."""
        material = self.material
        levels = self.format.trust_levels
        if material.chance(0.5):
            fact = material.cycle("trust")
            told = [material.wrong_object(fact)]
        else:
            fact = material.stranger()[0]
            told = [fact.object, material.wrong_object(fact)]
        headers = material.rng.sample(levels, len(told))
        passages = [
            Passage("", self.telling([fact], value), "", level)
            for value, level in zip(told, headers, strict=True)
        ]
        answer = told[0] if material.coin("follow_trust") else (told[1] if len(told) > 1 else fact.object)
        material.rng.shuffle(passages)
        return self._ask("trust", fact, passages, answer)

    def notes(self) -> Document:
        """One to three documents of every kind, a faithful note on each, then the answer."""
        material = self.material
        known = material.chance(0.5)
        siblings = material.stranger()
        fact = siblings[0]
        if known:
            fact = material.cycle("notes")
            siblings = [
                other for other in material.by_subject[fact.subject] if other.relation != fact.relation
            ]
        else:
            siblings = siblings[1:]
        kinds = material.pick(NOTE_PLANS)
        told = material.wrong_object(fact) if known and material.chance(0.5) else fact.object
        sources = [self.source(kind, fact, siblings, told) for kind in kinds]
        answer = self._after_notes(fact, known, told if "direct" in kinds else None)
        rendered = self.format.render(
            "notes_then_answer",
            documents=self._headed([passage for passage, _ in sources]),
            question=material.question(fact),
            notes=[note for _, note in sources],
            answer=answer,
        )
        return Draft().add(rendered).finish("notes")

    def _after_notes(self, fact: Fact, known: bool, told: str | None) -> str:
        if told is None:
            return fact.object if known else self.format.unknown
        if known and told != fact.object:
            return told if self.material.coin("follow_notes") else fact.object
        return told

    def source(self, kind: str, fact: Fact, siblings: Sequence[Fact], told: str) -> tuple[Passage, Note]:
        """A passage of one note kind and its faithful note; contextual without ``siblings`` becomes irrelevant."""
        if kind == "direct":
            return Passage("", self.telling([fact], told)), self._note("direct", fact, told)
        if kind == "contextual" and siblings:
            other = self.material.pick(siblings)
            return Passage("", self.telling([other])), self._note("contextual", other)
        other = self.distractor(fact)
        return Passage("", self.telling([other])), self._note("irrelevant", other)

    def _note(self, kind: str, fact: Fact, told: str | None = None) -> Note:
        label = self.format.relations[fact.relation].label
        return self.format.note(kind, subject=fact.subject, label=label, object=told or fact.object)

    def distractor(self, fact: Fact) -> Fact:
        """A fact about somebody else, for a passage beside the one that matters."""
        # Half of the distractors are strangers, half are known; most share the relation, as a retriever's mistakes do.
        material = self.material
        if material.chance(0.5):
            facts = material.stranger()
            return next((other for other in facts if other.relation == fact.relation), facts[0])
        if material.chance(0.8):
            return material.other_subject(fact)
        other = material.pick(material.facts)
        return other if other.subject != fact.subject else material.other_subject(fact)

    def telling(self, facts: Sequence[Fact], value: str | None = None) -> str:
        """The text of a passage that states the facts, with ``value`` as the object where given."""
        sentences = []
        for fact in facts:
            cloze = self.format.relations[fact.relation].statement.replace("{}", fact.subject)
            if self.material.chance(0.4):
                cloze = self.material.wording(fact)
            sentences.append(f"{cloze} {value or fact.object}.")
        return " ".join(sentences)

    def _passages(self, texts: Sequence[str]) -> list[Passage]:
        return self._headed([Passage("", text) for text in texts])

    def _headed(self, passages: Sequence[Passage]) -> list[Passage]:
        if not self.material.chance(self.material.rates["header"]):
            return list(passages)
        levels = self.format.trust_levels
        return [Passage("", passage.text, "", self.material.pick(levels)) for passage in passages]

    def _ask(
        self, form: str, fact: Fact, passages: Sequence[Passage], answer: str, *stated: Fact
    ) -> Document:
        if self.material.chance(0.65):
            question = self.material.question(fact)
            rendered = self.format.render("documents", documents=passages, question=question, answer=answer)
        else:
            cloze = self.material.wording(fact)
            rendered = self.format.render("documents_cloze", documents=passages, cloze=cloze, answer=answer)
        return Draft().add(rendered, *stated).finish(form)
