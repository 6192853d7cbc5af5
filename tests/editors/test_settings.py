from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from editors import EDITORS, get_editor
from editors.alphaedit import AlphaEditConfig
from editors.base import EditorOptions, settle
from editors.emmet import EmmetConfig
from editors.finetune import FinetuneConfig
from editors.grace import GraceConfig
from editors.lora import LoraEditConfig
from editors.memit import MemitConfig
from editors.mend import MendConfig
from editors.pmet import PmetConfig
from editors.prefixes import PrefixCache, Prefixes, generate_prefixes
from editors.presets import find_preset, preset_names, read_table
from editors.rome import RomeConfig
from editors.rows import essence_row, request_rows
from editors.sadr import AttentionDrift
from editors.serac_learners import SeracConfig
from editors.spread import PREFIX_LENGTHS
from editors.ultraedit import UltraEditConfig
from editors.values import ValueConfig
from editors.wise import WiseConfig
from lab.errors import ConfigError, SubjectNotFoundError, UnknownNameError
from lab.records import EditRequest
from tests.tiny import tiny_handle

REQUEST = EditRequest("a", "The capital of {} is", "France", "Rome")
LENGTHS = ((3, 2), (5, 5))


def shape_of(model_type: str, hidden_size: int, n_layers: int, vocab_size: int, **config: Any) -> Any:
    """Just enough of a handle for the preset table."""
    own = SimpleNamespace(model_type=model_type, vocab_size=vocab_size, **config)
    return SimpleNamespace(hidden_size=hidden_size, n_layers=n_layers, name="shape", config=own)


# -- presets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, name, layers, steps",
    [
        (("gpt2", 1600, 48, 50257), "gpt2-xl", (17,), 20),
        (("gptj", 4096, 28, 50400), "gpt-j-6b", (5,), 20),
        (("llama", 4096, 32, 32000), "llama-2-7b", (5,), 25),
        (("llama", 4096, 32, 128256), "llama-3-8b", (5,), 25),
        (("qwen2", 3584, 28, 152064), "qwen2.5-7b", (5,), 25),
        (("mistral", 4096, 32, 32768), "mistral-7b", (5,), 25),
    ],
)
def test_published_models_are_found_by_shape(shape, name, layers, steps):
    preset = find_preset(shape_of(*shape), "rome")
    assert (preset.name, preset.chosen) == (name, "shape")
    assert preset.values["layers"] == layers
    assert preset.values["steps"] == steps


@pytest.mark.parametrize(
    "shape, section, expected, source",
    [
        (("gptj", 4096, 28, 50400), "pmet", {"steps": 30, "lr": 0.2, "kl_factor": 1.0, "layers": (3, 4, 5, 6, 7, 8)}, "PMET"),
        (("llama", 4096, 32, 32000), "pmet", {"steps": 20, "clamp": 1.0, "weight_decay": 0.5}, "PMET/llama-7b"),
        (("gpt2", 1600, 48, 50257), "emmet", {"layers": (17,), "mom2_weight": 10000.0, "mu": 0.1}, "EMMET/gpt2-xl"),
        (("llama", 4096, 32, 128256), "alphaedit", {"lr": 0.1, "l2": 1.0, "nullspace_threshold": 0.02}, "AlphaEdit/llama3"),
        (("mistral", 4096, 32, 32768), "alphaedit", {"layers": (4, 5, 6, 7, 8), "clamp": 4.0}, "untuned"),
        (("qwen2", 3584, 28, 152064), "ultraedit", {"layers": (), "up_layers": tuple(range(18, 27))}, "UltraEdit/qwen2.5"),
    ],
)  # fmt: skip
def test_a_section_has_its_own_values_and_source(shape, section, expected, source):
    preset = find_preset(shape_of(*shape), section)
    assert preset.chosen == "shape"
    assert {name: preset.values[name] for name in expected} == expected
    assert source in preset.source
    assert "source" not in preset.values


@pytest.mark.parametrize(
    ("section", "said"), [("pmet", "tuned on dev"), ("emmet", "untuned"), ("alphaedit", "untuned"), ("ultraedit", "tuned on dev")]
)  # fmt: skip
def test_small_models_say_whether_their_values_are_tuned(section, said):
    for name in ("atlas", "atlas-gpt2", "bed"):
        preset = find_preset(shape_of("llama", 256, 5, 400), section, name)
        assert said in preset.source
        assert preset.values["layers"]


def test_all_lists_of_layers_are_scaled():
    preset = find_preset(shape_of("qwen3", 64, 14, 400), "ultraedit")
    assert preset.values["layers"] == ()
    assert preset.values["gate_layers"] == preset.values["up_layers"] == (9, 10, 11, 12)


