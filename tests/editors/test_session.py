"""Sessions: history, budgets, retention, and a run that goes on where it was interrupted."""

from __future__ import annotations

import json
import os

import pytest
import torch

from editors import get_editor
from editors.session import Budget, EditSession, request_cases
from lab.arch import Role
from lab.data.cases import CaseProbe, CaseSet, EditCase
from lab.errors import BudgetError, ConfigError, DataError, OutputExistsError, PatchError, RequestError
from lab.eval import SuiteOptions, get_suite
from lab.patch import LowRank, Provenance, WeightPatch
from lab.records import EditRequest
from lab.scoring import kl_divergence, log_probs
from tests.tiny import tiny_handle

NAMES = ("France", "Japan", "Kenya", "Italy")
REQUESTS = [EditRequest(name, "The capital of {} is", name, "Rome", "Paris") for name in NAMES]


class Scripted:
    """A rank-one patch per call, of a strength that can be set per subject; remembers what it was told."""

    def __init__(self, strengths: dict[str, float] | None = None, stop_at: int | None = None) -> None:
        self.strengths, self.stop_at = strengths or {}, stop_at
        self.calls: list[list[str]] = []
        self.histories: list[tuple] = []

    def edit(self, handle, requests, *, history=None, progress=None):
        if self.stop_at == len(self.calls):
            raise KeyboardInterrupt
        self.calls.append([request.id for request in requests])
        self.histories.append(history)
        weight = handle.weight(Role.MLP_OUT, 1)
        subject = requests[0].subject
        generator = torch.Generator().manual_seed(sum(map(ord, subject)))
        left, right = (
            torch.randn(size, generator=generator) for size in ((weight.shape[0], 1), (1, weight.shape[1]))
        )
        parents = tuple(entry.patch.id for entry in handle.applied)
        delta = LowRank(left * self.strengths.get(subject, 0.1), right)
        return WeightPatch(handle.fingerprint, {weight.name: delta}, Provenance("scripted"), parents)


@pytest.fixture(scope="module")
def handle():
    return tiny_handle("llama", scale=2.0)


def benchmark() -> CaseSet:
    made = []
    for request in REQUESTS:
        near = CaseProbe("neighborhood", f"The capital beside {request.subject} is", ("Paris",), "Rome")
        probes = (CaseProbe("rewrite", request.text, ("Rome",), "Paris"), near)
        made.append(EditCase(request.id, "counterfact", (request,), probes, (("Paris",),), "rows.json", 1))
    return CaseSet("counterfact", "counterfact", "rows.json", tuple(made))


def quiet():
    return get_suite("counterfact", SuiteOptions(fluency=False))


def session(handle, editor, **options) -> EditSession:
    return EditSession(handle, editor, name="scripted", **options)


def plain(report) -> dict:
    """The report without its wall time, floats to what the company of a row in a batch leaves of them."""
    found = report.to_json()
    found.pop("seconds")
    return rounded(found)


def unmeasured(report) -> dict:
    return {key: value for key, value in report.to_json().items() if key != "seconds"}


def rounded(value):
    if isinstance(value, float):
        return pytest.approx(value, abs=1e-6)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


# ---- one by one ------------------------------------------------------------------------------------------------------


def test_edits_pile_up_with_their_history_and_come_off(handle):
    bits, editor = handle.weights_digest(), Scripted()
    with session(handle, editor) as open_session:
        first, second = (open_session.edit([request]) for request in REQUESTS[:2])
        assert open_session.patches == (first, second)
        assert editor.histories == [(), (first,)]
        assert [entry.patch for entry in handle.applied] == [first, second]
        assert open_session.undo() is second
        third = open_session.edit(REQUESTS[2:3])
        assert editor.histories[-1] == (first,)
        assert third.parents == (first.id,)
    assert handle.weights_digest() == bits
    assert handle.applied == ()
    with pytest.raises(PatchError, match="no edit"):
        open_session.undo()


def test_a_refused_edit_leaves_the_session_as_it_was(handle):
    editor = Scripted({"Japan": 30.0})
    with session(handle, editor, budget=Budget(relative_norm=1.0)) as open_session:
        kept = open_session.edit(REQUESTS[:1])
        state, bits = handle.state, handle.weights_digest()
        with pytest.raises(BudgetError, match=r"Japan: relative_norm .* over the limit 1"):
            open_session.edit(REQUESTS[1:2])
        assert (handle.state, handle.weights_digest(), open_session.patches) == (state, bits, (kept,))
        open_session.edit(REQUESTS[2:3])
        assert editor.histories[-1] == (kept,)


