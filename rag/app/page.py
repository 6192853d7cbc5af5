"""The page: ask with memory and with documents side by side, change a fact, ask again, undo. In words for everybody."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args

from lab.errors import KnowLabError
from rag.ledger.values import OnConflict

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
    "doc_wins": "Do not change the fact then",
    "ask": "Tell me first",
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
_KIND = {"direct": "answers it", "contextual": "is about it", "irrelevant": "is about something else"}
_CSS = """
.answer { font-size: 1.4rem; padding: .6rem 0; overflow-wrap: anywhere }
.quiet { opacity: .75 }
.kl td, .kl th { padding: .25rem .6rem; text-align: left; vertical-align: top; overflow-wrap: anywhere }
"""


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
            "# What does the model know?\nAsk a question. On the left the model answers from memory, on the right it reads "
            "your documents first. Then change a fact and ask again."
        )
        with gr.Row():
            question = gr.Textbox(
                label="Your question", placeholder="What is the capital of France?", scale=4
            )
            policy = gr.Dropdown(
                _POLICIES, value="context", label="Whom to believe when they disagree", scale=2
            )
        ask = gr.Button("Ask", variant="primary")
        with gr.Row(equal_height=False):
            with gr.Column(min_width=280):
                gr.Markdown("### From memory")
                memory = gr.HTML('<p class="quiet">Ask something first.</p>')
            with gr.Column(min_width=280):
                gr.Markdown("### With your documents")
                documents = gr.HTML('<p class="quiet">Ask something first.</p>')
        details = gr.HTML()
        password = gr.Textbox(
            label="Key for changes",
            type="password",
            visible=key.needed,
            placeholder="asked for by whoever runs this",
        )
        with gr.Accordion("Change a fact", open=True):
            with gr.Row():
                subject = gr.Textbox(label="Who or what", placeholder="France")
                relation = gr.Textbox(label="Which of its facts", placeholder="capital")
                new = gr.Textbox(label="New answer", placeholder="Rome")
            conflict = gr.Dropdown(
                [(_CONFLICTS[name], name) for name in get_args(OnConflict)],
                value="edit_wins",
                label="Documents that say something else",
            )
            with gr.Row():
                change = gr.Button("Change it", variant="primary")
                undo = gr.Button("Undo the last change")
            changed = gr.HTML()
        with gr.Accordion("Add a document", open=False):
            name = gr.Textbox(label="Its name", placeholder="my-notes.txt")
            text = gr.Textbox(label="Its text", lines=5, placeholder="The capital of France is Paris.")
            add = gr.Button("Add it")
            added = gr.HTML()

        def answer(asked: str, believed: str) -> tuple[str, str, str]:
            return answers(service, asked, believed)

        def apply(given: str, who: str, what: str, now: str, against: OnConflict) -> str:
            return guarded(key, given, lambda: _edit(service, who, what, now, against))

        def take_back(given: str) -> str:
            return guarded(key, given, lambda: _undo(service))

        def take_in(given: str, named: str, body: str) -> str:
            return guarded(key, given, lambda: _ingest(service, named, body))

        options: dict[str, Any] = {"api_visibility": "private"}
        shown = [memory, documents, details]
        for trigger in (ask.click, question.submit):
            trigger(answer, [question, policy], shown, **options)
        change.click(apply, [password, subject, relation, new, conflict], changed, **options)
        undo.click(take_back, [password], changed, **options)
        add.click(take_in, [password, name, text], added, **options)
    return page


def answers(service: Service, question: str, policy: str) -> tuple[str, str, str]:
    """What the page shows for a question: from memory, with documents, and who said what."""
    try:
        from_memory = service.ask(question, mode="memory", policy="memory")
        read = service.ask(question, mode="documents", policy=policy)
    except KnowLabError as error:
        return _problem(error), "", ""
    verdict = read["verdict"]
    told = _AGREEMENT[verdict["agreement"]]
    won = f"{told} Believed: {_WINNER[verdict['winner']]}."
    right = _answer(read["answer"], read["known"]) + f'<p class="quiet">{html.escape(won)}</p>'
    return _answer(from_memory["answer"], from_memory["known"]), right, _details(read)


def guarded(key: Key, given: str, work: Callable[[], str]) -> str:
    """What a change says of itself, when the key fits."""
    if not key.fits(given or ""):
        return _line("The key does not fit; nothing was changed.")
    try:
        return work()
    except KnowLabError as error:
        return _problem(error)


def _edit(service: Service, subject: str, relation: str, new: str, conflict: OnConflict) -> str:
    outcome = service.edit(subject, relation, new, on_conflict=conflict)
    against = len(outcome["conflicts"])
    found = f"{against} document{'s' if against != 1 else ''} said something else."
    if not outcome["done"]:
        return _line(f"Nothing was changed. {found}")
    hint = f" Ask again: {outcome['question']}" if outcome["question"] else ""
    return _line(f"Changed (number {outcome['entry']}). {found}{hint}")


def _undo(service: Service) -> str:
    outcome = service.undo()
    return _line(f"Change number {outcome['entry']} was taken back, in the model and in the documents.")


def _ingest(service: Service, name: str, text: str) -> str:
    outcome = service.ingest(name, text)
    hidden = len(outcome["hidden"])
    rest = f" {hidden} of them contradict a change and will not be shown." if hidden else ""
    return _line(f"Added {outcome['name']} in {outcome['chunks']} pieces.{rest}")


def _details(read: dict[str, Any]) -> str:
    notes = {note["document"]: note for note in read["notes"]}
    rows = []
    for number, (passage, voice) in enumerate(
        zip(read["passages"], read["verdict"]["context"], strict=True), start=1
    ):
        note = notes.get(number)
        kind = _KIND.get(note["kind"], "") if note else ""
        noted = f"{note['text']} ({kind})" if note else ""
        cells = (passage["source"], passage["text"], noted, voice["answer"] or "says nothing about it")
        rows.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
    ledger = read["verdict"]["ledger"]
    remark = ""
    if ledger is not None:
        remark = _line(
            f"This fact was changed here (number {ledger['entry']}): it was {ledger['before']}, it is now {ledger['answer']}."
        )
    if not rows:
        return remark + _line("No document was found for this question.")
    head = "".join(f"<th>{title}</th>" for title in ("Document", "Text", "The model's note", "It says"))
    return f'{remark}<table class="kl"><tr>{head}</tr>{"".join(rows)}</table>'


def _answer(text: str, known: bool) -> str:
    return f'<p class="answer">{html.escape(text) if known else "It does not know."}</p>'


def _line(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _problem(error: KnowLabError) -> str:
    return _line(f"That did not work: {error}")
