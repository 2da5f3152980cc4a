"""`python -m timm_dense2net demo`: a page that classifies pictures and shows where the net looked.

    demo                                    packaged weights, at http://127.0.0.1:7860
    demo --checkpoint output/RUN            and a run of one's own

Nothing is fetched from elsewhere. A Hugging Face Space needs one line: `build_demo().launch(max_file_size='64mb')`.
"""
from __future__ import annotations

import argparse
import functools
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image, ImageOps
from timm.data import create_transform

from .cam import class_activation_maps
from .dense2net import DenseBlock
from .drawings import DRAWINGS
from .errors import one_line
from .files import replace_file
from .packaged import BEST_PACKAGED
from .pictures import read_picture
from .trained import TrainedModel, load_trained

__all__ = ['build_demo', 'explain', 'main']

_VIEW_SIZE = 288  # of the maps, in pixels
_TOPK = 5
_MAX_UPLOAD = '64mb'
_MAX_SIDE = 1024  # of a JPEG picture, roughly: larger ones are decoded at a fraction of their size

# Galleries as high as what is in them.
# Two maps a row on a telephone, where four would be cut off, with their captions.
_STYLE = '''
.maps .grid-wrap { max-height: none; min-height: 0; height: auto; overflow: visible }
@media (max-width: 700px) { .maps .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important } }
.maps .caption-label { max-width: 100%; white-space: normal; overflow: visible }
'''

_INTRODUCTION = '''\
# Dense2Net
What is in the picture, and where the net found it. A dense layer passes its channels through a hierarchy of 3x3
convolutions: the first split passes untouched, every further one has seen two pixels more. A map's caption tells how
much its split has seen, and its share of the whole.
'''


def overlay(view: Image.Image, activation: torch.Tensor) -> Image.Image:
    """A map (H, W) as heat on the picture in grey: dark red for little, pale yellow for the most."""
    scaled = (activation / activation.max().clamp(min=1e-12) * 255).round().to(torch.uint8)
    heat = Image.fromarray(scaled.numpy()).resize(view.size, Image.Resampling.BICUBIC)
    colours = ImageOps.colorize(heat, black='#5b0f1a', mid='#f0541e', white='#fff3a3')
    grey = ImageOps.grayscale(view).convert('RGB')
    return Image.composite(colours, grey, heat.point(lambda value: min(210, 2 * value)))


def explain(
        trained: TrainedModel,
        picture: Image.Image,
) -> tuple[dict[str, float], list[tuple[Image.Image, str]], list[tuple[Image.Image, str]]]:
    """Classifies a picture and draws where the most likely class was found.

    Returns:
        Probability by class name, most likely first; pictures with captions, one for each scale of the hierarchy, and
        one for each dense block.
    """
    config = trained.data_config
    image = create_transform(**config, is_training=False)(picture)[None]
    with torch.no_grad():
        top = trained.model(image)[0].softmax(0).topk(min(_TOPK, trained.model.num_classes))
    indices = top.indices.tolist()
    names = [trained.class_name(index) for index in indices]
    spaced = [name.replace('_', ' ') for name in names]
    labels = dict(zip(spaced if len(set(spaced)) == len(names) else names, top.values.tolist()))

    # What the net sees of the picture, large enough to look at.
    size = config['input_size'][1:]
    view_size = tuple(round(_VIEW_SIZE * side / max(size)) for side in size)
    view_config = dict(config, input_size=(3, *view_size), mean=(0., 0., 0.), std=(1., 1., 1.))
    view = create_transform(**view_config, is_training=False)(picture)
    view = Image.fromarray((view.permute(1, 2, 0) * 255).round().clamp(0, 255).to(torch.uint8).numpy())
    maps = class_activation_maps(trained.model, image, indices[0])
    total = sum(m.sum().item() for m in maps.by_scale) or 1.
    by_scale = [
        (overlay(view, m), f'split {i + 1}: {2 * i + 1}x{2 * i + 1} pixels, {100 * m.sum().item() / total:.0f} %')
        for i, m in enumerate(maps.by_scale)]
    by_block = [(overlay(view, m), f'dense block {i + 1}') for i, m in enumerate(maps.by_block)]
    return labels, by_scale, by_block


