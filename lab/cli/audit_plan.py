"""What an audit on the command line is of, as a value that a fresh process can make the subject from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lab.audit.base import AuditSubject
    from lab.audit.material import Material


@dataclass(frozen=True)
class AuditPlan:
    """An audit before anything is loaded; calling it loads.

    Attributes:
        model: The model, by name or folder.
        material: Facts and controls.
        patches: Folders, applied in order.
        oracle: A model that never saw the facts, or ``None``.
        base: The model before the change; the model without its patches where there are any and this is ``None``.
        budget: ``small`` or ``full``.
        seed, device, dtype: As on the command line.
    """

    model: str
    material: Material
    patches: tuple[Path, ...] = ()
    oracle: str | None = None
    base: str | None = None
    budget: str = "small"
    seed: int = 0
    device: str = "cpu"
    dtype: str = field(default="float32")

    @property
    def before(self) -> str | None:
        """Name of the model before the change, if there is one."""
        return self.base or (self.model if self.patches else None)

    def __call__(self) -> AuditSubject:
        """Loads the models and applies the patches."""
        from lab.audit.base import AuditSubject, Controls
        from lab.cli.session import open_model
        from lab.handle import ModelHandle

        def load(name: str) -> ModelHandle:
            return ModelHandle.load(name, device=self.device, dtype=self.dtype)

        material = self.material
        return AuditSubject(
            open_model(self.model, self.patches, device=self.device, dtype=self.dtype),
            material.facts,
            Controls(load(self.oracle) if self.oracle is not None else None, material.never),
            seed=self.seed,
            budget="small" if self.budget == "small" else "full",
            retained=material.retained,
            base=None if self.before is None else load(self.before),
            format=material.format,
        )
