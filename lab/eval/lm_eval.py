"""General ability through lm-eval: any handle, with whatever is applied to it, as one of its language models.

lm-eval asks three things of a model: the log-likelihood of a continuation, that of a whole text, and a continuation up to a stop.
Their meaning is that of its interface (Gao et al., EleutherAI/lm-evaluation-harness): spaces at a border belong to the
continuation, context and continuation are tokenised together and split, a text without a context follows a start token, and
what is too long loses its beginning. The answers here come from ``lab.scoring`` and ``ModelHandle.generate``; the library itself
is imported only to run its tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.errors import ConfigError, MissingDependencyError, UnknownNameError
from lab.eval.stats import Z95, Estimate

if TYPE_CHECKING:
    from lab.handle import ModelHandle

Ability = dict[str, dict[str, Estimate]]
"""Task to metric to figure."""

DEFAULT_NEW_TOKENS = 256


def log_likelihoods(
    handle: ModelHandle, pairs: Sequence[tuple[str, str]], *, batch_size: int = 64
) -> list[tuple[float, bool]]:
    """Natural-log probability of each continuation after its context, and whether greedy decoding gives it.

    Args:
        handle: The model to ask.
        pairs: Context and continuation; the two are joined as they are.
        batch_size: Rows in one forward pass.

    Raises:
        ConfigError: A continuation has no tokens, or does not fit into the model's context.
    """
    from lab.scoring import score_token_targets

    contexts = handle.rewrite([context for context, _ in pairs])
    rows = [
        _split(handle, context, continuation)
        for context, (_, continuation) in zip(contexts, pairs, strict=True)
    ]
    scores = score_token_targets(handle, rows, batch_size=batch_size)
    return [(score.sum_logprob, score.all_correct) for score in scores]


def text_log_likelihoods(handle: ModelHandle, texts: Sequence[str], *, batch_size: int = 64) -> list[float]:
    """Natural-log probability of each whole text after a start token.

    A text that is longer than the model's context is cut into windows; each token counts once, with as much before it as fits.

    Args:
        handle: The model to ask.
        texts: Any.
        batch_size: Rows in one forward pass.
    """
    from lab.scoring import score_token_targets
    from lab.tokens import encode_ids

    rows: list[tuple[list[int], list[int]]] = []
    owners: list[int] = []
    for number, text in enumerate(texts):
        for window in _windows(
            [_start(handle), *encode_ids(handle.tokenizer, text, special=False)], _room(handle)
        ):
            rows.append(window)
            owners.append(number)
    totals = [0.0] * len(texts)
    for owner, score in zip(owners, score_token_targets(handle, rows, batch_size=batch_size), strict=True):
        totals[owner] += score.sum_logprob
    return totals


def continuations(
    handle: ModelHandle, requests: Sequence[tuple[str, Mapping[str, Any]]], *, batch_size: int = 32
) -> list[str]:
    """Continues each context until one of its stops.

    Args:
        handle: The model to ask.
        requests: Context and lm-eval's settings: ``until``, ``max_gen_toks``, ``do_sample``, ``temperature``, ``top_k``.
        batch_size: Rows per forward pass.

    Raises:
        ConfigError: The context leaves no room for the answer.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, (_, settings) in enumerate(requests):
        until = settings.get("until") or ()
        stop = (until,) if isinstance(until, str) else tuple(until)
        new = int(settings.get("max_gen_toks", DEFAULT_NEW_TOKENS))
        heat = float(settings.get("temperature", 1.0)) if settings.get("do_sample") else 0.0
        groups.setdefault((stop, new, heat, settings.get("top_k")), []).append(number)
    found = [""] * len(requests)
    for (stop, new, heat, top_k), members in groups.items():
        limit = _room(handle)
        prompts = [_shortened(handle, requests[number][0], limit - new) for number in members]
        texts = handle.generate(
            prompts,
            max_new_tokens=new,
            stop=[mark for mark in stop if mark],
            temperature=heat,
            top_k=top_k,
            batch_size=batch_size,
        )
        for number, text in zip(members, texts, strict=True):
            found[number] = text
    return found


def require_lm_eval() -> None:
    """Raises ``MissingDependencyError`` where lm-eval is not installed."""
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise MissingDependencyError("lm_eval", "measuring general ability", "bench")


