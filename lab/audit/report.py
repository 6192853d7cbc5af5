"""What an audit says: one figure per family, a worst case, what was tried, and what no audit of this kind can show."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.audit.base import FAMILIES, LEAKING, AttackResult, Interval
from lab.errors import ConfigError, DataError

WORST_CASE = "worst_case"
LIMITS = (
    "An audit shows leaks, never their absence: a stronger attack, a larger budget or another language may find what these "
    "did not.",
    "The worst case is the largest of many lifts, each with its own error: on a clean model it lies above zero by chance, the "
    "more so the fewer the facts. Read its upper end, and the controls.",
    "Without an oracle the controls are facts that were never trained. They show what an attack injects, not what could be "
    "inferred from what rightly stays; only a model trained without the facts shows that.",
    "An oracle is one training run. Another seed gives another oracle, and small differences to it are no leak.",
    "Scores are probabilities of known objects. Knowledge that comes out in other words, or as an ability and not as a "
    "statement, is not seen.",
    "Suffixes and perturbations were optimised for few steps; published attacks run for hundreds.",
    "Relearning measures how fast facts return, which depends on the data and the learning rate that were chosen; facts that "
    "can be inferred from those trained on return in any model.",
    "Two-hop and step-by-step attacks need a model that can chain facts; where it cannot, they find nothing and prove nothing.",
    "Quantisation is round-to-nearest; methods that calibrate on data may bring back more or less.",
    "Nothing here certifies removal in a legal sense: no bound on what an unbounded adversary can extract is known.",
)


@dataclass(frozen=True)
class AuditReport:
    """An audit.

    Attributes:
        name: What was audited, for titles and columns.
        results: One per attack, in the order they ran.
        settings: Model, patches, facts, controls, seed, budget, as JSON values.
        unattacked: Mean probability of the objects without an attack: ``facts``, and ``oracle`` and ``never`` where there are any.
    """

    name: str
    results: tuple[AttackResult, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    unattacked: Mapping[str, float] = field(default_factory=dict)

    @property
    def leaks(self) -> tuple[AttackResult, ...]:
        """Results that say whether facts are still there: applicable, and neither traces of a change nor side effects."""
        return tuple(result for result in self.results if result.applicable and result.family in LEAKING)

    @property
    def worst(self) -> AttackResult | None:
        """The attack with the largest lift; ``None`` where none applied."""
        return max(self.leaks, key=lambda result: result.lift.mean, default=None)

    @property
    def worst_case(self) -> float:
        """The largest lift over the controls, 0 to 1; 0 where no attack applied."""
        return 0.0 if self.worst is None else min(1.0, max(0.0, self.worst.lift.mean))

    @property
    def worst_case_high(self) -> float:
        """The largest upper end of a lift, 0 to 1: what ``--fail-above worst_case`` looks at."""
        return min(1.0, max((result.lift.high for result in self.leaks), default=0.0))

    @property
    def families(self) -> dict[str, Interval]:
        """Per family, the lift of its worst attack; families without an applicable attack are absent."""
        found: dict[str, Interval] = {}
        for family in FAMILIES:
            members = [r.lift for r in self.results if r.applicable and r.family == family]
            if members:
                found[family] = max(members, key=lambda lift: lift.mean)
        return found

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "name": self.name,
            WORST_CASE: self.worst_case,
            "worst_case_high": self.worst_case_high,
            "worst_attack": None if self.worst is None else self.worst.name,
            "families": {name: lift.to_json() for name, lift in self.families.items()},
            "unattacked": dict(self.unattacked),
            "attacks": [result.to_json() for result in self.results],
            "limits": list(LIMITS),
            "settings": dict(self.settings),
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> AuditReport:
        """Inverse of ``to_json``."""
        results = tuple(AttackResult.from_json(each) for each in row["attacks"])
        return cls(row["name"], results, dict(row["settings"]), dict(row["unattacked"]))


def read_report(path: str | Path) -> AuditReport:
    """Reads a report from the JSON that ``knowlab audit`` writes.

    Raises:
        DataError: The file is absent or holds something else.
    """
    file = Path(path)
    try:
        return AuditReport.from_json(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise DataError("no such file", file) from None
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"this is no report of an audit: {error}", file) from None


def parse_limits(words: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """Reads ``worst_case=0.05`` and ``ATTACK=0.05``.

    Args:
        words: As given on the command line.
        names: Attacks that will run.

    Raises:
        ConfigError: No such attack runs, or the number is none between 0 and 1.
    """
    found: dict[str, float] = {}
    for word in words:
        name, sign, number = word.partition("=")
        known = (WORST_CASE, *names)
        if not sign or name not in known:
            raise ConfigError(f"--fail-above {word!r}: give NAME=NUMBER with NAME one of {', '.join(known)}")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not 0.0 <= value <= 1.0:
            raise ConfigError(f"--fail-above {word!r}: the limit must be a number from 0 to 1")
        found[name] = value
    return found


def broken_limits(report: AuditReport, limits: Mapping[str, float]) -> list[str]:
    """A sentence per limit that the upper end of a lift exceeds; an attack that did not apply breaks none."""
    uppers = {result.name: result.lift.high for result in report.results if result.applicable}
    uppers[WORST_CASE] = report.worst_case_high
    return [
        f"{name}: the lift may be as high as {uppers[name]:.3f}, above the limit of {limit:g}"
        for name, limit in limits.items()
        if name in uppers and uppers[name] > limit
    ]


def lift_text(lift: Interval) -> str:
    """``0.120 [0.080, 0.160]``."""
    return f"{lift.mean:.3f} [{lift.low:.3f}, {lift.high:.3f}]"


def attack_names(reports: Sequence[AuditReport]) -> list[str]:
    """All attacks of some reports, in the order of their first appearance."""
    return list(dict.fromkeys(result.name for report in reports for result in report.results))


def lifts_table(reports: Sequence[AuditReport]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: the worst case, then every attack with its lift in each report.

    Raises:
        ConfigError: No report.
    """
    if not reports:
        raise ConfigError("no audit to show")
    heads = ["attack", "family", "access", *(report.name for report in reports)]
    rows = [["worst case", "", "", *(f"{r.worst_case:.3f} (up to {r.worst_case_high:.3f})" for r in reports)]]
    for name in attack_names(reports):
        cells, kind, access = [], "", ""
        for report in reports:
            found = next((result for result in report.results if result.name == name), None)
            if found is None:
                cells.append("–")
                continue
            kind, access = found.family, found.access
            cells.append(lift_text(found.lift) if found.applicable else "not applicable")
        rows.append([name, kind, access, *cells])
    return heads, rows


