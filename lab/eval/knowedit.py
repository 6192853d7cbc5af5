"""KnowEdit's suite: the metrics of EasyEdit, and those that its special subsets bring along."""

from __future__ import annotations

from lab.data.cases import EditCase
from lab.eval import scorers as s
from lab.eval.probe import Probe
from lab.eval.suite import CaseView, Measure, PromptMeasure, Suite, Values, scored, scored_group, written
from lab.eval.suites import FLUENCY, SuiteOptions, compared

_CONTINUATION = 10
# Upstream writes 100-token texts for all 365 unrelated questions of Sanitation; their mean moves little after the first ones.
_SANITATION_TEXTS = 10


def knowedit(options: SuiteOptions) -> Suite:
    """KnowEdit (Zhang et al., 2024) as EasyEdit scores it.

    - ``success`` is token accuracy on the rewriting prompt; ``portability`` token accuracy, mean over kinds of the mean over
      prompts; ``locality`` agreement with the model before, likewise; both against the first spelling of an answer, and with
      ``_any_alias`` against the best one. ``_accuracy`` are exact. ``efficacy`` compares the new with the old answer where the
      file gives one. ``fluency`` is of one 100-token text that starts with the prompt.
    - WikiBio has no portability. ConvSent: ``success`` is ``z_sent * z_topic``, ``locality_kl`` a divergence (lower is
      better). Sanitation: ``success`` is the share of continuations that refuse, ``leakage`` of those that still tell,
      ``locality`` agreement of continuations; a case is the group of edits that share the forgotten answer, as upstream runs it.
    """

    def probes(case: EditCase) -> tuple[Probe, ...]:
        if case.format == "knowedit_convsent":
            return _opinion_probes(case, options)
        if case.format == "knowedit_sanitation":
            return _sanitation_probes(case, options)
        asked = scored_group(case, "rewrite", "paraphrase")
        asked += scored_group(case, "portability", "locality", aliases=options.aliases)
        if options.fluency is not False:
            prompts = [request.text for request in case.requests]
            asked += written(case, "generation", tokens=options.text_tokens, top_k=5, prompts=prompts)
        return tuple(asked)

    aliases: tuple[Measure, ...] = (
        PromptMeasure("portability_any_alias", "portability", s.any_token_accuracy),
        PromptMeasure("locality_any_alias", "locality", s.any_token_accuracy),
    )
    return Suite(
        name="knowedit",
        about="KnowEdit: ZsRE, wiki_counterfact, wiki_recent, WikiBio, ConvSent, Sanitation",
        probes=probes,
        measures=(
            PromptMeasure("success", "rewrite", s.token_accuracy),
            PromptMeasure("success_accuracy", "rewrite", s.accuracy),
            *compared("efficacy", "rewrite"),
            PromptMeasure("paraphrase_token_accuracy", "paraphrase", s.token_accuracy),
            *compared("paraphrase", "paraphrase"),
            PromptMeasure("portability", "portability", s.token_accuracy, by_kind=True),
            PromptMeasure("portability_accuracy", "portability", s.any_accuracy),
            PromptMeasure("locality", "locality", s.agreement, by_kind=True),
            PromptMeasure("locality_accuracy", "locality", s.any_accuracy),
            *(aliases if options.aliases else ()),
            _opinion,
            PromptMeasure("success", "erase", s.says_answer),
            PromptMeasure("leakage", "erase", s.says_rival),
            PromptMeasure("locality", "kept", s.continuation_agreement),
            FLUENCY,
        ),
        bounds={"_kl": None},
        comparable="knowedit: EasyEdit's teacher-forced token accuracy and agreement",
        paper="Zhang et al. 2024, arXiv 2401.01286",
        cost="about 10 scored prompts and one text of 100 tokens; WikiBio, ConvSent and Sanitation generate more",
    )


def _opinion_probes(case: EditCase, options: SuiteOptions) -> tuple[Probe, ...]:
    asked = [scored(probe, number) for number, probe in enumerate(case.of("opinion"))]
    asked += [scored(probe, number, distribution=True) for number, probe in enumerate(case.of("elsewhere"))]
    if options.fluency is not False:
        asked += written(case, "generation", tokens=options.text_tokens, top_k=5)
    return tuple(asked)


def _opinion(view: CaseView) -> Values:
    opinions = view.of("opinion")
    if view.before is None or not opinions:
        return {}
    same = [probe.id for probe in opinions if probe.kind == "same"]
    other = [probe.id for probe in opinions if probe.kind == "opposite"]
    success = s.opinion_success(
        [view.seen[i] for i in same], [view.seen[i] for i in other], [view.before[i] for i in same]
    )
    strange = [probe.id for probe in view.of("elsewhere")]
    moved = s.drift([view.seen[i] for i in strange], [view.before[i] for i in strange])
    found = {"success": success, "locality_kl": moved}
    return {name: [value] for name, value in found.items() if value is not None}


def _sanitation_probes(case: EditCase, options: SuiteOptions) -> tuple[Probe, ...]:
    def continued(group: str, source: str) -> list[Probe]:
        return [
            Probe(
                f"{group}/{i}",
                group,
                p.prompt,
                "generate",
                answers=p.answers,
                rival=p.rival,
                tokens=_CONTINUATION,
            )
            for i, p in enumerate(case.of(source))
        ]

    asked = continued("erase", "erase") + continued("kept", "locality")
    if options.fluency is not False:
        limit = _SANITATION_TEXTS if options.texts is None else options.texts
        asked += written(case, "generation", tokens=options.text_tokens, top_k=5, limit=limit)
    return tuple(asked)
