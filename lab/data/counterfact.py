"""CounterFact (Meng et al., 2022) in its own schema, in EasyEdit's flat one, with SADR's probes, and as questions."""

from __future__ import annotations

from collections.abc import Sequence

from lab.data.building import ReadOptions, WantedEdit, build_case, fill
from lab.data.cases import CaseProbe, EditCase
from lab.data.fields import Fields
from lab.data.source import Row

# Groups of SADR's file, and the answer each competes with (`my_evaluate.py` of its release): a rewriting prompt against the old
# object of the edit, a locality prompt against the new one.
_SADR_GROUPS = (
    ("p-paraphrase", "paraphrase", "", "old"),
    ("p-reasoning", "portability", "reasoning", "old"),
    ("p-subject_alias", "portability", "subject_alias", "old"),
    ("l-neighbor", "neighborhood", "", "new"),
    ("l-relation", "relation", "", "new"),
)


def read_rome(row: Row, peers: Sequence[Row], options: ReadOptions) -> EditCase:
    """One record of the original schema: ``requested_rewrite.target_new.str`` and lists of prompts."""
    fields = Fields(row)
    rewrite = fields.sub("requested_rewrite")
    prompt, subject = rewrite.text("prompt"), rewrite.text("subject")
    new, old = rewrite.value_text("target_new").strip(), rewrite.value_text("target_true").strip()
    probes = [
        CaseProbe("rewrite", fill(prompt, subject), (new,), old),
        *(CaseProbe("paraphrase", text, (new,), old) for text in fields.texts("paraphrase_prompts")),
        *(CaseProbe("neighborhood", text, (old,), new) for text in fields.texts("neighborhood_prompts")),
        *(
            CaseProbe("attribute", text, (new,), old)
            for text in fields.texts("attribute_prompts", optional=True)
        ),
        *(CaseProbe("generation", text) for text in fields.texts("generation_prompts", optional=True)),
    ]
    meta = {"relation": rewrite.text("relation_id", "")}
    edit = WantedEdit(prompt, subject, new, (old,))
    return build_case(row, _id(fields, "counterfact"), "counterfact", (edit,), tuple(probes), meta)


def read_flat(row: Row, peers: Sequence[Row], options: ReadOptions) -> EditCase:
    """One record of EasyEdit's flat form: filled prompts, ``ground_truth`` is the old object."""
    fields = Fields(row)
    prompt = fields.text("prompt")
    new, old = fields.text("target_new").strip(), fields.text("ground_truth").strip()
    probes = [CaseProbe("rewrite", prompt, (new,), old)]
    probes += [
        CaseProbe("paraphrase", text, (new,), old) for text in fields.texts("rephrase_prompt", optional=True)
    ]
    locality = fields.texts("locality_prompt", optional=True)
    if locality:
        truths = fields.texts("locality_ground_truth")
        if len(truths) != len(locality):
            fields.fail(
                "locality_ground_truth", f"as long as locality_prompt ({len(locality)})", list(truths)
            )
        probes += [
            CaseProbe("neighborhood", text, (truth,), new)
            for text, truth in zip(locality, truths, strict=True)
        ]
    edit = WantedEdit(prompt, fields.text("subject"), new, (old,))
    return build_case(row, _id(fields, "counterfact"), "counterfact_flat", (edit,), tuple(probes))


def read_questions(row: Row, peers: Sequence[Row], options: ReadOptions) -> EditCase:
    """One record of the question form: ``answer`` is the *new* object, the old one is not given."""
    fields = Fields(row)
    prompt, new = fields.text("question"), fields.text("answer").strip()
    probes = (
        CaseProbe("rewrite", prompt, (new,)),
        CaseProbe("paraphrase", fields.text("qna_question"), (new,)),
    )
    edit = WantedEdit(prompt, fields.text("subject"), new)
    return build_case(row, _id(fields, "counterfact", "case_index"), "counterfact_questions", (edit,), probes)


def read_sadr(row: Row, peers: Sequence[Row], options: ReadOptions) -> EditCase:
    """One record of SADR's merged file: both families, filled prompts, ``prompts`` beside ``targets``."""
    fields = Fields(row)
    rewrite = fields.sub("requested_rewrite")
    prompt = rewrite.text("prompt")
    new, old = rewrite.value_text("target_new").strip(), rewrite.value_text("target_true").strip()
    rival = {"old": old, "new": new}
    probes = _pairs(fields, "rewrite", "rewrite", "", old)
    for key, group, kind, other in _SADR_GROUPS:
        if fields.has(key):
            probes += _pairs(fields, key, group, kind, rival[other])
    if fields.has("generation"):
        probes += [CaseProbe("generation", text) for text in fields.sub("generation").texts("prompts")]
    if fields.has("o-commonsense"):
        sense = fields.sub("o-commonsense")
        right, wrong = sense.text("right").strip(), sense.text("wrong").strip()
        probes += [CaseProbe("commonsense", text, (right,), wrong) for text in sense.texts("prompts")]
    family = "wikidata" if fields.has("l-relation") or not fields.has("l-neighbor") else "counterfact"
    edit = WantedEdit(prompt, rewrite.text("subject"), new, (old,))
    return build_case(row, f"sadr/{row.line}", "sadr", (edit,), tuple(probes), {"family": family})


def _pairs(fields: Fields, key: str, group: str, kind: str, rival: str) -> list[CaseProbe]:
    part = fields.sub(key)
    prompts, targets = part.texts("prompts"), part.texts("targets")
    if len(prompts) != len(targets):
        fields.fail(
            f"{key}.targets", f"as long as {key}.prompts ({len(prompts)}, not {len(targets)})", list(targets)
        )
    return [
        CaseProbe(group, prompt, (target.strip(),), rival, kind)
        for prompt, target in zip(prompts, targets, strict=True)
        if target.strip()
    ]


def _id(fields: Fields, suite: str, key: str = "case_id") -> str:
    number = fields.value.get(key)
    if number is not None and not isinstance(number, (int, str)):
        fields.fail(key, "a number", number)
    return f"{suite}/{fields.row.line if number is None else number}"
