"""Runs functions of a checkout of EasyEdit (zjunlp/EasyEdit) beside ours; nothing of it is part of this repository.

Its packages import every method's dependencies at once. Here they are entered without their ``__init__``, and the two modules that
the evaluation names without using them are left empty.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import nltk
import torch
from torch import Tensor

from lab.arch import Role
from lab.eval.scorers import words
from lab.handle import ModelHandle
from lab.records import EditRequest

_PACKAGES = ("", ".models", ".util", ".models.rome", ".models.memit", ".models.alphaedit", ".evaluate")


def enter(checkout: Path) -> None:
    """Makes ``easyeditor.*`` importable.

    Raises:
        SystemExit: There is no checkout.
    """
    root = checkout / "easyeditor"
    if not root.is_dir():
        raise SystemExit(f"{checkout} holds no folder easyeditor; give a checkout of zjunlp/EasyEdit")
    for name in _PACKAGES:
        module = ModuleType(f"easyeditor{name}")
        module.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[module.__name__] = module
    empty: dict[str, dict[str, Any]] = {
        "easyeditor.trainer": {},
        "easyeditor.models.melo": {"__path__": []},
        "easyeditor.models.melo.melo": {"LORA": type("LORA", (), {})},
        "openai": {"OpenAI": None},
    }
    for name, content in empty.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        sys.modules.setdefault(name, module)
    sys.modules["easyeditor.util"].__dict__["HyperParams"] = object


def part(name: str) -> Any:
    """A module of EasyEdit."""
    return importlib.import_module(f"easyeditor.{name}")


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """EasyEdit prints every step."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


