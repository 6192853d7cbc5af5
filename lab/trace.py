"""Reading, writing and cutting a forward pass through hooks that live in a ``with`` and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lab.arch import Role
from lab.errors import ConfigError
from lab.handle import ModelHandle
from lab.tokens import Batch

Write = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Site:
    """A place in the forward pass.

    Attributes:
        role: Which module.
        layer: Which block; ``None`` for modules that exist once.
        side: ``"out"``: what the module returns (the first element where it returns several); ``"in"``: the hidden
            states it receives (the key, for ``Role.MLP_OUT``).
    """

    role: Role
    layer: int | None = None
    side: Literal["out", "in"] = "out"


class _Stop(BaseException):
    """Leaves a forward pass at the stop site; never seen outside this module."""


class Recording:
    """What was read during the last ``run``; index it by site.

    Attributes:
        handle: The model that is traced.
    """

    def __init__(self, handle: ModelHandle, detach: bool) -> None:
        self.handle = handle
        self.detach = detach
        self.shape: tuple[int, int] | None = None
        self._values: dict[Site, Tensor] = {}

    def __getitem__(self, site: Site) -> Tensor:
        """Tensor ``[batch, pos, d]`` read at ``site``.

        Raises:
            ConfigError: The site was not asked for, or no forward pass has reached it.
        """
        if site not in self._values:
            raise ConfigError(
                f"nothing was read at {site}; ask for it in `reads` and run a forward pass that reaches it"
            )
        return self._values[site]

    def __contains__(self, site: object) -> bool:
        return site in self._values

    def keep(self, site: Site, value: Tensor) -> None:
        """Stores what was read; used by the hooks."""
        self._values[site] = value.detach() if self.detach else value

    def run(self, batch: Batch, **extra: Any) -> Tensor | None:
        """Runs the model on a batch.

        Args:
            batch: Padded rows.
            **extra: Further keyword arguments of the model's forward (``past_key_values``).

        Returns:
            Logits ``[batch, pos, vocabulary]``, or ``None`` where the pass was cut at the stop site.
        """
        arguments = {"use_cache": False, **self.handle.inputs(batch), **extra}
        with (
            torch.set_grad_enabled(not self.detach),
            self.handle.stack.routing.prompts(batch.prompt_last),
        ):
            return self.call(
                lambda: self.handle.model(**arguments).logits,
                (batch.input_ids.shape[0], batch.input_ids.shape[1]),
            )

    def call(self, forward: Callable[[], Tensor], shape: tuple[int, int]) -> Tensor | None:
        """Runs any forward pass under the hooks.

        Args:
            forward: Does the pass and returns its logits.
            shape: ``(batch, pos)`` of the tokens it feeds; restores ``[batch*pos, d]`` activations.

        Returns:
            What ``forward`` returns, or ``None`` where it was cut.
        """
        self.shape = shape
        self._values.clear()
        with self.handle.reading():
            try:
                return forward()
            except _Stop:
                return None


@contextmanager
def trace(
    handle: ModelHandle,
    reads: Sequence[Site] = (),
    writes: Mapping[Site, Write] | None = None,
    stop: Site | None = None,
    *,
    detach: bool = True,
) -> Iterator[Recording]:
    """Hooks a model for the length of a ``with``.

    Args:
        handle: The model.
        reads: Sites to record. A site that is also written is recorded after the write.
        writes: Site to a function of the activation ``[batch, pos, d]`` that returns the new one, out of place.
        stop: The forward pass ends here; nothing after it is computed.
        detach: Record without gradients, and run ``Recording.run`` without them.

    Yields:
        A ``Recording``; ``recording.run(batch)`` does the pass.

    Raises:
        ConfigError: A layer does not exist.
    """
    changes = dict(writes or {})
    wanted_sites: list[Site] = [*changes, *reads, *([stop] if stop else [])]
    sites = list(dict.fromkeys(wanted_sites))
    # All modules are resolved before the first hook is registered, so that a wrong name leaves nothing behind.
    modules = {site: handle.module(site.role, site.layer) for site in sites}
    wanted = set(reads)
    recording = Recording(handle, detach)
    with ExitStack() as cleanup:
        for site in sites:
            register = _hook_output if site.side == "out" else _hook_input
            cleanup.callback(
                register(
                    recording, modules[site], site, changes.get(site), site in wanted, site == stop
                ).remove
            )
        yield recording


def _visit(
    recording: Recording, site: Site, value: Tensor, write: Write | None, wanted: bool
) -> Tensor | None:
    """Applies a write and records; returns the new activation in the module's own shape, ``None`` if unchanged."""
    shaped = value
    if value.dim() == 2 and recording.shape is not None:
        # OPT feeds its MLP [batch*pos, d].
        shaped = value.view(*recording.shape, value.shape[-1])
    changed = None
    if write is not None:
        shaped = write(shaped)
        changed = shaped.reshape(value.shape)
    if wanted:
        recording.keep(site, shaped)
    return changed


def _hook_output(
    recording: Recording, module: nn.Module, site: Site, write: Write | None, wanted: bool, last: bool
) -> torch.utils.hooks.RemovableHandle:
    def hook(_module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> Any:
        several = isinstance(output, (tuple, list))
        changed = _visit(recording, site, output[0] if several else output, write, wanted)
        if last:
            raise _Stop
        if changed is None:
            return None
        return type(output)((changed, *output[1:])) if several else changed

    return module.register_forward_hook(hook, with_kwargs=True)


def _hook_input(
    recording: Recording, module: nn.Module, site: Site, write: Write | None, wanted: bool, last: bool
) -> torch.utils.hooks.RemovableHandle:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Newer blocks pass their hidden states to the attention by keyword.
        positional = bool(args)
        changed = _visit(recording, site, args[0] if positional else kwargs["hidden_states"], write, wanted)
        if last:
            raise _Stop
        if changed is None:
            return None
        return ((changed, *args[1:]), kwargs) if positional else (args, {**kwargs, "hidden_states": changed})

    return module.register_forward_pre_hook(hook, with_kwargs=True)
