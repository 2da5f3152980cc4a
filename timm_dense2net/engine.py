"""The training loop: one step, one epoch, one run, and evaluation.

A run's position is an epoch and a number of batches of it. All randomness of the data follows from the seed and the
position, all other state is in `Trainer.state_dict`, so a run that is stopped anywhere goes on as if it had not been.
"""
from __future__ import annotations

import argparse
import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import model_parameters
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ModelEmaV3, NativeScaler, dispatch_clip_grad, distribute_bn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from .checkpoint import save_state, save_weights
from .data import BatchLoader
from .distributed import Processes
from .rng import rng_state, set_rng_state

if TYPE_CHECKING:
    from .runs import RunFolder

__all__ = ['Trainer', 'TrainStep', 'TrainLoss', 'TrainingError', 'Interrupted', 'evaluate', 'predict', 'autocast_factory']

_logger = logging.getLogger(__name__)

Batch = tuple[torch.Tensor, torch.Tensor]


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is kept."""


class Interrupted(Exception):
    """A signal asked the run to end.

    Args:
        signum: The signal's number; a process that ends by it has the exit status 128 + signum.
    """

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignal:
    """Notes SIGTERM and SIGINT so that the loop can end between two steps. A second SIGINT acts at once."""

    def __init__(self):
        self.signum = 0
        self._previous = {}

    def __enter__(self) -> StopSignal:
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _frame) -> None:
        self.signum = signum
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class TrainLoss(nn.Module):
    """Cross entropy in float32 of timm's losses: soft targets as they are, class indices with label smoothing."""

    def __init__(self, smoothing: float = 0.):
        super().__init__()
        self.soft = SoftTargetCrossEntropy()
        self.hard = LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean loss of (B, C) logits for (B, C) probabilities or (B,) class indices."""
        return (self.soft if targets.is_floating_point() else self.hard)(logits.float(), targets)


class TrainStep:
    """One optimizer update over one or more batches.

    Args:
        model: The model, wrapped and compiled as it is to be trained.
        loss_fn: Mean loss of logits and targets.
        optimizer: The optimizer.
        autocast: Makes the context of the forward pass.
        scaler: Gradient scaler, for float16.
        clip_grad: Clipping value, None: no clipping.
        clip_mode: timm's clipping mode.
    """

    def __init__(
            self,
            model: nn.Module,
            loss_fn: nn.Module,
            optimizer: torch.optim.Optimizer,
            autocast: Callable = nullcontext,
            scaler: NativeScaler | None = None,
            clip_grad: float | None = None,
            clip_mode: str = 'norm',
    ):
        self.model = model
        self.loss_fn = loss_fn
        self.optimizer = optimizer
        self.autocast = autocast
        self.scaler = scaler
        self.clip_grad = clip_grad
        self.clip_mode = clip_mode
        self._ddp = next((m for m in (model, getattr(model, '_orig_mod', None)) if hasattr(m, 'no_sync')), None)

    def __call__(self, batches: Sequence[Batch]) -> torch.Tensor:
        """Updates the weights by the mean gradient of equally large batches.

        Returns:
            (2, number of batches) on the device: mean loss and number of right answers of each batch.
        """
        figures = []
        for index, (images, targets) in enumerate(batches):
            last = index == len(batches) - 1
            with nullcontext() if self._ddp is None or last else self._ddp.no_sync():
                with self.autocast():
                    logits = self.model(images)
                loss = self.loss_fn(logits, targets)
                self._backward(loss / len(batches), update=last)
            figures.append(torch.stack((loss.detach(), _count_right(logits, targets))))
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(figures, dim=1)

    def _backward(self, loss: torch.Tensor, update: bool) -> None:
        parameters = model_parameters(self.model, exclude_head='agc' in self.clip_mode)
        if self.scaler is not None:
            self.scaler(
                loss, self.optimizer, clip_grad=self.clip_grad, clip_mode=self.clip_mode, parameters=parameters,
                need_update=update)
            return
        loss.backward()
        if update:
            if self.clip_grad is not None:
                dispatch_clip_grad(parameters, self.clip_grad, mode=self.clip_mode)
            self.optimizer.step()


def _count_right(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Number of right answers, as a float; of a mixed image the larger part's class is the right one."""
    targets = targets.argmax(dim=1) if targets.is_floating_point() else targets
    return (logits.detach().argmax(dim=1) == targets).sum().float()


def autocast_factory(args: argparse.Namespace, device: torch.device) -> Callable:
    """Makes the context of a forward pass."""
    if not args.amp:
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=getattr(torch, args.amp_dtype))


