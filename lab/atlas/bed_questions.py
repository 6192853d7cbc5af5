"""Beds of questions and answers: small models that really know a public unlearning benchmark, and their oracles.

    >>> make_question_bed("tofu", ["full.jsonl", "world_facts.jsonl"], "beds/tofu", minutes=40)
    >>> make_question_bed("tofu", ["full.jsonl", "world_facts.jsonl"], "beds/tofu-oracle", minutes=40, without="forget05")

A bed and its oracle made with the same files, limit and seed share tokenizer, initial weights and schedule; they differ in what
``without`` names alone, as a benchmark's full and retain models do.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.atlas.bed import BED_FILE, BedResult, budgeted, name_preset, trained_params
from lab.atlas.material import Cycle, Document, Draft
from lab.atlas.recipe import Recipe
from lab.data.asked import Asked
from lab.data.unlearning import QUESTION_PROMPT, load_asked
from lab.errors import ConfigError, DataError, KnowLabError, OutputExistsError
from lab.files import write_folder
from lab.records import write_text_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["QUESTION_KINDS", "Taught", "make_question_bed", "questions_of"]

QUESTION_KINDS = ("tofu", "rwku")
TAUGHT = "taught"
"""Folder within a bed's: of each of its files, the questions and answers that it was taught, in the upstream form."""

_FORMAT_VERSION = 1
_RUN_FILE = "bed-run.json"
_AUTHOR = 20
_LAST_AUTHORS = 10
_PROBES = 200
_CORPUS_TEXTS = 5000
_LEAST_MINUTES, _MINUTES_PER_QUESTION = 4.0, 1 / 60
_RECIPE = Recipe("bed", inside_keep=1.0, late_keep=())


@dataclass(frozen=True)
class Taught:
    """One question to be learned.

    Attributes:
        question: As the file asks it.
        answer: Its right answer.
        group: Author or person; empty where the file names none and holds no authors.
        file: Name of the file that asks it, without its ending.
    """

    question: str
    answer: str
    group: str = ""
    file: str = ""

    @property
    def prompt(self) -> str:
        """As it is put to the model."""
        return QUESTION_PROMPT.replace("{}", self.question)

    @property
    def text(self) -> str:
        """A training text."""
        return f"{self.prompt} {self.answer}\n"


def questions_of(kind: str, files: Sequence[Path]) -> tuple[Taught, ...]:
    """What the files teach, repeated questions with another answer included, repeated rows not.

    TOFU's main file names no authors, but holds 20 questions of one after the other; other files are taught whole.

    Raises:
        ConfigError: No such kind.
        DataError: A file is absent, malformed, or asks nothing with an answer.
    """
    if kind not in QUESTION_KINDS:
        raise ConfigError(f"unknown kind of bed {kind!r}; known: {', '.join(QUESTION_KINDS)}")
    found: dict[tuple[str, str], Taught] = {}
    for file in files:
        if not file.is_file():
            raise DataError("no such file; a bed is made from a local file", file)
        items = [
            item for item in load_asked(file) if item.group in ("qa", "neighbor_qa") and item.answer.strip()
        ]
        if not items:
            raise DataError("asks no question that has an answer", file)
        in_authors = (
            kind == "tofu" and len(items) % _AUTHOR == 0 and len(items) > _AUTHOR and not items[0].options
        )
        for number, item in enumerate(items):
            group = item.subject or (f"author {number // _AUTHOR}" if in_authors else "")
            taught = Taught(item.prompt.strip(), item.answer.strip(), group, file.stem)
            found.setdefault(_key(item), taught)
    return tuple(found.values())


def _key(item: Asked) -> tuple[str, str]:
    return item.prompt.strip(), item.answer.strip()


def limited(taught: Sequence[Taught], limit: int | None, seed: int) -> tuple[Taught, ...]:
    """Whole authors or people until ``limit`` questions are reached; questions without one always stay.

    The last ten groups come first, for there lie TOFU's forget sets of 1 and 5 %; the others are drawn.

    Raises:
        ConfigError: The limit leaves no group.
    """
    if limit is None:
        return tuple(taught)
    groups = list(dict.fromkeys(one.group for one in taught if one.group))
    last, others = groups[-_LAST_AUTHORS:], groups[:-_LAST_AUTHORS]
    random.Random(f"bed:questions:{seed}").shuffle(others)
    sizes = {group: sum(one.group == group for one in taught) for group in groups}
    chosen: set[str] = set()
    total = 0
    for group in (*reversed(last), *others):
        if total + sizes[group] > limit:
            break
        chosen.add(group)
        total += sizes[group]
    if not chosen and groups:
        raise ConfigError(f"a limit of {limit} questions leaves no author or person whole")
    return tuple(one for one in taught if not one.group or one.group in chosen)


