"""The final account of a classifier on a test set.

The picture needs matplotlib (`pip install -e '.[train]'`). Without it the figures are still computed and written as
CSV, and one warning says that no picture was drawn.
"""
from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .calibration import check_logits, expected_calibration_error
from .cifar import CIFAR100_CLASSES, CIFAR100_SUPERCLASS_OF, CIFAR100_SUPERCLASSES
from .engine import top_accuracies
from .figures import new_figure, plain_text, save_figure
from .files import write_csv, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ['write_final_report']

_GREY = '#555555'


def write_final_report(
        run_dir: str | os.PathLike[str],
        logits: torch.Tensor,
        targets: torch.Tensor,
        class_names: Sequence[str],
) -> dict[str, float]:
    """Writes the final account of a classifier on a test set.

    Files: `report.json` (the figures returned), `per_class.csv`, `per_superclass.csv` (of CIFAR-100's classes),
    `confusion_matrix.csv` (rows true, columns predicted, counts) and `confusion_matrix.png`.

    Args:
        run_dir: Folder to write to.
        logits: (N, C) unnormalised scores.
        targets: (N,) class indices.
        class_names: C names.

    Returns:
        top1, top5 and superclass_top1 in percent, ece (15 bins) as a fraction, samples.

    Raises:
        ValueError: If shapes or names do not fit.
    """
    check_logits(logits, targets)
    class_names = tuple(class_names)
    if len(class_names) != logits.shape[1]:
        raise ValueError(f'{len(class_names)} class names for {logits.shape[1]} logits')
    superclass = CIFAR100_SUPERCLASS_OF if class_names == CIFAR100_CLASSES else None

    run_dir = Path(run_dir)
    logits, targets = logits.detach().float().cpu(), targets.cpu()
    metrics = dict(
        top_accuracies(logits, targets), ece=expected_calibration_error(logits, targets), samples=len(targets))

    confusion = _confusion_matrix(logits.argmax(dim=1), targets, len(class_names))
    if superclass:
        names = CIFAR100_SUPERCLASSES
        group = torch.tensor([names.index(superclass[name]) for name in class_names])
        metrics['superclass_top1'] = 100. * (group[logits.argmax(dim=1)] == group[targets]).double().mean().item()
        _write_per_superclass(run_dir / 'per_superclass.csv', confusion, names, group)
    _write_per_class(run_dir / 'per_class.csv', confusion, class_names, superclass)
    write_csv(
        run_dir / 'confusion_matrix.csv',
        ('true \\ predicted', *class_names),
        ((name, *row) for name, row in zip(class_names, confusion.tolist())))
    write_json(run_dir / 'report.json', metrics)
    _draw_confusion_matrix(run_dir / 'confusion_matrix.png', confusion, class_names, superclass, metrics['top1'])
    return metrics


def _confusion_matrix(predicted: torch.Tensor, targets: torch.Tensor, num_classes: int) -> torch.Tensor:
    """(C, C) counts, rows true, columns predicted."""
    return torch.bincount(targets * num_classes + predicted, minlength=num_classes ** 2).view(num_classes, -1)


def _percent(part: float, whole: float) -> str:
    return f'{100. * part / whole:.2f}' if whole else ''


def _write_per_class(
        path: Path,
        confusion: torch.Tensor,
        class_names: Sequence[str],
        superclass: Mapping[str, str] | None,
) -> None:
    rows = []
    for index, name in enumerate(class_names):
        row = confusion[index].clone()
        count, correct = int(row.sum()), int(row[index])
        row[index] = 0
        wrong = class_names[int(row.argmax())] if row.any() else ''
        rows.append((
            name, superclass[name] if superclass else '', count, correct, _percent(correct, count),
            wrong, int(row.max())))
    header = ('class', 'superclass', 'samples', 'correct', 'accuracy', 'most_mistaken_for', 'mistaken')
    write_csv(path, header, rows)


