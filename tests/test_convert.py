"""The hierarchy in place of other models' 3x3 convolutions, held to timm's contract and to the layer's formula."""
import contextlib
import copy
import json

import pytest
import timm
import torch
import torch.nn as nn
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from timm.utils import reparameterize_model

from timm_dense2net import SplitHierarchyConv2d
from timm_dense2net.checkpoint import save_weights
from timm_dense2net.convert import conversion_metadata, convert_res2net, main, reapply_conversion
from timm_dense2net.counts import count_macs, count_params
from timm_dense2net.trained import load_trained

# Parameters, MACs (M) at 224x224 before, which are those of timm's results tables, MACs after at scale 4, and how many
# 3x3 convolutions are replaced and kept.
SIZES = {
    'resnet50': (25_557_032, 4089, 2868, 13, 3),
    'resnext50_32x4d': (25_028_904, 4230, 4184, 13, 3),
    'regnety_008': (6_263_168, 797, 773, 10, 5),
    'densenet121': (7_978_856, 2834, 2662, 58, 0),
    'dla60': (22_036_632, 4236, 3015, 13, 5),
}
# One of each family and of each kind of convolution: plain, grouped, unequal, depthwise, padded by number.
MODELS = ['resnet14t', 'resnext26ts', 'regnety_002', 'densenet121', 'dla46_c', 'efficientnet_lite0']


def create(name, **kwargs):
    torch.manual_seed(0)
    kwargs = dict(num_classes=5, **kwargs)
    return timm.create_model(name, **kwargs)


def convert(name, scale=2, **kwargs):
    return convert_res2net(create(name, **kwargs), scale)


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def hierarchies(model):
    return [m for m in model.modules() if isinstance(m, SplitHierarchyConv2d)]


def params_of_replacement(conv, scale):
    """From the formula: scale - 1 convolutions with norm on splits, and a 1x1 convolution between unequal widths."""
    width = conv.in_channels // scale
    conv_params = 9 * width * conv.in_channels // conv.groups if conv.groups > 1 else 9 * width ** 2
    proj = 0 if conv.in_channels == conv.out_channels else conv.in_channels * conv.out_channels
    return (scale - 1) * (conv_params + 2 * width) + proj


@pytest.mark.parametrize('name', SIZES)
def test_sizes_before_and_after(name):
    params, macs, macs_after, replaced, kept = SIZES[name]
    plain = timm.create_model(name, device='meta')
    assert (count_params(plain), round(count_macs(plain, (3, 224, 224)) / 1e6)) == (params, macs)
    model = copy.deepcopy(plain)
    assert convert_res2net(model, scale=4) is model
    convs = [plain.get_submodule(n) for n in model.res2net_conversion['replaced']]
    assert count_params(model) == params + sum(params_of_replacement(c, 4) - c.weight.numel() for c in convs)
    assert round(count_macs(model, (3, 224, 224)) / 1e6) == macs_after
    assert len(hierarchies(model)) == len(convs) == replaced
    assert len(model.res2net_conversion['kept']) == kept


def test_densenet_becomes_dense2net():
    """Converting the baseline gives the deck's model: the same weights compute the same."""
    model = convert_res2net(timm.create_model('densenet121_cifar'), scale=4).eval()
    dense2net = timm.create_model('dense2net121_s4').eval()
    weights = {
        name.replace('conv2.hierarchy', 'conv2').replace('conv2.proj', 'conv3'): tensor
        for name, tensor in model.state_dict().items()}
    dense2net.load_state_dict(weights)
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense2net(x), rtol=0, atol=0)
        fused = reparameterize_model(model)(x)
        torch.testing.assert_close(fused, dense2net(x), rtol=1e-4, atol=1e-4)


def test_converted_densenet_trains_as_dense2net():
    model = convert_res2net(timm.create_model('densenet121_cifar', block_config=(2, 2)).double(), scale=4).train()
    dense2net = timm.create_model('dense2net121_s4', block_config=(2, 2)).double().train()
    dense2net.load_state_dict({
        name.replace('conv2.hierarchy', 'conv2').replace('conv2.proj', 'conv3'): tensor
        for name, tensor in model.state_dict().items()})
    x = images(2, 3, 8, 8).double()
    gradients = []
    for net in (model, dense2net):
        net(x).square().sum().backward()
        gradients.append(net.features.conv0.weight.grad)
    torch.testing.assert_close(*gradients)


def net(*convs, first_conv=None):
    model = nn.Sequential(*convs)
    model.pretrained_cfg = dict(first_conv=first_conv)
    return model


