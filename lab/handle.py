"""``ModelHandle``: the only object that knows both a model and its tokenizer."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lab.arch import Architecture, Role, architecture_for
from lab.errors import ConfigError, UnknownNameError, UnsupportedModelError
from lab.locks import ReadWriteLock
from lab.quantized import SCHEMES, QuantizedLinear, QuantizedWeight, quantize_blocks, quantized_weight
from lab.stack import Applied, PatchStack
from lab.tokens import Batch, Side, encode_ids, pad_rows

# Past this many elements a fingerprint reads an even sample of a matrix, so that a 7B model is named in seconds.
_FULL_HASH_ELEMENTS = 1 << 22
_SAMPLED_ELEMENTS = 1 << 16
# Fields of a config that say how or where a model was loaded, not what it computes.
_TRANSIENT_CONFIG = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "_attn_implementation",
    "use_cache",
)


@dataclass(frozen=True)
class Weight:
    """One matrix of the model.

    Attributes:
        name: Parameter name, as in the state dict.
        held: The live parameter, in whatever orientation the module stores; of a quantised projection, what reads it.
        transposed: The module stores ``[in, out]`` (GPT-2's Conv1D).
    """

    name: str
    held: nn.Parameter | QuantizedWeight
    transposed: bool

    @property
    def quantized(self) -> bool:
        """Whether it can only be read; patches then go beside it."""
        return isinstance(self.held, QuantizedWeight)

    @property
    def parameter(self) -> nn.Parameter:
        """The live parameter.

        Raises:
            UnsupportedModelError: The weight is quantised.
        """
        if isinstance(self.held, QuantizedWeight):
            raise UnsupportedModelError(
                f"the weight {self.name!r} is quantised ({self.held.scheme}): it can be read, but neither trained nor written; "
                'apply patches with mode="sidecar", or load the model without quantisation'
            )
        return self.held

    def canonical(self) -> Tensor:
        """The weight as ``[out, in]``, detached: a view, or a quantised one's values in a tensor of their own."""
        if isinstance(self.held, QuantizedWeight):
            return self.held.read()
        data = self.held.detach()
        return data.T if self.transposed else data

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        if isinstance(self.held, QuantizedWeight):
            return self.held.shape
        rows, columns = self.held.shape
        return (columns, rows) if self.transposed else (rows, columns)


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch dtype from its name (``"float32"``, ``"bf16"``)."""
    if isinstance(dtype, torch.dtype):
        return dtype
    short = {"fp32": "float32", "fp64": "float64", "bf16": "bfloat16", "fp16": "float16"}
    found = getattr(torch, short.get(dtype, dtype), None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"unknown dtype {dtype!r}; use float32, float64, bfloat16 or float16")
    return found


class ModelHandle:
    """A causal language model with its tokenizer, its lock, and the patches applied to it.

    Use ``load`` for names and folders, ``wrap`` for a model at hand. Weights change through patches only; anything else
    that writes to them makes ``fingerprint`` a lie.

    Args:
        model: A Hugging Face causal language model; put into eval mode.
        tokenizer: Its fast tokenizer.
        name: What to call it in reports.
        folder: Where it was loaded from, if from a folder.

    Attributes:
        model, tokenizer, config, name, folder: As given.
        arch: The family's row in ``lab.arch``.
        n_layers: Number of blocks.
        hidden_size: Width of the residual stream, ``d``.
        stack: The patches applied now.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "",
        folder: Path | None = None,
    ) -> None:
        self.arch: Architecture = architecture_for(model.config)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.config: Any = model.config
        self.name = name or str(getattr(model.config, "_name_or_path", "")) or model.config.model_type
        self.folder = folder
        self.n_layers = int(self.config.num_hidden_layers)
        self.hidden_size = int(self.config.hidden_size)
        self._lock = ReadWriteLock()
        self.stack = PatchStack(self)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    # -- making one -----------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        quantize: str | None = None,
    ) -> ModelHandle:
        """Loads a built-in model (``"atlas"``), a local folder, or a hub id. Only safetensors are read.

        Args:
            name_or_path: Which model.
            dtype: Floating type of what is not quantised.
            device: Where it runs.
            revision: Of a hub id.
            quantize: ``"int8"`` or ``"int4"``: the projections of the blocks, rounded from ``dtype`` to whole numbers with a scale
                per row; see ``lab.quantized``. A checkpoint that is quantised already needs no word.

        Raises:
            UnknownNameError: Neither a built-in name, nor a folder, nor shaped like a hub id.
            ConfigError: The model cannot be loaded; says why.
            UnsupportedModelError: The family has no architecture row.
        """
        from lab.atlas.weights import MODEL_NAMES, weights_path

        if quantize is not None and quantize not in SCHEMES:
            raise UnknownNameError("quantisation", quantize, SCHEMES)
        name = os.fspath(name_or_path)
        folder = weights_path(name) if name in MODEL_NAMES else Path(name)
        if folder is None:
            raise ConfigError(
                f"the weights of {name!r} are not part of this installation; make them with `knowlab atlas train "
                f"{name}` and `knowlab atlas export {name} --out models/{name}`, then set KNOWLAB_ATLAS_DIR=models"
            )
        if not folder.is_dir():
            if name in MODEL_NAMES:
                raise ConfigError(f"the weights of {name!r} are missing from {folder}")
            if "/" not in name or name.startswith((".", "/")) or name.count("/") > 1:
                raise UnknownNameError("model (not a folder either)", name, MODEL_NAMES)
        source = str(folder) if folder.is_dir() else name
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=resolve_dtype(dtype), revision=revision, use_safetensors=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"cannot load the model {name!r}: {error}") from error
        model.to(device).requires_grad_(False)  # type: ignore[arg-type]
        handle = cls(model, tokenizer, name=name, folder=folder if folder.is_dir() else None)
        if quantize is not None:
            handle._quantize(quantize)
        return handle

    def _quantize(self, scheme: str) -> None:
        blocks = [self.module(Role.BLOCK, layer) for layer in range(self.n_layers)]
        if not quantize_blocks(self.model, blocks, scheme):
            raise ConfigError(
                f"{self.name!r} has no plain projection to quantise; it is quantised already, load it without quantize="
            )

    @classmethod
    def wrap(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str = ""
    ) -> ModelHandle:
        """A handle on a model at hand; the model is used, not copied.

        Raises:
            UnsupportedModelError: The family has no architecture row.
        """
        return cls(model, tokenizer, name=name)

    # -- looking inside -------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the embeddings live."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the embeddings."""
        return self.model.get_input_embeddings().weight.dtype  # type: ignore[return-value]

    @property
    def pad_id(self) -> int:
        """Token id used for padding; masked, so any id will do where the tokenizer names none."""
        for candidate in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if isinstance(candidate, int):
                return candidate
        return 0

    def module(self, role: Role, layer: int | None = None) -> nn.Module:
        """The module that plays ``role`` (in block ``layer``).

        Raises:
            ConfigError: There is no such layer.
            UnsupportedModelError: The model does not have the module its family promises.
        """
        if role is Role.UNEMBED:
            head = self.model.get_output_embeddings()
            if not isinstance(head, nn.Module):
                raise UnsupportedModelError(f"{self.name!r} has no output embedding")
            return head
        if layer is not None and not 0 <= layer < self.n_layers:
            raise ConfigError(
                f"layer {layer} does not exist; {self.name!r} has layers 0 to {self.n_layers - 1}"
            )
        path = self.arch.path(role, layer)
        try:
            return self.model.get_submodule(path)
        except AttributeError as error:
            raise UnsupportedModelError(
                f"{self.name!r} has no module {path!r}, which {self.arch.model_types} should have"
            ) from error

    def weight(self, role: Role, layer: int | None = None) -> Weight:
        """The weight matrix of the module that plays ``role``."""
        module = self.module(role, layer)
        path = "lm_head" if role is Role.UNEMBED else self.arch.path(role, layer)
        weight = _weight(f"{path}.weight", module, "weight")
        if weight is None:
            raise UnsupportedModelError(
                f"{path!r} of {self.name!r} holds no weight ({type(module).__name__})"
            )
        return weight

    def named_weight(self, name: str) -> Weight:
        """The parameter called ``name`` in the state dict.

        Raises:
            ConfigError: There is none.
        """
        path, _, leaf = name.rpartition(".")
        try:
            weight = _weight(name, self.model.get_submodule(path), leaf)
        except AttributeError:
            weight = None
        if weight is None:
            raise ConfigError(f"{self.name!r} has no parameter {name!r}")
        return weight

    @property
    def quantized(self) -> bool:
        """Whether any projection of the blocks is quantised."""
        return any(True for _ in self._quantized())

    def _quantized(self) -> Iterator[tuple[str, QuantizedWeight]]:
        """Names and weights of the quantised projections."""
        for path, module in self.model.named_modules():
            if not isinstance(module, PreTrainedModel) and (found := quantized_weight(module)) is not None:
                yield f"{path}.weight", found

    # -- identity -------------------------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """Names the pristine weights, config and tokenizer; constant whatever is applied."""
        with self.reading():
            digest = hashlib.sha256(b"knowlab-fingerprint-1")
            config = {
                key: value for key, value in self.config.to_dict().items() if key not in _TRANSIENT_CONFIG
            }
            digest.update(json.dumps(config, sort_keys=True, default=str).encode())
            digest.update(self.tokenizer_hash.encode())
            quantized = dict(self._quantized())
            for name, parameter in self.model.named_parameters():
                if name in quantized:
                    continue
                data = self.stack.pristine(name, parameter)
                digest.update(f"{name}{tuple(data.shape)}{data.dtype}".encode())
                digest.update(_tensor_bytes(data, sampled=data.numel() > _FULL_HASH_ELEMENTS))
            for name, weight in quantized.items():
                data = weight.read()
                digest.update(f"{name}{weight.shape}{weight.scheme}".encode())
                digest.update(_tensor_bytes(data, sampled=data.numel() > _FULL_HASH_ELEMENTS))
            return digest.hexdigest()

    @cached_property
    def tokenizer_hash(self) -> str:
        """Names the tokenizer's vocabulary and rules."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        text = (
            backend.to_str()
            if backend is not None
            else json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        )
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def state(self) -> str:
        """Names the base and everything applied to it, in order; equals ``fingerprint`` when nothing is."""
        return self.stack.state

    @property
    def applied(self) -> tuple[Applied, ...]:
        """The patches applied now, oldest first."""
        return self.stack.entries

    def undo_all(self) -> None:
        """Takes everything off at once; ``state`` is the fingerprint again, and the weights are as they came, bit for bit.

        Raises:
            PatchError: A patched weight was changed behind the handle's back; nothing is taken off then.
        """
        self.stack.clear()

    def weights_digest(self) -> str:
        """sha256 over every bit of every parameter and buffer as it stands: the proof that an undo is exact."""
        with self.reading():
            digest = hashlib.sha256()
            quantized = dict(self._quantized())
            for name, tensor in sorted(
                {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}.items()
            ):
                digest.update(name.encode())
                data = quantized[name].read() if name in quantized else tensor.detach()
                digest.update(_tensor_bytes(data, sampled=False))
            return digest.hexdigest()

    # -- locks ----------------------------------------------------------------------------------------------------

    def reading(self) -> AbstractContextManager[None]:
        """Held while generating or scoring, so that no answer ever sees half-edited weights."""
        return self._lock.reading()

    def writing(self) -> AbstractContextManager[None]:
        """Held while applying, undoing, or computing with weights changed for a moment."""
        return self._lock.writing()

    @contextmanager
    def eager_attention(self) -> Iterator[None]:
        """Switches to eager attention (the only stock one that returns its weights) and back."""
        before = str(self.config._attn_implementation)
        with self.writing():
            self.model.set_attn_implementation("eager")
        try:
            yield
        finally:
            with self.writing():
                self.model.set_attn_implementation(before)

    # -- running --------------------------------------------------------------------------------------------------

    def encode(self, texts: Sequence[str], *, side: Side = "right") -> Batch:
        """Tokenises and pads texts; a text without tokens becomes one start (or padding) token."""
        start = self.tokenizer.bos_token_id
        empty = [start if isinstance(start, int) else self.pad_id]
        rows = [encode_ids(self.tokenizer, text) or empty for text in texts]
        return pad_rows(rows, self.pad_id, side, self.device)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of token ids, without special tokens."""
        plain = [int(token) for token in ids]
        return str(self.tokenizer.decode(plain, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward for a batch; positions only where the family takes them."""
        arguments = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        return arguments | ({"position_ids": batch.position_ids} if self._takes_positions else {})

    def rewrite(self, prompts: Sequence[str]) -> list[str]:
        """Prompts as they are fed while patches that work in the prompt are applied; unchanged without such patches.

        ``generate``, ``lab.scoring.score_targets`` and ``lab.eval.ModelRespondent`` ask through it. What takes token ids,
        and what looks for a subject's tokens, does not.
        """
        return self.stack.rewrite(prompts)

    def logits(self, batch: Batch, *, grad: bool = False, **extra: Any) -> Tensor:
        """Runs the model; returns logits ``[batch, pos, vocabulary]``."""
        with (
            self.reading(),
            torch.set_grad_enabled(grad),
            self.stack.routing.prompts(batch.prompt_last),
        ):
            return self.model(**self.inputs(batch), use_cache=False, **extra).logits

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 20,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 0,
        batch_size: int = 32,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Continues prompts.

        Args:
            prompts: Texts to continue.
            max_new_tokens: Upper bound on the continuation's length.
            stop: A continuation ends before the first of these strings.
            temperature: 0 is greedy.
            top_k: Samples among the k likeliest tokens.
            seed: Seeds the sampling; the global generator is left as it was.
            batch_size: Rows per forward pass.
            progress: Called with what is done and its total after every pass.

        Returns:
            Continuations only, in the order of ``prompts``.
        """
        texts = [""] * len(prompts)
        with self.reading(), torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            prompts = self.rewrite(prompts)
            order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
            for begin in range(0, len(order), batch_size):
                chosen = order[begin : begin + batch_size]
                continuations = self._generate(
                    [prompts[index] for index in chosen], max_new_tokens, stop, temperature, top_k
                )
                for index, text in zip(chosen, continuations, strict=True):
                    texts[index] = text
                if progress:
                    progress(begin + len(chosen), len(order))
        return texts

    def _generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        stop: Sequence[str],
        temperature: float,
        top_k: int | None,
    ) -> list[str]:
        batch = self.encode(prompts, side="left")
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "pad_token_id": self.pad_id,
            "do_sample": temperature > 0,
        }
        if temperature > 0:
            options |= {"temperature": temperature, "top_k": top_k or 0, "top_p": 1.0}
        if stop:
            options |= {"stop_strings": list(stop), "tokenizer": self.tokenizer}
        out = self.model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)  # type: ignore[operator]
        continuations = [self.decode(row) for row in out[:, batch.input_ids.shape[1] :]]
        return [cut_at_stop(text, stop) for text in continuations]


def _weight(name: str, module: nn.Module, leaf: str) -> Weight | None:
    """A matrix of a module, or ``None`` where it holds none of that name."""
    if leaf == "weight" and (quantized := quantized_weight(module)) is not None:
        return Weight(name, quantized, isinstance(module, QuantizedLinear) and module.transposed)
    held = getattr(module, leaf, None)
    if not isinstance(held, nn.Parameter):
        return None
    return Weight(name, held, isinstance(module, Conv1D) and leaf == "weight")


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """``text`` before the first of the strings in ``stop``; all of it where none occurs."""
    found = [position for position in (text.find(mark) for mark in stop) if position >= 0]
    return text[: min(found)] if found else text


def _tensor_bytes(data: Tensor, *, sampled: bool) -> bytes:
    flat = (
        data.detach().reshape(-1)
        if not sampled
        else data.detach().reshape(-1)[:: data.numel() // _SAMPLED_ELEMENTS]
    )
    return flat.contiguous().cpu().view(torch.uint8).numpy().tobytes()
