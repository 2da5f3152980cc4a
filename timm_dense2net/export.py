"""`python -m timm_dense2net export`: a model as a file that runs without this package.

    export --model dense2net40_k12_s4 --output dense2net40_k12_s4.onnx                 for ONNX Runtime and others
    export --checkpoint output/RUN --format torch-export --fuse --output model.pt2     for PyTorch alone

Both take float32 images (batch, channels, height, width), normalized, of any batch and image size, and give logits
(batch, classes). The file carries what a caller has to know: classes, mean, std, size. It is read back and held to the
model's own logits before it gets its name.
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from timm.utils import reparameterize_model
from tqdm import tqdm

from .errors import one_line
from .files import output_file, replace_file, sha256_of
from .trained import TrainedModel, load_trained
from .version import __version__

__all__ = ['ExportError', 'export_model', 'main']

METADATA_FILE = 'metadata.json'  # inside a .pt2 archive

# Largest difference of logits that is let through, relative to the largest logit; float32 sums in another order differ
# by some 1e-6.
TOLERANCE = 1e-4

_ONNX_PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')
_SPEED_BATCHES = (1, 8)
_SPEED_ROUNDS = 9

Forward = Callable[[torch.Tensor], torch.Tensor]


class ExportError(ValueError):
    """A model that cannot be exported, or whose export does not compute what it does."""


class Parity(NamedTuple):
    """Largest difference of logits between the file and the model on random images of one shape (N, C, H, W)."""
    shape: tuple[int, ...]
    difference: float


def model_metadata(trained: TrainedModel, fused: bool) -> dict[str, Any]:
    """What a caller of the exported file has to know, under the names that safetensors files of runs use."""
    config = trained.data_config
    keys = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
    return {
        'model': trained.metadata.get('model') or trained.model.pretrained_cfg['architecture'],
        **{key: config[key] for key in keys},
        **({'class_names': trained.class_names} if trained.class_names else {}),
        'fused': fused,
        'timm_dense2net': __version__,
    }


def _write_onnx(model: nn.Module, images: torch.Tensor, path: Path, metadata: dict[str, Any]) -> None:
    import onnx

    program = torch.onnx.export(
        model, (images,), dynamo=True, external_data=False, verbose=False,
        dynamic_shapes=({0: 'batch', 2: 'height', 3: 'width'},), input_names=['images'], output_names=['logits'])
    program.model.metadata_props.update(
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()})
    program.save(path)
    onnx.checker.check_model(str(path), full_check=True)


def _read_onnx(path: Path) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run(['logits'], {'images': images.numpy()})[0])


def _write_torch_export(model: nn.Module, images: torch.Tensor, path: Path, metadata: dict[str, Any]) -> None:
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        model, (images,), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},), strict=False)
    program.example_inputs = None  # they would be the one pickle in the archive
    torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(metadata)})


def _read_torch_export(path: Path) -> Forward:
    return torch.export.load(path).module()


class Format(NamedTuple):
    """A file format: its suffix, what runs it, and how it is written and read."""
    suffix: str
    runtime: str
    write: Callable[[nn.Module, torch.Tensor, Path, dict[str, Any]], None]
    read: Callable[[Path], Forward]


FORMATS = {
    'onnx': Format('.onnx', 'ONNX Runtime', _write_onnx, _read_onnx),
    'torch-export': Format('.pt2', 'torch.export', _write_torch_export, _read_torch_export),
}


def _parity_shapes(input_size: tuple[int, int, int], smallest: int) -> list[tuple[int, ...]]:
    """Shapes to compare on: the model's own, other batch sizes, smaller, larger, odd and not square."""
    channels, height, width = input_size
    return [
        (1, channels, height, width),
        (5, channels, height, width),
        (1, channels, max(3 * height // 4, min(height, smallest)), width),
        (2, channels, height + 1, 2 * width - 1),
    ]


def check_parity(
        expected: Forward,
        actual: Forward,
        input_size: tuple[int, int, int],
        smallest: int = 0,
) -> Iterator[Parity]:
    """Compares two forms of a model on random images of several shapes, of at least ``smallest`` pixels a side.

    Raises:
        ExportError: If their logits differ by more than `TOLERANCE` times the largest, or are no numbers, or if the
            second form does not take a shape. torch.export's fused form does not, where maps of one pixel arise.
    """
    generator = torch.Generator().manual_seed(0)
    for shape in _parity_shapes(input_size, smallest):
        images = torch.randn(shape, generator=generator)
        try:
            reference = expected(images)
        except ValueError:  # too small for the model itself
            continue
        if not reference.isfinite().all():
            raise ExportError(
                f'the PyTorch model gives logits that are not finite for images of shape {_times(shape)}: no file was'
                ' written')
        try:
            logits = actual(images)
        except Exception as e:  # ONNX Runtime's errors have no other class in common
            raise ExportError(
                f'the exported model does not take images of shape {_times(shape)}, which the PyTorch model does: '
                f'{one_line(e)}; no file was written') from e
        difference = (logits - reference).abs().max().item()
        allowed = TOLERANCE * reference.abs().max().item()
        if not difference <= allowed:  # also where it is not a number
            raise ExportError(
                f'the exported model differs from the PyTorch model by {difference:.3g} on images of shape '
                f'{_times(shape)} (at most {allowed:.3g} is let through): no file was written')
        yield Parity(shape, difference)


@torch.no_grad()
def export_model(trained: TrainedModel, output: Path, file_format: str, fuse: bool = False) -> list[Parity]:
    """Writes a model to a file, reads it back and compares it with the model; the file appears only if they agree.

    Args:
        trained: The model, on the CPU.
        output: File to write, `.onnx` or `.pt2` as the format has it.
        file_format: `onnx` or `torch-export`.
        fuse: Fold the norms into the convolutions first (`timm.utils.reparameterize_model`).

    Returns:
        The difference for every shape that was compared.

    Raises:
        ExportError: If the model cannot be exported or the file's logits are not the model's.
    """
    kind = FORMATS[file_format]
    if output.suffix != kind.suffix:
        raise ExportError(f"{output}: files of --format {file_format} end in '{kind.suffix}'")
    if not output.parent.is_dir():
        raise ExportError(f'{output}: there is no folder {output.parent}')
    if file_format == 'onnx':
        missing = [name for name in _ONNX_PACKAGES if find_spec(name) is None]
        if missing:
            raise ExportError(f"{', '.join(missing)} not installed (pip install -e '.[export]')")
    if trained.model.pretrained_cfg.get('fixed_input_size'):
        raise ExportError(f'{trained.name} takes images of one size only, and the files written here take any')
    channels, height, width = trained.data_config['input_size']
    # All three sizes differ from 1 and from each other: sizes that are equal in the example are taken for one.
    images = torch.zeros(2, channels, height + height // 8, width + width // 4)
    model = reparameterize_model(trained.model) if fuse else trained.model
    fused = [type(module) for module in model.modules()] != [type(module) for module in trained.model.modules()]
    with replace_file(output) as temporary:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # the exporters' notes on their own insides
                kind.write(model, images, temporary, model_metadata(trained, fused))
        except (RuntimeError, ValueError) as e:
            raise ExportError(f'{trained.name} cannot be exported: {one_line(e)}') from e
        # torch.export's form of a fused net takes no images whose last map is of one pixel.
        smallest = 2 * getattr(trained.model, 'min_size', 0) + 3
        return list(check_parity(trained.model, kind.read(temporary), (channels, height, width), smallest))


@torch.no_grad()
def measure_speed(forms: dict[str, Forward], input_size: tuple[int, int, int]) -> dict[int, dict[str, float]]:
    """Median seconds a batch on the CPU, by batch size and form; the forms take turns within every round."""
    medians = {}
    for batch in _SPEED_BATCHES:
        images = torch.randn(batch, *input_size)
        times = {name: [] for name in forms}
        for _ in tqdm(range(_SPEED_ROUNDS + 1), desc=f'batches of {batch}', leave=False, disable=None):
            for name, forward in forms.items():
                start = time.perf_counter()
                forward(images)
                times[name].append(time.perf_counter() - start)
        # The first round sets up buffers and is not counted.
        medians[batch] = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    return medians


def format_speed(medians: dict[int, dict[str, float]]) -> str:
    """One line a batch size: milliseconds of every form, and those of each other form over those of the last."""
    names = list(next(iter(medians.values())))
    lines = ['batch  ' + '  '.join(f'{name:>18}' for name in names)]
    for batch, row in medians.items():
        last = row[names[-1]]
        cells = [f'{1000 * row[name]:.2f} ms ({row[name] / last:.2f}x)' for name in names]
        lines.append(f'{batch:>5}  ' + '  '.join(f'{cell:>18}' for cell in cells))
    return '\n'.join(lines)


def _times(shape: tuple[int, ...]) -> str:
    return 'x'.join(map(str, shape))


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m timm_dense2net export', description='Write a model as a file that runs without this package.')
    source = parser.add_argument_group('what to export (one of the two, or a checkpoint and the model it is of)')
    source.add_argument('--model', metavar='NAME', help='timm model name with weights, hf-hub: or local-dir: name')
    source.add_argument('--checkpoint', metavar='PATH', help=(
        "run folder, safetensors file or checkpoint of timm's train.py"))
    parser.add_argument('--format', choices=FORMATS, default='onnx', help='(%(default)s)')
    parser.add_argument('--fuse', action='store_true', help=(
        'fold the norms into the convolutions first: faster with torch.export, not with ONNX Runtime'))
    parser.add_argument('--output', type=output_file, required=True, metavar='FILE', help=(
        'file to write, .onnx or .pt2'))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0, 1 where the export fails, 2 where the model cannot be used."""
    args = _build_parser().parse_args(argv)
    try:
        trained = load_trained(args.model, args.checkpoint)
    except (OSError, ValueError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    try:
        parities = export_model(trained, args.output, args.format, fuse=args.fuse)
    except (ExportError, OSError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 1
    print(f'{args.output}: {args.output.stat().st_size:,} bytes, SHA-256 {sha256_of(args.output)}')
    print('\nLargest difference of logits from the PyTorch model:')
    for parity in parities:
        print(f'  {_times(parity.shape):<14} {parity.difference:.1e}')
    kind = FORMATS[args.format]
    forms = {
        'PyTorch': trained.model, 'PyTorch fused': reparameterize_model(trained.model),
        kind.runtime: kind.read(args.output)}
    medians = measure_speed(forms, trained.data_config['input_size'])
    threads = torch.get_num_threads()
    print(f'\nMedian time a batch on the CPU, {threads} thread{"s" if threads > 1 else ""} '
          f'(and times that of {kind.runtime}):')
    print(format_speed(medians))
    return 0
