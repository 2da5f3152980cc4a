"""A run's folder: its name, its arguments, one row an epoch, and its results.

    args.yaml               all arguments as resolved
    summary.csv             one row an epoch, by timm.utils.update_summary; curves.png is drawn from it
    last.safetensors        weights after the last epoch, of the EMA where there is one
    best.safetensors        weights of the epoch with the best validation top-1
    checkpoint.safetensors  the whole training state; checkpoint-prev.safetensors is the one before
    result.json             figures of the finished run; per-class tables and the confusion matrix beside it
"""
from __future__ import annotations

import argparse
import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from timm.models import safe_model_name
from timm.utils import trim_summary, update_summary

from .build import RunData, build_loader, environment
from .checkpoint import CHECKPOINT_FILE, PREVIOUS_FILE, load_state, load_weights, read_state_bytes
from .distributed import Processes
from .engine import Trainer, predict
from .options import ARGS_FILE, saved_args
from .results import replace_file, update_curves, write_final_report

__all__ = ['RunFolder', 'read_resumed_state', 'write_run_results']


def _default_experiment(args: argparse.Namespace) -> str:
    """Date, model and recipe (or image size), as timm's train.py names a run."""
    return '-'.join((datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), args.recipe or 'custom'))


def read_resumed_state(args: argparse.Namespace, processes: Processes) -> dict[str, Any] | None:
    """Names the run and reads the state it goes on from, on process 0 for all of them.

    Returns:
        The state, or None where the run begins.

    Raises:
        ValueError: If a run that is not resumed is already there, or no whole state is.
    """
    data = None
    if processes.primary:
        args.experiment = args.experiment or _default_experiment(args)
        path = Path(args.output, args.experiment)
        if args.resume:
            data = read_state_bytes(path if args.resume == 'auto' or Path(args.resume).is_dir() else args.resume)
            if data is None and args.resume != 'auto':
                raise ValueError(f'{path} holds no {CHECKPOINT_FILE} to go on from')
        elif any((path / name).exists() for name in (CHECKPOINT_FILE, PREVIOUS_FILE)):
            raise ValueError(f'{path} already holds a run: continue it with --resume {path}, or name another --experiment')
    args.experiment, data = processes.broadcast((args.experiment, data))
    return None if data is None else load_state(data)


class RunFolder:
    """A run's folder, made and written by one process.

    Args:
        args: Arguments of the run; `output` and `experiment` name the folder.

    Raises:
        OSError: If the folder cannot be written.
    """

    def __init__(self, args: argparse.Namespace):
        self.path = Path(args.output, args.experiment)
        self.log_wandb = args.log_wandb
        self.path.mkdir(parents=True, exist_ok=True)
        with replace_file(self.path / ARGS_FILE) as temporary:
            temporary.write_text(yaml.safe_dump(saved_args(args), sort_keys=False), encoding='utf-8')

    def start_at(self, epoch: int) -> None:
        """Drops the rows of epochs that are trained again."""
        self._edit_summary(lambda path: trim_summary(path, epoch))

    def add_epoch(self, epoch: int, train: dict[str, float], evaluation: dict[str, float], lr: float) -> None:
        """Adds an epoch's row and draws the curves."""
        self.start_at(epoch)
        self._edit_summary(lambda path: update_summary(epoch, train, evaluation, path, lr=lr, log_wandb=self.log_wandb))
        update_curves(self.path)

    def _edit_summary(self, edit) -> None:
        """Edits a copy and puts it in place, so that a crash leaves the old rows or the new ones."""
        path = self.path / 'summary.csv'
        with replace_file(path) as temporary:
            if path.exists():
                shutil.copyfile(path, temporary)
            edit(str(temporary))


def write_run_results(args: argparse.Namespace, data: RunData, trainer: Trainer) -> dict[str, Any]:
    """Tests the finished run, the last weights or with `--hold-out` the chosen ones, and writes `result.json`.

    The full figures of the tested weights go to `report.json` and the tables and pictures beside it.

    Returns:
        What `result.json` holds.
    """
    folder = trainer.folder.path
    tested = 'best' if args.hold_out else 'last'
    trainer.model_to_keep.load_state_dict(load_weights(folder / f'{tested}.safetensors')[0])
    test_loader = build_loader(args, data.test, data, Processes(trainer.device))
    logits, targets = predict(trainer.model_to_keep, test_loader.epoch(0), trainer.autocast)
    figures = write_final_report(folder, logits, targets, data.test.class_names)
    result = dict(
        model=args.model,
        model_kwargs=args.model_kwargs,
        recipe=args.recipe,
        dataset=args.dataset,
        seed=args.seed,
        params=sum(parameter.numel() for parameter in trainer.model.parameters()),
        epochs=trainer.epoch,
        updates=trainer.updates,
        ema=args.model_ema,
        hold_out=args.hold_out,
        tested=tested,
        test_top1=figures['top1'],
        test_top5=figures['top5'],
        last_top1=trainer.last['top1'],
        best_top1=trainer.best['top1'],
        best_epoch=trainer.best['epoch'],
        train_seconds=trainer.seconds,
        images_per_second=trainer.updates * args.grad_accum_steps * args.batch_size * trainer.processes.world_size / trainer.seconds,
        batch_size=args.batch_size,
        world_size=trainer.processes.world_size,
        **environment(trainer.device),
    )
    with replace_file(folder / 'result.json') as temporary:
        temporary.write_text(json.dumps(result, indent=2) + '\n', encoding='utf-8')
    return result
