"""How time and memory grow with batch, resolution, scale and depth: what grows faster than the work does is marked.

    python benchmarks/growth.py --output results/growth
    python benchmarks/growth.py --model dense2net40_k12_s4 --modes forward fused --max-seconds 5

Each point runs in a process of its own on a CPU (with torch's counters on a GPU). A sweep stops at the first point that
takes longer than --max-seconds or more memory than there is. Writes growth.md, growth.csv and growth.png.
"""
import argparse
import statistics
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import timm
import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from tqdm import tqdm

from measuring import DEVICE, in_process, machine, peak_mb_of, seconds
from timm_dense2net.counts import count_macs
from timm_dense2net.dense2net import Dense2Net
from timm_dense2net.figures import new_figure, save_figure
from timm_dense2net.files import write_csv, write_text

BATCHES = (1, 4, 16, 64, 256, 1024)
SIZES = (32, 64, 96, 128, 160, 224)
SCALES = (2, 4, 8)
DEPTHS = {40: (6, 6, 6), 121: (6, 12, 24, 16), 169: (6, 12, 32, 32), 201: (6, 12, 48, 32)}
# Time or memory a unit of work, over that of the point before: more than this is more than noise.
SUPERLINEAR = 1.3
COLUMNS = ['mode', 'axis', 'value', 'batch', 'size', 'gflop', 'ms', 'images_per_s', 'gflop_per_s', 'peak_mb']


