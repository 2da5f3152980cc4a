"""The network in the plain code of the slides: the yardstick of speed and memory, not a part of the package.

``Bottleneck`` is the slides' own for their best row, without its switches; what the slides name and do not show (the
Res2Net block, the network around it) is written as plainly: one module call after another, one concatenation a layer,
no fused operation, no preallocated buffer. No import from ``timm_dense2net``.
"""
from typing import Dict, List

import torch
import torch.nn as nn
import torch.nn.functional as F

GROWTH_RATE = 32
BLOCK_CONFIG = 6, 12, 24, 16
NUM_CLASSES = 100


class Res2NetBlock(nn.Module):
    """y_1 = x_1, y_i = K_i(x_i + y_{i-1}), concatenated."""

    def __init__(self, planes: int, scale: int) -> None:
        super().__init__()
        width = planes // scale
        self.scale = scale
        self.convs = nn.ModuleList([
            nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False) for _ in range(scale - 1)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(width) for _ in range(scale - 1)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        xs = torch.chunk(x, self.scale, 1)
        ys = [xs[0]]
        for i in range(1, self.scale):
            ys.append(F.relu(self.norms[i - 1](self.convs[i - 1](xs[i] + ys[i - 1]))))
        return torch.cat(ys, 1)


class Bottleneck(nn.Module):
    """Dense layer as on the slide 'Implementation'."""

    def __init__(self, in_planes: int, scale: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, 4 * GROWTH_RATE, kernel_size=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * GROWTH_RATE)
        self.conv2 = Res2NetBlock(4 * GROWTH_RATE, scale)
        self.conv3 = nn.Conv2d(4 * GROWTH_RATE, GROWTH_RATE, kernel_size=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        out = self.conv3(out)
        out = torch.cat([out, x], 1)
        return out


class Transition(nn.Module):
    def __init__(self, in_planes: int, out_planes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_planes)
        self.conv = nn.Conv2d(in_planes, out_planes, kernel_size=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class PlainDense2Net(nn.Module):
    """Dense2Net-121 for small images: (N, 3, H, W) -> (N, 100)."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        planes = 2 * GROWTH_RATE
        self.conv1 = nn.Conv2d(3, planes, kernel_size=3, padding=1, bias=False)
        blocks, transitions = [], []
        for i, num_layers in enumerate(BLOCK_CONFIG):
            layers = []
            for _ in range(num_layers):
                layers.append(Bottleneck(planes, scale))
                planes += GROWTH_RATE
            blocks.append(nn.Sequential(*layers))
            if i < len(BLOCK_CONFIG) - 1:
                transitions.append(Transition(planes, planes // 2))
                planes //= 2
        self.blocks = nn.ModuleList(blocks)
        self.transitions = nn.ModuleList(transitions)
        self.bn = nn.BatchNorm2d(planes)
        self.linear = nn.Linear(planes, NUM_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.conv1(x)
        for i, block in enumerate(self.blocks):
            out = block(out)
            if i < len(self.transitions):
                out = self.transitions[i](out)
        out = F.adaptive_avg_pool2d(F.relu(self.bn(out)), 1).flatten(1)
        return self.linear(out)

    def load_from_dense2net(self, state: Dict[str, torch.Tensor]) -> None:
        """Take the weights of a ``timm_dense2net`` model of the same shape.

        The slides put a layer's new features first, ``timm_dense2net`` last as DenseNet does, so the channels that
        read a concatenation are reordered.
        """
        start = 2 * GROWTH_RATE
        own = {'conv1.weight': state['features.conv0.weight'], 'linear.weight': state['classifier.weight'],
               'linear.bias': state['classifier.bias']}

        def take_norm(target: str, source: str, order: List[int]) -> None:
            for name in ('weight', 'bias', 'running_mean', 'running_var'):
                own[f'{target}.{name}'] = state[f'{source}.{name}'][order]
            own[f'{target}.num_batches_tracked'] = state[f'{source}.num_batches_tracked']

        for b, num_layers in enumerate(BLOCK_CONFIG):
            order = list(range(start))
            for i in range(num_layers):
                target, source = f'blocks.{b}.{i}', f'features.denseblock{b + 1}.denselayer{i + 1}'
                take_norm(f'{target}.bn1', f'{source}.norm1', order)
                own[f'{target}.conv1.weight'] = state[f'{source}.conv1.weight'][:, order]
                take_norm(f'{target}.bn2', f'{source}.norm2', list(range(4 * GROWTH_RATE)))
                for name, value in state.items():
                    if name.startswith((f'{source}.conv2.', f'{source}.conv3.')):
                        own[target + name.removeprefix(source)] = value
                order = list(range(len(order), len(order) + GROWTH_RATE)) + order
            if b < len(self.transitions):
                source = f'features.transition{b + 1}'
                take_norm(f'transitions.{b}.bn', f'{source}.norm', order)
                own[f'transitions.{b}.conv.weight'] = state[f'{source}.conv.weight'][:, order]
                start = len(order) // 2
            else:
                take_norm('bn', 'features.norm5', order)
                # The linear layer reads the norm's output, in the slides' order.
                own['linear.weight'] = own['linear.weight'][:, order]
        self.load_state_dict(own)
