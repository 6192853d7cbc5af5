"""The index: folders of documents as chunks in Chroma, found by meaning and by words."""

from __future__ import annotations

from rag.index.chroma import Index, open_index
from rag.index.ingest import Ingested, ingest

__all__ = ["Index", "Ingested", "ingest", "open_index"]
