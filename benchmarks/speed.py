"""Time and memory of Dense2Net beside the slides' plain code and timm's relatives, on whichever device is there.

    python benchmarks/speed.py --output results/speed
    python benchmarks/speed.py --scale 8 --batches 1 64 --train-batch 32 --rounds 5 --only deck ours fused

All networks of one measurement take turns within every round, so that what else the machine does meets all of them; a
ratio is the median over the rounds of a network's time over the slides' network's in the same round. Memory and the
first call are measured on a CPU in a process of its own for each network. Writes speed.md, speed.csv and speed.png.
"""
import argparse
import gc
import statistics
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from measuring import DEVICE, in_process, machine, peak_mb_of, seconds
from reference import PlainDense2Net
from timm_dense2net.cuda_graph import WARM_UP_CALLS
from timm_dense2net.engine import TrainStep
from timm_dense2net.figures import new_figure, save_figure
from timm_dense2net.files import write_csv, write_text

CONTENDERS = {
    'deck': "the slides' plain code",
    'deck-bf16': "the slides' plain code, bfloat16 autocast, channels_last",
    'ours': 'this package, as created',
    'ours-bf16': 'this package, bfloat16 autocast, channels_last',
    'ours-ckpt': 'this package, gradient checkpointing',
    'fused': 'this package, reparameterize_model',
    'fused-bf16': 'this package, reparameterize_model, bfloat16 autocast, channels_last',
    'compiled': 'this package, torch.compile',
    'graph-bf16': 'this package, bfloat16 autocast, channels_last, captured in a CUDA graph',
    'densenet121': "timm's densenet121, 3x3 stride-1 stem",
    'res2net50': "timm's res2net50_26w_4s at equal input",
}
FORWARD_ONLY = ('fused', 'fused-bf16')
TRAIN_ONLY = ('ours-ckpt', 'graph-bf16')
# Few CPUs compute in bfloat16, and compiling these nets takes many minutes.
DEFAULTS = [
    name for name in CONTENDERS if name != 'compiled' and (DEVICE.type == 'cuda' or not name.endswith('bf16'))]
COLUMNS = ['mode', 'batch', 'network', 'ms', 'ratio', 'images_per_s', 'ceiling_share', 'first_call_s', 'peak_mb']


def create(name: str, scale: int) -> nn.Module:
    torch.manual_seed(0)
    if name == 'densenet121':
        model = timm.create_model('densenet121', num_classes=100)
        model.features.conv0 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.features.norm0, model.features.pool0 = nn.Identity(), nn.Identity()
    elif name == 'res2net50':
        model = timm.create_model('res2net50_26w_4s', num_classes=100)
    else:
        model = timm.create_model(f'dense2net121_s{scale}')
        if name.startswith('deck'):
            plain = PlainDense2Net(scale=scale)
            plain.load_from_dense2net(model.state_dict())
            model = plain
    return model.to(DEVICE)


def step_of(name: str, mode: str, batch: int, scale: int) -> Tuple[nn.Module, Callable[[], Any]]:
    """The network and one call of what is timed: a forward pass, or a training step on a fixed batch."""
    model = create(name, scale)
    x, target = torch.randn(batch, 3, 32, 32, device=DEVICE), torch.randint(100, (batch,), device=DEVICE)
    half = name.endswith('bf16')
    if half:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    if name == 'ours-ckpt':
        model.set_grad_checkpointing()
    if name in FORWARD_ONLY:
        model = reparameterize_model(model.eval())
    run = torch.compile(model) if name == 'compiled' else model
    model.train(mode == 'train')

    def forward() -> torch.Tensor:
        with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
            return run(x)

    if mode == 'forward':
        return model, forward
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    if name == 'graph-bf16':
        captured = TrainStep(
            model, nn.CrossEntropyLoss(), optimizer, lambda: torch.autocast(DEVICE.type, torch.bfloat16),
            cuda_graph=True)
        return model, lambda: captured([(x, target)])

    def train() -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
            loss = F.cross_entropy(run(x), target)
        loss.backward()
        optimizer.step()

    return model, train


