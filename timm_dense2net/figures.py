"""Figures by matplotlib (`pip install -e '.[train]'`), where it is there."""
from __future__ import annotations

import functools
import logging
import os
from typing import TYPE_CHECKING

from .files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['has_matplotlib', 'new_figure', 'plain_text', 'save_figure']

_logger = logging.getLogger(__name__)


@functools.lru_cache(maxsize=None)
def has_matplotlib() -> bool:
    """Whether figures can be drawn; one warning says that they cannot."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        _logger.warning("matplotlib is not installed: no pictures are drawn (pip install -e '.[train]').")
        return False
    return True


def new_figure(width: float, height: float) -> Figure | None:
    """A figure of `width` x `height` inches, or None (one warning) where matplotlib is missing.

    pyplot and its global backend are left alone, so a notebook or a GUI around the trainer is not disturbed.
    """
    if not has_matplotlib():
        return None
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout='constrained')


def plain_text(text: str) -> str:
    """What matplotlib shows as this text: none of it taken for mathematics, bytes that are not UTF-8 replaced."""
    return text.encode('utf-8', 'replace').decode().replace('$', r'\$')


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: int = 120) -> None:
    """Writes a figure in one step, without a time stamp or version: the same data gives the same file."""
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=dpi, metadata={'Software': None})
