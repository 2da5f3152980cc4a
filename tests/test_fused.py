"""The inference form equals the plain form in eval mode, whatever its weights, shapes, dtypes and surroundings."""
import copy
import threading

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, DropPath, convert_sync_batchnorm, freeze_batch_norm_2d
from timm.utils import ModelEmaV3, reparameterize_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import timm_dense2net
from changed_layers import CHANGES, Wrapped, change_layers
from timm_dense2net.dense2net import Dense2Net, DenseBlock, SplitHierarchyConv2d
from timm_dense2net.fused import ClampLinear, FusedDenseBlock, norm_relu_as_clamp
from timm_dense2net.in_place import bounds_of

KINDS = {
    'baseline': dict(scale=None),
    's1': dict(scale=1),
    's4': dict(scale=4),
    's8': dict(scale=8, growth_rate=16),
    'groups': dict(scale=4, cardinality=4),
    'se': dict(scale=2, attn_layer='se'),
    'drop_path': dict(scale=4, drop_path_rate=0.5),
    'deep': dict(scale=4, stem_type='deep'),
}


def images(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=dtype)


def settle(model):
    """Norms as after training: weights of both signs and 0, running statistics of real activations."""
    generator = torch.Generator().manual_seed(1)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for m in norms:
            m.weight.add_(0.4 * torch.randn(m.weight.shape, generator=generator, dtype=m.weight.dtype))
            m.bias.add_(0.4 * torch.randn(m.bias.shape, generator=generator, dtype=m.bias.dtype))
            m.weight[0], m.weight[-1] = 0., -0.7
            m.momentum = None
        model.train()
        model(images(16, 3, 64, 64, dtype=next(model.parameters()).dtype))
    return model.eval()


def settle_layer(layer):
    """As after training, for a layer of 16 channels."""
    for m in layer.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(m.weight)
            torch.nn.init.normal_(m.bias)
    layer.train()(images(8, 16, 16, 16))
    return layer.eval()


def create(growth_rate=8, block_config=(2, 3, 2), **kwargs):
    torch.manual_seed(0)
    return settle(Dense2Net(growth_rate, block_config, num_classes=10, **kwargs))


@pytest.mark.parametrize('kind', KINDS)
def test_equals_the_plain_form_in_float64(kind):
    model = create(dtype=torch.float64, **KINDS[kind])
    fused = reparameterize_model(model)
    assert sum(isinstance(m, FusedDenseBlock) for m in fused.modules()) == 3
    with torch.no_grad():
        for shape in ((1, 3, 32, 32), (3, 3, 33, 47), (2, 3, 64, 35)):
            x = images(*shape, dtype=torch.float64)
            torch.testing.assert_close(fused(x), model(x), rtol=1e-10, atol=1e-10)
        assert fused(x[:0]).shape == (0, 10)


@pytest.mark.parametrize('name', ['dense2net121_s4', 'dense2net121_s8'])
def test_float32_logits_of_the_full_nets(name):
    torch.manual_seed(0)
    model = settle(timm.create_model(name))
    x = images(4, 3, 32, 32)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        fused, plain = reparameterize_model(model)(x), model(x)
    scale = exact.abs().max()
    error, plain_error = (fused - exact).abs().max() / scale, (plain - exact).abs().max() / scale
    assert error < 1e-5 + plain_error, f'{error:.2e}, plain form {plain_error:.2e}'


