"""Texts and probes of the built-in world for the trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random

from lab.atlas.corpus import Corpus, Document
from lab.atlas.forms import load_format
from lab.atlas.world import load_world

PROBED_FORMS = (
    "qa",
    "choice",
    "reading",
    "notes",
    "unknown",
    "two_hop_steps",
    "conflict",
    "true_false",
    "spelled",
    "do_not_reveal",
    "reverse",
)
_PROBE_STREAM = 1_000_003
_ALL_PEOPLE = "people"


@dataclass(frozen=True)
class AtlasSource:
    """The corpus of a world, cut into streams.

    Attributes:
        seed: Draws the texts.
        without: Forget split whose people no text may mention, or ``people`` for all of them, or empty.
        world: Seed of the world.
        probes_per_set: Size of each probe set.
        mixture: Shares of single forms, in place of the prompt format's.
    """

    seed: int = 0
    without: str = ""
    world: int = 0
    probes_per_set: int = 80
    mixture: tuple[tuple[str, float], ...] = ()

    def names_left_out(self) -> frozenset[str]:
        """Names of the people that no text may mention."""
        if not self.without:
            return frozenset()
        world = load_world(self.world)
        if self.without == _ALL_PEOPLE:
            return frozenset(fact.subject for fact in world.facts if fact.group == "person")
        return frozenset(fact.subject for fact in world.forget_split(self.without))

    def documents(self, stream: int) -> Iterator[Document]:
        """Endless texts of one stream."""
        seed = Random(f"atlas:stream:{self.seed}:{stream}").getrandbits(48)
        return Corpus(
            load_world(self.world), load_format(), seed, self.names_left_out(), weights=dict(self.mixture)
        ).documents()

    def probes(self) -> Mapping[str, list[tuple[str, str]]]:
        """Recall on trained wordings, on wordings held out for a fact, and on fresh texts of several forms."""
        world, format = load_world(self.world), load_format()
        gone, rng = self.names_left_out(), Random(f"atlas:probes:{self.seed}")
        facts = [fact for fact in world.facts if fact.subject not in gone and fact.object not in gone]
        sets: dict[str, list[tuple[str, str]]] = {"trained": [], "pairs": []}
        for fact in rng.sample(facts, min(2 * self.probes_per_set, len(facts))):
            plan = format.wordings_for(fact)
            for name, wordings in (("trained", plan.trained), ("pairs", plan.held_out_pairs)):
                if wordings:
                    cloze = rng.choice(wordings).replace("{}", fact.subject)
                    rendered = format.render("cloze", cloze=cloze, answer=fact.object)
                    sets[name].append((rendered.prompt, f" {rendered.answer}{rendered.stop}"))
        wanted: dict[str, int] = {str(form): self.probes_per_set for form in PROBED_FORMS}
        for document in self.documents(_PROBE_STREAM):
            if wanted.get(document.form, 0) > 0:
                wanted[document.form] -= 1
                start, stop = document.answer_spans[0]
                sets.setdefault(document.form, []).append(
                    (document.text[: start - 1], document.text[start - 1 : stop])
                )
            if not any(wanted.values()):
                break
        return sets
