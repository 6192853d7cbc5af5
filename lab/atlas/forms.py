"""The prompt format of Atlas and the wordings of its relations, both read from data files.

``format.toml`` fixes the layout of every form; ``relations.toml`` holds the wordings. Whoever renders a prompt for an Atlas
model goes through ``Format.render``.

    >>> form = load_format()
    >>> form.render("cloze", cloze="The capital of France is", answer="Paris").text
    'The capital of France is Paris.\\n'
"""

from __future__ import annotations

import hashlib
import re
import string
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lab.atlas.wordings import RelationForms, Relations, WordingPlan, plan_wordings, read_relations
from lab.errors import ConfigError, UnknownNameError
from lab.records import Fact, Passage, Trust

__all__ = [
    "NOTE_KINDS",
    "Format",
    "Note",
    "RelationForms",
    "Relations",
    "Rendered",
    "WordingPlan",
    "held_out_chain",
    "load_format",
    "wordings_for",
]

NOTE_KINDS = ("direct", "contextual", "irrelevant")
# Fields that stand in answers only.
_ANSWERED = ("answer", "notes", "steps", "recalled", "text")


@dataclass(frozen=True)
class Rendered:
    """A prompt and the answer that belongs to it.

    Attributes:
        prompt: Ends without a blank.
        answer: Starts without a blank; one line, without the stop.
        stop: What ends the answer.
    """

    prompt: str
    answer: str
    stop: str = ".\n"

    @property
    def text(self) -> str:
        """Prompt, one blank, answer and stop: a training text."""
        return f"{self.prompt} {self.answer}{self.stop}"

    @property
    def answer_span(self) -> tuple[int, int]:
        """Character range in ``text`` of the answer with its stop."""
        start = len(self.prompt) + 1
        return start, start + len(self.answer) + len(self.stop)


@dataclass(frozen=True)
class Note:
    """One reading note: ``kind`` is direct, contextual or irrelevant; ``text`` is what the note says."""

    kind: str
    text: str


@dataclass(frozen=True)
class Form:
    """One entry of the format: layout templates and the fields they need."""

    name: str
    version: int
    prompt: str
    answer: str
    fields: frozenset[str]
    optional: frozenset[str]


