"""Recipes: arguments of a run in YAML, packaged or in a file of the user's, checked against the parser."""
from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from timm.utils import ParseKwargs

from .errors import one_line
from .names import did_you_mean, option

__all__ = ['NOT_SAVED', 'list_recipes', 'load_recipe', 'recipe_name', 'read_yaml', 'check_values']

_RECIPES_DIR = Path(__file__).parent / 'recipes'

# Set for one invocation and no part of what a run is.
NOT_SAVED = ('resume', 'eval_only', 'checkpoint')
# Where a run lies.
_RUN_FOLDER = ('output', 'experiment')


def list_recipes() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(path.stem for path in _RECIPES_DIR.glob('*.yaml'))


def load_recipe(name: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Reads and checks a recipe: a YAML mapping of argument names, with underscores, to values.

    Args:
        name: A packaged recipe's name, or the path of a YAML file; a run's args.yaml is one.
        parser: The parser whose arguments the recipe sets.

    Raises:
        ValueError: If there is no such recipe, a key is not an argument or says where a run lies, or a value is of the
            wrong type.
    """
    file = _RECIPES_DIR / f'{name}.yaml' if name in list_recipes() else Path(name)
    if not file.is_file():
        raise ValueError(f"no recipe '{name}': give a YAML file or one of {', '.join(list_recipes())}")
    values = read_yaml(file, f'recipe {name}')
    if 'recipe' in values:
        # The saved arguments of a run: where it lay is no part of how it was made.
        values = {key: value for key, value in values.items() if key not in ('recipe', *_RUN_FOLDER)}
    for key in _RUN_FOLDER:
        if key in values:  # --resume auto looks for a run before it reads a recipe
            raise ValueError(f"recipe {name}: '{key}' is no part of how a run is made: give it as {option(key)}")
    return check_values(values, parser, f'recipe {name}')


def recipe_name(recipe: str | None) -> str | None:
    """A packaged recipe's name, or that of a recipe's file."""
    return recipe and Path(recipe).name


def read_yaml(file: Path, source: str) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Args:
        file: Its path.
        source: What messages call it.

    Raises:
        ValueError: If it is no text, no YAML or no mapping.
    """
    try:
        values = yaml.safe_load(file.read_text(encoding='utf-8'))
    except UnicodeDecodeError as e:
        raise ValueError(f'{file} is not a text file: {e}') from None
    except yaml.YAMLError as e:
        raise ValueError(f'{source}: not YAML: {one_line(e)}') from e
    if not isinstance(values, dict):
        raise ValueError(f'{source}: a mapping of argument names to values is expected')
    return values


def check_values(values: Mapping[str, Any], parser: argparse.ArgumentParser, source: str) -> dict[str, Any]:
    """Checks names and types of values for a parser's arguments; numbers that YAML reads as text become numbers.

    Raises:
        ValueError: Naming source, key and value.
    """
    actions = {action.dest: action for action in parser._actions if action.dest not in ('help', 'recipe', *NOT_SAVED)}
    checked = {}
    for key, value in values.items():
        if key not in actions:
            raise ValueError(f"{source}: unknown key '{key}'{did_you_mean(str(key), actions)}")
        checked[key] = _check_value(actions[key], value, f'{source}: {key}')
    return checked


def _check_value(action: argparse.Action, value: Any, where: str) -> Any:
    if value is None:
        if action.default is not None:
            raise ValueError(f'{where} has no value')
        return None
    if isinstance(action, argparse.BooleanOptionalAction):
        _expect(isinstance(value, bool), value, 'true or false', where)
        return value
    if isinstance(action, ParseKwargs):
        _expect(isinstance(value, dict), value, 'a mapping', where)
        return value
    if action.nargs == '+':
        _expect(isinstance(value, list) and value, value, 'a list', where)
        return [_check_scalar(action, item, where) for item in value]
    return _check_scalar(action, value, where)


def _check_scalar(action: argparse.Action, value: Any, where: str) -> Any:
    if action.type is int:
        _expect(isinstance(value, int) and not isinstance(value, bool), value, 'a whole number', where)
        return value
    if action.type is float:
        # YAML 1.1 reads 1e-4, without a point, as text.
        number = _to_float(value)
        _expect(number is not None, value, 'a number', where)
        return number
    _expect(isinstance(value, str), value, 'text', where)
    if action.choices is not None:
        _expect(value in action.choices, value, f'one of {", ".join(map(repr, action.choices))}', where)
    return value


def _to_float(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def _expect(holds: Any, value: Any, wanted: str, where: str) -> None:
    if not holds:
        raise ValueError(f'{where} must be {wanted}, got {value!r}')
