"""The suites for factual editing: CounterFact, zsRE, SADR's merged CounterFact and MQuAKE.

``SuiteOptions`` holds what costs time; the defaults are the papers'. Sources of every metric are in the docstrings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lab.data.cases import EditCase
from lab.eval import scorers as s
from lab.eval.probe import Probe
from lab.eval.suite import CaseView, Measure, PromptMeasure, Suite, Values, distracted, scored_group, written
from lab.registry import Registry


@dataclass(frozen=True)
class SuiteOptions:
    """What a suite may leave out.

    Attributes:
        fluency: Whether texts are generated and their n-gram entropy measured; without a choice the suites do that report it in
            print (CounterFact, SADR, KnowEdit), and Atlas does not.
        text_tokens: Length of a generated text, prompt included (the papers': 100).
        texts: How many generation prompts per case at most; all of them when ``None``.
        distract: Whether neighbours are also asked after the edited statement, where the suite's paper does not.
        aliases: Whether every spelling of an answer is scored, where a file gives several.
        convention: For zsRE: ``easyedit`` or ``rome``; must be the one the file was read with.
    """

    fluency: bool | None = None
    text_tokens: int = 100
    texts: int | None = None
    distract: bool = True
    aliases: bool = True
    convention: str = "easyedit"


SuiteFactory = Callable[[SuiteOptions], Suite]

SUITES: Registry[SuiteFactory] = Registry(
    "suite",
    {
        "counterfact": "lab.eval.suites:counterfact",
        "knowedit": "lab.eval.knowedit:knowedit",
        "zsre": "lab.eval.suites:zsre",
        "mquake": "lab.eval.suites:mquake",
        "sadr": "lab.eval.suites:sadr",
        "atlas": "lab.eval.atlas:atlas",
        "atlas_chains": "lab.eval.atlas_chains:atlas_chains",
    },
    group="knowlab.suites",
)


def get_suite(name: str, options: SuiteOptions | None = None) -> Suite:
    """The suite called ``name``.

    Raises:
        UnknownNameError: Nobody registered it; names its neighbours.
    """
    return SUITES.get(name)(options or SuiteOptions())


def compared(name: str, group: str) -> tuple[Measure, ...]:
    """A metric by comparison of probabilities, with its ``_accuracy`` (argmax) and ``_magnitude`` (difference)."""
    return (
        PromptMeasure(name, group, s.success),
        PromptMeasure(f"{name}_accuracy", group, s.accuracy),
        PromptMeasure(f"{name}_magnitude", group, s.magnitude),
    )


FLUENCY = PromptMeasure("fluency", "generation", s.fluency)


def counterfact(options: SuiteOptions) -> Suite:
    """CounterFact as Meng et al. (2022) score it: means per case, then over cases; ``score`` is the harmonic mean of
    efficacy, paraphrase and neighbourhood. ``distract_neighborhood`` is SADR's, asked here too because it is where edits leak.
    """

    def probes(case: EditCase) -> tuple[Probe, ...]:
        asked = scored_group(case, "rewrite", "paraphrase", "neighborhood")
        if options.distract:
            asked += distracted(case, "neighborhood", "distract_neighborhood")
        if options.fluency is not False:
            asked += written(case, "generation", tokens=options.text_tokens, top_k=5, limit=options.texts)
        return tuple(asked)

    return Suite(
        name="counterfact",
        about="CounterFact: efficacy, paraphrases, neighbours, fluency",
        probes=probes,
        measures=(
            *compared("efficacy", "rewrite"),
            *compared("paraphrase", "paraphrase"),
            *compared("neighborhood", "neighborhood"),
            *compared("distract_neighborhood", "distract_neighborhood"),
            FLUENCY,
        ),
        score_parts=("efficacy", "paraphrase", "neighborhood"),
        comparable="counterfact: probability comparison, means per case",
        paper="Meng et al. 2022, arXiv 2202.05262",
        cost="about 23 scored prompts and 10 texts of 100 tokens",
    )


def sadr(options: SuiteOptions) -> Suite:
    """SADR's merged CounterFact: every metric pooled over prompts, magnitudes are the mean probability of the right answer,
    ``score`` is the harmonic mean of the five columns ES, PS, NS, RS and DNS of the paper's Table 3.
    """

    def probes(case: EditCase) -> tuple[Probe, ...]:
        asked = scored_group(
            case, "rewrite", "paraphrase", "neighborhood", "relation", "portability", "commonsense"
        )
        asked += distracted(case, "neighborhood", "distract_neighborhood")
        asked += distracted(case, "relation", "distract_relation")
        if options.fluency is not False:
            asked += written(case, "generation", tokens=options.text_tokens, top_k=5, limit=options.texts)
        return tuple(asked)

    def pooled(name: str, group: str) -> tuple[Measure, ...]:
        return (
            PromptMeasure(name, group, s.success),
            PromptMeasure(f"{name}_accuracy", group, s.accuracy),
            PromptMeasure(f"{name}_magnitude", group, s.probability),
        )

    return Suite(
        name="sadr",
        about="SADR's merged CounterFact: relation and distracted neighbours beside the usual three",
        probes=probes,
        measures=(
            *pooled("efficacy", "rewrite"),
            *pooled("paraphrase", "paraphrase"),
            *pooled("neighborhood", "neighborhood"),
            *pooled("relation", "relation"),
            *pooled("distract_neighborhood", "distract_neighborhood"),
            PromptMeasure("distract_relation", "distract_relation", s.success),
            flat_by_kind("portability", "portability", s.success),
            PromptMeasure("commonsense", "commonsense", s.success),
            FLUENCY,
        ),
        score_parts=("efficacy", "paraphrase", "neighborhood", "relation", "distract_neighborhood"),
        pooling="prompt",
        bounds={"_magnitude": (0.0, 1.0)},
        comparable="sadr: probability comparison, pooled over prompts",
        paper="Wang et al. 2025, arXiv 2502.14838",
        cost="CounterFact's prompts, those of other relations, and both again after the edited statement",
    )


def flat_by_kind(name: str, group: str, scorer: Callable) -> Measure:
    """All prompts of a group under ``name``, and those of each kind under ``name_kind``."""

    def measure(view: CaseView) -> Values:
        found: Values = {name: []}
        for probe in view.of(group):
            before = None if view.before is None else view.before[probe.id]
            value = scorer(probe, view.seen[probe.id], before)
            if value is not None:
                found[name].append(value)
                found.setdefault(f"{name}_{probe.kind}", []).append(value)
        return found

    return measure


def zsre(options: SuiteOptions) -> Suite:
    """zsRE under one of two conventions that share nothing but the file.

    ``easyedit``: edits towards the wrong ``alt``; ``success`` and ``paraphrase_token_accuracy`` are token accuracies,
    ``locality`` is agreement with the model before, ``efficacy`` and ``paraphrase`` compare the new with the true answer.
    ``rome``: edits towards the true answer; token accuracy everywhere, ``neighborhood_token_accuracy`` against the gold answer.
    """
    rome = options.convention == "rome"

    def probes(case: EditCase) -> tuple[Probe, ...]:
        return tuple(scored_group(case, "rewrite", "paraphrase", "portability", "locality"))

    shared: tuple[Measure, ...] = (
        *compared("efficacy", "rewrite"),
        *compared("paraphrase", "paraphrase"),
        PromptMeasure("success", "rewrite", s.token_accuracy),
        PromptMeasure("paraphrase_token_accuracy", "paraphrase", s.token_accuracy),
        PromptMeasure("portability", "portability", s.token_accuracy, by_kind=True),
        PromptMeasure("portability_accuracy", "portability", s.accuracy),
    )
    gold = (
        PromptMeasure("neighborhood_token_accuracy", "locality", s.token_accuracy),
        PromptMeasure("neighborhood_accuracy", "locality", s.accuracy),
    )
    kept = (PromptMeasure("locality", "locality", s.agreement, by_kind=True),)
    return Suite(
        name="zsre",
        about="zsRE and QAEdit: question-style edits",
        probes=probes,
        measures=shared + (gold if rome else kept + gold),
        comparable=f"zsre: {options.convention} targets, teacher-forced token accuracy",
        paper="Levy et al. 2017, arXiv 1706.04115; Mitchell et al. 2022, arXiv 2110.11309",
        cost="3 scored prompts",
    )


_MULTI_HOP_TOKENS = 12


def mquake(options: SuiteOptions) -> Suite:
    """MQuAKE (Zhong et al., 2023).

    ``success``: every edit's own prompt is answered with its target (edit-wise, argmax). ``hop_accuracy``: all single hops
    after the edits are answered (instance-wise). ``multi_hop_accuracy``: at least one of the three questions is answered, by a
    continuation that starts with the new answer or an alias, case, punctuation and articles aside.
    """

    def probes(case: EditCase) -> tuple[Probe, ...]:
        asked = scored_group(case, "rewrite") + scored_group(case, "hop", aliases=True)
        asked += [
            Probe(
                f"multi_hop/{number}",
                "multi_hop",
                f"Question: {probe.prompt}\nAnswer:",
                "generate",
                answers=probe.answers,
                rival=probe.rival,
                tokens=_MULTI_HOP_TOKENS,
            )
            for number, probe in enumerate(case.of("multi_hop"))
        ]
        return tuple(asked)

    def all_hops(view: CaseView) -> Values:
        hops = [s.any_accuracy(probe, view.seen[probe.id]) for probe in view.of("hop")]
        return {"hop_accuracy": [float(all(hops))] if hops else []}

    def any_question(view: CaseView) -> Values:
        asked = view.of("multi_hop")
        right = [s.starts_with_answer(view.seen[probe.id].text, probe.answers) for probe in asked]
        old = (view.case.meta.get("old_answer", ""), *[probe.rival for probe in asked[:1] if probe.rival])
        stale = [s.starts_with_answer(view.seen[probe.id].text, old) for probe in asked]
        found = {"multi_hop_accuracy": [float(any(right))], "multi_hop_old_answer": [float(any(stale))]}
        return found if asked else {}

    return Suite(
        name="mquake",
        about="MQuAKE: multi-hop consequences of one or several edits",
        probes=probes,
        measures=(
            *compared("efficacy", "rewrite"),
            PromptMeasure("success", "rewrite", s.accuracy),
            all_hops,
            any_question,
        ),
        comparable="mquake: zero-shot continuation, normalised aliases",
        paper="Zhong et al. 2023, arXiv 2305.14795",
        cost="1 to 4 edits, their hops scored, 3 short answers",
    )
