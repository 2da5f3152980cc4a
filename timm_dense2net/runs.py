"""A run's folder.

    args.yaml               all arguments as resolved
    summary.csv             one row an epoch, by timm.utils.update_summary; curves.png is drawn from it
    last.safetensors        weights after the last epoch, of the EMA where there is one
    best.safetensors        weights of the epoch with the best validation top-1
    checkpoint.pth.tar      the whole training state; checkpoint-prev.pth.tar is the one before
    result.json             figures of the finished run; report.json, tables and pictures of the test beside it
    .lock                   held by the process that writes the folder
"""
from __future__ import annotations

import argparse
import csv
import json
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from timm.models import safe_model_name
from timm.utils import trim_summary, unfreeze, update_summary

from .build import RunData, build_loader
from .checkpoint import load_weights
from .counts import count_macs, count_params
from .curves import update_curves
from .distributed import Processes
from .engine import predict
from .environment import environment, source_commit
from .errors import one_line
from .files import LEFTOVERS, replace_file, write_json, write_text
from .final_report import write_final_report
from .options import ARGS_FILE, saved_args
from .trainer import Trainer
from .training_state import CHECKPOINT_FILE, PREVIOUS_FILE, load_state, read_state_bytes

__all__ = ['RunFolder', 'read_resumed_state', 'write_run_results']


def read_resumed_state(args: argparse.Namespace, processes: Processes) -> dict[str, Any] | None:
    """Settles the run's name and reads the state it goes on from, on process 0 for all of them.

    Returns:
        The state, or None where the run begins.

    Raises:
        FileNotFoundError: If there is nothing at `--resume`.
        ValueError: If a run that is not resumed is already there, or no whole state is.
    """
    data = None
    with processes.failing_together():
        if processes.primary:
            args.experiment = args.experiment or _default_experiment(args)
            path = Path(args.output, args.experiment)
            if args.resume:
                data = _read_state(args.resume, path)
            else:
                _check_free(path)
    args.experiment, data = processes.broadcast((args.experiment, data))
    return None if data is None else load_state(data)


def _check_free(path: Path) -> None:
    if any((path / name).exists() for name in (CHECKPOINT_FILE, PREVIOUS_FILE)):
        raise ValueError(f'{path} already holds a run: go on with it by --resume {path}, or name another --experiment')
    if (path / 'result.json').exists():
        raise ValueError(f'{path} already holds a finished run, without its state: name another --experiment')


def _default_experiment(args: argparse.Namespace) -> str:
    """Date, model and recipe; timm's train.py has date, model and image size.

    To the microsecond, so that runs started together have a folder each.
    """
    stamp = datetime.now().strftime('%Y%m%d-%H%M%S-%f')
    return '-'.join((stamp, safe_model_name(args.model), Path(args.recipe or 'custom').stem))


def _read_state(resume: str, path: Path) -> bytes | None:
    if resume == 'auto':
        return read_state_bytes(path) if path.is_dir() else None
    data = read_state_bytes(path if Path(resume).is_dir() else resume)
    if data is None:
        raise ValueError(f'{path} holds no {CHECKPOINT_FILE} to go on from')
    return data


