"""`python -m timm_dense2net report`: finished runs in one table, the deck's figure beside its recipes.

    report RUNS... --output report                 report.md, report.csv, report.png; the table on the screen
    report RUNS... --results results.csv           also adds the runs to results.csv, one row a run
    report --results results.csv --readme README.md [--check]

The last form writes the table of results.csv between two marks in the README, or checks that it is there already.
"""
from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from itertools import compress
from pathlib import Path
from typing import NamedTuple

from .deck import DECK, TABLE, DeckRow
from .figures import new_figure, plain_text, save_figure
from .files import write_csv, write_text
from .results import RunResult, csv_value, merge_results, read_results, read_run, table_order, write_results

__all__ = ['Row', 'summarise', 'markdown_table', 'update_readme', 'write_report', 'main']

BEGIN, END = '<!-- results:begin -->', '<!-- results:end -->'


class Row(NamedTuple):
    """Runs that differ only in their seed."""
    runs: tuple[RunResult, ...]

    @property
    def title(self) -> str:
        """The recipe and what was changed of it."""
        run = self.runs[0]
        return ' '.join((f'`{run.recipe}`' if run.recipe else '-', *(f'`{word}`' for word in run.overrides.split())))

    @property
    def deck(self) -> DeckRow | None:
        """The deck's row, where recipe (in any precision), model and data set are the same."""
        run = self.runs[0]
        row = DECK.get(run.recipe)
        changed = [word for word in run.overrides.split() if not word.startswith('amp')]
        return row if row and not changed and (row.model, 'cifar100') == (run.model, run.dataset) else None

    @property
    def difference(self) -> float | None:
        """Mean top-1 less the deck's figure, in points."""
        return statistics.fmean(self.values('top1')) - self.deck.top1 if self.deck else None

    @property
    def epochs(self) -> str:
        """Epochs trained, as a range where early stopping ended the runs at different ones."""
        epochs = [run.epochs_trained or run.epochs for run in self.runs]
        return f'{min(epochs)}' if min(epochs) == max(epochs) else f'{min(epochs)}-{max(epochs)}'

    @property
    def minutes(self) -> str:
        """Mean time of the runs, with validation after each epoch and without the final test."""
        mean = statistics.fmean(self.values('wall_time')) / 60
        return '' if math.isnan(mean) else f'{mean:.0f}'

    def values(self, name: str) -> tuple[float, ...]:
        """A figure of all runs."""
        return tuple(getattr(run, name) for run in self.runs)


def summarise(results: Iterable[RunResult]) -> list[Row]:
    """One row for all runs that differ only in their seed, in the deck's order, then the other recipes."""
    groups: dict[tuple, list[RunResult]] = {}
    for run in results:
        key = (
            *table_order(run.recipe), run.dataset, run.model, run.overrides, run.epochs, run.hold_out, run.ema,
            run.params, run.macs)
        groups.setdefault(key, []).append(run)
    return [Row(tuple(sorted(groups[key], key=lambda run: run.seed))) for key in sorted(groups)]


def _spread(values: Sequence[float]) -> float:
    """Sample standard deviation; NaN for a single run."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def _mean_spread(values: Sequence[float]) -> str:
    if math.isnan(statistics.fmean(values)):
        return ''
    mean = f'{statistics.fmean(values):.2f}'
    return mean if len(values) == 1 else f'{mean} ± {_spread(values):.2f}'


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; accuracies as mean ± standard deviation over runs.

    Empty columns are left out, and that of the data where all rows are of one set.
    """
    header = (
        'Recipe', 'Model', 'Data', 'Params (M)', 'MACs (M)', 'Epochs', 'Minutes', 'EMA', 'Runs', 'Top-1 (%)',
        'Top-5 (%)', 'Best top-1 (%)', 'Deck (%)', 'Top-1 - deck')
    several = len({row.runs[0].dataset for row in rows}) > 1
    lines = []
    for row in rows:
        run = row.runs[0]
        lines.append((
            row.title,
            f'`{run.model}`',
            f'`{run.dataset}`' if several else '',
            f'{run.params / 1e6:.2f}' if run.params else '',
            f'{run.macs / 1e6:.0f}' if run.macs else '',
            row.epochs,
            row.minutes,
            'yes' if run.ema else 'no',
            str(len(row.runs)),
            _mean_spread(row.values('top1')),
            _mean_spread(row.values('top5')),
            _mean_spread(row.values('best_top1')),
            f'{row.deck.top1:.2f}' if row.deck else '',
            f'{row.difference:+.2f}' if row.deck else '',
        ))
    filled = [any(column) for column in zip(*lines)]
    lines = [header, [*['---'] * 3, *['--:'] * (len(header) - 3)], *lines]
    return ''.join(f'| {" | ".join(compress(line, filled))} |\n' for line in lines)