def test_an_unknown_model_takes_scaled_layers_and_says_so():
    preset = find_preset(shape_of("gpt2", 768, 12, 50257), "memit")
    assert (preset.name, preset.chosen) == ("gpt2-xl", "fallback")
    assert preset.values["layers"] == (3, 4)
    assert find_preset(shape_of("phi3", 64, 4, 400), "rome").values["layers"] == (1,)
    assert find_preset(shape_of("gemma2", 64, 1, 400), "memit").values["layers"] == (0,)


def test_sections_may_name_a_source_of_their_own():
    shape = shape_of("llama", 4096, 32, 32000)
    assert "hparams/WISE" in find_preset(shape, "wise").source
    assert "MEMIT" in find_preset(shape, "rome").source
    assert "source" not in find_preset(shape, "wise").values


def test_a_model_names_its_own_preset_and_the_caller_overrules_it():
    own = shape_of("llama", 64, 48, 400, knowlab_preset="gpt2-xl")
    assert find_preset(own, "rome").chosen == "config"
    assert find_preset(own, "rome", "gpt-j-6b").values["layers"] == (5,)
    with pytest.raises(UnknownNameError, match="gpt2-xl"):
        find_preset(own, "rome", "gpt2xl")
    with pytest.raises(ConfigError, match="only 4"):
        find_preset(shape_of("llama", 64, 4, 400), "rome", "gpt2-xl")
    with pytest.raises(ConfigError, match="no values"):
        find_preset(own, "unheard_of")


def test_every_row_is_complete_and_has_a_source():
    table = read_table()
    searched = {
        "rome": RomeConfig,
        "memit": MemitConfig,
        "pmet": PmetConfig,
        "emmet": EmmetConfig,
        "alphaedit": AlphaEditConfig,
    }
    known = {
        section: set(config.__dataclass_fields__) | set(ValueConfig.__dataclass_fields__)
        for section, config in searched.items()
    }
    known["ultraedit"] = set(UltraEditConfig.__dataclass_fields__)
    trained = {
        **dict.fromkeys(("ft_l", "ft_l_inf", "ft_m"), FinetuneConfig),
        "lora": LoraEditConfig,
        "mend": MendConfig,
        "serac": SeracConfig,
    }
    memories = {
        section: {"source", *config.__dataclass_fields__}
        for section, config in (("grace", GraceConfig), ("wise", WiseConfig))
    }
    for row in table["preset"]:
        assert row["source"]
        for section, names in known.items():
            assert set(row[section]) - {"source"} <= names
            assert row[section]["layers"] == sorted(row[section]["layers"])
        for section, names in memories.items():
            assert set(row[section]) <= names
            assert row[section]["source"]
        for section, config in trained.items():
            values = {**table["common"][section], **row.get(section, {})}
            assert values.pop("source")
            assert set(values) <= set(config.__dataclass_fields__)
        for section in ("ft_l", "ft_l_inf", "ft_m", "grace", "wise"):
            assert len(row[section]["layers"]) == 1
    assert {row["preset"] for row in table["fallback"]} <= set(preset_names())
    assert "*" in table["fallback"][-1]["model_type"]
    assert table["sadr"]["source"]


# -- specifications -----------------------------------------------------------------------------------------------


def test_sadr_brings_its_own_steps_and_weight_and_both_can_be_overruled():
    handle = tiny_handle("llama")

    def plan(spec, section, config, **overrides):
        options = EditorOptions(
            spec, ("sadr",) if "sadr" in spec else (), prefixes=Prefixes.of([]), overrides=overrides
        )
        return settle(handle, options, section, config, ())[1]

    assert plan("rome", "rome", RomeConfig).values.steps == 25
    assert plan("rome", "rome", RomeConfig).penalties == ()
    assert plan("rome+sadr", "rome", RomeConfig).values.steps == 80
    assert plan("rome+sadr", "rome", RomeConfig).penalties == (AttentionDrift(gamma=0.01),)
    assert plan("memit+sadr", "memit", MemitConfig).penalties == (AttentionDrift(gamma=0.005),)
    joint = plan("pmet+sadr", "pmet", PmetConfig)
    assert (joint.values.steps, joint.penalties) == (40, (AttentionDrift(gamma=0.08),))
    for section, config in (("emmet", EmmetConfig), ("alphaedit", AlphaEditConfig)):
        restrained = plan(f"{section}+sadr", section, config)
        assert restrained.penalties == (AttentionDrift(gamma=0.005),)
        assert restrained.values.steps == plan(section, section, config).values.steps
    tuned = plan("rome+sadr", "rome", RomeConfig, steps=7, gamma=0.3, hinge=False, layers=[2])
    assert tuned.values.steps == 7
    assert tuned.penalties == (AttentionDrift(gamma=0.3, hinge=False),)
    assert tuned.config["layers"] == [2]
    assert tuned.config["sadr"]["gamma"] == 0.3


