"""Settings for a model that nobody has published any for: layers and search parameters, tried on facts set apart for tuning.

Candidates for the layers come from causal tracing of the subject's last token (Meng et al. 2022, section 2). Where a fact is
recalled says little about where an edit succeeds (Hase et al. 2023, arXiv 2301.04213), so tracing only proposes: single edits of
known facts decide, by the suite's harmonic mean. The layers of the preset that the model would get anyway are among the candidates.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editors.base import EDITORS, check_names, get_editor
from editors.prefixes import PrefixCache
from editors.presets import Preset, find_preset
from editors.tune_files import TuneFolder, plot_tuning, preset_text
from editors.tune_records import Trial, TuneOptions, Tuning
from editors.values import Progress, ValueConfig
from lab.causal import POSITION_CLASSES, causal_trace
from lab.data.cases import CaseSet, EditCase
from lab.errors import ConfigError, DataError, NumericalError
from lab.eval.atlas import atlas_cases
from lab.eval.baseline import BaselineCache
from lab.eval.draw import Draw, taught_cases
from lab.eval.respond import ModelRespondent
from lab.eval.run import evaluate_editing
from lab.eval.sources import BUILT_IN, suite_cases
from lab.eval.suite import Suite
from lab.records import write_text_atomically
from lab.stats import StatsCache

if TYPE_CHECKING:
    from lab.handle import ModelHandle

SITE = "subject_last"
CLAMPS = (0.75, 4.0, 20.0)
"""Published clamps are 0.75 to 8; models of a few layers have needed 20."""
DECAYS = (0.001, 0.5)
"""Both published weights of the value's decay."""
SPREAD = (0.1, 1.0, 10.0)
"""A covariance weight is tried at these multiples of the preset's."""


def tuning_cases(
    suite: str, data: str | None = None, *, seed: int = 0, exclude: Sequence[EditCase] = ()
) -> CaseSet:
    """Cases to tune on: the built-in world's ``dev`` facts, or a file without what an evaluation will ask.

    Args:
        suite: Name of the suite.
        data: Its file or hub id, for suites that are not built in.
        seed: As in ``lab.eval.suite_cases``.
        exclude: Cases of an evaluation. Cases about their subjects go, and so do prompts that ask what they edit. The built-in
            world's ``test`` facts are always excluded from its own suites.

    Raises:
        DataError: Nothing is left.
    """
    found = suite_cases(suite, data, split="dev", seed=seed)
    held = [*exclude, *(atlas_cases(split="test", seed=seed).cases if suite in BUILT_IN else ())]
    subjects = {subject for case in held for subject in case.subjects}
    asked = {request.text for case in held for request in case.requests}
    asked |= {
        probe.prompt for case in held for group in ("rewrite", "paraphrase") for probe in case.of(group)
    }
    kept = tuple(
        replace(case, probes=tuple(probe for probe in case.probes if probe.prompt not in asked))
        for case in found.cases
        if not subjects.intersection(case.subjects)
    )
    if not kept:
        raise DataError(
            "no case is left to tune on; each is about a subject of an excluded file", found.source
        )
    return replace(found, cases=kept)


