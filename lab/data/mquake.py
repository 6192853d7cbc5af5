"""MQuAKE (Zhong et al., 2023): one to four edits, three multi-hop questions, and the single hops on the way."""

from __future__ import annotations

from collections.abc import Sequence

from lab.data.building import ReadOptions, WantedEdit, build_case, fill
from lab.data.cases import CaseProbe, EditCase
from lab.data.fields import Fields
from lab.data.source import Row
from lab.data.text import distinct


def read_mquake(row: Row, peers: Sequence[Row], options: ReadOptions) -> EditCase:
    """One record of MQuAKE-CF, MQuAKE-T or a subset; extra keys (AKEW) are left alone.

    Probes: ``rewrite`` (one per edit, cloze), ``question`` (the same as a question), ``multi_hop`` (three wordings, new answer
    and aliases, old answer as rival), ``hop`` (each single hop after the edits).
    """
    fields = Fields(row)
    edits, probes = [], []
    for item in fields.subs("requested_rewrite"):
        prompt, subject = item.text("prompt"), item.text("subject")
        new, old = item.value_text("target_new").strip(), item.value_text("target_true").strip()
        edits.append(WantedEdit(prompt, subject, new, (old,)))
        probes.append(CaseProbe("rewrite", fill(prompt, subject), (new,), old))
        if item.has("question"):
            probes.append(CaseProbe("question", item.text("question"), (new,), old))
    answers = distinct([fields.text("new_answer"), *fields.texts("new_answer_alias", optional=True)])
    before = distinct([fields.text("answer"), *fields.texts("answer_alias", optional=True)])
    probes += [
        CaseProbe("multi_hop", text, answers, before[0] if before else "")
        for text in fields.texts("questions")
    ]
    for hop in fields.subs("new_single_hops", optional=True):
        spellings = distinct([hop.text("answer"), *hop.texts("answer_alias", optional=True)])
        probes.append(CaseProbe("hop", hop.text("cloze"), spellings, kind="cloze"))
    number = fields.value.get("case_id", row.line)
    # What the multi-hop questions answer without the edit, for those who ask whether the old chain is known.
    meta = {
        "old_answer": fields.text("answer"),
        "hops": str(len(fields.subs("new_single_hops", optional=True))),
    }
    return build_case(row, f"mquake/{number}", "mquake", tuple(edits), tuple(probes), meta)