def test_names_and_settings_nobody_knows():
    with pytest.raises(UnknownNameError, match="memit"):
        get_editor("menit")
    with pytest.raises(UnknownNameError, match="sadr"):
        get_editor("rome+sard")
    handle = tiny_handle("llama")
    with pytest.raises(ConfigError, match="steps"):
        get_editor("rome_identity", step=3).edit(handle, [REQUEST])
    with pytest.raises(ConfigError, match="gamma"):
        get_editor("rome_identity", gamma=3).edit(handle, [REQUEST])
    several: tuple[dict[str, Any], ...] = (
        {"steps": 0},
        {"lr": 0.0},
        {"clamp": -1.0},
        {"weight_decay": -1.0},
        {"fact_token": "first"},
    )
    for wrong in several:
        with pytest.raises(ConfigError):
            get_editor("rome_identity", **wrong).edit(handle, [REQUEST])


def test_every_method_describes_itself():
    for name in EDITORS.names():
        method = EDITORS.get(name)
        assert method.name == name
        assert method.paper
        assert method.cost
        assert method.title


# -- prefixes -----------------------------------------------------------------------------------------------------


def test_prefixes_come_from_the_model_and_the_seed():
    handle = tiny_handle("llama")
    state = torch.random.get_rng_state()
    first = generate_prefixes(handle, LENGTHS, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first == generate_prefixes(handle, LENGTHS, seed=0)
    assert first != generate_prefixes(handle, LENGTHS, seed=1)
    assert first != generate_prefixes(tiny_handle("llama", seed=1), LENGTHS, seed=0)
    assert first.flat[0] == "{}"
    assert len(first.flat) == 8
    assert all(text.endswith(". {}") and text.count("{") == 1 for text in first.flat[1:])


def test_a_cache_belongs_to_its_owner_and_keeps_models_apart():
    cache, one, two = PrefixCache(), tiny_handle("llama"), tiny_handle("llama", seed=1)
    first = cache.get(one, LENGTHS, 0)
    assert cache.get(one, LENGTHS, 0) is first
    assert cache.get(two, LENGTHS, 0) != first
    assert cache.get(one, LENGTHS, 1) != first
    assert PrefixCache().get(one, LENGTHS, 0) == first


def test_weights_of_the_mean_key():
    prefixes = Prefixes((("{}",), ("a {}", "b {}", "c {}", "d {}", "e {}")))
    assert torch.allclose(prefixes.weights("mean"), torch.full((6,), 1 / 6, dtype=torch.float64))
    assert torch.allclose(prefixes.weights("groups"), torch.tensor([0.5] + [0.1] * 5, dtype=torch.float64))
    assert float(Prefixes.of([]).weights("groups")) == 1
    assert PREFIX_LENGTHS == ((10, 5),)
    with pytest.raises(ConfigError):
        prefixes.weights("median")


@pytest.mark.parametrize("texts", [["no place"], ["two {} places {}"]])
def test_templates_without_exactly_one_place_are_refused(texts):
    with pytest.raises(ConfigError, match="exactly one"):
        Prefixes.of(texts)


# -- rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_", [REQUEST, EditRequest("b", "{}'s wife is", "Barack Obama", "Marie Curie of Paris")]
)
def test_rows_predict_the_target_from_the_prompt(request_):
    handle = tiny_handle("llama")
    for row, context in zip(request_rows(handle, request_, ["{}", "I. {}"]), ["", "I. "], strict=True):
        assert handle.decode(row.ids + row.targets[-1:]) == f"{context}{request_.text} {request_.target_new}"
        assert handle.decode(row.ids[: row.prompt_last + 1]) == context + request_.text
        assert handle.decode(row.prompt).rstrip("'").endswith(request_.subject)
        assert len(row.ids) == row.prompt_last + len(row.targets)
    essence = essence_row(handle, request_)
    assert handle.decode(essence.prompt) == request_.subject
    last = request_rows(handle, request_, ["{}"], "last")[0]
    assert last.change == last.prompt_last


def test_a_subject_without_tokens_names_the_request():
    handle = tiny_handle("llama")
    with pytest.raises(SubjectNotFoundError):
        EditRequest("x", "The capital of {} is", "  ", "Rome")
    with pytest.raises(SubjectNotFoundError):
        EditRequest.from_text("x", "The capital of France is", "Spain", "Rome")
    assert request_rows(handle, REQUEST, ["{}"])[0].change >= 0
