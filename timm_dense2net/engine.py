"""One optimizer update, its loss, and evaluation."""
from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext

import torch
import torch.nn as nn
from timm.models import model_parameters
from timm.utils import NativeScaler, accuracy, dispatch_clip_grad

from .cuda_graph import CapturedPass
from .distillation import Distillation

__all__ = ['Batch', 'TrainStep', 'autocast_factory', 'evaluate', 'predict', 'top_accuracies']

# Normalised images (B, C, H, W), and class indices (B,) or class weights (B, number of classes).
Batch = tuple[torch.Tensor, torch.Tensor]


class TrainStep:
    """One optimizer update over one or more batches, without waiting for the device.

    Args:
        model: The model, wrapped and compiled as it is to be trained.
        loss_fn: Mean loss of float32 logits and targets.
        optimizer: The optimizer.
        autocast: Makes the context of the forward pass.
        scaler: Gradient scaler, for float16.
        clip_grad: Clipping value; None for no clipping.
        clip_mode: Clipping mode of `timm.utils.dispatch_clip_grad`.
        distillation: Adds a teacher's answers to the loss.
        cuda_graph: Capture forward and backward pass; for one batch an update, without a scaler.
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
            distillation: Distillation | None = None,
            cuda_graph: bool = False,
    ):
        self.model = model
        self.loss_fn = loss_fn
        self.optimizer = optimizer
        self.autocast = autocast
        self.scaler = scaler
        self.clip_grad = clip_grad
        self.clip_mode = clip_mode
        self.distillation = distillation
        # As in timm's train.py: what AdaHessian needs of the gradients.
        self.create_graph = getattr(optimizer, 'is_second_order', False)
        self.parameters = list(model_parameters(model, exclude_head='agc' in clip_mode))
        # Under torch.compile the attributes of DistributedDataParallel are reached through the compiled module.
        self.no_sync = getattr(model, 'no_sync', nullcontext)
        if cuda_graph and scaler is not None:
            raise ValueError('a gradient scaler waits for the device, which a CUDA graph cannot')
        self.captured = CapturedPass(self._pass, list(model.parameters())) if cuda_graph else None

    def __call__(self, batches: Sequence[Batch]) -> torch.Tensor:
        """Updates the weights by the mean gradient of equally large batches.

        Returns:
            (2, number of batches) on the device: mean loss and number of right answers of each batch.

        Raises:
            ValueError: If there is more than one batch and the pass is captured, which begins with no gradients.
        """
        if self.captured is not None:
            if len(batches) > 1:
                raise ValueError(f'with a CUDA graph an update is of one batch, got {len(batches)}')
            metrics = [self.captured(*batches[0])]
        else:
            metrics = []
            for index, batch in enumerate(batches):
                last = index == len(batches) - 1
                with nullcontext() if last else self.no_sync():
                    metrics.append(self._pass(*batch, len(batches), last))
        if self.scaler is None:
            if self.clip_grad is not None:
                dispatch_clip_grad(self.parameters, self.clip_grad, mode=self.clip_mode)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(metrics, dim=1)

    def _pass(self, images: torch.Tensor, targets: torch.Tensor, batches: int = 1, last: bool = True) -> torch.Tensor:
        """Adds the gradient of one of some batches; returns its mean loss and number of right answers, (2,)."""
        with self.autocast():
            logits = self.model(images)
        loss = self.loss_fn(logits.float(), targets)
        if self.distillation is not None:
            loss = self.distillation(loss, logits, images)
        if self.scaler is None:
            (loss / batches).backward(create_graph=self.create_graph)
        else:
            # After the last batch it takes the optimizer's step too.
            self.scaler(
                loss / batches, self.optimizer, clip_grad=self.clip_grad, clip_mode=self.clip_mode,
                parameters=self.parameters, create_graph=self.create_graph, need_update=last)
        return torch.stack((loss.detach(), _count_right(logits.detach(), targets)))


def _count_right(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Number of right answers, as a float; of a mixed image the class of the larger part is the right one."""
    targets = targets.argmax(dim=1) if targets.is_floating_point() else targets
    return (logits.argmax(dim=1) == targets).sum().float()


def autocast_factory(args: argparse.Namespace, device: torch.device) -> Callable:
    """What makes the context of a forward pass, from `--amp` and `--amp-dtype`."""
    if not args.amp:
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=getattr(torch, args.amp_dtype))


def _logits(model: nn.Module, batches: Iterable[Batch], autocast: Callable) -> Iterable[Batch]:
    """Each batch's float32 logits and targets."""
    model.eval()
    for images, targets in batches:
        with torch.inference_mode(), autocast():
            logits = model(images)
        yield logits.float(), targets


def evaluate(
        model: nn.Module,
        batches: Iterable[Batch],
        autocast: Callable = nullcontext,
        reduce: Callable[[torch.Tensor], torch.Tensor] = lambda total: total,
        after_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Cross entropy, top-1 and top-5 accuracy in percent.

    Args:
        model: Classifier; left in evaluation mode.
        batches: Images and class indices.
        autocast: Makes the context of the forward pass.
        reduce: Adds a tensor up over processes that each evaluate a part.
        after_batch: Called after each batch; may raise to stop.

    Returns:
        loss, top1 and top5.
    """
    totals = []
    for logits, targets in _logits(model, batches, autocast):
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        loss = nn.functional.cross_entropy(logits, targets, reduction='sum')
        count = torch.full_like(loss, len(targets))
        totals.append(torch.stack((loss, hits[:, 0].sum(), hits.sum(), count)))
        after_batch()
    # Added up on the CPU: not every device has float64.
    # Where there are fewer images than processes, some have none.
    total = torch.stack(totals).cpu().double().sum(0) if totals else torch.zeros(4, dtype=torch.float64)
    loss, top1, top5, count = reduce(total).tolist()
    return dict(loss=loss / count, top1=100. * top1 / count, top5=100. * top5 / count)


def predict(
        model: nn.Module,
        batches: Iterable[Batch],
        autocast: Callable = nullcontext,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All (N, C) float32 logits and (N,) targets, on the CPU; the model is left in evaluation mode."""
    outputs = [(logits.cpu(), targets.cpu()) for logits, targets in _logits(model, batches, autocast)]
    return torch.cat([logits for logits, _ in outputs]), torch.cat([targets for _, targets in outputs])


def top_accuracies(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """top1 and top5 in percent, with four decimals, of (N, C) logits and (N,) class indices."""
    top1, top5 = accuracy(logits, targets, topk=(1, 5))
    return dict(top1=round(top1.item(), 4), top5=round(top5.item(), 4))