class Format:
    """The prompt format: renders every form, and says how answers end.

    Attributes:
        relations: The wordings.
        strings: Fixed strings: ``unknown``, ``refusal``, ``true``, ``false``, ``letters`` and others.
        mixture: Defaults of the training mixture: ``weights`` and ``rates``.
        held_out: What training leaves out for testing.
    """

    def __init__(self, data: Mapping[str, Any], relations: Relations) -> None:
        if data.get("schema") != 1:
            raise ConfigError(
                f"prompt format: schema {data.get('schema')!r} is not known; this version reads schema 1"
            )
        self.relations = relations
        self.strings: Mapping[str, Any] = data["strings"]
        self.mixture: Mapping[str, Mapping[str, float]] = data["mixture"]
        self._trust = data["trust"]
        self._notes = data["notes"]
        self._above = data["above"]
        self._blocks: Mapping[str, Mapping[str, str]] = data["blocks"]
        self._forbid: str = data["instruction"]["forbid"]
        self.held_out: Mapping[str, Any] = data["held_out"]
        self._forms = {name: self._form(name, entry) for name, entry in data["forms"].items()}
        pattern = re.escape(self._blocks["notes"]["item"])
        for field, shape in (("number", r"\d+"), ("text", ".*"), ("kind", r"\w+")):
            pattern = pattern.replace(re.escape(f"{{{field}}}"), f"(?P<{field}>{shape})")
        self._note_pattern = re.compile(pattern)

    def _form(self, name: str, entry: Mapping[str, Any]) -> Form:
        template = entry["prompt"] + entry["answer"]
        fields = {field for _, field, _, _ in string.Formatter().parse(template) if field}
        fields |= set(entry.get("above", ()))
        optional = set(entry.get("optional", ())) | (set(self._above["order"]) - set(entry.get("above", ())))
        return Form(
            name,
            int(entry["version"]),
            entry["prompt"],
            entry["answer"],
            frozenset(fields),
            frozenset(optional),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all forms."""
        return tuple(self._forms)

    @property
    def versions(self) -> dict[str, int]:
        """The version of each form, to be recorded with weights."""
        return {name: form.version for name, form in self._forms.items()}

    @property
    def unknown(self) -> str:
        """The fixed answer when nothing has the answer."""
        return self.strings["unknown"]

    @property
    def refusal(self) -> str:
        """The fixed answer to a forbidden question."""
        return self.strings["refusal"]

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end an answer, for ``ModelHandle.generate(stop=...)``; the first is the trained one."""
        return (self.strings["stop"], *self.strings["also_stop"])

    @property
    def trust_levels(self) -> tuple[Trust, ...]:
        """The values that a trust header can take."""
        return tuple(self._trust["levels"])

    def render(self, form: str, **fields: Any) -> Rendered:
        """Renders one form.

        Args:
            form: Name of a form in the format file.
            **fields: What the form's templates name. Sequences for ``documents`` (``Passage`` or text), ``examples``
                (question, answer), ``options`` (text), ``notes`` (``Note``), ``steps`` (text), ``known`` (label, object)
                and ``clauses`` (clause, object). ``instruction``, ``assumption``, ``documents`` and ``examples`` may be
                given with every form. ``answer`` may be left out when only the prompt is wanted, together with
                ``notes``, ``steps``, ``recalled`` and ``text``.

        Raises:
            UnknownNameError: There is no such form.
            ConfigError: A field is missing, not known to the form, or has the wrong shape.
        """
        entry = self._forms.get(form)
        if entry is None:
            raise UnknownNameError("form", form, tuple(self._forms))
        for name in fields:
            if name not in entry.fields and name not in entry.optional:
                known = ", ".join(sorted(entry.fields | entry.optional))
                raise ConfigError(f"form {form!r}: no field {name!r}; it takes {known}")
        closed = "answer" in fields
        for name in entry.fields - entry.optional:
            if name not in fields and (closed or name not in _ANSWERED):
                raise ConfigError(f"form {form!r}: field {name!r} is missing; pass {name}=...")
        values: dict[str, Any] = dict.fromkeys(entry.optional, "")
        for name, value in fields.items():
            values[name] = self._block(form, name, value) if name in self._blocks else value
        above = "".join(self._part(name, values[name]) for name in self._above["order"] if values[name])
        prompt = above + entry.prompt.format_map(values)
        return Rendered(prompt, entry.answer.format_map(values) if closed else "", self.strings["stop"])

    def _part(self, name: str, value: str) -> str:
        template = self._above.get(name)
        return template.format_map({name: value}) if template else value

    def _block(self, form: str, name: str, items: Any) -> str:
        if isinstance(items, str) or not isinstance(items, Sequence):
            raise ConfigError(f"form {form!r}: field {name!r} takes a sequence, not {type(items).__name__}")
        block = self._blocks[name]
        try:
            rows = [self._item(name, number, item) for number, item in enumerate(items, start=1)]
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise ConfigError(f"form {form!r}: an item of {name!r} has the wrong shape: {error}") from None
        return block["join"].join(block["item"].format_map(row) for row in rows)

    def _item(self, name: str, number: int, item: Any) -> dict[str, Any]:
        if name == "documents":
            text, trust = (item.text, item.trust) if isinstance(item, Passage) else (str(item), None)
            return {"number": number, "header": self.trust_header(trust), "text": text}
        if name == "examples":
            question, answer = item
            return {"question": question, "answer": answer}
        if name == "options":
            return {"letter": self.strings["letters"][number - 1], "text": item}
        if name == "notes":
            return {"number": number, "kind": item.kind, "text": item.text}
        if name == "known":
            label, value = item
            return {"label": label, "object": value}
        if name == "clauses":
            clause, value = item
            return {"clause": clause, "object": value}
        return {"text": item}

    def trust_header(self, trust: str | None) -> str:
        """The header of a document with this trust level, empty for None.

        Raises:
            ConfigError: The level is not one of ``trust_levels``.
        """
        if trust is None:
            return ""
        if trust not in self._trust["levels"]:
            raise ConfigError(f"trust {trust!r} is not one of {', '.join(self._trust['levels'])}")
        return self._trust["header"].format(trust=trust)

    def documents(self, passages: Sequence[Passage | str], trust: Trust | None = None) -> str:
        """The text of the documents as it stands above a prompt; ``trust`` fills in where a passage has none."""
        filled = []
        for passage in passages:
            if isinstance(passage, str):
                passage = Passage(id="", text=passage)
            filled.append(Passage(passage.id, passage.text, passage.source, passage.trust or trust))
        return self._block("documents", "documents", filled)

    def piece(self, block: str, **fields: str) -> tuple[str, str]:
        """What stands before and after the object in one item of ``known`` or ``clauses``; the part before ends in a blank."""
        head, _, tail = self._blocks[block]["item"].partition("{object}")
        return head.format_map(fields), tail.format_map(fields)

    def option(self, text: str, letter: str) -> str:
        """One option as it stands in a list of options."""
        return self._blocks["options"]["item"].format_map({"text": text, "letter": letter})

    def forbid(self, what: str) -> str:
        """The instruction not to reveal ``what`` (a noun phrase or a name); it says what to answer instead."""
        return self._forbid.format(what=what, refusal=self.refusal)

    def spell(self, text: str) -> str:
        """``text`` character by character."""
        blank = self.strings["spelled_blank"]
        return self.strings["spelled_join"].join(blank if char == " " else char for char in text)

    def unspell(self, text: str) -> str:
        """Inverse of ``spell``."""
        return "".join(text.split(self.strings["spelled_join"])).replace(self.strings["spelled_blank"], " ")

    def note(self, kind: str, *, label: str = "", object: str = "", subject: str = "") -> Note:
        """A reading note of one of the three kinds, in the trained words: what the document says of ``subject``."""
        if kind not in NOTE_KINDS:
            raise ConfigError(f"note kind {kind!r} is not one of {', '.join(NOTE_KINDS)}")
        return Note(kind, self._notes[kind].format(label=label, object=object, subject=subject))

    def note_fields(self, note: Note) -> dict[str, str]:
        """What ``note`` was called with (``label``, ``object``, ``subject``), read back from a note; empty where it has another shape.

        A label or subject that holds the template's own signs is cut at the first of them.
        """
        pattern = re.escape(self._notes.get(note.kind, ""))
        for field, shape in (("subject", ".+?"), ("label", ".+?"), ("object", ".+")):
            pattern = pattern.replace(re.escape(f"{{{field}}}"), f"(?P<{field}>{shape})")
        found = re.fullmatch(pattern, note.text)
        return found.groupdict() if found else {}

    def clean(self, generated: str) -> str:
        """What a model generated, cut at the first stop, without blanks at its ends and without a full stop before a break."""
        line, stop, _ = generated.partition(self.stop[0])
        for other in self.stop[1:]:
            before, found, _ = line.partition(other)
            line, stop = before, "" if found else stop
        return line.strip() if stop else line.strip().removesuffix(".")

    def final_answer(self, generated: str) -> str:
        """The answer proper of a generated answer line with notes or steps before it."""
        return self.clean(generated).rsplit(self.strings["marker"], 1)[-1].strip()

    def parse_notes(self, generated: str) -> tuple[list[Note], str]:
        """Notes and answer of a generated answer line; a note of no known kind is kept with kind ``irrelevant``."""
        head, marker, answer = self.clean(generated).rpartition(self.strings["marker"])
        notes = []
        for item in (head if marker else answer).split(self._blocks["notes"]["join"]):
            found = self._note_pattern.fullmatch(item.strip())
            if found:
                kind = found["kind"]
                notes.append(Note(kind if kind in NOTE_KINDS else "irrelevant", found["text"]))
        return notes, answer.strip() if marker else ""

    def wordings_for(self, fact: Fact) -> WordingPlan:
        """Which wordings are trained with this fact and which are held out; a seeded hash of subject and relation.

        Raises:
            UnknownNameError: The relation has no wordings.
        """
        count, seed = self.held_out["pairs_per_fact"], self.held_out["seed"]
        return plan_wordings(self.relations[fact.relation], fact.subject, pairs_per_fact=count, seed=seed)

    def statement(self, fact: Fact, value: str | None = None) -> str:
        """The statement of a document or step without full stop: the main prompt, the object (or ``value``)."""
        return f"{self.relations[fact.relation].statement.replace('{}', fact.subject)} {value or fact.object}"


def held_out_chain(format: Format, chain_id: str) -> bool:
    """Whether a chain of hops is kept out of training, by a seeded hash of its id."""
    settings = format.held_out
    digest = hashlib.blake2b(f"{settings['seed']}|chain|{chain_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < settings["chain_share"]


@lru_cache(maxsize=4)
def load_format(folder: str | Path | None = None) -> Format:
    """Loads the prompt format.

    Args:
        folder: Where ``format.toml`` and ``relations.toml`` lie; the packaged files by default.

    Raises:
        ConfigError: A file is absent or malformed.
    """
    place = Path(folder) if folder is not None else Path(__file__).parent
    try:
        data = tomllib.loads((place / "format.toml").read_text(encoding="utf-8"))
        return Format(data, read_relations(place / "relations.toml"))
    except FileNotFoundError as error:
        raise ConfigError(f"prompt format: {error.filename} does not exist") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"prompt format in {place}: {error}") from None
    except KeyError as error:
        raise ConfigError(f"prompt format in {place}: entry {error} is missing") from None


def wordings_for(fact: Fact) -> WordingPlan:
    """``Format.wordings_for`` of the packaged format."""
    return load_format().wordings_for(fact)
