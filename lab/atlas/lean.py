"""A lean training pass over the same parameters as the Hugging Face modules.

Rows of all lengths share every matrix product; only attention sees rows, and a text attends to itself alone. Parameters carry
Hugging Face names, so that weights go to and fro without a mapping.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.atlas.recipe import Shape

Params = Mapping[str, Tensor]
Layout = Sequence[tuple[int, int]]


def initial_params(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    """Fresh fp32 parameters: normal with standard deviation 0.02, outputs of blocks scaled down with depth."""
    d, inner = shape.hidden, shape.inner
    small = 0.02 / math.sqrt(2 * shape.layers)
    params: dict[str, Tensor] = {}

    def normal(name: str, *size: int, std: float = 0.02) -> None:
        params[name] = torch.randn(*size, generator=generator) * std

    def ones(name: str) -> None:
        params[name] = torch.ones(d)

    if shape.family == "llama":
        normal("model.embed_tokens.weight", shape.vocab, d)
        for layer in range(shape.layers):
            block = f"model.layers.{layer}."
            for part in "qkv":
                normal(f"{block}self_attn.{part}_proj.weight", d, d)
            normal(f"{block}self_attn.o_proj.weight", d, d, std=small)
            normal(f"{block}mlp.gate_proj.weight", inner, d)
            normal(f"{block}mlp.up_proj.weight", inner, d)
            normal(f"{block}mlp.down_proj.weight", d, inner, std=small)
            ones(f"{block}input_layernorm.weight")
            ones(f"{block}post_attention_layernorm.weight")
        ones("model.norm.weight")
        return params
    normal("transformer.wte.weight", shape.vocab, d)
    normal("transformer.wpe.weight", shape.context, d)
    for layer in range(shape.layers):
        block = f"transformer.h.{layer}."
        for part, size, std in (
            ("attn.c_attn", (d, 3 * d), 0.02),
            ("attn.c_proj", (d, d), small),
            ("mlp.c_fc", (d, inner), 0.02),
            ("mlp.c_proj", (inner, d), small),
        ):
            normal(f"{block}{part}.weight", *size, std=std)
            params[f"{block}{part}.bias"] = torch.zeros(size[1])
        for part in ("ln_1", "ln_2"):
            ones(f"{block}{part}.weight")
            params[f"{block}{part}.bias"] = torch.zeros(d)
    ones("transformer.ln_f.weight")
    params["transformer.ln_f.bias"] = torch.zeros(d)
    return params


def embedding_name(shape: Shape) -> str:
    """Name of the embedding, which is also the output matrix."""
    return "model.embed_tokens.weight" if shape.family == "llama" else "transformer.wte.weight"


def hidden_states(
    params: Params,
    shape: Shape,
    layout: Layout,
    ids: Tensor,
    positions: Tensor,
    masks: Sequence[Tensor],
    keep: Tensor | None = None,
) -> Tensor:
    """Final normed hidden states.

    Args:
        params: Parameters by Hugging Face name; matrices in the working type.
        shape: The model.
        layout: ``(row length, rows)`` pairs; ``ids`` holds the rows one after another.
        ids: ``[n]`` tokens.
        positions: ``[n]`` position of each token.
        masks: For each pair of the layout ``[rows, 1, length, length]``, 0 where a token may look and very low elsewhere.
        keep: ``[layers, n]``, 0 where a feed-forward output is left out and 1 elsewhere; all are kept without it.

    Returns:
        ``[n, hidden]`` in the working type.
    """
    if shape.family == "llama":
        return _llama(params, shape, layout, ids, positions, masks, keep)
    return _gpt2(params, shape, layout, ids, positions, masks, keep)


def _llama(
    params: Params,
    shape: Shape,
    layout: Layout,
    ids: Tensor,
    positions: Tensor,
    masks: Sequence[Tensor],
    keep: Tensor | None = None,
) -> Tensor:
    heads, width = shape.heads, shape.hidden // shape.heads
    work = params["model.layers.0.self_attn.q_proj.weight"].dtype
    steps = torch.arange(0, width, 2, device=ids.device, dtype=torch.float32) / width
    angles = positions.float()[:, None] * torch.pow(10000.0, -steps)
    cos, sin = angles.cos()[:, None, None, :], angles.sin()[:, None, None, :]
    x = F.embedding(ids, params["model.embed_tokens.weight"]).to(work)
    for layer in range(shape.layers):
        block = f"model.layers.{layer}."
        h = _rms(x, params[f"{block}input_layernorm.weight"])
        joined = torch.cat([params[f"{block}self_attn.{part}_proj.weight"] for part in "qkv"])
        qkv = F.linear(h, joined).view(-1, 3, heads, width)
        first, second = qkv[:, :2].float().chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(work)
        y = _attend(turned[:, 0], turned[:, 1], qkv[:, 2], layout, masks)
        x = x + F.linear(y, params[f"{block}self_attn.o_proj.weight"])
        h = _rms(x, params[f"{block}post_attention_layernorm.weight"])
        joined = torch.cat([params[f"{block}mlp.gate_proj.weight"], params[f"{block}mlp.up_proj.weight"]])
        gate, up = F.linear(h, joined).chunk(2, dim=-1)
        x = x + _kept(F.linear(F.silu(gate) * up, params[f"{block}mlp.down_proj.weight"]), keep, layer)
    return _rms(x, params["model.norm.weight"])


def _gpt2(
    params: Params,
    shape: Shape,
    layout: Layout,
    ids: Tensor,
    positions: Tensor,
    masks: Sequence[Tensor],
    keep: Tensor | None = None,
) -> Tensor:
    heads, width = shape.heads, shape.hidden // shape.heads
    work = params["transformer.h.0.attn.c_attn.weight"].dtype
    x = F.embedding(ids, params["transformer.wte.weight"]) + F.embedding(
        positions, params["transformer.wpe.weight"]
    )
    x = x.to(work)
    for layer in range(shape.layers):
        block = f"transformer.h.{layer}."
        h = _layer_norm(x, params, f"{block}ln_1")
        q, k, v = _affine(h, params, f"{block}attn.c_attn").view(-1, 3, heads, width).unbind(1)
        x = x + _affine(_attend(q, k, v, layout, masks), params, f"{block}attn.c_proj")
        h = _layer_norm(x, params, f"{block}ln_2")
        h = F.gelu(_affine(h, params, f"{block}mlp.c_fc"), approximate="tanh")
        x = x + _kept(_affine(h, params, f"{block}mlp.c_proj"), keep, layer)
    return _layer_norm(x, params, "transformer.ln_f")


def _kept(output: Tensor, keep: Tensor | None, layer: int) -> Tensor:
    return output if keep is None else output * keep[layer][:, None].to(output.dtype)


def _affine(x: Tensor, params: Params, name: str) -> Tensor:
    return x @ params[f"{name}.weight"] + params[f"{name}.bias"].to(x.dtype)


def _layer_norm(x: Tensor, params: Params, name: str) -> Tensor:
    weight, bias = params[f"{name}.weight"].float(), params[f"{name}.bias"].float()
    return F.layer_norm(x.float(), (x.shape[-1],), weight, bias, 1e-5).to(x.dtype)


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (wide * scale * weight.float()).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, masks: Sequence[Tensor]) -> Tensor:
    # Plain products: fused attention kernels are slower than these on rows this short, backwards above all.
    heads, width = q.shape[1:]
    parts, start = [], 0
    for (length, rows), mask in zip(layout, masks, strict=True):
        stop = start + length * rows
        qr, kr, vr = (t[start:stop].view(rows, length, heads, width).transpose(1, 2) for t in (q, k, v))
        scores = (qr @ kr.transpose(-1, -2)).float() * width**-0.5 + mask.float()
        mixed = torch.softmax(scores, -1).to(v.dtype) @ vr
        parts.append(mixed.transpose(1, 2).reshape(stop - start, heads * width))
        start = stop
    return torch.cat(parts)


def cross_entropy(
    params: Params, shape: Shape, hidden: Tensor, chosen: Tensor, labels: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted mean cross entropy at chosen positions.

    Args:
        params: As in ``hidden_states``.
        shape: The model.
        hidden: ``[n, hidden]``.
        chosen: ``[m]`` positions in ``hidden``.
        labels: ``[m]`` next tokens.
        weights: ``[m]`` weights; 0 leaves a position out.

    Returns:
        The loss, and ``[m]`` cross entropies without gradient.
    """
    matrix = params[embedding_name(shape)].to(hidden.dtype)
    logits = F.linear(hidden[chosen], matrix).float()
    losses = torch.logsumexp(logits, -1) - logits.gather(1, labels[:, None])[:, 0]
    return (losses * weights).sum() / weights.sum(), losses.detach()


def loss(
    params: Params,
    shape: Shape,
    layout: Layout,
    ids: Tensor,
    positions: Tensor,
    masks: Sequence[Tensor],
    chosen: Tensor,
    labels: Tensor,
    weights: Tensor,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``hidden_states`` followed by ``cross_entropy``: the function that training compiles."""
    hidden = hidden_states(params, shape, layout, ids, positions, masks, keep)
    return cross_entropy(params, shape, hidden, chosen, labels, weights)


def working_copy(params: Params, shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    """Leaves to differentiate: matrices in ``dtype``; embeddings, biases and norms stay fp32, as their gradients are sums of
    many small terms."""
    vectors = {embedding_name(shape), "transformer.wpe.weight"}
    return {
        name: value.detach()
        .to(dtype if value.dim() == 2 and name not in vectors else torch.float32, copy=True)
        .requires_grad_()
        for name, value in params.items()
    }