def tune(
    handle: ModelHandle,
    spec: str,
    suite: Suite,
    cases: CaseSet,
    folder: str | Path,
    options: TuneOptions | None = None,
    *,
    stats: StatsCache | None = None,
    progress: Progress | None = None,
) -> Tuning:
    """Finds layers and search parameters of a method that searches values, and writes them as a preset.

    First every place is tried with every clamp; then further settings in turn, on the best candidate so far. Finished candidates
    are kept in ``folder``, so that an interrupted run, or one with other grids, does not repeat them.

    Args:
        handle: The model; left as it was.
        spec: ``rome``, ``memit+sadr``, ...
        suite: A suite with a score.
        cases: From ``tuning_cases``.
        folder: New, empty, or of a run on the same model and facts.
        options: How to tune.
        stats: Key statistics on disk.
        progress: Called with a phase, how much of it is done, and how much there is.

    Raises:
        ConfigError: The method searches no value at a layer, the suite has no score, a setting is unknown, or the folder holds
            another run.
        DataError: Cases are test facts, or the model knows none of them.
    """
    options = options or TuneOptions()
    base, section = _starting_point(handle, spec, options)
    if not suite.score_parts:
        raise ConfigError(
            f"the suite {suite.name!r} has no score to tune by; counterfact, sadr and atlas have one"
        )
    _refuse_test_facts(cases)
    grids = _grids(base, options)
    baseline = BaselineCache()
    facts = _known(handle, suite, cases, options, baseline)
    kept = TuneFolder(folder, _identity(handle, spec, suite, base, facts, options))
    effects, traced = _traced(handle, facts, options, kept, progress)
    places = propose_places(effects[SITE], tuple(base.values["layers"]), options.places)
    shared, prefixes = stats or StatsCache(), PrefixCache()
    clamps, later = grids.pop("clamp"), grids
    total = len(places) * len(clamps) + sum(map(len, later.values()))
    trials: dict[str, Trial] = {}

    def attempt(settings: Mapping[str, Any]) -> Trial:
        def evaluated() -> Mapping[str, Any]:
            editor = get_editor(
                spec,
                preset=options.preset,
                stats=shared,
                corpus=options.corpus,
                seed=options.seed,
                prefixes=prefixes,
                **{**options.settings, **settings},
            )
            return _evaluate(handle, suite, spec, editor, facts, settings, options, baseline).to_json()

        name = "candidate-" + _digest(settings)
        if name not in trials:
            trials[name] = Trial.from_json(kept.once(name, evaluated))
        if progress is not None:
            progress("candidates", len(trials), max(total, len(trials)))
        return trials[name]

    for place in places:
        for clamp in clamps:
            attempt({"layers": list(place), "clamp": clamp})
    for name, values in later.items():
        best = max(trials.values(), key=lambda trial: trial.rank)
        there = {**base.values, **options.settings, **best.settings}.get(
            name, getattr(ValueConfig, name, None)
        )
        for value in values:
            if value != there:
                attempt({**best.settings, name: value})
    # The first of equals: the preset's own layers come first, then those that tracing puts higher.
    best = max(trials.values(), key=lambda trial: trial.rank)
    if best.n == 0:
        raise ConfigError(f"no candidate could edit a single fact; the first reason: {best.skipped[0]}")
    result = Tuning(
        editor=spec,
        suite=suite.name,
        source=facts.source,
        facts=tuple(case.id for case in facts.cases),
        base=base,
        effects=effects,
        traced=traced,
        trials=tuple(trials.values()),
        best=best,
        values={**base.values, **_named(options.settings, base.values), **best.settings},
        folder=kept.folder,
        seed=options.seed,
    )
    _write(handle, result, section, options)
    return result


