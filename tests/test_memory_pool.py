"""The pool's memory is given out again when, and only when, nothing refers to it any more."""
import copy
import gc
import threading
import weakref

import pytest
import timm
import torch

from timm_dense2net import memory_pool
from timm_dense2net.memory_pool import LARGE_BYTES, MemoryPool, pool_of

LARGE = LARGE_BYTES // 4  # floats


def test_memory_comes_again_when_free():
    pool, like = MemoryPool(), torch.empty(0)
    a = pool.empty((LARGE,), like)
    address, view = a.data_ptr(), a[3:5]
    assert address % 64 == 0
    del a
    b = pool.empty((LARGE,), like)
    assert b.data_ptr() != address  # the view refers to it
    del view
    assert pool.empty((2 * LARGE,), like).data_ptr() != address
    c = pool.empty((2, LARGE // 2), like.to(torch.float32))
    assert c.data_ptr() == address and c.shape == (2, LARGE // 2)
    del c
    assert pool.empty((2 * LARGE,), like.to(torch.bfloat16)).data_ptr() == address


def test_memory_that_autograd_holds_is_not_free():
    pool = MemoryPool()
    leaf = torch.ones(LARGE, requires_grad=True)
    factor = pool.empty((LARGE,), leaf).fill_(3.)
    y = (leaf * factor).sum()
    del factor
    pool.empty((LARGE,), leaf).fill_(7.)
    y.backward()
    assert (leaf.grad == 3.).all()


def test_a_dropped_pool_frees_its_memory():
    pool = MemoryPool()
    tensor = pool.empty((LARGE,), torch.empty(0))
    del pool
    tensor.fill_(1.)
    assert tensor.sum() == LARGE


def test_small_tensors_and_other_devices_are_torchs_own():
    pool = MemoryPool()
    assert pool.empty((3,), torch.empty(0, dtype=torch.float64)).dtype == torch.float64
    assert pool.empty((LARGE,), torch.empty(0, device='meta')).is_meta
    for x in (torch.ones(3), torch.empty(LARGE, device='meta')):
        assert pool.keep(x) is x
    assert not pool._free
    x = torch.randn(LARGE)
    assert torch.equal(pool.keep(x), x) and pool.empty(x.shape, x).data_ptr() != x.data_ptr()


def test_a_pool_is_of_one_input_and_goes_with_its_module():
    module = torch.nn.Identity()
    x = torch.randn(2, 3, 4, 4)
    pool = pool_of(module, x)
    assert pool_of(module, x + 1) is pool and pool_of(copy.deepcopy(module), x) is not pool
    assert pool_of(module, x.double()) is not pool
    pool = pool_of(module, x)
    assert pool_of(module, x.to('meta')) is not pool
    pool = pool_of(module, x)
    assert pool_of(module, x[:1]) is not pool
    last = weakref.ref(pool_of(module, x))
    del module, pool
    gc.collect()
    assert last() is None


@pytest.mark.parametrize('features_only', [False, True])
def test_eval_mode_gives_the_memory_back(features_only):
    model = timm.create_model('dense2net40_k12_s4', features_only=features_only)

    def has_pools():
        return any(module in memory_pool._pools for module in model.modules())

    outputs = model(torch.randn(16, 3, 32, 32))
    (outputs[-1] if features_only else outputs).sum().backward()
    assert has_pools()
    model.eval()
    assert not has_pools()


def test_pools_are_in_memory_whatever_the_default_device():
    with torch.device('meta'):
        assert MemoryPool().empty((LARGE,), torch.empty(0, device='cpu')).device.type == 'cpu'


def gradients(model, x, passes):
    """Gradients after as many steps, the graph of each kept over the next one and gone through again."""
    outputs = []
    for _ in range(passes):
        outputs.append(model(x).square().mean())
        outputs[-1].backward(retain_graph=True)
    model.zero_grad()
    outputs[0].backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize('name', ['dense2net40_k12_s4', 'densenet121_cifar'])
def test_graphs_that_live_on_keep_their_memory(name):
    """A second backward pass through the first graph, after further steps, gives the first gradients."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    x = torch.randn(16, 3, 32, 32)
    once = gradients(copy.deepcopy(model), x, 1)
    for expected, actual in zip(once, gradients(copy.deepcopy(model), x, 3)):
        assert torch.equal(expected, actual)


def test_threads_that_train_copies_do_not_disturb_each_other():
    torch.manual_seed(0)
    model = timm.create_model('dense2net40_k12_s4')
    x = torch.randn(16, 3, 32, 32)
    expected = gradients(copy.deepcopy(model), x, 1)
    results = {}

    def train(i):
        results[i] = gradients(copy.deepcopy(model), x, 2)

    threads = [threading.Thread(target=train, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        for a, b in zip(expected, results[i]):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
