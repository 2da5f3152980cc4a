"""What timm expects of a registered model, held for every one of ours."""
import copy
import json

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.models import group_modules, group_parameters
from timm.models._features import FeatureGetterNet
from timm.optim import create_optimizer_v2

import timm_dense2net  # noqa: F401

MODELS = timm.list_models(module='dense2net')
CIFAR100_STATS = ((0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047))
IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR_MODELS = [
    'densenet121_cifar', 'dense2net121_s2', 'dense2net121_s4', 'dense2net121_s8', 'dense2net121_s4_c32',
    'dense2net121_s4_se', 'dense2net121_s8_se', 'dense2net40_k12_s4', 'dense2net100_k12_s4', 'dense2net169_s8',
    'dense2net201_s8', 'dense2net161_s8', 'dense2net190_k40_s4', 'densenet190_k40_cifar',
    'densenet40_k12_cifar']
IMAGENET_MODELS = ['dense2net121d_s4', 'dense2net121d_s8', 'dense2net169d_s8']
# One of each kind of layer, for what is slow and does not depend on depth.
KINDS = ['densenet121_cifar', 'dense2net40_k12_s4', 'dense2net121_s4_c32', 'dense2net121_s8_se', 'dense2net121d_s4']


def create(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_names():
    assert sorted(MODELS) == sorted(CIFAR_MODELS + IMAGENET_MODELS)


@pytest.mark.parametrize('name', MODELS)
def test_default_cfg(name):
    model = create(name, device='meta').eval()
    cfg = model.default_cfg
    assert cfg['architecture'] == name
    assert cfg['license'] and cfg['paper_ids'] and cfg['origin_url']
    assert model.num_classes == cfg['num_classes'] == (1000 if name in IMAGENET_MODELS else 100)
    assert cfg['input_size'] == ((3, 224, 224) if name in IMAGENET_MODELS else (3, 32, 32))
    assert not cfg['fixed_input_size']
    assert model.in_chans == 3 and list(model.children())[-1] is model.get_classifier()
    config = resolve_data_config(model=model)
    stats = IMAGENET_STATS if name in IMAGENET_MODELS else CIFAR100_STATS
    assert (config['mean'], config['std']) == stats
    assert config['crop_pct'] == (0.875 if name in IMAGENET_MODELS else 1.0)
    x = torch.empty(2, *cfg['input_size'], device='meta')
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, *cfg['pool_size'])
    assert model.forward_head(features).shape == (2, cfg['num_classes'])
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert isinstance(model.get_submodule(cfg['first_conv']), torch.nn.Conv2d)
    assert model.get_submodule(cfg['classifier']) is model.get_classifier()


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('in_chans', [1, 4])
def test_constructor_arguments(name, in_chans):
    model = create(name, in_chans=in_chans, num_classes=7, global_pool='catavgmax', device='meta', dtype=torch.bfloat16)
    assert {p.device.type for p in model.parameters()} == {'meta'}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.device.type for b in model.buffers()} == {'meta'}
    assert model.head_hidden_size == 2 * model.num_features
    size = model.default_cfg['input_size'][1]
    assert model(torch.empty(2, in_chans, size, size, device='meta', dtype=torch.bfloat16)).shape == (2, 7)
    with pytest.raises(TypeError):
        create(name, device='meta', not_an_argument=1)


@pytest.mark.parametrize('name', KINDS)
def test_reset_classifier(name):
    model = create(name, device='meta', dtype=torch.float64, global_pool='max').train()
    model.reset_classifier(5)
    assert model.global_pool.pool_type == 'max' and model.num_classes == 5
    assert model.classifier.weight.dtype == torch.float64 and model.classifier.weight.device.type == 'meta'
    assert all(m.training for m in model.modules())
    x = torch.empty(2, 3, 32, 32, device='meta', dtype=torch.float64)
    assert model(x).shape == (2, 5)
    model.eval().reset_classifier(0)
    assert not any(m.training for m in model.modules())
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(0, '')
    assert model(x).shape[:2] == (2, model.num_features) and model(x).ndim == 4


