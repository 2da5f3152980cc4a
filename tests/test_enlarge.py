"""Weights of a 32x32 model in a model with the stem for larger images."""
import pytest
import timm
import torch

import timm_dense2net  # noqa: F401
from timm_dense2net.checkpoint import load_weights, save_weights
from timm_dense2net.enlarge import load_all_but_stem, main
from timm_dense2net.freeze import freeze_stages
from timm_dense2net.trained import load_trained

STEM = ('features.conv', 'features.norm')


def create(seed, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model('dense2net40_k12_s4', **kwargs).eval()


def test_trunk_computes_the_same_after_any_stem():
    small, large = create(0), create(1, stem_type='deep')
    left = load_all_but_stem(large, small.state_dict())
    assert left == [name for name in large.state_dict() if name.startswith(STEM) and 'norm5' not in name]
    x = torch.randn(2, 24, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        outputs = []
        for model in (small, large):
            first = [name for name, _ in model.features.named_children()].index('denseblock1')
            outputs.append(model.forward_head(model.features[first:](x)))
        torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)
        assert large(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_norms_that_were_frozen_count_no_batches():
    small, large = create(0), create(1, stem_type='deep')
    freeze_stages(small, 1)
    weights = small.state_dict()
    assert len(weights) < len(create(0).state_dict())
    left = load_all_but_stem(large, weights)
    assert set(left) <= {name for name in large.state_dict() if name.startswith(STEM) and 'norm5' not in name}
    convs = [model.features.denseblock1.denselayer1.conv1 for model in (small, large)]
    assert torch.equal(convs[0].weight, convs[1].weight)


def test_classifier_is_new_for_other_classes():
    small, large = create(0), create(1, stem_type='deep', num_classes=10)
    before = large.classifier.weight.clone()
    left = load_all_but_stem(large, small.state_dict())
    assert {'classifier.weight', 'classifier.bias'} <= set(left)
    assert torch.equal(large.classifier.weight, before)


def test_other_blocks_are_refused():
    large = create(1, stem_type='deep', scale=2)
    before = {name: tensor.clone() for name, tensor in large.state_dict().items()}
    with pytest.raises(ValueError, match='of other blocks: .*denseblock1'):
        load_all_but_stem(large, create(0).state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in large.state_dict().items())


def test_weights_with_the_same_stem_are_refused():
    large, other = (create(seed, stem_type='deep') for seed in (0, 1))
    before = large.features.conv0.weight.clone()
    with pytest.raises(ValueError, match='have this stem already'):
        load_all_but_stem(large, other.state_dict())
    assert torch.equal(large.features.conv0.weight, before)


def test_packaged_weights_by_name(tmp_path, capsys):
    output = tmp_path / 'large.safetensors'
    assert main(['dense2net121_s4.merged_s4_c100', '--model', 'dense2net121d_s4', '--output', str(output)]) == 0
    trained = load_trained(checkpoint=output)
    packaged = timm.create_model('dense2net121_s4.merged_s4_c100', pretrained=True)
    assert torch.equal(trained.model.features.norm5.weight, packaged.features.norm5.weight)
    assert trained.class_names[0] == 'apple'


def test_command(tmp_path, capsys):
    small = timm.create_model('dense2net121_s4')
    path, output = tmp_path / 'small.safetensors', tmp_path / 'large.safetensors'
    save_weights(path, small.state_dict(), dict(model='dense2net121_s4', class_names='["a"]'))
    assert main([str(path), '--model', 'dense2net121d_s4', '--output', str(output)]) == 0
    assert 'new: features.conv0.weight' in capsys.readouterr().out
    # timm's own way to begin from a checkpoint takes the file
    model = timm.create_model('dense2net121d_s4', num_classes=100, checkpoint_path=str(output))
    assert torch.equal(model.classifier.weight, small.classifier.weight)
    assert load_weights(output)[1]['model'] == 'dense2net121d_s4'
    assert main([str(path), '--model', 'dense2net121d_s4', '--num-classes', '0', '--output', str(output)]) == 0
    assert load_trained(checkpoint=output).model.num_classes == 0
    save_weights(path, small.state_dict(), dict(model='dense2net121_s4', model_args='{"act_layer": "silu"}'))
    assert main([str(path), '--model', 'dense2net121d_s4', '--output', str(output)]) == 0
    assert isinstance(load_trained(checkpoint=output).model.features.norm5.act, torch.nn.SiLU)
    capsys.readouterr()
    for argv, message in (
            ([str(path), '--model', 'dense2net121_s4'], 'has no stem for larger images'),
            ([str(path), '--model', 'dense2net121d_s8'], 'of other blocks'),
            ([str(tmp_path / 'none'), '--model', 'dense2net121d_s4'], 'no weights at')):
        assert main([*argv, '--output', str(output)]) == 2
        error = capsys.readouterr().err
        assert error.startswith('error: ') and message in error
