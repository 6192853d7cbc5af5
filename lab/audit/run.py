"""Running attacks: what each costs, what is finished already, and that the model is as it was."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.audit.base import AttackResult, AuditSubject, Progress, Scores, measured, score_facts
from lab.audit.pool import Build, run_in_processes
from lab.audit.registry import ATTACKS
from lab.audit.report import AuditReport
from lab.errors import ConfigError, PatchError, UnknownNameError
from lab.records import Fact, write_text_atomically

if TYPE_CHECKING:
    from lab.handle import ModelHandle

FINISHED = "attacks"


@dataclass
class Passes:
    """Forward passes counted so far."""

    number: int = 0


@contextmanager
def counted(handles: Sequence[ModelHandle]) -> Iterator[Passes]:
    """Counts the forward passes of models for the length of a ``with``."""
    passes = Passes()

    def count(*_: Any) -> None:
        passes.number += 1

    with ExitStack() as hooks:
        for handle in handles:
            hooks.callback(handle.model.register_forward_pre_hook(count).remove)
        yield passes


def attack_list(words: str) -> tuple[str, ...]:
    """Names of attacks from ``all`` or ``a,b``.

    Raises:
        UnknownNameError: There is no such attack.
        ConfigError: None is named.
    """
    if words.strip() == "all":
        return ATTACKS.names()
    names = tuple(dict.fromkeys(word.strip() for word in words.split(",") if word.strip()))
    if not names:
        raise ConfigError("no attack is named; give 'all', or some of: " + ", ".join(ATTACKS.names()))
    for name in names:
        if name not in ATTACKS:
            raise UnknownNameError("attack", name, ATTACKS.names())
    return names


def plain_scores(subject: AuditSubject) -> Scores:
    """Probabilities of the objects without any attack."""
    return measured(
        subject,
        lambda handle, facts: score_facts(handle, [subject.prompt(fact) for fact in facts], facts),
    )


def run_attack(name: str, subject: AuditSubject, progress: Progress) -> AttackResult:
    """Runs one attack and fills in what it cost."""
    from lab.peak import peak_memory

    attack = ATTACKS.get(name)()
    others = [handle for handle in (subject.controls.oracle, subject.base) if handle is not None]
    handles = list({id(handle): handle for handle in (subject.handle, *others)}.values())
    started = time.perf_counter()
    with counted(handles) as passes, peak_memory(subject.handle.device) as peak:
        result = attack.run(subject, progress)
    cost = {"seconds": time.perf_counter() - started, "forward_passes": float(passes.number)}
    return replace(result, cost=cost | ({} if peak.mb is None else {"peak_mb": peak.mb}))


def checked_attack(name: str, subject: AuditSubject, progress: Progress) -> AttackResult:
    """``run_attack``, and a look whether the model is as it was.

    Raises:
        PatchError: The attack left the model changed.
    """
    bits, state = subject.handle.weights_digest(), subject.handle.state
    result = run_attack(name, subject, progress)
    if subject.handle.weights_digest() != bits or subject.handle.state != state:
        raise PatchError(f"the attack {name!r} left the model changed; reload it before going on")
    return result


def audit(
    subject: AuditSubject,
    names: Sequence[str],
    *,
    title: str = "",
    out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    workers: int = 1,
    build: Build | None = None,
) -> AuditReport:
    """Runs attacks, one after the other or in several processes.

    Args:
        subject: What is audited; its un-attacked scores are computed where they are missing.
        names: Attacks, as registered.
        title: What to call the report.
        out: Folder that keeps every finished attack; a later call with the same subject takes them from there.
        settings: More to be told in the report.
        progress: Told the phase, how much is done, and of how much.
        workers: Processes; results are those of one process, whatever the number.
        build: Makes ``subject`` anew in a process; needed for more than one worker.

    Raises:
        ConfigError: The folder holds an audit of something else, there are no facts, or several workers cannot build them.
        PatchError: An attack left the model changed.
        KnowLabError: An attack failed in its process.
    """
    if not subject.facts:
        raise ConfigError("there are no facts to audit")
    report_progress: Progress = progress or (lambda phase, done, total: None)
    key = _key(subject)
    plain = plain_scores(subject)
    subject = replace(subject, controls=replace(subject.controls, original=plain.facts))
    files = {name: None if out is None else Path(out) / FINISHED / f"{name}.json" for name in names}
    found: dict[str, AttackResult] = {}
    for name, file in files.items():
        result = None if file is None else _finished(file, key)
        if result is not None:
            found[name] = result

    def done(result: AttackResult) -> None:
        file = files[result.name]
        if file is not None:
            document = {"key": key, "result": result.to_json()}
            write_text_atomically(file, json.dumps(document, ensure_ascii=False, indent=1) + "\n")
        found[result.name] = result
        report_progress("attacks", len(found), len(names))

    report_progress("attacks", len(found), len(names))
    missing = [name for name in names if name not in found]
    if workers != 1:
        if build is None:
            raise ConfigError("several workers need to build what is audited, each for itself: give build")
        run_in_processes(missing, build, plain.facts, workers, done)
    else:
        for name in missing:
            done(checked_attack(name, subject, report_progress))
    results = [found[name] for name in names]
    means = {
        side: math.fsum(values) / len(values)
        for side, values in (("facts", plain.facts), ("oracle", plain.oracle), ("never", plain.never))
        if values
    }
    controls = [side for side in ("oracle", "never") if side in means]
    told = {
        "model": subject.handle.name,
        "state": subject.handle.state,
        "facts": len(subject.facts),
        "controls": controls,
        "budget": subject.budget,
        "seed": subject.seed,
        **(settings or {}),
    }
    return AuditReport(title or subject.handle.name, tuple(results), told, means)


def _finished(file: Path, key: str) -> AttackResult | None:
    if not file.is_file():
        return None
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if document["key"] == key:
            return AttackResult.from_json(document["result"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{file} is no finished attack: {error}; remove it, or choose another folder"
        ) from None
    raise ConfigError(
        f"{file.parent.parent} holds an audit of another model, other facts, or other settings; choose another folder"
    )


def _key(subject: AuditSubject) -> str:
    """Names everything that results depend on."""

    def rows(facts: Sequence[Fact]) -> list[dict[str, Any]]:
        return [fact.to_json() for fact in facts]

    oracle, base = subject.controls.oracle, subject.base
    content = {
        "state": subject.handle.state,
        "facts": rows(subject.facts),
        "never": rows(subject.controls.never),
        "retained": rows(subject.retained),
        "oracle": None if oracle is None else oracle.state,
        "base": None if base is None else base.state,
        "format": None if subject.format is None else subject.format.versions,
        "paraphrases": {key: list(value) for key, value in sorted(subject.paraphrases.items())},
        "seed": subject.seed,
        "budget": subject.budget,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
