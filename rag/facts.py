"""The fact that somebody names in words: known to the built-in world, or spelled out."""

from __future__ import annotations

from dataclasses import replace

from lab.errors import RequestError
from lab.records import Fact


def named_fact(
    subject: str, relation: str, *, object: str = "", prompt: str = "", aliases: tuple[str, ...] = ()
) -> Fact:
    """The fact of a subject and a relation.

    Args:
        subject: What it is about.
        relation: Which of its attributes, by the relation's name or label.
        object: What has been right so far; the built-in world's object without it.
        prompt: Cloze with one ``{}``; the built-in world's wording without it.
        aliases: Other spellings of ``object``.

    Raises:
        RequestError: The built-in world does not know the fact, and what is missing was not given.
    """
    from lab.atlas.world import load_world

    subject, relation = subject.strip(), relation.strip()
    if not subject or not relation:
        raise RequestError("name a subject and which of its attributes is meant, such as France and capital")
    name = relation_name(relation)
    known = next((fact for fact in load_world().by_subject(subject) if fact.relation == name), None)
    if known is not None:
        changes = {"object": object, "aliases": aliases} if object and object not in known.answers else {}
        return replace(known, prompt=prompt or known.prompt, **changes)
    if not object or not prompt:
        raise RequestError(
            f"the built-in world does not know the {relation} of {subject!r}; give what has been right so far and a prompt "
            "with {} in the place of the subject"
        )
    return Fact(subject, name, object, prompt, aliases)


def question_of(fact: Fact) -> str:
    """A question for the object of a fact, where the relation has wordings; else empty."""
    from lab.atlas.forms import load_format

    relations = load_format().relations
    if fact.relation not in relations:
        return ""
    return relations[fact.relation].questions[0].replace("{}", fact.subject)


def names_of(fact: Fact) -> tuple[str, ...]:
    """Other names of a fact's subject that the built-in world knows."""
    from lab.atlas.world import load_world

    entity = load_world().entities.get(fact.subject)
    return entity.aliases if entity is not None else ()


def relation_name(relation: str) -> str:
    """The name of a relation given by name or label; what it is called where it is unknown."""
    from lab.atlas.forms import load_format

    wanted = relation.casefold()
    for name, forms in load_format().relations.items():
        if wanted in (name.casefold(), forms.label.casefold()):
            return name
    return relation