def write_report_csv(path: str | Path, rows: Sequence[Row]) -> None:
    """Writes the table of rows as CSV, mean, standard deviation and number of runs in columns of their own."""
    same = ('recipe', 'overrides', 'dataset', 'model', 'params', 'macs', 'epochs', 'hold_out', 'ema')
    figures = ('top1', 'top5', 'best_top1')
    header = (
        *same, 'n', *(f'{name}_{moment}' for name in figures for moment in ('mean', 'std')), 'deck_row', 'deck_top1',
        'difference')
    lines = []
    for row in rows:
        shared = [getattr(row.runs[0], name) for name in same]
        moments = [moment(row.values(name)) for name in figures for moment in (statistics.fmean, _spread)]
        deck = (row.deck.name, row.deck.top1, row.difference) if row.deck else ('', '', '')
        lines.append([csv_value(value) for value in (*shared, len(row.runs), *moments, *deck)])
    write_csv(path, header, lines)


def draw_report(path: str | Path, rows: Sequence[Row]) -> bool:
    """Draws each row's runs, their mean and the deck's figure; False where matplotlib is missing."""
    figure = new_figure(10, 1.8 + 0.42 * len(rows))
    if figure is None:
        return False
    axes = figure.add_subplot()
    ours, deck = '#0072B2', '#D55E00'
    for y, row in enumerate(rows):
        values = row.values('top1')
        mean, spread = statistics.fmean(values), _spread(values)
        spread = 0. if math.isnan(spread) else spread
        axes.plot(values, [y] * len(values), 'o', color=ours, alpha=0.35, markersize=6)
        axes.errorbar(
            mean, y, xerr=spread or None, fmt='|', color=ours, markersize=16, markeredgewidth=2, capsize=3,
            label='this package, mean ± std over runs' if y == 0 else None)
        # Beside the mark, on the side away from the deck's.
        left = row.deck is not None and row.deck.top1 > mean
        edge = min(*values, mean - spread) if left else max(*values, mean + spread)
        axes.annotate(
            f'{mean:.2f}', (edge, y), (-8 if left else 8, 0), textcoords='offset points', color=ours, fontsize=9,
            ha='right' if left else 'left', va='center', bbox=dict(color='white', pad=0.5))
        if row.deck:
            axes.plot([row.deck.top1], [y], 'D', color=deck, markersize=6)
    if any(row.deck for row in rows):
        axes.plot([], [], 'D', color=deck, label="deck's figure")
    best = min(TABLE, key=lambda row: row.error)
    axes.axvline(100 - best.error, color='#777777', linestyle='--', linewidth=1, label=(
        f"best of the deck's other networks ({100 - best.error:.2f}, {best.params}M parameters)"))
    names = [plain_text(f'{row.title.replace("`", "")}\n{row.runs[0].model}') for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.1)
    axes.set_xlabel('top-1 (%)')
    axes.grid(axis='x', color='#dddddd', linewidth=0.6)
    axes.spines[['top', 'right']].set_visible(False)
    figure.legend(loc='outside upper center', ncols=3, frameon=False, fontsize=8)
    save_figure(figure, path)
    return True


def readme_block(results: Sequence[RunResult], results_path: str) -> str:
    """What stands between the two marks in the README."""
    hardware = sorted({result.hardware for result in results if result.hardware})
    return (
        f'{markdown_table(summarise(results))}\n'
        'Mean ± standard deviation over runs, on the test split. Rows with a best top-1: top-1 and top-5 of the last '
        'epoch, in a test of its own, and beside them the best of the tests after each epoch; in bfloat16 two tests of '
        'the same weights may differ by some hundredths. Rows without: of the epoch that was best on held-out training '
        'images. Minutes are of training with the validation after each epoch, without the final test.'
        + (f' Trained by (processes x device): {"; ".join(hardware)}.' if hardware else '')
        + f' Written from `{results_path}` by `python -m timm_dense2net report --results {results_path} '
        '--readme README.md`.\n')


