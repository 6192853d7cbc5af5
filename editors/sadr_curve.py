"""What SADR's penalty gives back, and for which weight: the runs to compare, shares with paired intervals, plot and page.

An edit costs some of what the model knew around it. The share that the penalty regains is ``1 − loss(with) / loss(without)``, over
the same cases. There are two editors without it: the plain one, which stops as soon as its target is learned, and the plain one
that never stops early (``stop_below=0``). The penalty keeps the loss from falling below that bound, so that an editor that
carries it takes more steps; what it regains of the second is no more than the undoing of its own overshoot, where the first keeps
as much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from editors.bench import BenchOptions, Cell, Row
from lab.errors import ConfigError
from lab.eval.stats import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEPT = ("relation", "distract_neighborhood", "neighborhood")
"""What an edit should have left alone; those that a suite asks are shared out."""
SHOWN = ("efficacy", "paraphrase", *KEPT)
PLAIN, CONTROL = "plain", "all_steps"
REFERENCES = (PLAIN, CONTROL)
# A share of hardly any loss is no figure: where more resamples than this show no loss, there is none.
_TOLERATED = 0.025


@dataclass(frozen=True)
class Variant:
    """One run.

    Attributes:
        editor: The method, without the penalty.
        kind: ``plain``, ``all_steps`` or ``sadr``.
        gamma: Weight of the penalty, of ``sadr``.
        cell: What is run.
        options: How.
    """

    editor: str
    kind: str
    gamma: float | None
    cell: Cell
    options: BenchOptions

    @property
    def name(self) -> str:
        """For tables."""
        if self.kind == "sadr":
            return f"{self.editor}+sadr γ={self.gamma:g}"
        return self.editor if self.kind == PLAIN else f"{self.editor}, all steps"


def plan(
    editors: Sequence[str],
    gammas: Sequence[float],
    suite: str,
    model: str,
    seed: int,
    options: BenchOptions,
    *,
    all_steps: bool = False,
) -> tuple[Variant, ...]:
    """The runs of every editor: plain, plain with all steps, and the penalty at each weight.

    Args:
        editors: Methods that search a value.
        gammas: Weights, each above 0.
        suite, model, seed: Of all cells.
        options: Of all cells; its settings go to all runs.
        all_steps: Runs with the penalty never stop early either.

    Raises:
        ConfigError: No editor or no weight, a weight that is not positive, or an editor that searches no value.
    """
    from editors.base import EDITORS

    if not editors or not gammas:
        raise ConfigError("the comparison needs at least one editor and one gamma")
    if wrong := [gamma for gamma in gammas if not 0 < gamma < math.inf]:
        raise ConfigError(f"gamma must be above 0, it is {wrong[0]:g}; the plain editor is run anyway")
    shared = options.settings_of("")
    found = []
    for editor in dict.fromkeys(editors):
        if not EDITORS.get(editor).takes_penalties:
            raise ConfigError(f"{editor!r} searches no value that SADR could restrain")

        def variant(
            kind: str, gamma: float | None, settings: Mapping[str, Any], editor: str = editor
        ) -> Variant:
            spec = editor if gamma is None else f"{editor}+sadr"
            own = replace(options, settings={"": {**shared, **settings}})
            return Variant(editor, kind, gamma, Cell(spec, suite, model, seed), own)

        found += [variant(PLAIN, None, {}), variant(CONTROL, None, {"stop_below": 0.0})]
        more = {"stop_below": 0.0} if all_steps else {}
        found += [variant("sadr", gamma, {"gamma": gamma, **more}) for gamma in sorted(set(gammas))]
    return tuple(found)


def share_regained(
    reference: Sequence[Row], treated: Sequence[Row], metric: str, *, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """``1 − loss(treated) / loss(reference)`` of one metric, with a percentile interval from resampling cases in pairs.

    Args:
        reference: Cases of a cell (``id``, ``values``, ``before``) edited without the penalty.
        treated: The same with it.
        metric: Which; cases without it do not count.
        resamples: Bootstrap samples.
        seed: Seeds them.

    Returns:
        The share; 1 is all of the loss, negative is a greater loss. Without figures where the reference loses nothing that can
        be told from nothing. ``n`` is the number of cases.
    """
    other = {case["id"]: case for case in treated}
    pairs = [
        (case, other[case["id"]])
        for case in reference
        if case["id"] in other and case["values"].get(metric) and other[case["id"]]["values"].get(metric)
    ]
    if not pairs:
        return Estimate(None, None, None, 0)
    # Prompts are pooled, as in the tables: each case brings sums and counts.
    table = np.array([[*_lost(case, metric), *_lost(again, metric)] for case, again in pairs])

    def shares(sums: np.ndarray) -> np.ndarray:
        lost, kept = sums[:, 0] / sums[:, 1], sums[:, 2] / sums[:, 3]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(lost > 1e-9, 1 - kept / lost, np.nan)

    draws = np.random.default_rng(seed).integers(0, len(pairs), size=(resamples, len(pairs)))
    weights = np.stack([np.bincount(draw, minlength=len(pairs)) for draw in draws]).astype(float)
    found = shares(weights @ table)
    mean = float(shares(table.sum(axis=0, keepdims=True))[0])
    if math.isnan(mean) or np.isnan(found).mean() > _TOLERATED:
        return Estimate(None, None, None, len(pairs))
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return Estimate(mean, min(mean, float(low)), max(mean, float(high)), len(pairs))


def _lost(case: Row, metric: str) -> tuple[float, float]:
    after, before = case["values"][metric], case["before"].get(metric, [])
    if len(after) != len(before):
        raise ConfigError(
            f"case {case['id']!r} was asked {len(before)} {metric!r} prompts before and {len(after)} after"
        )
    return math.fsum(before) - math.fsum(after), float(len(after))


def entries(variants: Sequence[Variant], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What is printed and saved of each run: its figures, and of runs with the penalty the shares regained."""
    reference = {
        (variant.editor, variant.kind): row["cases"]
        for variant, row in zip(variants, rows, strict=True)
        if variant.kind in REFERENCES
    }
    found = []
    for variant, row in zip(variants, rows, strict=True):
        entry: dict[str, Any] = {
            "name": variant.name,
            "editor": variant.editor,
            "kind": variant.kind,
            "gamma": variant.gamma,
            "settings": dict(variant.options.settings_of("")),
            "n": row["n"],
            "metrics": {name: row["metrics"][name] for name in SHOWN if name in row["metrics"]},
            "before": {name: row["before"][name] for name in SHOWN if name in row["before"]},
            "seconds_per_edit": row["seconds_per_edit"],
            "attention_drift": row.get("attention_drift"),
            "regained": {},
        }
        if variant.kind == "sadr":
            entry["regained"] = {
                against: {
                    name: share_regained(
                        reference[variant.editor, against], row["cases"], name, seed=variant.cell.seed
                    ).to_json()
                    for name in KEPT
                    if name in row["metrics"]
                }
                for against in REFERENCES
            }
        found.append(entry)
    return found


