"""Finished runs as rows of results.csv."""
from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from timm.models import split_model_name_tag

from .curves import read_summary
from .deck import DECK
from .errors import one_line
from .files import write_csv
from .options import ARGS_FILE, HOST_ARGS, SPEED_ARGS, build_parser
from .public_args import is_place, public_model_kwargs
from .recipe import list_recipes, load_recipe, recipe_name

__all__ = ['COLUMNS', 'RunResult', 'read_run', 'read_results', 'write_results', 'merge_results', 'table_order']

# Arguments that say where, when and how fast a run was made, not what was trained.
_NOT_OVERRIDES = HOST_ARGS | SPEED_ARGS | {
    'recipe', 'model', 'seed', 'output', 'experiment', 'dataset', 'data_dir', 'input_key', 'sync_bn', 'dist_bn',
    'num_classes', 'batch_size', 'grad_accum_steps'}


@dataclasses.dataclass(frozen=True)
class RunResult:
    """One finished run: a row of results.csv.

    Accuracies are in percent on the test split: top1 and top5 of the last epoch's weights or, where images were held
    out, of those chosen on them; best_top1 of the best epoch. Times are in seconds.
    """
    run: str
    model: str
    tag: str
    recipe: str
    overrides: str
    dataset: str
    params: int
    macs: int
    seed: int
    epochs: int
    epochs_trained: int
    hold_out: int
    ema: bool
    top1: float
    top5: float
    best_top1: float
    best_epoch: int
    images_per_second: float
    wall_time: float
    hardware: str
    versions: str
    commit: str

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> RunResult:
        """Makes a result of JSON values or CSV text; fields that are not there come out empty (NaN, '', 0, False).

        Raises:
            ValueError: If the model, seed, epochs or top-1 is missing, or a value is not what it should be.
        """
        missing = [name for name in ('model', 'seed', 'epochs', 'top1') if values.get(name) in (None, '')]
        if missing:
            raise ValueError(f'{", ".join(missing)} not given')
        result = cls(**{field.name: _parse(field, values.get(field.name)) for field in dataclasses.fields(cls)})
        for name in ('top1', 'top5', 'best_top1'):
            if not (math.isnan(getattr(result, name)) or 0 <= getattr(result, name) <= 100):
                raise ValueError(f'{name} must be a percentage, got {getattr(result, name)}')
        if math.isnan(result.top1):
            raise ValueError('top1 is not a number')
        return result

    def to_row(self) -> list[str]:
        """The values as CSV text, in order of the fields."""
        return [csv_value(getattr(self, field.name)) for field in dataclasses.fields(self)]


COLUMNS = tuple(field.name for field in dataclasses.fields(RunResult))


def _parse(field: dataclasses.Field, value: Any) -> Any:
    try:
        if field.type == 'str':  # a text, as annotations are not evaluated in this file
            if isinstance(value, Mapping):
                return ', '.join(f'{key} {item}' for key, item in value.items())
            return '' if value is None else str(value)
        if field.type == 'bool':
            return {'true': True, 'false': False, '': False, 'none': False}[str(value).lower()]
        if field.type == 'int':
            return 0 if value in (None, '') else int(value)
        return math.nan if value in (None, '') else float(value)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f'{field.name} must be of type {field.type}, got {value!r}') from None


def csv_value(value: Any) -> str:
    """A value as text: numbers with two decimals, nothing for NaN."""
    if isinstance(value, float):
        return '' if math.isnan(value) else f'{value:.2f}'
    return str(value)


def read_run(run_dir: str | Path) -> RunResult:
    """Reads the `result.json` of a finished run.

    Raises:
        ValueError: Saying what is wrong with the folder.
    """
    run_dir = Path(run_dir)
    path = run_dir / 'result.json'
    if not run_dir.is_dir():
        raise ValueError('no such folder')
    if not path.is_file():
        raise ValueError(_why_unfinished(run_dir))
    try:
        values = json.loads(path.read_text(encoding='utf-8'))
        args = yaml.safe_load((run_dir / ARGS_FILE).read_text(encoding='utf-8'))
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise ValueError(f'result.json or {ARGS_FILE} cannot be read: {one_line(e)}') from None
    if not isinstance(values, dict) or not isinstance(args, dict):
        raise ValueError(f'result.json or {ARGS_FILE} is not a mapping')
    try:
        return RunResult.from_mapping(_flatten(run_dir.resolve().name, values, args))
    except (AttributeError, TypeError, ValueError) as e:
        raise ValueError(f'result.json or {ARGS_FILE}: {e}') from None


