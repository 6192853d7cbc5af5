"""ROCR: a subject's keys are sent to where another subject leads, in closed form (arXiv 2506.07795; verified).

Each subject's key is the mean input of a block's down projection at its last token, over six short contexts and the facts' own
prompts. With ``P`` onto directions that general text hardly uses, layer by layer and on top of the updates below,
``[P (K Kᵀ + C) + λI] X = P K Rᵀ``, ``ΔW = Xᵀ``, where ``R`` is a share of what is missing at the last layer and ``C`` the keys of
earlier patches that are applied. It is AlphaEdit's equation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from editors.base import EditorOptions, check_layers, key_stats
from editors.keys import read_keys, read_sites
from editors.patches import carried, low_rank, stats_note, temporarily
from editors.prefixes import Prefixes
from editors.rows import EditRow, request_rows
from editors.tuning import check_positive
from editors.unlearning.base import UnlearnMethod, UnlearnOptions
from editors.unlearning.gradient import check_facts
from editors.unlearning.plain import names_of, origin, settled, told, weight_patch
from editors.values import Progress, ValueConfig, optimise_value
from lab.arch import Role
from lab.errors import ConfigError
from lab.handle import ModelHandle
from lab.patch import Carry, LowRank, WeightPatch
from lab.records import EditRequest, Fact
from lab.solve import Projector, null_space, null_space_factors
from lab.stats import Corpus, KeyStats, StatsCache
from lab.trace import Site

KIND = "rocr"
"""Of what its patches carry."""

CONTEXTS = (
    "{}",
    "Answer this question about {}",
    "Here is a question on {}",
    "Say what you know of {}",
    "Tell me more about {}",
    "A short answer concerning {}",
)
"""Where a subject is read; nothing behind its last token reaches the key."""

DECOYS = ("Mount Everest", "Japan", "the Moon", "water")
"""Where keys are sent to: the first of these that is not to be forgotten."""


@dataclass(frozen=True)
class RocrConfig:
    """Settings.

    Attributes:
        layers: Blocks whose down projections change, ascending; a fifth to two fifths of the depth without any.
        mode: Where keys are sent: ``unrelated``: to the state of another subject; ``reject``: to a state that makes ``refusal``
            likely; ``noise``: to a random one.
        decoy: The other subject.
        refusal: See ``mode``.
        own_prompts: The facts' prompts are contexts too.
        hold: How much the keys of other facts' subjects, where such facts are given, count among those of earlier patches, all
            contexts of a subject together as one; the paper reads no retained facts (0).
        ridge: λ.
        threshold: Eigenvalues of the key statistics below this may be used; without it, the smallest that hold ``energy`` of them.
        energy: See ``threshold``.
        clamp: Of ``reject`` and ``noise``: how far from the subject's state the target may lie, in norms of that state.
        steps: Of ``reject``.
        push: Of ``reject``: how many times the change that was found is wanted; where other forms of the facts outlast it.
        searches: Of ``reject``: facts per subject whose changes are averaged; the paper takes one.
        corpus, stats: Text behind the key statistics, and where these are kept.
    """

    layers: tuple[int, ...] = ()
    mode: Literal["unrelated", "reject", "noise"] = "unrelated"
    decoy: str = ""
    refusal: str = "unknown"
    own_prompts: bool = True
    hold: float = 0.0
    ridge: float = 1.0
    threshold: float | None = None
    energy: float = 0.02
    clamp: float = 4.0
    push: float = 1.0
    searches: int = 1
    steps: int = 25
    corpus: str | Corpus = "auto"
    stats: StatsCache | None = None

    def __post_init__(self) -> None:
        check_positive(self, "ridge", "energy", "clamp", "steps", "push", "searches")
        if self.mode not in ("unrelated", "reject", "noise"):
            raise ConfigError(f"unknown mode {self.mode!r}; use 'unrelated', 'reject' or 'noise'")
        if not self.energy < 1:
            raise ConfigError(f"energy must lie in (0, 1), it is {self.energy}")
        if not self.hold >= 0:
            raise ConfigError(f"hold must not be negative, it is {self.hold}")


@dataclass(frozen=True)
class RocrUnlearner:
    """See the module. Make one with ``get_unlearner``."""

    options: UnlearnOptions
    config: RocrConfig
    settings: frozenset[str]

    def unlearn(
        self,
        handle: ModelHandle,
        forget: Sequence[Fact],
        retain: Sequence[Fact] = (),
        *,
        progress: Progress | None = None,
    ) -> WeightPatch:
        """One low-rank patch for all subjects; retained facts are read for ``hold`` alone. See ``Unlearner.unlearn``."""
        config = self.config
        check_facts(self.options.name, forget, retain)
        layers = config.layers or default_layers(handle)
        check_layers(handle, layers)
        with handle.writing():
            subjects = list(dict.fromkeys(fact.subject for fact in forget))
            editing = EditorOptions(
                self.options.name, stats=config.stats or StatsCache(), corpus=config.corpus
            )
            stats = key_stats(handle, editing, layers, progress)
            rows = [self._rows(handle, subject, forget) for subject in subjects]
            others = sorted({fact.subject for fact in retain} - set(subjects)) if config.hold else []
            held = [self._rows(handle, subject, retain if config.own_prompts else ()) for subject in others]
            goal = self._targets(handle, subjects, rows, forget, layers[-1], progress)
            past = carried(
                [entry.patch for entry in handle.applied if isinstance(entry.patch, WeightPatch)],
                KIND,
                handle,
            )
            deltas: dict[str, LowRank] = {}
            keys_of: dict[str, Tensor] = {}
            notes: list[dict[str, Any]] = []
            site = Site(Role.BLOCK, layers[-1])
            for index, layer in enumerate(layers):
                with temporarily(handle, deltas):
                    flat = [row for each in rows for row in each]
                    keys = _mean(read_keys(handle, flat, [layer])[layer].keys, rows).T
                    now = read_sites(handle, [each[0] for each in rows], [site], site)[site].T
                missing = goal - now
                projector = usable(stats[layer], config)
                name = f"layer {layer}"
                earlier = [carry.tensors[name].double() for carry in past if name in carry.tensors]
                earlier += self._held(handle, held, layer, deltas)
                known = torch.cat(earlier, dim=1) if earlier else keys[:, :0]
                left, right = null_space_factors(
                    projector, keys, missing / (len(layers) - index), known, config.ridge
                )
                deltas[handle.weight(Role.MLP_OUT, layer).name] = low_rank(left, right, name)
                keys_of[name] = keys
                notes.append(
                    {"layer": layer, "null_space": projector.rank, "width": len(stats[layer].moment),
                     "missing": float(torch.linalg.vector_norm(missing, dim=0).mean())}
                )  # fmt: skip
                if progress is not None:
                    progress("layers", index + 1, len(layers))
        extra = {
            "layers": notes,
            "subjects": subjects,
            "held_subjects": len(others),
            "statistics": stats_note(stats),
        }
        provenance = origin(self.options, {**told(config), "layers": list(layers)}, forget, extra)
        made = weight_patch(handle, deltas, provenance)
        return WeightPatch(made.base, made.deltas, provenance, made.parents, (Carry(KIND, keys_of),))

    def _rows(self, handle: ModelHandle, subject: str, forget: Sequence[Fact]) -> list[EditRow]:
        own = [fact.prompt for fact in forget if fact.subject == subject] if self.config.own_prompts else []
        return [
            row
            for template in (*CONTEXTS, *own)
            for row in request_rows(handle, EditRequest(subject, template, subject, "it"), ["{}"])
        ]

    def _held(
        self,
        handle: ModelHandle,
        rows: Sequence[Sequence[EditRow]],
        layer: int,
        deltas: Mapping[str, LowRank],
    ) -> list[Tensor]:
        """Mean keys of subjects that should stay, ``[in, subject]``, weighted; none without rows."""
        if not rows:
            return []
        with temporarily(handle, deltas):
            keys = read_keys(handle, [row for each in rows for row in each], [layer])[layer].keys
        # One factor of their second moment stands for them all: it has no more columns than keys have numbers.
        values, vectors = torch.linalg.eigh(keys.T @ keys / len(rows[0]))
        return [math.sqrt(self.config.hold) * vectors * values.clamp_min(0).sqrt()]

    def _targets(
        self,
        handle: ModelHandle,
        subjects: Sequence[str],
        rows: Sequence[Sequence[EditRow]],
        forget: Sequence[Fact],
        layer: int,
        progress: Progress | None,
    ) -> Tensor:
        """Where each subject's state at the last layer is sent, ``[d, subject]`` fp64."""
        config, site = self.config, Site(Role.BLOCK, layer)
        if config.mode == "unrelated":
            decoy = config.decoy or next(each for each in DECOYS if each not in subjects)
            row = request_rows(handle, EditRequest("decoy", CONTEXTS[0], decoy, "it"), ["{}"])
            state = read_sites(handle, row, [site], site)[site]
            return state.T.expand(-1, len(subjects))
        if config.mode == "reject":
            asked = [
                fact
                for subject in subjects
                for fact in [each for each in forget if each.subject == subject][: config.searches]
            ]
            requests = [EditRequest.from_fact(fact, config.refusal) for fact in asked]
            search = ValueConfig(steps=config.steps, lr=0.1, kl_factor=0.125, clamp=config.clamp)
            found = optimise_value(
                handle, requests, layer, Role.BLOCK, Prefixes.of([]), search, progress=progress
            )
            # The search runs in the fact's own prompt; the change, and not the place, is what other contexts share.
            changes = torch.stack([value.delta.to("cpu", torch.float64) for value in found])
            places = [
                [place for place, fact in enumerate(asked) if fact.subject == name] for name in subjects
            ]
            change = config.push * torch.stack([changes[own].mean(0) for own in places], dim=1)
            return read_sites(handle, [each[0] for each in rows], [site], site)[site].T + change
        state = read_sites(handle, [each[0] for each in rows], [site], site)[site].T
        noise = torch.randn(
            state.shape, generator=torch.Generator().manual_seed(self.options.seed), dtype=torch.float64
        )
        size = config.clamp * torch.linalg.vector_norm(state, dim=0) / torch.linalg.vector_norm(noise, dim=0)
        return state + noise * size


