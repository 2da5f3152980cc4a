"""A training run: its loop, its position and all of its state.

The position is an epoch and a number of its batches. The data's randomness follows from the seed and the position, all
else is in `Trainer.state_dict`, so a run that ends anywhere goes on as if it had not ended.
"""
from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from timm.loss import create_classification_loss
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, NativeScaler, distribute_bn
from torch.backends import cudnn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from .checkpoint import first_not_finite, load_metadata, save_weights
from .distillation import Distillation
from .distributed import Processes
from .engine import TrainStep, autocast_factory, evaluate
from .errors import one_line
from .interrupt import Interrupted, StopSignal
from .loader import BatchLoader
from .rng import rng_state, set_rng_state
from .training_form import plain_form
from .training_state import CHECKPOINT_FILE, save_state

if TYPE_CHECKING:
    from .runs import RunFolder

__all__ = ['Trainer', 'TrainingError']

_logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is kept."""


@contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    before, cudnn.benchmark = cudnn.benchmark, True
    try:
        yield
    finally:
        cudnn.benchmark = before


class Trainer:
    """A training run.

    Args:
        args: Arguments as `options.parse_args` gives them.
        model: The bare model, on its device.
        train_loader: Batches of the training images.
        eval_loader: Batches of the images that validate.
        weights_metadata: Metadata of the weights' files.
        processes: The processes that train together.
        distillation: Adds a teacher's answers to the loss.
    """

    def __init__(
            self,
            args: argparse.Namespace,
            model: nn.Module,
            train_loader: BatchLoader,
            eval_loader: BatchLoader,
            weights_metadata: dict[str, str],
            processes: Processes,
            distillation: Distillation | None = None,
    ):
        self.args = args
        self.model = model
        self.train_loader, self.eval_loader = train_loader, eval_loader
        self.folder: RunFolder | None = None
        self.weights_metadata = weights_metadata
        self.processes = processes
        self.distillation = distillation
        self.device = processes.device
        self._build()

        self.epoch = 0
        self.batches_done = 0
        self.updates = 0
        # Mean loss and number of right answers of each batch of the epoch.
        self.batch_metrics = torch.zeros(2, len(train_loader), device=self.device)
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.epochs_without_gain = 0
        self.seconds = dict(total=0., train=0., epoch=0., epoch_train=0.)
        self._clock = time.perf_counter()
        self.stop = StopSignal()

    def _build(self) -> None:
        args, model = self.args, self.model
        self.autocast = autocast_factory(args, self.device)
        self.scaler = NativeScaler(self.device.type) if args.amp and args.amp_dtype == 'float16' else None
        try:
            self.optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), filter_bias_and_bn=False)
        except (AssertionError, IndexError, TypeError, ValueError) as e:
            betas = f' --opt-betas {" ".join(map(str, args.opt_betas))}' if args.opt_betas else ''
            too_few = ' (it takes more betas)' if betas and isinstance(e, IndexError) else ''
            raise ValueError(f'--opt {args.opt}{betas}: {one_line(e)}{too_few}') from e
        self.schedule, self.epochs = self._build_schedule()
        self.plateau = self._build_plateau()
        # Made before the model is wrapped, as in timm's train.py.
        self.ema = ModelEmaV3(
            model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None
        self.eval_model = self._compile(self.model_to_keep)
        if args.torchcompile_layers:
            if not hasattr(model, 'compile_layers'):
                raise ValueError(f'--torchcompile-layers: {args.model} has no compile_layers, Dense2Net has')
            self._check_first_order('--torchcompile-layers')
            model.compile_layers()
        loss_fn = create_classification_loss(smoothing=args.smoothing, soft_targets=self.train_loader.config.mixes)
        self.step = TrainStep(
            self._compile(self._distribute(model)), loss_fn, self.optimizer, self.autocast, self.scaler,
            args.clip_grad, args.clip_mode, self.distillation, self._captures())

    def _captures(self) -> bool:
        if not self.args.cuda_graph or self.device.type != 'cuda':
            return False
        if self.processes.distributed:
            raise ValueError('--cuda-graph is for one process: leave it out, or start no others')
        self._check_first_order('--cuda-graph')
        return True

    def _check_first_order(self, option: str) -> None:
        if getattr(self.optimizer, 'is_second_order', False):
            raise ValueError(f'--opt {self.args.opt} needs gradients of gradients, for which {option} is not made')

    def _build_schedule(self) -> tuple[Scheduler | None, int]:
        """timm's schedule, None where the learning rate stays or falls at plateaus, and the epochs that it makes."""
        if self.args.sched == 'plateau':
            return None, self.args.epochs
        updates_per_epoch = self._updates_of(len(self.train_loader))
        return create_scheduler_v2(
            self.optimizer, **scheduler_kwargs(self.args), updates_per_epoch=updates_per_epoch)

    def _build_plateau(self) -> ReduceLROnPlateau | None:
        """torch's, whose state can be saved."""
        args = self.args
        if args.sched != 'plateau':
            return None
        # timm's schedules apply layer-wise decay themselves.
        for group in self.optimizer.param_groups:
            group['lr'] *= group.get('lr_scale', 1.)
        return ReduceLROnPlateau(
            self.optimizer, factor=args.decay_rate, patience=args.patience_epochs, cooldown=args.cooldown_epochs,
            min_lr=args.min_lr)

    def _updates_of(self, batches: int) -> int:
        return math.ceil(batches / self.args.grad_accum_steps)

    @property
    def scheduled_updates(self) -> int:
        """Where the run stands in its schedule, in updates of now: earlier ones may have been of other batches."""
        return self.epoch * self._updates_of(len(self.train_loader)) + self._updates_of(self.batches_done)

    def _distribute(self, model: nn.Module) -> nn.Module:
        if not self.processes.distributed:
            return model
        return DistributedDataParallel(model, device_ids=None if self.device.type == 'cpu' else [self.device])

    def _compile(self, model: nn.Module) -> nn.Module:
        return torch.compile(model, backend=self.args.torchcompile) if self.args.torchcompile else model

    @property
    def model_to_keep(self) -> nn.Module:
        """The bare model that is evaluated and kept: the EMA where there is one, as in timm's train.py."""
        return self.model if self.ema is None else self.ema.module

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, '_base_optimizer', self.optimizer)  # of timm's Lookahead

    @property
    def lr(self) -> float:
        """Mean learning rate of the parameter groups."""
        return sum(group['lr'] for group in self.optimizer.param_groups) / len(self.optimizer.param_groups)

    @property
    def finished(self) -> bool:
        """Whether all epochs are trained or the run was stopped early."""
        patience = self.args.early_stop_patience
        if patience is None:
            # The other schedules may bring what they are for at their end.
            patience = 25 if self.args.sched == 'plateau' else 0
        return self.epoch >= self.epochs or bool(patience and self.epochs_without_gain >= patience)

    @property
    def path(self) -> Path:
        """The run's folder."""
        return Path(self.args.output, self.args.experiment)

    def fit(self, folder: RunFolder | None = None) -> None:
        """Trains to the end of the run.

        Args:
            folder: Where the run is written; None on processes that write nothing.

        Raises:
            Interrupted: After SIGTERM or SIGINT, with the state saved.
            TrainingError: If the loss is not finite or a file cannot be written; the last good state is kept.
        """
        self.folder = folder
        self._heed_weights_of_later_epochs()
        try:
            # The training form has no second derivatives. What cuDNN finds fastest is fixed by a capture.
            with (self.stop, plain_form() if self.step.create_graph else nullcontext(),
                  _cudnn_benchmark() if self.step.captured else nullcontext()):
                self._fit()
        except OSError as e:
            kept = f'the last whole state is kept, put this right and go on with --resume {self.path}'
            if not (self.path / CHECKPOINT_FILE).exists():
                kept = 'nothing is trained yet, put this right and begin again'
            raise TrainingError(f'{e.filename or self.path}: {e.strerror or e}; {kept}') from e
        except torch.OutOfMemoryError as e:
            raise TrainingError(
                f'{one_line(e)} A smaller --batch-size or --grad-checkpointing takes less; the last whole state is in'
                f' {self.path}') from e
        except RuntimeError as e:
            if not str(e).startswith('DataLoader worker'):  # torch tells of a lost one wherever the trainer is
                raise
            raise TrainingError(
                f'{one_line(e)} Fewer --workers take less memory; the last whole state is in {self.path}') from e

    def _heed_weights_of_later_epochs(self) -> None:
        """Looks for weights of epochs that the state comes before: a crash leaves them, and so does an earlier state.

        Where the best weights are of such an epoch, or there are none, those that the state calls best are gone.

        Raises:
            ValueError: If nothing is left to train, so that later weights would be tested as this state's.
        """
        undone = False
        with self.processes.failing_together():
            if self.folder is not None and self.updates:
                if self.finished and self._is_of_later_epoch('last'):
                    raise ValueError(
                        f'{self.path} holds weights of a later epoch than its state, after which nothing is left to'
                        f' train (epoch {self.epoch} of {self.epochs}): give more --epochs')
                lost = bool(self.best) and not (self.folder.path / 'best.safetensors').is_file()
                undone = not self.finished and (lost or self._is_of_later_epoch('best'))
        if self.processes.broadcast(undone):
            self.best = {}

    def _is_of_later_epoch(self, name: str) -> bool:
        """Whether weights in the folder are of an epoch after the state, or nobody knows of which."""
        file = self.folder.path / f'{name}.safetensors'
        try:
            return file.is_file() and int(load_metadata(file).get('epoch', 0)) >= self.epoch
        except ValueError:  # damaged
            return True

    def _fit(self) -> None:
        self._clock = time.perf_counter()
        # Faults of the folder show before any work is done.
        if not self.updates:
            self.save()
        try:
            while not self.finished:
                try:
                    self._train_epoch()
                finally:
                    self._tick(training=True)
                self._evaluate()
                self._end_epoch()
        except Interrupted:
            self.save()
            raise
        self._stop_if_asked()  # the test may take longer than what asked will wait
        if self.epoch < self.epochs and self.processes.primary:
            _logger.info(f'Stopped early, after {self.epochs_without_gain} epochs without a better validation top-1.')

    def _train_epoch(self) -> None:
        self.step.model.train()
        accumulate, total = self.args.grad_accum_steps, len(self.train_loader)
        batches = self.train_loader.epoch(self.epoch, start_step=self.batches_done)
        with tqdm(
                total=total, initial=self.batches_done, desc=f'epoch {self.epoch + 1}/{self.epochs}', unit='batch',
                leave=False, disable=not self.processes.primary) as bar:
            while self.batches_done < total:
                first = self.batches_done
                group = [next(batches) for _ in range(min(accumulate, total - first))]
                self.batch_metrics[:, first:first + len(group)] = self.step(group)
                self.batches_done += len(group)
                self._after_update()
                bar.update(len(group))
                if self._reads_back(first):
                    bar.set_postfix(loss=f'{self._check_loss():.3f}', lr=f'{self.lr:.3g}')
                self._save_or_stop(first)

    def _after_update(self) -> None:
        self.updates += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.updates)
        if self.schedule is not None:
            self.schedule.step_update(self.scheduled_updates)

    def _reads_back(self, first: int) -> bool:
        """Whether the host looks at the device after the update that began with batch `first`."""
        interval = self.args.log_interval
        return first // interval != self.batches_done // interval or self.batches_done == len(self.train_loader)

    def _save_or_stop(self, first: int) -> None:
        interval = self.args.checkpoint_interval
        if interval and self.updates % interval == 0:
            self._tick(training=True)
            self.save()
        if not self.processes.distributed or self._reads_back(first):
            self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        # All must stop at the same step, whichever of them the signal reached.
        signum = max(self.processes.gather(self.stop.signum))
        if signum:
            raise Interrupted(signum)

    def _check_loss(self) -> float:
        """The loss of the last batch; reading it waits for the device, and every process must take part.

        Raises:
            TrainingError: If a loss of this epoch is not finite, naming the step.
        """
        losses = self.batch_metrics[0, :self.batches_done].cpu()
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        self._raise_together(f'the loss is {losses[bad[0]].item()} at {self._where(bad[0] + 1)}' if bad else None)
        return losses[-1].item() if len(losses) else math.nan

    def _check_weights(self) -> None:
        """Checks the weights as they are after the last step; every process must take part.

        Raises:
            TrainingError: If one is not finite.
        """
        name = first_not_finite(self.model.state_dict())
        self._raise_together(name and f'{name} is not finite after {self._where(self.batches_done)}')

    def _raise_together(self, fault: str | None) -> None:
        # What one process alone sees, such as its own loss, ends all: the others would wait for it. Process 0 tells it.
        for found in self.processes.gather(fault):
            if found is not None:
                raise TrainingError(found) if self.processes.primary else SystemExit(1)

    def _where(self, step: int) -> str:
        # Of several processes the first one alone has the folder.
        written = self.folder is not None or not self.processes.primary
        kept = f'; the last good state is kept in {self.path}' if written else ''
        return f'epoch {self.epoch + 1}, step {step} of {len(self.train_loader)}, learning rate {self.lr:.3g}{kept}'

    def _evaluate(self) -> None:
        self._check_weights()
        if self.processes.distributed and self.args.dist_bn:
            for model in dict.fromkeys((self.model, self.model_to_keep)):
                distribute_bn(model, self.processes.world_size, self.args.dist_bn == 'reduce')
        self.last = evaluate(
            self.eval_model, self.eval_loader.epoch(0), self.autocast, self.processes.sum,
            (lambda: None) if self.processes.distributed else self._stop_if_asked)
        self._tick()

    def _tick(self, training: bool = False) -> None:
        """Adds the time since the last tick to the clocks."""
        now = time.perf_counter()
        for key in ('total', 'epoch', 'train', 'epoch_train') if training else ('total', 'epoch'):
            self.seconds[key] += now - self._clock
        self._clock = now

    def _end_epoch(self) -> None:
        train, lr = self._train_metrics(), self.lr
        if self.plateau is not None:
            self.plateau.step(self.last['loss'])
        if self.schedule is not None:
            self.schedule.step(self.epoch + 1)
        is_best = self.last['top1'] > self.best.get('top1', -1.)
        if is_best:
            self.best = dict(self.last, epoch=self.epoch)
        self.epochs_without_gain = 0 if is_best else self.epochs_without_gain + 1
        if self.folder is not None:
            self.folder.add_epoch(self.epoch, train, self.last, lr)
            self._save_weights(is_best)
            _logger.info(
                f'epoch {self.epoch + 1}/{self.epochs}: train loss {train["loss"]:.3f} top-1 {train["top1"]:.2f},'
                f' validation loss {self.last["loss"]:.3f} top-1 {self.last["top1"]:.2f} (best'
                f' {self.best["top1"]:.2f}), lr {lr:.3g}, {train["seconds"]:.1f} s')
        self.epoch, self.batches_done = self.epoch + 1, 0
        self.batch_metrics.zero_()
        self._tick()
        self.seconds.update(epoch=0., epoch_train=0.)
        self.save()

    def _train_metrics(self) -> dict[str, float]:
        world_size, batch_size = self.processes.world_size, self.args.batch_size
        loss, right = (self.processes.sum(self.batch_metrics.cpu().double().mean(dim=1)) / world_size).tolist()
        images = len(self.train_loader) * batch_size * world_size
        return dict(
            loss=loss, top1=100. * right / batch_size, seconds=self.seconds['epoch'],
            images_per_second=images / self.seconds['epoch_train'])

    def _save_weights(self, is_best: bool) -> None:
        metadata = dict(
            self.weights_metadata, epoch=str(self.epoch), top1=f'{self.last["top1"]:.4f}',
            ema=json.dumps(self.ema is not None))
        for name in ('last', 'best') if is_best else ('last',):
            save_weights(self.folder.path / f'{name}.safetensors', self.model_to_keep.state_dict(), metadata)

    def save(self) -> None:
        """Saves the training state; every process must take part.

        Raises:
            TrainingError: If a loss or a weight is not finite; nothing is written then.
            OSError: If the state cannot be written; the one before it is kept.
        """
        self._check_loss()
        self._check_weights()
        state = self.state_dict()
        if self.folder is not None:
            save_state(self.folder.path, state)
        self._tick()

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on; every process must take part."""
        return dict(
            position=dict(epoch=self.epoch, batches_done=self.batches_done, updates=self.updates),
            epoch_size=self._epoch_size(),
            train_images=len(self.train_loader.labels),
            metadata=self.weights_metadata,
            state_dict=self.model.state_dict(),
            state_dict_ema=self.ema.module.state_dict() if self.ema is not None else None,
            optimizer=self.optimizer.state_dict(),
            plateau=self.plateau.state_dict() if self.plateau is not None else None,
            scaler=self.scaler.state_dict() if self.scaler is not None else None,
            early_stop=dict(epochs_without_gain=self.epochs_without_gain, best=self.best, last=self.last),
            seconds=self.seconds,
            processes=self.processes.gather(self._process_state()),
        )

    def _epoch_size(self) -> str:
        return f'{len(self.train_loader)} batches of {self.train_loader.batch_size} images'

    def _process_state(self) -> dict[str, Any]:
        """What differs between processes: random states, metrics so far, running batch-norm statistics."""
        state = dict(rng=rng_state(self.device), figures=self.batch_metrics.cpu())
        generator = getattr(self._inner_optimizer, 'generator', None)  # of timm's AdaHessian, on the CPU at first
        if generator is not None and generator.device.type == self.device.type:
            state['optimizer_rng'] = generator.get_state()
        if self.processes.distributed:
            state['model'] = {name: buffer.cpu() for name, buffer in self.model.named_buffers()}
            if self.ema is not None:
                state['model_to_keep'] = {name: buffer.cpu() for name, buffer in self.ema.module.named_buffers()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts the run where it was when `state` was taken.

        Raises:
            ValueError: If the state belongs to another model or optimizer, or to other data within an epoch or where
                images are held out.
        """
        position = state['position']
        before, now = state['epoch_size'], self._epoch_size()
        if position['batches_done'] and before != now:
            raise ValueError(
                f'the state was saved within an epoch of {before}, now an epoch has {now}: go on with the same data and'
                ' batch size')
        images = len(self.train_loader.labels)
        trained = state.get('train_images', images)
        if self.args.hold_out and trained != images:
            raise ValueError(
                f'the run held out images beside {trained} that it trained on, now {images} are left: of those held out'
                ' now it may know some; go on with the same data')
        for name, part, saved in (
                ('model', self.model, state['state_dict']),
                ('ema', self.ema and self.ema.module, state['state_dict_ema']),
                ('optimizer', self.optimizer, state['optimizer']),
                ('plateau', self.plateau, state['plateau']),
                ('scaler', self.scaler, state['scaler'])):
            if (part is None) != (saved is None):
                raise ValueError(f'the state was saved {"with" if part is None else "without"} {name}')
            try:
                if part is not None:
                    part.load_state_dict(saved)
            except (RuntimeError, KeyError, ValueError) as e:
                raise ValueError(f'the state is of another {name}: {one_line(e)}') from e
        self.epoch, self.batches_done, self.updates = (
            position[key] for key in ('epoch', 'batches_done', 'updates'))
        self.last, self.best = state['early_stop']['last'], state['early_stop']['best']
        self.epochs_without_gain = state['early_stop']['epochs_without_gain']
        self.seconds = dict(state['seconds'])
        if self.schedule is not None:
            # timm's schedules follow from the position alone; a longer one takes effect at once. At its start a run has
            # made no step of them.
            if self.epoch:
                self.schedule.step(self.epoch)
            if self.scheduled_updates:
                self.schedule.step_update(self.scheduled_updates)
        self._load_process_state(state['processes'])

    def _load_process_state(self, states: list[dict[str, Any]]) -> None:
        world_size = self.processes.world_size
        if len(states) != world_size:
            if self.batches_done:
                raise ValueError(
                    f'the state was saved within an epoch by {len(states)} processes, now there are {world_size}')
            _logger.warning(f'Saved by {len(states)} processes, {world_size} go on: random numbers will differ.')
            return
        state = states[self.processes.rank]
        set_rng_state(state['rng'], self.device)
        if 'optimizer_rng' in state:
            self._inner_optimizer.generator = torch.Generator(self.device)
            self._inner_optimizer.generator.set_state(state['optimizer_rng'])
        if self.batches_done:  # between epochs there are none, and their number may be another
            self.batch_metrics.copy_(state['figures'])
        for key, model in (('model', self.model), ('model_to_keep', self.model_to_keep)):
            if key in state:
                for name, buffer in model.named_buffers():
                    buffer.copy_(state[key][name])
