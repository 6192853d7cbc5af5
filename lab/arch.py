"""The one table of model families: where each role lives in a Hugging Face module tree.

Method code says ``handle.weight(Role.MLP_OUT, 5)``; dotted paths exist only here. A new family is one row of ``ARCHITECTURES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from lab.errors import UnsupportedModelError


class Role(StrEnum):
    """What a module does, whatever a family calls it."""

    EMBED = "embed"
    BLOCK = "block"
    ATTN = "attn"
    ATTN_OUT = "attn_out"
    MLP = "mlp"
    MLP_IN = "mlp_in"
    """First projection of the MLP (the gate where gate and up are apart)."""
    MLP_UP = "mlp_up"
    """Second projection beside the gate; only families that keep the two apart have it."""
    MLP_OUT = "mlp_out"
    """Down projection; its input is the key of locate-then-edit methods."""
    FINAL_NORM = "final_norm"
    UNEMBED = "unembed"


LAYER_ROLES = frozenset(
    {Role.BLOCK, Role.ATTN, Role.ATTN_OUT, Role.MLP, Role.MLP_IN, Role.MLP_UP, Role.MLP_OUT}
)


@dataclass(frozen=True)
class Architecture:
    """One family of causal language models.

    Attributes:
        model_types: Values of ``config.model_type`` that this row describes.
        paths: Role to dotted path; ``{}`` stands for the layer.
        parallel: Attention and MLP read the same input and are added together.
        post_norm_mlp: The MLP output passes a norm before it is added to the residual stream, so that adding to a
            module output is not adding to the block output.
        eager_only: The family has no sdpa attention.
        flat_mlp: The MLP sees ``[batch*pos, d]`` instead of ``[batch, pos, d]``.
        query_value: The attention's projections that make queries and values, below ``Role.ATTN``; one that makes more at
            once where the family fuses them.
    """

    model_types: tuple[str, ...]
    paths: Mapping[Role, str] = field(repr=False)
    parallel: bool = False
    post_norm_mlp: bool = False
    eager_only: bool = False
    flat_mlp: bool = False
    query_value: tuple[str, ...] = ("q_proj", "v_proj")

    def path(self, role: Role, layer: int | None = None) -> str:
        """Dotted path of ``role``; ``layer`` is needed exactly for roles that exist once per block.

        Raises:
            UnsupportedModelError: The family has no such module.
        """
        if (role in LAYER_ROLES) != (layer is not None):
            raise ValueError(f"role {role.value!r} {'needs' if role in LAYER_ROLES else 'takes no'} layer")
        if role not in self.paths:
            raise UnsupportedModelError(
                f"models of type {' or '.join(self.model_types)} have no {role.value!r}"
            )
        return self.paths[role].format(layer)

    def query_value_paths(self, layer: int) -> tuple[str, ...]:
        """Dotted paths of the projections that make the queries and values of one block."""
        return tuple(f"{self.path(Role.ATTN, layer)}.{name}" for name in self.query_value)


def _paths(
    blocks: str,
    *,
    attn: str,
    attn_out: str,
    mlp: str,
    mlp_in: str,
    mlp_out: str,
    embed: str,
    norm: str,
    mlp_up: str | None = None,
) -> Mapping[Role, str]:
    block = blocks + ".{}"
    inner = {
        Role.ATTN: attn,
        Role.ATTN_OUT: attn_out,
        Role.MLP: mlp,
        Role.MLP_IN: mlp_in,
        Role.MLP_OUT: mlp_out,
        **({} if mlp_up is None else {Role.MLP_UP: mlp_up}),
    }
    table = {Role.EMBED: embed, Role.BLOCK: block, Role.FINAL_NORM: norm, Role.UNEMBED: "lm_head"}
    return MappingProxyType(table | {role: f"{block}.{path}" for role, path in inner.items()})


def _llama_paths(mlp_in: str = "mlp.gate_proj", mlp_up: str | None = "mlp.up_proj") -> Mapping[Role, str]:
    return _paths(
        "model.layers",
        attn="self_attn",
        attn_out="self_attn.o_proj",
        mlp="mlp",
        mlp_in=mlp_in,
        mlp_up=mlp_up,
        mlp_out="mlp.down_proj",
        embed="model.embed_tokens",
        norm="model.norm",
    )


_GPT2 = _paths(
    "transformer.h", attn="attn", attn_out="attn.c_proj", mlp="mlp", mlp_in="mlp.c_fc", mlp_out="mlp.c_proj",
    embed="transformer.wte", norm="transformer.ln_f",
)  # fmt: skip
_GPTJ = _paths(
    "transformer.h", attn="attn", attn_out="attn.out_proj", mlp="mlp", mlp_in="mlp.fc_in", mlp_out="mlp.fc_out",
    embed="transformer.wte", norm="transformer.ln_f",
)  # fmt: skip
_NEOX = _paths(
    "gpt_neox.layers", attn="attention", attn_out="attention.dense", mlp="mlp", mlp_in="mlp.dense_h_to_4h",
    mlp_out="mlp.dense_4h_to_h", embed="gpt_neox.embed_in", norm="gpt_neox.final_layer_norm",
)  # fmt: skip
# OPT has no MLP module: its two projections hang on the block, and fc2's output is the MLP output.
_OPT = _paths(
    "model.decoder.layers", attn="self_attn", attn_out="self_attn.out_proj", mlp="fc2", mlp_in="fc1", mlp_out="fc2",
    embed="model.decoder.embed_tokens", norm="model.decoder.final_layer_norm",
)  # fmt: skip
_PHI = _paths(
    "model.layers", attn="self_attn", attn_out="self_attn.dense", mlp="mlp", mlp_in="mlp.fc1", mlp_out="mlp.fc2",
    embed="model.embed_tokens", norm="model.final_layernorm",
)  # fmt: skip

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(("gpt2",), _GPT2, query_value=("c_attn",)),
    Architecture(("gptj",), _GPTJ, parallel=True, eager_only=True),
    Architecture(("gpt_neox",), _NEOX, parallel=True, query_value=("query_key_value",)),
    Architecture(("opt",), _OPT, flat_mlp=True),
    Architecture(("llama", "mistral", "qwen2", "qwen3"), _llama_paths()),
    Architecture(("gemma2",), _llama_paths(), post_norm_mlp=True, eager_only=True),
    Architecture(("gemma3_text",), _llama_paths(), post_norm_mlp=True),
    Architecture(("phi",), _PHI, parallel=True),
    Architecture(("phi3",), _llama_paths("mlp.gate_up_proj", None), query_value=("qkv_proj",)),
)


def architecture_for(config: Any) -> Architecture:
    """Finds the row that describes a Hugging Face config.

    Raises:
        UnsupportedModelError: An encoder-decoder model, fused experts, or a family without a row.
    """
    kind = getattr(config, "model_type", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{kind!r} is an encoder-decoder model; KnowLab edits causal language models only"
        )
    experts = [
        getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")
    ]
    if any(experts):
        raise UnsupportedModelError(
            f"{kind!r} fuses its experts into one parameter; there is no down projection to edit"
        )
    for architecture in ARCHITECTURES:
        if kind in architecture.model_types:
            return architecture
    known = ", ".join(sorted(name for row in ARCHITECTURES for name in row.model_types))
    raise UnsupportedModelError(
        f"no architecture row for model type {kind!r}; known: {known}. A row in lab/arch.py adds one"
    )
