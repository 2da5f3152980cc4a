"""`python -m timm_dense2net publish`: a finished run as a Hugging Face Hub repository.

    publish output/RUN --repo-id OWNER/NAME            writes the folder output/RUN/hub and shows it
    publish output/RUN --repo-id OWNER/NAME --push     and sends it

The folder is a timm model: `timm.create_model('hf-hub:OWNER/NAME')` and `'local-dir:output/RUN/hub'` load it.
"""
from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError
from timm.models import save_for_hf

from .card import first_model, hub_dataset, model_card
from .files import sha256_of
from .hub import DIGEST_KEY, HUB_ERRORS, WEIGHTS_FILE, explain_hub_error
from .options import ARGS_FILE, HOST_ARGS
from .public_args import is_place, public_args
from .results import RunResult, read_run
from .trained import TrainedModel, load_checkpoint_model

__all__ = ['PublishError', 'write_hub_folder', 'push_hub_folder', 'main']

# What a run leaves that is worth showing, where it is there.
_RUN_FILES = (
    'report.json', 'summary.csv', 'curves.png', 'confusion_matrix.png', 'per_class.csv', 'per_superclass.csv')

# All that a folder written here may hold; one with more has a use besides, as a clone of a repository has.
_HUB_FILES = {'README.md', 'config.json', 'recipe.yaml', WEIGHTS_FILE, *_RUN_FILES}

# Arguments that are not given away; `recipe` would make a run's arguments of the recipe.
_OWN_ARGS = HOST_ARGS | {'recipe'}


class PublishError(RuntimeError):
    """A run cannot be published; the message says why."""


def write_hub_folder(run: Path, repo_id: str, output: Path) -> Path:
    """Writes a finished run as a Hub folder, in one step: the folder is whole or not there.

    Args:
        run: Run folder.
        repo_id: OWNER/NAME that the model card names.
        output: Folder to write; one already there is replaced if it is a Hub folder.

    Returns:
        `output`.

    Raises:
        PublishError: If the run is not finished, its weights cannot be used, or `output` is something else or holds
            something else besides.
    """
    try:
        result = read_run(run)
        trained = load_checkpoint_model(run)
    except (ValueError, OSError) as e:
        raise PublishError(f'{run}: {e}') from e
    _check_replaceable(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f'.{output.name}.', dir=output.parent))
    replaced = temporary.with_name(f'{temporary.name}.replaced')
    try:
        _fill(temporary, run, repo_id, result, trained)
        temporary.chmod(run.stat().st_mode)
        if output.exists():
            output.rename(replaced)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    return output


def _check_replaceable(output: Path) -> None:
    if not output.exists():
        return
    if not (output / 'config.json').is_file():
        raise PublishError(f'{output} is there and no Hub folder: name another with --output')
    others = sorted({path.name for path in output.iterdir()} - _HUB_FILES)
    if others:
        raise PublishError(
            f'{output} holds {others[0]}, which publish does not write and would delete: name another with --output')


def _fill(folder: Path, run: Path, repo_id: str, result: RunResult, trained: TrainedModel) -> None:
    _save_model(folder, result, trained)
    for name in _RUN_FILES:
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)
    args = yaml.safe_load((run / ARGS_FILE).read_text(encoding='utf-8'))
    recipe = _recipe(args, trained)
    (folder / 'recipe.yaml').write_text(yaml.safe_dump(recipe), encoding='utf-8')
    processes = json.loads((run / 'result.json').read_text(encoding='utf-8')).get('world_size') or 1
    files = {path.name for path in folder.iterdir()}
    card = model_card(repo_id, result, trained, args, recipe['dataset'], processes, files)
    (folder / 'README.md').write_text(card, encoding='utf-8')


