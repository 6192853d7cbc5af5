"""``knowlab eval tofu``: TOFU's figures of a model, against the model trained without the forget set where there is one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.atlas.bed import BED_FILE, read_bed
from lab.atlas.bed_questions import QUESTION_KINDS
from lab.data.asked import Asked
from lab.data.unlearning import load_asked
from lab.errors import ConfigError, DataError
from lab.eval.evaluations import EvaluationRequest
from lab.eval.stats import summarise
from lab.eval.tofu import SetScores, tofu_scores, tofu_summary
from lab.eval.unlearning_metrics import UTILITY_SETS, truth_ratio_forget, truth_ratio_utility

if TYPE_CHECKING:
    from lab.handle import ModelHandle


def tofu_sets(
    file: str | Path, limit: int | None = None, taught: Collection[str] | None = None
) -> dict[str, tuple[Asked, ...]]:
    """The questions of a forget file, and of TOFU's other sets that lie beside it.

    Args:
        file: ``forget05_perturbed.jsonl`` or a file of its form; ``retain_perturbed.jsonl`` and the like beside it are read too.
        limit: Questions of each set at most, evenly over its order.
        taught: Questions that the model was taught; others are not asked, and a set without any is left out. All without it.

    Raises:
        DataError: There is no such file, or one is malformed.
    """
    file = Path(file)
    if not file.is_file():
        raise DataError("no such file; give TOFU's forget file with wrong answers", file)
    places = {"forget": file, **{name: file.parent / f"{name}_perturbed.jsonl" for name in UTILITY_SETS}}
    found = {}
    for name, place in places.items():
        if place.is_file():
            items = tuple(
                item for item in load_asked(place) if taught is None or item.prompt.strip() in taught
            )
            if not items:
                continue
            number = len(items) if limit is None else min(limit, len(items))
            found[name] = tuple(items[index * len(items) // number] for index in range(number))
    return found


def evaluate_tofu(request: EvaluationRequest) -> dict[str, Any]:
    """TOFU's figures: ``metrics`` per set and measure, the paper's summary, ``oracle`` the same of the second model.

    A bed (a model with ``bed.json`` in its folder) is asked what it was taught, which may be a part of TOFU only.

    Raises:
        ConfigError: No file was named, or a bed was taught nothing of it.
        DataError: It is absent, malformed, or holds no wrong answers.
    """
    if request.data is None:
        raise ConfigError(
            "tofu needs --data: a forget file with wrong answers, such as forget05_perturbed.jsonl"
        )
    taught = taught_questions(request.handle)
    sets = tofu_sets(request.data, request.limit, taught)
    if "forget" not in sets:
        raise ConfigError(
            f"the bed {request.handle.name!r} was taught none of the questions of {request.data}"
        )
    found = tofu_scores(request.handle, sets)
    oracle = None if request.oracle is None else tofu_scores(request.oracle, sets)
    content: dict[str, Any] = {
        "data": request.data,
        "taught_only": taught is not None,
        "n": sum(len(items) for items in sets.values()),
        "metrics": _metrics(found),
        **tofu_summary(found, oracle),
        "rows": [
            {"set": name, "question": item.prompt, "answer": item.answer, **row}
            for name, items in sets.items()
            for item, row in zip(items, _rows(found[name]), strict=True)
        ],
    }
    if oracle is not None:
        content["oracle"] = {"metrics": _metrics(oracle), **tofu_summary(oracle)}
    return content


def taught_questions(handle: ModelHandle) -> frozenset[str] | None:
    """What a bed of questions was taught; ``None`` for any other model."""
    if handle.folder is None or not (handle.folder / BED_FILE).is_file():
        return None
    report = read_bed(handle.folder)
    return frozenset(case["id"] for case in report["cases"]) if report["suite"] in QUESTION_KINDS else None


def _metrics(found: Mapping[str, SetScores]) -> dict[str, dict[str, Any]]:
    metrics = {}
    for name, scores in found.items():
        score = truth_ratio_forget if name == "forget" else truth_ratio_utility
        for measure, values in asdict(scores).items():
            if measure == "truth_ratio":
                values = [score(ratio) for ratio in values]
            metrics[f"{name}_{measure}"] = summarise(values).to_json()
    return metrics


def _rows(scores: SetScores) -> list[dict[str, float]]:
    columns = asdict(scores)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
