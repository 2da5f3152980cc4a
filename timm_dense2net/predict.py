"""`python -m timm_dense2net predict`: the classes of pictures.

    predict cat.jpg pictures/ 'more/**/*.png'                        with packaged weights
    predict pictures --checkpoint output/RUN --format csv            with one's own
    find . -name '*.jpg' | python -m timm_dense2net predict -        paths, or one picture, from standard input
"""
from __future__ import annotations

import argparse
import csv
import glob
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform
from tqdm import tqdm

from .distributed import find_device
from .files import output_file, write_text
from .names import option
from .packaged import BEST_PACKAGED
from .pictures import EXTENSIONS, read_picture
from .trained import TrainedModel, load_trained

__all__ = ['Prediction', 'find_images', 'predict_images', 'main']


class Source(NamedTuple):
    """A picture to be read: its name, and its bytes where it is no file. `error` says why there is none."""
    name: str
    data: bytes | None = None
    error: str | None = None


class Prediction(NamedTuple):
    """The most likely classes of a picture, or why there are none.

    Args:
        image: Name of the picture.
        classes: Class index, name and probability, most likely first.
        error: What is wrong with the picture.
    """
    image: str
    classes: tuple[tuple[int, str, float], ...] = ()
    error: str | None = None


def find_images(arguments: Iterable[str]) -> Iterator[Source]:
    """Finds the pictures that arguments name, in their order; a folder's in alphabetical order.

    Args:
        arguments: Files, folders (searched with all folders below), glob patterns (`**` for any depth), or `-` for
            what stands on standard input: one picture, or paths in UTF-8, one a line.
    """
    for argument in arguments:
        if argument == '-':
            yield from _from_stdin(sys.stdin.buffer.read())
        elif os.path.isdir(argument):
            # A link to a picture that is gone is one that cannot be read.
            found = sorted(
                path for path in Path(argument).rglob('*')
                if path.suffix.lower() in EXTENSIONS and (path.is_file() or not path.exists()))
            yield from (Source(str(path)) for path in found)
            if not found:
                yield Source(argument, error='no picture in this folder')
        elif os.path.exists(argument) or not glob.has_magic(argument):
            yield Source(argument)
        else:
            found = sorted(path for path in glob.glob(argument, recursive=True) if os.path.isfile(path))
            yield from (Source(path) for path in found)
            if not found:
                yield Source(argument, error='no file matches this pattern')


def _is_picture(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data)).close()
    except UnidentifiedImageError:
        return False
    except Image.DecompressionBombError:
        return True
    except Exception:  # of a damaged header, or of paths that begin as a picture does ('P5 scans/1.png')
        return not data.isascii()
    return True


def _decode(data: bytes) -> str | None:
    try:
        return data.decode('utf-8')
    except UnicodeDecodeError:
        return None


def _from_stdin(data: bytes) -> Iterator[Source]:
    text = None if _is_picture(data) else _decode(data)
    if text is None:
        yield Source('-', data)
        return
    lines = [line.removesuffix('\r') for line in text.split('\n')]
    paths = [line for line in lines if line.strip()]
    yield from (Source(path) for path in paths)
    if not paths:
        yield Source('-', error='standard input is empty')


def _read(source: Source, transform: Callable[[Image.Image], torch.Tensor], mode: str) -> torch.Tensor | str:
    """The picture as the model takes it, or what is wrong with it."""
    if source.error is not None:
        return source.error
    try:
        return transform(read_picture(source.name if source.data is None else io.BytesIO(source.data), mode))
    except ValueError as e:
        return str(e)


@torch.inference_mode()
def predict_images(
        trained: TrainedModel,
        sources: Sequence[Source],
        *,
        topk: int = 5,
        batch_size: int = 64,
        device: torch.device | str = 'cpu',
) -> Iterator[Prediction]:
    """Classifies pictures in batches, as timm prepares them for evaluation; one prediction a picture, in order.

    Args:
        trained: The model; it is moved to `device`.
        sources: Pictures, from `find_images`.
        topk: Number of classes a picture, at most as many as there are.
        batch_size: Pictures at a time.
        device: Device to run on.

    Raises:
        ValueError: If the model takes pictures neither grey nor in colour, or a probability is not finite.
    """
    channels = trained.data_config['input_size'][0]
    if channels not in (1, 3):
        raise ValueError(f'{trained.name} takes images of {channels} channels: pictures have 3, grey ones 1')
    model = trained.model.to(device)
    transform = create_transform(**trained.data_config, is_training=False)
    mode = 'L' if channels == 1 else 'RGB'
    topk = min(topk, model.num_classes)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(sources), batch_size):
            batch = sources[start:start + batch_size]
            tensors = list(pool.map(lambda source: _read(source, transform, mode), batch))
            good = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
            rows = iter(())
            if good:
                probabilities, indices = model(torch.stack(good).to(device)).float().softmax(dim=1).topk(topk, dim=1)
                if not probabilities.isfinite().all():
                    raise ValueError(f'{trained.name}: probabilities are not finite')
                rows = zip(indices.tolist(), probabilities.tolist())
            for source, tensor in zip(batch, tensors):
                if isinstance(tensor, str):
                    yield Prediction(source.name, error=tensor)
                else:
                    classes = tuple((index, trained.class_name(index), value) for index, value in zip(*next(rows)))
                    yield Prediction(source.name, classes)


