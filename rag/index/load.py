"""Files of a folder as documents: text, Markdown, HTML, PDF, and JSONL with a document a line.

A file that cannot be read is a problem that names it; it never stops the others, and what an index holds of it stays. Nothing outside
the folder is read: links that lead out are problems.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from lab.errors import ConfigError, DataError, MissingDependencyError
from lab.records import Trust
from rag.store import CONTAINS, FIELDS, TRUSTS, Value

SIZE_LIMIT = 50 * 2**20
"""Bytes of the largest file that is read, and characters of the longest text that is taken from one."""

_BOMS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
_HIDDEN_TAGS = ("script", "style", "noscript", "template", "head")


@dataclass(frozen=True)
class Document:
    """A text and where it is from.

    Attributes:
        source: Its name: the folder's name and the path below it, and the row's after a ``#``.
        text: What it says.
        kind: ``text``, ``markdown``, ``html``, ``pdf`` or ``jsonl``.
        trust: How far it is believed, where it says so.
        extra: Further fields, as a chunk has them.
    """

    source: str
    text: str
    kind: str
    trust: Trust | None = None
    extra: Mapping[str, Value] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Problem:
    """A file or row that was not read.

    Attributes:
        source: Its name, as a document has it.
        reason: What is wrong and what to do.
    """

    source: str
    reason: str


@dataclass(frozen=True)
class Found:
    """What a folder holds.

    Attributes:
        documents: By name.
        problems: Files and rows that were not read.
        skipped: Files of other kinds.
    """

    documents: tuple[Document, ...]
    problems: tuple[Problem, ...]
    skipped: tuple[str, ...]


def read_folder(
    folder: str | Path, *, name: str = "", trust: Trust | None = None, size_limit: int = SIZE_LIMIT
) -> Found:
    """Reads every file below a folder, or one file.

    Args:
        folder: The folder; files and folders whose names begin with a dot are left out.
        name: Begins the sources; the folder's own name without it.
        trust: Trust of every document that does not state its own.
        size_limit: Bytes of the largest file that is read.

    Raises:
        ConfigError: There is no such folder.
    """
    root = Path(folder).expanduser().resolve()
    if not root.exists():
        raise ConfigError(f"no such folder: {folder}")
    label = name or root.name
    documents: list[Document] = []
    problems: list[Problem] = []
    skipped: list[str] = []
    for path in _files(root):
        below = "" if path == root else "/" + path.relative_to(root).as_posix()
        source = f"{label}{below}"
        reader = READERS.get(path.suffix.lower())
        if reader is None:
            skipped.append(_shown(source))
            continue
        try:
            _check_path(path, root, source)
            data = _bytes(path, size_limit)
            for item in reader(data, source):
                if isinstance(item, Problem):
                    problems.append(item)
                else:
                    documents.append(
                        item if item.trust else Document(item.source, item.text, item.kind, trust, item.extra)
                    )
        except DataError as error:
            problems.append(Problem(_shown(source), str(error)))
        except OSError as error:
            problems.append(Problem(_shown(source), f"cannot be read: {error.strerror or error}"))
    return Found(tuple(documents), tuple(problems), tuple(skipped))


def _files(root: Path) -> Iterator[Path]:
    if root.is_file():
        yield root
        return
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(folder) / name


def _check_path(path: Path, root: Path, source: str) -> None:
    if not path.resolve().is_relative_to(root):
        raise DataError("is a link to a place outside the folder; copy the file into it")
    if _shown(source) != source:
        raise DataError("has a name with control characters or bytes that are no text; rename it")
    if not path.is_file():
        raise DataError("is not a plain file")


def _shown(source: str) -> str:
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in source)


def _bytes(path: Path, size_limit: int) -> bytes:
    with path.open("rb") as file:
        data = file.read(size_limit + 1)
    if len(data) > size_limit:
        raise DataError(f"is larger than {size_limit:,} bytes; split it, or raise the limit")
    if not data.strip():
        raise DataError("is empty")
    return data


def decoded(data: bytes) -> str:
    """Text of bytes in UTF-8, or in UTF-16 with its mark.

    Raises:
        DataError: They are neither, or hold what no text holds.
    """
    encoding = next((name for mark, name in _BOMS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        what = "is binary" if b"\0" in data[:8192] else f"is not {encoding} text (byte {error.start})"
        raise DataError(f"{what}; store it as UTF-8") from None
    return _checked(text)


def _checked(text: str) -> str:
    if "\0" in text:
        raise DataError("is binary; a text holds no zero bytes")
    if not text.strip():
        raise DataError("is empty")
    if len(text) > SIZE_LIMIT:
        raise DataError(f"holds more than {SIZE_LIMIT:,} characters; split it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"holds half a character at place {error.start}; store it as UTF-8") from None
    return text


Item = Document | Problem


def _text(data: bytes, source: str) -> Iterator[Item]:
    yield Document(source, decoded(data), "text")


def _markdown(data: bytes, source: str) -> Iterator[Item]:
    yield Document(source, decoded(data), "markdown")


def _html(data: bytes, source: str) -> Iterator[Item]:
    try:
        from bs4 import BeautifulSoup
        from bs4.dammit import EncodingDetector
    except ImportError:
        raise MissingDependencyError("beautifulsoup4", "reading HTML", "app") from None
    try:
        written = decoded(data)
    except DataError:
        # A page may name another encoding in its head.
        named = EncodingDetector.find_declared_encoding(data, is_html=True)
        try:
            written = _checked(data.decode(named or "utf-8"))
        except (UnicodeDecodeError, LookupError):
            raise DataError(f"is not text in {named or 'UTF-8'}; store it as UTF-8") from None
    try:
        page = BeautifulSoup(written, "html.parser")
        title = page.title.get_text(" ", strip=True) if page.title else ""
        for tag in page(_HIDDEN_TAGS):
            tag.decompose()
        lines = page.get_text("\n").splitlines()
    except RecursionError:
        raise DataError("is nested too deeply for a page; store its text instead") from None
    text = "\n".join(" ".join(line.split()) for line in lines if line.strip())
    yield Document(source, _checked(text), "html", extra={"title": title} if title else {})


def _pdf(data: bytes, source: str) -> Iterator[Item]:
    import io
    import logging

    try:
        from pypdf import PdfReader
    except ImportError:
        raise MissingDependencyError("pypdf", "reading PDF", "app") from None
    log = logging.getLogger("pypdf")
    before = log.level
    log.setLevel(logging.CRITICAL)
    pages: list[str] = []
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise DataError("is a PDF with a password; store it without")
        for page in reader.pages:
            pages.append(page.extract_text())
            if sum(map(len, pages)) > SIZE_LIMIT:
                raise DataError(f"holds more than {SIZE_LIMIT:,} characters; split it")
    except DataError:
        raise
    # A damaged file makes the library fail in any way there is.
    except Exception as error:
        raise DataError(f"is no PDF that can be read: {type(error).__name__}: {error}") from error
    finally:
        log.setLevel(before)
    text = "\n\n".join(page.replace("\0", "").strip() for page in pages)
    if not text.strip():
        raise DataError("is a PDF without text, perhaps of scanned pages; run text recognition on it first")
    yield Document(source, _checked(text.encode("utf-8", "replace").decode("utf-8")), "pdf")


def _jsonl(data: bytes, source: str) -> Iterator[Item]:
    seen: set[str] = set()
    for number, line in enumerate(decoded(data).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            document = _row(json.loads(line), source, number)
            if document.source in seen:
                raise DataError(f"the id {document.source.rpartition('#')[2]!r} occurs twice")
            seen.add(document.source)
            yield document
        except json.JSONDecodeError as error:
            yield Problem(f"{source}#{number}", f"not JSON: {error.msg} at column {error.colno}")
        except (DataError, RecursionError) as error:
            yield Problem(f"{source}#{number}", str(error))


def _row(row: Any, source: str, number: int) -> Document:
    """A document of one row: ``text``, and if wanted ``id``, ``trust`` and further plain fields."""
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise DataError("a row must be an object with a field 'text'")
    name = str(row.get("id", number))
    parts = name.replace("\\", "/").split("/")
    if not name or not name.isprintable() or ".." in parts or name.startswith(("/", "\\")):
        raise DataError(
            f"the id {name[:80]!r} is no name: it is empty, leads out of the folder or holds control characters"
        )
    trust = row.get("trust")
    if trust is not None and trust not in TRUSTS:
        raise DataError(f"trust {trust!r} is not one of {', '.join(TRUSTS)}")
    extra: dict[str, Value] = {}
    for key, value in row.items():
        if key in (*FIELDS, CONTAINS):
            continue
        whole = isinstance(value, list) and value and all(isinstance(item, str) for item in value)
        if whole or (isinstance(value, (str, bool, float)) and value == value):
            extra[key] = tuple(value) if isinstance(value, list) else value
        elif isinstance(value, int) and abs(value) < 2**63:
            extra[key] = value
    return Document(f"{source}#{name}", _checked(row["text"]), "jsonl", cast("Trust | None", trust), extra)


READERS: Mapping[str, Callable[[bytes, str], Iterator[Item]]] = {
    ".txt": _text, ".text": _text, ".md": _markdown, ".markdown": _markdown, ".htm": _html, ".html": _html,
    ".pdf": _pdf, ".jsonl": _jsonl,
}  # fmt: skip
"""File endings that are read."""
