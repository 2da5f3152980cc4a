"""Time, memory and size of whole models: those of the slides' table at 32x32, or any of timm at any size.

    python benchmarks/table_models.py --output results/table_models
    python benchmarks/table_models.py --img-size 224 --checkpointing --output results/large_images \
        --models densenet121 res2net50_26w_4s dense2net121d_s4 dense2net121d_s8

Prints for each model the forward pass, the training step (forward, backward, SGD) and, with --checkpointing, the step
that recomputes activations: median time, and peak memory above that of the process with the model and its batch in it.
All models of one measurement take turns within every round, so that what else the machine does meets all of them; a
ratio is the median over the rounds of a model's time over the first model's in the same round. Memory is measured in a
process of its own for each model. Writes table_models.md, table_models.csv and table_models.png.
"""
import argparse
import statistics
from pathlib import Path
from typing import Any, Callable, Dict, List

import timm
import torch
import torch.nn.functional as F
from timm.models import is_model
from tqdm import tqdm

from measuring import DEVICE, in_process, machine, peak_mb_of, seconds
from timm_dense2net.counts import count_macs, count_params
from timm_dense2net.deck import TABLE
from timm_dense2net.figures import new_figure, save_figure
from timm_dense2net.files import write_csv, write_text

MODES = {'forward': 'forward pass', 'train': 'training step', 'checkpointed': 'training step, checkpointed'}
COLUMNS = ('model', 'img_size', 'params', 'macs', 'mode', 'batch', 'ms', 'ratio', 'images_per_s', 'peak_mb')


def step_of(name: str, mode: str, batch: int, img_size: int) -> Callable[[], Any]:
    """One call of what is timed, on a fixed random batch."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=100).to(DEVICE).train(mode != 'forward')
    x = torch.randn(batch, 3, img_size, img_size, device=DEVICE)
    target = torch.randint(100, (batch,), device=DEVICE)
    if mode == 'forward':
        return torch.inference_mode()(lambda: model(x))
    model.set_grad_checkpointing(mode == 'checkpointed')
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def train() -> None:
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def peak_mb(name: str, mode: str, batch: int, img_size: int) -> float:
    """Peak memory of the first call above that before it, in MiB."""
    return peak_mb_of(step_of(name, mode, batch, img_size))


def measure(mode: str, names: List[str], batch: int, img_size: int, rounds: int) -> List[Dict[str, Any]]:
    """One row a model."""
    peaks = [in_process(peak_mb, n, mode, batch, img_size) for n in tqdm(names, desc=f'{mode}: memory')]
    steps = [step_of(n, mode, batch, img_size) for n in names]
    for step in tqdm(steps, desc=f'{mode}: first call'):  # the allocator's growth is no part of a step
        step()
    times = [[seconds(step) for step in steps] for _ in tqdm(range(rounds), desc=f'{mode}: time')]
    rows = []
    for i, name in enumerate(names):
        model = timm.create_model(name, num_classes=100, device='meta')
        median = statistics.median(row[i] for row in times)
        rows.append(dict(
            model=name, img_size=img_size, params=count_params(model), macs=count_macs(model, (3, img_size, img_size)),
            mode=mode, batch=batch, ms=1e3 * median, ratio=statistics.median(row[i] / row[0] for row in times),
            images_per_s=batch / median, peak_mb=peaks[i]))
    return rows


def markdown(rows: List[Dict[str, Any]], rounds: int) -> str:
    batch, size = rows[0]['batch'], rows[0]['img_size']
    lines = [
        f'Batches of {batch} images, {size}x{size}, float32, 100 classes, on {machine()}; '
        f'medians of {rounds} interleaved rounds.',
        '',
        '| model | parameters (M) | MACs (M) | step | ms | times the first model\'s | images/s | peak MiB |',
        '|---|--:|--:|---|--:|--:|--:|--:|',
    ]
    for r in rows:
        lines.append(
            f'| `{r["model"]}` | {r["params"] / 1e6:.2f} | {r["macs"] / 1e6:,.0f} | {MODES[r["mode"]]} | {r["ms"]:.0f} '
            f'| {r["ratio"]:.2f} | {r["images_per_s"]:.1f} | {r["peak_mb"]:.0f} |')
    return '\n'.join(lines) + '\n'


def plot(rows: List[Dict[str, Any]], path: Path) -> None:
    """Time and peak memory of every model, a bar a mode."""
    modes = list(dict.fromkeys(r['mode'] for r in rows))
    names = list(dict.fromkeys(r['model'] for r in rows))
    figure = new_figure(12, 1.6 + 0.3 * len(names) * len(modes))
    if figure is None:
        return
    for axes, (column, label) in zip(figure.subplots(1, 2, sharey=True), (('ms', 'ms'), ('peak_mb', 'peak MiB'))):
        for i, mode in enumerate(modes):
            values = [r[column] for r in rows if r['mode'] == mode]
            bars = axes.barh([y + 0.8 * i / len(modes) for y in range(len(names))], values, 0.8 / len(modes),
                             align='edge', label=MODES[mode])
            axes.bar_label(bars, fmt='%.0f', padding=2, fontsize=8)
        axes.set_yticks([y + 0.4 for y in range(len(names))], names)
        axes.margins(x=0.15)
        axes.set_xlabel(f'{label}, batch {rows[0]["batch"]}, {rows[0]["img_size"]}x{rows[0]["img_size"]}')
        axes.spines[['top', 'right']].set_visible(False)
    axes.invert_yaxis()
    axes.legend(frameon=False)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', metavar='NAME', help="timm model names (those of the slides' table)",
                        default=['densenet121_cifar', *(row.model for row in TABLE), 'pyramidnet164_a84'])
    parser.add_argument('--img-size', type=int, default=32)
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--checkpointing', action='store_true', help='also the training step with checkpointing')
    parser.add_argument('--output', type=Path, default=Path('results/table_models'), help='folder to write to')
    args = parser.parse_args()
    unknown = [name for name in args.models if not is_model(name)]
    if unknown:
        parser.error(f"timm has no model '{unknown[0]}'")
    if min(args.img_size, args.batch, args.rounds) < 1:
        parser.error('--img-size, --batch and --rounds must be at least 1')
    args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for mode in list(MODES)[:3 if args.checkpointing else 2]:
        rows += measure(mode, args.models, args.batch, args.img_size, args.rounds)
        write_csv(args.output / 'table_models.csv', COLUMNS, ([row[c] for c in COLUMNS] for row in rows))
    text = markdown(rows, args.rounds)
    write_text(args.output / 'table_models.md', text)
    print(text)
    plot(rows, args.output / 'table_models.png')


if __name__ == '__main__':
    main()
