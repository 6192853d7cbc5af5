"""How much memory a piece of work takes at its peak."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """Filled in when the work is done.

    Attributes:
        mb: Megabytes (10^6 bytes), or ``None`` where the system does not tell.
    """

    mb: float | None = None


@contextmanager
def peak_memory(device: torch.device | None = None) -> Iterator[Peak]:
    """Watches the peak inside a ``with``: of the CUDA allocator, or else of this whole process, the model included.

    Where the kernel cannot reset its mark (outside Linux, in some containers), the peak is that of the process so far.

    Args:
        device: Where the work happens; the CPU without it.
    """
    import torch

    peak = Peak()
    cuda = device is not None and device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        reset_peak()
    try:
        yield peak
    finally:
        peak.mb = torch.cuda.max_memory_allocated(device) / 1e6 if cuda else _process_peak()


def reset_peak() -> bool:
    """Lets the kernel's peak of this process start anew; whether it could."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def resident(field: str) -> int | None:
    """KiB of memory from the kernel's account of this process (``VmRSS``, ``VmHWM``), or ``None``."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)


def _process_peak() -> float | None:
    found = resident("VmHWM")
    if found is not None:
        return found * 1024 / 1e6
    try:
        import resource
    except ImportError:
        return None
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