@pytest.mark.parametrize('conv, reason', [
    (dict(stride=2), 'stride 2x2'),
    (dict(padding=0), 'padding (0, 0) at dilation (1, 1)'),
    (dict(dilation=2), 'padding (1, 1) at dilation (2, 2)'),
    (dict(padding_mode='reflect'), 'padding mode reflect'),
    (dict(in_channels=6), '6 channels at scale 4'),
    (dict(groups=2), '2 groups at scale 4'),
    (dict(groups=8, out_channels=8), '16 to 8 channels in 8 groups'),
])
def test_reasons_to_keep(conv, reason):
    args = dict(dict(in_channels=16, out_channels=16, kernel_size=3, padding=1), **conv)
    model = convert_res2net(net(nn.Conv2d(**args), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)))
    assert model.res2net_conversion['kept'] == {'0': reason}
    assert model.res2net_conversion['replaced'] == ['1']
    assert type(model[0]) is type(model[2]) is nn.Conv2d


def test_first_convolution_and_subclasses_are_kept():
    convs = [nn.Conv2d(4, 16, 3, padding=1), timm.layers.StdConv2d(16, 16, 3, padding=1)]
    convs.append(nn.Conv2d(16, 16, 3, padding=1))
    conversion = convert_res2net(net(*convs, first_conv='0')).res2net_conversion
    assert conversion['kept'] == {'0': 'takes the images', '1': 'StdConv2d is more than a convolution'}
    assert conversion['replaced'] == ['2']


def test_first_convolution_of_a_feature_extractor_is_kept():
    model = timm.create_model('vgg11', in_chans=4, features_only=True, device='meta')
    assert convert_res2net(model, 4).res2net_conversion['kept']['features_0'] == 'takes the images'


@pytest.mark.parametrize('name', ['repvgg_a0', 'mobileone_s0', 'tiny_vit_5m_224', 'repghostnet_050'])
def test_what_a_block_folds_for_inference_is_kept(name):
    torch.manual_seed(0)
    model, x = timm.create_model(name).eval(), torch.randn(1, 3, 224, 224)
    with contextlib.suppress(ValueError):  # nothing may be left to convert
        convert_res2net(model, 4)
    with torch.no_grad():
        logits = model(x)
        # By the logits' own spread, which is 1e14 for an untrained MobileOne.
        torch.testing.assert_close(reparameterize_model(model)(x), logits, rtol=0, atol=1e-4 * logits.std().item())


@pytest.mark.parametrize('name', ['dense2net121_s4', 'res2net50_26w_4s'])
def test_hierarchies_are_not_split_again(name):
    with pytest.raises(ValueError, match='in a hierarchy already'):
        convert_res2net(timm.create_model(name, device='meta'))


@pytest.mark.parametrize('groups, dilation, bias', [(1, 1, False), (8, 1, True), (32, 2, False), (4, 3, False)])
def test_equal_widths_keep_groups_and_dilation(groups, dilation, bias):
    model = net(nn.Conv2d(32, 32, 3, padding=dilation, dilation=dilation, groups=groups, bias=bias))
    layer = convert_res2net(model, scale=4)[0]
    for conv in layer.convs:
        assert conv.in_channels == conv.out_channels == 8 and conv.dilation == (dilation, dilation)
        if groups > 1:
            assert conv.in_channels // conv.groups == 32 // groups  # no group is cut or widened
    assert model(images(2, 32, 9, 7)).shape == (2, 32, 9, 7)


@pytest.mark.parametrize('bias', [False, True])
def test_unequal_widths_end_in_a_linear_convolution(bias):
    model = convert_res2net(net(nn.Conv2d(32, 12, 3, padding='same', bias=bias)), scale=2)
    assert model[0].proj.kernel_size == (1, 1) and (model[0].proj.bias is not None) == bias
    assert model(images(2, 32, 9, 7)).shape == (2, 12, 9, 7)


def test_device_dtype_and_mode_are_kept():
    model = convert_res2net(create('resnet14t', device='meta', dtype=torch.bfloat16).eval(), scale=2)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {'meta'}
    assert not any(m.training for m in model.modules())


def test_other_weights_are_kept():
    model = create('resnet14t')
    weights = copy.deepcopy(model.state_dict())
    converted = convert_res2net(model, scale=2)
    replaced = tuple(f'{name}.' for name in converted.res2net_conversion['replaced'])
    same = {name: tensor for name, tensor in converted.state_dict().items() if not name.startswith(replaced)}
    assert same.keys() == {name for name in weights if not name.startswith(replaced)}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in same.items())


@pytest.mark.parametrize('name', MODELS)
def test_forward_and_backward(name):
    model = convert(name).train()
    y = model(images(2, 3, 64, 64))
    assert y.shape == (2, 5)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('name', MODELS)