@pytest.mark.parametrize('name', KINDS)
def test_forward_intermediates_and_pruning(name):
    model = create(name, device='meta').eval()
    size = model.default_cfg['input_size'][1]
    x = torch.empty(1, 3, size, size, device='meta')
    final, taps = model.forward_intermediates(x)
    assert final.shape == taps[-1].shape
    for info, tap in zip(model.feature_info, taps):
        assert tap.shape == (1, info['num_chs'], size // info['reduction'], size // info['reduction'])
    last = len(taps) - 1
    for i in range(last + 1):
        stopped = model.forward_intermediates(x, indices=[i], stop_early=True, intermediates_only=True)
        assert [t.shape for t in stopped] == [taps[i].shape]
        pruned = copy.deepcopy(model)
        assert pruned.prune_intermediate_layers([i], prune_head=False) == [i]
        assert pruned.forward_features(x).shape[:2] == (1, pruned.num_features)
        assert isinstance(pruned.get_classifier(), torch.nn.Linear) == (i == last)
    assert [t.shape for t in model.forward_intermediates(x, indices=2, intermediates_only=True)] == [
        t.shape for t in taps[-2:]]


@pytest.mark.parametrize('name', ['dense2net40_k12_s4', 'dense2net121d_s4'])
def test_intermediates_are_the_features(name):
    model = create(name).eval()
    x = images(2, 3, 40, 36)
    with torch.no_grad():
        final, taps = model.forward_intermediates(x)
        torch.testing.assert_close(final, model.forward_features(x), rtol=0, atol=0)
        for i in range(len(taps)):
            pruned = copy.deepcopy(model)
            pruned.prune_intermediate_layers([i])
            assert not pruned.features.training
            torch.testing.assert_close(pruned.forward_intermediates(x, [i], intermediates_only=True)[0], taps[i])
        for kwargs in ({}, dict(feature_cls='getter'), dict(feature_cls='hook'), dict(feature_cls='fx')):
            net = create(name, features_only=True, out_indices=(0, 2, 3), **kwargs).eval()  # same seed, same weights
            torch.testing.assert_close(net(x), [taps[0], taps[2], taps[3]])


@pytest.mark.parametrize('name', IMAGENET_MODELS)
def test_features_of_larger_images_are_at_strides_4_to_32(name):
    with torch.device('meta'):
        net = create(name, features_only=True, out_indices=(1, 2, 3, 4)).eval()
    assert net.feature_info.reduction() == [4, 8, 16, 32]
    shapes = [f.shape for f in net(torch.empty(1, 3, 384, 224, device='meta'))]
    assert shapes == [
        (1, channels, 384 // reduction, 224 // reduction)
        for channels, reduction in zip(net.feature_info.channels(), (4, 8, 16, 32))]


@pytest.mark.parametrize('name', MODELS)
def test_features_only(name):
    with torch.device('meta'):
        net = create(name, features_only=True).eval()
    x = torch.empty(1, 3, 64, 64, device='meta')
    taps = create(name, device='meta').eval().forward_intermediates(x, intermediates_only=True)
    assert [t.shape for t in net(x)] == [t.shape for t in taps]
    assert net.feature_info.channels() == [t.shape[1] for t in taps]
    for index in range(len(taps)) if name in KINDS else ():
        with torch.device('meta'):
            net = create(name, features_only=True, out_indices=(index,)).eval()
        assert [t.shape for t in net(x)] == [taps[index].shape]


def test_feature_getter_scripts():
    model = create('dense2net40_k12_s4').eval()
    x = images(1, 3, 32, 32)
    getter = FeatureGetterNet(copy.deepcopy(model), out_indices=(0, 1, 2)).eval()
    expected = model.forward_intermediates(x, indices=(0, 1, 2), intermediates_only=True)
    torch.testing.assert_close(torch.jit.script(getter)(x), expected)


@pytest.mark.parametrize('name', MODELS)
def test_layer_groups(name):
    model = create(name, device='meta')
    names = [n for n, _ in model.named_parameters()]
    fine = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert set(fine) == set(coarse) == set(names)
    depth = sum(len(m) for n, m in model.features.named_children() if n.startswith('denseblock'))
    blocks = len(model.feature_info) - 1
    # stem, layers or blocks with what follows them, head
    assert sorted(set(fine.values())) == list(range(depth + 2))
    assert sorted(set(coarse.values())) == list(range(blocks + 2))
    assert fine['features.conv0.weight'] == 0
    assert group_modules(model, model.group_matcher(), reverse=True)['features.conv0'] == 0
    assert fine['features.norm5.weight'] == depth and fine['classifier.weight'] == depth + 1
    layers = [fine[f'features.denseblock1.denselayer{i}.conv1.weight'] for i in (1, 2, 6)]
    assert layers == [1, 2, 6] and fine['features.transition1.conv.weight'] == fine['features.transition1.norm.weight']


def test_layer_decay_reaches_every_parameter():
    model = create('dense2net40_k12_s4')
    optimizer = create_optimizer_v2(model, 'sgd', lr=0.1, weight_decay=1e-4, layer_decay=0.8)
    assert sum(len(g['params']) for g in optimizer.param_groups) == len(list(model.parameters()))
    scales = {g['lr_scale'] for g in optimizer.param_groups}
    assert len(scales) == 18 + 2 and max(scales) == 1.0


@pytest.mark.parametrize('name', KINDS)
def test_gradient_checkpointing(name):
    x = images(2, 3, 32, 32)
    model = create(name, drop_path_rate=0.2).train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    results = []
    for net in (model, twin):
        torch.manual_seed(3)
        y = net(x)
        y.square().sum().backward()
        results.append((y, [p.grad for p in net.parameters()], dict(net.named_buffers())))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=0)
    torch.testing.assert_close(results[1][1], results[0][1])
    torch.testing.assert_close(results[1][2], results[0][2])  # each batch counts once
    twin.zero_grad()
    twin = convert_sync_batchnorm(twin)
    twin(x).square().sum().backward()
    assert all(p.grad is not None for p in twin.parameters())
    counts = [buffer for buffer_name, buffer in twin.named_buffers() if buffer_name.endswith('num_batches_tracked')]
    assert counts and all(count == 2 for count in counts)
    twin.set_grad_checkpointing(False)
    assert not any(getattr(m, 'grad_checkpointing', False) for m in twin.modules())


@pytest.mark.parametrize('name', KINDS)
def test_torchscript(name):
    model = create(name).eval()
    x = images(1, 3, 32, 32)
    with torch.no_grad():
        scripted = torch.jit.script(model)
        torch.testing.assert_close(scripted(x), model(x))


@pytest.mark.parametrize('name', KINDS)
def test_fx(name):
    model = create(name).eval()
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        traced = torch.fx.symbolic_trace(model)
        torch.testing.assert_close(traced(x), model(x))
        torch.testing.assert_close(torch.jit.script(traced)(x), model(x))


@pytest.mark.parametrize('name', ['dense2net40_k12_s4', 'dense2net121d_s4'])
def test_export_with_dynamic_shapes(name):
    model = create(name).eval()
    stride = model.feature_info[-1]['reduction']
    dims = {0: torch.export.Dim('batch', min=1, max=64)}
    dims.update({d: stride * torch.export.Dim(n, min=2, max=32) for d, n in ((2, 'h'), (3, 'w'))})
    program = torch.export.export(model, (images(2, 3, 64, 96),), dynamic_shapes=(dims,), strict=False)
    with torch.no_grad():
        x = images(3, 3, 96, 64)
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_compiles_to_one_graph(train, checkpointing):
    torch.compiler.reset()
    # in float64, as the compiled net takes the plain form and the other one, in training, a form of its own
    model = create('dense2net40_k12_s4').double().train(train)
    twin = copy.deepcopy(model)
    model.set_grad_checkpointing(checkpointing)
    # aot_eager takes every step of compilation but the code generator, which is not ours to test
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    x = images(2, 3, 32, 32).double()
    y, expected = compiled(x), twin(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))


