"""The page in headless Chromium, on a laptop and on a phone: the whole story clicked through."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.handle import ModelHandle
from rag.app.api import create_app
from rag.app.service import Service, pieces
from rag.ledger import HandleWeights, Ledger
from rag.store import MemoryStore

QUESTION = "What is the capital of France?"
SIZES = {"laptop": (1280, 800), "phone": (390, 844)}


def chromium() -> str:
    """Path of Chromium: ``KNOWLAB_CHROMIUM``, else the one on PATH; skips the test where there is none."""
    named = os.environ.get("KNOWLAB_CHROMIUM", "")
    if named:
        assert Path(named).is_file(), f"KNOWLAB_CHROMIUM names no file: {named}"
        return named
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on PATH and none in KNOWLAB_CHROMIUM; `make browser` installs one")
    return found


@pytest.fixture
def page(request) -> Iterator:
    """An open browser page of the wanted size; nothing on it may fail, and it may ask no other machine for anything."""
    api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed; `make browser` installs it"
    )
    path, (width, height) = chromium(), SIZES[request.param]
    troubles: list[str] = []

    def look(request) -> None:
        if not request.url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            troubles.append(f"asked for {request.url}")

    with api.sync_playwright() as playwright:
        # The sandbox needs a user of its own, which containers do not give; the page is ours.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        opened = browser.new_page(viewport={"width": width, "height": height})
        opened.set_default_timeout(60_000)
        api.expect.set_options(timeout=60_000)
        opened.on("request", look)
        opened.on("pageerror", lambda error: troubles.append(str(error)))
        yield opened
        browser.close()
    assert troubles == []


@pytest.fixture
def address(atlas, tmp_path) -> Iterator[str]:
    """A server with the built-in model and three documents, one of which lies."""
    handle = ModelHandle.load("atlas")
    texts = {
        "france.txt": "The capital of France is Paris.",
        "kenya.txt": "The capital of Kenya is Oslo.",
        "markup.txt": "The currency of Japan is <img src=x onerror='document.title=1'>.",
    }
    store = MemoryStore([chunk for name, text in texts.items() for chunk in pieces(name, text)])
    import uvicorn

    with Ledger(tmp_path / "ledger", store, HandleWeights(handle)) as ledger:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        app = create_app(Service(handle, store, ledger), token=None)
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        deadline = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < deadline and thread.is_alive(), "the server did not start"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/"
        server.should_exit = True
        thread.join(20)


@pytest.mark.parametrize("page", SIZES, indirect=True)
def test_the_whole_story_is_clicked_through(page, address, atlas, tmp_path):
    from playwright.sync_api import expect

    def ask(question: str, *, shows: str) -> None:
        page.get_by_label("Your question").fill(question)
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.locator("#details")).to_contain_text(shows)

    def fits_the_screen() -> None:
        wide, screen = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= screen, f"the page is {wide} wide on a screen of {screen}"

    memory, documents, details = (page.locator(f"#{name}") for name in ("memory", "documents", "details"))
    changed, in_force = page.locator("#changed"), page.locator("#in_force")
    page.goto(address)
    expect(memory).to_contain_text("Ask something first")
    expect(in_force).to_contain_text("No fact is changed")
    fits_the_screen()

    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator("#problem")).to_contain_text("Type a question first")
    page.get_by_role("button", name="Undo").click()
    expect(changed).to_contain_text("nothing to undo")
    page.get_by_role("button", name="Change it").click()
    expect(changed).to_contain_text("Fill in")

    ask(QUESTION, shows="france.txt")
    expect(page.locator("#problem")).to_be_empty()
    expect(details).to_contain_text("Attention: ")
    expect(documents).to_contain_text("Believed: ")
    if atlas:
        expect(memory).to_contain_text("Paris")
        expect(documents).to_contain_text("Memory and documents say the same.")
        ask("What is the capital of Kenya?", shows="says: Oslo")
        expect(memory).to_contain_text("Nairobi")
        expect(documents).to_contain_text("contradict")

    for label, text in (("Who or what", "France"), ("Which of its facts", "capital"), ("New answer", "Rome")):
        page.get_by_label(label, exact=True).fill(text)
    page.get_by_role("button", name="Change it").click()
    expect(changed).to_contain_text("Changed (number 1)")
    expect(changed).to_contain_text("france.txt says Paris: it is hidden from now on")
    expect(in_force).to_contain_text("France, capital: Paris → Rome")
    ask(QUESTION, shows="it was Paris, it is now Rome")
    expect(details).not_to_contain_text("france.txt")
    if atlas:
        expect(memory).to_contain_text("Rome")
    fits_the_screen()

    page.get_by_role("button", name="Undo").click()
    expect(changed).to_contain_text("Change number 1 was taken back")
    expect(in_force).to_contain_text("No fact is changed")
    ask(QUESTION, shows="france.txt")
    if atlas:
        expect(memory).to_contain_text("Paris")

    page.get_by_text("Add a document").click()
    page.get_by_label("Its name").fill("../escape.txt")
    page.get_by_label("Its text").fill("The capital of Norway is Rome.")
    page.get_by_role("button", name="Add it").click()
    expect(page.locator("#added")).to_contain_text("cannot name a document")
    page.get_by_label("Its name").fill("norway.txt")
    page.get_by_role("button", name="Add it").click()
    expect(page.locator("#added")).to_contain_text("Added norway.txt: 1 piece.")
    ask("What is the capital of Norway?", shows="norway.txt")
    # What a document holds is text, never a part of the page.
    ask("What is the currency of Japan?", shows="<img src=x")
    assert page.title() == "KnowLab"
    fits_the_screen()
    shot = tmp_path / "page.png"
    page.screenshot(path=shot, full_page=True)
    assert shot.stat().st_size > 10_000
