"""Was this model changed? Classifiers between a model and the same model under a patch, with a benign change beside them.

Any change of weights can be told from activations, so accuracy alone says nothing about unlearning. What counts is how much
better the change in question is told than a change of the same norm that means nothing: noise, or a short fine-tune on kept text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from lab.arch import Role
from lab.audit.learning import Lesson, learn
from lab.errors import ConfigError, MissingDependencyError, PatchError
from lab.eval.stats import Estimate, summarise
from lab.patch import Dense, Provenance, WeightPatch, library_versions
from lab.scoring import log_probs
from lab.tokens import encode_ids
from lab.trace import Site, trace

if TYPE_CHECKING:
    from lab.handle import ModelHandle

View = Literal["logits", "activations", "means", "text"]
# As shares of the features' mean variance. Versions of a prompt differ far less than prompts do, so what parts them are directions
# of small variance: with many prompts hardly any ridge, with few prompts more of it.
RIDGES = (100.0, 1.0, 1e-2, 1e-4)
VIEWS: tuple[View, ...] = ("logits", "activations", "means")
_REPLY_TOKENS = 8


@dataclass(frozen=True)
class Detection:
    """How well two models are told apart.

    Attributes:
        accuracy: Share of right verdicts on prompts that the classifier was not trained on.
        auc: Area under the ROC curve of its scores.
        separation: Cohen's d along the one of the first directions of the centred activations that parts the two models most.
        verdicts: Per prompt, the share of its two versions that were told right.
    """

    accuracy: Estimate
    auc: float
    separation: float
    verdicts: tuple[float, ...] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"accuracy": self.accuracy.to_json(), "auc": self.auc, "separation": self.separation}


@torch.no_grad()
def features(
    handle: ModelHandle,
    prompts: Sequence[str],
    views: Sequence[View] = VIEWS,
    *,
    layer: int | None = None,
    batch_size: int = 32,
) -> dict[View, Tensor]:
    """What classifiers see of each prompt, all of it from one pass over the prompts.

    Args:
        handle: The model, with whatever is applied to it.
        prompts: Texts.
        views: ``"logits"``: log-probabilities behind the last token; ``"activations"``: what the blocks put out at the last
            token, one after the other; ``"means"``: the same on average over tokens; ``"text"``: how often each token stands in
            a short greedy reply.
        layer: The one block of ``"activations"`` and ``"means"``; all of them without it.
        batch_size: Rows per forward pass.

    Returns:
        View to ``[prompt, feature]``, fp32 on the CPU.
    """
    parts: dict[View, list[Tensor]] = {view: [] for view in views}
    if "text" in parts:
        parts["text"].append(_reply_counts(handle, prompts))
    sites = [Site(Role.BLOCK, each) for each in (range(handle.n_layers) if layer is None else (layer,))]
    for start in range(0, len(prompts) if set(views) - {"text"} else 0, batch_size):
        batch = handle.encode(handle.rewrite(prompts[start : start + batch_size]))
        rows = torch.arange(batch.input_ids.shape[0], device=batch.input_ids.device)
        with trace(handle, sites, stop=None if "logits" in parts else sites[-1]) as recording:
            logits = recording.run(batch)
            states = [recording[site] for site in sites]
        if "logits" in parts:
            assert logits is not None  # the pass was not cut
            parts["logits"].append(log_probs(logits[rows, batch.last]).float().cpu())
        if "activations" in parts:
            parts["activations"].append(
                torch.cat([each[rows, batch.last] for each in states], -1).float().cpu()
            )
        if "means" in parts:
            mask = batch.attention_mask[..., None].to(states[0].dtype)
            means = [(each * mask).sum(1) / mask.sum(1) for each in states]
            parts["means"].append(torch.cat(means, -1).float().cpu())
    return {view: torch.cat(each) for view, each in parts.items()}


def _reply_counts(handle: ModelHandle, prompts: Sequence[str]) -> Tensor:
    table = torch.zeros(len(prompts), len(handle.tokenizer))
    for row, reply in enumerate(handle.generate(list(prompts), max_new_tokens=_REPLY_TOKENS)):
        for token in encode_ids(handle.tokenizer, reply, special=False):
            table[row, token] += 1
    return table


def detect(before: Tensor, after: Tensor, *, folds: int = 5, seed: int = 0) -> Detection:
    """A linear discriminant between paired features, cross-validated over prompts.

    Both versions of a prompt lie in the same fold, so nothing about a prompt helps to recognise its other version. The ridge is
    chosen within each fold's training prompts.

    Args:
        before: ``[prompt, feature]`` of one model.
        after: The same of the other, row by row.
        folds: Parts of the cross-validation.
        seed: Deals prompts to folds.

    Raises:
        ConfigError: The features do not pair up, or there are fewer prompts than folds.
    """
    count = before.shape[0]
    if before.shape != after.shape or before.dim() != 2:
        raise ConfigError(f"features {tuple(before.shape)} and {tuple(after.shape)} do not pair up")
    if count < folds or folds < 2:
        raise ConfigError(
            f"{folds} folds need at least as many prompts and at least 2 folds; there are {count} prompts"
        )
    order = np.random.default_rng(seed).permutation(count)
    first, second = before.double().numpy(), after.double().numpy()
    label = np.repeat([0, 1], count)
    scores = np.zeros(2 * count)
    for fold in range(folds):
        held = np.isin(np.arange(count), order[fold::folds])
        ridge = best_ridge(first[~held], second[~held])
        asked = np.concatenate([first[held], second[held]])
        scores[np.tile(held, 2)] = discriminant(first[~held], second[~held], asked, ridge=ridge)
    # A tie decides for neither: half a right answer.
    right = np.where(scores == 0, 0.5, (scores > 0) == (label == 1)).astype(float)
    verdicts = tuple(float(pair) for pair in (right[:count] + right[count:]) / 2)
    return Detection(
        summarise(verdicts), ranking(scores[count:], scores[:count]), separation(before, after), verdicts
    )


def best_ridge(first: np.ndarray, second: np.ndarray) -> float:
    """The ridge that tells most of the second half of the prompts right after training on the first; the largest of equals."""
    half = len(first) // 2
    asked = np.concatenate([first[half:], second[half:]])
    label = np.repeat([-1.0, 1.0], len(first) - half)
    right = [
        float((np.sign(discriminant(first[:half], second[:half], asked, ridge=ridge)) == label).mean())
        for ridge in RIDGES
    ]
    return RIDGES[int(np.argmax(right))]


def discriminant(
    first: np.ndarray, second: np.ndarray, asked: np.ndarray, *, ridge: float = 1.0
) -> np.ndarray:
    """Fisher's linear discriminant with a ridge: scores of rows, above 0 where they are more like ``second``, 0 for neither.

    The axis is ``(S + r I)^-1 (m2 - m1)`` with ``S`` the covariance within the two groups and ``r`` the ridge times its mean
    variance (Friedman 1989). With fewer rows than features it is solved in the rows' space, to the same result.

    Args:
        first, second: ``[row, feature]`` of the two groups.
        asked: ``[other row, feature]``.
        ridge: See above.

    Returns:
        ``[other row]``.
    """
    means = first.mean(0), second.mean(0)
    within = np.concatenate([first - means[0], second - means[1]])
    rows, size = within.shape
    gap = means[1] - means[0]
    strength = ridge * float(np.square(within).sum()) / rows / size
    if not strength or not gap.any():
        axis = gap
    elif rows < size:
        inner = within @ within.T
        inner[np.diag_indices(rows)] += rows * strength
        axis = (gap - within.T @ np.linalg.solve(inner, within @ gap)) / strength
    else:
        outer = within.T @ within / rows
        outer[np.diag_indices(size)] += strength
        axis = np.linalg.solve(outer, gap)
    return asked @ axis - (means[0] + means[1]) @ axis / 2


def linear_scores(
    train: np.ndarray,
    label: np.ndarray,
    test: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    freedom: float = 10.0,
) -> np.ndarray:
    """Decision values of a standardised logistic regression; 0 is undecided.

    Args:
        train: ``[row, feature]``.
        label: ``[row]`` of 0 and 1, both present.
        test: ``[other row, feature]``.
        weights: ``[row]``, how much each row counts; both labels are weighed alike where there are any.
        freedom: Inverse strength of the ridge penalty.

    Returns:
        ``[other row]``.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise MissingDependencyError("scikit-learn", "training a probe", "offline") from None
    centre, spread = train.mean(0), train.std(0)
    kept = spread > 0
    if not kept.any():
        return np.zeros(len(test))
    scale = spread[kept] * np.sqrt(kept.sum())
    model = LogisticRegression(C=freedom, max_iter=1000, class_weight=None if weights is None else "balanced")
    model.fit((train[:, kept] - centre[kept]) / scale, label, sample_weight=weights)
    return model.decision_function((test[:, kept] - centre[kept]) / scale)


