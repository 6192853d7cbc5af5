"""Beds: small models that really know what a public benchmark file holds true, so that its edits change something.

    >>> make_bed("counterfact", "counterfact.json", "beds/counterfact", limit=450, minutes=25, work_dir="runs/counterfact")

A bed folder holds the model and its tokenizer, ``bed.json`` (what is known, counted after training on wordings that no training
text holds), ``corpus.txt`` (training texts, for key statistics) and ``knowlab.json`` (which preset edits it).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.atlas.bed_corpus import BedCorpus
from lab.atlas.bed_plan import BedCase, BedPlan, HeldOut, plan_bed
from lab.atlas.bed_truths import KINDS, read_true_cases
from lab.atlas.recipe import Recipe
from lab.errors import ConfigError, KnowLabError, OutputExistsError
from lab.records import write_text_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from lab.atlas.material import Document
    from lab.handle import ModelHandle

__all__ = ["BED_FILE", "KINDS", "BedResult", "known_cases", "make_bed", "read_bed"]

BED_FILE = "bed.json"
_FORMAT_VERSION = 1
_RUN_FILE, _TOKENIZER_FILE = "bed-run.json", "tokenizer.json"
_TOKENIZER_TEXTS = 4000
_CORPUS_TEXTS = 20000
_PROBES = 200
# Smaller batches than Atlas': there is less to learn, and more steps help more than smoother ones.
_RECIPE = Recipe("bed", layout=((64, 24), (128, 8)))
# As many facts as that fill these batches; fewer take quarters of them, and more steps in the same time.
_FACTS_OF_A_BATCH = 750
# Largest part of a budget of steps that the warm-up takes.
_WARM_SHARE = 1 / 8
# Minutes of two CPU cores that a bed of the default shape takes, at least and for each fact.
_LEAST_MINUTES, _MINUTES_PER_FACT = 3.0, 1 / 250


@dataclass(frozen=True)
class BedResult:
    """A finished bed.

    Attributes:
        folder: Where it lies.
        cases: How many cases it was made for.
        known: Ids of those whose held-out wordings the model answers rightly.
        report: The content of ``bed.json``.
    """

    folder: Path
    cases: int
    known: tuple[str, ...]
    report: Mapping[str, Any]


@dataclass(frozen=True)
class BedSource:
    """The trainer's view of a plan; it travels to other processes.

    Attributes:
        plan: What to teach.
        seed: Fixes the texts.
        tokenizer: JSON of the fast tokenizer, to leave out texts that fit no row.
        longest: Most tokens of a text.
    """

    plan: BedPlan
    seed: int
    tokenizer: str
    longest: int

    def documents(self, stream: int) -> Iterator[Document]:
        """Endless texts of one stream, none longer than a row."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.tokenizer)
        for document in BedCorpus(self.plan, f"{self.seed}:{stream}").documents():
            # A byte-level tokenizer never makes more tokens than bytes; the end token takes one place.
            short = len(document.text.encode()) < self.longest
            if short or len(tokenizer.encode(document.text).ids) < self.longest:
                yield document

    def probes(self) -> dict[str, list[tuple[str, str]]]:
        """Held-out wordings and the trained prompts of the first cases."""
        held = [ask for case in self.plan.cases for ask in case.held_out][:_PROBES]
        trained = [ask for case in self.plan.cases for ask in case.prompts][:_PROBES]
        sets = {"held_out": held, "trained": trained}
        return {
            name: [(ask.prompt, f" {ask.answers[0]}") for ask in asked]
            for name, asked in sets.items()
            if asked
        }


