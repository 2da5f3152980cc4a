"""The mathematics of the layers and nets, in float64, against an independent functional form."""
import copy
import math
import re

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.utils import reparameterize_model

from timm_dense2net import SplitHierarchyConv2d, parts
from timm_dense2net.counts import count_macs, count_params
from timm_dense2net.dense2net import Dense2Net, DenseLayer

# Counted independently of the code, at 100 classes and 3x32x32.
PARAMETERS = {
    'densenet121_cifar': 7_048_548,
    'dense2net121_s2': 7_293_540,
    'dense2net121_s4': 6_762_724,
    'dense2net121_s8': 6_096_420,
    'dense2net121_s4_c32': 5_209_252,
    'dense2net121_s4_se': 6_794_740,
    'dense2net121_s8_se': 6_128_436,
}
MACS_M = {
    'densenet121_cifar': 888,
    'dense2net121_s2': 934,
    'dense2net121_s4': 832,
    'dense2net121_s8': 705,
    'dense2net121_s4_c32': 537,
    'dense2net121_s4_se': 832,
    'dense2net121_s8_se': 705,
}


def batch_norm_relu(x, params, prefix, training, eps=1e-5):
    """Batch norm and ReLU written out."""
    if training:
        mean = x.mean((0, 2, 3))
        var = (x - mean[:, None, None]).square().mean((0, 2, 3))
    else:
        mean, var = params[f'{prefix}running_mean'], params[f'{prefix}running_var']
    x = (x - mean[:, None, None]) / (var + eps).sqrt()[:, None, None]
    x = x * params[f'{prefix}weight'][:, None, None] + params[f'{prefix}bias'][:, None, None]
    return x.clamp(min=0)