class EasyEdit:
    """Its ROME, MEMIT, AlphaEdit and evaluation on a model of its own, with given statistics and prefixes.

    Args:
        handle: The model; edited and restored.
        moments: Layer to key second moment ``[in, in]``, fp64.
        rome_prefixes: Templates, the plain one first.
        prefixes: Templates of the batch methods, the plain one first.
        search: ``steps``, ``lr``, ``weight_decay``, ``kl_factor``.
    """

    def __init__(
        self,
        handle: ModelHandle,
        moments: dict[int, Tensor],
        rome_prefixes: Sequence[str],
        prefixes: Sequence[str],
        search: dict[str, Any],
    ) -> None:
        self.handle, self.model, self.tokenizer = handle, handle.model, handle.tokenizer
        self.rome, self.rome_u = part("models.rome.rome_main"), part("models.rome.compute_u")
        self.memit, self.alphaedit = part("models.memit.memit_main"), part("models.alphaedit.AlphaEdit_main")
        name = str(self.model.config._name_or_path).replace("/", "_")
        self.rome.CONTEXT_TEMPLATES_CACHE = list(rome_prefixes)
        for method in (self.memit, self.alphaedit):
            method.CONTEXT_TEMPLATES_CACHE = [["{}"], list(prefixes[1:])]
        self.names = {layer: handle.weight(Role.MLP_OUT, layer).name for layer in range(handle.n_layers)}
        template = self.names[0].removesuffix(".weight").replace(".0.", ".{}.")
        for layer, moment in moments.items():
            self.memit.COV_CACHE[name, template.format(layer)] = moment.float()
            self.rome_u.inv_mom2_cache[name, template.format(layer)] = torch.inverse(moment).float()
        block = handle.arch.path(Role.BLOCK, 0)
        # Its configs name the embeddings where the head is tied to them: it looks the head up among the parameters.
        head = handle.arch.path(Role.UNEMBED)
        if f"{head}.weight" not in dict(self.model.named_parameters()):
            head = handle.arch.path(Role.EMBED)
        self.shared: dict[str, Any] = {
            "fact_token": "subject_last",
            "v_num_grad_steps": search["steps"],
            "v_lr": search["lr"],
            "v_loss_layer": handle.n_layers - 1,
            "v_weight_decay": search["weight_decay"],
            "kl_factor": search["kl_factor"],
            "rewrite_module_tmp": template,
            "layer_module_tmp": block.replace(".0", ".{}"),
            "mlp_module_tmp": handle.arch.path(Role.MLP, 0).replace(".0.", ".{}."),
            "ln_f_module": handle.arch.path(Role.FINAL_NORM),
            "lm_head_module": head,
            "mom2_dataset": "given",
            "mom2_n_samples": 1,
            "mom2_dtype": "float64",
            "stats_dir": "",
            "device": "cpu",
            "model_name": name,
            "max_length": 40,
        }

    def _hparams(self, **more: Any) -> Any:
        return SimpleNamespace(**self.shared, **more)

    def rome_params(self, layer: int, clamp: float) -> Any:
        """Settings of ROME with key statistics."""
        return self._hparams(
            alg_name="ROME",
            layers=[layer],
            clamp_norm_factor=clamp,
            mom2_adjustment=True,
            context_template_length_params=[],
        )

    def edit_rome(self, request: EditRequest, layer: int, clamp: float) -> dict[str, Tensor]:
        """One edit's update ``[out, in]`` by parameter; the model stays as it was."""
        with silence():
            found = self.rome.execute_rome(
                self.model, self.tokenizer, row(request), self.rome_params(layer, clamp)
            )
        return {name: torch.outer(v, u) for name, (u, v) in found.items()}

    def edit_memit(
        self,
        requests: Sequence[EditRequest],
        layers: Sequence[int],
        clamp: float,
        weight: float,
        values: Path,
    ) -> dict[str, Tensor]:
        """A batch's update ``[out, in]`` by parameter; values that lie in ``values`` are not searched."""
        params = self._hparams(layers=list(layers), clamp_norm_factor=clamp, mom2_update_weight=weight)
        with silence():
            found = self.memit.execute_memit(
                self.model, self.tokenizer, [row(r) for r in requests], params, cache_template=_files(values)
            )
        return {name: residual @ key.T for name, (key, residual) in found.items()}

    def begin_alphaedit(self, projectors: Sequence[Tensor], place: Path) -> None:
        """Sets its module's state: projectors, and no earlier keys."""
        stacked = torch.stack([projector.float() for projector in projectors])
        self.alphaedit.P, self.alphaedit.P_loaded = stacked, True
        self.alphaedit.cache_c, self.alphaedit.cache_c_new = torch.zeros_like(stacked), True
        self.place = place

    def write_alphaedit(
        self, request: EditRequest, layers: Sequence[int], clamp: float, l2: float, values: Path
    ) -> None:
        """Writes one edit whose value lies in ``values`` into the model."""
        params = self._hparams(
            layers=list(layers),
            clamp_norm_factor=clamp,
            L2=l2,
            P_loc=str(self.place),
            nullspace_threshold=0.0,
        )
        with silence():
            self.alphaedit.apply_AlphaEdit_to_model(
                self.model, self.tokenizer, [row(request)], params, cache_template=_files(values)
            )

    def quality(self, record: dict[str, Any], params: Any, *, text: bool) -> Any:
        """Its scores of one case on the model as it stands."""
        evaluate, tools = part("evaluate.evaluate"), part("evaluate.evaluate_utils")
        # Its splitter of sentences needs a download; ours does not and takes as long.
        tools.nltk = SimpleNamespace(word_tokenize=words, ngrams=nltk.ngrams, FreqDist=nltk.FreqDist)
        with silence():
            return evaluate.compute_edit_quality(
                self.model, params.model_name, params, self.tokenizer, record, "cpu", test_generation=text
            )

    def single(
        self, request: EditRequest, record: dict[str, Any], layer: int, clamp: float, *, text: bool
    ) -> None:
        """What its editor does per case: scores before, edit, scores after, restore."""
        params = self.rome_params(layer, clamp)
        self.quality(record, params, text=text)
        with silence():
            _, before = self.rome.apply_rome_to_model(
                self.model, self.tokenizer, [row(request)], params, return_orig_weights=True
            )
        self.quality(record, params, text=text)
        with torch.no_grad():
            for name, weight in before.items():
                self.model.get_parameter(name)[...] = weight


def row(request: EditRequest) -> dict[str, str]:
    """A request in EasyEdit's form."""
    return {
        "prompt": request.prompt,
        "subject": request.subject,
        "target_new": request.target_new,
        "case_id": request.id.replace("/", "_"),
    }


def _files(values: Path) -> str:
    # The template is filled with layer, clamp and case.
    return f"{values}/{{2}}.npz"