def _write_per_superclass(path: Path, confusion: torch.Tensor, names: Sequence[str], group: torch.Tensor) -> None:
    """Two accuracies of a superclass's images: the class itself was found, and some class of the superclass was."""
    rows = []
    for index, name in enumerate(names):
        members = (group == index).nonzero().flatten()
        count = int(confusion[members].sum())
        class_correct = int(confusion.diagonal()[members].sum())
        superclass_correct = int(confusion[members][:, members].sum())
        rows.append((name, count, _percent(class_correct, count), _percent(superclass_correct, count)))
    write_csv(path, ('superclass', 'samples', 'class_accuracy', 'superclass_accuracy'), rows)


def _draw_confusion_matrix(
        path: Path,
        confusion: torch.Tensor,
        class_names: Sequence[str],
        superclass: Mapping[str, str] | None,
        top1: float,
) -> None:
    """Heat map of each true class's predictions in percent, classes of a superclass side by side."""
    num_classes = len(class_names)
    side = min(max(4., 0.15 * num_classes), 24.)
    # Room for class names of 8 points, about 0.07 inches a letter, and the axes' titles.
    left = bottom = 0.5 + 0.07 * max(map(len, class_names))
    right, top = 1.5, 2.4 if superclass else 0.7
    width, height = left + side + right, bottom + side + top
    figure = new_figure(width, height)
    if figure is None:
        return
    from matplotlib.colors import PowerNorm

    # Axes are placed by hand: the automatic layout does not make room for a second axis' slanted labels.
    figure.set_layout_engine('none')
    axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
    bar = figure.add_axes(
        ((left + side + 0.3) / width, (bottom + 0.2 * side) / height, 0.25 / width, 0.6 * side / height))

    order = list(range(num_classes))
    if superclass:
        order.sort(key=lambda index: (superclass[class_names[index]], class_names[index]))
    share = 100. * confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    share[share == 0] = math.nan
    # The square root lets the rare confusions be seen beside a diagonal that is ten times as strong; never is white.
    image = axes.imshow(share[order][:, order].numpy(), cmap='magma_r', norm=PowerNorm(0.5, vmin=0, vmax=100))
    if num_classes <= 160:
        names = [plain_text(class_names[index].replace('_', ' ')) for index in order]
        axes.set_xticks(range(num_classes), names, rotation=90, fontsize=8)
        axes.set_yticks(range(num_classes), names, fontsize=8)
    axes.tick_params(length=2, color=_GREY)
    axes.set_xlabel('predicted class', fontsize=11)
    axes.set_ylabel('true class', fontsize=11)
    if superclass:
        _mark_superclasses(axes, [superclass[class_names[index]] for index in order])
    figure.colorbar(image, cax=bar, ticks=[0, 1, 5, 10, 25, 50, 75, 100]).set_label(
        "share of the true class's images (%), square-root scale")
    figure.suptitle(
        f'Confusion matrix, {int(confusion.sum()):,} images, top-1 {top1:.2f} %', x=(left + side / 2) / width,
        y=1 - 0.2 / height, va='top', fontsize=13)
    save_figure(figure, path, dpi=90)


def _mark_superclasses(axes: Axes, groups: Sequence[str]) -> None:
    """Frames each superclass on the diagonal and names it along the upper edge."""
    from matplotlib.patches import Rectangle

    starts = [index for index, name in enumerate(groups) if index == 0 or groups[index - 1] != name]
    centres = []
    for start, end in zip(starts, [*starts[1:], len(groups)]):
        axes.add_patch(Rectangle(
            (start - 0.5, start - 0.5), end - start, end - start, fill=False, edgecolor='#0072B2', linewidth=1.2))
        centres.append((start + end - 1) / 2)
    for start in starts[1:]:
        axes.axhline(start - 0.5, color='#cccccc', linewidth=0.4)
        axes.axvline(start - 0.5, color='#cccccc', linewidth=0.4)
    names = [groups[start].replace('_', ' ') for start in starts]
    upper = axes.secondary_xaxis('top')
    upper.set_xticks(centres, names, rotation=45, ha='left', fontsize=9)
    upper.tick_params(length=3, color=_GREY)