@pytest.mark.parametrize('name', KINDS)
def test_low_precision_and_memory_format(name):
    model = create(name).eval()
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
        last = model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-4)
        assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('size', [(32, 32), (33, 47), (64, 35)])
def test_any_size_and_batch_one(name, size):
    model = create(name).eval()
    with torch.no_grad():
        y = model(images(1, 3, *size))
    assert y.shape == (1, model.num_classes) and y.isfinite().all()


@pytest.mark.parametrize('name', KINDS)
def test_meta_model_takes_weights(name):
    model = create(name)
    empty = create(name, device='meta')
    empty.load_state_dict(model.state_dict(), assign=True)
    assert all(torch.equal(a, b) for a, b in zip(empty.state_dict().values(), model.state_dict().values()))
    json.dumps(empty.pretrained_cfg)  # as the Hub's config.json needs it


@pytest.mark.parametrize('name', KINDS)
def test_deepcopy_is_independent(name):
    model = create(name).eval()
    twin = copy.deepcopy(model)
    x = images(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        for p in model.parameters():
            p.zero_()
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)


def test_drop_path_rises_with_depth_and_rests_in_eval():
    model = create('dense2net40_k12_s4', drop_path_rate=0.5)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    assert len(rates) == 17 and rates == sorted(rates) and rates[-1] == 0.5  # the first layer's rate is 0
    x = images(8, 3, 32, 32)
    with torch.no_grad():
        plain = create('dense2net40_k12_s4').eval()
        torch.testing.assert_close(model.eval()(x), plain(x), rtol=0, atol=0)
        model.train()
        assert not torch.equal(model(x), model(x))


def test_options_by_name():
    for kwargs in (
            dict(act_layer='silu'), dict(norm_layer='layernorm2d'), dict(attn_layer='eca'), dict(attn_layer='cbam'),
            dict(stem_type=''), dict(bn_size=2), dict(growth_rate=8, scale=8, cardinality=2)):
        model = create('dense2net40_k12_s4', **kwargs).train()
        model(images(2, 3, 32, 32)).sum().backward()
        assert all(p.grad is not None for p in model.parameters()), kwargs


def test_torchvision_layout_of_the_baseline():
    """The trunk has the keys and the mathematics of timm's DenseNet, so weights move between them."""
    ours = create('densenet121_cifar', stem_type='', num_classes=10).eval()
    theirs = timm.create_model('densenet121', num_classes=10).eval()
    ours.load_state_dict(theirs.state_dict())
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