def table_lines(found: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines: a run's figures, then the shares of relation and distracted-neighborhood loss against both references."""
    metrics = [name for name in SHOWN if any(name in entry["metrics"] for entry in found)]
    shared = [name for name in KEPT[:2] if name in metrics]
    heads = ["run", *metrics, *(f"{name} regained of {against}" for against in REFERENCES for name in shared)]
    heads.append("largest head drift")
    lines = []
    for entry in found:
        cells = [_cell(entry["metrics"].get(name)) for name in metrics]
        cells += [
            _cell(entry["regained"].get(against, {}).get(name)) for against in REFERENCES for name in shared
        ]
        lines.append([entry["name"], *cells, _largest(entry["attention_drift"])])
    return heads, lines


def _cell(figure: Mapping[str, Any] | None) -> str:
    if figure is None or figure["mean"] is None:
        return "–"
    return f"{figure['mean']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def _largest(drift: Mapping[str, Any] | None) -> str:
    """SADR's measure of the drift, at the layer where it is largest."""
    return "–" if drift is None else f"{max(drift['max_head_drift']):.3f}"


def curve_plot(found: Sequence[Mapping[str, Any]]) -> Figure:
    """Over gamma: efficacy and what is kept (above), shares regained (below); a column for each editor."""
    from matplotlib.figure import Figure

    editors = list(dict.fromkeys(entry["editor"] for entry in found))
    figure = Figure(figsize=(5.2 * len(editors), 6.4), layout="constrained")
    grid = figure.subplots(2, len(editors), squeeze=False, sharex="col")
    for column, editor in enumerate(editors):
        curve = [entry for entry in found if entry["editor"] == editor and entry["kind"] == "sadr"]
        flat = {
            entry["kind"]: entry
            for entry in found
            if entry["editor"] == editor and entry["kind"] in REFERENCES
        }
        above, below = grid[0][column], grid[1][column]
        above.set(title=editor, xscale="log", ylabel="figure after the edit")
        below.set(xlabel="gamma", ylabel="share of the loss regained")
        below.axhline(0.0, color="0.6", linewidth=0.8)
        for number, name in enumerate(("efficacy", *KEPT[:2])):
            color = f"C{number}"
            _line(above, curve, lambda entry, name=name: entry["metrics"].get(name), color, "-", name)
            for kind, style in ((PLAIN, "--"), (CONTROL, ":")):
                figure_of = flat.get(kind, {}).get("metrics", {}).get(name)
                if figure_of and figure_of["mean"] is not None:
                    above.axhline(figure_of["mean"], color=color, linestyle=style, linewidth=0.9)
            if name == "efficacy":
                continue
            for against, style in ((PLAIN, "--"), (CONTROL, ":")):
                _line(
                    below,
                    curve,
                    lambda entry, name=name, against=against: entry["regained"][against].get(name),
                    color,
                    style,
                    f"{name}, of {against}",
                )
        above.legend(fontsize=8, title="dashed: plain, dotted: all steps", title_fontsize=7)
        if below.get_legend_handles_labels()[0]:
            below.legend(fontsize=8)
    return figure


def _line(
    axes: Any, curve: Sequence[Mapping[str, Any]], pick: Any, color: str, style: str, label: str
) -> None:
    points = [
        (entry["gamma"], value) for entry in curve if (value := pick(entry)) and value["mean"] is not None
    ]
    if points:
        means = [value["mean"] for _, value in points]
        errors = [
            [value["mean"] - value["low"] for _, value in points],
            [value["high"] - value["mean"] for _, value in points],
        ]
        axes.errorbar(
            [gamma for gamma, _ in points],
            means,
            yerr=errors,
            color=color,
            linestyle=style,
            marker="o",
            markersize=4,
            capsize=2,
            label=label,
        )


def page(found: Sequence[Mapping[str, Any]], title: str, maps: Mapping[str, bytes]) -> str:
    """Table, curves and maps as one HTML page that needs no other file.

    Args:
        found: As ``entries`` gives them.
        title: Above it.
        maps: Caption to PNG.
    """
    from html import escape

    from lab.eval.html import document, figure_html, html_table, png_html

    heads, lines = table_lines(found)
    parts = [f"<h1>{escape(title)}</h1>", html_table(heads, lines)]
    parts += ["<h2>Over the weight of the penalty</h2>", figure_html(curve_plot(found), "figures over gamma")]
    parts.append("<h2>Attention to the subject after an edit</h2>")
    parts += [f"<h3>{escape(caption)}</h3>{png_html(data, caption)}" for caption, data in maps.items()]
    return document(title, parts)
