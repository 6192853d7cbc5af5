"""Settings for every test: no network, one thread, the seeds left alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest_plugins = ["tests.shared"]

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models run about ten times slower on several threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def standin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with a small ``atlas`` that knows a few capitals; see ``tests.standin``."""
    from tests.standin import make_standin

    return make_standin(tmp_path_factory.mktemp("models"))


@pytest.fixture
def standin(standin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in in the place of the shipped models, for this test."""
    monkeypatch.setenv("KNOWLAB_ATLAS_DIR", str(standin_folder))
    return standin_folder


@pytest.fixture
def atlas(request: pytest.FixtureRequest) -> bool:
    """The shipped ``atlas`` where its weights are part of this installation, else the stand-in; says whether it is the former."""
    from lab.atlas.weights import weights_path

    if weights_path("atlas") is not None:
        return True
    request.getfixturevalue("standin")
    return False


@pytest.fixture(scope="session")
def shipped_atlas() -> None:
    """For tests of what only the shipped ``atlas`` can do; it is part of the repository, so that its absence is a failure."""
    from lab.atlas.weights import weights_path

    assert weights_path("atlas") is not None, "lab/atlas/weights/atlas is missing from this checkout"


@pytest.fixture
def saved_patch(standin: Path, tmp_path: Path) -> Path:
    """A rank-one patch of the stand-in that changes what it says; made by hand, seed 3."""
    import torch

    from lab.arch import Role
    from lab.handle import ModelHandle
    from lab.patch import LowRank, Provenance, WeightPatch

    handle = ModelHandle.load("atlas")
    weight = handle.weight(Role.MLP_OUT, 1)
    generator = torch.Generator().manual_seed(3)
    left, right = (
        torch.randn(size, generator=generator) for size in ((weight.shape[0], 1), (1, weight.shape[1]))
    )
    patch = WeightPatch(
        handle.fingerprint, {weight.name: LowRank(left, right)}, Provenance("made by hand", seed=3)
    )
    return patch.save(tmp_path / "patch")
