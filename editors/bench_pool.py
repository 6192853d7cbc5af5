"""Where the cells of a comparison run: in this process, in several, or on Ray. Finished cells come back one by one."""

from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing.connection import wait
from typing import Any

from editors.bench import BenchOptions, Cell, Row, Workshop
from lab.errors import ConfigError, MissingDependencyError

Done = Callable[[Cell, Row], None]
"""Called in this process with each cell and its row, as soon as it is finished."""


def run_here(cells: Sequence[Cell], options: BenchOptions, done: Done) -> None:
    """Runs cells in their order in this process."""
    workshop = Workshop(options)
    for cell in cells:
        done(cell, workshop.attempt(cell))


def next_cell(waiting: list[Cell], last: Cell | None) -> Cell:
    """Takes a cell out of ``waiting``: one of the model that the worker holds, else the first."""
    for cell in waiting:
        if last is not None and cell.model == last.model:
            waiting.remove(cell)
            return cell
    return waiting.pop(0)


def _serve(line: Any, options: BenchOptions) -> None:
    """A worker process: answers each cell with its row until told to stop."""
    workshop = Workshop(options)
    try:
        while (cell := line.recv()) is not None:
            line.send(workshop.attempt(cell))
    except (KeyboardInterrupt, EOFError):
        pass  # the parent speaks for all of them


def run_in_processes(cells: Sequence[Cell], options: BenchOptions, workers: int, done: Done) -> None:
    """Runs cells in fresh processes, each of which keeps its model between cells.

    A process that dies (killed for memory, for example) costs its cell, which is reported, and is replaced.

    Args:
        cells: What to run.
        options: What they share.
        workers: How many processes at a time.
        done: Told of every cell.
    """
    if workers < 1:
        raise ConfigError(f"the number of workers must be at least 1, it is {workers}")
    context = multiprocessing.get_context("spawn")
    waiting, busy = list(cells), {}
    processes: dict[Any, Any] = {}

    def start() -> Any:
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, options), daemon=True)
        process.start()
        there.close()
        processes[here] = process
        return here

    def give(line: Any, last: Cell | None) -> None:
        if waiting:
            busy[line] = next_cell(waiting, last)
            line.send(busy[line])

    try:
        for _ in range(min(workers, len(cells))):
            give(start(), None)
        while busy:
            ready = wait(list(busy))
            for line in [line for line in busy if line in ready]:
                cell = busy.pop(line)
                try:
                    row = line.recv()
                except EOFError:
                    process = processes.pop(line)
                    process.join()
                    done(cell, asdict(cell) | {"error": f"its process ended with code {process.exitcode}"})
                    if waiting:
                        give(start(), None)
                    continue
                give(line, cell)
                done(cell, row)
    finally:
        for line, process in processes.items():
            if line not in busy and process.is_alive():
                line.send(None)
            else:
                process.terminate()
            process.join()
            line.close()


def load_ray() -> Any:
    """The module.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise MissingDependencyError("ray", "running cells on several machines", "bench") from None


def run_on_ray(
    ray: Any, address: str, cells: Sequence[Cell], options: BenchOptions, workers: int, done: Done
) -> None:
    """Runs cells as actors of a Ray cluster; models and data must be reachable under the same names there.

    Args:
        ray: The module.
        address: ``local``, ``auto`` or ``host:port``, as ``ray.init`` takes it.
        cells: What to run.
        options: What they share.
        workers: How many actors.
        done: Told of every cell, in this process.
    """
    if workers < 1:
        raise ConfigError(f"the number of workers must be at least 1, it is {workers}")
    local = {"include_dashboard": False} if address == "local" else {}
    ray.init(address=address, log_to_driver=False, **local)
    try:
        needs = {"num_gpus": 1} if options.device.startswith("cuda") else {"num_cpus": 1}
        actor = ray.remote(Workshop).options(**needs)
        waiting, busy = list(cells), {}

        def give(worker: Any, last: Cell | None) -> None:
            if waiting:
                cell = next_cell(waiting, last)
                busy[worker.attempt.remote(cell)] = (worker, cell)

        for _ in range(min(workers, len(cells))):
            give(actor.remote(options), None)
        while busy:
            finished, _ = ray.wait(list(busy), num_returns=1)
            for reference in finished:
                worker, cell = busy.pop(reference)
                try:
                    row = ray.get(reference)
                except Exception as error:  # an actor's death has many names
                    give(actor.remote(options), None)
                    done(cell, asdict(cell) | {"error": f"its worker failed: {error}"})
                    continue
                give(worker, cell)
                done(cell, row)
    finally:
        ray.shutdown()