def _draw_examples(folder: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in DRAWINGS.items():
        paths.append(str(folder / f'{name}.png'))
        with replace_file(paths[-1]) as temporary:
            draw().save(temporary)
    return paths


def _check_can_be_shown(path: str | Path, trained: TrainedModel) -> None:
    if not any(isinstance(module, DenseBlock) for module in trained.model.modules()):
        raise ValueError(f'{path}: expected a run of a Dense2Net or DenseNet of this package')
    if trained.data_config['input_size'][0] != 3:
        raise ValueError(f'{path}: expected a net for pictures in colour, of 3 channels')


def build_demo(checkpoints: Sequence[str | Path] = ()) -> Any:
    """Builds the page as a `gradio.Blocks`; `.launch()` serves it.

    Args:
        checkpoints: Run folders, safetensors files or checkpoints of timm's train.py, to offer beside the packaged
            weights.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If a checkpoint cannot be used.
        ImportError: If gradio is not installed.
    """
    # Read when gradio is imported: it would report each start to its makers.
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
    import gradio as gr

    def preprocess(payload: Any) -> Image.Image | None:
        if payload is None or not payload.path:
            return None
        try:
            return read_picture(payload.path, size=_MAX_SIDE)
        except ValueError as e:
            raise gr.Error(f'This file cannot be used: {e}.', title='No result', print_exception=False) from e

    load = functools.lru_cache(maxsize=4)(load_trained)
    sources = {str(path): (None, str(path)) for path in checkpoints}
    sources.update((name, (name, None)) for name in timm.list_models(module='dense2net', pretrained=True))
    first = str(checkpoints[0]) if checkpoints else BEST_PACKAGED
    for path in checkpoints:
        _check_can_be_shown(path, load(None, str(path)))  # a mistake shows now and not in the page

    def classify(picture: Image.Image | None, name: str) -> tuple[Any, ...]:
        return explain(load(*sources[name]), picture) if picture is not None else (None, None, None)

    with gr.Blocks(title='Dense2Net', analytics_enabled=False) as demo:
        gr.HTML(f'<style>{_STYLE}</style>', padding=False)
        gr.Markdown(_INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=2):
                picture = gr.Image(label='Picture', sources=['upload', 'clipboard'], height=300, elem_id='picture')
                # For our own words about a file that is no picture. gradio writes a .pyi file beside every subclass.
                picture.preprocess = preprocess
                model = gr.Dropdown(list(sources), value=first, label='Model', elem_id='model')
                gr.Examples(_draw_examples(Path(demo.GRADIO_CACHE) / 'dense2net_drawings'), picture, label='Drawings')
            with gr.Column(scale=3):
                labels = gr.Label(label='Top 5', num_top_classes=_TOPK, elem_id='classes')
        settings = dict(
            show_label=False, columns=4, fit_columns=False, object_fit='contain', interactive=False, buttons=[])
        gr.Markdown('### Where it looked: each scale of the hierarchy, all layers together')
        by_scale = gr.Gallery(elem_id='by_scale', elem_classes='maps', **settings)
        gr.Markdown('### Where it looked: each dense block, fine to coarse')
        by_block = gr.Gallery(elem_id='by_block', elem_classes='maps', **settings)
        gr.on(
            [picture.change, model.change], classify, [picture, model], [labels, by_scale, by_block],
            api_name='classify')
    return demo


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m timm_dense2net demo', description='Serve a page that classifies pictures.')
    parser.add_argument('--checkpoint', nargs='+', default=(), metavar='PATH', help=(
        "run folders, safetensors files or checkpoints of timm's train.py to offer as well"))
    parser.add_argument('--host', default='127.0.0.1', metavar='ADDRESS', help='address to serve at (%(default)s)')
    parser.add_argument('--port', type=int, default=7860, help='(%(default)s)')
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command until it is interrupted; returns 0, or 2 where the page cannot be served."""
    parser = _build_parser()
    args = parser.parse_args(argv)
    if not 1 <= args.port <= 65535:
        parser.error(f'--port must be from 1 to 65535, got {args.port}')
    try:
        socket.getaddrinfo(args.host, args.port)
    except OSError as e:
        parser.error(f'--host {args.host}: no such address ({e.strerror})')
    try:
        demo = build_demo(args.checkpoint)
    except ImportError:
        print("error: gradio is not installed (pip install -e '.[demo]')", file=sys.stderr)
        return 2
    except (OSError, ValueError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    try:
        demo.launch(
            server_name=args.host, server_port=args.port, share=False, ssr_mode=False,
            max_file_size=_MAX_UPLOAD)
    except OSError as e:
        print(f'error: cannot serve at {args.host}:{args.port}, which may be taken: try another --port ({one_line(e)})',
              file=sys.stderr)
        return 2
    return 0
