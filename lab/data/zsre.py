"""zsRE in MEND's schema, under either of its two conventions, and QAEdit."""

from __future__ import annotations

from collections.abc import Sequence

from lab.data.building import ReadOptions, WantedEdit, build_case
from lab.data.cases import CaseProbe, EditCase
from lab.data.fields import Fields
from lab.data.source import Row
from lab.errors import ConfigError

CONVENTIONS = ("easyedit", "rome")
_PREFIX = "nq question: "


def read_mend(row: Row, peers: Sequence[Row], options: ReadOptions) -> EditCase:
    """One record of ``zsre_mend_eval`` or ``zsre_mend_train``.

    ``easyedit``: the target is ``alt``, the old answer ``answers``, and the unrelated question is judged by agreement with the
    model before. ``rome``: the target is ``answers[0]``, nothing is known of the old answer, and the unrelated question is
    judged by its gold answer. The literal prefix ``nq question:``, which only a T5 was trained on, is taken off.
    """
    if options.convention not in CONVENTIONS:
        raise ConfigError(f"unknown zsRE convention {options.convention!r}; known: {', '.join(CONVENTIONS)}")
    fields = Fields(row)
    prompt, subject = fields.text("src"), fields.text("subject")
    truth, wrong = fields.answers("answers"), fields.text("alt").strip()
    if not truth:
        fields.fail("answers", "a non-empty list of strings", [])
    easyedit = options.convention == "easyedit"
    wanted = (wrong,) if easyedit else truth
    rival = truth[0] if easyedit else ""
    probes = [CaseProbe("rewrite", prompt, wanted, rival)]
    probes += [CaseProbe("paraphrase", text, wanted, rival) for text in fields.texts("rephrase")]
    locality = fields.text("loc").removeprefix(_PREFIX).strip()
    probes.append(CaseProbe("locality", locality, fields.answers("loc_ans"), kind="neighborhood"))
    if easyedit and fields.has("portability"):
        hop = fields.sub("portability")
        probes.append(
            CaseProbe("portability", hop.text("New Question"), hop.answers("New Answer"), kind="reasoning")
        )
    edit = WantedEdit(prompt, subject, wanted[0], truth if easyedit else ())
    return build_case(
        row, f"zsre/{row.line}", "zsre", (edit,), tuple(probes), {"convention": options.convention}
    )


def read_qaedit(row: Row, peers: Sequence[Row], options: ReadOptions) -> EditCase:
    """One record of QAEdit: the target is the true answer to a real question."""
    fields = Fields(row)
    prompt = fields.text("prompt")
    # Some targets end in a stray asterisk, a leftover of the table they were scraped from.
    target = fields.text("target").strip().removesuffix("*").strip()
    probes = [CaseProbe("rewrite", prompt, (target,))]
    probes += [CaseProbe("paraphrase", text, (target,)) for text in fields.texts("rephrase")]
    for item in fields.subs("locality", optional=True):
        probes.append(CaseProbe("locality", item.text("loc"), item.answers("loc_ans"), kind="neighborhood"))
    number = fields.value.get("id", row.line)
    edit = WantedEdit(prompt, fields.text("subject"), target)
    return build_case(row, f"qaedit/{fields.text('source', '')}{number}", "qaedit", (edit,), tuple(probes))
