"""The network that the benchmarks compare with computes what the package's does."""
import importlib.util
from pathlib import Path

import pytest
import timm
import torch

import timm_dense2net  # noqa: F401  (registers the models)

FILE = Path(__file__).parent.parent / 'benchmarks' / 'reference.py'


@pytest.fixture(scope='module')
def reference():
    spec = importlib.util.spec_from_file_location('reference', FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('scale', [2, 4, 8])
@pytest.mark.parametrize('training', [False, True])
def test_same_logits_from_the_same_weights(reference, scale, training):
    torch.manual_seed(0)
    model = timm.create_model(f'dense2net121_s{scale}').double().train(training)
    plain = reference.PlainDense2Net(scale=scale).double().train(training)
    plain.load_from_dense2net(model.state_dict())
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in model.parameters())
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x), rtol=1e-8, atol=1e-8)