def language_model(handle: ModelHandle, *, batch_size: int = 64) -> Any:
    """The handle as an ``lm_eval.api.model.LM``.

    Raises:
        MissingDependencyError: lm-eval is not installed.
    """
    require_lm_eval()
    from lm_eval.api.model import LM

    class HandleModel(LM):
        """Answers from a handle as it stands at each question."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return log_likelihoods(handle, [request.args for request in requests], batch_size=batch_size)

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return text_log_likelihoods(
                handle, [request.args[0] for request in requests], batch_size=batch_size
            )

        def generate_until(self, requests: list[Any]) -> list[str]:
            return continuations(handle, [request.args for request in requests], batch_size=batch_size)

        @property
        def tokenizer_name(self) -> str:
            return handle.name.replace("/", "__")

    return HandleModel()


def general_ability(
    handle: ModelHandle,
    tasks: Sequence[str],
    *,
    task_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> Ability:
    """Runs tasks of lm-eval on the model as it stands.

    Args:
        handle: The model.
        tasks: Names of tasks.
        task_path: A folder with further tasks, as YAML files.
        limit: Rows of each task; all without it.
        batch_size: Rows in one forward pass.
        seed: Draws few-shot examples; global generators are left as they were.

    Returns:
        Task to metric to figure; intervals are normal, from lm-eval's standard errors.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        UnknownNameError: No such task.
        ConfigError: ``task_path`` is no folder, or lm-eval gave nothing back.
    """
    model = language_model(handle, batch_size=batch_size)
    from importlib import import_module

    from lab.model_state import random_state

    simple_evaluate = import_module("lm_eval").simple_evaluate

    with random_state(seed):
        manager = _tasks(tasks, task_path)
        found = simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    if not found:
        raise ConfigError("lm-eval gave no results; it answers on the first of several processes only")
    return {name: _figures(row, found["n-samples"].get(name)) for name, row in found["results"].items()}


def _tasks(names: Sequence[str], task_path: str | Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    if not names:
        raise ConfigError("general ability needs at least one task")
    manager = None
    if task_path is not None:
        if not Path(task_path).is_dir():
            raise ConfigError(f"there is no folder {str(task_path)!r} with tasks of lm-eval")
        manager = TaskManager(include_path=str(task_path), include_defaults=False)
    if manager is None or not set(names) <= set(manager.all_tasks):
        # lm-eval's own tasks are some ten thousand files, read only where they are wanted.
        manager = TaskManager(include_path=None if task_path is None else str(task_path))
    for name in names:
        if name not in manager.all_tasks:
            raise UnknownNameError("task of lm-eval", name, manager.all_tasks)
    return manager


def _figures(row: Mapping[str, Any], samples: Mapping[str, int] | None) -> dict[str, Estimate]:
    n = int(samples["effective"]) if samples else 0
    found = {}
    for key, value in row.items():
        name, comma, rest = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = row.get(f"{name}_stderr,{rest}")
        half = Z95 * float(error) if isinstance(error, (int, float)) else 0.0
        label = name if rest == "none" else f"{name} ({rest})"
        found[label] = Estimate(float(value), float(value) - half, float(value) + half, n)
    return found


def _split(handle: ModelHandle, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of context and continuation, cut from the left to what fits."""
    from lab.tokens import encode_ids

    body = context.rstrip()
    continuation = context[len(body) :] + continuation
    if body:
        head = encode_ids(handle.tokenizer, body)
        whole = encode_ids(handle.tokenizer, body + continuation)
    else:
        head = [_start(handle)]
        whole = [*head, *encode_ids(handle.tokenizer, continuation, special=False)]
    tail = whole[len(head) :]
    room = _room(handle)
    if not tail or len(tail) > room:
        raise ConfigError(
            f"the continuation {continuation[:40]!r} has {len(tail)} tokens; it needs at least one, and at most {room} fit "
            f"into {handle.name!r}"
        )
    # As lm-eval does: the border is where the context's own tokens end, even if a token runs across it.
    kept = whole[: len(head)][-(room + 1 - len(tail)) :]
    return kept, tail


def _windows(ids: Sequence[int], room: int) -> Iterator[tuple[list[int], list[int]]]:
    """Pieces that predict ``ids[1:]`` once each, with at most ``room`` tokens fed at a time."""
    done = 1
    while done < len(ids):
        end = min(done + room, len(ids))
        # The last window reaches back as far as fits.
        first = max(0, end - 1 - room)
        yield list(ids[first:done]), list(ids[done:end])
        done = end


def _start(handle: ModelHandle) -> int:
    for token in (handle.tokenizer.bos_token_id, handle.tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return handle.pad_id


def _room(handle: ModelHandle) -> int:
    """How many tokens fit into the model."""
    return int(getattr(handle.config, "max_position_embeddings", None) or 2048)


def _shortened(handle: ModelHandle, context: str, room: int) -> str:
    from lab.tokens import encode_ids

    if room < 1:
        raise ConfigError(
            f"max_gen_toks leaves no room for a context in {handle.name!r}, which takes {_room(handle)} tokens"
        )
    ids = encode_ids(handle.tokenizer, context, special=False)
    return context if len(ids) <= room else handle.decode(ids[-room:])
