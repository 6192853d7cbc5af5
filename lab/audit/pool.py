"""Attacks of one audit in several processes, each with a model of its own; finished ones come back one by one."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any

from lab.audit.base import AttackResult, AuditSubject
from lab.errors import ConfigError, KnowLabError

Build = Callable[[], AuditSubject]
"""Makes the subject anew in a fresh process; a function that pickle can name, or a frozen value that can be called."""


def _serve(line: Any, build: Build, original: tuple[float, ...], threads: int) -> None:
    """A worker process: answers each attack's name with its result, or with what went wrong, until told to stop."""
    import torch

    from lab.audit.run import checked_attack

    try:
        torch.set_num_threads(threads)
        subject: AuditSubject | None = None
        while (name := line.recv()) is not None:
            try:
                if subject is None:
                    subject = build()
                    controls = replace(subject.controls, original=original)
                    subject = replace(subject, controls=controls)
                line.send(checked_attack(name, subject, lambda phase, done, total: None))
            except Exception as error:  # it crosses a process; the parent raises it
                line.send(f"{type(error).__name__}: {error}")
    except (KeyboardInterrupt, EOFError):
        pass  # the parent speaks for all of them


def run_in_processes(
    names: Sequence[str],
    build: Build,
    original: Sequence[float],
    workers: int,
    done: Callable[[AttackResult], None],
) -> None:
    """Runs attacks in fresh processes; an attack depends on no other, so their order does not matter.

    Args:
        names: Attacks.
        build: Makes what is audited, in each process.
        original: The un-attacked scores, which all attacks compare with.
        workers: How many processes at a time; they share the cores.
        done: Told of every result, in this process, as soon as it is there.

    Raises:
        ConfigError: No workers.
        KnowLabError: An attack failed, or its process died; those that finished before were told.
    """
    if workers < 1:
        raise ConfigError(f"the number of workers must be at least 1, it is {workers}")
    context = multiprocessing.get_context("spawn")
    threads = max(1, multiprocessing.cpu_count() // workers)
    waiting = list(names)
    busy: dict[Any, str] = {}
    processes: dict[Any, Any] = {}
    try:
        for _ in range(min(workers, len(names))):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(there, build, tuple(original), threads), daemon=True
            )
            process.start()
            there.close()
            processes[here] = process
            busy[here] = waiting.pop(0)
            here.send(busy[here])
        while busy:
            ready: list[Any] = list(wait(list(busy)))
            for line in ready:
                name = busy.pop(line)
                try:
                    answer = line.recv()
                except EOFError:
                    processes[line].join()
                    answer = f"its process ended with code {processes[line].exitcode}"
                if isinstance(answer, str):
                    raise KnowLabError(f"the attack {name!r} failed: {answer}")
                if waiting:
                    busy[line] = waiting.pop(0)
                    line.send(busy[line])
                done(answer)
    finally:
        for line, process in processes.items():
            if line not in busy and process.is_alive():
                line.send(None)
            else:
                process.terminate()
            process.join()
            line.close()
