#!/usr/bin/env python3
"""Trains a timm model on CIFAR-100, CIFAR-10, digits or any timm data set.

    python train_cifar.py --recipe deck_dense2net --data-dir data --dataset-download
    python train_cifar.py --recipe nano                                nothing to download, one to two minutes on a CPU
    torchrun --nproc-per-node 4 train_cifar.py --recipe strong -b 32 --data-dir data    one machine, four devices
    python train_cifar.py --resume output/RUN                          go on where a run ended
    python train_cifar.py --eval-only --checkpoint output/RUN --data-dir data     test a run's weights on CIFAR-100

docs/training.md tells more; --help lists all options.
"""
import argparse
import logging
import math
import signal
import sys
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from timm.utils import setup_default_logging

from timm_dense2net.build import build_data, build_loader, build_trained, build_trainer
from timm_dense2net.distributed import Processes, start_processes
from timm_dense2net.engine import autocast_factory, evaluate
from timm_dense2net.interrupt import Interrupted
from timm_dense2net.options import parse_args
from timm_dense2net.runs import RunFolder, read_resumed_state, write_run_results
from timm_dense2net.trainer import TrainingError

_logger = logging.getLogger('train')


def train(args: argparse.Namespace, processes: Processes) -> None:
    """Trains a run, or goes on with it, and writes its results."""
    state = read_resumed_state(args, processes)
    data = build_data(args)
    trainer = build_trainer(args, data, processes, state)
    if state is not None:
        _logger.info(f'Going on after {trainer.epoch} epochs and {trainer.batches_done} batches.')
    # Made last, so that a mistake in the arguments leaves no folder behind.
    with processes.failing_together():
        folder = RunFolder(args, None if state is None else trainer.epoch) if processes.primary else None
    with closing(folder) if folder else nullcontext():
        trainer.fit(folder)
        if folder is not None:
            result = write_run_results(args, data, trainer)
            _logger.info(
                f'{folder.path}: test top-1 {result["test_top1"]:.2f}, top-5 {result["test_top5"]:.2f}'
                f' ({result["tested"]} weights); best validation top-1 {result["best_top1"]:.2f}, epoch'
                f' {result["best_epoch"] + 1}')


def evaluate_only(args: argparse.Namespace, processes: Processes) -> None:
    """Prints the test figures of `--checkpoint` or `--pretrained`."""
    model, data = build_trained(args)
    loader = build_loader(args, data.test, data, processes)
    metrics = evaluate(
        model.to(processes.device), loader.epoch(0), autocast_factory(args, processes.device), processes.sum)
    if not math.isfinite(metrics['loss']):
        raise ValueError(f'{args.checkpoint or args.model}: the test loss is {metrics["loss"]}')
    if processes.primary:
        print(f'test top-1 {metrics["top1"]:.2f}, top-5 {metrics["top5"]:.2f}, loss {metrics["loss"]:.4f}')


def main(argv: list[str] | None = None) -> int:
    """Runs the job; returns the exit code: 0, 1 (fault), 2 (bad arguments) or 128 + a signal's number."""
    try:
        args = parse_args(argv)
    except (ValueError, OSError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    try:
        with start_processes(args.device) as processes:
            if not processes.primary:
                logging.getLogger().setLevel(logging.ERROR)
            if processes.device.type == 'cuda':
                torch.backends.cuda.matmul.allow_tf32 = True  # as in timm's train.py; cuDNN's convolutions may anyway
            job = evaluate_only if args.eval_only else train
            try:
                job(args, processes)
            except Interrupted as e:
                if processes.primary:
                    print(
                        f'{e}: the state is saved, go on with --resume {Path(args.output, args.experiment)}',
                        file=sys.stderr)
                return 128 + e.signum
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 128 + signal.SIGINT
    except (ValueError, OSError, TrainingError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    setup_default_logging()
    sys.exit(main())
