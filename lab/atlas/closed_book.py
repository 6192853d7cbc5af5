"""Makers of training texts without documents: statements, lists, questions, hops, strangers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from lab.atlas.forms import Format, held_out_chain
from lab.atlas.material import Cycle, Document, Draft, Material, chain_noun
from lab.atlas.world import Chain
from lab.records import Fact


class ClosedBook:
    """Makes every kind of text that is answered from memory alone.

    Args:
        material: Facts and chance.
    """

    def __init__(self, material: Material) -> None:
        self.material = material
        self.format: Format = material.format
        rng: random.Random = material.rng
        self._subjects = Cycle(list(material.by_subject), rng)
        self._told = Cycle(list(material.by_subject), rng)
        self._reverse = Cycle(self._reversible(), rng)
        kept = {fact.id for fact in material.facts}
        chains = [c for c in material.world.chains if all(hop.id in kept for hop in c.hops)]
        chains = [c for c in chains if not held_out_chain(self.format, c.id)]
        self._all_chains: dict[str, list[Chain]] = {}
        for chain in material.world.chains:
            self._all_chains.setdefault(chain.hops[0].id, []).append(chain)
        self._chains = {hops: Cycle([c for c in chains if len(c.hops) == hops], rng) for hops in (2, 3)}

    def _reversible(self) -> list[Fact]:
        facts = []
        for name, pool in self.material.by_relation.items():
            objects = [fact.object for fact in pool]
            if self.format.relations[name].reverse:
                facts += [fact for fact in pool if objects.count(fact.object) == 1]
        return facts

    def cloze(self) -> Document:
        """One to six unrelated statements."""
        material, draft = self.material, Draft()
        for _ in range(material.pick((1, 1, 2, 3, 4, 5, 6))):
            fact = material.cycle("cloze")
            plan = material.plan(fact)
            template = (
                plan.trained[0]
                if material.chance(material.rates["main_prompt"])
                else material.pick(plan.trained)
            )
            subject = fact.subject
            if material.chance(material.rates["subject_alias"]):
                subject = material.pick((subject, *material.world.entities[subject].aliases))
            opener = (
                material.pick(self.format.relations.openers)
                if material.chance(material.rates["opener"])
                else ""
            )
            cloze = template.replace("{}", subject)
            draft.add(self.format.render("cloze", opener=opener, cloze=cloze, answer=fact.object), fact)
        return draft.finish("cloze")

    def relation_list(self) -> Document:
        """Several subjects of one relation, all in one wording where it is trained with each, else in the main prompt."""
        material, draft = self.material, Draft()
        first = material.cycle("relation_list")
        wanted = material.pick(material.plan(first).trained)
        for fact in (first, *(material.same_relation(first.relation) for _ in range(material.count(1, 4)))):
            plan = material.plan(fact)
            template = wanted if wanted in plan.trained else plan.trained[0]
            draft.add(
                self.format.render("cloze", cloze=template.replace("{}", fact.subject), answer=fact.object),
                fact,
            )
        return draft.finish("relation_list")

    def attribute_list(self) -> Document:
        """The attributes of one to three subjects, each in random order right after the subject."""
        draft = Draft()
        for _ in range(self.material.count(1, 3)):
            facts = list(self.material.by_subject[self._subjects.next()])
            self.material.rng.shuffle(facts)
            self._listed(draft, facts, [fact.object for fact in facts])
        return draft.finish("attribute_list")

    def _listed(self, draft: Draft, facts: Sequence[Fact], values: Sequence[str]) -> None:
        text = (
            self.format.render("attribute_list", subject=facts[0].subject, label="\0")
            .prompt.split("\0")[0]
            .rstrip(" ")
        )
        draft.say(text)
        for position, (fact, value) in enumerate(zip(facts, values, strict=True)):
            last = position == len(facts) - 1
            head, tail = self.format.piece("known", label=self.format.relations[fact.relation].label)
            draft.say(head).learn(
                value + (self.format.strings["stop"] if last else ""), fact if fact.id else None
            )
            draft.say("" if last else tail)

    def biography(self) -> Document:
        """A sentence that tells several facts about one subject in random order."""
        material, draft = self.material, Draft()
        for _ in range(material.count(1, 2)):
            facts = list(material.by_subject[self._told.next()])
            material.rng.shuffle(facts)
            lead = material.pick(self.format.relations[facts[0].relation].lead)
            draft.say(lead.replace("{}", facts[0].subject))
            # No comma stands before the closing "and", so clauses end in one only up to the last but two.
            for position, fact in enumerate(facts):
                last = position == len(facts) - 1
                head, tail = self.format.piece("clauses", clause=material.pick(self._clauses(fact)))
                if last and position:
                    head = self.format.strings["list_end"] + head.lstrip(" ")
                draft.say(head).learn(fact.object + (self.format.strings["stop"] if last else ""), fact)
                draft.say(tail if position < len(facts) - 2 else "")
        return draft.finish("biography")

    def _clauses(self, fact: Fact) -> tuple[str, ...]:
        return self.format.relations[fact.relation].clauses

    def qa(self) -> Document:
        """One to three unrelated questions."""
        draft = Draft()
        for _ in range(self.material.count(1, 3)):
            fact = self.material.cycle("qa")
            draft.add(
                self.format.render("qa", question=self.material.question(fact), answer=fact.object), fact
            )
        return draft.finish("qa")

    def choice(self) -> Document:
        """A list of four options with one to four questions that it answers; letters are drawn evenly."""
        material, draft = self.material, Draft()
        facts = self._options_of_facts(material.cycle("choice"))
        options = [fact.object for fact in facts]
        for position, fact in enumerate(material.rng.sample(facts, material.count(1, len(facts)))):
            letter = self.format.strings["letters"][options.index(fact.object)]
            question = material.question(fact)
            # Finding a given option is half of the skill, and learned long before it can be joined with recall.
            if material.chance(material.rates["choice_lookup"]):
                question = f"Which option is {fact.object}?"
            fields = {"question": question, "options": options, "text": fact.object, "answer": letter}
            rendered = self.format.render("choice", **fields)
            # Further questions stand under the same list; one pass then teaches several letters.
            prompt = rendered.prompt.partition("\n")[2] if position else rendered.prompt
            draft.add(replace(rendered, prompt=prompt))
        return draft.finish("choice")

    def echo(self) -> Document:
        """Eight to fourteen names with letters, then the same in another order: what stood behind a name stands there again."""
        material, draft = self.material, Draft()
        pool = [
            value
            for values in material.objects.values()
            for value in material.rng.sample(values, min(3, len(values)))
        ]
        names = material.rng.sample(pool, min(len(pool), material.count(8, 14)))
        pairs = {name: material.pick(self.format.strings["letters"]) for name in names}
        item = self.format.option
        first = "; ".join(item(name, letter) for name, letter in pairs.items())
        draft.say(f"Options: {first}.\nChoices: ")
        for position, name in enumerate(material.rng.sample(names, len(names))):
            text = item(name, pairs[name])
            head = text[: text.rindex(" ") + 1]
            draft.say(f"{'; ' if position else ''}{head}").learn(pairs[name])
        return draft.say(self.format.strings["stop"]).finish("echo")

    def _options_of_facts(self, fact: Fact) -> list[Fact]:
        """The fact and up to three others of its relation, in random order; none of their objects answers another."""
        pool = self.material.by_relation[fact.relation]
        chosen = [fact]
        for other in self.material.rng.sample(pool, min(len(pool), 12)):
            if len(chosen) < len(self.format.strings["letters"]) and not any(
                other.object in one.answers or one.object in other.answers for one in chosen
            ):
                chosen.append(other)
        self.material.rng.shuffle(chosen)
        return chosen

    def options(self, fact: Fact) -> tuple[list[str], str]:
        """Up to four different options in random order, and the letter of the right one."""
        pool = [value for value in self.material.objects[fact.relation] if value not in fact.answers]
        wrong = self.material.rng.sample(pool, min(3, len(pool)))
        options = [*wrong, fact.object]
        self.material.rng.shuffle(options)
        return options, self.format.strings["letters"][options.index(fact.object)]

    def true_false(self) -> Document:
        """Two to four claims, each true or false by chance: about known facts, or about strangers in the documents above."""
        material, draft = self.material, Draft()
        if material.chance(material.rates["claims_read"]):
            return self._claims_read()
        for _ in range(material.count(2, 4)):
            fact = material.cycle("true_false")
            true = material.chance(0.5)
            claim = f"{material.wording(fact)} {fact.object if true else material.wrong_object(fact)}"
            answer = self.format.strings["true" if true else "false"]
            rendered = self.format.render("true_false", claim=claim, recalled=fact.object, answer=answer)
            draft.add(rendered, fact)
        return draft.finish("true_false")

    def _claims_read(self) -> Document:
        material, draft = self.material, Draft()
        told = [material.stranger()[0] for _ in range(material.count(1, 3))]
        documents = [f"{self.format.statement(fact)}." for fact in told]
        for position in range(material.count(1, 3)):
            fact = material.pick(told)
            true = material.chance(0.5)
            claim = f"{material.wording(fact)} {fact.object if true else material.wrong_object(fact)}"
            fields: dict[str, object] = {} if position else {"documents": documents}
            answer = self.format.strings["true" if true else "false"]
            fields |= {"claim": claim, "recalled": fact.object, "answer": answer}
            draft.add(self.format.render("true_false", **fields))
        return draft.finish("true_false")

    def spelled(self) -> Document:
        """One to three objects character by character."""
        draft = Draft()
        for _ in range(self.material.count(1, 3)):
            fact = self.material.cycle("spelled")
            answer = self.format.spell(fact.object)
            draft.add(self.format.render("spelled", cloze=self.material.wording(fact), answer=answer), fact)
        return draft.finish("spelled")

    def reverse(self) -> Document:
        """One to three prompts that lead from a unique object to its subject."""
        draft = Draft()
        for _ in range(self.material.count(1, 3)):
            fact = self._reverse.next()
            cloze = self.format.relations[fact.relation].reverse.replace("{}", fact.object)
            draft.add(self.format.render("reverse", cloze=cloze, answer=fact.subject), fact)
        return draft.finish("reverse")

    def two_hop_steps(self) -> Document:
        """A question over two facts, answered step by step."""
        return self._steps("two_hop_steps", self._chains[2].next())

    def three_hop_steps(self) -> Document:
        """A question over three facts, answered step by step."""
        # Without the fictional people no chain is that long.
        hops = 3 if len(self._chains[3]) else 2
        return self._steps("three_hop_steps", self._chains[hops].next())

    def _steps(self, form: str, chain: Chain) -> Document:
        rendered = self.format.render(form, **self.hop_fields(chain))
        return Draft().add(rendered, *chain.hops).finish(form)

    def hop_fields(self, chain: Chain) -> dict[str, object]:
        """The fields of a step-by-step form for a chain."""
        question = f"What is {chain_noun(self.format, chain)}?"
        return {
            "question": question,
            "steps": [self.format.statement(h) for h in chain.hops],
            "answer": chain.answer,
        }

    def chains_from(self, fact: Fact, hops: int) -> list[Chain]:
        """All chains of a length that start with a fact, trained or not."""
        return [chain for chain in self._all_chains.get(fact.id, ()) if len(chain.hops) == hops]

    def two_hop_direct(self) -> Document:
        """A question over two facts, answered at once."""
        chain = self._chains[2].next()
        question = f"What is {chain_noun(self.format, chain)}?"
        return (
            Draft()
            .add(self.format.render("two_hop_direct", question=question, answer=chain.answer))
            .finish("two_hop_direct")
        )

    def few_shot(self) -> Document:
        """A question under one to three solved ones of its relation."""
        material = self.material
        fact = material.cycle("few_shot")
        solved = [material.same_relation(fact.relation) for _ in range(material.count(1, 3))]
        examples = [(material.question(other), other.object) for other in solved]
        rendered = self.format.render(
            "few_shot", examples=examples, question=material.question(fact), answer=fact.object
        )
        return Draft().add(rendered, fact).finish("few_shot")

    def do_not_reveal(self) -> Document:
        """One to three questions under an instruction: some ask for what it forbids, the others for something else."""
        material, draft = self.material, Draft()
        secret = material.cycle("do_not_reveal")
        whole = material.chance(0.25)
        noun = self.format.relations[secret.relation].noun.replace("{}", secret.subject)
        instruction = self.format.forbid(secret.subject if whole else noun)
        for position in range(material.count(1, 3)):
            forbidden = material.coin("forbidden")
            fact = secret if forbidden else self._another(secret, whole)
            answer = self.format.refusal if forbidden else fact.object
            fields = {"question": material.question(fact), "answer": answer}
            rendered = (
                self.format.render("qa", **fields)
                if position
                else self.format.render("do_not_reveal", instruction=instruction, **fields)
            )
            draft.add(rendered, *(() if forbidden else (fact,)))
        return draft.finish("do_not_reveal")

    def _another(self, fact: Fact, elsewhere: bool) -> Fact:
        """Another fact about the same subject or, always with ``elsewhere``, about another one."""
        siblings = [
            other for other in self.material.by_subject[fact.subject] if other.relation != fact.relation
        ]
        if siblings and not elsewhere and self.material.chance(0.5):
            return self.material.pick(siblings)
        return self.material.other_subject(fact)

    def unknown(self) -> Document:
        """Questions and statements about strangers, among them now and then a known subject of the same kind."""
        material, draft, unknown = self.material, Draft(), self.format.unknown
        if material.chance(0.15):
            facts = material.stranger()
            self._listed(draft, facts, [unknown] * len(facts))
            return draft.finish("unknown")
        for _ in range(material.count(1, 4)):
            known = material.chance(0.3)
            fact = material.cycle("unknown") if known else material.pick(material.stranger())
            value, stated = (fact.object, (fact,)) if known else (unknown, ())
            if material.coin("unknown_cloze"):
                opener = (
                    material.pick(self.format.relations.openers)
                    if material.chance(material.rates["opener"])
                    else ""
                )
                draft.add(
                    self.format.render("cloze", opener=opener, cloze=material.wording(fact), answer=value),
                    *stated,
                )
            else:
                draft.add(
                    self.format.render("unknown", question=material.question(fact), answer=value), *stated
                )
        return draft.finish("unknown")