def ranking(high: Sequence[float] | np.ndarray, low: Sequence[float] | np.ndarray) -> float:
    """Share of pairs whose first member ranks higher, ties half: the area under the ROC curve."""
    first, second = np.asarray(high, float)[:, None], np.asarray(low, float)[None]
    if not first.size or not second.size:
        raise ConfigError("a ranking needs values on both sides")
    return float(((first > second) + 0.5 * (first == second)).mean())


def separation(before: Tensor, after: Tensor, directions: int = 5) -> float:
    """Largest Cohen's d of the two models along the top right singular vectors of their stacked, centred features."""
    both = torch.cat([before, after]).double()
    centred = both - both.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    found = 0.0
    for axis in axes[:directions]:
        first, second = before.double() @ axis, after.double() @ axis
        pooled = float(((first.var() + second.var()) / 2).sqrt())
        gap = abs(float(first.mean() - second.mean()))
        found = max(found, gap / pooled if pooled > 1e-12 else 0.0)
    return found


def detect_patch(
    handle: ModelHandle,
    patch: Any,
    prompts: Sequence[str],
    *,
    views: Sequence[View] = VIEWS,
    layer: int | None = None,
    folds: int = 5,
    seed: int = 0,
) -> dict[View, Detection]:
    """Tells a model from itself under a patch, on each view.

    Args:
        handle: The model, without the patch; afterwards as before.
        patch: A patch of weights or a memory patch.
        prompts: What both are asked.
        views: What the classifier sees.
        layer: As in ``features``.
        folds, seed: As in ``detect``.
    """
    with handle.writing():
        before = features(handle, prompts, views, layer=layer)
        with patch.applied(handle):
            after = features(handle, prompts, views, layer=layer)
    return {view: detect(before[view], after[view], folds=folds, seed=seed) for view in views}