def propose_places(effects: Sequence[float], own: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Layers worth a try: the preset's own, then the windows of as many layers that regain most on average.

    Args:
        effects: Effect of each layer.
        own: The preset's layers; their number is the window's width.
        count: Windows that the effects propose beside the preset's.
    """
    # As for presets that are scaled: above the last block nothing could turn a recalled value into an answer.
    usable = max(len(effects) - 1, 1)
    width = min(len(own), usable)
    windows = [tuple(range(start, start + width)) for start in range(usable - width + 1)]
    windows.sort(key=lambda window: (-math.fsum(effects[layer] for layer in window), window))
    return [tuple(own), *[window for window in windows if window != tuple(own)][:count]]


def _starting_point(handle: ModelHandle, spec: str, options: TuneOptions) -> tuple[Preset, str]:
    name, *penalties = spec.split("+")
    method = EDITORS.get(name)
    get_editor(spec)
    if not method.takes_penalties:
        fit = [each for each in EDITORS.names() if EDITORS.get(each).takes_penalties]
        raise ConfigError(
            f"{name!r} searches no value at a layer, so there is no layer and clamp to tune; these do: {', '.join(fit)}"
        )
    section = method.section or method.name
    base = find_preset(handle, section, options.preset)
    if not base.values.get("layers"):
        raise ConfigError(
            f"preset {base.name!r} names no layers for {section!r}, so there is nothing to vary"
        )
    if "layers" in options.settings:
        raise ConfigError("layers are what is tuned; leave them out of the settings")
    known = {*(each.name for each in dataclasses.fields(ValueConfig)), *base.values}
    check_names(spec, options.settings, known | (set(base.penalty) if penalties else set()))
    return base, section


def _grids(base: Preset, options: TuneOptions) -> dict[str, list[float]]:
    own = {**base.values, **options.settings}
    grids: dict[str, list[float]] = {
        "clamp": sorted({*CLAMPS, float(own.get("clamp", ValueConfig.clamp))}),
        "weight_decay": list(DECAYS),
    }
    if "mom2_weight" in own:
        grids["mom2_weight"] = [own["mom2_weight"] * factor for factor in SPREAD]
    # A setting that the caller fixed is not tuned.
    grids = {name: [own[name]] if name in options.settings else values for name, values in grids.items()}
    known = {"clamp", "weight_decay", "lr", "kl_factor", "steps", *own} - {"layers"}
    for name, values in options.grids.items():
        check_names("tune", [name], known)
        numbers = [
            value for value in values if isinstance(value, int | float) and not isinstance(value, bool)
        ]
        if len(numbers) != len(values):
            raise ConfigError(f"the grid of {name} must be a list of numbers, not {list(values)}")
        grids[name] = list(dict.fromkeys(numbers))
    if not grids["clamp"]:
        grids["clamp"] = [float(own.get("clamp", ValueConfig.clamp))]
    return grids


def _refuse_test_facts(cases: CaseSet) -> None:
    for case in cases.cases:
        if case.file == "atlas:test":
            raise DataError(
                f"{case.id!r} is a test fact of the built-in world; tune on split='dev', or no figure on the test split "
                "counts any more",
                cases.source,
            )


def _known(
    handle: ModelHandle, suite: Suite, cases: CaseSet, options: TuneOptions, baseline: BaselineCache
) -> CaseSet:
    respondent = ModelRespondent(handle, batch_size=options.batch_size)
    draw = Draw(
        suite,
        handle,
        cases.cases,
        seed=options.seed,
        unique=True,
        known_only=True,
        ask=lambda probes: baseline.observe(handle, respondent, probes),
        taught=taught_cases(handle, cases),
    )
    found = draw.take(options.limit)
    if not found:
        raise DataError(
            "the model knows none of these facts, so that neither tracing nor tuning has anything to go by",
            cases.source,
        )
    return replace(cases, cases=tuple(found))


def _traced(
    handle: ModelHandle, facts: CaseSet, options: TuneOptions, kept: TuneFolder, progress: Progress | None
) -> tuple[dict[str, list[float]], tuple[str, ...]]:
    def made() -> Mapping[str, Any]:
        rows: dict[str, dict[str, list[float]]] = {}
        subjects = [case.requests[0].subject for case in facts.cases]
        for done, case in enumerate(facts.cases, start=1):
            request = case.requests[0]
            found = causal_trace(
                handle,
                request.prompt,
                request.subject,
                kind="mlp",
                samples=options.samples,
                seed=options.seed,
                subjects=subjects,
            )
            # An answer that survives the noise says nothing about where it comes from.
            if found.corrupted < found.clean:
                rows[case.id] = {str(name): row for name, row in found.by_class().items()}
            if progress is not None:
                progress("causal tracing", done, len(facts.cases))
        if not rows:
            raise DataError("no answer depends on its subject, so that tracing finds no layer", facts.source)
        effects = {
            name: [math.fsum(column) / len(column) for column in zip(*found, strict=True)]
            for name in POSITION_CLASSES
            if (found := [row[name] for row in rows.values() if name in row])
        }
        return {"facts": list(rows), "effects": effects}

    row = kept.once("trace", made)
    return row["effects"], tuple(row["facts"])


def _evaluate(
    handle: ModelHandle,
    suite: Suite,
    spec: str,
    editor: Any,
    facts: CaseSet,
    settings: Mapping[str, Any],
    options: TuneOptions,
    baseline: BaselineCache,
) -> Trial:
    start = time.monotonic()
    try:
        report = evaluate_editing(
            suite,
            handle,
            editor,
            facts,
            seed=options.seed,
            in_order=True,
            name=spec,
            batch_size=options.batch_size,
            cache=baseline,
        )
    except (ConfigError, DataError, NumericalError) as error:
        # Settings that cannot work at some layer are a finding about them, not the end of the run.
        return Trial(settings, 0, None, {}, 0.0, (str(error),), time.monotonic() - start)
    means = {part: report.metrics[part].mean for part in suite.score_parts if part in report.metrics}
    if missing := [part for part in suite.score_parts if means.get(part) is None]:
        raise DataError(
            f"the cases ask nothing that the score needs: {', '.join(missing)}; use another file or suite",
            facts.source,
        )
    skipped = tuple(f"{skip.id}: {skip.reason}" for skip in report.skipped)
    parts = {name: float(mean) for name, mean in means.items() if mean is not None}
    table = report.metrics
    sizes = [table[name].mean or 0.0 for part in suite.score_parts if (name := f"{part}_magnitude") in table]
    margin = math.fsum(sizes) / len(sizes) if sizes else 0.0
    seconds = time.monotonic() - start
    return Trial(settings, report.n, table["score"].mean, parts, margin, skipped, seconds)


def _named(settings: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    names = {*values, *(each.name for each in dataclasses.fields(ValueConfig))}
    return {name: value for name, value in settings.items() if name in names}


def _identity(
    handle: ModelHandle, spec: str, suite: Suite, base: Preset, facts: CaseSet, options: TuneOptions
) -> dict[str, Any]:
    return {
        "editor": spec,
        "model": handle.state,
        "suite": suite.name,
        "preset": [base.to_json(), dict(base.values), dict(base.penalty)],
        "settings": dict(options.settings),
        "corpus": options.corpus,
        "samples": options.samples,
        "seed": options.seed,
        "facts": _digest([dataclasses.asdict(case) for case in facts.cases]),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _write(handle: ModelHandle, result: Tuning, section: str, options: TuneOptions) -> None:
    base, best = result.base, result.best
    score = "none" if best.score is None else f"{best.score:.3f}"
    source = (
        f"knowlab tune: {result.editor} on {best.n} known facts of {result.source}, score of {result.suite} {score}, "
        f"seed {result.seed}; what was not tuned is of {base.name}: {base.source}"
    )
    row = {
        "name": f"tuned-{handle.fingerprint[:12]}",
        "source": source,
        "model_type": [handle.config.model_type],
        "hidden_size": handle.hidden_size,
        "n_layers": handle.n_layers,
        "vocab_size": handle.config.vocab_size,
    }
    penalty = dict(base.penalty)
    if "+" in result.editor:
        # A penalty's number of steps goes before the method's own.
        chosen = {**options.settings, **best.settings}
        penalty |= {name: value for name, value in chosen.items() if name in penalty}
    sections = {section: result.values, f"sadr.{section}": penalty}
    write_text_atomically(result.folder / "preset.toml", preset_text(row, sections))
    text = json.dumps({"seed": result.seed, **result.to_json()}, ensure_ascii=False, indent=1) + "\n"
    write_text_atomically(result.folder / "tune.json", text)
    plot_tuning(result.folder / "tune.png", result)