def sweeps(model: str, batch: int) -> List[Tuple[str, int, int, int, Dict[str, Any]]]:
    """Axis, value, batch, image size and constructor arguments of every point."""
    points = [('batch', b, b, 32, dict(model=model)) for b in BATCHES]
    points += [('resolution', s, max(1, batch // 8), s, dict(model=model)) for s in SIZES]
    points += [('scale', s, batch, 32, dict(scale=s)) for s in SCALES]
    points += [('depth', d, batch, 32, dict(scale=8, block_config=c)) for d, c in DEPTHS.items()]
    return points


def run_point(mode: str, batch: int, size: int, kwargs: Dict[str, Any], calls: int = 3) -> Dict[str, float]:
    """Median time of a step after a first one, its peak memory above the network and batch, and its operations."""
    torch.manual_seed(0)
    kwargs = dict(kwargs)
    name = kwargs.pop('model', None)
    model = timm.create_model(name, num_classes=100) if name else Dense2Net(num_classes=100, **kwargs)
    gflop = 2 * count_macs(model, (3, size, size)) * batch * (3 if mode == 'train' else 1) / 1e9
    model = model.to(DEVICE).train(mode == 'train')
    if mode == 'fused':
        model = reparameterize_model(model)
    x, target = torch.randn(batch, 3, size, size, device=DEVICE), torch.randint(100, (batch,), device=DEVICE)

    def step() -> None:
        with torch.inference_mode(mode != 'train'):
            y = model(x)
        if mode == 'train':
            F.cross_entropy(y, target).backward()

    peak_mb = peak_mb_of(step)
    time = statistics.median(seconds(step) for _ in range(calls))
    return dict(gflop=gflop, ms=1e3 * time, images_per_s=batch / time, gflop_per_s=gflop / time, peak_mb=peak_mb)


def point_in_process(*args: Any) -> Optional[Dict[str, float]]:
    """The point's figures, None where memory did not suffice."""
    if DEVICE.type == 'cuda':
        try:
            return run_point(*args)
        except torch.cuda.OutOfMemoryError:
            return None
    try:
        return in_process(run_point, *args)
    except (BrokenProcessPool, MemoryError):  # the system kills what takes too much
        return None
    except RuntimeError as error:
        if 'allocate memory' not in str(error):
            raise
        return None


def superlinear(rows: List[Dict[str, Any]]) -> List[str]:
    """Neighbouring points of a sweep between which time or memory a unit of work rises."""
    found = []
    for before, after in zip(rows, rows[1:]):
        if (before['mode'], before['axis']) != (after['mode'], after['axis']) or after['axis'] in ('scale', 'depth'):
            continue
        work = after['gflop'] / before['gflop']
        for name in ('ms', 'peak_mb'):
            if before[name] > 0 and after[name] / before[name] > SUPERLINEAR * work:
                what = 'time' if name == 'ms' else 'memory'
                found.append(
                    f"{after['mode']}, {after['axis']} {before['value']} to {after['value']}: "
                    f"{work:.1f} times the work, {after[name] / before[name]:.1f} times the {what}")
    return found


def write_tables(model: str, rows: List[Dict[str, Any]], out: Path) -> str:
    lines = [
        f'{model} unless scale or depth vary; {machine()}.', '',
        '| step | axis | value | batch | size | GFLOP | ms | images/s | GFLOP/s | peak MiB |',
        '|---|---|--:|--:|--:|--:|--:|--:|--:|--:|']
    for r in rows:
        lines.append(
            f"| {r['mode']} | {r['axis']} | {r['value']} | {r['batch']} | {r['size']} | {r['gflop']:.1f} "
            f"| {r['ms']:.0f} | {r['images_per_s']:.1f} | {r['gflop_per_s']:.1f} | {r['peak_mb']:.0f} |")
    found = superlinear(rows)
    lines += ['', 'Superlinear growth:' if found else 'No superlinear growth.'] + [f'* {line}' for line in found]
    text = '\n'.join(lines) + '\n'
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / 'growth.md', text)
    write_csv(out / 'growth.csv', COLUMNS, ([row[c] for c in COLUMNS] for row in rows))
    return text


def plot(rows: List[Dict[str, Any]], out: Path) -> None:
    axes_names = ('batch', 'resolution', 'scale', 'depth')
    figure = new_figure(14, 6)
    if figure is None:
        return
    axes = figure.subplots(2, 4)
    for i, (key, label) in enumerate((('images_per_s', 'images/s'), ('peak_mb', 'peak MiB'))):
        for axis, name in zip(axes[i], axes_names):
            for mode in dict.fromkeys(r['mode'] for r in rows):
                part = [r for r in rows if r['mode'] == mode and r['axis'] == name]
                axis.plot([r['value'] for r in part], [r[key] for r in part], marker='o', label=mode)
            axis.set(xlabel=name, ylabel=label, yscale='log', xscale='log' if name == 'batch' else 'linear')
    axes[0][0].legend()
    save_figure(figure, out / 'growth.png')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='dense2net121_s8', help='network of the batch and resolution sweeps')
    parser.add_argument('--batch', type=int, default=16, help='batch size of the other sweeps')
    parser.add_argument('--modes', nargs='+', choices=('forward', 'fused', 'train'),
                        default=['forward', 'fused', 'train'])
    parser.add_argument('--max-seconds', type=float, default=10., help='a sweep stops at a longer step')
    parser.add_argument('--output', type=Path, default=Path('results/growth'), help='folder to write to')
    args = parser.parse_args()
    if not timm.is_model(args.model):
        parser.error(f"unknown model '{args.model}'")
    if args.batch < 1:
        parser.error(f'--batch must be at least 1, got {args.batch}')
    rows: List[Dict[str, Any]] = []
    text = 'Not one point could be measured.'
    stopped = set()
    points = [(mode, *point) for mode in args.modes for point in sweeps(args.model, args.batch)]
    for mode, axis, value, batch, size, kwargs in tqdm(points):
        if (mode, axis) in stopped:
            continue
        figures = point_in_process(mode, batch, size, kwargs)
        if figures is not None:
            rows.append(dict(mode=mode, axis=axis, value=value, batch=batch, size=size, **figures))
            text = write_tables(args.model, rows, args.output)
        if figures is None or figures['ms'] > 1e3 * args.max_seconds:
            stopped.add((mode, axis))
    print(text)
    plot(rows, args.output)


if __name__ == '__main__':
    main()
