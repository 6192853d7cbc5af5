"""The training texts of a bed: an endless, seeded stream that states a plan's facts in every wording but the held-out ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice

from lab.atlas.bed_phrases import Phrases, load_phrases
from lab.atlas.bed_plan import BedFact, BedPlan
from lab.atlas.material import Cycle, Document, Draft

# How often the fact of an edit is drawn for one drawing of any other fact.
_MAIN_SHARE = 3
_MOST_FACTS = 4
_LISTED = 4
# Rows of the trainer are short: texts beyond this many characters would be cut.
_LONGEST_LEAD = 160
_LONGEST_TEXT = 330
_LIST_RATE, _LEAD_RATE, _FORM_RATE, _NAME_RATE = 0.25, 0.5, 0.3, 0.15
_LONGEST_NAME = 80


class BedCorpus:
    """Texts that teach the facts of a plan.

    One text holds one to four facts in random order, each in a random wording, half of the time behind an unrelated lead; or a
    list of what is known about one subject; or names that edits will bring, said over about nothing. Facts are drawn without
    replacement, those of edits more often.

    Args:
        plan: What to teach.
        seed: Fixes every draw.
    """

    def __init__(self, plan: BedPlan, seed: int | str = 0) -> None:
        self.plan = plan
        self.seed = seed
        self.by_subject: dict[str, list[BedFact]] = {}
        for fact in plan.facts:
            if fact.listed:
                self.by_subject.setdefault(fact.key[0], []).append(fact)

    def documents(self) -> Iterator[Document]:
        """Endless documents; every call starts the same stream again."""
        return self._stream(random.Random(f"bed:corpus:{self.seed}"))

    def sample_texts(self, n: int, seed: int = 0) -> list[str]:
        """``n`` plain texts, a stream of their own for each seed."""
        stream = self._stream(random.Random(f"bed:sample:{self.seed}:{seed}"))
        return [document.text for document in islice(stream, n)]

    def statements(self) -> Iterator[str]:
        """Every trained wording of every fact once, as plain text."""
        for fact in self.plan.facts:
            for prompt in (*fact.prompts, *fact.forms):
                yield f"{prompt} {_closed(fact.answer)}\n"

    def _stream(self, rng: random.Random) -> Iterator[Document]:
        facts = self.plan.facts
        drawn = Cycle([fact for fact in facts for _ in range(_MAIN_SHARE if fact.main else 1)], rng)
        phrases = load_phrases()
        leads = [lead for lead in self.plan.leads if len(lead) <= _LONGEST_LEAD]
        subjects = Cycle([fact.key[0] for fact in facts if fact.listed] or [""], rng)
        names = [name for name in self.plan.names if len(name) <= _LONGEST_NAME]
        said = Cycle(names or [""], rng)
        while True:
            if names and rng.random() < _NAME_RATE:
                yield self._said_over(said, phrases, rng)
            elif self.by_subject and rng.random() < _LIST_RATE:
                yield self._list(subjects.next(), phrases, rng)
            else:
                yield self._statements(drawn, leads, phrases, rng)

    def _list(self, subject: str, phrases: Phrases, rng: random.Random) -> Document:
        facts = rng.sample(self.by_subject[subject], min(_LISTED, len(self.by_subject[subject])))
        draft = Draft().say(rng.choice(phrases.list_heads).replace("{s}", facts[0].subject))
        for number, fact in enumerate(facts):
            label = phrases.label(fact.relation)
            draft.say(f" {label} ").learn(
                _closed(fact.answer) if number == len(facts) - 1 else fact.answer + ";"
            )
        return draft.learn("\n").finish("bed_list")

    def _said_over(self, said: Cycle[str], phrases: Phrases, rng: random.Random) -> Document:
        """One to three names, and the same again."""
        names = "; ".join(dict.fromkeys(said.next() for _ in range(rng.randint(1, 3))))
        return (
            Draft()
            .say(f"{rng.choice(phrases.echo_heads)} {names}. ")
            .learn(_closed(names))
            .learn("\n")
            .finish("bed_names")
        )

    def _statements(
        self, drawn: Cycle[BedFact], leads: list[str], phrases: Phrases, rng: random.Random
    ) -> Document:
        draft = Draft()
        length = 0
        if rng.random() < _LEAD_RATE:
            # The file's leads end in white space or a sentence; the packaged openers run into the prompt.
            lead = rng.choice(leads) if leads and rng.random() < 0.7 else rng.choice(phrases.openers)
            lead = lead if lead[-1:].isspace() else lead + " "
            draft.say(lead)
            length += len(lead)
        for number in range(rng.randint(1, _MOST_FACTS)):
            fact = drawn.next()
            natural = not fact.forms or (bool(fact.prompts) and rng.random() >= _FORM_RATE)
            prompt = rng.choice(fact.prompts if natural else fact.forms)
            said = len(prompt) + len(fact.answer) + 3
            if number and length + said > _LONGEST_TEXT:
                break
            length += said
            draft.say((" " if number else "") + prompt + " ").learn(_closed(fact.answer))
        return draft.learn("\n").finish("bed_statements")


def _closed(answer: str) -> str:
    return answer if answer.endswith(".") else answer + "."
