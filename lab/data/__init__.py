"""Benchmark files, as they are published, to typed cases: parsed once, at the door.

``load_cases`` finds out by the fields which file it was given. Every row keeps its file and line, so that an error or a skipped
case can be looked up.
"""

from lab.data.building import ReadOptions
from lab.data.cases import CaseProbe, CaseSet, EditCase, Skip
from lab.data.load import FORMATS, HUB, DataFormat, detect_format, load_cases
from lab.data.source import HubSource, Row, read_rows
from lab.data.text import locate_subject, normalize_answer

__all__ = [
    "FORMATS",
    "HUB",
    "CaseProbe",
    "CaseSet",
    "DataFormat",
    "EditCase",
    "HubSource",
    "ReadOptions",
    "Row",
    "Skip",
    "detect_format",
    "load_cases",
    "locate_subject",
    "normalize_answer",
    "read_rows",
]