def conv(x, weight, bias=None, groups=1):
    """Convolution by unfolding, group by group."""
    k = weight.shape[-1]
    n, _, h, w = x.shape
    outputs = []
    for xg, wg in zip(x.chunk(groups, 1), weight.chunk(groups, 0)):
        columns = F.unfold(xg, k, padding=k // 2)
        outputs.append((wg.flatten(1) @ columns).view(n, -1, h, w))
    out = torch.cat(outputs, 1)
    return out if bias is None else out + bias[:, None, None]


def hierarchy(x, params, prefix, scale, groups, training):
    """The slides' formula: y_1 = x_1, y_i = K_i(x_i + y_{i-1})."""
    xs = x.chunk(scale, 1)
    ys = [xs[0]]
    for i in range(1, scale):
        z = conv(xs[i] + ys[-1], params[f'{prefix}convs.{i - 1}.weight'], groups=groups)
        ys.append(batch_norm_relu(z, params, f'{prefix}norms.{i - 1}.', training))
    return torch.cat(ys, 1)


def dense_layer(x, params, prefix, scale, groups, se, training):
    z = conv(batch_norm_relu(x, params, f'{prefix}norm1.', training), params[f'{prefix}conv1.weight'])
    z = batch_norm_relu(z, params, f'{prefix}norm2.', training)
    if scale is None:
        return conv(z, params[f'{prefix}conv2.weight'], groups=groups)
    z = hierarchy(z, params, f'{prefix}conv2.', scale, groups, training)
    z = conv(z, params[f'{prefix}conv3.weight'])
    if se:
        pooled = z.mean((2, 3), keepdim=True)
        hidden = conv(pooled, params[f'{prefix}attn.fc1.weight'], params[f'{prefix}attn.fc1.bias']).clamp(min=0)
        gate = conv(hidden, params[f'{prefix}attn.fc2.weight'], params[f'{prefix}attn.fc2.bias'])
        z = z / (1 + (-gate).exp())
    return z


def network(x, params, block_config, training, **layer):
    x = conv(x, params['features.conv0.weight'])
    for b, num_layers in enumerate(block_config, 1):
        for i in range(1, num_layers + 1):
            new = dense_layer(x, params, f'features.denseblock{b}.denselayer{i}.', training=training, **layer)
            x = torch.cat([x, new], 1)
        if b < len(block_config):
            t = f'features.transition{b}'
            x = conv(batch_norm_relu(x, params, f'{t}.norm.', training), params[f'{t}.conv.weight'])
            n, c, h, w = x.shape
            x = x[:, :, :h // 2 * 2, :w // 2 * 2].reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5))
    x = batch_norm_relu(x, params, 'features.norm5.', training).mean((2, 3))
    return x @ params['classifier.weight'].T + params['classifier.bias']


def randomize(module):
    """Give affine parameters and running statistics values that a wrong use of them would show."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            if 'var' in name:
                tensor.copy_(noise.square() + 0.5)
            elif tensor.ndim == 1:
                tensor.add_(0.3 * noise)
    return module


def assert_same_as_reference(module, reference, x, training):
    """Outputs, input gradient and every parameter's gradient agree in float64."""
    module.train(training)
    params = {k: v.detach().clone().requires_grad_(v.is_floating_point()) for k, v in module.state_dict().items()}
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1, y2 = module(x1), reference(x2, params)
    torch.testing.assert_close(y1, y2, rtol=1e-9, atol=1e-9)
    weights = torch.randn(y1.shape, dtype=y1.dtype, generator=torch.Generator().manual_seed(2))
    (y1 * weights).sum().backward()
    (y2 * weights).sum().backward()
    torch.testing.assert_close(x1.grad, x2.grad, rtol=1e-8, atol=1e-8)
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.grad, params[name].grad, rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('scale,groups', [(1, 1), (2, 1), (4, 1), (8, 1), (2, 4), (4, 2), (4, 4), (8, 2)])
def test_split_hierarchy_equals_formula(scale, groups, training):
    torch.manual_seed(0)
    layer = randomize(SplitHierarchyConv2d(16, scale, groups=groups, dtype=torch.float64))
    x = torch.randn(3, 16, 5, 7, dtype=torch.float64)
    assert_same_as_reference(
        layer, lambda x, params: hierarchy(x, params, '', scale, groups, training), x, training)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('scale,groups,se', [
    (None, 1, False), (None, 4, False), (1, 1, True), (2, 1, False), (2, 1, True), (4, 1, False), (4, 1, True),
    (8, 1, False), (8, 1, True), (4, 4, False), (4, 4, True)])
def test_dense_layer_equals_formula(scale, groups, se, training):
    torch.manual_seed(0)
    layer = randomize(DenseLayer(
        12, 8, scale=scale, cardinality=groups, attn_layer='se' if se else None, dtype=torch.float64))

    class Single(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer([x[:, :5], x[:, 5:]])

    x = torch.randn(3, 12, 5, 6, dtype=torch.float64)
    assert_same_as_reference(
        Single(), lambda x, params: dense_layer(x, params, 'layer.', scale, groups, se, training), x, training)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('scale,groups,se', [
    (None, 1, False), (1, 1, False), (2, 1, False), (4, 1, False), (8, 1, False), (4, 4, False), (4, 1, True),
    (2, 2, True)])
def test_network_equals_formula(scale, groups, se, training):
    torch.manual_seed(0)
    block_config = (2, 3, 2)
    model = randomize(Dense2Net(
        8, block_config, num_classes=5, scale=scale, cardinality=groups, attn_layer='se' if se else None,
        dtype=torch.float64))
    x = torch.randn(4, 3, 13, 11, dtype=torch.float64)
    assert_same_as_reference(
        model,
        lambda x, params: network(x, params, block_config, training, scale=scale, groups=groups, se=se),
        x, training)


def test_running_statistics_follow_the_batch():
    torch.manual_seed(0)
    layer = SplitHierarchyConv2d(8, 2, dtype=torch.float64)
    x = torch.randn(4, 8, 5, 5, dtype=torch.float64)
    z = conv(x[:, 4:] + x[:, :4], layer.convs[0].weight)
    layer(x)
    torch.testing.assert_close(layer.norms[0].running_mean, 0.1 * z.mean((0, 2, 3)))
    torch.testing.assert_close(layer.norms[0].running_var, 0.9 + 0.1 * z.var((0, 2, 3)))


def test_dilation():
    torch.manual_seed(0)
    layer = SplitHierarchyConv2d(8, 2, dilation=2, dtype=torch.float64).eval()
    x = torch.randn(1, 8, 9, 9, dtype=torch.float64)
    z = F.conv2d(x[:, 4:] + x[:, :4], layer.convs[0].weight, padding=2, dilation=2)
    expected = torch.cat([x[:, :4], z.clamp(min=0) / (1 + 1e-5) ** 0.5], 1)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize('name', PARAMETERS)
def test_sizes(name):
    model = timm.create_model(name, num_classes=100, device='meta').eval()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    macs = 0

    def count(module, args, output):
        nonlocal macs
        macs += output.numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(count)
    model(torch.randn(1, 3, 32, 32, device='meta'))
    assert round(macs / 1e6) == MACS_M[name]


# Layers of each block by depth: Table 1 of DenseNet's paper, and (depth - 4) / 6 in each of three blocks.
BLOCK_CONFIGS = {
    '40': (6, 6, 6), '100': (16, 16, 16), '190': (31, 31, 31), '121': (6, 12, 24, 16), '161': (6, 12, 36, 24),
    '169': (6, 12, 32, 32), '201': (6, 12, 48, 32)}


def sizes_of_layer(inputs, growth, scale, groups, se):
    """Parameters and MACs a pixel of a dense layer, and MACs an image of its squeeze-and-excitation."""
    width = 4 * growth // scale
    hierarchy = (scale - 1) * 9 * width ** 2 // groups + 4 * growth ** 2 if scale > 1 else 9 * 4 * growth ** 2
    convs = inputs * 4 * growth + hierarchy
    norms = 2 * (inputs + 4 * growth + (scale - 1) * width)
    hidden = 8 if se else 0  # timm's squeeze-and-excitation has no fewer
    return convs + norms + hidden * (2 * growth + 1) + growth * se, convs, hidden * 2 * growth


def sizes_by_name(name):
    """Parameters and MACs of a registered net, from what its name says."""
    dense2net, depth, deep, growth, scale, groups, se = re.fullmatch(
        r'dense(2?)net(\d+)(d?)(?:_k(\d+))?(?:_s(\d))?(?:_c(\d+))?(_se)?(?:_cifar)?', name).groups()
    growth, scale, groups, se = int(growth or {'161': 48}.get(depth, 32)), int(scale or 1), int(groups or 1), bool(se)
    assert bool(dense2net) == (scale > 1)
    channels, size = 2 * growth, 112 if deep else 32
    stem = 9 * (3 * growth + growth ** 2 + 2 * growth ** 2) if deep else 9 * 3 * channels
    params, macs = stem + (2 * 4 * growth if deep else 0), stem * size ** 2
    size //= 2 if deep else 1
    for index, layers in enumerate(BLOCK_CONFIGS[depth]):
        if index:
            params += channels * (channels // 2) + 2 * channels
            macs += channels * (channels // 2) * size ** 2
            channels, size = channels // 2, size // 2
        for _ in range(layers):
            layer_params, a_pixel, an_image = sizes_of_layer(channels, growth, scale, groups, se)
            params += layer_params
            macs += a_pixel * size ** 2 + an_image
            channels += growth
    classes = 1000 if deep else 100
    return params + 2 * channels + (channels + 1) * classes, macs + channels * classes


@pytest.mark.parametrize('name', timm.list_models(module='dense2net'))
def test_sizes_are_those_of_the_name(name):
    model = timm.create_model(name, device='meta')
    assert (count_params(model), count_macs(model, model.default_cfg['input_size'])) == sizes_by_name(name)


@pytest.mark.parametrize('kwargs,numbers', [
    (dict(scale=3), ('128', '3')),
    (dict(scale=8, cardinality=32), ('16', '32')),
    (dict(scale=None, cardinality=3), ('in 3 groups',)),
    (dict(scale=0), ('scale', '0')),
    (dict(cardinality=0), ('cardinality', '0')),
    (dict(growth_rate=0), ('growth_rate', '0')),
    (dict(growth_rate=-4), ('growth_rate', '-4')),
    (dict(bn_size=0), ('bn_size', '0')),
    (dict(in_chans=0), ('in_chans', '0')),
    (dict(num_classes=-1), ('num_classes', '-1')),
    (dict(growth_rate='four'), ('growth_rate must be an integer', "'four'")),
    (dict(scale=2.5), ('scale must be an integer', '2.5')),
    (dict(block_config=()), ('block_config',)),
    (dict(block_config=('a',)), ('block_config must be a list', "('a',)")),
    (dict(num_classes='10'), ('num_classes must be an integer', "'10'")),
    (dict(block_config=6), ('block_config must be a list', '6')),
    (dict(block_config=(6, 0)), ('block_config', '(6, 0)')),
    (dict(stem_type='deeper'), ('stem_type', 'deeper', 'cifar')),
    (dict(drop_path_rate=1.5), ('drop_path_rate', '1.5')),
    (dict(drop_rate=-0.1), ('drop_rate', '-0.1')),
    (dict(attn_layer='sse'), ('attn_layer', 'sse')),
    (dict(attn_layer='bottleneck'), ('attn_layer', 'bottleneck', '32 channels')),
    (dict(norm_layer=''), ('norm_layer', "''")),
    (dict(norm_layer='groupnorm', scale=8), ("norm_layer 'groupnorm'", '16 channels')),
    (dict(norm_layer='groupnorm', growth_rate=12), ("norm_layer 'groupnorm'", '24 channels')),
    (dict(norm_layer='evonorms0', scale=8), ("norm_layer 'evonorms0'", '16 channels')),
])
def test_bad_arguments_are_named(kwargs, numbers):
    with pytest.raises(ValueError) as info:
        timm.create_model('dense2net121_s4', device='meta', **kwargs)
    assert all(n in str(info.value) for n in numbers)


@pytest.mark.parametrize('name,shape,words', [
    ('dense2net40_k12_s4', (3, 32, 32), ('(N, C, H, W)', '[3, 32, 32]')),
    ('dense2net40_k12_s4', (1, 3, 32, 3), ('32x3', '4x4')),
    ('dense2net121_s4', (1, 3, 7, 7), ('7x7', '8x8')),
    ('dense2net121d_s4', (1, 3, 28, 40), ('28x40', '29x29')),
])
def test_bad_input_is_named(name, shape, words):
    model = timm.create_model(name, device='meta').eval()
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError) as info:
            call(torch.empty(shape, device='meta'))
        assert all(w in str(info.value) for w in words)


@pytest.mark.parametrize('name,size', [('dense2net40_k12_s4', 4), ('dense2net121_s4', 8), ('dense2net121d_s4', 29)])
def test_smallest_input(name, size):
    model = timm.create_model(name, device='meta').eval()
    assert model.min_size == size
    assert model.forward_features(torch.empty(1, 3, size, size, device='meta')).shape[2:] == (1, 1)
    for index, least in enumerate(model.min_sizes):
        x = torch.empty(1, 3, least, least, device='meta')
        maps = model.forward_intermediates(x, indices=[index], stop_early=True, intermediates_only=True)
        assert maps[0].shape[2:] == (1, 1)
    assert model.min_sizes[-1] == size
    model.prune_intermediate_layers([1])
    assert model.min_size == model.min_sizes[1] < size
    model(torch.empty(1, 3, model.min_size, model.min_size, device='meta'))


@pytest.mark.parametrize('form', [nn.Module.eval, nn.Module.train, reparameterize_model])
def test_first_convolution_can_be_replaced(form):
    model = timm.create_model('dense2net40_k12_s4').eval()
    model.features.conv0 = nn.Conv2d(1, 24, 3, padding=1, bias=False)
    model = form(model)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 100)
    with pytest.raises(RuntimeError, match='to have 1 channels, but got 3'):
        model(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize('kwargs', [dict(kernel_size=2), dict(kernel_size=0), dict(dilation=0)])
def test_layer_names_its_wrong_arguments(kwargs):
    (name, value), = kwargs.items()
    with pytest.raises(ValueError, match=f'{name} must be .*{value}'):
        SplitHierarchyConv2d(16, **kwargs)


def test_layer_names_its_wrong_input():
    with pytest.raises(ValueError, match=r'\(N, 16, H, W\), got \[1, 12, 4, 4\]'):
        SplitHierarchyConv2d(16)(torch.randn(1, 12, 4, 4))


@torch.no_grad()
def test_large_batches_run_by_parts(monkeypatch):
    model = Dense2Net(8, (2, 2), num_classes=5).eval()
    x = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    monkeypatch.setattr(parts, 'IMAGE_CACHE_BYTES', math.ceil(3 * 32 * 32 * 32 * 4 / torch.get_num_threads()))
    seen = []
    layer_forward = DenseLayer.forward
    monkeypatch.setattr(
        DenseLayer, 'forward', lambda self, features: seen.append(len(features[0])) or layer_forward(self, features))
    torch.testing.assert_close(model(x), expected)
    assert seen[:6] == [3, 3, 3, 3, 1, 1]
    # What sees the batch as a whole keeps it: hooks, and norms that take their statistics from it.
    layer = model.features.denseblock1.denselayer1
    handle = layer.register_forward_hook(lambda *args: None)
    seen.clear()
    model(x)
    handle.remove()
    assert seen == [7, 7, 7, 7]
    layer.norm1.track_running_stats, layer.norm1.running_mean, layer.norm1.running_var = False, None, None
    seen.clear()
    model(x)
    assert seen == [7, 7, 7, 7]


@pytest.mark.parametrize('kwargs', [dict(scale=8, attn_layer='se'), dict(scale=None), dict(stem_type='deep')])
def test_he_initialization(kwargs):
    """Normal, of variance 2 / (inputs of an output); norms begin with 1 and 0, the classifier with bias 0."""
    torch.manual_seed(0)
    model = Dense2Net(growth_rate=32, block_config=(2, 2), num_classes=5, **kwargs)
    for name, m in model.named_modules():
        if isinstance(m, torch.nn.Conv2d):
            expected = (2 / m.weight[0].numel()) ** 0.5
            # Five standard errors of the standard deviation of so many values.
            assert m.weight.std().item() == pytest.approx(expected, rel=5 / (2 * m.weight.numel()) ** 0.5), name
        elif isinstance(m, torch.nn.BatchNorm2d):
            assert (m.weight == 1).all() and (m.bias == 0).all(), name
    assert (model.classifier.bias == 0).all()


def test_dropout_is_before_the_classifier():
    model, plain = (
        Dense2Net(growth_rate=8, block_config=(1, 1), num_classes=5, drop_rate=rate) for rate in (0.5, 0.))
    plain.load_state_dict(model.state_dict())
    features = torch.rand(2, model.num_features, 4, 4)
    pooled = model.forward_head(features, pre_logits=True)  # in training mode
    kept = plain.forward_head(features, pre_logits=True)
    assert set((pooled / kept).round(decimals=3).unique().tolist()) == {0., 2.}
    assert torch.equal(model.eval().forward_head(features), plain.eval().forward_head(features))


def test_attention_is_initialized_as_it_is_made():
    """timm's global context adds at first what its last bias says, whatever the image."""
    model = Dense2Net(growth_rate=16, block_config=(1, 1), num_classes=5, attn_layer='gca')
    assert (model.features.denseblock2.denselayer1.attn.mlp_add.fc2.weight == 0).all()


def test_a_graph_with_checkpointing_takes_several_backward_passes():
    model = timm.create_model('dense2net40_k12_s4', block_config=(1, 1), growth_rate=8).double().train()
    x = torch.randn(2, 3, 16, 16, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in (False, True):
        twin = copy.deepcopy(model)
        twin.set_grad_checkpointing(checkpointing)
        y = twin(x)
        y.sum().backward(retain_graph=True)
        y.square().sum().backward()
        gradients.append([p.grad for p in twin.parameters()] + [b.double() for b in twin.buffers()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)