def test_features(name):
    plain = create(name).eval()
    model = convert(name).eval()
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        taps = model.forward_intermediates(x, intermediates_only=True)
        assert [t.shape for t in taps] == [t.shape for t in plain.forward_intermediates(x, intermediates_only=True)]
        assert model.forward_features(x).shape == plain.forward_features(x).shape
        features = create(name, features_only=True).eval()
        shapes = [t.shape for t in features(x)]
        assert [t.shape for t in convert_res2net(features, 2)(x)] == shapes
        assert len(hierarchies(features)) == len(hierarchies(model))


@pytest.mark.parametrize('base, kwargs', [
    ('dla34', {}), ('vgg11_bn', {}), ('densenet40_k12_cifar', dict(block_config=(2, 2)))])
def test_features_of_a_published_model_are_those_of_its_base(base, kwargs):
    kwargs = dict(kwargs, device='meta')
    conversion = convert_res2net(timm.create_model(base, **kwargs), 4).res2net_conversion
    own = timm.create_model(base, features_only=True, **kwargs)
    published = timm.create_model(
        'res2net_converted', base=base, conversion=conversion, features_only=True, **kwargs)
    assert [dict(info, module='') for info in published.feature_info.get_dicts()] == [
        dict(info, module='') for info in own.feature_info.get_dicts()]


@pytest.mark.parametrize('name', MODELS)
def test_reset_classifier_and_layer_groups(name):
    model = convert(name, device='meta')
    model.reset_classifier(3)
    assert model(torch.empty(1, 3, 64, 64, device='meta')).shape == (1, 3)
    names = {n for n, _ in model.named_parameters()}
    plain = create(name, device='meta')
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        expected = group_parameters(plain, plain.group_matcher(coarse=coarse), reverse=True)
        assert groups.keys() == names
        for conv in model.res2net_conversion['replaced']:
            assert {group for n, group in groups.items() if n.startswith(f'{conv}.')} == {expected[f'{conv}.weight']}
    optimizer = create_optimizer_v2(model, 'sgd', lr=0.1, weight_decay=1e-4, layer_decay=0.8)
    assert sum(len(g['params']) for g in optimizer.param_groups) == len(names)


@pytest.mark.parametrize('name', [name for name in MODELS if name != 'dla46_c'])  # timm's DLA has no checkpointing
def test_gradient_checkpointing(name):
    model = convert(name).train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    x = images(2, 3, 64, 64)
    results = []
    for m in (model, twin):
        torch.manual_seed(3)
        m(x).square().sum().backward()
        results.append([p.grad for p in m.parameters()])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize('name', MODELS)
def test_torchscript_and_fx(name):
    model = convert(name).eval()
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.jit.script(model)(x), expected)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)


@pytest.mark.parametrize('name', ['resnet14t', 'densenet121'])
def test_weights_save_and_load_with_the_conversion(name, tmp_path):
    model = convert(name).eval()
    path = tmp_path / 'weights.safetensors'
    save_weights(path, model.state_dict(), conversion_metadata(model))
    again = load_trained(name, path).model
    assert again.res2net_conversion == json.loads(json.dumps(model.res2net_conversion))
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match="has no convolution"):
        load_trained('regnety_002', path)


def test_refused_conversions_leave_the_model_as_it_was():
    model = create('resnet14t')
    names = list(model.state_dict())
    for kwargs, message in (
            (dict(scale=1), 'at least 2'), (dict(scale=5), '24 channels at scale 5'),
            (dict(norm_layer='nonorm'), 'nonorm')):
        with pytest.raises(ValueError, match=message):
            convert_res2net(model, **kwargs)
        assert list(model.state_dict()) == names and not hasattr(model, 'res2net_conversion')
    with pytest.raises(ValueError, match="lacks 'replaced'"):
        reapply_conversion(model, dict(scale=4, act_layer='relu', norm_layer='batchnorm2d'))
    with pytest.raises(ValueError, match='already converted, at scale 2'):
        convert_res2net(convert_res2net(model, 2), 2)


def test_command(capsys):
    assert main(['resnet18', '--scale', '4', '--num-classes', '100', '--img-size', '32']) == 0
    out = capsys.readouterr().out
    model = timm.create_model('resnet18', num_classes=100, device='meta')
    assert f'parameters {count_params(model) / 1e6:.2f} M -> {count_params(convert_res2net(model)) / 1e6:.2f} M' in out
    assert 'replaced 13: layer1.0.conv1' in out and 'kept 3 (stride 2x2): layer2.0.conv1' in out
    for argv, message in ((['resnet_18'], 'did you mean resnet18'), (['vit_tiny_patch16_224'], 'it has none')):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith('error: ') and message in error