def format_table(predictions: Sequence[Prediction]) -> str:
    """One line a picture: its name, then each class with its probability in percent."""
    width = max((len(prediction.image) for prediction in predictions), default=0)
    cells = max((len(name) for prediction in predictions for _, name, _ in prediction.classes), default=0)
    lines = [
        f'{prediction.image:<{width}}  '
        + '  '.join(f'{name:<{cells}} {100 * value:5.1f} %' for _, name, value in prediction.classes)
        for prediction in predictions if prediction.error is None]
    return ''.join(f'{line}\n' for line in lines)


def format_csv(predictions: Sequence[Prediction]) -> str:
    """One line a picture and class: image, rank, class index, class, probability."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(('image', 'rank', 'class_index', 'class', 'probability'))
    for prediction in predictions:
        for rank, (index, name, value) in enumerate(prediction.classes, start=1):
            writer.writerow((prediction.image, rank, index, name, f'{value:.6f}'))
    return text.getvalue()


def format_json(predictions: Sequence[Prediction]) -> str:
    """A list of objects: image and either predictions or error."""
    text = json.dumps([_as_object(prediction) for prediction in predictions], indent=2, ensure_ascii=False)
    return _as_utf8(text) + '\n'  # a backslash and the rest is what JSON has for these, too


def _as_object(prediction: Prediction) -> dict[str, Any]:
    if prediction.error is not None:
        return dict(image=prediction.image, error=prediction.error)
    return dict(image=prediction.image, predictions=[
        {'class_index': index, 'class': name, 'probability': round(value, 6)}
        for index, name, value in prediction.classes])


def _as_utf8(text: str) -> str:
    # The names of files may be any bytes.
    return text.encode('utf-8', 'backslashreplace').decode('utf-8')


_FORMATS = dict(table=format_table, json=format_json, csv=format_csv)


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='python -m timm_dense2net predict', description='Classify pictures.')
    parser.add_argument(
        'images', nargs='+', metavar='IMAGE', help='file, folder, glob pattern, or - for standard input')
    parser.add_argument(
        '--model', metavar='NAME', help=(
            f'timm model name with weights, hf-hub: or local-dir: name ({BEST_PACKAGED})'))
    parser.add_argument('--checkpoint', metavar='PATH', help=(
        "run folder, safetensors file or checkpoint of timm's train.py"))
    parser.add_argument('--topk', type=int, default=5, metavar='K', help='classes a picture (%(default)s)')
    parser.add_argument('--format', choices=_FORMATS, default='table', help='(%(default)s)')
    parser.add_argument('--output', type=output_file, metavar='FILE', help='write there and not to the screen')
    parser.add_argument('-b', '--batch-size', type=int, default=64, metavar='N', help='(%(default)s)')
    parser.add_argument('--device', metavar='NAME', help='cpu, cuda, ... (cuda where there is one)')
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0, 1 where a picture could not be read, 2 where the model cannot be used."""
    parser = _build_parser()
    args = parser.parse_args(argv)
    for name in ('topk', 'batch_size'):
        if getattr(args, name) < 1:
            parser.error(f'{option(name)} must be at least 1, got {getattr(args, name)}')
    try:
        device = find_device(args.device)
        trained = load_trained(args.model or (None if args.checkpoint else BEST_PACKAGED), args.checkpoint)
        sources = list(find_images(args.images))
        predictions = list(tqdm(
            predict_images(trained, sources, topk=args.topk, batch_size=args.batch_size, device=device),
            total=len(sources), desc='predict', leave=False))
        text = _FORMATS[args.format](predictions)
        if args.output:
            write_text(args.output, text)
    except (OSError, ValueError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    if not args.output:
        sys.stdout.write(_as_utf8(text))
    bad = [prediction for prediction in predictions if prediction.error is not None]
    for prediction in bad:
        print(f'error: {prediction.image}: {prediction.error}', file=sys.stderr)
    if bad:
        print(f'{len(bad)} of {len(predictions)} pictures could not be read', file=sys.stderr)
    return 1 if bad else 0
