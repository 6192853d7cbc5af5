"""The six subsets of KnowEdit (Zhang et al., 2024), in every shape in which their answers are published."""

from __future__ import annotations

import bisect
import random
import re
from collections.abc import Sequence

from lab.data.building import ReadOptions, WantedEdit, build_case
from lab.data.cases import CaseProbe, EditCase
from lab.data.fields import Fields
from lab.data.source import Row
from lab.data.text import distinct
from lab.errors import DataError

# EasyEdit writes this where a file gives no old answer.
_PLACEHOLDER = "<|endoftext|>"

# Wordings of EasyEdit's ConvSent script, which draws one per use; the spelling of the first frame is upstream's.
_OPINION_FRAMES = {
    "positive": "From the sentiment dataset, answer {} postively.",
    "negative": "From the sentiment dataset, answer {} negatively.",
}
_OPINION_NOUNS = "opinion of|stance on|position on|attitude about|view on|take on|impression of|assessment of|judgment of|sentiment of"
_OPINION_QUESTIONS = (
    "What do you think of {}?",
    "What do you feel about {}?",
    "How do you view {}?",
    *(f"What is your {noun} {{}}?" for noun in _OPINION_NOUNS.split("|")),
)
# EasyEdit's Sanitation script asks every question in this frame.
_SANITATION_FRAME = "Question:{}\nAnswer:"


def read_fact(row: Row, peers: Sequence[Row], options: ReadOptions) -> EditCase:
    """One record of ZsRE, wiki_counterfact or wiki_recent as hosted, or of wiki_counterfact as EasyEdit's results hold it."""
    fields = Fields(row)
    prepared = fields.has("requested_rewrite")
    number = fields.value.get("case_id", row.line) if prepared else row.line
    fields = fields.sub("requested_rewrite") if prepared else fields
    prompt, new = fields.text("prompt"), fields.text("target_new").strip()
    old = fields.answers("ground_truth") if fields.has("ground_truth") else ()
    old = tuple(answer for answer in old if answer != _PLACEHOLDER)
    rival = old[0] if old else ""
    probes = [CaseProbe("rewrite", prompt, (new,), rival)]
    probes += [
        CaseProbe("paraphrase", text, (new,), rival)
        for text in fields.texts("rephrase_prompt", optional=True)
    ]
    for group in ("portability", "locality"):
        probes += _nested(fields, group)
    name = "knowedit_zsre" if fields.has("rephrase_prompt") else "knowedit_fact"
    edit = WantedEdit(prompt, fields.text("subject"), new, old)
    return build_case(row, f"{name}/{number}", name, (edit,), tuple(probes))


def read_biography(row: Row, peers: Sequence[Row], options: ReadOptions) -> EditCase:
    """One record of WikiBio: the prompt is a passage, the target its next sentence."""
    fields = Fields(row)
    prompt, new = fields.text("text"), fields.text("labels").strip()
    probes = [CaseProbe("rewrite", prompt, (new,)), *_nested(fields, "locality")]
    edit = WantedEdit(prompt, fields.text("concept"), new)
    return build_case(row, f"knowedit_wikibio/{row.line}", "knowedit_wikibio", (edit,), tuple(probes))


def read_opinion(row: Row, peers: Sequence[Row], options: ReadOptions) -> EditCase:
    """One record of ConvSent: opinions on an entity; the next record supplies the unrelated entity."""
    fields = Fields(row)
    name = fields.text("ent")
    draw = random.Random(f"{options.seed}/{name}")
    sentiment = draw.choice(("positive", "negative"))
    opinions = {"positive": fields.texts("pos"), "negative": fields.texts("neg")}
    # Rows stand in the order of their lines, so the one after this begins where lines get larger.
    other = peers[bisect.bisect_right(peers, row.line, key=lambda peer: peer.line) % len(peers)]
    prompt = _OPINION_FRAMES[sentiment].format(draw.choice(_OPINION_QUESTIONS).format(name))
    target = next(iter(distinct(opinions[sentiment])), "")
    probes = [CaseProbe("generation", draw.choice(_OPINION_QUESTIONS).format(name))]
    for kind, texts in opinions.items():
        for text in distinct(texts):
            wanted = "same" if kind == sentiment else "opposite"
            probes.append(
                CaseProbe("opinion", draw.choice(_OPINION_QUESTIONS).format(name), (text,), kind=wanted)
            )
    if other is not row and not other.error and isinstance(other.value.get("ent"), str):
        strange = Fields(other)
        for text in distinct((*strange.texts("pos"), *strange.texts("neg"))):
            probes.append(
                CaseProbe("elsewhere", draw.choice(_OPINION_QUESTIONS).format(strange.text("ent")), (text,))
            )
    edit = WantedEdit(prompt, name, target)
    meta = {"sentiment": sentiment}
    return build_case(row, f"knowedit_convsent/{row.line}", "knowedit_convsent", (edit,), tuple(probes), meta)


