"""Dense layers compiled one by one, without compiling them one by one."""
import copy

import pytest
import torch

from timm_dense2net import dense2net, training_form
from timm_dense2net.dense2net import Dense2Net


@pytest.fixture
def graphs(monkeypatch):
    """What was compiled, by a compiler that leaves graphs as they are."""
    compiled, compiler = [], torch.compile

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    monkeypatch.setattr(torch, 'compile', lambda function, **kwargs: compiler(function, backend=backend, **kwargs))
    torch.compiler.reset()
    dense2net._compiled_growth.cache_clear()
    yield compiled
    torch.compiler.reset()
    dense2net._compiled_growth.cache_clear()


def create():
    torch.manual_seed(0)
    return Dense2Net(8, (2, 3, 2), num_classes=5, scale=4, attn_layer='se', dtype=torch.float64).train()


def images(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_layers_of_a_block_share_a_graph(graphs):
    net, plain = create(), create()
    net.compile_layers()
    with training_form.plain_form():
        for model in (net, plain):
            model(images()).square().sum().backward()
    assert len(graphs) == 3
    for (name, p), q in zip(net.named_parameters(), plain.named_parameters()):
        torch.testing.assert_close(p.grad, q[1].grad, msg=name)
    torch.testing.assert_close(list(net.buffers()), list(plain.buffers()))


def test_a_copy_has_its_own_weights(graphs):
    net = create()
    net.compile_layers()
    with training_form.plain_form():
        net(images())
        other = copy.deepcopy(net)
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(1.5)
        expected = create()
        expected.load_state_dict(other.state_dict())
        torch.testing.assert_close(other(images()), expected(images()))


def test_hooks_that_come_later_are_called(graphs):
    net = create()
    net.compile_layers()
    with training_form.plain_form():
        net(images())
        called = []
        net.features.denseblock1.denselayer1.conv2.register_forward_hook(lambda *_: called.append(1))
        net(images())
    assert called == [1]


def test_many_sizes_are_compiled(graphs):
    net = create()
    net.compile_layers()
    with training_form.plain_form():
        for size in (16, 20, 24, 32):
            net(images(size))
    assert len(graphs) == 10  # of sides 16, 8, 4; 20, 10, 5; 24, 12, 6; 32, and again 16 and 8


def test_evaluation_is_not_compiled(graphs):
    net = create().eval()
    net.compile_layers()
    expected = create().eval()(images())
    torch.testing.assert_close(net(images()), expected)
    torch.testing.assert_close(torch.jit.script(net)(images()), expected)
    assert not graphs