def default_layers(handle: ModelHandle) -> tuple[int, ...]:
    """Blocks from a fifth to two fifths of the depth; one at least."""
    low = round(0.2 * handle.n_layers)
    return tuple(range(low, max(low + 1, round(0.4 * handle.n_layers) + 1)))[: handle.n_layers - low]


def usable(stats: KeyStats, config: RocrConfig) -> Projector:
    """Projector onto directions of keys that general text hardly uses; the absolute threshold, or a share of the energy."""
    if config.threshold is not None:
        return stats.null_space(config.threshold)
    values = torch.linalg.eigvalsh(stats.moment.double()).clamp_min(0)
    inside = int((values.cumsum(0) <= config.energy * values.sum()).sum())
    kept = min(max(inside, 1), len(values) - 1)
    # The middle between two neighbours, so that rounding on either side keeps the same directions.
    return null_space(stats.moment, float((values[kept - 1] + values[kept]) / 2))


def _mean(keys: Tensor, rows: Sequence[Sequence[EditRow]]) -> Tensor:
    """Each subject's mean key, ``[subject, in]``."""
    return torch.stack([part.mean(0) for part in keys.split([len(each) for each in rows])])


def _build(options: UnlearnOptions) -> RocrUnlearner:
    return RocrUnlearner(options, settled(options, RocrConfig), names_of(RocrConfig))


ROCR = UnlearnMethod(
    "rocr",
    "Subjects redirected to another one, in closed form",
    "arXiv 2506.07795",
    "key statistics once; then seconds for any number of subjects",
    "closed form",
    "verified",
    _build,
)