def read_sanitation(rows: Sequence[Row], options: ReadOptions) -> list[EditCase]:
    """All cases of Sanitation: one per forgotten answer, as upstream runs it.

    The edits are the training questions (``K_F``) with that answer; success is asked on the test questions (``success``),
    locality on the test file's unrelated ones. Where only the training file is at hand, its own questions and its retain set
    (``K_R``) take their place.
    """
    sections: dict[str, list[Row]] = {}
    for row in rows:
        sections.setdefault(row.section, []).append(row)
    if "K_F" not in sections:
        raise DataError(
            "the test half of Sanitation names no subjects to edit; put the training half beside it, under the same name with "
            "'train' for 'test'",
            rows[0].file,
        )
    groups: dict[str, list[Fields]] = {}
    for row in sections["K_F"]:
        fields = Fields(row)
        groups.setdefault(fields.text("ground_truth").casefold(), []).append(fields)
    kept = [Fields(row) for row in sections.get("locality") or sections.get("K_R", [])]
    locality = [
        CaseProbe("locality", _framed(item), item.answers("ground_truth"), kind="continuation")
        for item in kept
    ]
    asked = [Fields(row) for row in sections.get("success", [])]
    cases = []
    for answer, items in groups.items():
        edits = tuple(
            WantedEdit(
                _framed(item), item.text("subject"), item.text("target_new"), item.answers("ground_truth")
            )
            for item in items
        )
        tests = [item for item in asked if item.text("ground_truth").casefold() == answer] or items
        probes = [
            CaseProbe("erase", _framed(item), (item.text("target_new").strip(),), item.text("ground_truth"))
            for item in tests
        ]
        probes += [CaseProbe("generation", probe.prompt) for probe in locality]
        row = items[0].row
        case = build_case(
            row,
            f"knowedit_sanitation/{answer}",
            "knowedit_sanitation",
            edits,
            (*probes, *locality),
            {"answer": answer},
        )
        cases.append(case)
    return cases


def check_sanitation(row: Row) -> None:
    """Raises ``DataError`` for a Sanitation record that lacks a field."""
    fields = Fields(row)
    fields.text("question")
    fields.text("ground_truth")
    if row.section == "K_F":
        fields.text("subject")
    if row.section in ("K_F", "success"):
        fields.text("target_new")


def _framed(fields: Fields) -> str:
    return _SANITATION_FRAME.format(fields.text("question"))


def _nested(fields: Fields, group: str) -> list[CaseProbe]:
    if not fields.has(group):
        return []
    part = fields.sub(group)
    probes: list[CaseProbe] = []
    for key in part.value:
        if not part.has(key):
            continue
        kind = re.sub(r"\W+", "_", key).strip("_").casefold()
        if isinstance(part.value[key], dict):
            lists = part.sub(key)
            prompts = lists.texts("prompt")
            truths = lists.value.get("ground_truth")
            if not isinstance(truths, list) or len(truths) != len(prompts):
                lists.fail(
                    f"{group}.{key}.ground_truth", f"a list as long as prompt ({len(prompts)})", truths
                )
            found = [
                (
                    prompt,
                    Fields(fields.row, {"ground_truth": truth}, f"{group}.{key}").answers("ground_truth"),
                )
                for prompt, truth in zip(prompts, truths, strict=True)
            ]
        else:
            items = part.subs(key, optional=True)
            found = [
                (prompt, item.answers("ground_truth")) for item in items for prompt in item.texts("prompt")
            ]
        probes += [CaseProbe(group, prompt, answers, kind=kind) for prompt, answers in found if answers]
    return probes