# ---- budgets ---------------------------------------------------------------------------------------------------------


def test_side_effects_are_what_their_names_say(handle):
    patch = Scripted({"France": 2.0}).edit(handle, REQUESTS[:1])
    prompts = ("The book is", "Who wrote the city of")
    budget = Budget(relative_norm=0.0, neighborhood_kl=0.0, attention_drift=9.0, prompts=prompts)
    found = budget.measure(handle, patch, REQUESTS[:1], ["ignored"])
    (name,) = patch.deltas
    weight = handle.named_weight(name).canonical()
    assert found.relative_norm == pytest.approx(
        float(patch.deltas[name].dense().norm() / weight.norm()), rel=1e-5
    )

    def table(text):
        return log_probs(handle.logits(handle.encode([text]))[0, -1])

    before = [table(text) for text in prompts]
    with patch.applied(handle):
        after = [table(text) for text in prompts]
    wanted = sum(float(kl_divergence(p, q)) for p, q in zip(before, after, strict=True)) / 2
    assert found.neighborhood_kl == pytest.approx(wanted, rel=1e-4)
    assert wanted > 0.01
    assert found.attention_drift is not None
    assert -1 <= found.attention_drift <= 1
    assert [text.split()[0] for text in budget.exceeded(found)] == ["relative_norm", "neighborhood_kl"]
    assert Budget(relative_norm=1e9).measure(handle, patch, REQUESTS[:1], ()).neighborhood_kl is None


@pytest.mark.parametrize(
    "options", [{"relative_norm": -1.0}, {"neighborhood_kl": float("nan")}, {"action": "stop"}]
)
def test_a_budget_must_make_sense(options):
    with pytest.raises(ConfigError):
        Budget(**options)


def test_a_budget_without_anything_to_measure_on_says_so(handle):
    with pytest.raises(ConfigError, match="give prompts="):
        session(handle, Scripted(), budget=Budget(neighborhood_kl=1.0)).edit(REQUESTS[:1])
    assert handle.applied == ()


@pytest.mark.parametrize("protocol", ["single", "sequential"])
def test_what_the_budget_refuses_is_reported(handle, protocol):
    budget = Budget(neighborhood_kl=0.5)
    strong = {"Japan": 20.0}
    report = session(handle, Scripted(strong), budget=budget).run(benchmark(), quiet(), protocol=protocol)
    assert report.n == 3
    assert [skip.id for skip in report.skipped] == ["Japan"]
    assert "neighborhood_kl" in report.skipped[0].reason
    warned = Budget(neighborhood_kl=0.5, action="warn")
    report = session(handle, Scripted(strong), budget=warned).run(benchmark(), quiet(), protocol=protocol)
    assert report.n == 4
    assert [note for note in report.notes if note.startswith("over budget, Japan: ")]


def test_a_batch_is_refused_as_one(handle):
    budget = Budget(relative_norm=1e-3)
    with pytest.raises(DataError, match="refused as over budget"):
        session(handle, Scripted(), budget=budget).run(REQUESTS, protocol="batch")
    assert handle.applied == ()


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_plain_requests_keep_their_order_and_are_measured_twice(handle):
    editor = Scripted()
    report = session(handle, editor).run(REQUESTS)
    assert editor.calls == [[name] for name in NAMES]
    assert [len(history) for history in editor.histories] == [0, 1, 2, 3]
    assert [row.id for row in report.cases] == list(NAMES)
    assert {"success", "probability", "efficacy"} <= set(report.metrics)
    after = report.extra["right_after_edit"]
    assert after["probability"].mean != report.metrics["probability"].mean
    assert report.retention is not None
    assert [len(moment.held) for moment in report.retention.moments] == [1, 2, 3, 4]
    first = [report.retention.moments[number].probability[number] for number in range(4)]
    assert sum(first) / 4 == pytest.approx(after["probability"].mean, abs=1e-5)
    with pytest.raises(RequestError, match="same id"):
        request_cases([REQUESTS[0], REQUESTS[0]])