@torch.inference_mode()
def evaluate(
        model: nn.Module,
        batches: Iterable[Batch],
        autocast: Callable = nullcontext,
        processes: Processes | None = None,
        stop: StopSignal | None = None,
) -> dict[str, float]:
    """Cross entropy, top-1 and top-5 accuracy in percent over all batches of all processes.

    Raises:
        Interrupted: If a signal arrives (one process only).
    """
    model.eval()
    total = None
    for images, targets in batches:
        with autocast():
            logits = model(images).float()
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        figures = torch.stack((
            nn.functional.cross_entropy(logits, targets, reduction='sum').double(), top[:, 0].sum().double(),
            top.sum().double(), torch.tensor(float(len(targets)), dtype=torch.double, device=logits.device)))
        total = figures if total is None else total + figures
        if stop and stop.signum and not (processes and processes.distributed):
            raise Interrupted(stop.signum)
    if processes:
        processes.sum(total)
    loss, top1, top5, count = total.tolist()
    return dict(loss=loss / count, top1=100. * top1 / count, top5=100. * top5 / count)


@torch.inference_mode()
def predict(
        model: nn.Module,
        batches: Iterable[Batch],
        autocast: Callable = nullcontext,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All (N, C) logits and (N,) targets, on the CPU."""
    model.eval()
    outputs = []
    for images, targets in batches:
        with autocast():
            logits = model(images)
        outputs.append((logits.float().cpu(), targets.cpu()))
    logits, targets = zip(*outputs)
    return torch.cat(logits), torch.cat(targets)


class Trainer:
    """A training run.

    Args:
        args: Arguments as `options.parse_args` gives them.
        model: The bare model, on its device.
        train_loader: `data.BatchLoader` over the training images.
        eval_loader: `data.BatchLoader` over the images that validate.
        folder: Where the run is written; None on processes that write nothing.
        weights_metadata: Metadata of the weights' files.
        processes: The processes that train together.
    """

    def __init__(
            self,
            args: argparse.Namespace,
            model: nn.Module,
            train_loader: BatchLoader,
            eval_loader: BatchLoader,
            folder: RunFolder | None,
            weights_metadata: dict[str, str],
            processes: Processes,
    ):
        self.args = args
        self.device = processes.device
        self.processes = processes
        self.train_loader, self.eval_loader = train_loader, eval_loader
        self.folder = folder
        self.weights_metadata = weights_metadata

        self.model = model
        self.autocast = autocast_factory(args, self.device)
        self.optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), filter_bias_and_bn=False)
        self.updates_per_epoch = math.ceil(len(train_loader) / args.grad_accum_steps)
        self.scheduler, self.epochs = self._build_scheduler()
        self.scaler = NativeScaler(self.device.type) if args.amp and args.amp_dtype == 'float16' else None
        self.ema = ModelEmaV3(
            model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None
        self.eval_model = self._compile(self.model_to_keep)
        self.step = TrainStep(
            self._compile(self._distribute(model)), TrainLoss(args.smoothing), self.optimizer, self.autocast,
            self.scaler, args.clip_grad, args.clip_mode)

        self.epoch = 0
        self.batches_done = 0
        self.updates = 0
        self.figures = torch.zeros(2, len(train_loader), device=self.device)
        self.best: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.epochs_without_gain = 0
        self.seconds = 0.
        self.epoch_seconds = 0.
        self.train_seconds = 0.
        self.stop = StopSignal()

    @property
    def model_to_keep(self) -> nn.Module:
        """The bare model that is evaluated and kept: the EMA where there is one, as in timm's train.py."""
        return self.model if self.ema is None else self.ema.module

    @property
    def finished(self) -> bool:
        """Whether all epochs are trained or the run was stopped early."""
        patience = self.args.early_stop_patience
        return self.epoch >= self.epochs or bool(patience and self.epochs_without_gain >= patience)

    def _build_scheduler(self):
        args = self.args
        if args.sched != 'plateau':
            return create_scheduler_v2(
                self.optimizer, **scheduler_kwargs(args), updates_per_epoch=self.updates_per_epoch)
        # timm's schedulers apply layer-wise decay themselves, torch's know nothing of it.
        for group in self.optimizer.param_groups:
            group['lr'] *= group.get('lr_scale', 1.)
        return ReduceLROnPlateau(
            self.optimizer, factor=args.decay_rate, patience=args.patience_epochs, min_lr=args.min_lr), args.epochs

    def _distribute(self, model: nn.Module) -> nn.Module:
        if not self.processes.distributed:
            return model
        return DistributedDataParallel(model, device_ids=None if self.device.type == 'cpu' else [self.device])

    def _compile(self, model: nn.Module) -> nn.Module:
        return torch.compile(model, backend=self.args.torchcompile) if self.args.torchcompile else model

    def fit(self) -> None:
        """Trains to the end of the run.

        Raises:
            Interrupted: After a signal, with the state saved.
            TrainingError: If the loss is not finite.
        """
        with self.stop:
            try:
                if not (self.epoch or self.batches_done):
                    self.save()
                while not self.finished:
                    self._fit_epoch()
            except Interrupted:
                self.save()
                raise

    def _fit_epoch(self) -> None:
        started = time.perf_counter()
        try:
            self._train_epoch()
        finally:
            self.train_seconds += time.perf_counter() - started
            self.epoch_seconds += time.perf_counter() - started
        started = time.perf_counter()
        if self.processes.distributed and self.args.dist_bn:
            for model in (self.model, *([self.ema.module] if self.ema else [])):
                distribute_bn(model, self.processes.world_size, self.args.dist_bn == 'reduce')
        self.last = evaluate(self.eval_model, self.eval_loader.epoch(0), self.autocast, self.processes, self.stop)
        self._end_epoch(time.perf_counter() - started)

    def _train_epoch(self) -> None:
        self.step.model.train()
        accumulate, total = self.args.grad_accum_steps, len(self.train_loader)
        batches = self.train_loader.epoch(self.epoch, start_step=self.batches_done)
        with tqdm(
                total=total, initial=self.batches_done, desc=f'epoch {self.epoch + 1}/{self.epochs}', unit='batch',
                leave=False, disable=not self.processes.primary) as bar:
            while self.batches_done < total:
                group = [next(batches) for _ in range(min(accumulate, total - self.batches_done))]
                first, self.batches_done = self.batches_done, self.batches_done + len(group)
                self.figures[:, first:self.batches_done] = self.step(group)
                self._after_update()
                bar.update(len(group))
                if first // self.args.log_interval != self.batches_done // self.args.log_interval:
                    bar.set_postfix(loss=f'{self._check_loss():.3f}', lr=f'{self.lr:.3g}')
                self._save_or_stop(first)

    def _after_update(self) -> None:
        self.updates += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.updates)
        if not isinstance(self.scheduler, ReduceLROnPlateau) and self.scheduler is not None:
            self.scheduler.step_update(self.updates)

    def _save_or_stop(self, first: int) -> None:
        interval = self.args.checkpoint_interval
        if interval and self.updates % interval == 0 and self.batches_done < len(self.train_loader):
            self.save()
        if not self.processes.distributed:
            signum = self.stop.signum
        elif first // self.args.log_interval != self.batches_done // self.args.log_interval:
            signum = self.processes.max(self.stop.signum)
        else:
            signum = 0
        if signum:
            raise Interrupted(signum)

    @property
    def lr(self) -> float:
        """Mean learning rate of the parameter groups."""
        return sum(group['lr'] for group in self.optimizer.param_groups) / len(self.optimizer.param_groups)

    def _check_loss(self) -> float:
        """The last batch's loss; reading it waits for the device.

        Raises:
            TrainingError: If a loss of this epoch is not finite, naming the step.
        """
        losses = self.figures[0, :self.batches_done].cpu()
        bad = (~losses.isfinite()).nonzero().flatten()
        if len(bad):
            step = int(bad[0])
            raise TrainingError(
                f'the loss is {losses[step].item()} at epoch {self.epoch + 1}, step {step + 1} of {len(self.train_loader)}'
                f' (learning rate {self.lr:g}); the last good state is kept in {self.args.output}/{self.args.experiment}')
        return losses[-1].item() if len(losses) else math.nan

    def _end_epoch(self, eval_seconds: float) -> None:
        lr, metrics = self.lr, self._train_metrics()
        self.epoch_seconds += eval_seconds
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(self.last['loss'])
        elif self.scheduler is not None:
            self.scheduler.step(self.epoch + 1)
        is_best = self.last['top1'] > self.best.get('top1', -1.)
        self.epochs_without_gain = 0 if is_best else self.epochs_without_gain + 1
        if is_best:
            self.best = dict(self.last, epoch=self.epoch)
        if self.folder is not None:
            self.folder.add_epoch(self.epoch, metrics, self.last, lr)
            self._save_weights(is_best)
            _logger.info(
                f'epoch {self.epoch + 1}/{self.epochs}: train loss {metrics["loss"]:.3f} top-1 {metrics["top1"]:.2f},'
                f' validation loss {self.last["loss"]:.3f} top-1 {self.last["top1"]:.2f} (best {self.best["top1"]:.2f}),'
                f' lr {lr:.3g}, {self.epoch_seconds:.1f} s')
        self.seconds += self.epoch_seconds
        self.epoch, self.batches_done, self.epoch_seconds, self.train_seconds = self.epoch + 1, 0, 0., 0.
        self.figures.zero_()
        self.save()

    def _train_metrics(self) -> dict[str, float]:
        self._check_loss()
        loss, right = self.figures.double().mean(dim=1)
        world_size = self.processes.world_size
        loss, right = (self.processes.sum(torch.stack((loss, right))) / world_size).tolist()
        images = len(self.train_loader) * self.args.batch_size * world_size
        return dict(
            loss=loss, top1=100. * right / self.args.batch_size, seconds=self.epoch_seconds,
            images_per_second=images / self.train_seconds)

    def _save_weights(self, is_best: bool) -> None:
        metadata = dict(
            self.weights_metadata, epoch=str(self.epoch), top1=f'{self.last["top1"]:.4f}', ema=json.dumps(self.ema is not None))
        for name in ('last', *(['best'] if is_best else [])):
            save_weights(self.folder.path / f'{name}.safetensors', self.model_to_keep.state_dict(), metadata)

    def save(self) -> None:
        """Saves the training state; every process must take part.

        Raises:
            TrainingError: If a loss or a weight is not finite; nothing is written then.
        """
        self._check_loss()
        state = self.state_dict()
        for name, tensor in state['model'].items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise TrainingError(
                    f'{name} is not finite after epoch {self.epoch + 1}, step {self.batches_done}; the last good state'
                    f' is kept in {self.args.output}/{self.args.experiment}')
        if self.folder is not None:
            save_state(self.folder.path, state)

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on; every process must take part."""
        return dict(
            position=dict(epoch=self.epoch, batches_done=self.batches_done, updates=self.updates),
            model=self.model.state_dict(),
            ema=self.ema.module.state_dict() if self.ema is not None else None,
            optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict() if self.scheduler is not None else None,
            scaler=self.scaler.state_dict() if self.scaler is not None else None,
            early_stop=dict(epochs_without_gain=self.epochs_without_gain, best=self.best, last=self.last),
            time=dict(seconds=self.seconds, epoch_seconds=self.epoch_seconds, train_seconds=self.train_seconds),
            ranks=self.processes.gather(self._rank_state()),
            batches_per_epoch=len(self.train_loader),
        )

    def _rank_state(self) -> dict[str, Any]:
        """What differs between processes: random states, figures so far, running batch-norm statistics."""
        models = dict(model=self.model, ema=self.ema.module if self.ema is not None else None)
        return dict(
            rng=rng_state(self.device),
            figures=self.figures.cpu(),
            buffers={
                key: {name: buffer.cpu() for name, buffer in model.named_buffers()}
                for key, model in models.items() if model is not None and self.processes.distributed},
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts the run where it was when `state` was taken.

        Raises:
            ValueError: If the state belongs to another model or optimizer, or to other data in the middle of an epoch.
        """
        for name in ('ema', 'scaler'):
            if (state[name] is None) != (getattr(self, name) is None):
                raise ValueError(f'the state was saved {"without" if state[name] is None else "with"} {name}: the options differ')
        position = state['position']
        if position['batches_done'] and state['batches_per_epoch'] != len(self.train_loader):
            raise ValueError(
                f'the state was saved within an epoch of {state["batches_per_epoch"]} batches, now it has'
                f' {len(self.train_loader)}: use the same data and batch size')
        try:
            self.model.load_state_dict(state['model'])
            if self.ema is not None:
                self.ema.module.load_state_dict(state['ema'])
            self.optimizer.load_state_dict(state['optimizer'])
        except (RuntimeError, KeyError) as e:
            raise ValueError(f'the state is of another model or optimizer: {" ".join(str(e).split())}') from e
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state['scheduler'])
        if self.scaler is not None:
            self.scaler.load_state_dict(state['scaler'])
        self.epoch, self.batches_done, self.updates = position['epoch'], position['batches_done'], position['updates']
        self.best, self.last = state['early_stop']['best'], state['early_stop']['last']
        self.epochs_without_gain = state['early_stop']['epochs_without_gain']
        self.seconds = state['time']['seconds']
        self.epoch_seconds, self.train_seconds = state['time']['epoch_seconds'], state['time']['train_seconds']
        self._load_rank_states(state['ranks'])

    def _load_rank_states(self, states: list[dict[str, Any]]) -> None:
        world_size = self.processes.world_size
        if len(states) != world_size:
            if self.batches_done:
                raise ValueError(
                    f'the state was saved within an epoch by {len(states)} processes, now there are {world_size}')
            _logger.warning(f'{len(states)} processes saved this state, {world_size} go on: random numbers will differ.')
            return
        state = states[self.processes.rank]
        set_rng_state(state['rng'], self.device)
        self.figures.copy_(state['figures'])
        for key, buffers in state['buffers'].items():
            model = self.model if key == 'model' else self.ema.module
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