def _flatten(run: str, values: Mapping[str, Any], args: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of results.csv from a run's result.json and args.yaml."""
    recipe, dataset = values.get('recipe') or '', str(values.get('dataset') or '').rstrip('/').rpartition('/')[2]
    world_size = values.get('world_size') or 1
    return {
        **values,
        'run': run,
        'tag': f'{"deck" if recipe in DECK else recipe_name(recipe)}_c100' if recipe and dataset == 'cifar100' else '',
        'recipe': recipe_name(recipe),
        'overrides': _overrides(recipe, args, world_size),
        'dataset': dataset,
        'epochs': args.get('epochs'),
        'epochs_trained': values.get('epochs'),
        'top1': values.get('test_top1'),
        'top5': values.get('test_top5'),
        # With images held out, the best epoch was found on those and not on the test split.
        'best_top1': None if values.get('hold_out') else values.get('best_top1'),
        'wall_time': values.get('train_seconds'),
        'hardware': f'{world_size} x {values.get("hardware")}',
    }


def _overrides(recipe: str, args: Mapping[str, Any], world_size: int) -> str:
    """What a run was given beyond its recipe, or without one beyond the defaults, as `name=value` words."""
    expected = vars(build_parser().parse_args([]))
    # What stands in a recipe's own file is not told by the file's name: its runs show all they were given.
    if recipe in list_recipes():
        expected |= load_recipe(recipe, build_parser())
    args = {**args, 'model_kwargs': public_model_kwargs(args.get('model_kwargs') or {})}
    # Those of pretrained weights are noted in the arguments.
    noted = {'mean', 'std'} if args.get('pretrained') or args.get('pretrained_path') else set()
    # A path is not told: that weights were given is. Spaces stand between words only.
    words = [
        name if is_place(name, args[name]) else f'{name}={args[name]}'.replace(' ', '') for name in sorted(args)
        if name in expected and name not in _NOT_OVERRIDES | noted and not _is_same(name, args[name], expected[name])]
    from_name = args.get('pretrained') and not is_place('model', args['model'])
    if from_name and _tag(args['model']) != _tag(expected['model']):
        words.append(f'model={args["model"]}')
    batch = args.get('batch_size', 0) * args.get('grad_accum_steps', 1) * world_size
    if batch != expected['batch_size'] * expected['grad_accum_steps']:
        words.append(f'batch={batch}')
    return ' '.join(words)


def _is_same(name: str, value: Any, expected: Any) -> bool:
    """Whether an argument is what its recipe says: of a run that it starts from, wherever that lies."""
    if value and expected and is_place(name, value) and is_place(name, expected):
        return Path(value).name == Path(expected).name
    return value == expected


def _tag(model: str) -> str:
    """The weights that a model's name stands for."""
    return split_model_name_tag(model)[1]


def _why_unfinished(run_dir: Path) -> str:
    try:
        epoch = read_summary(run_dir / 'summary.csv')['epoch'][-1]
    except (OSError, ValueError):
        if (run_dir / ARGS_FILE).is_file():
            return 'the run has not finished its first epoch'
        return 'not a run folder (neither result.json nor summary.csv)'
    return f'the run has not finished (no result.json; last epoch {epoch:.0f})'


def read_results(path: str | Path) -> list[RunResult]:
    """Reads results.csv.

    Raises:
        ValueError: If it cannot be read, a column is missing or a value is not what it should be.
    """
    try:
        with open(path, newline='', encoding='utf-8-sig') as f:  # Excel writes a mark at its beginning
            reader = csv.DictReader(f)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
            if missing:
                raise ValueError(f'{path}: no column {", ".join(missing)}')
            rows = list(reader)
    except OSError as e:
        raise ValueError(f'{path}: {e.strerror}') from None
    except csv.Error as e:
        raise ValueError(f'{path}: {e}') from None
    results = []
    for line, row in enumerate(rows, start=2):
        try:
            results.append(RunResult.from_mapping(row))
        except ValueError as e:
            raise ValueError(f'{path}, line {line}: {e}') from None
    return results


def write_results(path: str | Path, results: Iterable[RunResult]) -> None:
    """Writes results.csv, one row a run, in the order of the table."""
    ordered = sorted(results, key=lambda result: (*table_order(result.recipe), result.model, result.seed, result.run))
    write_csv(path, COLUMNS, (result.to_row() for result in ordered))


def merge_results(old: Iterable[RunResult], new: Iterable[RunResult]) -> list[RunResult]:
    """Old results and new ones; a new one takes the place of an old one of the same run.

    Raises:
        ValueError: If two runs of one name are not of the same model, recipe and seed, or both are new.
    """
    merged = {result.run: result for result in old}
    taken = set()
    for result in new:
        before = merged.get(result.run, result)
        if result.run in taken or (result.model, result.recipe, result.seed) != (
                before.model, before.recipe, before.seed):
            raise ValueError(
                f'two runs are named {result.run}, of {before.model} ({before.recipe}, seed {before.seed}) and of '
                f'{result.model} ({result.recipe}, seed {result.seed}): rename the folder of one')
        taken.add(result.run)
        merged[result.run] = result
    return list(merged.values())


def table_order(recipe: str) -> tuple[int, str]:
    """Key that sorts recipes: the deck's in its order, then the others by name."""
    names = list(DECK)
    return (names.index(recipe) if recipe in names else len(names)), recipe