def turn(step: Callable[[], Any]) -> float:
    """Median time of a call, of as many as fill half a second: one call alone finds its caches full of others' data."""
    times = [seconds(step)]
    while sum(times) < 0.5:
        times.append(seconds(step))
    return statistics.median(times)


def probe(name: str, mode: str, batch: int, scale: int) -> Dict[str, float]:
    """First-call time (to the capture of a graph), and peak memory above that of the process with the network in it."""
    model, step = step_of(name, mode, batch, scale)
    times = []

    def first_calls() -> None:
        times.extend(seconds(step) for _ in range(WARM_UP_CALLS + 1 if name == 'graph-bf16' else 1))

    peak_mb = peak_mb_of(first_calls)
    return dict(first_call_s=sum(times), peak_mb=peak_mb)


def probe_apart(*args: Any) -> Dict[str, float]:
    # A GPU's memory is counted by torch, whatever the process has done before.
    if DEVICE.type == 'cpu':
        return in_process(probe, *args)
    figures = probe(*args)
    gc.collect()
    torch.cuda.empty_cache()
    return figures


def machine_rates(dtype: torch.dtype) -> Tuple[float, float]:
    """Operations a second of a large matrix product, and bytes a second of a copy: the best of 5 each."""
    n = 8192 if DEVICE.type == 'cuda' else 2048
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    flops = 2 * n ** 3 / min(seconds(lambda: a @ b) for _ in range(5))
    source = torch.empty(2 ** 28, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return flops, 2 * source.numel() / min(seconds(lambda: target.copy_(source)) for _ in range(5))


def count_work(model: nn.Module, mode: str, batch: int) -> Tuple[float, float]:
    """Operations, and the bytes of float32 that every convolution and linear layer reads and writes, of one step."""
    moved = 0

    def add_bytes(module: nn.Module, args: Tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal moved
        moved += 4 * (args[0].numel() + output.numel() + module.weight.numel())

    hooks = [
        m.register_forward_hook(add_bytes) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.randn(1, 3, 32, 32, device=DEVICE))
    for hook in hooks:
        hook.remove()
    passes = 3 if mode == 'train' else 1  # backward computes the gradients of inputs and of weights
    return passes * batch * counter.get_total_flops(), passes * batch * moved


def measure(
        mode: str,
        batch: int,
        names: List[str],
        scale: int,
        rounds: int,
        rates: Dict[bool, Tuple[float, float]],
) -> List[Dict[str, Any]]:
    skipped = TRAIN_ONLY if mode == 'forward' else FORWARD_ONLY
    names = [n for n in names if n not in skipped]
    if DEVICE.type == 'cuda':
        probe('deck', mode, batch, scale)  # what the first of all calls there takes is no network's own
    probes = {n: probe_apart(n, mode, batch, scale) for n in tqdm(names, desc=f'{mode} {batch}: memory')}
    work = {n: count_work(create(n, scale), mode, batch) for n in names}
    steps = {n: step_of(n, mode, batch, scale)[1] for n in names}
    for step in steps.values():  # compilation, the allocator's growth and capture are no part of a step
        for _ in range(WARM_UP_CALLS + 1):
            step()
    times: Dict[str, List[float]] = {n: [] for n in names}
    for _ in tqdm(range(rounds), desc=f'{mode} {batch}: time'):
        for name, step in steps.items():
            times[name].append(turn(step))
    rows = []
    for name in names:
        median = statistics.median(times[name])
        flop_rate, byte_rate = rates[name.endswith('bf16')]
        ceiling = work[name][0] / flop_rate
        if DEVICE.type == 'cuda':
            ceiling = max(ceiling, work[name][1] / byte_rate / (2 if name.endswith('bf16') else 1))
        ratio = statistics.median(ref / t for ref, t in zip(times['deck'], times[name]))
        rows.append(dict(
            mode=mode, batch=batch, network=name, ms=1e3 * median, ratio=ratio, images_per_s=batch / median,
            ceiling_share=ceiling / median, **probes[name]))
    return rows


def write_tables(rows: List[Dict[str, Any]], scale: int, rounds: int, rates: Tuple[float, float], out: Path) -> str:
    lines = [
        f'dense2net121_s{scale} on {machine()}, {rounds} interleaved rounds; a large '
        f'float32 matrix product runs at {rates[0] / 1e9:.0f} GFLOP/s, a copy at {rates[1] / 1e9:.1f} GB/s.',
        '',
        '| step | batch | network | median ms | times the slides\' speed | images/s | share of ceiling | first call s '
        '| peak MiB |',
        '|---|--:|---|--:|--:|--:|--:|--:|--:|',
    ]
    for r in rows:
        lines.append(
            f"| {r['mode']} | {r['batch']} | {r['network']} | {r['ms']:.1f} | {r['ratio']:.2f} "
            f"| {r['images_per_s']:.1f} | {r['ceiling_share']:.0%} | {r['first_call_s']:.2f} | {r['peak_mb']:.0f} |")
    lines += [''] + [f'* `{name}`: {text}' for name, text in CONTENDERS.items()
                     if name in {r['network'] for r in rows}]
    text = '\n'.join(lines) + '\n'
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / 'speed.md', text)
    write_csv(out / 'speed.csv', COLUMNS, ([row[c] for c in COLUMNS] for row in rows))
    return text


def plot(rows: List[Dict[str, Any]], scale: int, out: Path) -> None:
    groups = sorted({(r['mode'], r['batch']) for r in rows})
    figure = new_figure(4 * len(groups), 3.2)
    if figure is None:
        return
    for axis, (mode, batch) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups):
        part = [r for r in rows if (r['mode'], r['batch']) == (mode, batch)]
        bars = axis.barh([r['network'] for r in part], [r['ratio'] for r in part])
        axis.bar_label(bars, fmt='%.2f', padding=2)
        axis.axvline(1, color='0.5', linewidth=0.8)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set(title=f'{mode}, batch {batch}', xlabel="times the slides' speed")
    figure.suptitle(f'dense2net121_s{scale} on {machine()}')
    save_figure(figure, out / 'speed.png')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--scale', type=int, default=8, choices=(2, 4, 8))
    parser.add_argument('--batches', type=int, nargs='*', default=[1, 64], help='batch sizes of the forward pass')
    parser.add_argument('--train-batch', type=int, default=128, help='batch size of the training step, 0 for none')
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--only', nargs='+', choices=list(CONTENDERS), default=DEFAULTS, metavar='NETWORK', help=(
        f'of {", ".join(CONTENDERS)}; deck is always there (%(default)s)'))
    parser.add_argument('--output', type=Path, default=Path('results/speed'), help='folder to write to')
    args = parser.parse_args()
    if args.rounds < 1 or args.train_batch < 0 or min(args.batches, default=1) < 1:
        parser.error('--rounds and --batches must be at least 1, --train-batch at least 0')
    if not args.batches and not args.train_batch:
        parser.error('nothing to measure: --batches names no batch size, and --train-batch is 0')
    names = [n for n in CONTENDERS if n == 'deck' or n in args.only]
    # Not of bfloat16 unasked: a CPU that does not compute in it takes minutes.
    rates = {half: machine_rates(torch.bfloat16 if half else torch.float32)
             for half in {name.endswith('bf16') for name in names}}
    rows = []
    measurements = [('forward', b) for b in args.batches] + ([('train', args.train_batch)] if args.train_batch else [])
    for mode, batch in measurements:
        rows += measure(mode, batch, names, args.scale, args.rounds, rates)
        text = write_tables(rows, args.scale, args.rounds, rates[False], args.output)
    print(text)
    plot(rows, args.scale, args.output)


if __name__ == '__main__':
    main()
