"""Where general text comes from: the built-in world, a file, or a Hugging Face data set."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.errors import ConfigError, DataError, MissingDependencyError

if TYPE_CHECKING:
    from lab.handle import ModelHandle

CORPUS_FILE = "corpus.txt"
"""A text file of this name beside a model's weights is that model's own corpus."""

_PROBE = 64
_SHUFFLE_SEED = 0
_SHUFFLE_BUFFER = 10_000


@dataclass(frozen=True)
class TextSource:
    """A named stream of documents that starts anew each time it is asked.

    Attributes:
        id: Names the content, not only the place: a changed file or data set has another id.
        make: Starts the stream.
        warning: What a reader of the result should know about the choice, or empty.
    """

    id: str
    make: Callable[[], Iterator[str]]
    warning: str = ""

    def texts(self) -> Iterator[str]:
        """The documents, empty ones left out; may be endless."""
        return (text for text in self.make() if text.strip())


def text_source(spec: str, handle: ModelHandle | None = None) -> TextSource:
    """Finds a text source by its spelling.

    Args:
        spec: ``"atlas"`` (documents of the built-in world, endless), the path of a text or JSONL file,
            ``"hub:name[:config[:split]]"`` (name may be a local folder), or ``"auto"``: the file ``corpus.txt`` beside the
            model's weights, else ``"atlas"``, which carries a warning unless the model is one of the built-in ones.
        handle: The model that the text is for; ``"auto"`` needs it.

    Raises:
        ConfigError: ``"auto"`` without a model, or an empty spelling.
        DataError: The file or data set cannot be read.
        MissingDependencyError: ``hub:`` without the library ``datasets``.
    """
    if spec == "auto":
        return _auto_source(handle)
    if spec == "atlas":
        return _atlas_source()
    if spec.startswith("hub:"):
        return _hub_source(spec[4:])
    if not spec:
        raise ConfigError(
            "the text source is empty; use 'auto', 'atlas', a file, or 'hub:name[:config[:split]]'"
        )
    return file_source(Path(spec))


def _auto_source(handle: ModelHandle | None) -> TextSource:
    if handle is None:
        raise ConfigError("text source 'auto' depends on the model; give the model, or name a source")
    if handle.folder is not None and (handle.folder / CORPUS_FILE).is_file():
        return file_source(handle.folder / CORPUS_FILE)
    from lab.atlas.weights import MODEL_NAMES

    source = _atlas_source()
    if handle.name in MODEL_NAMES:
        return source
    warning = (
        f"text of the built-in world stands in for {handle.name!r}'s own training text; for results that count, pass a "
        f"sample of what the model was trained on (a file, or hub:wikimedia/wikipedia:20231101.en)"
    )
    return TextSource(source.id, source.make, warning)


def _atlas_source() -> TextSource:
    from lab.atlas.corpus import Corpus
    from lab.atlas.forms import load_format
    from lab.atlas.world import load_world

    def stream() -> Iterator[str]:
        documents = Corpus(load_world(), load_format(), seed=_SHUFFLE_SEED).documents()
        return (document.text for document in documents)

    return TextSource(f"atlas@{_probe(stream())}", stream)


def file_source(path: Path) -> TextSource:
    """Documents of one file, in a fixed shuffled order, so that a short budget still samples the whole file.

    A ``.jsonl`` file holds one object per line with a string under ``text``. Any other file is plain text: documents are
    separated by blank lines; without any blank line, each line is a document.

    Raises:
        DataError: The file is absent, empty, or a row is malformed (names the line).
    """
    file = path.expanduser().resolve()
    if not file.is_file():
        raise DataError("no such text file; a text source is 'auto', 'atlas', a file, or 'hub:name'", file)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()

    def documents() -> Iterator[str]:
        texts = _read_rows(file) if file.suffix == ".jsonl" else _read_plain(file)
        random.Random(_SHUFFLE_SEED).shuffle(texts)
        return iter(texts)

    source = TextSource(f"file@{digest[:32]}", documents)
    if next(source.texts(), None) is None:
        raise DataError("holds no text", file)
    return source


def _read_plain(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text: {error.reason} at byte {error.start}", file) from None
    return text.split("\n\n") if "\n\n" in text.strip() else text.split("\n")


def _read_rows(file: Path) -> list[str]:
    texts = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"not JSON: {error.msg} at column {error.colno}", file, number) from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise DataError("a row of a text source is an object with a string under 'text'", file, number)
        texts.append(row["text"])
    return texts


def _hub_source(spec: str) -> TextSource:
    name, config, split = (*spec.split(":"), "", "")[:3]
    if not name or spec.count(":") > 2:
        raise ConfigError(f"'hub:{spec}' is not hub:name[:config[:split]]")
    try:
        from datasets import load_dataset  # type: ignore[attr-defined]
    except ImportError:
        # Without the library, a folder called datasets/ beside the caller imports as an empty namespace.
        raise MissingDependencyError("datasets", "a text source 'hub:'", "train") from None
    local = Path(name).expanduser()
    if name.startswith((".", "/", "~")) or local.is_dir():
        # A relative path that does not exist would fall through to the hub, and offline to a stale cached copy.
        local = local.resolve()
        if not local.is_dir():
            raise DataError("no such data set folder", local)
        name = str(local)

    def stream() -> Iterator[str]:
        try:
            rows = load_dataset(name, config or None, split=split or "train", streaming=True)
            rows = rows.shuffle(seed=_SHUFFLE_SEED, buffer_size=_SHUFFLE_BUFFER)
            for row in rows:
                yield _text_of(row, name)
        except DataError:
            raise
        except Exception as error:  # the library raises many unrelated kinds for "not reachable"
            raise DataError(
                f"cannot read data set {name!r} (config {config or 'default'!r}, split {split or 'train'!r}): "
                f"{type(error).__name__}: {error}. Offline, pass a text file instead"
            ) from error

    return TextSource(f"hub:{spec if name != str(local) else local.name}@{_probe(stream())}", stream)


def _text_of(row: dict[str, Any], name: str) -> str:
    if isinstance(row.get("text"), str):
        return row["text"]
    found = next((value for value in row.values() if isinstance(value, str) and value), None)
    if found is None:
        raise DataError(f"data set {name!r} has no text column; its columns are {', '.join(row)}")
    return found


def _probe(texts: Iterator[str]) -> str:
    digest = hashlib.sha256()
    for text in itertools.islice(texts, _PROBE):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:32]
