"""`python -m timm_dense2net models`: the registered models with their sizes, as the README's table."""
from __future__ import annotations

import argparse
import sys

import timm

from .counts import count_macs, count_params

__all__ = ['model_table', 'main']


def model_table(module: str = 'dense2net') -> str:
    """Markdown table of the models of one module: parameters, MACs of one image at the cfg's size, weight tags."""
    lines = ['| model | input | classes | parameters | MACs (M) | weights |', '|---|---|---|---|---|---|']
    for name in timm.list_models(module=module):
        model = timm.create_model(name, device='meta')
        size = model.pretrained_cfg['input_size']
        tags = [f'`.{n.split(".", 1)[1]}`' for n in timm.list_pretrained(f'{name}.*')]
        lines.append(
            f'| `{name}` | {"x".join(map(str, size))} | {model.num_classes} | {count_params(model):,} '
            f'| {count_macs(model, size) / 1e6:,.0f} | {", ".join(tags)} |')
    return '\n'.join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m timm_dense2net models',
        description='Print the registered models with their sizes, as Markdown.')
    parser.add_argument('--module', default='dense2net', help='dense2net, or any module of timm (%(default)s)')
    args = parser.parse_args(argv)
    if args.module not in timm.list_modules():
        print(f"error: no models come from a module '{args.module}'; timm.list_modules() names them", file=sys.stderr)
        return 2
    try:
        print(model_table(args.module))
    except ValueError as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    return 0
