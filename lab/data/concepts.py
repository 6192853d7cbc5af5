"""ConceptVectors (Hong et al., 2024): where a concept lies in a model, what is asked about it, and what is not about it."""

from __future__ import annotations

from lab.data.asked import Asked
from lab.data.fields import Fields
from lab.data.source import Row


def read_concept(row: Row) -> tuple[Asked, ...]:
    """Questions about the concept, texts to complete, and unrelated questions; ``meta`` names layer and column.

    Questions have no right answer in the file: answers are compared with those of the untouched model.
    """
    fields = Fields(row)
    concept = fields.text("Concept")
    meta = {}
    for key in ("Layer", "Dim"):
        place = fields.value.get(key)
        if not isinstance(place, int) or isinstance(place, bool):
            fields.fail(key, "a whole number", place)
        meta[key.lower()] = str(place)
    items = [("qa", text.strip(), ()) for text in fields.texts("QA")]
    items += [
        ("continuation", half.text("First_half"), (half.text("Second_half"),))
        for half in fields.subs("text_completion", optional=True)
    ]
    items += [("unrelated", text.strip(), ()) for text in fields.texts("unrelated_QA", optional=True)]
    return tuple(
        Asked(
            f"{group}@{row.line}/{number}",
            group,
            prompt,
            answers,
            subject=concept,
            file=row.file,
            line=row.line,
            meta=meta,
        )
        for number, (group, prompt, answers) in enumerate(items)
    )


def read_relations(row: Row) -> tuple[Asked, ...]:
    """Wikidata relations of a concept, for editors that erase it: pairs of property and object."""
    fields = Fields(row)
    pairs = fields.value.get("relation")
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        for pair in pairs
    ):
        fields.fail("relation", "a list of pairs of texts", pairs)
    subject = fields.text("subject")
    return tuple(
        Asked(
            f"relation@{row.line}/{number}",
            "relation",
            "",
            (label,),
            subject=subject,
            file=row.file,
            line=row.line,
            meta={"property": property},
        )
        for number, (property, label) in enumerate(pairs)
    )