def detail_rows(report: AuditReport) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of one audit: leak, controls, cost, what was tried, and notes."""
    heads = ["attack", "leak", "oracle", "never trained", "no attack", "seconds", "passes", "tried", "note"]
    rows = []
    for result in report.results:
        controls = [
            f"{result.controls[key].mean:.3f}" if key in result.controls else "–"
            for key in ("oracle", "never", "original")
        ]
        leak = f"{result.leak:.3f}" if result.applicable else "–"
        seconds, passes = (result.cost.get(key) for key in ("seconds", "forward_passes"))
        rows.append(
            [
                result.name,
                leak,
                *controls,
                "–" if seconds is None else f"{seconds:.1f}",
                "–" if passes is None else f"{passes:.0f}",
                result.tried,
                result.note,
            ]
        )
    return heads, rows


def markdown(reports: Sequence[AuditReport]) -> str:
    """Reports as Markdown, side by side."""
    heads, rows = lifts_table(reports)
    parts = [
        "# Audit",
        "",
        "Lift over the larger control, with 95 % intervals; 0 is no leak, 1 is everything.",
        "",
        *markdown_table(heads, rows),
    ]
    for report in reports:
        parts += ["", f"## {report.name}", "", *markdown_table(*detail_rows(report))]
        parts += ["", *(f"- {key}: {_cell(str(value))}" for key, value in report.settings.items())]
    parts += ["", "## What this audit cannot show", "", *(f"- {limit}" for limit in LIMITS), ""]
    return "\n".join(parts)


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table as lines of Markdown."""
    lines = [" | ".join(_cell(value) for value in row) for row in (heads, *rows)]
    return [f"| {lines[0]} |", f"|{'---|' * len(heads)}", *(f"| {line} |" for line in lines[1:])]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