def noise_like(patch: WeightPatch, *, seed: int = 0) -> WeightPatch:
    """A patch of Gaussian noise on the same parameters, with the same norm in each.

    Raises:
        PatchError: The patch changes nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for name, delta in patch.deltas.items():
        noise = torch.randn(delta.shape, generator=generator)
        deltas[name] = Dense(noise * (delta.norm() / float(noise.norm())))
    if not any(delta.norm() for delta in deltas.values()):
        raise PatchError("a control of equal norm needs a patch that changes weights; this one is zero")
    note = Provenance("noise", {"like": patch.id}, seed=seed, versions=library_versions())
    return WeightPatch(patch.base, deltas, note, patch.parents)


def finetune_like(
    handle: ModelHandle,
    patch: WeightPatch,
    texts: Sequence[str],
    *,
    steps: int = 8,
    rate: float = 1e-4,
    seed: int = 0,
) -> WeightPatch:
    """A short fine-tune on harmless text over the same parameters, scaled to the same norm in each.

    Args:
        handle: The model without the patch; bit-identical afterwards.
        patch: What is imitated.
        texts: Text that the model may well learn more of.
        steps: Steps of AdamW.
        rate: Its learning rate; only the direction matters, the length comes from ``patch``.
        seed: Draws the batches.

    Raises:
        ConfigError: No texts.
        PatchError: The training moved nothing.
    """
    lesson = Lesson(steps=steps, rate=rate, batch_size=16, weights=tuple(sorted(patch.deltas)))
    trained = learn(handle, texts, lesson, seed=seed)
    deltas = {}
    for name, delta in patch.deltas.items():
        moved, wanted = trained.deltas[name].norm(), delta.norm()
        if wanted and not moved:
            raise PatchError(f"the benign fine-tune moved nothing in {name!r}; give it text or more steps")
        deltas[name] = trained.deltas[name].scaled(wanted / moved if moved else 0.0)
    note = Provenance(
        "benign fine-tune",
        {"like": patch.id, "steps": steps, "rate": rate},
        seed=seed,
        versions=library_versions(),
    )
    return WeightPatch(trained.base, deltas, note, trained.parents)


def above_control(
    found: Mapping[View, Detection], controls: Sequence[Mapping[View, Detection]]
) -> dict[View, float]:
    """AUC of the change minus the best control's, per view; negative where the control is told more easily."""
    return {
        view: detection.auc - max((control[view].auc for control in controls), default=0.5)
        for view, detection in found.items()
    }
