"""Quantised projections: an int8 and an int4 form that need no library and run on the CPU, and one view of all of them.

A quantised weight cannot hold a small change: its steps are coarser than most edits. It is therefore read and never written;
patches go beside it (``mode="sidecar"``). What is quantised is told by what a module offers, not by its name: a ``dequantize``
method on the module or on its weight (torchao), or the scales that bitsandbytes hangs on a weight.

The scheme here is absolute maximum per output row, symmetric, weights only (LLM.int8()'s vector-wise form, Dettmers et al. 2022,
arXiv 2208.07339, without its outlier columns): ``W[o, i] ≈ scale[o] · code[o, i]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lab.errors import NumericalError, UnknownNameError, UnsupportedModelError

_LARGEST_CODE = {"int8": 127, "int4": 7}
SCHEMES = tuple(_LARGEST_CODE)
"""What ``quantize=`` takes."""
# int4 codes are kept as code + 8, so that a nibble is never negative.
_NIBBLE_ZERO = 8


class QuantizedLinear(nn.Module):
    """A projection whose weight is whole numbers and one fp32 scale per output row.

    Products are made in fp32 (fp64 for fp64 inputs) and given back in the input's type. Gradients reach the input.

    Args:
        weight: ``[out, in]``, the weight to quantise; not kept.
        bias: ``[out]`` or ``None``; kept as it is.
        scheme: ``"int8"``, or ``"int4"`` with two codes in a byte.
        transposed: The module it stands for stores ``[in, out]``.

    Attributes:
        codes: ``[out, in]`` int8, or ``[out, ceil(in / 2)]`` uint8: even columns in the low half of a byte, odd ones in the high.
        scale: ``[out]`` fp32.
        bias, scheme, transposed: As given.
        in_features, out_features: Sizes.

    Raises:
        UnknownNameError: No such scheme.
        NumericalError: The weight holds NaN or infinity.
    """

    codes: Tensor
    scale: Tensor

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None, scheme: str, *, transposed: bool = False
    ) -> None:
        super().__init__()
        if scheme not in _LARGEST_CODE:
            raise UnknownNameError("quantisation", scheme, SCHEMES)
        wide = weight.detach().float()
        if not bool(torch.isfinite(wide).all()):
            raise NumericalError("a weight that holds NaN or infinity cannot be quantised")
        self.scheme, self.transposed = scheme, transposed
        self.out_features, self.in_features = wide.shape
        largest = _LARGEST_CODE[scheme]
        scale = wide.abs().amax(dim=1) / largest
        # A row of zeros keeps scale 1: its codes are zeros whatever the scale.
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        codes = (wide / scale[:, None]).round().clamp(-largest, largest).to(torch.int8)
        self.register_buffer("codes", _packed(codes) if scheme == "int4" else codes)
        self.register_buffer("scale", scale)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Projects ``x [..., in]`` to ``[..., out]``."""
        wide = torch.promote_types(x.dtype, torch.float32)
        found = F.linear(x.to(wide), self._whole().to(wide)) * self.scale.to(wide)
        if self.bias is not None:
            found = found + self.bias.to(wide)
        return found.to(x.dtype)

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for, ``[out, in]`` fp32."""
        return self._whole().float() * self.scale[:, None]

    def _whole(self) -> Tensor:
        return _unpacked(self.codes, self.in_features) if self.scheme == "int4" else self.codes

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme}"


@dataclass(frozen=True)
class QuantizedWeight:
    """The weight of a quantised projection, to be read.

    Attributes:
        shape: ``(out, in)``.
        scheme: What it is called in messages.
        read: Gives the weight that the codes stand for, ``[out, in]``.
    """

    shape: tuple[int, int]
    scheme: str
    read: Callable[[], Tensor] = field(repr=False, compare=False)


def quantized_weight(module: nn.Module) -> QuantizedWeight | None:
    """The weight of a projection as a quantised one, or ``None`` where it is a plain tensor.

    Raises:
        UnsupportedModelError: The weight is made of whole numbers and says nowhere how to read them.
    """
    if isinstance(module, QuantizedLinear):
        return QuantizedWeight((module.out_features, module.in_features), module.scheme, module.dequantize)
    own = getattr(module, "dequantize", None)
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return _reader(module, "module", own) if callable(own) else None
    if type(weight).dequantize is not Tensor.dequantize:
        return _reader(module, type(weight).__name__, weight.dequantize)
    if getattr(weight, "quant_state", None) is not None or getattr(weight, "SCB", None) is not None:
        return _reader(module, type(weight).__name__, lambda: _read_scaled(module))
    if callable(own):
        return _reader(module, type(module).__name__, own)
    if not weight.is_floating_point():
        raise UnsupportedModelError(
            f"a {type(module).__name__} holds {weight.dtype} and offers no dequantize(); load the model in a form that does, "
            "or in floating point"
        )
    return None


def _reader(module: nn.Module, scheme: str, read: Callable[..., Any]) -> QuantizedWeight:
    rows, columns = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if rows is None or columns is None:
        rows, columns = read().shape
    return QuantizedWeight((int(rows), int(columns)), scheme, lambda: read().detach())


def _read_scaled(module: Any) -> Tensor:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    return dequantize_bnb_weight(module.weight, getattr(module, "state", None))


def quantize_blocks(model: nn.Module, blocks: Iterable[nn.Module], scheme: str) -> int:
    """Replaces every plain projection inside some blocks of a model; embeddings, norms and the head stay as they are.

    Args:
        model: The model; changed in place.
        blocks: Its transformer blocks.
        scheme: As in ``QuantizedLinear``.

    Returns:
        How many projections were replaced.

    Raises:
        UnknownNameError: No such scheme.
        NumericalError: A weight holds NaN or infinity; the model is then half quantised and of no use.
    """
    if scheme not in _LARGEST_CODE:
        raise UnknownNameError("quantisation", scheme, SCHEMES)
    count = 0
    for block in blocks:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if not isinstance(child, (nn.Linear, Conv1D)) or quantized_weight(child) is not None:
                    continue
                transposed = isinstance(child, Conv1D)
                weight = child.weight.T if transposed else child.weight
                setattr(parent, name, QuantizedLinear(weight, child.bias, scheme, transposed=transposed))
                count += 1
    model.requires_grad_(False)
    return count


def _packed(codes: Tensor) -> Tensor:
    nibbles = F.pad((codes + _NIBBLE_ZERO).to(torch.uint8), (0, codes.shape[1] % 2), value=_NIBBLE_ZERO)
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


def _unpacked(codes: Tensor, columns: int) -> Tensor:
    nibbles = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)[:, :columns]
    return nibbles.to(torch.int8) - _NIBBLE_ZERO
