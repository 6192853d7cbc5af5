"""The tables of a ledger, in one SQLite file that many may read while one writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    Engine,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
)

METADATA = MetaData()

FACTS = Table(
    "facts",
    METADATA,
    Column("id", String, primary_key=True),
    Column("subject", String, nullable=False),
    Column("relation", String, nullable=False),
    Column("prompt", String, nullable=False),
    Column("question", String, nullable=False),
    Column("names", JSON, nullable=False),
    Column("answers", JSON, nullable=False),
)

# The number of an entry is its revision: entries are in force in this order.
ENTRIES = Table(
    "entries",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("fact", ForeignKey("facts.id"), nullable=False),
    Column("op", String, nullable=False),
    Column("old", JSON, nullable=False),
    Column("new", String),
    Column("policy", String, nullable=False),
    Column("method", String, nullable=False),
    Column("patch", String),
    Column("suspends", JSON, nullable=False),
    Column("status", String, nullable=False),
    Column("created_at", Float, nullable=False),
)

PATCHES = Table(
    "patches",
    METADATA,
    Column("folder", String, primary_key=True),
    Column("patch", String, nullable=False),
    Column("base", String, nullable=False),
)

# Chunks as they were given, for as long as an entry changes or has looked at them.
ORIGINALS = Table(
    "originals", METADATA, Column("chunk", String, primary_key=True), Column("image", JSON, nullable=False)
)

EFFECTS = Table(
    "effects",
    METADATA,
    Column("entry", ForeignKey("entries.id"), primary_key=True),
    Column("chunk", String, primary_key=True),
    Column("kind", String, nullable=False),
    Column("label", String, nullable=False),
    Column("value", String),
    Column("scorer", String, nullable=False),
)

JOURNAL = Table(
    "journal",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("kind", String, nullable=False),
    Column("phase", String, nullable=False),
    Column("plan", JSON, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("error", String, nullable=False),
)

# What a transaction makes of a chunk in the store; no image means that there is no such chunk.
CHANGES = Table(
    "changes",
    METADATA,
    Column("journal", ForeignKey("journal.id"), primary_key=True),
    Column("chunk", String, primary_key=True),
    Column("before", JSON(none_as_null=True)),
    Column("after", JSON(none_as_null=True)),
)


def open_engine(file: Path) -> Engine:
    """An engine on the file, with a write-ahead log that is on the disk before a commit returns."""
    engine = create_engine(f"sqlite:///{file}")

    @event.listens_for(engine, "connect")
    def _settings(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        for line in (
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            "busy_timeout=10000",
        ):
            cursor.execute(f"PRAGMA {line}")
        cursor.close()

    return engine
