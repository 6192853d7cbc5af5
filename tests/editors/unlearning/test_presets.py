"""Tuned settings: which model they are for, that every method takes its own, and that the caller's go first."""

from __future__ import annotations

import pytest

from editors.presets import CONFIG_FIELD
from editors.unlearning import UNLEARNERS, get_unlearner
from editors.unlearning.presets import read_unlearning_table, settings_in, tuned_settings
from lab.errors import ConfigError
from tests.tiny import tiny_handle

PLAIN = ("name", "model_type", "hidden_size", "n_layers", "vocab_size", "family")
SECTIONS = [(row["name"], name) for row in read_unlearning_table() for name in row if name not in PLAIN]


@pytest.fixture
def named():
    handle = tiny_handle("llama", layers=3)
    setattr(handle.config, CONFIG_FIELD, "atlas")
    return handle


@pytest.mark.parametrize(("name", "method"), SECTIONS)
def test_every_section_is_a_methods_and_says_where_it_comes_from(name, method, named):
    [row] = [row for row in read_unlearning_table() if row["name"] == name]
    assert row[method]["source"]
    chosen = tuned_settings(named, method)
    assert chosen and not {"source", "like"} & set(chosen)
    get_unlearner(method, **chosen)  # refuses settings that it does not take


def test_a_model_that_no_row_fits_gets_none():
    assert tuned_settings(tiny_handle("llama", layers=2), "rocr") == {}
    assert tuned_settings(tiny_handle("gpt2", layers=2), "rocr") == {}


def test_layers_that_the_model_lacks(named, monkeypatch):
    row = {"name": "atlas", "rocr": {"source": "s", "layers": [7]}}
    monkeypatch.setattr("editors.unlearning.presets.read_unlearning_table", lambda: (row,))
    with pytest.raises(ConfigError, match="only 3"):
        tuned_settings(named, "rocr")


def test_an_empty_text_is_no_limit(named, monkeypatch):
    row = {"name": "atlas", "npo": {"source": "s", "stop_retain": ""}}
    monkeypatch.setattr("editors.unlearning.presets.read_unlearning_table", lambda: (row,))
    assert tuned_settings(named, "npo") == {"stop_retain": None}


def test_families_hold_for_their_methods_and_each_takes_what_it_has():
    for row in read_unlearning_table():
        for family, shared in row.get("family", {}).items():
            members = [name for name in UNLEARNERS.names() if UNLEARNERS.get(name).family == family]
            assert members and shared["source"]
            for name in members:
                get_unlearner(name, **settings_in(row, name))


def test_a_method_goes_before_its_family_or_before_another_method(named, monkeypatch):
    row = {
        "name": "atlas",
        "family": {"parameter optimisation": {"source": "s", "lr": 0.5, "retain_batch": 8}},
        "npo": {"source": "s", "beta": 0.7, "lr": 0.25},
        "ignore_k": {"source": "s", "like": "npo", "beta": 0.9},
        "klue": {"source": "s", "like": "", "lr": 0.125},
    }
    monkeypatch.setattr("editors.unlearning.presets.read_unlearning_table", lambda: (row,))
    assert tuned_settings(named, "npo") == {"lr": 0.25, "retain_batch": 8, "beta": 0.7}
    assert tuned_settings(named, "ignore_k") == {"lr": 0.25, "retain_batch": 8, "beta": 0.9}
    assert tuned_settings(named, "klue") == {"lr": 0.125}
    assert tuned_settings(named, "ga") == {"lr": 0.5}  # it has no retained facts
    assert tuned_settings(named, "rocr") == {}
