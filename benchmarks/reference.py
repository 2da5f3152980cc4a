"""The network in the plain code of the slides: the yardstick of speed and memory, not a part of the package.

``Bottleneck`` is the slides' own, with their globals as arguments; what the slides name and do not show (the Res2Net
block, the squeeze-and-excitation, the network around it) is written as plainly: one module call after another, one
concatenation a layer, no fused operation, no preallocated buffer. No import from ``timm_dense2net``.
"""
from typing import Dict, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F


class Res2NetBlock(nn.Module):
    """y_1 = x_1, y_i = K_i(x_i + y_{i-1}), concatenated."""

    def __init__(self, planes: int, scale: int, groups: int) -> None:
        super().__init__()
        width = planes // scale
        self.scale = scale
        self.convs = nn.ModuleList([
            nn.Conv2d(width, width, kernel_size=3, padding=1, groups=groups, bias=False) for _ in range(scale - 1)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(width) for _ in range(scale - 1)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        xs = torch.chunk(x, self.scale, 1)
        ys = [xs[0]]
        for i in range(1, self.scale):
            ys.append(F.relu(self.norms[i - 1](self.convs[i - 1](xs[i] + ys[i - 1]))))
        return torch.cat(ys, 1)


class SEBlock(nn.Module):
    """Squeeze-and-excitation with timm's defaults: a sixteenth of the channels, at least 8."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        hidden = max(8, planes // 16 // 8 * 8)
        self.fc1 = nn.Conv2d(planes, hidden, kernel_size=1)
        self.fc2 = nn.Conv2d(hidden, planes, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class Bottleneck(nn.Module):
    """Dense layer as on the slide 'Implementation'."""

    def __init__(self, in_planes: int, growth_rate: int, scale: Optional[int], groups: int, se: bool) -> None:
        super().__init__()
        self.dense2net = scale is not None
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, 4 * growth_rate, kernel_size=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth_rate)
        if self.dense2net:
            self.conv2 = Res2NetBlock(4 * growth_rate, scale, groups)
            self.conv3 = nn.Conv2d(4 * growth_rate, growth_rate, kernel_size=1, bias=False)
        else:
            self.conv2 = nn.Conv2d(4 * growth_rate, growth_rate, kernel_size=3, padding=1, bias=False)
        self.se = SEBlock(growth_rate) if se else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        if self.dense2net:
            out = self.conv3(out)
        if self.se is not None:
            out = self.se(out)
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
    """Dense2Net for small images; ``scale=None`` is the slides' DenseNet baseline.

    Shape: (N, 3, H, W) -> (N, num_classes).
    """

    def __init__(
            self,
            growth_rate: int = 32,
            block_config: Tuple[int, ...] = (6, 12, 24, 16),
            num_classes: int = 100,
            scale: Optional[int] = 4,
            groups: int = 1,
            se: bool = False,
    ) -> None:
        super().__init__()
        self.growth_rate = growth_rate
        self.block_config = block_config
        planes = 2 * growth_rate
        self.conv1 = nn.Conv2d(3, planes, kernel_size=3, padding=1, bias=False)
        blocks, transitions = [], []
        for i, num_layers in enumerate(block_config):
            layers = []
            for _ in range(num_layers):
                layers.append(Bottleneck(planes, growth_rate, scale, groups, se))
                planes += growth_rate
            blocks.append(nn.Sequential(*layers))
            if i < len(block_config) - 1:
                transitions.append(Transition(planes, planes // 2))
                planes //= 2
        self.blocks = nn.ModuleList(blocks)
        self.transitions = nn.ModuleList(transitions)
        self.bn = nn.BatchNorm2d(planes)
        self.linear = nn.Linear(planes, num_classes)

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
        growth, start = self.growth_rate, 2 * self.growth_rate
        own = {'conv1.weight': state['features.conv0.weight'], 'linear.weight': state['classifier.weight'],
               'linear.bias': state['classifier.bias']}

        def take_norm(target: str, source: str, order: List[int]) -> None:
            for name in ('weight', 'bias', 'running_mean', 'running_var'):
                own[f'{target}.{name}'] = state[f'{source}.{name}'][order]
            own[f'{target}.num_batches_tracked'] = state[f'{source}.num_batches_tracked']

        for b, num_layers in enumerate(self.block_config):
            order = list(range(start))
            for i in range(num_layers):
                target, source = f'blocks.{b}.{i}', f'features.denseblock{b + 1}.denselayer{i + 1}'
                take_norm(f'{target}.bn1', f'{source}.norm1', order)
                own[f'{target}.conv1.weight'] = state[f'{source}.conv1.weight'][:, order]
                take_norm(f'{target}.bn2', f'{source}.norm2', list(range(4 * growth)))
                for name, value in state.items():
                    for ours, theirs in (('conv2', 'conv2'), ('conv3', 'conv3'), ('attn', 'se')):
                        if name.startswith(f'{source}.{ours}.'):
                            own[f'{target}.{theirs}.{name[len(source) + len(ours) + 2:]}'] = value
                order = list(range(len(order), len(order) + growth)) + order
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
