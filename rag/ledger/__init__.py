"""What is held true: edits, forget requests and restores, with their patches and what they do to documents."""

from __future__ import annotations

from rag.ledger.conflicts import Finder, MatchFinder, NotesFinder
from rag.ledger.documents import LedgerDocuments
from rag.ledger.ledger import Ledger, Reconciled
from rag.ledger.values import Conflict, Entry, LedgerFact, Outcome
from rag.ledger.weights import HandleWeights, NoWeights, Weights

__all__ = [
    "Conflict",
    "Entry",
    "Finder",
    "HandleWeights",
    "Ledger",
    "LedgerDocuments",
    "LedgerFact",
    "MatchFinder",
    "NoWeights",
    "NotesFinder",
    "Outcome",
    "Reconciled",
    "Weights",
]
