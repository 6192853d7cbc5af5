"""Training runs of the shipped models by name: where they work, how they go on, how they become weights."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from lab.atlas.checkpoint import export_model, load_checkpoint
from lab.atlas.recipe import Recipe, get_recipe
from lab.atlas.source import AtlasSource
from lab.atlas.weights import core_path, weights_path, weights_root
from lab.atlas.world import load_world
from lab.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

_FIRST = "atlas"
_TOKENIZER_TEXTS = 40_000
_NAME_REPEATS = 200
_DATA_FILES = ("format.toml", "relations.toml")


def default_work_dir(name: str) -> Path:
    """The work folder of a run in the user's cache: ``XDG_CACHE_HOME`` or the platform's place, then ``knowlab/train``."""
    chosen = os.environ.get("XDG_CACHE_HOME")
    if chosen:
        root = Path(chosen)
    elif sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = Path.home() / ".cache"
    return root / "knowlab" / "train" / name


def world_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """The tokenizer of the built-in world, the same for all its models, so that their tokens can be compared.

    It is that of the shipped `atlas` as long as the recipe has as many tokens: texts change from version to version, and a
    tokenizer that is trained on them again would part names elsewhere.
    """
    from transformers import PreTrainedTokenizerFast

    from lab.atlas.tokenizer import train_tokenizer

    shipped = weights_path(_FIRST)
    if shipped is not None:
        found = PreTrainedTokenizerFast.from_pretrained(str(shipped))
        if len(found) == recipe.shape.vocab and found.model_max_length == recipe.shape.context:
            return found
    texts = [document.text for document in islice(AtlasSource().documents(0), _TOKENIZER_TEXTS)]
    # Parts of names become tokens at the beginning of a line too, so that a name is read the same everywhere.
    fiction = load_world().fiction
    names = [part for kind in ("people", "firms", "works") for part in fiction[kind]["first"]]
    return train_tokenizer([*texts, *names * _NAME_REPEATS], recipe.shape.vocab, recipe.shape.context)


def train_atlas(
    name: str,
    work: Path | None = None,
    *,
    core: Path | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    processes: int = 0,
    device: str = "cpu",
    compile: bool = True,
    resume: bool = True,
    report: Callable[[str], None] = print,
) -> Path:
    """Trains a shipped model, or goes on with an interrupted run.

    Args:
        name: Name of the recipe.
        work: Work folder; ``default_work_dir(name)`` by default.
        core: Work folder of the run that this one starts from. That run is carried out first where it is not finished,
            with the budget of its recipe. Without it: a finished run in the core's default folder, else the core that is
            shipped, else a run in that default folder.
        minutes: Budget of training time, in place of the recipe's; what an interrupted run used counts.
        steps: Budget of steps, in place of ``minutes``.
        processes: Processes on a CPU; 0 takes one per core.
        device: ``cpu`` or ``cuda``.
        compile: Whether to compile the pass.
        resume: Go on from the checkpoint in the work folder when there is one.
        report: Receives lines of progress.

    Returns:
        The work folder, which ``export_atlas`` reads.

    Raises:
        UnknownNameError: There is no such recipe.
        ConfigError: The work folder belongs to another recipe.
    """
    from transformers import PreTrainedTokenizerFast

    from lab.atlas.train import Settings, train

    recipe = get_recipe(name)
    if minutes is not None:
        recipe = replace(recipe, minutes=minutes, steps=0)
    if steps is not None:
        recipe = replace(recipe, steps=steps)
    work = work or default_work_dir(name)
    begins = not resume or load_checkpoint(work) is None
    source = AtlasSource(recipe.seed, recipe.without, mixture=recipe.mixture)
    settings = Settings(work, processes=processes, device=device, compile=compile, report=report)
    start, place = None, core or default_work_dir(recipe.core)
    given = core_path(recipe.core) if core is None else None
    if recipe.core and begins:
        start = _finished(place)
        if start is None and given is not None:
            report(f"{recipe.name} starts from the {recipe.core} that is shipped")
            start, place = _weights(given), given
        elif start is None:
            report(f"{recipe.name} starts from {recipe.core}, which comes first")
            train_atlas(
                recipe.core, place, processes=processes, device=device, compile=compile, report=report
            )
            start = _finished(place)
            if start is None:
                return work  # interrupted; the next call goes on where this one was
    if not begins:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(work / "tokenizer"))
    else:
        # Weights mean nothing under another tokenizer, so a model reads with that of its core.
        read = place if place == given else place / "tokenizer"
        tokenizer = (
            PreTrainedTokenizerFast.from_pretrained(str(read)) if recipe.core else world_tokenizer(recipe)
        )
        tokenizer.save_pretrained(str(work / "tokenizer"))
    train(recipe, source, tokenizer, settings, resume=resume, start=start)
    return work


def _finished(work: Path) -> Mapping[str, Tensor] | None:
    """The parameters of a run that has used up its budget; None when it has not."""
    found = load_checkpoint(work)
    return found[0] if found is not None and found[2]["finished"] else None


def _weights(folder: Path) -> Mapping[str, Tensor]:
    """The parameters of a model folder, by Hugging Face name."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def export_atlas(name: str, work: Path | None = None, out: Path | None = None) -> Path:
    """Turns a run's checkpoint into a model folder with fp16 weights, tokenizer and prompt format.

    Args:
        name: Name of the recipe.
        work: Work folder of the run.
        out: Where the model goes; among the shipped weights by default.

    Returns:
        The model folder.

    Raises:
        ConfigError: The work folder holds no run of this recipe.
    """
    from transformers import PreTrainedTokenizerFast

    work = work or default_work_dir(name)
    found = load_checkpoint(work)
    if found is None:
        raise ConfigError(f"{work} holds no checkpoint; `knowlab atlas train {name}` makes one")
    params, _, progress = found
    recipe = Recipe.from_json(progress["recipe"])
    if recipe.name != name:
        raise ConfigError(f"{work} holds a run of {recipe.name!r}, not of {name!r}")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(work / "tokenizer"))
    here = Path(__file__).parent
    extras = {file: (here / file).read_text(encoding="utf-8") for file in _DATA_FILES}
    target = out or weights_root() / name
    export_model(params, recipe, tokenizer, target, extras=extras)
    return target
