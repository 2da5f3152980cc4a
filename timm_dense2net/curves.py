"""A run's curves, drawn from the `summary.csv` that timm writes."""
from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .figures import new_figure, plain_text, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ['read_summary', 'update_curves']

_TRAIN_COLOR, _EVAL_COLOR = '#0072B2', '#D55E00'

# Panel title, unit, which value is best, and the summary.csv columns it draws: column, label, colour.
_PANELS = (
    ('Accuracy', 'top-1 (%)', max, (
        ('train_top1', 'training', _TRAIN_COLOR),
        ('eval_top1', 'validation', _EVAL_COLOR),
    )),
    ('Loss', 'loss', min, (
        ('train_loss', 'training', _TRAIN_COLOR),
        ('eval_loss', 'validation', _EVAL_COLOR),
    )),
)


def read_summary(path: str | os.PathLike[str]) -> dict[str, list[float]]:
    """Reads a summary CSV written by `timm.utils.update_summary`.

    A line cut short by a crash is left out, and of an epoch written twice by a resumed run the later line counts.

    Returns:
        Column name to one value an epoch, in order of epochs; NaN where a value is missing or not a number.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file has no `epoch` column or no whole line.
    """
    with open(path, newline='', encoding='utf-8') as f:
        reader = csv.DictReader(f)
        columns = reader.fieldnames or []
        if 'epoch' not in columns:
            raise ValueError(f"{path}: no 'epoch' column; a summary of timm.utils.update_summary is expected")
        rows = {}
        for row in reader:
            epoch = _as_float(row['epoch'])
            if math.isfinite(epoch) and row[columns[-1]] is not None:
                rows[epoch] = row
    if not rows:
        raise ValueError(f'{path}: no epoch is recorded yet')
    return {column: [_as_float(rows[epoch][column]) for epoch in sorted(rows)] for column in columns}


def _as_float(text: str | None) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def update_curves(run_dir: str | os.PathLike[str]) -> Path | None:
    """Draws a run's accuracy and loss so far, training and validation, from `summary.csv` into `curves.png`.

    Args:
        run_dir: Run folder that holds `summary.csv`, with losses and top-1 accuracies in percent.

    Returns:
        Path of the picture, or None where matplotlib is missing.

    Raises:
        FileNotFoundError: If the folder has no summary.csv.
        ValueError: If summary.csv has no epoch in it.
    """
    run_dir = Path(run_dir)
    summary = read_summary(run_dir / 'summary.csv')
    figure = new_figure(12, 4.6)
    if figure is None:
        return None
    for axes, (title, unit, best, lines) in zip(figure.subplots(1, 2), _PANELS):
        _draw_curves(axes, summary, lines, best)
        axes.set(title=title, xlabel='epochs trained', ylabel=unit)
    figure.suptitle(plain_text(run_dir.resolve().name))
    save_figure(figure, run_dir / 'curves.png')
    return run_dir / 'curves.png'


def _cut_off(axes: Axes, summary: Mapping[str, list[float]]) -> None:
    """Cuts validation losses off that are far above the training loss, as those of nets that know one size only."""
    highest = 2 * max((y for y in summary.get('train_loss', []) if math.isfinite(y)), default=math.inf)
    if axes.get_ylim()[1] > highest > 0:
        axes.set_ylim(bottom=0, top=highest)


def _draw_curves(axes: Axes, summary: Mapping[str, list[float]], lines: Sequence[tuple], best) -> None:
    """Draws one panel; a circle marks each validation curve's best epoch, a number at the right its last value."""
    ends = []
    for column, label, color in lines:
        points = [(epoch + 1, y) for epoch, y in zip(summary['epoch'], summary.get(column, [])) if math.isfinite(y)]
        if not points:
            continue
        epochs, values = zip(*points)
        if column.startswith('eval'):
            best_epoch, best_value = best(points, key=lambda point: point[1])
            label = f'{label} (best {best_value:.2f} after {best_epoch:.0f})'
            axes.plot([best_epoch], [best_value], 'o', color=color, markerfacecolor='white', markersize=6, zorder=3)
        axes.plot(epochs, values, color=color, label=label, linewidth=1.6, marker='.' if len(points) == 1 else None)
        ends.append((values[-1], epochs[-1], color))
    if best is min:
        _cut_off(axes, summary)
    axes.grid(color='#dddddd', linewidth=0.6)
    axes.spines[['top', 'right']].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if ends:
        axes.legend(frameon=False, fontsize=9)
        _annotate_ends(axes, ends)


def _annotate_ends(axes: Axes, ends: Sequence[tuple[float, float, str]]) -> None:
    """Writes each curve's last value right of its end, moved apart where two values are too close to read."""
    low, high = axes.get_ylim()
    spacing, previous = 0.055 * (high - low), -math.inf
    right = max(epoch for _, epoch, _ in ends)
    for value, epoch, color in sorted(ends):
        previous = max(min(value, high), previous + spacing)
        axes.annotate(
            f'{value:.2f}', xy=(right, previous), xytext=(5, 0), textcoords='offset points', color=color,
            fontsize=9, fontweight='bold', va='center', annotation_clip=False)
