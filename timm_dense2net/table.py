"""The slides' table of other networks on CIFAR-100, with this package's counts beside it.

    python -m timm_dense2net table
"""
from __future__ import annotations

import argparse
from dataclasses import dataclass

import timm

from .counts import count_macs, count_params
from .deck import TABLE

__all__ = ['ModelSize', 'measure', 'main']


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
