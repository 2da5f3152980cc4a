"""The GPU's training form through Triton's interpreter. `test_norm_kernels.py` runs this in a process of its own."""
import copy

import pytest
import torch
from form_gradients import gradients_of_forms
from timm.layers import BatchNormAct2d

from timm_dense2net import norm_kernels, training_buffers, training_form
from timm_dense2net.dense2net import Dense2Net
from timm_dense2net.norm_kernels import (
    KernelNorm,
    add_stats_gradient,
    join,
    join_backward,
    moments,
    new_sums,
    norm_gradients,
    norm_relu,
    norm_relu_backward,
)

EPS = 1e-3


@pytest.fixture
def on_kernels(monkeypatch):
    """Lets nets on a CPU take the kernels."""
    monkeypatch.setattr(training_form, 'MANY_PIXELS', 1)
    for module in (training_form, training_buffers):
        monkeypatch.setattr(module, 'runs_on_kernels', lambda x: True)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(value, expected, tolerance):
    size = expected.abs().max().item()
    torch.testing.assert_close(value.double(), expected.detach(), rtol=tolerance, atol=tolerance * size)


def norm_of(channels, dtype, seed=1):
    mean, var, weight, bias = (normal(channels, seed=seed + i).to(dtype) for i in range(4))
    return KernelNorm(mean, var.abs() + 0.1, weight, bias, EPS)


def exact(norm):
    """The norm in float64, to take gradients of."""
    return KernelNorm(*(values.double().requires_grad_() for values in norm[:4]), norm.eps)


def reference(x, norm):
    return torch.relu(norm.weight * (x - norm.mean) / (norm.var + norm.eps).sqrt() + norm.bias)


def check_norm_gradients(sums, norm, expected, tolerance):
    for gradient, values in zip(norm_gradients(sums, norm), (2, 3, 0, 1)):
        close(gradient, expected[values].grad, max(tolerance, 1e-4 if norm.mean.dtype == torch.float32 else 0.))


@pytest.fixture(params=[
    (dtype, tolerance, rows, channels)
    for dtype, tolerance in [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 2e-2)]
    for rows, channels in [(2, 32), (200, 12), (300, 96), (130, 65)]], ids=str)
def case(request, monkeypatch):
    """Several rounds of each program, of sums too."""
    monkeypatch.setattr(norm_kernels, 'MAX_PROGRAMS', 2)
    monkeypatch.setattr(norm_kernels, 'BLOCK_SUMS', 1)
    return request.param


def test_norm(case):
    """Within a wider matrix, against autograd in float64."""
    dtype, tolerance, rows, channels = case
    stats_dtype = torch.promote_types(dtype, torch.float32)
    features = normal(rows, channels + 8).to(dtype)
    x, norm = features[:, :channels], norm_of(channels, stats_dtype)
    leaf, same = x.double().requires_grad_(), exact(norm)
    expected = reference(leaf, same)
    close(norm_relu(x, norm), expected, tolerance)
    out = features.clone()
    norm_relu(x, norm, out[:, :channels])
    close(out[:, :channels], expected, tolerance)
    assert torch.equal(out[:, channels:], features[:, channels:])

    dy = normal(rows, channels + 8, seed=5).to(dtype)[:, 8:]
    expected.backward(dy.double())
    for adds in (False, True):
        before = normal(rows, channels + 8, seed=6).to(dtype)
        dx, sums = before.clone(), new_sums(x, norm)
        norm_relu_backward(dy, x, norm, dx[:, :channels], sums, adds)
        close(dx[:, :channels], leaf.grad + (before[:, :channels].double() if adds else 0.), tolerance)
        assert torch.equal(dx[:, channels:], before[:, channels:])
        check_norm_gradients(sums, norm, same, tolerance)


