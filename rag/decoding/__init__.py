"""Decoding rules that weigh what a model says with documents against what it says without them."""

from __future__ import annotations

from rag.decoding.contrast import TwoStreams, contrast_generate
from rag.decoding.rules import Rule
from rag.decoding.table import DECODERS, get_rule

__all__ = ["DECODERS", "Rule", "TwoStreams", "contrast_generate", "get_rule"]
