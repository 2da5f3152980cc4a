"""The training form equals the plain form: outputs, gradients of input and parameters, running statistics."""
import copy
import gc
import os
import subprocess
import sys
from collections import OrderedDict
from contextlib import contextmanager

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm, freeze_batch_norm_2d
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.autograd import gradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from changed_layers import CHANGES, change_layers
from timm_dense2net import batch_norm, dense2net, parts, training_buffers, training_form, training_form_cpu
from timm_dense2net.dense2net import Dense2Net, DenseBlock
from timm_dense2net.memory_pool import MemoryPool
from timm_dense2net.training_form import plain_form

KINDS = {
    'baseline': dict(scale=None),
    'baseline_groups': dict(scale=None, cardinality=4),
    's1': dict(scale=1),
    's2': dict(scale=2),
    's4': dict(scale=4),
    's8': dict(scale=8),
    'groups': dict(scale=4, cardinality=4),
    'se': dict(scale=2, attn_layer='se'),
    'drop_path': dict(scale=4, drop_path_rate=0.5),
    'deep': dict(scale=4, stem_type='deep'),
}


@pytest.fixture(autouse=True)
def small_blocks_too(monkeypatch):
    monkeypatch.setattr(training_form, 'MANY_PIXELS', 1)


def normal(*shape, dtype=torch.float64, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def vary(model):
    """Norm weights of both signs, 0 and next to 0; running statistics that differ from their start."""
    for i, m in enumerate(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        with torch.no_grad():
            m.weight.copy_(normal(len(m.weight), seed=i))
            m.bias.copy_(normal(len(m.bias), seed=1000 + i))
            m.weight[0], m.weight[1:2] = 0., 1e-12
            m.running_mean.copy_(normal(len(m.weight), seed=2000 + i))
    return model


def create(growth_rate=8, block_config=(2, 3, 2), dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    return vary(Dense2Net(growth_rate, block_config, num_classes=5, dtype=dtype, **kwargs)).train()


@contextmanager
def runs_of(*functions):
    """Counts the calls of autograd functions of the training form."""
    counts = {f.__name__: 0 for f in functions}
    applies = {f: f.forward for f in functions}

    def counted(f):
        def forward(*args):
            counts[f.__name__] += 1
            return applies[f](*args)
        return staticmethod(forward)

    for f in functions:
        f.forward = counted(f)
    try:
        yield counts
    finally:
        for f in functions:
            f.forward = staticmethod(applies[f])


def step(model, x):
    """Output, input gradient, and gradients and buffers by name after one step."""
    x = x.clone().requires_grad_()
    torch.manual_seed(7)  # of drop path
    y = model(x)
    y.square().sum().backward()
    return y.detach(), x.grad, {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())


def assert_equals_plain_form(model, x, rtol, atol, count=7):
    twin = copy.deepcopy(model)
    with runs_of(training_form_cpu.NewFeatures) as counts:
        y, dx, grads, buffers = step(model, x)
    assert counts['NewFeatures'] == count
    with plain_form():
        y2, dx2, grads2, buffers2 = step(twin, x)

    def close(a, b, name):
        bound = atol * max(1., b.abs().max().item())
        torch.testing.assert_close(a, b, rtol=rtol, atol=bound, msg=lambda text: f'{name}: {text}')

    close(y, y2, 'output')
    close(dx, dx2, 'input gradient')
    for name, grad in grads2.items():
        close(grads[name], grad, name)
    for name, buffer in buffers2.items():
        close(buffers[name], buffer, name)


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('kind', KINDS)
def test_equals_plain_form_in_float64(kind, checkpointing):
    model = create(**KINDS[kind])
    model.set_grad_checkpointing(checkpointing)
    for shape in ((4, 3, 13, 11), (3, 3, 32, 36)):
        model.zero_grad()
        assert_equals_plain_form(model, normal(*shape) if 'stem_type' not in KINDS[kind] else normal(
            2, 3, 33, 50), 1e-9, 1e-9)


@pytest.mark.parametrize('shape', [(4, 3, 13, 11), (3, 3, 32, 36)])
@pytest.mark.parametrize('kind', ['baseline', 's2', 's4', 'groups'])
def test_equals_plain_form_with_several_pixels_a_row(kind, shape, monkeypatch):
    """Odd numbers of pixels, multiples of 16, and what is between them."""
    monkeypatch.setattr(batch_norm, 'MANY', 1)
    assert_equals_plain_form(create(**KINDS[kind]), normal(*shape), 1e-9, 1e-9)


def test_equals_plain_form_with_splits_of_one_channel(monkeypatch):
    monkeypatch.setattr(batch_norm, 'MANY', 1)
    assert_equals_plain_form(create(growth_rate=2, scale=8), normal(4, 3, 16, 16), 1e-9, 1e-9)


@pytest.mark.parametrize('name', ['weight', 'bias'])
def test_a_norm_without_weight_or_bias_trains_in_the_plain_form(name):
    model = create(scale=2)
    setattr(model.features.denseblock1.denselayer2.norm1, name, None)
    assert_equals_plain_form(model, normal(4, 3, 13, 11), 1e-9, 1e-9, count=5)


def test_rows():
    def shapes(*tensors):
        return [tuple(rows.shape) for rows in batch_norm._as_rows(*tensors)]

    x = torch.zeros(32, 64, 16)
    assert shapes(x, x) == [(128, 256)] * 2
    assert shapes(torch.zeros(2048, 32)[:, :16]) == [(2048, 16)]  # not dense
    assert shapes(x[:1]) == [(64, 16)]  # few
    assert shapes(torch.zeros(8, 64, 64)) == [(512, 64)]  # wide
    assert shapes(torch.zeros(3, 1022, 12)) == [(1533, 24)]


@pytest.mark.parametrize('kind', ['baseline', 's4', 'se'])
def test_equals_plain_form_in_parts(kind, monkeypatch):
    monkeypatch.setattr(parts, 'ROW_CACHE_BYTES', 20_000)
    assert_equals_plain_form(create(**KINDS[kind]), normal(4, 3, 13, 11), 1e-9, 1e-9)


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('kind', ['baseline', 's8', 'groups'])
def test_float32(kind, channels_last):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model = create(dtype=torch.float32, **KINDS[kind]).to(memory_format=memory_format)
    x = normal(4, 3, 32, 32, dtype=torch.float32).to(memory_format=memory_format)
    assert_equals_plain_form(model, x, 1e-3, 1e-4)


def test_large_mean_and_small_variance():
    """Errors against float64 are no larger than the plain form's, short of a factor for chance."""
    torch.manual_seed(0)
    block = vary(DenseBlock(3, 8, 8, [0.] * 3)).train()
    x = 1e-2 * normal(8, 8, 16, 16) + 10.
    exact = step(copy.deepcopy(block).double(), x)
    ours = step(copy.deepcopy(block), x.float())
    with plain_form():
        plain = step(block, x.float())

    def error(a, b):
        return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-3)).item()

    for i in range(2):
        assert error(ours[i], exact[i]) < 1e-5 + 2. * error(plain[i], exact[i])
    for i in range(2, 4):
        for name, value in exact[i].items():
            assert error(ours[i][name], value) < 1e-4 + 2. * error(plain[i][name], value), name


@pytest.mark.parametrize('kwargs', [
    dict(scale=2), dict(scale=4, cardinality=2), dict(scale=None), dict(scale=1), dict(scale=8),
    dict(scale=2, attn_layer='eca')])
def test_gradcheck(kwargs):
    torch.manual_seed(0)
    block = DenseBlock(2, 3, 4, [0., 0.], bn_size=2, dtype=torch.float64, **kwargs).train()
    transition = dense2net.DenseTransition(11, 5, BatchNormAct2d, dtype=torch.float64).train()
    names, parameters = zip(*torch.nn.Sequential(block, transition).named_parameters())
    for i, p in enumerate(parameters):
        p.data = p.data + 0.3 * normal(*p.shape, seed=i)
        p.requires_grad_()

    features = dense2net.Features(OrderedDict(denseblock1=block, transition1=transition))
    x = normal(2, 3, 4, 5).requires_grad_()
    for run, outputs in ((lambda x: transition(block(x)), 1), (features, 0)):
        with runs_of(training_buffers.Output, training_form_cpu.Transition) as counts:
            y = run(x)
        assert counts == {'Output': outputs, 'Transition': 1}
        torch.testing.assert_close(y, transition(block(x)))
        assert gradcheck(lambda x, *_: run(x), (x, *parameters), fast_mode=True)


def create_for_autocast(**kwargs):
    model = create(dtype=torch.float32, scale=4, growth_rate=16, **kwargs)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.weight.data.fill_(1.)
    return model


@pytest.mark.parametrize('many', [1 << 15, 1])
def test_autocast(many, monkeypatch):
    monkeypatch.setattr(batch_norm, 'MANY', many)
    model, twin, exact = (create_for_autocast(drop_path_rate=0.2) for _ in range(3))
    x = normal(8, 3, 32, 32, dtype=torch.float32)
    with plain_form():
        _, dx, grads, buffers = step(exact, x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        with runs_of(training_form_cpu.NewFeatures, training_form_cpu.Transition) as counts:
            ours = step(model, x)
        assert counts == {'NewFeatures': 7, 'Transition': 2}
        with plain_form():
            plain = step(twin, x)
    assert ours[0].dtype == plain[0].dtype

    def error(a, b):
        return ((a - b).norm() / b.norm()).item()

    # Single gradients of so deep a net are far off in either form: what counts is that no form is worse.
    assert error(ours[1], dx) < 1.2 * error(plain[1], dx)
    assert all(grad.dtype == torch.float32 for grad in ours[2].values())
    errors, plain_errors = (
        torch.tensor([error(form[2][name], grad) for name, grad in grads.items()]) for form in (ours, plain))
    assert errors.median() < 1.2 * plain_errors.median()
    assert errors.max() < 1.5 * plain_errors.max()
    for name, buffer in buffers.items():
        if 'running' in name:
            assert ours[3][name].dtype == torch.float32
            torch.testing.assert_close(ours[3][name], buffer, rtol=0.05, atol=0.05)


@pytest.mark.parametrize('cache_bytes', [parts.ROW_CACHE_BYTES, 20_000])
def test_autocast_of_each_parameter(cache_bytes, monkeypatch):
    """In a net of two layers every gradient is near enough to the exact one to be judged by itself."""
    monkeypatch.setattr(parts, 'ROW_CACHE_BYTES', cache_bytes)
    model, twin, exact = (create_for_autocast(block_config=(2,)) for _ in range(3))
    x = normal(8, 3, 32, 32, dtype=torch.float32)
    with plain_form():
        grads = step(exact, x)[2]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        ours = step(model, x)[2]
        with plain_form():
            plain = step(twin, x)[2]
    for name, grad in grads.items():
        error, plain_error = (((form[name] - grad).norm() / grad.norm()).item() for form in (ours, plain))
        assert error < 1.5 * plain_error + 0.02, name


def test_the_environment_turns_it_off():
    code = 'from timm_dense2net import training_form; print(training_form._enabled)'
    environment = os.environ | dict(TIMM_DENSE2NET_TRAINING_FORM='0')
    output = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True)
    assert output.stdout.strip() == 'False', output.stderr
    assert training_form._enabled  # here, where nothing turns it off


@pytest.mark.parametrize('momentum', [0.3, None])
def test_momentum(momentum):
    model = create()
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.momentum = momentum
    twin = copy.deepcopy(model)
    for seed in range(3):
        x = normal(4, 3, 13, 11, seed=seed)
        model(x)
        with plain_form():
            twin(x)
    for (name, a), b in zip(model.named_buffers(), twin.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize('track', [False, True])
def test_norms_without_running_statistics(track):
    model = create()
    norm = model.features.denseblock1.denselayer2.norm1
    norm.track_running_stats, norm.running_mean, norm.running_var, norm.num_batches_tracked = track, None, None, None
    assert_equals_plain_form(model, normal(4, 3, 13, 11), 1e-9, 1e-9)


def test_other_channels_are_refused():
    """A buffer for all features has room for channels that are not there."""
    narrow, short, thin = create(), create(), create()
    narrow.features.conv0 = torch.nn.Conv2d(3, 12, 3, padding=1, bias=False, dtype=torch.float64)
    del short.features.denseblock1.denselayer1
    conv3 = thin.features.denseblock1.denselayer1.conv3
    thin.features.denseblock1.denselayer1.conv3 = torch.nn.Conv2d(
        conv3.in_channels, 4, 1, bias=False, dtype=torch.float64)
    for model in (narrow, short, thin):
        with pytest.raises(RuntimeError, match='running_mean should contain'):
            model(normal(4, 3, 13, 11))


def test_fake_tensors_take_the_plain_form():
    mode, model = FakeTensorMode(), create()
    with FakeCopyMode(mode):
        model = copy.deepcopy(model)
    with mode, runs_of(training_form_cpu.NewFeatures) as counts:
        assert model(torch.empty(4, 3, 13, 11, dtype=torch.float64)).shape == (4, 5)
    assert counts == {'NewFeatures': 0}


def test_nets_are_made_of_fake_tensors():
    with FakeTensorMode():
        assert Dense2Net(8, (2, 2), num_classes=5)(torch.empty(4, 3, 16, 16)).shape == (4, 5)


def test_recorded_operations_are_those_of_the_plain_form():
    model, x = create(), normal(4, 3, 13, 11)
    twin = copy.deepcopy(model)
    with runs_of(training_form_cpu.NewFeatures) as counts:
        graph = make_fx(lambda x: model(x))(x)
    assert counts == {'NewFeatures': 0}
    with plain_form():
        expected = twin(x)
    torch.testing.assert_close(graph(x), expected)


@pytest.mark.parametrize('change', [
    dict(norm_layer='evonormb0'), dict(norms=lambda norm: setattr(norm, 'num_batches_tracked', None))])
def test_checkpointing_counts_a_batch_once(change):
    prepare = change.pop('norms', lambda norm: None)
    states = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = Dense2Net(8, (2, 2), num_classes=5, dtype=torch.float64, **change).train()
        for layer in model.features.denseblock1.values():
            prepare(layer.norm1)
        model.set_grad_checkpointing(checkpointing)
        with plain_form():
            model(normal(4, 3, 13, 11)).square().sum().backward()
        states.append(model.state_dict())
    torch.testing.assert_close(*states)


def test_frozen_parameters():
    model = create(attn_layer='se')
    for name, p in model.named_parameters():
        p.requires_grad_('denseblock2.denselayer2' in name or 'norm2' in name)
    twin = copy.deepcopy(model)
    x = normal(4, 3, 13, 11)
    model(x).square().sum().backward()
    with plain_form():
        twin(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters()):
        assert (p.grad is None) == (q[1].grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q[1].grad, rtol=1e-9, atol=1e-9, msg=name)


def test_a_block_twice_in_one_graph_and_backward_twice():
    torch.manual_seed(0)
    block = vary(DenseBlock(2, 8, 8, [0., 0.], scale=2, dtype=torch.float64)).train()
    inner = dense2net.DenseTransition(24, 8, BatchNormAct2d, dtype=torch.float64).train()
    x = normal(2, 8, 8, 8).requires_grad_()

    def gradients():
        loss = (block(inner(block(x))).sum() * block(x + 1.).square().mean())
        inputs = (x, *block.parameters())
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        second = torch.autograd.grad(loss, inputs)
        with pytest.raises(RuntimeError, match='backward through the graph a second time'):
            torch.autograd.grad(loss, inputs)
        return first, second

    first, second = gradients()
    for a, b in zip(first, second):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    with plain_form():
        for a, b in zip(first, gradients()[0]):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_features_in_several_places():
    """The output's gradient may be shared, expanded or of another memory format: it is not written to."""
    model = create()
    twin = copy.deepcopy(model)

    def loss(net, x):
        _, features = net.forward_intermediates(x)
        return sum(f.sum() for f in features) + features[1].mul(2.).add(features[1]).sum()

    x = normal(4, 3, 13, 11)
    loss(model, x).backward()
    with plain_form():
        loss(twin, x).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        if q.grad is None:
            assert p.grad is None or not p.grad.any()
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9, msg=name)
    block, x = model.features.denseblock1, normal(2, 16, 8, 8)
    y = block(x.requires_grad_())
    gradient = normal(*y.shape)
    kept = gradient.clone()
    y.backward(gradient)
    assert torch.equal(gradient, kept)


def test_changes_that_would_spoil_backward_are_named():
    block, x = create().features.denseblock1, normal(2, 16, 8, 8).requires_grad_()
    with pytest.raises(RuntimeError, match='modified inplace'):
        block(x).mul_(2.)
    y = block(x)
    with torch.no_grad():
        block.denselayer1.conv1.weight.mul_(2.)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        y.sum().backward()
    transition = dense2net.DenseTransition(16, 8, BatchNormAct2d, dtype=torch.float64)
    for module in (block, transition):
        with pytest.raises(RuntimeError, match='no second derivatives.*create_graph=True'):
            torch.autograd.grad(module(x).sum(), x, create_graph=True)
        y = module(x)
        with pytest.raises(RuntimeError, match='no batched gradients.*is_grads_batched=True'):
            torch.autograd.grad(y, x, torch.ones(2, *y.shape, dtype=y.dtype), is_grads_batched=True)


def test_second_derivatives_of_the_plain_form(monkeypatch):
    monkeypatch.setattr(training_form, '_enabled', True)
    model, x = create(), normal(4, 3, 13, 11)
    for enable, runs in ((False, 0), (True, 7)):
        training_form.set_training_form(enable)
        with runs_of(training_form_cpu.NewFeatures) as counts:
            loss = model(x).square().mean()
        assert counts['NewFeatures'] == runs
        if not enable:
            weight = model.features.denseblock1.denselayer1.conv1.weight
            gradient, = torch.autograd.grad(loss, weight, create_graph=True)
            assert torch.autograd.grad(gradient.square().sum(), weight)[0].abs().sum() > 0


@pytest.mark.parametrize('change', CHANGES)
def test_changed_layers_count(change):
    model = change_layers(create(dtype=torch.float32), change)
    twin, x = copy.deepcopy(model), normal(2, 3, 33, 33, dtype=torch.float32)
    with plain_form():
        expected = twin(x)
    y = model(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    gradient, expected_gradient = (
        torch.autograd.grad(logits.square().sum(), net.features.conv0.weight)[0]
        for logits, net in ((y, model), (expected, twin)))
    scale = expected_gradient.abs().max().item()
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-3 * scale)


def test_forward_derivatives():
    model, x = create(), normal(4, 3, 13, 11)
    with torch.autograd.forward_ad.dual_level():
        y = model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        assert torch.autograd.forward_ad.unpack_dual(y).tangent.abs().sum() > 0


@pytest.mark.parametrize(
    'change', [
        'eval', 'frozen_norms', 'norms_in_eval', 'one_value', 'hook', 'forward', 'bias', 'sync', 'silu', 'layernorm2d'])
def test_plain_form_where_the_training_form_does_not_apply(change):
    model = create(
        dtype=torch.float32, act_layer='silu' if change == 'silu' else 'relu',
        norm_layer='layernorm2d' if change == 'layernorm2d' else 'batchnorm2d')
    x = normal(4, 3, 16, 16, dtype=torch.float32)
    if change == 'eval':
        model.eval()
    elif change == 'frozen_norms':
        freeze_batch_norm_2d(model.features)
    elif change == 'norms_in_eval':
        for m in model.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.eval()
    elif change == 'one_value':
        with pytest.raises(ValueError, match='more than 1 value per channel'):
            model(normal(1, 3, 4, 4, dtype=torch.float32))
        return
    elif change == 'hook':
        seen = []
        for block in model.features[1:-1:2]:
            block.denselayer1.conv1.register_forward_hook(lambda *args: seen.append(args))
    elif change == 'forward':
        seen = []
        for block in model.features[1:-1:2]:
            conv = block.denselayer1.conv1
            conv.forward = lambda x, conv=conv: seen.append(x) or type(conv).forward(conv, x)
    elif change == 'bias':
        for block in model.features[1:-1:2]:
            layer = block.denselayer1
            layer.conv1 = torch.nn.Conv2d(layer.conv1.in_channels, layer.conv1.out_channels, 1, bias=True)
    elif change == 'sync':
        assert not training_form.has_training_form(convert_sync_batchnorm(model.features.denseblock1), x)
        return
    twin = copy.deepcopy(model)
    with runs_of(training_form_cpu.NewFeatures) as counts:
        y = model(x)
    assert counts['NewFeatures'] == 0
    if change in ('hook', 'forward'):
        assert len(seen) == 3
    with plain_form():
        torch.testing.assert_close(y, twin(x), rtol=1e-5, atol=1e-5)


def test_blocks_of_few_pixels_take_the_plain_form(monkeypatch):
    monkeypatch.undo()
    model = create(dtype=torch.float32)
    x = normal(4, 3, 32, 32, dtype=torch.float32)
    for images, checkpointing, layers in ((x, False, 2), (x[:3], False, 0), (x[:3], True, 0)):
        model.set_grad_checkpointing(checkpointing)
        with runs_of(training_form_cpu.NewFeatures, training_form_cpu.Transition) as counts:
            model(images)
        assert counts == {'NewFeatures': layers, 'Transition': 2}


def test_traced_forms_train_as_the_plain_form():
    """``torch.compile`` is tested with the models."""
    model = create(4, (2, 1), dtype=torch.float32, scale=2)
    x = normal(4, 3, 8, 8, dtype=torch.float32)
    with plain_form():
        expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(torch.jit.script(copy.deepcopy(model))(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.fx.symbolic_trace(copy.deepcopy(model))(x), expected, rtol=1e-4, atol=1e-4)
    covered = []
    torch.func.grad(lambda x: covered.append(training_form.has_training_form(model, x)) or x.sum())(x)
    assert covered == [False]


def test_statistics_are_updated_without_gradients_too():
    model = create()
    twin = copy.deepcopy(model)
    x = normal(4, 3, 13, 11)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = model(x)
            with plain_form():
                torch.testing.assert_close(y, twin(x), rtol=1e-9, atol=1e-9)
    for (name, a), b in zip(model.named_buffers(), twin.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


def test_kept_losses_keep_no_memory():
    def pools(keep):
        others = [o for o in gc.get_objects() if isinstance(o, MemoryPool)]
        model, losses = create(block_config=(2, 2)), []
        for side in (16, 20, 24):
            loss = model(normal(2, 3, side, side)).sum()
            loss.backward()
            losses.append(loss if keep else loss.item())
        gc.collect()
        return sum(isinstance(o, MemoryPool) and not any(o is other for other in others) for o in gc.get_objects())

    assert pools(keep=True) == pools(keep=False) == 2  # of the last size, one a block


def test_full_net_keeps_less_with_checkpointing():
    """Bytes that the graph keeps, each storage once."""
    def kept(model, x):
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            alive.append(t)
            return t

        alive = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(x).sum().backward()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(size for data, size in storages.items() if data not in weights)

    torch.manual_seed(0)
    x = normal(8, 3, 32, 32, dtype=torch.float32)
    model = timm.create_model('dense2net40_k12_s4').train()
    ours = kept(model, x)
    model.set_grad_checkpointing()
    checkpointed = kept(model, x)
    model.set_grad_checkpointing(False)
    with plain_form():
        plain = kept(model, x)
    assert ours < 0.5 * plain
    assert checkpointed < 0.25 * plain


def test_kernels_are_tried_only_where_something_trains(monkeypatch):
    """On a device other than the CPU: trying compiles them."""
    tried = []
    monkeypatch.setattr(training_form, 'runs_on_kernels', tried.append)
    block = Dense2Net(8, (2,), num_classes=5, scale=4, device='meta').features.denseblock1
    x = torch.empty(2, 16, 8, 8, device='meta')
    assert not training_form.has_training_form(block.eval(), x) and not tried
    assert not training_form.has_training_form(block.train(), x) and tried
