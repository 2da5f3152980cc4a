"""What a run leaves to look at: its curves, and the final account of a classifier on a test set.

The pictures need matplotlib (`pip install -e '.[train]'`). Without it the figures are still computed and
written as CSV, and one warning says that no picture was drawn.
"""
from __future__ import annotations

import csv
import functools
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.utils import accuracy

from .classes import CIFAR100_CLASSES, CIFAR100_SUPERCLASS_OF

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    'update_curves', 'write_final_report', 'expected_calibration_error', 'fit_temperature', 'read_summary',
    'replace_file', 'write_csv', 'new_figure', 'save_figure',
]

_logger = logging.getLogger(__name__)

_TRAIN_COLOR, _EVAL_COLOR = '#0072B2', '#D55E00'
_GREY = '#555555'

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


@contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path` that replaces it when the block ends well and is deleted when it does not.

    The temporary name keeps the suffix of `path`, by which libraries choose a file format.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f'.{path.stem}.', suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes a file that only its owner can read, whatever the umask says.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path: str | os.PathLike[str], header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a CSV file in one step: a reader sees the old file or the whole new one."""
    with replace_file(path) as temporary, open(temporary, 'w', newline='', encoding='utf-8') as f:
        writer = csv.writer(f, lineterminator='\n')
        writer.writerow(header)
        writer.writerows(rows)


@functools.lru_cache(maxsize=None)
def _has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        _logger.warning("matplotlib is not installed: no pictures are drawn (pip install -e '.[train]').")
        return False
    return True


def new_figure(width: float, height: float) -> Figure | None:
    """A figure of `width` x `height` inches on the Agg canvas, or None (one warning) where matplotlib is missing.

    pyplot and its global backend are left alone, so a notebook or a GUI around the trainer is not disturbed.
    """
    if not _has_matplotlib():
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: int = 120) -> None:
    """Writes a figure in one step, without a time stamp or version: the same data gives the same file."""
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=dpi, metadata={'Software': None})


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
    figure.suptitle(run_dir.resolve().name)
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


def expected_calibration_error(logits: torch.Tensor, targets: torch.Tensor, bins: int = 15) -> float:
    """Expected calibration error of the most likely class, as a fraction.

    ECE = sum_b n_b / n * |accuracy_b - confidence_b| over bins of equal width, each open below and closed above
    (C. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, https://arxiv.org/abs/1706.04599).

    Args:
        logits: (N, C) unnormalised scores.
        targets: (N,) class indices.
        bins: Number of bins on (0, 1].

    Raises:
        ValueError: If the shapes do not fit, there is no sample, or `bins` is below 1.
    """
    _check_logits(logits, targets)
    if bins < 1:
        raise ValueError(f'bins must be at least 1, got {bins}')
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    gap = (predicted == targets).double() - confidence
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    return gap.new_zeros(bins).index_add_(0, index, gap).abs().sum().item() / len(targets)


def fit_temperature(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Temperature T in [0.01, 100] that minimises the cross entropy of `logits / T`.

    The loss is convex in 1 / T, so bisecting its derivative's sign finds the minimum (C. Guo et al., "On Calibration
    of Modern Neural Networks", ICML 2017, section 4.2).

    Args:
        logits: (N, C) unnormalised scores of held-out samples.
        targets: (N,) class indices.

    Raises:
        ValueError: If the shapes do not fit or there is no sample.
    """
    _check_logits(logits, targets)
    logits = logits.double()
    mean_target_logit = logits.gather(1, targets[:, None]).mean()
    low, high = math.log(0.01), math.log(100.)
    for _ in range(50):
        middle = (low + high) / 2
        mean_logit = ((logits / math.exp(middle)).softmax(dim=1) * logits).sum(dim=1).mean()
        # The derivative by 1 / T: below zero the network is not confident enough, so T must fall.
        if mean_logit <= mean_target_logit:
            high = middle
        else:
            low = middle
    return math.exp((low + high) / 2)


def _check_logits(logits: torch.Tensor, targets: torch.Tensor) -> None:
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or not len(targets):
        raise ValueError(
            f'logits must be (N, C) and targets (N,) with N > 0, got {tuple(logits.shape)} and {tuple(targets.shape)}')
    if targets.min() < 0 or targets.max() >= logits.shape[1]:
        raise ValueError(
            f'targets must lie in 0..{logits.shape[1] - 1}, got {targets.min().item()}..{targets.max().item()}')
    if not logits.isfinite().all():
        raise ValueError('logits hold values that are not finite')


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
    _check_logits(logits, targets)
    class_names = tuple(class_names)
    if len(class_names) != logits.shape[1]:
        raise ValueError(f'{len(class_names)} class names for {logits.shape[1]} logits')
    superclass = CIFAR100_SUPERCLASS_OF if class_names == CIFAR100_CLASSES else None

    run_dir = Path(run_dir)
    logits, targets = logits.detach().float().cpu(), targets.cpu()
    top1, top5 = accuracy(logits, targets, topk=(1, 5))
    figures = dict(
        top1=round(top1.item(), 4),
        top5=round(top5.item(), 4),
        ece=expected_calibration_error(logits, targets),
        samples=len(targets),
    )

    confusion = _confusion_matrix(logits.argmax(dim=1), targets, len(class_names))
    if superclass:
        names = sorted(set(superclass[name] for name in class_names))
        group = torch.tensor([names.index(superclass[name]) for name in class_names])
        figures['superclass_top1'] = 100. * (group[logits.argmax(dim=1)] == group[targets]).double().mean().item()
        _write_per_superclass(run_dir / 'per_superclass.csv', confusion, names, group)
    _write_per_class(run_dir / 'per_class.csv', confusion, class_names, superclass)
    write_csv(
        run_dir / 'confusion_matrix.csv',
        ('true \\ predicted', *class_names),
        ((name, *row) for name, row in zip(class_names, confusion.tolist())))
    _draw_confusion_matrix(run_dir / 'confusion_matrix.png', confusion, class_names, superclass, figures['top1'])
    with replace_file(run_dir / 'report.json') as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + '\n', encoding='utf-8')
    return figures


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
        names = [class_names[index].replace('_', ' ') for index in order]
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