def _save_model(folder: Path, result: RunResult, trained: TrainedModel) -> None:
    """Writes weights and config.json, with the weights' digest in it."""
    model_config = dict(label_names=list(trained.class_names)) if trained.class_names else {}
    # The tag that the model has by default is that of other weights.
    model_config['pretrained_cfg'] = dict(tag=result.tag)
    model_args = None
    if trained.conversion is not None:
        model_config['pretrained_cfg']['architecture'] = 'res2net_converted'
        model_args = dict(base=trained.model.pretrained_cfg['architecture'], conversion=trained.conversion)
    save_for_hf(
        trained.model, str(folder), safe_serialization=True, data_config=trained.data_config,
        model_config=model_config, model_args=model_args)
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    config[DIGEST_KEY] = sha256_of(folder / WEIGHTS_FILE)
    (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')


def _recipe(args: Mapping[str, Any], trained: TrainedModel) -> dict[str, Any]:
    """What trains the model again, of a run's arguments: nothing of where the run lay."""
    public = public_args(args, first_model(trained))
    recipe = {name: value for name, value in public.items() if name not in _OWN_ARGS}
    # As training found it: where the run is published, a folder of that name may be missing.
    recipe['dataset'] = hub_dataset(trained.metadata.get('dataset', public['dataset']))
    if is_place('model', args['model']):
        # The architecture's name stands for other weights, or none, and what is special in it was told by the folder.
        recipe['pretrained'] = False
        recipe['model_kwargs'] = json.loads(trained.metadata.get('model_args', '{}'))
        recipe['res2net_scale'] = trained.conversion['scale'] if trained.conversion is not None else None
    elif args['model'].startswith('hf-hub:'):
        recipe['model'] = args['model']
    return recipe


def push_hub_folder(folder: Path, repo_id: str) -> str:
    """Sends a Hub folder to its repository in one commit, and checks that the Hub holds what was sent.

    Args:
        folder: Folder written by `write_hub_folder`.
        repo_id: OWNER/NAME; made if it is not there.

    Returns:
        Address of the commit.

    Raises:
        PublishError: If there is no token, the Hub refuses, cannot be reached or holds other weights than those sent.
    """
    if get_token() is None:
        raise PublishError('no token for the Hub: run `hf auth login` or set HF_TOKEN')
    api = HfApi(library_name='timm_dense2net')
    try:
        api.create_repo(repo_id, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message='Add model')
        held = api.get_paths_info(repo_id, [WEIGHTS_FILE], revision=commit.oid)
    except HUB_ERRORS as e:
        raise PublishError(f'{explain_hub_error(e, repo_id)}; {folder} is whole and can be pushed again') from e
    digest = sha256_of(folder / WEIGHTS_FILE)
    if not held or held[0].lfs is None or held[0].lfs.sha256 != digest:
        raise PublishError(
            f'{repo_id} does not hold the {WEIGHTS_FILE} that was sent (its SHA-256 is not {digest}): push it again')
    return commit.commit_url


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m timm_dense2net publish', description='Write a finished run as a Hugging Face Hub repository.')
    parser.add_argument('run', type=Path, metavar='RUN', help='run folder')
    parser.add_argument('--repo-id', required=True, metavar='OWNER/NAME', help='repository')
    parser.add_argument('--output', type=Path, metavar='DIR', help='folder to write (RUN/hub)')
    parser.add_argument('--push', action='store_true', help='send it to the Hub')
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0, 1 where the run cannot be published, 2 on a wrong call."""
    parser = _build_parser()
    args = parser.parse_args(argv)
    try:
        validate_repo_id(args.repo_id)
    except HFValidationError as e:
        parser.error(f'--repo-id: {e}')
    if args.repo_id.count('/') != 1:
        parser.error(f"--repo-id must be OWNER/NAME, got '{args.repo_id}'")
    try:
        folder = write_hub_folder(args.run, args.repo_id, args.output or args.run / 'hub')
        print(f'{folder}:')
        for path in sorted(folder.iterdir()):
            print(f'  {path.stat().st_size:>12,}  {path.name}')
        print(f'\n{(folder / "README.md").read_text(encoding="utf-8")}')
        if args.push:
            print(f'pushed: {push_hub_folder(folder, args.repo_id)}')
    except (PublishError, OSError, SafetensorError) as e:  # the last of a full disk, too
        print(f'error: {e}', file=sys.stderr)
        return 1
    return 0
