"""Needle: the few value vectors that carry a concept are found by what they say and overwritten.

ConceptVectors (arXiv 2406.11614; verified for the noise): a value vector is a column of a down projection. It is a candidate where the
tokens of the answers stand out among what the unembedding makes of it; of the candidates, those are chosen without which the
model knows the facts least and the retained ones best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from editors.base import check_layers
from editors.tuning import check_positive, target_lines
from editors.unlearning.base import UnlearnMethod, UnlearnOptions
from editors.unlearning.gradient import check_facts
from editors.unlearning.plain import names_of, origin, settled, told, weight_patch
from editors.values import Progress
from lab.arch import Role
from lab.errors import ConfigError, NumericalError
from lab.handle import ModelHandle
from lab.patch import LowRank, WeightPatch
from lab.records import Fact
from lab.tokens import encode_ids
from lab.trace import Site, trace


@dataclass(frozen=True)
class NeedleConfig:
    """Settings.

    Attributes:
        layers: Blocks that are searched; all without any.
        columns: How many value vectors are overwritten.
        candidates: How many are tried, the most telling first.
        mode: ``noise`` is added (the paper), or the vector is set to ``zero``.
        noise: Standard deviation, in root mean squares of the vector.
        batch_size: Facts per forward pass.
    """

    layers: tuple[int, ...] = ()
    columns: int = 3
    candidates: int = 20
    mode: Literal["noise", "zero"] = "noise"
    noise: float = 1.0
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_positive(self, "columns", "candidates", "noise", "batch_size")
        if self.mode not in ("noise", "zero"):
            raise ConfigError(f"unknown mode {self.mode!r}; use 'noise' or 'zero'")
        if self.candidates < self.columns:
            raise ConfigError(f"{self.columns} columns cannot come from {self.candidates} candidates")


@dataclass(frozen=True)
class NeedleUnlearner:
    """See the module. Make one with ``get_unlearner``."""

    options: UnlearnOptions
    config: NeedleConfig
    settings: frozenset[str]

    def unlearn(
        self,
        handle: ModelHandle,
        forget: Sequence[Fact],
        retain: Sequence[Fact] = (),
        *,
        progress: Progress | None = None,
    ) -> WeightPatch:
        """One patch that changes a few columns. See ``Unlearner.unlearn``."""
        config = self.config
        check_facts(self.options.name, forget, retain)
        layers = config.layers or tuple(range(handle.n_layers))
        check_layers(handle, layers)
        # What a choice costs retained facts is estimated on as many as there are to forget.
        beside = retain[: len(forget)]
        with handle.writing():
            found = telling_columns(handle, forget, layers)[: config.candidates]
            before = [_known(handle, facts, None, config.batch_size) for facts in (forget, beside)]
            tried: list[dict[str, Any]] = []
            for number, (score, layer, column) in enumerate(found, start=1):
                lost, also = (
                    old - _known(handle, facts, (layer, column), config.batch_size)
                    for old, facts in zip(before, (forget, beside), strict=True)
                )
                tried.append(
                    {"layer": layer, "column": column, "telling": score, "lost": lost, "retained_lost": also}
                )
                if progress is not None:
                    progress("candidates", number, len(found))
            chosen = sorted(tried, key=lambda each: each["retained_lost"] - each["lost"])[: config.columns]
            deltas = self._deltas(handle, chosen)
        provenance = origin(
            self.options, {**told(config), "layers": list(layers)}, forget, {"columns": chosen}
        )
        return weight_patch(handle, deltas, provenance)

    def _deltas(self, handle: ModelHandle, chosen: Sequence[dict[str, Any]]) -> dict[str, LowRank]:
        generator = torch.Generator().manual_seed(self.options.seed)
        deltas = {}
        for layer in sorted({each["layer"] for each in chosen}):
            columns = sorted(each["column"] for each in chosen if each["layer"] == layer)
            weight = handle.weight(Role.MLP_OUT, layer)
            wide = torch.promote_types(weight.parameter.dtype, torch.float32)
            old = weight.canonical()[:, columns].to("cpu", wide)
            if self.config.mode == "zero":
                left = -old
            else:
                drawn = torch.randn(old.shape, generator=generator, dtype=torch.float64).to(wide)
                left = self.config.noise * old.square().mean(0).sqrt() * drawn
            right = torch.zeros(len(columns), weight.shape[1], dtype=wide)
            right[range(len(columns)), columns] = 1.0
            deltas[weight.name] = LowRank(left, right)
        return deltas


def telling_columns(
    handle: ModelHandle, facts: Sequence[Fact], layers: Sequence[int]
) -> list[tuple[float, int, int]]:
    """Columns by how far the answers' tokens stand out in what the unembedding makes of them.

    Returns:
        Score, layer and column, the most telling first: the mean over answer tokens of the token's z-score in the column's
        vocabulary scores.

    Raises:
        NumericalError: A score is NaN or infinite.
    """
    head: Any = handle.module(Role.UNEMBED)
    table = head.weight.detach().float()
    tokens = sorted({token for fact in facts for token in encode_ids(handle.tokenizer, f" {fact.object}")})
    centred = table - table.mean(0)
    found = []
    for layer in layers:
        columns = handle.weight(Role.MLP_OUT, layer).canonical().float()
        parts = [centred @ part for part in columns.split(1024, dim=1)]
        scores = torch.cat([part[tokens].mean(0) / part.std(0).clamp_min(1e-12) for part in parts])
        if not bool(scores.isfinite().all()):
            raise NumericalError(f"the value vectors of layer {layer} are not finite; reload the model")
        found += [(score, layer, column) for column, score in enumerate(scores.tolist())]
    return sorted(found, key=lambda each: (-each[0], each[1], each[2]))


def _known(handle: ModelHandle, facts: Sequence[Fact], without: tuple[int, int] | None, size: int) -> float:
    """Mean log-probability of the facts' answers, with one column silent; 0 for no facts."""
    if not facts:
        return 0.0

    def silence(keys: Tensor) -> Tensor:
        changed = keys.clone()
        changed[..., without[1]] = 0  # type: ignore[index]
        return changed

    writes = {} if without is None else {Site(Role.MLP_OUT, without[0], "in"): silence}
    total = 0.0
    with trace(handle, writes=writes) as recording:
        for start in range(0, len(facts), size):
            lines = target_lines(handle, [(fact.text, fact.object) for fact in facts[start : start + size]])
            logits = recording.run(lines.batch, logits_to_keep=lines.keep)
            assert logits is not None  # no site stops the pass
            total -= float(lines.row_losses(lines.of(logits)).sum())
    mean = total / len(facts)
    if not math.isfinite(mean):
        raise NumericalError("the facts' log-probabilities are not finite; load the model in float32")
    return mean


def _build(options: UnlearnOptions) -> NeedleUnlearner:
    return NeedleUnlearner(options, settled(options, NeedleConfig), names_of(NeedleConfig))


NEEDLE = UnlearnMethod(
    "needle",
    "Overwrites the few value vectors that say the answers",
    "Hong et al. 2024, arXiv 2406.11614 (ConceptVectors)",
    "a forward pass per candidate",
    "surgery",
    "verified",
    _build,
)
