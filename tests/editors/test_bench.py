"""Cells of a comparison: their names, their clock, pooling over seeds, and the places where they run."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from editors.base import ManyEditor
from editors.bench import BenchOptions, Cell, Workshop, cell_file, drift_of, plan_cells, pool_cases
from editors.bench_pool import load_ray, next_cell, run_in_processes, run_on_ray
from editors.timing import Clock, timed
from lab.attention import attention_drift
from lab.errors import ConfigError, UnknownNameError
from lab.eval import get_suite
from lab.peak import peak_memory
from tests.editors.test_session import REQUESTS, Scripted
from tests.tiny import tiny_handle

CELL = Cell("rome_identity", "atlas", "atlas", 0)
SMALL = BenchOptions(limit=1, settings={"": {"steps": 2}}, drift=0, threads=1)


@dataclass(frozen=True)
class Deadly(BenchOptions):
    """Ends the process that runs the editor r_rome."""

    def settings_of(self, editor):
        if editor == "r_rome":
            os._exit(7)
        return super().settings_of(editor)


def test_all_cells_of_a_model_come_together():
    cells = plan_cells(["rome", "memit", "rome"], ["atlas", "zsre"], ["one", "two"], [0, 1])
    assert len(cells) == len(set(cells)) == 16
    assert [cell.model for cell in cells] == ["one"] * 8 + ["two"] * 8
    assert cells[:2] == (Cell("rome", "atlas", "one", 0), Cell("memit", "atlas", "one", 0))
    with pytest.raises(UnknownNameError, match="rome"):
        plan_cells(["roem"], ["atlas"], ["atlas"], [0])
    with pytest.raises(UnknownNameError, match="atlas"):
        plan_cells(["rome"], ["atlsa"], ["atlas"], [0])
    with pytest.raises(ConfigError, match="seed"):
        plan_cells(["rome"], ["atlas"], ["atlas"], [])


def test_the_name_of_a_cell_is_that_of_its_figures(tmp_path):
    folder = tmp_path / "a model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"1234")
    data = tmp_path / "cf.json"
    data.write_text("[]")
    cell = Cell("rome+sadr", "counterfact", str(folder), 3)
    options = BenchOptions(data={"counterfact": str(data)}, settings={"": {"steps": 3}})
    name = cell_file(cell, options)
    assert name.startswith("rome+sadr-counterfact-a_model-3-")
    assert name.endswith(".json")
    same = [
        replace(options, batch_size=1, threads=3),
        replace(options, settings={"": {"steps": 3}, "memit": {"steps": 9}}),
        replace(options, data={"counterfact": str(data), "zsre": "elsewhere"}),
    ]
    assert {cell_file(cell, other) for other in same} == {name}
    others = [
        replace(options, limit=5),
        replace(options, protocol="batch"),
        replace(options, settings={"": {"steps": 3}, "rome+sadr": {"steps": 4}}),
    ]
    names = {cell_file(cell, other) for other in others} | {cell_file(replace(cell, seed=4), options)}
    data.write_text("[1]")
    names.add(cell_file(cell, options))
    data.write_text("[]")
    (folder / "model.safetensors").write_bytes(b"12345")
    names.add(cell_file(cell, options))
    assert len(names) == 6
    assert name not in names


def test_a_case_that_several_seeds_drew_counts_once():
    suite = get_suite("counterfact")

    def case(name, efficacy, known=True):
        values = {"values": {"efficacy": [efficacy]}, "before": {"efficacy": [0.0]}, "right_after": {}}
        return {"id": name, "known": known, **values}

    tables, n = pool_cases(suite, [case("a", 1.0), case("b", 1.0), case("a", 0.0)])
    assert n == 2
    assert (tables["metrics"]["efficacy"].mean, tables["metrics"]["efficacy"].n) == (0.75, 2)
    assert tables["before"]["efficacy"].mean == 0
    pooled = get_suite("sadr")
    rows = [
        {"id": "a", "values": {"efficacy": [1.0, 0.0]}, "before": {}, "right_after": {}},
        {"id": "a", "values": {"efficacy": [1.0, 1.0]}, "before": {}, "right_after": {}},
        {"id": "b", "values": {"efficacy": [1.0]}, "before": {}, "right_after": {}},
        {"id": "b", "values": {"efficacy": [0.0, 0.0]}, "before": {}, "right_after": {}},
    ]
    found = pool_cases(pooled, rows)[0]["metrics"]["efficacy"]
    assert (found.n, found.mean) == (5, pytest.approx((1 + 0.5 + 1 + 0 + 0) / 5))


def test_the_clock_counts_edits_and_keeps_the_first_patches():
    class Many(Scripted):
        def edit_many(self, handle, requests):
            return [self.edit(handle, [request]) for request in requests]

    handle, clock = tiny_handle("llama"), Clock(keep=3)
    many, one = timed(Many(), clock), timed(Scripted(), clock)
    assert isinstance(many, ManyEditor)
    assert not isinstance(one, ManyEditor)
    made = [*many.edit_many(handle, REQUESTS[:2]), one.edit(handle, REQUESTS[2:], history=("past",))]
    many.edit(handle, REQUESTS[:1])
    assert one.editor.histories == [("past",)]
    assert clock.edits == 5
    assert clock.seconds > 0
    assert clock.kept == [
        ((REQUESTS[0],), made[0]),
        ((REQUESTS[1],), made[1]),
        (tuple(REQUESTS[2:]), made[2]),
    ]


def test_drift_of_single_patches_is_a_mean_and_of_a_sequence_that_of_all():
    handle, editor = tiny_handle("llama", scale=2.0), Scripted({"France": 2.0, "Japan": 2.0})
    alone = [((request,), editor.edit(handle, [request])) for request in REQUESTS[:2]]
    found = drift_of(handle, alone, "single")
    reports = [attention_drift(handle, patch, [r.prompt], [r.subject]) for (r,), patch in alone]
    assert found["prompts"] == 2
    wanted = (reports[0].drift + reports[1].drift) / 2
    assert torch.allclose(torch.tensor(found["drift"], dtype=torch.float64), wanted, atol=1e-6)
    with alone[0][1].applied(handle):
        second = editor.edit(handle, REQUESTS[1:2])
    assert second.parents
    whole = drift_of(handle, [alone[0], ((REQUESTS[1],), second)], "sequential")
    both = alone[0][1] + alone[1][1]
    wanted = attention_drift(
        handle, both, [r.prompt for r in REQUESTS[:2]], [r.subject for r in REQUESTS[:2]]
    )
    assert torch.allclose(torch.tensor(whole["drift"], dtype=torch.float64), wanted.drift, atol=1e-6)
    # Rounds of one case: the second patch stands on the first.
    rounds = drift_of(handle, [alone[0], ((REQUESTS[1],), second)], "single")
    upper = attention_drift(handle, both, [REQUESTS[1].prompt], [REQUESTS[1].subject])
    wanted = (reports[0].drift + upper.drift) / 2
    assert torch.allclose(torch.tensor(rounds["drift"], dtype=torch.float64), wanted, atol=1e-6)
    assert drift_of(handle, [], "single") is None
    assert drift_of(handle, [((REQUESTS[0],), "a memory")], "single") is None


def test_peak_memory_sees_what_was_taken():
    with peak_memory() as peak:
        block = torch.ones(30_000_000)
        del block
    assert peak.mb is None or peak.mb > 120


def test_a_worker_gets_cells_of_its_own_model_first():
    cells = [Cell("rome", "atlas", model) for model in ("one", "two", "one")]
    waiting = list(cells)
    assert next_cell(waiting, cells[1]) is cells[1]
    assert next_cell(waiting, Cell("memit", "zsre", "three")) is cells[0]
    assert next_cell(waiting, None) is cells[2]
    assert waiting == []


def test_a_cell_that_cannot_run_is_a_row_with_its_error(standin):
    broken = Workshop(replace(SMALL, settings={"": {"stpes": 2}})).attempt(CELL)
    assert "steps" in broken["error"]
    assert (broken["editor"], broken["seed"]) == ("rome_identity", 0)


def test_a_process_that_dies_costs_its_cell_only(standin):
    options = Deadly(**{name: getattr(SMALL, name) for name in BenchOptions.__dataclass_fields__})
    cells = [replace(CELL, editor="r_rome"), CELL]
    rows = {}
    run_in_processes(cells, options, 1, rows.__setitem__)
    assert rows[cells[0]]["error"] == "its process ended with code 7"
    row = rows[CELL]
    assert row["n"] == 1
    assert row["seconds_per_edit"] > 0
    assert row["metrics"]["efficacy"]["n"] == 1
    with pytest.raises(ConfigError, match="workers"):
        run_in_processes(cells, options, 0, rows.__setitem__)


class PretendRay:
    """Ray's few functions that are used, in this process; the first actor dies on its first cell."""

    def __init__(self) -> None:
        self.started: dict = {}
        self.actors = 0
        self.stopped = False

    def init(self, **options):
        self.started = options

    def remote(self, kind):
        def make(options):
            self.actors += 1
            number = self.actors

            def attempt(cell):
                return lambda: self.fail() if number == 1 else {"editor": cell.editor, "by": number}

            return SimpleNamespace(attempt=SimpleNamespace(remote=attempt))

        return SimpleNamespace(options=lambda **needs: SimpleNamespace(remote=make))

    def fail(self):
        raise RuntimeError("actor died")

    def wait(self, references, num_returns):
        return references[:num_returns], references[num_returns:]

    def get(self, reference):
        return reference()

    def shutdown(self):
        self.stopped = True


def test_cells_on_ray_are_handed_out_and_a_lost_actor_is_replaced():
    ray, rows = PretendRay(), {}
    cells = [Cell("rome", "atlas", "one", seed) for seed in range(5)]
    run_on_ray(ray, "local", cells, SMALL, 2, rows.__setitem__)
    assert set(rows) == set(cells)
    assert ["actor died" in row.get("error", "") for row in rows.values()].count(True) == 1
    assert ray.actors == 3
    assert ray.stopped
    assert ray.started["address"] == "local"
    with pytest.raises(ConfigError, match="workers"):
        run_on_ray(ray, "local", cells, SMALL, 0, rows.__setitem__)


def test_cells_run_on_a_local_ray(standin):
    pytest.importorskip("ray")
    rows = {}
    run_on_ray(load_ray(), "local", [CELL], SMALL, 1, rows.__setitem__)
    assert rows[CELL]["n"] == 1
