"""What a model says without documents: its own memory, edits included; and how much of documents it can read."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from lab.data.text import normalize_answer
from lab.records import Passage
from lab.tokens import encode_ids
from rag.decoding.contrast import position_limit
from rag.preference.match import says
from rag.preference.stage import Dataset, Report, Stage, finish, records
from rag.prompts import prompts_for

if TYPE_CHECKING:
    from lab.handle import ModelHandle


def probe_memory(
    handle: ModelHandle,
    data: Dataset,
    *,
    samples: int = 10,
    temperature: float = 0.7,
    delta: float = 1.0,
    seed: int = 0,
    max_new_tokens: int = 24,
    progress: Report | None = None,
) -> Stage:
    """Asks every question without documents, greedily and by sampling.

    A question counts as known when at least ``delta`` of all answers are right by the item's ``memory`` (Divide-Then-Align,
    arXiv:2505.20871, takes all of them). Where nobody wrote down what is right, answers that agree with each other to that
    degree count; where an item's answer cannot be remembered by anybody (``answers`` without ``memory``), it is never known.

    Args:
        handle: The model.
        data: Items.
        samples, temperature, seed: Of the sampled answers, this many a question.
        delta: See above.
        max_new_tokens: Of an answer.
        progress: Told about every pass.

    Adds:
        ``prior`` (the greedy answer), ``prior_raw`` (as generated), ``prior_correct`` and ``prior_unknown`` (shares),
        ``prior_agreement`` (share of the most frequent answer), ``prior_known``.
    """
    prompts = prompts_for(handle)
    rows = records(data)
    asked = [prompts.closed(row["question"]) for row in rows]
    tell, total = progress or (lambda *_: None), len(asked) * (1 + samples)
    greedy = handle.generate(
        asked,
        max_new_tokens=max_new_tokens,
        stop=prompts.stop,
        progress=lambda done, _: tell("memory", done, total),
    )
    drawn = (
        handle.generate(
            [prompt for prompt in asked for _ in range(samples)],
            max_new_tokens=max_new_tokens,
            stop=prompts.stop,
            temperature=temperature,
            seed=seed,
            progress=lambda done, _: tell("memory", len(asked) + done, total),
        )
        if samples
        else []
    )
    for number, row in enumerate(rows):
        texts = [greedy[number], *drawn[number * samples : (number + 1) * samples]]
        answers = [prompts.answer(text) for text in texts]
        correct = sum(says(answer, row["memory"]) for answer in answers) / len(answers)
        silent = sum(not prompts.knows(answer) for answer in answers) / len(answers)
        modal = Counter(map(normalize_answer, answers)).most_common(1)[0][1] / len(answers)
        unwritten = not row["memory"] and not row["answers"]
        agreed = unwritten and prompts.knows(answers[0]) and modal >= delta
        row |= {
            "prior": answers[0],
            "prior_raw": texts[0],
            "prior_correct": correct,
            "prior_unknown": silent,
            "prior_agreement": modal,
            "prior_known": agreed or (bool(row["memory"]) and correct >= delta),
        }
    return finish(
        "memory",
        len(rows),
        rows,
        samples=samples,
        temperature=temperature,
        delta=delta,
        seed=seed,
        model=handle.fingerprint,
        state=handle.state,
        known=sum(row["prior_known"] for row in rows),
    )


def fitting_contexts(handle: ModelHandle, data: Dataset, *, room: int = 32) -> Stage:
    """Takes distractors out of contexts that the model cannot read whole, the longest first; two documents stay.

    A context that is too long even so is left out, and counted.

    Args:
        handle: The model; its positions are the limit.
        data: Contexts.
        room: Tokens kept free for the answer.
    """
    prompts, limit, rows = prompts_for(handle), position_limit(handle) - room, records(data)
    made, dropped, shortened = [], Counter[str](), 0
    for row in rows:
        told = list(zip(row["documents"], row["kinds"], strict=True))
        whole = len(told)

        def length(told: list[tuple[str, str]] = told, question: str = row["question"]) -> int:
            prompt = prompts.direct(question, [Passage("", text) for text, _ in told])
            return len(encode_ids(handle.tokenizer, prompt))

        while length() > limit and len(told) > 2:
            told.remove(
                max((each for each in told if each[1] in ("hard", "easy")), key=lambda each: len(each[0]))
            )
        if length() > limit:
            dropped["longer than the model can read"] += 1
            continue
        shortened += len(told) < whole
        kinds = [kind for _, kind in told]
        place = next((at for at, kind in enumerate(kinds) if kind in ("gold", "counterfactual")), -1)
        made.append(row | {"documents": [text for text, _ in told], "kinds": kinds, "gold_pos": place})
    return finish("fitting", len(rows), made, dropped, limit=limit, shortened=shortened)
