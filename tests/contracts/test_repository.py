"""What holds for the repository as a whole."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("lab", "editors", "rag")
LONGEST = 440  # about 400


def tracked() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def modules() -> list[str]:
    """Dotted names of all modules of the packages, as they lie in the tree."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


@pytest.fixture(scope="module")
def texts() -> dict[Path, str]:
    found = {}
    for path in tracked():
        data = path.read_bytes()
        if path.suffix != ".safetensors" and b"\0" not in data[:4096]:
            found[path] = data.decode("utf-8")
    return found


IMPORT_EVERYTHING = """
import builtins, importlib, io, json, logging, os, random, socket, sys
import numpy, torch
root, foreign, own = sys.argv[1], sys.argv[2].split(), sys.argv[3].split()
sys.path.insert(0, root)
for name in foreign:  # what other people's packages do when they are imported is theirs
    module, _, attribute = name.partition(":")
    getattr(importlib.import_module(module), attribute or "__name__")
opened, kept = [], io.open

def watched(file, *rest, **more):
    name = str(file)
    if not name.endswith((".py", ".pyc")) and name.startswith(root) and "egg-info" not in name:
        opened.append(name)
    return kept(file, *rest, **more)

def refused(*_, **__):
    raise AssertionError("a connection at import")

def snapshot():
    return {
        "environment": sorted(os.environ.items()),
        "random": hash(random.getstate()),
        "numpy": numpy.random.get_state()[1].tolist(),
        "torch": torch.random.get_rng_state().tolist(),
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "handlers": len(logging.getLogger().handlers),
        "level": logging.getLogger().level,
        "hook": repr(sys.excepthook),
    }

before = snapshot()
builtins.open = io.open = watched
socket.socket.connect = refused
for name in own:
    importlib.import_module(name)
builtins.open = io.open = kept
after = snapshot()
print(json.dumps({"changed": [key for key in before if before[key] != after[key]], "opened": opened}))
"""


def foreign_imports() -> list[str]:
    """What our modules import from elsewhere at their top, as ``module:name`` (some packages import names only when used)."""
    found = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.Import):
                    found |= {f"{alias.name}:" for alias in node.names}
                elif (
                    isinstance(node, ast.ImportFrom)
                    and node.module
                    and node.module.split(".")[0] not in PACKAGES
                ):
                    found |= {f"{node.module}:{alias.name}" for alias in node.names}
    return sorted(found)


def test_importing_any_module_does_nothing_but_define_names():
    words = [
        sys.executable,
        "-c",
        IMPORT_EVERYTHING,
        str(ROOT),
        " ".join(foreign_imports()),
        " ".join(modules()),
    ]
    done = subprocess.run(words, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"changed": [], "opened": []}


def test_the_floors_import_downwards_only():
    wrong = []
    above = {
        "lab": {"editors", "rag", "tests", "examples"},
        "editors": {"rag", "tests", "examples"},
        "rag": {"editors", "tests", "examples"},
    }
    for package, forbidden in above.items():
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                wrong += [
                    f"{path.relative_to(ROOT)}: {name}" for name in names if name.split(".")[0] in forbidden
                ]
    assert not wrong


def test_no_function_rebinds_a_module_global():
    named = []
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            named += [
                f"{path.relative_to(ROOT)}:{node.lineno}"
                for node in ast.walk(tree)
                if isinstance(node, ast.Global)
            ]
    assert not named


def test_hugging_face_datasets_is_not_shadowed():
    import datasets

    assert hasattr(datasets, "load_dataset"), datasets
    assert not [path for path in tracked() if path.suffix == ".py" and path.is_relative_to(ROOT / "datasets")]


def cards() -> list[tuple[Path, str]]:
    """Folder and name of every configuration that a card promises."""
    import yaml

    found = []
    for card in sorted((ROOT / "datasets").glob("*/README.md")):
        head = yaml.safe_load(card.read_text(encoding="utf-8").split("---")[1])
        found += [(card.parent, config["config_name"]) for config in head.get("configs", ())]
    return found


@pytest.mark.parametrize(("folder", "name"), cards(), ids=lambda value: getattr(value, "name", value))
def test_every_card_loads_with_hugging_face_datasets(folder, name, tmp_path):
    from datasets import load_dataset

    loaded = load_dataset(str(folder.resolve()), name, cache_dir=str(tmp_path))
    assert all(len(split) > 0 for split in loaded.values())


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


def test_long_files_have_a_reason(texts):
    reasons = tomllib.loads((Path(__file__).parent / "long_files.toml").read_text(encoding="utf-8"))
    lengths = {
        str(path.relative_to(ROOT)): text.count("\n") for path, text in texts.items() if path.suffix == ".py"
    }
    assert {name for name, length in lengths.items() if length > LONGEST} <= set(reasons)
    assert set(reasons) <= set(lengths)
    assert all(reasons.values())
    assert not [name for name in reasons if lengths[name] <= 400], "no reason is needed any more"


def test_every_entry_point_of_this_distribution_loads():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    import importlib

    for points in project["entry-points"].values():
        for target in points.values():
            module, _, attribute = target.partition(":")
            assert getattr(importlib.import_module(module), attribute) is not None


def test_constraints_pin_what_the_project_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = {
        re.split(r"==", line)[0].strip().lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    extras = project["optional-dependencies"]
    named = [
        *project["dependencies"],
        *(word for extra in ("dev", "train", "offline") for word in extras[extra]),
    ]
    names = {re.split(r"[<>=!\[ ]", word)[0].lower().replace("_", "-") for word in named} - {"knowlab"}
    assert names <= pinned
