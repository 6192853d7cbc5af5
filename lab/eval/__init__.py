"""Evaluation: suites ask, respondents answer, pure scorers judge, reports show.

>>> suite = get_suite("counterfact")
>>> cases = load_cases("counterfact.json", suite="counterfact")          # doctest: +SKIP
>>> report = evaluate_editing(suite, handle, editor, cases, limit=100)   # doctest: +SKIP
>>> report.save("report.html")                                           # doctest: +SKIP
"""

from lab.eval.atlas import atlas_cases
from lab.eval.atlas_chains import atlas_chain_cases
from lab.eval.baseline import BaselineCache
from lab.eval.journal import Journal, Step
from lab.eval.probe import Observation, Probe, Rating, Respondent
from lab.eval.report import CaseRow, Report, save_reports
from lab.eval.respond import ModelRespondent
from lab.eval.retention import Retention
from lab.eval.run import evaluate, evaluate_editing
from lab.eval.sources import suite_cases
from lab.eval.stats import Estimate, harmonic
from lab.eval.suite import PromptMeasure, Suite
from lab.eval.suites import SUITES, SuiteOptions, get_suite

__all__ = [
    "SUITES",
    "BaselineCache",
    "CaseRow",
    "Estimate",
    "Journal",
    "ModelRespondent",
    "Observation",
    "Probe",
    "PromptMeasure",
    "Rating",
    "Report",
    "Respondent",
    "Retention",
    "Step",
    "Suite",
    "SuiteOptions",
    "atlas_cases",
    "atlas_chain_cases",
    "evaluate",
    "evaluate_editing",
    "get_suite",
    "harmonic",
    "save_reports",
    "suite_cases",
]