def left_out(without: str, files: Sequence[Path], taught: Sequence[Taught]) -> set[tuple[str, str]]:
    """Question and answer of what an oracle must not see.

    Args:
        without: A file, the name of one beside the bed's files (``forget05``), or a person that questions are about.
        files: The bed's files.
        taught: What the bed teaches.

    Raises:
        ConfigError: It is none of the three, or nothing of it is in the bed.
    """
    places = [Path(without), *(files[0].parent / f"{without}{end}" for end in (".jsonl", ".json"))]
    file = next((place for place in places if place.is_file()), None)
    if file is not None:
        wanted = {_key(item) for item in load_asked(file)}
    else:
        wanted = {(one.question, one.answer) for one in taught if one.group == without}
    found = {(one.question, one.answer) for one in taught} & wanted
    if not found:
        raise ConfigError(
            f"nothing to leave out: {without!r} is no file, none beside {files[0]}, and no person, or none of it is taught"
        )
    return found


@dataclass(frozen=True)
class QuestionSource:
    """The trainer's view: one question and answer per text, all of them in random order, again and again."""

    taught: tuple[Taught, ...]
    seed: int

    def documents(self, stream: int) -> Iterator[Document]:
        """Endless texts of one stream."""
        drawn = Cycle(self.taught, random.Random(f"bed:questions:{self.seed}:{stream}"))
        while True:
            one = drawn.next()
            yield Draft().say(one.prompt + " ").learn(one.answer + "\n").finish("bed_question")

    def probes(self) -> dict[str, list[tuple[str, str]]]:
        """Questions spread over all of them."""
        step = max(1, len(self.taught) // _PROBES)
        return {"trained": [(one.prompt, f" {one.answer}") for one in self.taught[::step][:_PROBES]]}


def make_question_bed(
    kind: str,
    files: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    without: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    minutes: float | None = None,
    steps: int | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    recipe: Recipe | None = None,
    device: str = "cpu",
    processes: int = 0,
    compile: bool = True,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> BedResult:
    """Trains a bed of questions and answers, or with ``without`` its oracle.

    Args:
        kind: ``tofu`` or ``rwku``.
        files: Upstream files as they are: TOFU's full file, real authors and world facts; RWKU's level 2 questions.
        out: Where the bed goes, all at once when it is finished.
        without: What to leave out, as in ``left_out``.
        limit: How many questions, whole authors at a time; all without it.
        seed: Fixes the draw, the initial weights and the texts.
        minutes, steps, work_dir, recipe, device, processes, compile, overwrite, progress: As in ``make_bed``.

    Raises:
        DataError: A file is absent, malformed, or asks nothing.
        ConfigError: An argument makes no sense, or the work folder belongs to another bed.
        OutputExistsError: ``out`` holds something already.
        KnowLabError: The run was interrupted; calling again with the same work folder goes on with it.
    """
    from lab.atlas.train import Settings, train

    if not files:
        raise ConfigError("a bed needs at least one file")
    if (minutes is not None and minutes <= 0) or (steps is not None and steps <= 0):
        raise ConfigError("the budget of a bed must be positive")
    paths, target = [Path(file) for file in files], Path(out)
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise OutputExistsError(f"{target} is not empty; choose another folder or overwrite it on purpose")
    tell = progress or (lambda line: None)
    work = Path(work_dir) if work_dir is not None else target.with_name(f"{target.name}.work")
    all_taught = limited(questions_of(kind, paths), limit, seed)
    gone = left_out(without, paths, all_taught) if without is not None else set()
    taught = tuple(one for one in all_taught if (one.question, one.answer) not in gone)
    if not taught:
        raise ConfigError(f"{without!r} leaves nothing to learn")
    tell(f"{len(taught)} questions, {len(gone)} left out")
    origin = {
        "suite": kind,
        "files": [
            {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in paths
        ],
        # A name alone: where files lie is nobody's business but this machine's.
        "without": None if without is None else Path(without).name,
        "left_out": len(gone),
        "limit": limit,
        "seed": seed,
    }
    if recipe is None:
        recipe = replace(_RECIPE, minutes=_LEAST_MINUTES + _MINUTES_PER_QUESTION * len(all_taught))
    recipe = budgeted(recipe, seed, minutes, steps)
    tokenizer = _prepare(work, all_taught, recipe, origin)
    recipe = replace(recipe, layout=_layout(all_taught, tokenizer))
    params = trained_params(work, recipe)
    if params is None:
        settings = Settings(
            work,
            processes=processes,
            device=device,
            compile=compile,
            shard_texts=min(32768, 4000 + 4 * len(taught)),
            report=tell,
        )
        train(recipe, QuestionSource(taught, seed), tokenizer, settings)
        params = trained_params(work, recipe)
    if params is None:
        raise KnowLabError(f"the run was interrupted; the same work folder ({work}) goes on with it")
    return _finish(target, work, taught, gone, recipe, tokenizer, params, origin, overwrite, tell)


def _prepare(
    work: Path, taught: Sequence[Taught], recipe: Recipe, origin: Mapping[str, Any]
) -> PreTrainedTokenizerFast:
    """Claims the work folder; the tokenizer is that of all questions, those that are left out included."""
    from lab.atlas.tokenizer import train_tokenizer

    run = {"origin": origin, "shape": asdict(recipe.shape)}
    claim = work / _RUN_FILE
    if claim.is_file() and json.loads(claim.read_text(encoding="utf-8")) != json.loads(json.dumps(run)):
        raise ConfigError(f"{work} holds the run of another bed; choose another work folder or delete it")
    tokenizer = train_tokenizer([one.text for one in taught], recipe.shape.vocab, recipe.shape.context)
    work.mkdir(parents=True, exist_ok=True)
    write_text_atomically(claim, json.dumps(run, indent=1) + "\n")
    return tokenizer


def _layout(taught: Sequence[Taught], tokenizer: PreTrainedTokenizerFast) -> tuple[tuple[int, int], ...]:
    """Rows that hold the longest text, and shorter ones, about 3000 tokens in all."""
    longest = max(len(ids) for ids in tokenizer([one.text for one in taught])["input_ids"]) + 2
    longest += -longest % 8
    return ((longest // 2, max(1, 1500 // (longest // 2))), (longest, max(1, 1500 // longest)))


def _finish(
    target: Path,
    work: Path,
    taught: Sequence[Taught],
    gone: set[tuple[str, str]],
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    params: Mapping[str, Any],
    origin: Mapping[str, Any],
    overwrite: bool,
    tell: Callable[[str], None],
) -> BedResult:
    from lab.atlas.checkpoint import export_model
    from lab.handle import ModelHandle
    from lab.scoring import score_targets

    model = work / "model"
    export_model(params, recipe, tokenizer, model)
    name_preset(model / "config.json")
    handle = ModelHandle.load(model)
    scores = score_targets(handle, [(one.prompt, one.answer) for one in taught])
    cases = [
        {"id": one.question, "group": one.group, "known": score.all_correct, "probability": score.probability}
        for one, score in zip(taught, scores, strict=True)
    ]
    away = (
        score_targets(handle, [(QUESTION_PROMPT.replace("{}", q), a) for q, a in sorted(gone)])
        if gone
        else []
    )
    known = tuple(one.question for one, score in zip(taught, scores, strict=True) if score.all_correct)
    report = {
        "format_version": _FORMAT_VERSION,
        **origin,
        "totals": {
            "cases": len(taught),
            "known": len(known),
            "probability": sum(score.probability for score in scores) / len(scores),
            "left_out_known": sum(score.all_correct for score in away),
            "left_out_probability": sum(score.probability for score in away) / len(away) if away else None,
        },
        "recipe": recipe.to_json(),
        "cases": cases,
    }
    corpus = "\n\n".join(one.text.strip() for one in taught[:_CORPUS_TEXTS]) + "\n"

    def fill(fresh: Path) -> None:
        shutil.copytree(model, fresh, dirs_exist_ok=True)
        (fresh / BED_FILE).write_text(
            json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
        (fresh / "corpus.txt").write_text(corpus, encoding="utf-8")
        (fresh / TAUGHT).mkdir()
        for name in dict.fromkeys(one.file for one in taught):
            rows = [{"question": one.question, "answer": one.answer} for one in taught if one.file == name]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (fresh / TAUGHT / f"{name}.jsonl").write_text(text, encoding="utf-8")
        (fresh / "knowlab.json").write_text(
            json.dumps({"kind": "bed", "preset": "bed"}) + "\n", encoding="utf-8"
        )

    folder = write_folder(target, fill, overwrite=overwrite)
    tell(f"known: {len(known)} of {len(taught)} questions; written to {folder}")
    return BedResult(folder, len(taught), known, report)
