"""optwatch watches PyTorch training the way a production service is watched.

``attach(optimizer)`` is the one line; everything else is optional. Importing this package imports no torch.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from .attach import attach
from .settings import Settings, Target

if TYPE_CHECKING:
    from .monitor import Monitor

__version__ = version("optwatch")
__all__ = ["Monitor", "Settings", "Target", "__version__", "attach"]


def __getattr__(name: str) -> object:
    """``Monitor`` only when asked for: it brings torch."""
    if name == "Monitor":
        from .monitor import Monitor

        return Monitor
    raise AttributeError(f"module 'optwatch' has no attribute {name!r}")