class RunFolder:
    """A run's folder, made and written by one process.

    Args:
        args: Arguments of the run; `output` and `experiment` name the folder, by date, model and recipe where there is
            no `experiment`.
        start_epoch: Epoch that the run goes on from; None for a new run.

    Raises:
        OSError: If the folder cannot be written.
        ValueError: If another process writes it, or has begun a run there.
    """

    def __init__(self, args: argparse.Namespace, start_epoch: int | None = None):
        args.experiment = args.experiment or _default_experiment(args)
        self.path = Path(args.output, args.experiment)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / '.lock')
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise ValueError(f'{self.path} is being written by another process: name another --experiment') from None
        if start_epoch is None:  # one may have been begun since that was looked at
            _check_free(self.path)
        self._remove_leftovers()
        self._check_summary()
        write_text(self.path / ARGS_FILE, yaml.safe_dump(saved_args(args), sort_keys=False))
        # Of the code that trains: the checkout may be another when the run ends.
        self.commit = source_commit()
        self._log_wandb = args.log_wandb
        if args.log_wandb:
            import wandb
            wandb.init(
                project='timm_dense2net', name=args.experiment, id=args.experiment, resume='allow',
                config=saved_args(args), dir=str(self.path))
        self._tensorboard = None
        if args.log_tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self._tensorboard = SummaryWriter(str(self.path / 'tensorboard'), purge_step=start_epoch or 0)

    def close(self) -> None:
        """Closes TensorBoard's file, and leaves the folder to others."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._lock.release()

    def _remove_leftovers(self) -> None:
        """Removes temporary files of a process that was killed while it wrote."""
        for path in self.path.glob(LEFTOVERS):
            path.unlink()

    def _check_summary(self) -> None:
        """Refuses a summary that timm could not add an epoch to, before one is trained."""
        path = self.path / 'summary.csv'
        if not path.exists():
            return
        try:
            with open(path, newline='', encoding='utf-8') as f:
                epochs = [row[0] for row in csv.reader(f) if row]
            if epochs and epochs[0] != 'epoch':
                raise ValueError(f"its first column is {epochs[0]!r}, not 'epoch'")
            for epoch in epochs[1:]:
                float(epoch)
        except (ValueError, csv.Error) as e:
            raise ValueError(
                f"{path}: not as timm's update_summary writes it ({one_line(e)}): put it right or move it") from e

    def add_epoch(self, epoch: int, train: dict[str, float], evaluation: dict[str, float], lr: float) -> None:
        """Adds an epoch's row, in place of what an earlier process wrote of it and later ones, and draws the curves."""
        # Of a run that goes on for longer: its figures are no longer those of its weights.
        (self.path / 'result.json').unlink(missing_ok=True)
        self._edit_summary(lambda path: trim_summary(path, epoch))
        self._edit_summary(
            lambda path: update_summary(epoch, train, evaluation, path, lr=lr, log_wandb=self._log_wandb))
        update_curves(self.path)
        if self._tensorboard is not None:
            for prefix, metrics in (('train', train), ('eval', evaluation)):
                for name, value in metrics.items():
                    self._tensorboard.add_scalar(f'{prefix}/{name}', value, epoch)
            self._tensorboard.add_scalar('lr', lr, epoch)
            self._tensorboard.flush()

    def _edit_summary(self, edit: Callable[[str], None]) -> None:
        """Edits a copy and puts it in place, so that a crash leaves the old rows or the new ones."""
        path = self.path / 'summary.csv'
        with replace_file(path) as temporary:
            if path.exists():
                shutil.copyfile(path, temporary)
            edit(str(temporary))


def write_run_results(args: argparse.Namespace, data: RunData, trainer: Trainer) -> dict[str, Any]:
    """Tests the finished run, its last weights or with `--hold-out` the chosen ones, and writes `result.json`.

    The figures of the test in full go to `report.json` and the tables and pictures beside it.

    Returns:
        What `result.json` holds; accuracies in percent, times in seconds.
    """
    folder = trainer.path
    tested = 'best' if args.hold_out else 'last'
    model = trainer.model_to_keep
    model.load_state_dict(load_weights(folder / f'{tested}.safetensors')[0])
    loader = build_loader(args, data.test, data, Processes(trainer.device))
    logits, targets = predict(model, loader.epoch(0), trainer.autocast)
    metrics = write_final_report(folder, logits, targets, data.test.class_names)
    # Frozen norms hold their weights as buffers, which would not be counted.
    unfreeze(model)
    world_size = trainer.processes.world_size
    images = trainer.epoch * len(trainer.train_loader) * args.batch_size * world_size
    metadata = trainer.weights_metadata
    result = dict(
        model=metadata['model'],
        model_kwargs=json.loads(metadata['args'])['model_kwargs'],
        res2net_scale=args.res2net_scale,
        recipe=args.recipe,
        dataset=metadata['dataset'],
        seed=args.seed,
        params=count_params(model),
        macs=count_macs(model, data.test.image_shape),
        epochs=trainer.epoch,
        updates=trainer.updates,
        ema=args.model_ema,
        hold_out=args.hold_out,
        tested=tested,
        test_top1=metrics['top1'],
        test_top5=metrics['top5'],
        last_top1=trainer.last['top1'],
        best_top1=trainer.best['top1'],
        best_epoch=trainer.best['epoch'],
        train_seconds=trainer.seconds['total'],
        images_per_second=images / trainer.seconds['train'],
        batch_size=args.batch_size,
        world_size=world_size,
        **environment(trainer.device),
        commit=trainer.folder.commit,
    )
    write_json(folder / 'result.json', result)
    return result