def test_moments(case):
    """Of channels whose mean is a thousand times their deviation, too; a copy of them besides."""
    dtype, tolerance, rows, channels = case
    stats_dtype = torch.promote_types(dtype, torch.float32)
    features = normal(rows, channels + 8).to(dtype)
    if dtype != torch.bfloat16:
        features[:, 1] += 1000.
    x, copied = features[:, :channels], torch.zeros_like(features)
    mean, var = torch.empty(2, channels, dtype=stats_dtype)
    running = torch.ones(channels, dtype=stats_dtype), torch.ones(channels, dtype=stats_dtype), torch.tensor(4)
    moments(x, mean, var, running, 0.1, copied[:, :channels])
    var_expected, mean_expected = torch.var_mean(x.double(), 0, correction=0)
    torch.testing.assert_close(mean.double(), mean_expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), var_expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(running[0].double(), 0.9 + 0.1 * mean_expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(running[1].double(), 0.9 + 0.1 * x.double().var(0), rtol=1e-4, atol=1e-6)
    assert running[2] == 5
    assert torch.equal(copied[:, :channels], x) and not copied[:, channels:].any()
    again = torch.empty(2, channels, dtype=stats_dtype)
    moments(x, *again)
    assert torch.equal(again, torch.stack((mean, var)))


def test_join(case):
    dtype, tolerance, rows, channels = case
    stats_dtype = torch.promote_types(dtype, torch.float32)
    maps = normal(rows, 2 * channels).to(dtype)
    x, other = maps[:, channels:], maps[:, :channels]
    norm, other_norm = norm_of(channels, stats_dtype), norm_of(channels, stats_dtype, seed=11)
    leaf, other_leaf = (t.double().requires_grad_() for t in (x, other))
    same, other_same = exact(norm), exact(other_norm)
    expected_y = reference(other_leaf, other_same)
    expected = reference(leaf, same) + expected_y
    y = torch.zeros(rows, channels + 3, dtype=dtype)
    close(join(x, norm, other, other_norm, y[:, :channels]), expected, tolerance)
    close(y[:, :channels], expected_y, tolerance)
    assert not y[:, channels:].any()

    dout, dy = (normal(rows, channels, seed=seed).to(dtype) for seed in (21, 22))
    torch.autograd.backward([expected, expected_y], [dout.double(), dy.double()])
    dmaps, sums = torch.zeros_like(maps), new_sums(maps, norm_of(2 * channels, stats_dtype))
    dother, other_sums = torch.empty_like(dy), new_sums(other, other_norm)
    join_backward(
        dout, x, norm, dmaps[:, channels:], sums[..., channels:], other, other_norm, dy, dother, other_sums)
    close(dmaps[:, channels:], leaf.grad, tolerance)
    assert not dmaps[:, :channels].any()
    close(dother, other_leaf.grad, tolerance)
    check_norm_gradients(sums[..., channels:].contiguous(), norm, same, tolerance)
    check_norm_gradients(other_sums, other_norm, other_same, tolerance)


def test_stats_gradient(case):
    dtype, tolerance, rows, channels = case
    stats_dtype = torch.promote_types(dtype, torch.float32)
    x, dx = (normal(rows, channels + 8, seed=seed).to(dtype)[:, :channels] for seed in (0, 1))
    mean, dstats = normal(channels, seed=2).to(stats_dtype), normal(2, channels, seed=3).to(stats_dtype)
    slope = 2. * dstats[1].double() / rows
    expected = dx.double() + dstats[0].double() / rows + slope * (x.double() - mean.double())
    out = torch.empty(rows, channels, dtype=dtype)
    add_stats_gradient(dx, x, mean, dstats, out)
    close(out, expected, tolerance)


def test_a_norm_of_other_channels_is_refused(on_kernels):
    net = Dense2Net(8, (2, 1), num_classes=5, dtype=torch.float64, scale=4).train()
    net.features.denseblock1.denselayer1.conv2.norms[0] = BatchNormAct2d(4, dtype=torch.float64)
    with pytest.raises(ValueError, match='a norm of 4 channels cannot take maps of 8'):
        net(normal(2, 3, 32, 32))


def test_all_kernels_are_tried():
    norm_kernels.try_kernels(torch.device('cpu'))


def test_what_is_not_a_number_stays_so():
    x = torch.tensor([[float('nan')] * 32])
    assert norm_relu(x, KernelNorm(*torch.ones(4, 32), EPS)).isnan().all()


@pytest.mark.parametrize('size, momentum, kind', [
    ((32, 36), 0.1, dict(scale=None)), ((32, 36), 0.1, dict(scale=1)), ((33, 38), 0.1, dict(scale=4)),
    ((32, 36), None, dict(scale=2, cardinality=2, attn_layer='se')), ((32, 36), 0.1, dict(scale=8)),
    ((32, 36), 0.1, dict(scale=4, block_config=(3,)))])
def test_net(on_kernels, size, momentum, kind):
    """Outputs, gradients and running statistics are the plain form's."""
    torch.manual_seed(0)
    net = Dense2Net(8, num_classes=5, dtype=torch.float64, **dict(dict(block_config=(2, 1)), **kind)).train()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.momentum = momentum
    plain = copy.deepcopy(net)
    x, same = (normal(2, 3, *size).requires_grad_() for _ in range(2))
    assert training_form.block_has_training_form(net.features.denseblock1, net.features.conv0(x))
    y = net(x)
    y.square().sum().backward()
    with training_form.plain_form():
        expected = plain(same)
        expected.square().sum().backward()
    torch.testing.assert_close(y, expected)
    pairs = [('x', x, same), *((name, p, q) for (name, p), q in zip(net.named_parameters(), plain.parameters()))]
    for name, p, q in pairs:
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-9 * q.grad.abs().max().item(), msg=name)
    torch.testing.assert_close(list(net.buffers()), list(plain.buffers()))


def test_net_in_bfloat16(on_kernels):
    """Under autocast, as far from float32 as the plain form is."""
    torch.manual_seed(0)
    net = Dense2Net(8, (2, 1), num_classes=5, scale=4).train()
    x = normal(4, 3, 32, 32).float()
    exact, plain, kernels = gradients_of_forms(net, x, torch.bfloat16)
    assert kernels.dtype == torch.float32
    assert 0. < torch.dist(kernels, exact) < 1.5 * torch.dist(plain, exact) < 0.2 * exact.norm()


def test_second_derivatives_are_refused(on_kernels):
    net = Dense2Net(8, (2, 1), num_classes=5, dtype=torch.float64, scale=4).train()
    x = normal(2, 3, 32, 32).requires_grad_()
    with pytest.raises(RuntimeError, match='no second derivatives'):
        torch.autograd.grad(net(x).square().sum(), x, create_graph=True)


def test_checkpointing_takes_the_plain_form(on_kernels):
    net = Dense2Net(8, (2, 1), num_classes=5, dtype=torch.float64, scale=4).train()
    net.set_grad_checkpointing()
    assert not training_form.block_has_training_form(net.features.denseblock1, net.features.conv0(normal(2, 3, 32, 32)))
