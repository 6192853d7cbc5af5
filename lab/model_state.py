"""Everything about a model that training may disturb besides the weights it trains: kept, and put back."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from lab.handle import ModelHandle

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ModelState:
    """Modules, hooks, flags, storages, gradients, buffers, configs and tokenizer settings of a handle's model.

    Parameters are held by reference, not copied: a trainer that moves the model elsewhere gets the old storage exchanged
    back, a trainer that writes into a storage is the caller's to undo.
    """

    def __init__(self, handle: ModelHandle) -> None:
        model = handle.model
        self._attributes = [(module, _shallow(vars(module))) for module in model.modules()]
        self._parameters = [
            (parameter, parameter.data, parameter.requires_grad, parameter.grad)
            for parameter in model.parameters()
        ]
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        settings: list[Any] = [
            model.config,
            *([model.generation_config] if model.generation_config is not None else []),
        ]
        self._settings = [(each, copy.deepcopy(vars(each))) for each in settings]
        self._tokenizer = (handle.tokenizer, _shallow(vars(handle.tokenizer)))
        backend: Any = handle.tokenizer.backend_tokenizer if handle.tokenizer.is_fast else None
        self._backend = None if backend is None else (backend, backend.truncation, backend.padding)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restores everything when the ``with`` ends, however it ends."""
        try:
            yield
        finally:
            self.restore()

    def restore(self) -> None:
        """Puts everything back."""
        for module, before in self._attributes:
            _restore(vars(module), before)
        for parameter, data, requires_grad, grad in self._parameters:
            if parameter.data_ptr() != data.data_ptr() or parameter.device != data.device:
                parameter.data = data
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        with torch.no_grad():
            for buffer, before in self._buffers:
                if buffer.device != before.device:
                    buffer.data = before
                else:
                    buffer.copy_(before)
        for settings, before in self._settings:
            now = vars(settings)
            for name in [name for name in now if name not in before]:
                del now[name]
            for name, value in before.items():
                # An equal value keeps its identity: nested configs are shared with the modules.
                if name not in now or now[name] != value:
                    now[name] = value
        _restore(vars(self._tokenizer[0]), self._tokenizer[1])
        if self._backend is not None:
            backend, truncation, padding = self._backend
            if truncation is None:
                backend.no_truncation()
            else:
                backend.enable_truncation(**truncation)
            if padding is None:
                backend.no_padding()
            else:
                backend.enable_padding(**padding)


def _shallow(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Attribute name to the object and, for plain containers, a copy of what it holds."""
    return {
        name: (value, copy.copy(value) if isinstance(value, (dict, list, set)) else None)
        for name, value in attributes.items()
    }


def _restore(attributes: dict[str, Any], before: dict[str, tuple[Any, Any]]) -> None:
    for name in [name for name in attributes if name not in before]:
        del attributes[name]
    for name, (value, content) in before.items():
        # The same container with its old content: hook handles, for one, hold a reference to it.
        if isinstance(value, list):
            value[:] = content
        elif isinstance(value, (dict, set)):
            value.clear()
            value.update(content)
        attributes[name] = value


def checksum(tensor: Tensor) -> int:
    """Sum of a tensor's bits as integers; a changed bit changes it."""
    flat = tensor.detach().contiguous().view(-1)
    return int(flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64)) if flat.numel() else 0


@contextmanager
def random_state(seed: int) -> Iterator[None]:
    """Seeds every global generator for the length of a ``with`` and puts their states back."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
