"""Benchmark files, as they are published, to typed cases: parsed once, at the door.

``load_cases`` finds out by the fields which file it was given. Every row keeps its file and line, so that an error or a skipped
case can be looked up.
"""

from lab.data.asked import Asked, AskedSet
from lab.data.building import ReadOptions
from lab.data.cases import CaseProbe, CaseSet, EditCase, Skip
from lab.data.load import FORMATS, HUB, DataFormat, detect_format, load_cases
from lab.data.source import HubSource, Row, read_rows
from lab.data.text import locate_subject, normalize_answer
from lab.data.unlearning import ASKED_FORMATS, AskedFormat, detect_asked, load_asked

__all__ = [
    "ASKED_FORMATS",
    "FORMATS",
    "HUB",
    "Asked",
    "AskedFormat",
    "AskedSet",
    "CaseProbe",
    "CaseSet",
    "DataFormat",
    "EditCase",
    "HubSource",
    "ReadOptions",
    "Row",
    "Skip",
    "detect_asked",
    "detect_format",
    "load_asked",
    "load_cases",
    "locate_subject",
    "normalize_answer",
    "read_rows",
]