def make_bed(
    kind: str,
    file: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
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
    """Trains a bed from one public file, or from several of one suite.

    Args:
        kind: ``counterfact``, ``knowedit`` (ZsRE, wiki_counterfact, wiki_recent), ``mquake``, ``sadr`` or ``zsre``.
        file: The upstream file as it is, or several.
        out: Where the bed goes, all at once when it is finished.
        limit: How many cases, drawn with ``seed``; all that do not contradict one another without it.
        seed: Fixes the draw, what is held out, the initial weights and the texts.
        minutes: Budget of training time; by the number of facts without it.
        steps: Budget of steps in its place; the run can then be repeated.
        work_dir: Checkpoints and log, outside the source tree; ``<out>.work`` by default. The same folder goes on with an
            interrupted run.
        recipe: Shape and rates, in place of the default ones; ``minutes``, ``steps`` and ``seed`` take precedence.
        device: ``cpu`` or ``cuda``.
        processes: Processes on a CPU; 0 takes one per core.
        compile: Whether the training pass is compiled.
        overwrite: Whether a bed that is there already may be replaced.
        progress: Receives lines of progress.

    Raises:
        DataError: A file is absent, malformed, or states nothing that is true before an edit.
        ConfigError: ``limit`` or a budget makes no sense, or the work folder belongs to another bed.
        OutputExistsError: ``out`` holds something already.
        KnowLabError: The run was interrupted; calling again with the same work folder goes on with it.
    """
    files = [Path(file)] if isinstance(file, (str, os.PathLike)) else [Path(one) for one in file]
    target = Path(out)
    if limit is not None and limit < 1:
        raise ConfigError(f"a bed needs at least one case, limit is {limit}")
    if (minutes is not None and minutes <= 0) or (steps is not None and steps <= 0):
        raise ConfigError("the budget of a bed must be positive")
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise OutputExistsError(f"{target} is not empty; choose another folder or overwrite it on purpose")
    tell = progress or _quiet
    work = Path(work_dir) if work_dir is not None else target.with_name(f"{target.name}.work")
    plan = plan_bed(kind, read_true_cases(kind, files), limit=limit, seed=seed)
    tell(
        f"{len(plan.cases)} cases, {len(plan.facts)} facts; dropped as contradictory: {len(plan.contradicting)} of "
        f"{plan.available} cases, {plan.contradicting_prompts} other prompts"
    )
    origin = {
        "suite": kind,
        "files": [{"name": f.name, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()} for f in files],
        "limit": limit,
        "seed": seed,
    }
    if recipe is None:
        recipe = sized(_RECIPE, len(plan.facts))
    recipe = budgeted(recipe, seed, minutes, steps)
    tokenizer = _prepare(work, plan, recipe, seed, origin)
    params = _train(work, plan, recipe, tokenizer, seed, device, processes, compile, tell)
    return _finish(target, work, plan, recipe, tokenizer, params, origin, overwrite, tell)


def read_bed(folder: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The content of ``bed.json``.

    Raises:
        ConfigError: The folder holds none, or one of a newer version.
    """
    path = Path(folder) / BED_FILE
    if not path.is_file():
        raise ConfigError(f"{folder} holds no {BED_FILE}; it is no bed")
    report = json.loads(path.read_text(encoding="utf-8"))
    if report.get("format_version") != _FORMAT_VERSION:
        raise ConfigError(f"{path} has format version {report.get('format_version')}, not {_FORMAT_VERSION}")
    return report


def known_cases(folder: str | os.PathLike[str], file: str | os.PathLike[str]) -> frozenset[str] | None:
    """The cases of a file that a bed was taught and answers on held-out wordings.

    A bed that was taught some cases of a file answers others by luck ("male", "Europe"), and has never read what their edits bring.

    Returns:
        Ids as the file's suite gives them; ``None`` where the folder holds no bed, or one of another file or suite.

    Raises:
        ConfigError: The bed is of a newer version.
    """
    path = Path(file)
    if not (Path(folder) / BED_FILE).is_file() or not path.is_file():
        return None
    report = read_bed(folder)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest not in [one["sha256"] for one in report["files"]]:
        return None
    prefix = f"{path.stem}:" if len(report["files"]) > 1 else ""
    known = (case["id"] for case in report["cases"] if case["known"])
    return frozenset(id.removeprefix(prefix) for id in known if id.startswith(prefix))


def _quiet(line: str) -> None:
    del line


def sized(recipe: Recipe, facts: int) -> Recipe:
    """The recipe for so many facts: its minutes, and batches of a quarter, a half, three quarters or all of the rows.

    A batch that states each fact of a small bed several times says little more than half of it would; the time is better spent
    on a further step. Quarters, so that beds of like size share a compiled pass.
    """
    quarters = max(1, min(4, -(-4 * facts // _FACTS_OF_A_BATCH)))
    layout = tuple((length, rows * quarters // 4) for length, rows in recipe.layout)
    return replace(recipe, layout=layout, minutes=_LEAST_MINUTES + _MINUTES_PER_FACT * facts)


def budgeted(recipe: Recipe, seed: int, minutes: float | None, steps: int | None) -> Recipe:
    """The recipe with this seed and budget; steps take precedence over minutes, and a short run warms up in a part of them."""
    recipe = replace(recipe, seed=seed)
    if steps is not None:
        warm = min(recipe.warmup_steps, max(1, int(steps * _WARM_SHARE)))
        return replace(recipe, steps=steps, warmup_steps=warm)
    return replace(recipe, minutes=minutes, steps=0) if minutes is not None else recipe


def _prepare(
    work: Path, plan: BedPlan, recipe: Recipe, seed: int, origin: Mapping[str, Any]
) -> PreTrainedTokenizerFast:
    """Claims the work folder for this bed; the tokenizer of an interrupted run is taken up again."""
    from transformers import PreTrainedTokenizerFast

    from lab.atlas.tokenizer import train_tokenizer

    run = {"origin": origin, "shape": asdict(recipe.shape)}
    claim = work / _RUN_FILE
    if claim.is_file() and json.loads(claim.read_text(encoding="utf-8")) != json.loads(json.dumps(run)):
        raise ConfigError(f"{work} holds the run of another bed; choose another work folder or delete it")
    saved = work / "tokenizer"
    if (saved / _TOKENIZER_FILE).is_file() and claim.is_file():
        return PreTrainedTokenizerFast.from_pretrained(str(saved))
    corpus = BedCorpus(plan, f"{seed}")
    texts = [*corpus.statements(), *corpus.sample_texts(_TOKENIZER_TEXTS)]
    tokenizer = train_tokenizer(texts, recipe.shape.vocab, recipe.shape.context)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(saved))
    write_text_atomically(claim, json.dumps(run, indent=1) + "\n")
    return tokenizer


def _train(
    work: Path,
    plan: BedPlan,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    device: str,
    processes: int,
    compile: bool,
    tell: Callable[[str], None],
) -> Mapping[str, Any]:
    from lab.atlas.train import Settings, train

    params = trained_params(work, recipe)
    if params is not None:
        return params
    longest = max(length for length, _ in recipe.layout)
    source = BedSource(plan, seed, tokenizer.backend_tokenizer.to_str(), longest)
    texts = min(32768, 4000 + 4 * len(plan.facts))
    settings = Settings(
        work, processes=processes, device=device, compile=compile, shard_texts=texts, report=tell
    )
    train(recipe, source, tokenizer, settings)
    params = trained_params(work, recipe)
    if params is None:
        raise KnowLabError(f"the run was interrupted; the same work folder ({work}) goes on with it")
    return params


def trained_params(work: Path, recipe: Recipe) -> Mapping[str, Any] | None:
    """The parameters of the work folder's run, if it has used up its budget."""
    from lab.atlas.checkpoint import load_checkpoint

    found = load_checkpoint(work)
    if found is None:
        return None
    params, _, done = found
    over = done["step"] >= recipe.steps if recipe.steps else done["seconds"] >= 60 * recipe.minutes
    return params if over else None


def _finish(
    target: Path,
    work: Path,
    plan: BedPlan,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    params: Mapping[str, Any],
    origin: Mapping[str, Any],
    overwrite: bool,
    tell: Callable[[str], None],
) -> BedResult:
    from lab.atlas.checkpoint import export_model
    from lab.files import write_folder
    from lab.handle import ModelHandle

    model = work / "model"
    # Counted on the weights as they are shipped, rounded to fp16.
    export_model(params, recipe, tokenizer, model)
    name_preset(model / "config.json")
    report = {"format_version": _FORMAT_VERSION, **origin} | _report(ModelHandle.load(model), plan, recipe)
    corpus = "\n\n".join(
        _one_block(text) for text in BedCorpus(plan, f"{recipe.seed}").sample_texts(_CORPUS_TEXTS)
    )
    extras = {
        BED_FILE: json.dumps(report, ensure_ascii=False, indent=1) + "\n",
        "corpus.txt": corpus + "\n",
        "knowlab.json": json.dumps({"kind": "bed", "preset": "bed"}) + "\n",
    }

    def fill(fresh: Path) -> None:
        shutil.copytree(model, fresh, dirs_exist_ok=True)
        for name, text in extras.items():
            (fresh / name).write_text(text, encoding="utf-8")

    folder = write_folder(target, fill, overwrite=overwrite)
    known = tuple(case["id"] for case in report["cases"] if case["known"])
    tell(f"known: {len(known)} of {len(plan.cases)} cases; written to {folder}")
    return BedResult(folder, len(plan.cases), known, report)


def name_preset(path: Path) -> None:
    """Writes into a model's ``config.json`` which preset edits it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"knowlab_preset": "bed"}, indent=2) + "\n", encoding="utf-8")


def _one_block(text: str) -> str:
    # Blank lines part the texts of a corpus file.
    return "\n".join(line for line in text.split("\n") if line.strip())


def _report(handle: ModelHandle, plan: BedPlan, recipe: Recipe) -> dict[str, Any]:
    """Asks every held-out wording, every trained prompt and every held-out neighbour of the cases."""
    right = _answered(
        handle, [ask for case in plan.cases for ask in (*case.held_out, *case.prompts, *case.neighbors)]
    )

    def share(asked: Sequence[HeldOut]) -> float | None:
        return sum(right[ask] for ask in asked) / len(asked) if asked else None

    def row(case: BedCase) -> dict[str, Any]:
        found: dict[str, Any] = {"id": case.id, "known": all(right[ask] for ask in case.held_out)}
        found["held_out"] = [_asked(ask) for ask in case.held_out]
        found |= {"held_out_neighbors": [ask.prompt for ask in case.neighbors]} if case.neighbors else {}
        return found | ({"insertion": True} if case.insertion else {})

    rows = [row(case) for case in plan.cases]
    return {
        "totals": {
            "available": plan.available,
            "contradicting": len(plan.contradicting),
            "contradicting_prompts": plan.contradicting_prompts,
            "cases": len(plan.cases),
            "known": sum(row["known"] for row in rows),
            "facts": len(plan.facts),
            "trained_accuracy": share([ask for case in plan.cases for ask in case.prompts]),
            "held_out_accuracy": share([ask for case in plan.cases for ask in case.held_out]),
            "held_out_neighbor_accuracy": share([ask for case in plan.cases for ask in case.neighbors]),
        },
        "contradicting": list(plan.contradicting),
        "recipe": recipe.to_json(),
        "cases": rows,
    }


def _asked(ask: HeldOut) -> dict[str, Any]:
    return {"prompt": ask.prompt, "answers": list(ask.answers)}


def _answered(handle: ModelHandle, asked: Sequence[HeldOut]) -> dict[HeldOut, bool]:
    """Whether the greedy answer to each prompt is right in one of its spellings."""
    from lab.scoring import score_targets

    pairs = list(dict.fromkeys((ask.prompt, answer) for ask in asked for answer in ask.answers))
    scores = score_targets(handle, pairs)
    right = {pair: score.all_correct for pair, score in zip(pairs, scores, strict=True)}
    return {ask: any(right[ask.prompt, answer] for answer in ask.answers) for ask in asked}