@pytest.mark.parametrize("protocol", ["single", "batch", "sequential"])
def test_an_interrupted_run_goes_on_and_finds_the_same(handle, tmp_path, protocol):
    strong = {"Kenya": 50.0}
    budget = Budget(relative_norm=20.0)
    whole = session(handle, Scripted(strong), budget=budget, seed=3)
    wanted = plain(whole.run(benchmark(), quiet(), protocol=protocol))
    bits, folder = handle.weights_digest(), tmp_path / "session"
    broken = Scripted(strong, stop_at=0 if protocol == "batch" else 3)
    with pytest.raises(KeyboardInterrupt):
        session(handle, broken, budget=budget, seed=3, folder=folder).run(
            benchmark(), quiet(), protocol=protocol
        )
    assert handle.weights_digest() == bits
    done = 0 if protocol == "batch" else 3
    assert len(list((folder / "steps").iterdir()) if done else ()) == done
    again = Scripted(strong)
    found = session(handle, again, budget=budget, seed=3, folder=folder).run(
        benchmark(), quiet(), protocol=protocol
    )
    assert unmeasured(found) == wanted
    assert len(again.calls) == 1
    once_more = Scripted(strong)
    found = session(handle, once_more, budget=budget, seed=3, folder=folder).run(
        benchmark(), quiet(), protocol=protocol
    )
    assert unmeasured(found) == wanted
    assert once_more.calls == []
    assert handle.weights_digest() == bits


def test_a_step_is_written_whole_or_not_at_all(handle, tmp_path, monkeypatch):
    folder, real, moves = tmp_path / "session", os.replace, []

    def failing(source, target):
        moves.append(str(target))
        if str(target).endswith("00001"):
            raise OSError(28, "No space left on device")
        return real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="No space"):
        session(handle, Scripted(), folder=folder).run(REQUESTS)
    monkeypatch.undo()
    assert [place.name for place in (folder / "steps").iterdir()] == ["00000"]
    kept = WeightPatch.load(folder / "steps" / "00000" / "patch-0")
    editor = Scripted()
    session(handle, editor, folder=folder).run(REQUESTS)
    assert editor.calls == [[name] for name in NAMES[1:]]
    assert editor.histories[0][0].id == kept.id


def test_a_folder_of_another_session_is_refused(handle, tmp_path):
    folder = tmp_path / "session"
    session(handle, Scripted(), folder=folder).run(REQUESTS[:2])
    others = {
        "model": lambda: session(tiny_handle("llama", seed=1), Scripted(), folder=folder).run(REQUESTS[:2]),
        "editor": lambda: EditSession(handle, Scripted(), name="rome", folder=folder).run(REQUESTS[:2]),
        "settings": lambda: session(handle, Scripted(), settings={"lr": 2}, folder=folder).run(REQUESTS[:2]),
        "requests": lambda: session(handle, Scripted(), folder=folder).run(REQUESTS[1:3]),
        "protocol": lambda: session(handle, Scripted(), folder=folder).run(REQUESTS[:2], protocol="single"),
        "seed": lambda: session(handle, Scripted(), seed=1, folder=folder).run(REQUESTS[:2]),
        "budget": lambda: session(handle, Scripted(), budget=Budget(1.0), folder=folder).run(REQUESTS[:2]),
    }
    for name, attempt in others.items():
        with pytest.raises(ConfigError, match=f"another {name}"):
            attempt()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(OutputExistsError):
        session(handle, Scripted(), folder=tmp_path / "full").run(REQUESTS[:2])
    (folder / "steps" / "00001" / "step.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        session(handle, Scripted(), folder=folder).run(REQUESTS[:2])
    assert json.loads((folder / "session.json").read_text())["format"] == "knowlab-session"


def test_a_real_editor_in_a_session(handle, tmp_path):
    editor = get_editor("rome_identity", layers=(1,), steps=4, prefixes=["A book. {}"], fact_token="last")
    options = {"settings": {"steps": 4}, "folder": tmp_path / "session"}
    report = EditSession(handle, editor, name="rome_identity", **options).run(REQUESTS[:2])
    assert report.n == 2
    assert all(row.p_after > row.p_before for row in report.cases)
    again = EditSession(handle, editor, name="rome_identity", **options).run(REQUESTS[:2])
    assert unmeasured(again) == plain(report)
