"""A training step's forward and backward pass as a CUDA graph.

A pass through these nets is thousands of small kernels, which a GPU finishes faster than the host launches them one by
one. Captured once, they are launched all together (https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""
from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn

__all__ = ['WARM_UP_CALLS', 'CapturedPass']

# Calls before the capture: cuDNN tries its algorithms and libraries allocate in them, which a graph cannot hold.
WARM_UP_CALLS = 3


class CapturedPass:
    """Replays what a function of one batch does to the gradients, as long as batches of the same shape come.

    The first calls for a shape run the function itself, as steps like all others; the next one is captured. A batch of
    another shape begins anew.

    Args:
        run: Takes images and targets, adds to the parameters' gradients, which are None before each call, and returns
            a tensor.
        parameters: The parameters whose gradients it makes.
    """

    def __init__(self, run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], parameters: Sequence[nn.Parameter]):
        self.run = run
        self.parameters = parameters
        self._forget(())

    def _forget(self, kind: tuple) -> None:
        self._kind = kind
        self._calls = 0
        self._stream = self._graph = self._inputs = self._output = None
        self._gradients: list[torch.Tensor | None] = []

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """What the function returns for a batch; overwritten by the next call."""
        kind = tuple((t.shape, t.stride(), t.dtype) for t in (images, targets))
        if kind != self._kind:
            self._forget(kind)
        self._calls += 1
        if self._calls <= WARM_UP_CALLS:
            return self._run_on_other_stream(images, targets)
        if self._graph is None:
            self._capture(images, targets)
        else:
            for place, tensor in zip(self._inputs, (images, targets)):
                place.copy_(tensor)
        self._graph.replay()
        # The optimizer's step is no part of the graph, and whoever takes it may let go of the gradients.
        for parameter, gradient in zip(self.parameters, self._gradients):
            parameter.grad = gradient
        return self._output

    def _run_on_other_stream(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # A capture cannot be on the current stream, and autograd and cuBLAS must be prepared for the one it is on.
        if self._stream is None:
            self._stream = torch.cuda.Stream(images.device)
        current = torch.cuda.current_stream(images.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            output = self.run(images, targets)
        current.wait_stream(self._stream)
        return output

    def _capture(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        self._inputs = images.clone(), targets.clone()
        # Garbage whose destruction waits for the device would end the capture.
        gc.collect()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may go on with copies meanwhile.
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode='thread_local'):
            self._output = self.run(*self._inputs)
        self._gradients = [parameter.grad for parameter in self.parameters]