def replace_block(text: str, block: str) -> str:
    """Puts `block` between the two marks of a README.

    Raises:
        ValueError: If the marks are not there once each, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f'one line {BEGIN} and, after it, one line {END} are needed')
    return f'{text[:text.index(BEGIN)]}{BEGIN}\n{block}{text[text.index(END):]}'


def _beside(path: Path, readme: Path) -> str:
    """A path as it is written in a page's folder."""
    return Path(os.path.relpath(path, readme.parent)).as_posix()


def update_readme(readme: Path, results_path: Path, check: bool) -> None:
    """Writes, or only checks, the README's table.

    Raises:
        ValueError: If the README cannot be read, has no marks, or (with `check`) does not hold the table.
    """
    try:
        text = readme.read_text(encoding='utf-8')
    except OSError as e:
        raise ValueError(f'{readme}: {e.strerror}') from None
    try:
        new = replace_block(text, readme_block(read_results(results_path), _beside(results_path, readme)))
    except ValueError as e:
        raise ValueError(f'{readme}: {e}') from None
    if new == text:
        return
    if check:
        differing = next(
            (line for line in new.splitlines() if line not in text.splitlines()), 'a line of the README is too many')
        raise ValueError(
            f'{readme} does not hold the table of {results_path}: run `python -m timm_dense2net report --results '
            f'{results_path} --readme {readme}`; first difference: {differing}')
    write_text(readme, new)


def write_report(output: Path, rows: Sequence[Row]) -> list[str]:
    """Writes the table as Markdown and CSV and draws it; returns the names of the files."""
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / 'report.md', markdown_table(rows))
    write_report_csv(output / 'report.csv', rows)
    drawn = draw_report(output / 'report.png', rows)
    return ['report.md', 'report.csv', *(['report.png'] if drawn else [])]


def _report_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m timm_dense2net report',
        description="Finished runs in one table, the deck's figure beside its recipes.")
    parser.add_argument('runs', nargs='*', metavar='RUN', help='run folder')
    parser.add_argument('--output', type=Path, metavar='DIR', help='folder for report.md, report.csv and report.png')
    parser.add_argument(
        '--results', type=Path, metavar='FILE', help='results.csv: the runs are added to it, the table is made of it')
    parser.add_argument('--readme', type=Path, metavar='FILE', help='README whose table is written from --results')
    parser.add_argument('--check', action='store_true', help='write nothing; exit 1 where README and results differ')
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0, 1 where a run could not be read or the README differs, 2 on a wrong call."""
    parser = _report_parser()
    args = parser.parse_args(argv)
    if not args.runs and not args.results:
        parser.error('give run folders, or --results')
    if args.readme and not args.results:
        parser.error('--readme needs --results')
    if args.output and args.output.exists() and not args.output.is_dir():
        parser.error(f'--output {args.output} is a file: name a folder')
    if args.check and (not args.readme or args.runs or args.output):
        parser.error('--check needs --readme and --results, and writes nothing: give no runs and no --output')

    runs = list(dict.fromkeys(map(os.path.realpath, args.runs)))  # one given twice, perhaps by a link, counts once
    results, bad = [], 0
    for run in runs:
        try:
            results.append(read_run(run))
        except ValueError as e:
            bad += 1
            print(f'error: {run}: {e}', file=sys.stderr)
    try:
        if args.results:
            if args.runs:
                results = merge_results(read_results(args.results) if args.results.exists() else [], results)
                write_results(args.results, results)
            else:
                results = read_results(args.results)
        rows = summarise(results)
        written = write_report(args.output, rows) if rows and args.output else []
        if args.readme:
            update_readme(args.readme, args.results, args.check)
    except (ValueError, OSError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 1
    if rows and not args.check:
        print(markdown_table(rows))
    if written:
        print(f'wrote {", ".join(str(args.output / name) for name in written)}')
    if bad:
        print(f'{bad} of {len(runs)} runs could not be read', file=sys.stderr)
    return 1 if bad else 0
