"""A GPU computes what a CPU does."""
import copy

import pytest
import torch
from form_gradients import gradients_of_forms
from timm.utils import reparameterize_model
from training_runs import arguments, read_summary_rows, run_here

from timm_dense2net import training_form
from timm_dense2net.augment import AugmentConfig
from timm_dense2net.dense2net import Dense2Net
from timm_dense2net.engine import TrainStep
from timm_dense2net.fused import FusedDenseBlock
from timm_dense2net.images import ImageArrays
from timm_dense2net.loader import BatchLoader

DEVICE = 'cuda'
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


def create(scale=4, **kwargs):
    torch.manual_seed(0)
    return Dense2Net(8, (2, 3, 2), num_classes=5, scale=scale, dtype=torch.float64, **kwargs)


def train(cuda_graph, compiles=False):
    """Weights and statistics after some steps on batches of two shapes, and the steps' figures."""
    model = create().train().to(DEVICE)
    if compiles:
        model.compile_layers()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    step = TrainStep(model, torch.nn.CrossEntropyLoss(), optimizer, cuda_graph=cuda_graph)
    figures = []
    for index in range(12):
        x = images(8, 3, 32, 32)[:8 - index // 6 * 2] * (1 + index / 10)
        figures.append(step([(x.to(DEVICE), torch.arange(len(x), device=DEVICE) % 5)]).clone())
    return torch.cat(figures, dim=1).cpu(), {name: value.cpu() for name, value in model.state_dict().items()}


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize('checkpointing, channels_last, scale, size', [
    (False, False, 4, (32, 36)), (False, True, 4, (32, 36)), (True, False, 4, (32, 36)), (True, True, 4, (32, 36)),
    (False, True, None, (33, 37)), (False, True, 1, (33, 37)), (False, True, 8, (33, 37))])
def test_training_form(checkpointing, channels_last, scale, size, monkeypatch):
    monkeypatch.setattr(training_form, 'MANY_PIXELS', 1)
    here, there = (create(attn_layer='se', scale=scale).train() for _ in range(2))
    there.to(DEVICE).set_grad_checkpointing(checkpointing)
    x = images(4, 3, *size)
    copied = x.to(DEVICE)
    if channels_last:
        there, copied = (it.to(memory_format=torch.channels_last) for it in (there, copied))
    assert training_form.has_training_form(there.features.denseblock1, there.features.conv0(copied))
    here(x).square().sum().backward()
    there(copied).square().sum().backward()
    for (name, p), q in zip(here.named_parameters(), there.parameters()):
        torch.testing.assert_close(q.grad.cpu(), p.grad, rtol=1e-8, atol=1e-8 * p.grad.abs().max().item(), msg=name)
    torch.testing.assert_close([b.cpu() for b in there.buffers()], list(here.buffers()))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_training_form_under_autocast(dtype, monkeypatch):
    """As far from float32 as the plain form is."""
    monkeypatch.setattr(training_form, 'MANY_PIXELS', 1)
    net = create(scale=8).train().float().to(DEVICE, memory_format=torch.channels_last)
    x = images(8, 3, 32, 32).float().to(DEVICE)
    exact, plain, kernels = gradients_of_forms(net, x, dtype)
    assert kernels.dtype == torch.float32
    assert 0. < torch.dist(kernels, exact) < 1.5 * torch.dist(plain, exact)


def test_inference_form():
    model = create().train()
    model(images(8, 3, 32, 32))
    fused = reparameterize_model(copy.deepcopy(model.eval()).to(DEVICE))
    assert isinstance(fused.features.denseblock1, FusedDenseBlock)
    x = images(3, 3, 33, 47)
    with torch.no_grad():
        torch.testing.assert_close(fused(x.to(DEVICE)).cpu(), model(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_inference_form_under_autocast(dtype):
    model = create().train()
    model(images(8, 3, 32, 32))
    model, x = model.eval().float(), images(3, 3, 33, 47).float()
    fused = reparameterize_model(model).to(DEVICE)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast(DEVICE, dtype):
            y = fused(x.to(DEVICE))
            assert fused.features.denseblock1.runs_in_place(fused.features.conv0(x.to(DEVICE)))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float().cpu(), expected, rtol=0.1, atol=0.1 * expected.abs().max().item())


@pytest.mark.parametrize('compiles', [False, True])
def test_captured_steps(compiles):
    figures, state = train(cuda_graph=True, compiles=compiles)
    expected_figures, expected = train(cuda_graph=False)
    torch.testing.assert_close(figures, expected_figures, rtol=1e-4, atol=1e-4)
    for name, value in expected.items():
        scale = value.double().abs().max().item()
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-4 * scale, msg=name)


def test_batches():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8, generator=generator)
    arrays = ImageArrays(pixels, torch.arange(40) % 4, tuple('abcd'))
    kwargs = dict(mean=(0.5,) * 3, std=(0.2,) * 3, train=True, augment=AugmentConfig(
        cutout_holes=1, cutout_length=4, mixup=0.2, cutmix=1., mixup_prob=0.8, smoothing=0.1))
    batches = [list(BatchLoader(arrays, 10, device=device, **kwargs).epoch(0)) for device in ('cpu', DEVICE)]
    assert len(batches[0]) == len(batches[1]) == 4
    for (x, targets), (y, same) in zip(*batches):
        torch.testing.assert_close((y.cpu(), same.cpu()), (x, targets))


@pytest.mark.parametrize('more', [
    ['--amp', '--channels-last'], ['--amp', '--channels-last', '--cuda-graph', '--torchcompile-layers'],
    ['--amp', '--amp-dtype', 'float16', '--torchcompile']])
def test_job_goes_on_where_it_ended(tmp_path, more):
    model = ['--model', 'dense2net40_k12_s4', '--model-kwargs', 'block_config=[1, 1, 1]', '-b', '64']
    argv = arguments(tmp_path, *model, *more, '--lr', '0.02', '--device', DEVICE)
    assert run_here([*argv, '--epochs', '2']) == 0
    assert run_here(['--resume', tmp_path / 'run', '--epochs', '3']) == 0
    losses = [float(row['train_loss']) for row in read_summary_rows(tmp_path / 'run')]
    assert len(losses) == 3 and losses == sorted(losses, reverse=True)
