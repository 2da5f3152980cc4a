"""The networks of the slides' table: their printed sizes, their structure and what timm expects of a model."""
import copy
import json
from functools import partial

import pytest
import timm
import torch
import torch.nn as nn
from timm.data import resolve_data_config
from timm.layers import SEModule
from timm.models import group_parameters
from training_runs import arguments, run_here

import timm_dense2net  # noqa: F401
from timm_dense2net.counts import count_macs, count_params
from timm_dense2net.deck import TABLE
from timm_dense2net.table import main
from timm_dense2net.trained import load_trained

MODELS = timm.list_models(module='resnet_cifar')
# Thin models with one of each kind of block, for what must really be computed.
THIN = {
    'wide_resnet28_10': dict(layers=(1, 2, 1), channels=(8, 16, 24)),
    'resnext29_8x64d': dict(cardinality=2, base_width=4),
    'seres2next29_6x24d_4s': dict(cardinality=2, base_width=4),
    'pyramidnet164_a84': dict(layers=(2, 2, 2), alpha=12),
}


def create(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def thin(name, **kwargs):
    return create(name, **dict(THIN[name], **kwargs))


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_every_model_is_in_the_table():
    assert {row.model for row in TABLE} | {'pyramidnet164_a84'} == {*MODELS, 'densenet190_k40_cifar'}
    assert len(TABLE) == 11


def test_table_command(capsys):
    """The slides' counts, to their printed precision, are of the networks without their classifiers."""
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == len(TABLE)
    for row, line in zip(TABLE, lines):
        params, error, name, trunk, total, _ = line.removeprefix(row.network).split()
        model = create(row.model, device='meta')
        assert name == row.model and int(total.replace(',', '')) == count_params(model)
        assert int(trunk.replace(',', '')) == count_params(model) - count_params(model.get_classifier())
        assert params == f'{row.params}M' == f'{int(trunk.replace(",", "")) / 1e6:.1f}M'
        assert error == f'{row.error:.2f}'


@pytest.mark.parametrize('name, num_classes, params', [
    # Counted by hand in the papers' public implementations.
    ('wide_resnet28_10', 100, 36_536_884),
    ('resnext29_8x64d', 10, 34_426_698),
    ('pyramidnet164_a84', 100, 3_793_584),
])
def test_exact_sizes(name, num_classes, params):
    model = create(name, device='meta', num_classes=num_classes)
    assert sum(p.numel() for p in model.parameters()) == params


@pytest.mark.parametrize('name', ['resnext29_8x64d', 'wide_resnet28_10', 'pyramidnet164_a84'])
def test_an_unknown_activation_is_named(name):
    with pytest.raises(ValueError, match="unknown act_layer 'foo'"):
        create(name, device='meta', act_layer='foo')


def test_first_block_of_a_stage_convolves_every_split():
    model = create('res2next29_6x24d_4s', device='meta')
    for stage in (model.layer1, model.layer2, model.layer3):
        counts = [sum(m.kernel_size == (3, 3) for m in b.modules() if isinstance(m, nn.Conv2d)) for b in stage]
        assert counts == [4, 3, 3]
    block = thin('seres2next29_6x24d_4s', zero_init_last=False).eval().layer2[0]
    x = images(2, 256, 8, 8)
    with torch.no_grad():
        splits = block.bn1(block.conv1(x)).relu().chunk(4, 1)
        convs = [nn.Sequential(*layers) for layers in zip(block.convs, block.bns)] + [block.pool]
        y = torch.cat([conv(split).relu() for conv, split in zip(convs, splits)], 1)
        y = block.se(block.bn3(block.conv3(y))) + block.downsample(x)
        torch.testing.assert_close(block(x), y.relu())


def test_first_block_of_a_stage_has_the_norms_asked_for():
    norm_layer = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
    block = create('res2next29_6x24d_4s', layers=(1, 1, 1), norm_layer=norm_layer).layer1[0]
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 7 and {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}
    assert block.pool[1] is not block.bns[0] and block.pool[1].weight is not block.bns[0].weight


def test_pyramid_widths_rise_evenly():
    model = create('pyramidnet164_a84', device='meta')
    widths = [b.conv2.out_channels for stage in model.stages for b in stage.blocks]
    assert len(widths) == 54 and widths[0] == 18 and widths[-1] == 16 + 84
    assert max(b - a for a, b in zip(widths, widths[1:])) == 2 and widths == sorted(widths)
    assert model.num_features == 400


def test_other_widths_fit_or_are_refused():
    model = create('pyramidnet164_a84', device='meta', layers=(3, 3, 3), alpha=72, stem_chs=24)
    maps = model.forward_intermediates(torch.empty(1, 3, 32, 32, device='meta'), intermediates_only=True)
    assert [m.shape[1] for m in maps] == [info['num_chs'] for info in model.feature_info]
    for kwargs in (dict(alpha=85), dict(stem_chs=20)):
        with pytest.raises(ValueError, match='must be multiples of 8'):
            create('pyramidnet164_a84', device='meta', **kwargs)
    wide = create('wide_resnet28_10', device='meta', layers=(1, 1, 1), stem_chs=20)
    assert wide(torch.empty(1, 3, 32, 32, device='meta')).shape == (1, 100)
    assert len(create('resnext29_8x64d', device='meta', layers=(1, 1, 2)).layer3) == 2


def test_pyramid_shortcut_pads_with_zeros():
    block = thin('pyramidnet164_a84').eval().stages[1].blocks[0]
    nn.init.zeros_(block.norm4.weight)
    x = images(1, block.norm1.num_features, 8, 8)
    with torch.no_grad():
        y = block(x)
    in_chs = x.shape[1]
    torch.testing.assert_close(y[:, :in_chs], nn.functional.avg_pool2d(x, 2))
    assert y.shape[1] > in_chs and not y[:, in_chs:].any()


@pytest.mark.parametrize('name', MODELS)
def test_default_cfg(name):
    model = create(name, device='meta').eval()
    cfg = model.default_cfg
    assert cfg['architecture'] == name and cfg['license'] and cfg['paper_ids'] and cfg['origin_url']
    assert model.num_classes == cfg['num_classes'] == 100
    config = resolve_data_config(model=model)
    assert config['input_size'] == (3, 32, 32) and config['mean'] == (0.50707516, 0.48654887, 0.44091784)
    assert config['std'] == (0.26733429, 0.25643846, 0.27615047)
    features = model.forward_features(torch.empty(2, 3, 32, 32, device='meta'))
    assert features.shape == (2, model.num_features, *cfg['pool_size'])
    assert model.forward_head(features).shape == (2, 100)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert isinstance(model.get_submodule(cfg['first_conv']), nn.Conv2d)
    assert model.get_submodule(cfg['classifier']) is model.get_classifier()
    json.dumps(model.pretrained_cfg)
    assert any(isinstance(m, SEModule) for m in model.modules()) == name.startswith('se')


@pytest.mark.parametrize('name', THIN)
def test_constructor_arguments_and_reset(name):
    model = thin(
        name, in_chans=4, num_classes=7, global_pool='catavgmax', drop_rate=0.1, drop_path_rate=0.2, device='meta',
        dtype=torch.bfloat16)
    assert {p.device.type for p in model.parameters()} == {'meta'}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.in_chans == 4 and model.head_hidden_size == 2 * model.num_features
    rates = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    assert rates == sorted(rates) and rates[-1] == pytest.approx(0.2)
    x = torch.empty(2, 4, 32, 32, device='meta', dtype=torch.bfloat16)
    assert model(x).shape == (2, 7)
    model.reset_classifier(5, 'avg')
    assert model(x).shape == (2, 5)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    with pytest.raises(TypeError):
        thin(name, device='meta', not_an_argument=1)


@pytest.mark.parametrize('name', THIN)
def test_features_and_pruning(name):
    model = thin(name, device='meta').eval()
    x = torch.empty(1, 3, 64, 48, device='meta')
    final, taps = model.forward_intermediates(x)
    assert final.shape == taps[-1].shape and len(taps) == len(model.feature_info) == 4
    for info, tap in zip(model.feature_info, taps):
        assert tap.shape == (1, info['num_chs'], 64 // info['reduction'], 48 // info['reduction'])
    with torch.device('meta'):
        net = thin(name, features_only=True).eval()
    assert [t.shape for t in net(x)] == [t.shape for t in taps]
    assert net.feature_info.reduction() == [1, 1, 2, 4]
    for i in range(4):
        stopped = model.forward_intermediates(x, indices=[i], stop_early=True, intermediates_only=True)
        assert [t.shape for t in stopped] == [taps[i].shape]
        pruned = thin(name, device='meta').eval()
        assert pruned.prune_intermediate_layers([i], prune_head=False) == [i]
        assert pruned.forward_intermediates(x, [i], intermediates_only=True)[0].shape == taps[i].shape
        kept = [n for n, p in pruned.named_parameters() if n.startswith(('layer', 'stages'))]
        assert bool(kept) == (i > 0)
        assert (pruned.num_classes == 100) == (i == 3)
    assert [t.shape for t in model.forward_intermediates(x, indices=2, intermediates_only=True)] == [
        t.shape for t in taps[-2:]]


@pytest.mark.parametrize('name', THIN)
def test_layer_groups(name):
    model = thin(name, device='meta')
    names = {n for n, _ in model.named_parameters()}
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert groups.keys() == names
        assert sorted(set(groups.values())) == list(range(max(groups.values()) + 1))
        assert groups[f'{model.default_cfg["first_conv"]}.weight'] == 0


@pytest.mark.parametrize('name', THIN)
def test_trains_with_gradient_checkpointing(name):
    model = thin(name, zero_init_last=False) if 'next' in name else thin(name)
    model.train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    grads = []
    for net in (model, twin):
        net(images(2, 3, 32, 32)).square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(g is not None and g.any() for g in grads[0])
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize('name', THIN)
def test_torchscript_fx_and_any_size(name):
    model = thin(name).eval()
    with torch.no_grad():
        scripted, traced = torch.jit.script(model), torch.fx.symbolic_trace(model)
        for size in ((32, 32), (33, 47)):
            x = images(1, 3, *size)
            expected = model(x)
            assert expected.shape == (1, 100) and expected.isfinite().all()
            torch.testing.assert_close(scripted(x), expected)
            torch.testing.assert_close(traced(x), expected)


@pytest.mark.parametrize('name', THIN)
def test_features_are_those_of_the_forward_pass(name):
    model = thin(name).eval()
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        final, taps = model.forward_intermediates(x, norm=True)
        torch.testing.assert_close(final, model.forward_features(x), rtol=0, atol=0)
        plain = model.forward_intermediates(x, intermediates_only=True)
        for kwargs in ({}, dict(feature_cls='getter'), dict(feature_cls='hook'), dict(feature_cls='fx')):
            torch.testing.assert_close(thin(name, features_only=True, **kwargs).eval()(x), plain)


@pytest.mark.parametrize('name', THIN)
def test_weights_start_as_timm_starts_them(name):
    """He initialization of every convolution, the replaced stem's and the added ones among them."""
    model = thin(name)
    for module_name, m in model.named_modules():
        if isinstance(m, nn.Conv2d) and m.bias is None:
            expected = (2 / (m.kernel_size[0] ** 2 * m.out_channels)) ** 0.5
            # Five standard errors of the standard deviation of so many values.
            error = 5 / (2 * m.weight.numel()) ** 0.5
            assert m.weight.std().item() == pytest.approx(expected, rel=error), module_name


def test_macs_of_a_published_figure():
    """Wide ResNet-28-10 has 5.2 G multiply-accumulates by its paper (table 6's FLOPs)."""
    assert round(count_macs(create('wide_resnet28_10', device='meta'), (3, 32, 32)) / 1e9, 1) == 5.2


@pytest.mark.parametrize('name', ['seres2next29_6x24d_4s', 'pyramidnet164_a84'])
def test_trains_with_the_trainer(name, tmp_path):
    kwargs = [f'{key}={value}' for key, value in THIN[name].items()]
    assert run_here(arguments(tmp_path, '--model', name, '--epochs', 1, '--drop', 0, '--model-kwargs', *kwargs)) == 0
    trained = load_trained(checkpoint=tmp_path / 'run')
    assert count_params(trained.model) == json.loads((tmp_path / 'run' / 'result.json').read_text())['params']