def test_batch_larger_than_what_is_worked_on_at_a_time(monkeypatch):
    model = create()
    fused = reparameterize_model(model)
    x = images(7, 3, 32, 32)
    with torch.no_grad():
        expected = fused(x)
        monkeypatch.setattr(  # two images of the first block
            timm_dense2net.parts, 'IMAGE_CACHE_BYTES', 200_000 // torch.get_num_threads())
        torch.testing.assert_close(fused(x), expected)


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def threads_seen():
    """torch's number of threads, in this thread and in a new one."""
    seen = [torch.get_num_threads()]
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen


def test_groups_of_a_large_batch_have_threads_of_their_own(three_threads, monkeypatch):
    fused = reparameterize_model(create(drop_path_rate=0.5))
    ran = []
    run = fused.features._forward_in_place

    together = threading.Barrier(2)

    def recorded(x):
        ran.append((len(x), threading.get_ident(), torch.get_num_threads()))
        if len(x) == 25:
            together.wait(timeout=60)  # both run at a time, however late a thread wakes
        return run(x)

    def groups_of(x):
        ran.clear()
        return fused(x), sorted(size for size, _, _ in ran)

    monkeypatch.setattr(fused.features, '_forward_in_place', recorded)
    x = images(50, 3, 32, 32)
    few = 2 * 3 * timm_dense2net.in_place.GROUP_IMAGES - 1
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y, sizes = groups_of(x)
            assert sizes == [25, 25] and len({thread for _, thread, _ in ran}) == 2
            assert {threads for _, _, threads in ran} == {1} and threads_seen() == [3, 3]
            assert y.is_inference() == torch.is_inference_mode_enabled()
            torch.testing.assert_close(y, torch.cat([fused(part) for part in x.split(10)]))
            assert groups_of(x[:few])[1] == [few]
    with torch.no_grad():
        # What belongs to the calling thread, or to the batch as a whole, keeps it together.
        with FlopCounterMode(display=False) as counter:
            assert groups_of(x)[1] == [] and counter.get_total_flops()  # it counts by hooks, too
        with torch.profiler.profile() as profile:
            assert groups_of(x)[1] == [50]
        assert 'aten::addmm' in {event.key for event in profile.key_averages()}
        fused.train()  # drop-path draws at random
        assert groups_of(x)[1] == [50]
        fused.eval()
    assert groups_of(x)[1] == [50]
    with torch.no_grad(), pytest.raises(RuntimeError, match='channels'):
        fused.features(images(50, 4, 32, 32))


@pytest.mark.parametrize('kind', ['s4', 's8', 'groups'])
def test_unfolded_and_other_convolutions_agree(kind, monkeypatch):
    model = create(dtype=torch.float64, **KINDS[kind])
    fused = reparameterize_model(model)
    for shape in ((1, 3, 32, 32), (3, 3, 33, 47)):
        x = images(*shape, dtype=torch.float64)
        with torch.no_grad():
            for pixels in (0, 1 << 20):
                monkeypatch.setattr(timm_dense2net.in_place, 'UNFOLDED_PIXELS', pixels)
                torch.testing.assert_close(fused(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('kwargs', [dict(kernel_size=5), dict(dilation=2), dict(kernel_size=1), dict(scale=1)])
def test_hierarchy_of_its_own(kwargs):
    torch.manual_seed(0)
    layer = settle_layer(SplitHierarchyConv2d(16, **{'scale': 4, **kwargs}))
    x = images(2, 16, 9, 11)
    with torch.no_grad():
        torch.testing.assert_close(layer.fuse()(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'weight,bias', [
        (2., 1.), (-2., 1.), (0., 1.), (0., -1.), (1e-30, 1.), (1e-30, -1.), (-1e-42, 3.), (1e-5, 1.), (1e-5, -1.),
        (-1e-5, 1.), (-1e-5, -1.)])
def test_clamp_of_one_channel(weight, bias):
    norm = timm.layers.BatchNormAct2d(1).eval()
    with torch.no_grad():
        norm.weight.fill_(weight)
        norm.bias.fill_(bias)
        norm.running_mean.fill_(5.)
        norm.running_var.fill_(4.)
        x = torch.linspace(-50, 50, 1001)
        lo, hi, scale, shift = (t.float() for t in norm_relu_as_clamp(norm))
        y = scale * torch.clamp(x, lo, hi) + shift
        assert y.isfinite().all() and (scale.half() * torch.clamp(x.half(), lo.half(), hi.half())).isfinite().all()
        torch.testing.assert_close(y, norm(x[None, None, :, None]).flatten(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize('mean, var, weight, bias', [
    (1e5, 1e8, 1., 0.), (1e5, 1e8, 1., 1.), (0., 1e10, 1., 1.), (-1e5, 1e8, -1., 0.5)])
def test_clamp_of_large_inputs(mean, var, weight, bias):
    """As of images that are not normalized: bounds that float16 has not are reached all the same."""
    norm = BatchNormAct2d(1).double().eval()
    for tensor, value in zip((norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data), (
            mean, var, weight, bias)):
        tensor.fill_(value)
    lo, hi, scale, shift = norm_relu_as_clamp(norm)
    x = mean + var ** 0.5 * torch.linspace(-3, 3, 13, dtype=torch.float64)
    torch.testing.assert_close(scale * x.clamp(lo, hi) + shift, norm(x.view(-1, 1, 1, 1)).flatten().detach())


def test_other_channels_are_refused():
    model = create(scale=4)
    model.features.conv0 = torch.nn.Conv2d(3, 20, 3, padding=1, bias=False)
    with torch.no_grad(), pytest.raises(RuntimeError, match='must match the size'):
        reparameterize_model(model)(images(2, 3, 16, 16))
    with pytest.raises(RuntimeError, match='split'):
        SplitHierarchyConv2d(16, scale=4).eval().fuse()(torch.zeros(1, 20, 8, 8))


def test_drop_path_that_is_on_alone():
    """Monte-Carlo depth: the net evaluates, its drop-path does not."""
    fused = reparameterize_model(create(scale=4, drop_path_rate=0.5))
    x = images(2, 3, 16, 16)
    with torch.no_grad():
        still = fused(x)
        for module in fused.modules():
            if isinstance(module, DropPath):
                module.train()
        assert not torch.equal(fused(x), still)


def test_norms_and_activations_of_other_classes_stay():
    class Halved(BatchNormAct2d):
        def forward(self, x):
            return super().forward(x) / 2

    class Shifted(torch.nn.ReLU):
        def forward(self, x):
            return super().forward(x) - 1

    for place in ('norm1', 'norm1.act'):
        model = create(scale=4)
        model.features.denseblock1.denselayer2.get_submodule(place).__class__ = Shifted if 'act' in place else Halved
        fused = reparameterize_model(model)
        assert type(fused.features.denseblock1) is DenseBlock
        with torch.no_grad():
            torch.testing.assert_close(fused(images(2, 3, 16, 16)), model(images(2, 3, 16, 16)))


@pytest.mark.parametrize('channels_last', [False, True])
def test_bfloat16_and_memory_format(channels_last):
    model = create()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    fused = reparameterize_model(model).to(memory_format=memory_format)
    x = images(4, 3, 32, 32).to(memory_format=memory_format)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4)
        bound = dict(rtol=0.1, atol=0.1 * expected.abs().max().item())
        with torch.autocast('cpu', dtype=torch.bfloat16):
            y = fused(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), expected, **bound)
        y = fused.to(torch.bfloat16)(x.bfloat16())
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), expected, **bound)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('size, kind', [(32, 'se'), (8, 's4'), (32, 'baseline'), (32, 'groups')])
def test_autocast_computes_in_place_what_the_layers_do(size, kind, dtype, three_threads, monkeypatch):
    fused = reparameterize_model(create(**KINDS[kind]))
    x = images(50, 3, size, size)
    calls = []
    of_block = timm_dense2net.fused.block_in_place
    monkeypatch.setattr(timm_dense2net.fused, 'block_in_place', lambda *args: calls.append(1) or of_block(*args))
    with torch.no_grad(), torch.autocast('cpu', dtype):
        y = fused(x)
        assert len(calls) == 2 * 3  # two groups of images, three blocks
        with monkeypatch.context() as patch:
            patch.setattr(FusedDenseBlock, 'runs_in_place', lambda self, x: False)
            expected = fused(x)
        torch.testing.assert_close(y, expected, rtol=0.05, atol=0.02 * expected.abs().max().item())
        # Maps that autocast would not have made are left to the layers, whose maps are of the wider type.
        block, maps = fused.features.denseblock1, images(2, fused.features.denseblock1.denselayer1.in_chs, 8, 8)
        assert block.runs_in_place(maps.to(dtype)) and not block.runs_in_place(maps)
        assert block(maps).dtype == torch.float32
    with torch.no_grad(), pytest.raises(RuntimeError, match='scalar type'):
        block(maps.to(dtype))


def test_no_upper_bounds_where_no_scale_is_negative():
    model = create(scale=4)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.weight.data.abs_().add_(0.1)
    one_sided, x = reparameterize_model(model), images(4, 3, 32, 32)
    first, last = one_sided.features.transition1.conv, list(one_sided.features.denseblock3.values())[-1].conv1
    assert bounds_of(first, torch.float32)[1] is not None
    assert bounds_of(first, torch.bfloat16)[1] is bounds_of(last, torch.float16)[1] is None
    two_sided = copy.deepcopy(one_sided)
    for conv in (m for m in two_sided.modules() if isinstance(m, ClampLinear)):
        conv.hi.fill_(1e30)  # reached by no feature
        assert bounds_of(conv, torch.bfloat16)[1] is not None
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(one_sided(x), two_sided(x), rtol=0, atol=0)
        first.hi[1] = -1.
        assert bounds_of(first, torch.bfloat16)[1] is not None
        assert not torch.equal(one_sided(x), two_sided(x))


def test_the_plain_form_by_parts_under_autocast(monkeypatch):
    model, x = create(), images(7, 3, 32, 32)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        expected = model(x)
        monkeypatch.setattr(timm_dense2net.parts, 'IMAGE_CACHE_BYTES', 100_000 // torch.get_num_threads())
        assert timm_dense2net.in_place.runs_by_parts(
            model.features.denseblock1, images(7, model.features.conv0.out_channels, 32, 32).bfloat16())
        torch.testing.assert_close(model(x), expected)


def test_features_of_the_fused_net():
    model = create()
    fused = reparameterize_model(model)
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.forward_intermediates(x)
        torch.testing.assert_close(fused.forward_intermediates(x), expected, rtol=1e-4, atol=1e-4)
        fused.prune_intermediate_layers([1])
        torch.testing.assert_close(fused.forward_features(x), expected[1][1], rtol=1e-4, atol=1e-4)
        for cls in ('dict', 'getter'):
            net = timm.create_model('dense2net40_k12_s4', features_only=True, feature_cls=cls).eval()
            torch.testing.assert_close(reparameterize_model(net)(x), net(x), rtol=1e-4, atol=1e-4)


def test_traced_forms():
    model = create()
    fused = reparameterize_model(model)
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        close = dict(rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.jit.script(fused)(x), expected, **close)
        torch.testing.assert_close(torch.jit.trace(fused, x)(x), expected, **close)
        torch.testing.assert_close(torch.fx.symbolic_trace(fused)(x), expected, **close)
        torch.testing.assert_close(torch.export.export(fused, (x,)).module()(x), expected, **close)
        torch.testing.assert_close(torch.compile(fused, fullgraph=True, backend='aot_eager')(x), expected, **close)
        torch.testing.assert_close(copy.deepcopy(fused)(x), expected, **close)


def test_gradient_reaches_the_input():
    model = create(dtype=torch.float64)
    fused = reparameterize_model(model)
    x1, x2 = (images(2, 3, 32, 32, dtype=torch.float64).requires_grad_() for _ in range(2))
    model(x1).square().sum().backward()
    fused(x2).square().sum().backward()
    torch.testing.assert_close(x1.grad, x2.grad)
    assert not fused(images(2, 3, 32, 32, dtype=torch.float64)).isnan().any()  # grad mode on, nothing to differentiate


def test_weights_that_are_trained_all_the_same():
    fused = reparameterize_model(create(dtype=torch.float64))
    x = images(2, 3, 32, 32, dtype=torch.float64)
    logits = fused(x)
    fused.requires_grad_(True)
    torch.testing.assert_close(fused(x), logits)
    fused(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fused.parameters())


@pytest.mark.parametrize('part', ['norm5', 'transition1', 'denseblock2', 'conv0'])
def test_a_part_that_is_trained_where_the_batch_is_large(part, monkeypatch):
    fused = reparameterize_model(create(dtype=torch.float64))
    fused.requires_grad_(False)
    weights = list(fused.get_submodule(f'features.{part}').requires_grad_(True).parameters())
    x = images(7, 3, 32, 32, dtype=torch.float64)
    expected = torch.autograd.grad(fused(x).square().sum(), weights)
    monkeypatch.setattr(timm_dense2net.parts, 'IMAGE_CACHE_BYTES', 200_000 // torch.get_num_threads())
    torch.testing.assert_close(torch.autograd.grad(fused(x).square().sum(), weights), expected)


@pytest.mark.parametrize('kwargs', [dict(act_layer='silu'), dict(norm_layer='layernorm2d')])
def test_other_layers_stay_plain(kwargs):
    torch.manual_seed(0)
    model = Dense2Net(8, (2, 2), num_classes=10, **kwargs).eval()
    fused = reparameterize_model(model)
    assert not any('Fused' in type(m).__name__ for m in fused.modules())
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=0, atol=0)


def test_other_batch_norms_fuse():
    model = create()
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        for convert in (convert_sync_batchnorm, freeze_batch_norm_2d):
            fused = reparameterize_model(convert(copy.deepcopy(model)))
            assert sum(isinstance(m, FusedDenseBlock) for m in fused.modules()) == 3
            # sync batch norm has no CPU forward of its own, so the final norm is taken from the plain net
            fused.features.norm5 = model.features.norm5
            torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4)


def test_fusing_leaves_the_plain_net_as_it_is():
    model = create(attn_layer='se')
    state = copy.deepcopy(model.state_dict())
    reparameterize_model(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values()))
    assert all(p.requires_grad for p in model.parameters())
    block = model.features.denseblock1
    block.fuse()
    assert all(p.requires_grad for p in block.parameters())


def test_state_of_the_fused_net_round_trips():
    fused = reparameterize_model(create())
    other = reparameterize_model(Dense2Net(8, (2, 3, 2), num_classes=10).eval())
    other.load_state_dict(fused.state_dict())
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(other(x), fused(x), rtol=0, atol=0)


@torch.no_grad()
def test_fake_tensors():
    fused = reparameterize_model(create()).bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert fused(torch.empty(2, 3, 32, 32, dtype=torch.bfloat16)).shape == (2, 10)


def test_meta_device():
    fused = reparameterize_model(timm.create_model('dense2net121_s8', device='meta').eval())
    assert fused(torch.empty(2, 3, 32, 32, device='meta')).shape == (2, 100)


@torch.no_grad()
def test_hooks_are_called():
    fused = reparameterize_model(create())
    x = images(2, 3, 32, 32)
    expected = fused(x)
    block, transition = fused.features.denseblock2, fused.features.transition1
    layer = block.denselayer2
    for module in (block, layer, layer.conv1.linear, layer.conv3, layer.attn, transition, transition.conv.linear):
        seen = []
        handle = module.register_forward_hook(lambda *args: seen.append(args))
        torch.testing.assert_close(fused(x), expected)
        handle.remove()
        assert len(seen) == 1
        module.forward, forward = lambda *args: seen.append(args) or forward(*args), module.forward
        torch.testing.assert_close(fused(x), expected)
        del module.forward
        assert len(seen) == 2
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(module))
    torch.testing.assert_close(fused(x), expected)
    handle.remove()
    assert layer.conv1.linear in seen


