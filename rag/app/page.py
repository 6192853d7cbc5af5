"""The page: ask with memory and with documents side by side, change a fact, ask again, undo. In words for everybody."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast, get_args

from lab.errors import KnowLabError
from rag.ledger.values import OnConflict
from rag.verdict import same_answer

if TYPE_CHECKING:
    from fastapi import FastAPI

    from rag.app.api import Key
    from rag.app.service import Service

_POLICIES = [
    ("The documents", "context"),
    ("What the model remembers", "memory"),
    ("The most trusted document", "trust"),
    ("The change that was made here", "ledger"),
]
_CONFLICTS = {
    "edit_wins": "Hide them from now on",
    "annotate": "Show them with a remark",
    "rewrite": "Correct a copy of them",
    "doc_wins": "Keep them, and leave the fact as it is",
    "ask": "Change nothing yet, show them to me",
}
_DEALT = {
    "edit_wins": "it is hidden from now on",
    "annotate": "it is shown with a remark from now on",
    "rewrite": "a corrected copy is shown instead",
}
_AGREEMENT = {
    "agree": "Memory and documents say the same.",
    "conflict": "The documents contradict what the model remembers.",
    "documents_differ": "The documents contradict each other.",
    "documents_only": "Only the documents know; the model does not remember it.",
    "memory_only": "No document says anything about it.",
    "silent": "Neither the model nor a document knows it.",
}
_WINNER = {
    "both": "both together",
    "documents": "the documents",
    "memory": "the model's memory",
    "ledger": "the change that was made here",
    "nobody": "nobody",
}
_KIND = {
    "direct": "it holds the answer",
    "contextual": "it is related",
    "irrelevant": "it is about something else",
}
_CSS = """
.kl { overflow-wrap: anywhere }
.kl p { margin: .25rem 0 }
.answer { font-size: 1.4rem; padding: .2rem 0 }
.quiet { opacity: .75 }
.problem { border-left: 4px solid #dc2626; padding: .4rem .8rem; margin: .4rem 0 }
.card { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .7rem 1rem; margin: .6rem 0 }
.card .top { display: flex; flex-wrap: wrap; gap: .2rem 1rem; justify-content: space-between }
.bar { background: var(--border-color-primary); border-radius: 4px; height: .45rem; margin: .25rem 0 }
.bar div { background: var(--color-accent); border-radius: 4px; height: 100% }
"""
_FIRST = '<div class="kl"><p class="quiet">Ask something first.</p></div>'


def mount(app: FastAPI, service: Service, key: Key) -> FastAPI:
    """Puts the page under ``/page`` of an application."""
    import gradio

    return gradio.mount_gradio_app(
        app, build_page(service, key), path="/page", footer_links=[], css=_CSS, ssr_mode=False
    )


def build_page(service: Service, key: Key) -> Any:
    """The page as Gradio blocks; what it does goes through the service, as everything from the API does."""
    import gradio as gr

    with gr.Blocks(title="KnowLab", analytics_enabled=False) as page:
        gr.Markdown(
            "# What does the model know?\nAsk a question. The model answers it twice: from memory alone, and after it has read "
            "your documents. Then change a fact in its memory, ask again, and take the change back."
        )
        with gr.Row():
            question = gr.Textbox(
                label="Your question", placeholder="What is the capital of France?", scale=4, min_width=280
            )
            policy = gr.Dropdown(
                _POLICIES, value="context", label="Whom to believe when they disagree", scale=2, min_width=280
            )
        ask = gr.Button("Ask", variant="primary")
        problem = gr.HTML(padding=False, elem_id="problem")
        with gr.Row(equal_height=False):
            with gr.Column(min_width=280):
                gr.Markdown("### From memory")
                memory = gr.HTML(_FIRST, padding=False, elem_id="memory")
            with gr.Column(min_width=280):
                gr.Markdown("### With your documents")
                documents = gr.HTML(_FIRST, padding=False, elem_id="documents")
        details = gr.HTML(padding=False, elem_id="details")
        password = gr.Textbox(
            label="Key for changes",
            type="password",
            visible=key.needed,
            placeholder="asked for by whoever runs this",
        )
        with gr.Accordion("Change a fact", open=True):
            with gr.Row():
                subject = gr.Textbox(label="Who or what", placeholder="France", min_width=220)
                relation = gr.Textbox(label="Which of its facts", placeholder="capital", min_width=220)
                new = gr.Textbox(label="New answer", placeholder="Rome", min_width=220)
            conflict = gr.Dropdown(
                [(_CONFLICTS[name], name) for name in get_args(OnConflict)],
                value="edit_wins",
                label="Documents that say something else",
            )
            with gr.Accordion("Only if the fact is not found", open=False), gr.Row():
                before = gr.Textbox(label="What has been right so far", placeholder="Jane Roe", min_width=220)
                sentence = gr.Textbox(
                    label="A sentence that the answer completes, with {} for who or what",
                    placeholder="The mayor of {} is",
                    min_width=220,
                )
            with gr.Row():
                change = gr.Button("Change it", variant="primary", min_width=220)
                undo = gr.Button("Undo the last change", min_width=220)
            changed = gr.HTML(padding=False, elem_id="changed")
            in_force = gr.HTML(padding=False, elem_id="in_force")
        with gr.Accordion("Add a document", open=False):
            name = gr.Textbox(label="Its name", placeholder="my-notes.txt")
            text = gr.Textbox(label="Its text", lines=5, placeholder="The capital of France is Paris.")
            add = gr.Button("Add it")
            added = gr.HTML(padding=False, elem_id="added")

        # A field that was never shown, or was emptied, comes as None.
        def answer(asked: str | None, believed: str) -> tuple[str, str, str, str]:
            return answers(service, asked or "", believed)

        def apply(given: str | None, *fields: str | None) -> tuple[str, str]:
            filled = [field or "" for field in fields]
            return guarded(key, given or "", lambda: _edit(service, *filled)), changes(service)

        def take_back(given: str | None) -> tuple[str, str]:
            return guarded(key, given or "", lambda: _undo(service)), changes(service)

        def take_in(given: str | None, named: str | None, body: str | None) -> str:
            return guarded(key, given or "", lambda: _ingest(service, named or "", body or ""))

        def look() -> str:
            return changes(service)

        options: dict[str, Any] = {"api_visibility": "private"}
        shown = [problem, memory, documents, details]
        for trigger in (ask.click, question.submit):
            trigger(answer, [question, policy], shown, **options)
        fields = [password, subject, relation, new, conflict, before, sentence]
        change.click(apply, fields, [changed, in_force], **options)
        undo.click(take_back, [password], [changed, in_force], **options)
        add.click(take_in, [password, name, text], added, **options)
        page.load(look, None, in_force, **options)
    return page


def answers(service: Service, question: str, policy: str) -> tuple[str, str, str, str]:
    """What the page shows for a question: what went wrong, the answer from memory, that with documents, and who said what."""
    if not question.strip():
        return _trouble("Type a question first."), _FIRST, _FIRST, ""
    try:
        from_memory = service.ask(question, mode="memory", policy="memory")
        read = service.ask(question, mode="documents", policy=policy, attention=True)
    except KnowLabError as error:
        return _problem(error), _FIRST, _FIRST, ""
    verdict = read["verdict"]
    believed = verdict["winner"] != "nobody"
    told = f"{_AGREEMENT[verdict['agreement']]} Believed: {_WINNER[verdict['winner']]}."
    lines = [_answer(verdict["answer"], believed), f'<p class="quiet">{html.escape(told)}</p>']
    if read["known"] and not same_answer(read["answer"], verdict["answer"]):
        # All documents at once may say another thing than each alone.
        mixed = f"Asked with all documents at once, the model wrote: {read['answer']}."
        lines.append(f'<p class="quiet">{html.escape(mixed)}</p>')
    left = _box(_answer(from_memory["answer"], from_memory["known"]))
    return "", left, _box("".join(lines)), _details(read)


def changes(service: Service) -> str:
    """The changes in force as the page lists them."""
    rows = [
        f"{one['subject']}, {one['relation']}: {one['before']} → {one['now']} (number {one['entry']})"
        for one in service.changes()
    ]
    if not rows:
        return _box('<p class="quiet">No fact is changed at the moment.</p>')
    items = "".join(f"<li>{html.escape(row)}</li>" for row in rows)
    return _box(f"<p><b>Changed at the moment</b></p><ul>{items}</ul>")


def guarded(key: Key, given: str, work: Callable[[], str]) -> str:
    """What a change says of itself, when the key fits."""
    if not key.fits(given):
        return _trouble("The key does not fit; nothing was changed.")
    try:
        return work()
    except KnowLabError as error:
        return _problem(error)


def _edit(
    service: Service, subject: str, relation: str, new: str, conflict: str, before: str, sentence: str
) -> str:
    if not (subject.strip() and relation.strip() and new.strip()):
        return _trouble("Fill in who or what, which of its facts, and the new answer.")
    outcome = service.edit(
        subject,
        relation,
        new,
        object=before.strip(),
        prompt=sentence.strip(),
        on_conflict=cast("OnConflict", conflict),
    )
    against = [one for one in outcome["conflicts"] if one["label"] in ("states_old", "states_other")]
    dealt = f": {_DEALT[conflict]}" if outcome["done"] and conflict in _DEALT else ""
    items = "".join(
        f"<li>{html.escape(one['source'])} says {html.escape(str(one['value']))}{dealt}</li>"
        for one in against
    )
    found = f"<ul>{items}</ul>" if items else _line("No document said something else.")
    if not outcome["done"]:
        return _box(_line("Nothing was changed.") + found)
    hint = f" Now ask again: {outcome['question']}" if outcome["question"] else " Now ask again."
    return _box(_line(f"Changed (number {outcome['entry']}).{hint}") + found)


def _undo(service: Service) -> str:
    outcome = service.undo()
    return _box(
        _line(
            f"Change number {outcome['entry']} was taken back, in the model and in the documents. Now ask again."
        )
    )


def _ingest(service: Service, name: str, text: str) -> str:
    if not (name.strip() and text.strip()):
        return _trouble("Give the document a name and a text.")
    outcome = service.ingest(name, text)
    count, hidden = outcome["chunks"], len(outcome["hidden"])
    rest = f" Not shown, because of what was changed or forgotten here: {hidden}." if hidden else ""
    return _box(_line(f"Added {outcome['name']}: {count} piece{'s' if count != 1 else ''}.{rest}"))


def _details(read: dict[str, Any]) -> str:
    ledger = read["verdict"]["ledger"]
    top = ""
    if ledger is not None:
        top = _line(
            f"This fact was changed here (number {ledger['entry']}): it was {ledger['before']}, it is now {ledger['answer']}."
        )
    if not read["passages"]:
        return _box(top + _line("No document was found for this question. You can add one below."))
    notes = {note["document"]: note for note in read["notes"]}
    most = max(read["attention"], default=0.0) or 1.0
    cards = []
    for number, (passage, voice, share) in enumerate(
        zip(read["passages"], read["verdict"]["context"], read["attention"], strict=True), start=1
    ):
        says = f"says: {voice['answer']}" if voice["answer"] else "says nothing about it"
        trust = f" ({passage['trust']})" if passage["trust"] else ""
        lines = [
            f'<div class="top"><b>{html.escape(passage["source"] + trust)}</b><span>{html.escape(says)}</span></div>',
            _line(passage["text"]),
        ]
        if note := notes.get(number):
            noted = f"The model's note: {note['text']} ({_KIND.get(note['kind'], note['kind'])})"
            lines.append(f'<p class="quiet">{html.escape(noted)}</p>')
        lines.append(
            f'<p class="quiet">Attention: {share:.1%}</p><div class="bar"><div style="width: {share / most:.0%}"></div></div>'
        )
        cards.append(f'<div class="card">{"".join(lines)}</div>')
    head = (
        "<p><b>What it read</b></p>"
        '<p class="quiet">Attention is the share of its looking that the model spent on a text when it began to answer; '
        "the rest went to the question and to the other words around.</p>"
    )
    return _box(top + head + "".join(cards))


def _answer(text: str, known: bool) -> str:
    return f'<p class="answer">{html.escape(text) if known else "It does not know."}</p>'


def _line(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _box(content: str) -> str:
    return f'<div class="kl">{content}</div>'


def _trouble(text: str) -> str:
    return f'<div class="kl problem" role="alert">{html.escape(text)}</div>'


def _problem(error: KnowLabError) -> str:
    return _trouble(f"That did not work: {' '.join(str(error).split())}")
