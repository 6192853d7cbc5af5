"""Parametric traces of a concept (ConceptVectors, arXiv 2406.11614): value vectors of MLPs that write its tokens, before and after.

A column of a down projection is what one neuron writes. Columns whose projection on the vocabulary is led by the concept's tokens
hold it; an unlearning that leaves them as they were has suppressed the concept, not removed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lab.arch import Role
from lab.audit.spectra import final_gain, token_scores
from lab.errors import ConfigError
from lab.tokens import join_target

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from lab.records import Fact


@dataclass(frozen=True)
class ValueVector:
    """One column of a down projection.

    Attributes:
        layer: Its block.
        column: Its neuron.
        strength: Standard deviations by which it favours the concept's tokens over the vocabulary's mean.
    """

    layer: int
    column: int
    strength: float


@dataclass(frozen=True)
class VectorChange:
    """What a patch did to one value vector.

    Attributes:
        vector: Which.
        cosine: Of the vector before and after.
        distance: Length of the difference over the length before.
        jaccard: Overlap of the tokens that it favours most, before and after.
        strength: How much it favours the concept afterwards.
    """

    vector: ValueVector
    cosine: float
    distance: float
    jaccard: float
    strength: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "layer": self.vector.layer,
            "column": self.vector.column,
            "strength_before": self.vector.strength,
            "strength_after": self.strength,
            "cosine": self.cosine,
            "distance": self.distance,
            "jaccard": self.jaccard,
        }


def concept_tokens(handle: ModelHandle, fact: Fact) -> list[int]:
    """The tokens of a fact's object behind its prompt."""
    return sorted(set(join_target(handle.tokenizer, fact.text, fact.object)[1]))


@torch.no_grad()
def strengths(handle: ModelHandle, layer: int, concepts: Sequence[Sequence[int]]) -> Tensor:
    """How much each value vector of a layer favours each concept's tokens.

    A vector's mean projection on the tokens, in standard deviations of its projections on the whole vocabulary. Mean and
    deviation come from the unembedding's own moments, so no projection on the whole vocabulary is formed.

    Args:
        handle: The model, with whatever is applied to it.
        layer: The block.
        concepts: Token ids of each concept.

    Returns:
        ``[concept, column]``, fp64.

    Raises:
        ConfigError: A concept without tokens.
    """
    if not all(len(tokens) for tokens in concepts):
        raise ConfigError("a concept needs at least one token")
    table = handle.weight(Role.UNEMBED).canonical().double().cpu() * final_gain(handle)
    centred = table - table.mean(0)
    covariance = centred.T @ centred / table.shape[0]
    vectors = handle.weight(Role.MLP_OUT, layer).canonical().double().cpu()
    deviation = ((covariance @ vectors) * vectors).sum(0).clamp_min(1e-24).sqrt()
    wanted = torch.stack([centred[list(tokens)].mean(0) for tokens in concepts])
    return wanted @ vectors / deviation


def find_vectors(
    handle: ModelHandle, concepts: Sequence[Sequence[int]], *, count: int = 5, threshold: float = 0.0
) -> list[list[ValueVector]]:
    """The value vectors that favour each concept most, over all layers.

    Args:
        handle: The model that still knows the concepts.
        concepts: Token ids of each.
        count: Vectors per concept at most.
        threshold: Least strength; a concept without any such vector has an empty list (report the coverage).
    """
    table = torch.stack([strengths(handle, layer, concepts) for layer in range(handle.n_layers)], 1)
    found = []
    for rows in table:
        flat = rows.reshape(-1)
        best = flat.topk(min(count, flat.numel())).indices.tolist()
        found.append(
            [
                ValueVector(place // rows.shape[1], place % rows.shape[1], float(flat[place]))
                for place in best
                if float(flat[place]) > threshold
            ]
        )
    return found


@torch.no_grad()
def read_vectors(handle: ModelHandle, vectors: Sequence[ValueVector]) -> Tensor:
    """The vectors as they are now, ``[vector, d]`` in fp64."""
    if not vectors:
        return torch.zeros(0, handle.hidden_size, dtype=torch.float64)
    return torch.stack(
        [
            handle.weight(Role.MLP_OUT, each.layer).canonical()[:, each.column].double().cpu()
            for each in vectors
        ]
    )


def compare_vectors(
    handle: ModelHandle,
    vectors: Sequence[ValueVector],
    concept: Sequence[int],
    before: Tensor,
    after: Tensor,
    *,
    top: int = 200,
) -> list[VectorChange]:
    """What became of a concept's vectors.

    Args:
        handle: Gives norm and unembedding.
        vectors: Which.
        concept: The concept's tokens.
        before: ``[vector, d]``.
        after: ``[vector, d]``.
        top: How many favoured tokens the overlap looks at; no more than a tenth of the vocabulary.
    """
    if not vectors:
        return []
    scores = [token_scores(handle, part) for part in (before, after)]
    top = max(1, min(top, scores[0].shape[1] // 10))
    favoured = [part.topk(top, dim=1).indices.tolist() for part in scores]
    now = (scores[1][:, list(concept)].mean(1) - scores[1].mean(1)) / scores[1].std(
        1, correction=0
    ).clamp_min(1e-12)
    cosine = torch.cosine_similarity(before, after, dim=1)
    distance = (after - before).norm(dim=1) / before.norm(dim=1).clamp_min(1e-12)
    return [
        VectorChange(
            vector,
            float(cosine[index]),
            float(distance[index]),
            len(set(favoured[0][index]) & set(favoured[1][index]))
            / len(set(favoured[0][index]) | set(favoured[1][index])),
            float(now[index]),
        )
        for index, vector in enumerate(vectors)
    ]