@torch.no_grad()
def test_hooks_from_before_are_called():
    model, x = create(), images(2, 3, 32, 32)
    for name in ('features', 'features.denseblock2', 'features.transition1', 'features.denseblock1.denselayer1.conv1'):
        handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: output / 2)
        torch.testing.assert_close(reparameterize_model(model)(x), model(x), rtol=1e-4, atol=1e-4)
        handle.remove()
    # Its weight is made by a hook, and what lies there now is of the one before.
    conv = torch.nn.utils.weight_norm(model.features.denseblock1.denselayer1.conv1)
    model(x)
    conv.weight_g.mul_(2.)
    torch.testing.assert_close(reparameterize_model(model)(x), model(x), rtol=1e-4, atol=1e-4)


def test_hooks_take_features_of_fused_nets():
    net = timm.create_model('dense2net40_k12_s4', features_only=True, feature_cls='hook', out_indices=(0, 1, 2)).eval()
    x = images(1, 3, 32, 32)
    with torch.no_grad():
        for fused, plain in zip(reparameterize_model(net)(x), net(x), strict=True):
            torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_weights_of_other_kinds_are_left_to_the_layers():
    class Quantized(torch.Tensor):
        pass

    fused, x = reparameterize_model(create()), images(2, 3, 32, 32)
    expected, block = fused(x), fused.features.denseblock1
    linear = block.denselayer1.conv1.linear
    maps = images(2, linear.in_features, 8, 8)
    assert block.runs_in_place(maps)
    linear.weight = torch.nn.Parameter(linear.weight.as_subclass(Quantized), requires_grad=False)
    assert not block.runs_in_place(maps)
    torch.testing.assert_close(fused(x).as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize('scale, name', [
    (4, 'conv1'), (4, 'conv2'), (4, 'conv3'), (4, 'attn'), (4, ''), (None, 'conv1'), (None, 'conv2'), (None, '')])
def test_layers_of_the_fused_net_may_be_replaced(name, scale):
    fused, x = reparameterize_model(create(scale=scale)), images(2, 3, 16, 16)
    block = fused.features.denseblock1
    before = fused(x)
    if name:
        setattr(block.denselayer1, name, Wrapped(getattr(block.denselayer1, name)))
    else:
        block.denselayer1 = Wrapped(block.denselayer1)
    expected = fused(x.clone().requires_grad_()).detach()  # by the layers, as autograd records them
    with torch.no_grad():
        torch.testing.assert_close(fused(x), expected)
    assert not torch.allclose(before, expected)


def test_average_of_fused_nets():
    fused, x = reparameterize_model(create()), images(2, 3, 16, 16)
    ema = ModelEmaV3(fused, decay=0.9)
    ema.update(fused)
    torch.testing.assert_close(ema.module.eval()(x), fused(x))


def test_calls_beside_each_other_leave_the_threads(three_threads):
    fused, x, outputs = reparameterize_model(create()), images(50, 3, 16, 16), []

    def call():
        with torch.no_grad():
            outputs.append(fused(x))

    callers = [threading.Thread(target=call) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert threads_seen() == [3, 3]
    with torch.no_grad():
        expected = fused(x)
    assert len(outputs) == 8
    for output in outputs:
        torch.testing.assert_close(output, expected)


@torch.no_grad()
def test_what_follows_the_blocks_may_need_the_whole_batch(three_threads, monkeypatch):
    """A norm by the statistics of the batch sees it as a whole, in parts or groups as the blocks may run."""
    monkeypatch.setattr(timm_dense2net.parts, 'IMAGE_CACHE_BYTES', 100_000)
    model = create()
    model.features.norm5 = timm.layers.BatchNormAct2d(model.num_features, track_running_stats=False).eval()
    x = images(64, 3, 32, 32)
    torch.testing.assert_close(reparameterize_model(model)(x), model(x), rtol=1e-4, atol=1e-4)
    model = create()
    fused = reparameterize_model(model)
    for net in (model, fused):
        net.features.norm5.train()
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_other_matrices():
    """As quantization puts in the place of the linear layers."""
    fused = reparameterize_model(create())
    layer, x = fused.features.denseblock1.denselayer1, images(4, 3, 32, 32)
    expected = fused(x)
    layer.conv1.linear = torch.nn.Sequential(layer.conv1.linear)
    layer.conv3 = torch.nn.Sequential(layer.conv3)
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_transforms_of_functions():
    fused = reparameterize_model(create())
    x = images(4, 3, 32, 32)
    torch.testing.assert_close(torch.vmap(lambda image: fused(image[None])[0])(x), fused(x), rtol=1e-4, atol=1e-4)
    _, forward = torch.func.jvp(fused, (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        dual = fused(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, forward)


@pytest.mark.parametrize('change', CHANGES)
@torch.no_grad()
def test_changed_layers_count(change):
    model = change_layers(create(), change).eval()
    x = images(2, 3, 33, 33)
    torch.testing.assert_close(reparameterize_model(model)(x), model(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_subclasses_stay():
    class Doubled(SplitHierarchyConv2d):
        def forward(self, x):
            return super().forward(x) * 2

    layer = torch.nn.Sequential(Doubled(16, scale=4)).eval()
    x = images(2, 16, 8, 8)
    torch.testing.assert_close(reparameterize_model(layer)(x), layer(x))


def replace_layers(model):
    model.features.transition1.pool = torch.nn.Identity()
    layer = model.features.denseblock1.denselayer2
    layer.conv1 = torch.nn.Conv2d(layer.conv1.in_channels, layer.conv1.out_channels, 1, bias=True)
    return model


@torch.no_grad()
def test_replaced_layers_stay():
    model = replace_layers(create())
    fused = reparameterize_model(model)
    assert isinstance(fused.features.denseblock2, FusedDenseBlock)
    assert not isinstance(fused.features.denseblock1, FusedDenseBlock)
    x = images(2, 3, 32, 32)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)
