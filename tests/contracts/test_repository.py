"""What holds for the repository as a whole."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def tracked() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def texts() -> dict[Path, str]:
    found = {}
    for path in tracked():
        data = path.read_bytes()
        if b"\0" not in data[:4096]:
            found[path] = data.decode("utf-8")
    return found


def test_hugging_face_datasets_is_not_shadowed():
    import datasets

    assert hasattr(datasets, "load_dataset"), datasets
    assert not [path for path in tracked() if path.suffix == ".py" and path.is_relative_to(ROOT / "datasets")]


def test_no_tracked_file_names_a_place_on_one_machine(texts):
    place = re.compile(r"(?<![\w.~-])/(?:home|root|work|Users|scratch)/[\w.]")
    named = [
        f"{path.relative_to(ROOT)}: {hit.group()}"
        for path, text in texts.items()
        for hit in place.finditer(text)
    ]
    assert not named


def test_nothing_unpickles(texts):
    unsafe = re.compile(r"\b(?:pickle\.loads?|torch\.load)\(")
    own = Path(__file__)
    assert not [
        path for path, text in texts.items() if path.suffix == ".py" and path != own and unsafe.search(text)
    ]
