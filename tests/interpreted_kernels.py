"""The GPU's training form through Triton's interpreter. `test_norm_kernels.py` runs this in a process of its own."""
import copy

import pytest
import torch

from timm_dense2net import norm_kernels, training_form
from timm_dense2net.dense2net import Dense2Net

EPS = 1e-3


@pytest.fixture
def on_kernels(monkeypatch):
    """Lets nets on a CPU take the kernels."""
    monkeypatch.setattr(training_form, 'MANY_PIXELS', 1)
    monkeypatch.setattr(training_form, 'runs_on_kernels', lambda x: True)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize('rows, channels', [(1, 32), (200, 96), (130, 65)])
def test_kernels(monkeypatch, dtype, tolerance, rows, channels):
    """Within a wider matrix, in several rounds of each program, against autograd in float64."""
    monkeypatch.setattr(norm_kernels, 'MAX_PROGRAMS', 2)
    stats_dtype = torch.promote_types(dtype, torch.float32)
    features = normal(rows, channels + 8).to(dtype)
    x = features[:, :channels]
    stats = [normal(channels, seed=i).to(stats_dtype) for i in range(1, 5)]
    stats[1].abs_()
    exact = [value.double().requires_grad_() for value in (x, *stats)]
    mean, var, weight, bias = exact[1:]
    expected = torch.relu(weight * (exact[0] - mean) / (var + EPS).sqrt() + bias)
    torch.testing.assert_close(
        norm_kernels.norm_relu(x, *stats, EPS).double(), expected, rtol=tolerance, atol=tolerance)

    dy = normal(rows, channels, seed=5).to(dtype)
    expected.backward(dy.double())
    for adds in (False, True):
        before = normal(rows, channels + 8, seed=6).to(dtype)
        dx = before.clone()
        dweight, dbias = norm_kernels.norm_relu_backward(dy, x, *stats, EPS, dx[:, :channels], adds)
        total = exact[0].grad + (before[:, :channels].double() if adds else 0.)
        size = total.abs().max().item()
        torch.testing.assert_close(dx[:, :channels].double(), total, rtol=tolerance, atol=tolerance * size)
        assert torch.equal(dx[:, channels:], before[:, channels:])
        for gradient, parameter in ((dweight, weight), (dbias, bias)):
            size = parameter.grad.abs().max().item()
            torch.testing.assert_close(gradient.double(), parameter.grad, rtol=1e-4, atol=tolerance * size)


def test_what_is_not_a_number_stays_so():
    x = torch.tensor([[float('nan')] * 32])
    y = norm_kernels.norm_relu(x, *(torch.ones(32) for _ in range(4)), EPS)
    assert y.isnan().all()


@pytest.mark.parametrize('kind', [
    dict(scale=None), dict(scale=4), dict(scale=2, cardinality=2, attn_layer='se'), dict(scale=4, block_config=(3,))])
def test_net(on_kernels, kind):
    """Outputs, gradients and running statistics are the plain form's."""
    torch.manual_seed(0)
    net = Dense2Net(8, num_classes=5, dtype=torch.float64, **dict(dict(block_config=(2, 1)), **kind)).train()
    plain = copy.deepcopy(net)
    x, same = (normal(2, 3, 32, 36).requires_grad_() for _ in range(2))
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


def test_second_derivatives_are_refused(on_kernels):
    net = Dense2Net(8, (2, 1), num_classes=5, dtype=torch.float64, scale=4).train()
    x = normal(2, 3, 32, 32).requires_grad_()
    with pytest.raises(RuntimeError, match='no second derivatives'):
        torch.autograd.grad(net(x).square().sum(), x, create_graph=True)


def test_checkpointing_takes_the_plain_form(on_kernels):
    net = Dense2Net(8, (2, 1), num_classes=5, dtype=torch.float64, scale=4).train()
    net.set_grad_checkpointing()
    assert not training_form.block_has_training_form(net.features.denseblock1, net.features.conv0(normal(2, 3, 32, 32)))
