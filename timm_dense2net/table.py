"""The slides' table of other networks on CIFAR-100, with this package's counts beside it.

    python -m timm_dense2net table
"""
from __future__ import annotations

import argparse
from dataclasses import dataclass

import timm

from .counts import count_macs, count_params

__all__ = ['TableRow', 'TABLE', 'ModelSize', 'measure', 'main']


@dataclass(frozen=True)
class TableRow:
    """A row of the slides' table.

    Args:
        network: Its name there.
        model: The registered model.
        params: Parameters in millions, as printed.
        error: Top-1 error on CIFAR-100 in percent, as printed.
    """
    network: str
    model: str
    params: float
    error: float


TABLE = (
    TableRow('Wide ResNet', 'wide_resnet28_10', 36.5, 20.50),
    TableRow('ResNeXt-29, 8c x 64w (base)', 'resnext29_8x64d', 34.4, 17.90),
    TableRow('ResNeXt-29, 16c x 64w', 'resnext29_16x64d', 68.1, 17.31),
    TableRow('DenseNet-BC (k = 40)', 'densenet190_k40_cifar', 25.6, 17.18),
    TableRow('Res2NeXt-29, 6c x 24w x 4 scale', 'res2next29_6x24d_4s', 24.3, 16.98),
    TableRow('Res2NeXt-29, 8c x 25w x 4 scale', 'res2next29_8x25d_4s', 33.8, 16.93),
    TableRow('Res2NeXt-29, 6c x 24w x 6 scale', 'res2next29_6x24d_6s', 36.7, 16.79),
    TableRow('ResNeXt-29, 8c x 64w-SE', 'seresnext29_8x64d', 35.1, 16.77),
    TableRow('Res2NeXt-29, 6c x 24w x 4 scale-SE', 'seres2next29_6x24d_4s', 26.0, 16.68),
    TableRow('Res2NeXt-29, 8c x 25w x 4 scale-SE', 'seres2next29_8x25d_4s', 34.0, 16.64),
    TableRow('Res2NeXt-29, 6c x 24w x 6 scale-SE', 'seres2next29_6x24d_6s', 36.9, 16.56),
)


@dataclass(frozen=True)
class ModelSize:
    """Counts of a 32x32 model with 100 classes.

    Args:
        total: All parameters.
        trunk: Parameters without the classifier, which is what the slides' table counts.
        macs: Multiply-accumulates of one image.
    """
    total: int
    trunk: int
    macs: int


def measure(name: str) -> ModelSize:
    """Counts of a registered 32x32 model."""
    model = timm.create_model(name, device='meta')
    total, macs = count_params(model), count_macs(model, model.pretrained_cfg['input_size'])
    return ModelSize(total, total - count_params(model.get_classifier()), macs)


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns 1 if a count is not the printed one."""
    argparse.ArgumentParser(
        prog='python -m timm_dense2net table',
        description="Print the slides' table of other networks with this package's counts beside it. "
                    "The slides' counts leave the classifier out.",
    ).parse_args(argv)
    header = ('slides', 'params', 'top-1 err.', 'model', 'w/o classifier', 'all, 100 classes', 'MACs')
    line = '{:36} {:>7} {:>11}   {:24} {:>14} {:>17} {:>9}'
    print(line.format(*header))
    agree = True
    for row in TABLE:
        size = measure(row.model)
        same = f'{size.trunk / 1e6:.1f}' == f'{row.params:.1f}'
        agree = agree and same
        print(line.format(
            row.network, f'{row.params:.1f}M', f'{row.error:.2f}', row.model,
            f'{size.trunk:,}' + ('' if same else ' !'), f'{size.total:,}', f'{size.macs / 1e6:,.0f}M'))
    return 0 if agree else 1
