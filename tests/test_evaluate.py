"""Evaluation of trained models: flip averaging, calibration, corruptions, the command and its faults."""
import io
import json
import os
import tempfile

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from training_runs import drop_privileges, finish, run_here, start

from timm_dense2net import evaluate as evaluate_module
from timm_dense2net.calibration import cross_fit_calibration, expected_calibration_error
from timm_dense2net.checkpoint import save_weights
from timm_dense2net.convert import conversion_metadata, convert_res2net
from timm_dense2net.corruptions import CORRUPTIONS, corrupt
from timm_dense2net.data import load_images
from timm_dense2net.evaluate import FlipAverage, evaluate, main
from timm_dense2net.fused import FusedDenseBlock
from timm_dense2net.images import ImageArrays
from timm_dense2net.trained import TrainedModel, load_trained, weights_shape

MODEL = 'dense2net40_k12_s4'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Pictures of two classes, red and green, 40 each, of 32 x 32 noisy pixels."""
    root = tmp_path_factory.mktemp('pictures')
    generator = torch.Generator().manual_seed(0)
    for channel, name in ((1, 'green'), (0, 'red')):
        (root / 'test' / name).mkdir(parents=True)
        for index in range(40):
            pixels = torch.randint(0, 130, (32, 32, 3), generator=generator, dtype=torch.uint8)
            pixels[..., channel] += 60
            Image.fromarray(pixels.numpy()).save(root / 'test' / name / f'{index}.png')
    return root


def save_model(path, **metadata):
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=2).eval()
    save_weights(path, model.state_dict(), metadata)
    return model


def full_metadata(**changes):
    return dict(dict(
        model=MODEL, model_args='{}', num_classes='2', input_size='[3, 32, 32]', mean='[0.4, 0.4, 0.3]',
        std='[0.2, 0.2, 0.1]', class_names='["green", "red"]'), **changes)


class MeanColour(nn.Module):
    """Tells red from green by the channels' means: right for every picture of the folder."""
    num_classes = 2

    def forward(self, x):
        red, green, _ = x.mean(dim=(2, 3)).unbind(1)
        return torch.stack((green - red, red - green), dim=1)


def trained_colour(names=('green', 'red'), model=None):
    config = dict(input_size=(3, 32, 32), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return TrainedModel('colour', model or MeanColour(), config, names, {})


def test_evaluate_counts_right_answers(folder):
    arrays = load_images(str(folder), 'test')
    figures = evaluate(trained_colour(), arrays, batch_size=32)
    assert figures == dict(samples=80, top1=100., top5=100.)
    arrays.labels[:10] = 1
    assert evaluate(trained_colour(), arrays, batch_size=7)['top1'] == 87.5


def test_evaluate_refuses_other_classes(folder):
    arrays = load_images(str(folder), 'test')
    with pytest.raises(ValueError, match="class 0 is 'red' of colour and 'green' of the data"):
        evaluate(trained_colour(names=('red', 'green')), arrays)
    model = MeanColour()
    model.num_classes = 3
    with pytest.raises(ValueError, match='colour has 3 classes, the data 2'):
        evaluate(trained_colour(model=model), arrays)


def test_the_trainer_evaluates_the_same_and_refuses_the_same(folder, tmp_path, capsys):
    path = tmp_path / 'model.safetensors'
    save_model(path, **full_metadata())
    assert main(['--checkpoint', str(path), '--dataset', str(folder), '--device', 'cpu']) == 0
    top1 = capsys.readouterr().out.partition(' %')[0]
    call = ['--eval-only', '--checkpoint', path, '--dataset', folder, '--device', 'cpu']
    assert run_here(call) == 0 and f'test {top1}, ' in capsys.readouterr().out
    save_model(path, **full_metadata(class_names='["red", "green"]'))
    assert run_here(call) == 1 and "class 0 is 'red'" in capsys.readouterr().err


def test_flip_average_is_the_mean_of_both_directions():
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=5).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        averaged = FlipAverage(model)(x)
        torch.testing.assert_close(averaged, (model(x) + model(torch.flip(x, dims=[3]))) / 2)
        torch.testing.assert_close(averaged, FlipAverage(model)(x.flip(-1)))
        assert not torch.allclose(averaged, model(x))


def test_evaluate_with_the_mirror_image_averaged_in():
    """A model that sees the left half only is right about half of the mirrored pictures until both are averaged."""
    images = torch.zeros(40, 3, 8, 8, dtype=torch.uint8)
    labels = torch.arange(40) % 2
    side = torch.arange(40) // 2 % 2
    for index in range(40):
        half = slice(0, 4) if side[index] else slice(4, 8)
        images[index, labels[index], :, half] = 255

    class LeftHalf(MeanColour):
        def forward(self, x):
            red, green, _ = x[..., :4].mean(dim=(2, 3)).unbind(1)
            return torch.stack((red - green + 1e-3, green - red), dim=1)

    arrays = ImageArrays(images, labels, ('red', 'green'))
    figures = evaluate(trained_colour(('red', 'green'), LeftHalf()), arrays, tta_flip=True)
    assert figures['top1'] == 75. and figures['top1_flip'] == 100.


def test_cross_fit_scales_each_half_by_the_other_halfs_temperature():
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(10, (3000,), generator=generator)
    logits = torch.randn(3000, 10, generator=generator)
    logits[torch.arange(3000), targets] += 1.5
    figures = cross_fit_calibration(6 * logits, targets)
    assert figures['ece'] == expected_calibration_error(6 * logits, targets)
    assert figures['ece_scaled'] < 0.2 * figures['ece']
    # The two halves are different samples of one distribution: temperatures close, not equal.
    first, second = figures['temperatures']
    assert first != second and abs(first - second) / first < 0.2
    assert cross_fit_calibration(6 * logits, targets) == figures

    # Wrong labels in one half move the temperature fitted on it, which is the one that the other half is scaled by.
    half, other = torch.randperm(3000, generator=torch.Generator().manual_seed(0)).chunk(2)
    spoilt = targets.clone()
    spoilt[half] = (spoilt[half] + 1) % 10
    figures = cross_fit_calibration(6 * logits, spoilt)
    assert figures['temperatures'][0] > 5 * second
    scaled = 6 * logits
    scaled[other] /= figures['temperatures'][0]
    scaled[half] /= figures['temperatures'][1]
    assert figures['ece_scaled'] == pytest.approx(expected_calibration_error(scaled, spoilt), rel=1e-4)


def test_calibration_needs_a_sample_for_each_half():
    with pytest.raises(ValueError, match='at least 2 samples, one for each half, got 1'):
        cross_fit_calibration(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long))


@pytest.fixture(scope='module')
def pictures():
    """Smooth random pictures, as photographs are."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(12, 3, 6, 6, generator=generator) * 255
    return nn.functional.interpolate(coarse, (32, 32), mode='bicubic').clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize('name', CORRUPTIONS)
def test_corruptions_grow_with_severity_and_repeat_by_seed(pictures, name):
    original = pictures.clone()
    distances = []
    for severity in range(1, 6):
        result = corrupt(pictures, name, severity)
        assert result.dtype == torch.uint8 and result.shape == pictures.shape
        assert torch.equal(result, corrupt(pictures, name, severity))
        distances.append((result.float() - pictures.float()).square().mean().item())
    assert 0 < distances[0] and distances == sorted(distances)
    assert torch.equal(pictures, original)
    different = corrupt(pictures, name, 3, seed=1)
    assert torch.equal(different, corrupt(pictures, name, 3)) == (name != 'gaussian_noise')


def test_corruptions_do_what_their_parameters_say(pictures):
    grey = torch.full((4, 3, 32, 32), 128, dtype=torch.uint8)
    noise = corrupt(grey, 'gaussian_noise', 5).float() - 128
    assert noise.std().item() == pytest.approx(0.10 * 255, rel=0.03) and abs(noise.mean().item()) < 1
    assert torch.equal(corrupt(grey, 'gaussian_blur', 5), grey)

    dot = torch.zeros(1, 3, 33, 33, dtype=torch.uint8)
    dot[..., 16, 16] = 255
    blurred = corrupt(dot, 'gaussian_blur', 5)[0, 0].float() / 255
    # A Gaussian of sigma 1 has 1 / (2 pi) at its centre and exp(-1/2) of that one pixel away.
    assert blurred[16, 16].item() == pytest.approx(0.159, abs=0.01)
    assert (blurred[16, 17] / blurred[16, 16]).item() == pytest.approx(0.607, abs=0.03)

    # Each channel's distance from its own mean.
    means = pictures.double().mean((2, 3), keepdim=True)
    contrast = corrupt(pictures, 'contrast', 5)
    assert ((pictures.double() - means) * 0.15 + means - contrast).abs().max() <= 0.5001

    stream = io.BytesIO()
    Image.fromarray(pictures[0].permute(1, 2, 0).numpy()).save(stream, 'JPEG', quality=65)
    decoded = torch.from_numpy(np.array(Image.open(stream))).permute(2, 0, 1)
    assert torch.equal(corrupt(pictures[:1], 'jpeg', 2)[0], decoded)


def test_blur_is_that_of_scikit_image(pictures):
    ndimage = pytest.importorskip('scipy.ndimage')
    for severity, sigma in enumerate((0.4, 0.6, 0.7, 0.8, 1.0), start=1):
        expected = ndimage.gaussian_filter(
            pictures.double().numpy(), (0, 0, sigma, sigma), mode='nearest', truncate=4)
        assert np.abs(corrupt(pictures, 'gaussian_blur', severity).numpy() - expected).max() <= 0.51


def test_corruptions_have_the_parameters_of_cifar10_c():
    assert {name: parameters for name, (_, parameters) in CORRUPTIONS.items()} == {
        'gaussian_noise': (0.04, 0.06, 0.08, 0.09, 0.10), 'gaussian_blur': (0.4, 0.6, 0.7, 0.8, 1.0),
        'contrast': (0.75, 0.5, 0.4, 0.3, 0.15), 'jpeg': (80, 65, 58, 50, 40)}


def test_corruption_leaves_the_global_random_state_alone(pictures):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    corrupt(pictures, 'gaussian_noise', 1)
    assert torch.equal(torch.rand(3), expected)


def test_unknown_corruptions_are_named(pictures):
    with pytest.raises(ValueError, match="no corruption 'fog': choose one of gaussian_noise, "):
        corrupt(pictures, 'fog', 1)
    with pytest.raises(ValueError, match='severity must be 1 to 5, got 6'):
        corrupt(pictures, 'jpeg', 6)


def test_command_prints_all_figures_of_a_checkpoint(folder, tmp_path, capsys):
    path = tmp_path / 'last.safetensors'
    model = save_model(path, **full_metadata())
    call = ['--checkpoint', str(tmp_path), '--dataset', str(folder), '--device', 'cpu']
    assert main([*call, '--tta-flip', '--calibration', '--corruptions', '--output', str(tmp_path / 'out.json')]) == 0
    figures = json.loads((tmp_path / 'out.json').read_text())

    arrays = load_images(str(folder), 'test')
    mean, std = torch.tensor([0.4, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.2, 0.1]).view(3, 1, 1)
    with torch.no_grad():
        expected = (model((arrays.images / 255. - mean) / std).argmax(1) == arrays.labels).float().mean() * 100
    assert figures['top1'] == pytest.approx(expected.item(), abs=1e-3)

    out = capsys.readouterr().out.splitlines()
    assert out[0] == f'top-1 {figures["top1"]:.2f} %, top-5 100.00 % (80 images)'
    assert out[1].startswith(f'top-1 {figures["top1_flip"]:.2f} %') and 'mirror image' in out[1]
    ece = figures['calibration']
    assert out[2].startswith(f'ECE {ece["ece"]:.4f}, {ece["ece_scaled"]:.4f} after temperature scaling')
    assert [line.split()[0] for line in out[5:]] == list(CORRUPTIONS) == list(figures['corruptions'])
    assert all(len(values) == 5 for values in figures['corruptions'].values())


def test_the_form_for_inference_finds_the_same(folder, tmp_path, monkeypatch):
    save_model(tmp_path / 'last.safetensors', **full_metadata())
    figures, evaluated = [], []
    monkeypatch.setattr(evaluate_module, 'evaluate', lambda trained, *args, **kwargs: (
        evaluated.append(trained.model), evaluate(trained, *args, **kwargs))[1])
    for words in ([], ['--reparam']):
        path = tmp_path / 'out.json'
        assert main([
            '--checkpoint', str(tmp_path), '--dataset', str(folder), '--device', 'cpu', '--calibration', '--output',
            str(path), *words]) == 0
        figures.append(json.loads(path.read_text()))
    plain, fused = (any(isinstance(m, FusedDenseBlock) for m in model.modules()) for model in evaluated)
    assert fused and not plain
    assert figures[0]['top1'] == figures[1]['top1']
    assert figures[0]['calibration']['ece'] == pytest.approx(figures[1]['calibration']['ece'], abs=1e-4)


def test_images_are_brought_to_the_size_the_model_was_trained_at(folder, tmp_path):
    path = tmp_path / 'small.safetensors'
    save_model(path, **full_metadata(input_size='[3, 16, 16]'))
    call = ['--checkpoint', str(path), '--dataset', str(folder), '--device', 'cpu', '--calibration']
    found = []
    for size, arguments in ((16, []), (48, ['--img-size', '48'])):
        assert main([*call, *arguments, '--output', str(tmp_path / 'out.json')]) == 0
        figures = json.loads((tmp_path / 'out.json').read_text())
        arrays = load_images(str(folder), 'test', img_size=size)
        assert arrays.images.shape[-1] == size
        assert figures == evaluate(load_trained(checkpoint=path), arrays, calibration=True)
        found.append(figures['calibration']['ece'])
    assert found[0] != found[1]


@pytest.mark.parametrize('fits', [False, True])
def test_images_of_another_size_than_the_only_one_are_refused(folder, tmp_path, capsys, fits):
    model_args = dict(img_size=32, dynamic_img_size=fits)
    path = tmp_path / 'vit.safetensors'
    model = timm.create_model('test_vit', num_classes=2, **model_args)
    save_weights(path, model.state_dict(), full_metadata(model='test_vit', model_args=json.dumps(model_args)))
    call = ['--checkpoint', str(path), '--dataset', str(folder), '--device', 'cpu']
    assert main(call) == 0
    assert main([*call, '--img-size', '48']) == (0 if fits else 2)
    if not fits:
        error = capsys.readouterr().err
        assert 'does not take images of 3x48x48' in error and 'it is made for 32x32 (--img-size 32)' in error
    assert main([*call, '--img-size', '40']) == 2  # no multiple of the patches' 16
    assert 'does not take images of 3x40x40' in capsys.readouterr().err


def test_models_of_other_channels_are_refused(folder, tmp_path, capsys):
    path = tmp_path / 'grey.safetensors'
    model = timm.create_model('test_resnet', num_classes=2, in_chans=1)
    save_weights(path, model.state_dict(), full_metadata(
        model='test_resnet', input_size='[1, 32, 32]', mean='[0.4]', std='[0.2]'))
    assert main(['--checkpoint', str(path), '--dataset', str(folder), '--device', 'cpu']) == 2
    error = capsys.readouterr().err
    assert 'grey.safetensors does not take images of 3x32x32' in error and error.count('error: ') == 1


def test_images_that_are_no_squares_stay_as_they_are(tmp_path):
    for name, colour in (('green', (0, 200, 0)), ('red', (200, 0, 0))):
        (tmp_path / 'test' / name).mkdir(parents=True)
        Image.new('RGB', (32, 48), colour).save(tmp_path / 'test' / name / '0.png')
    path = tmp_path / 'model.safetensors'
    save_model(path, **full_metadata(input_size='[3, 48, 32]'))
    call = ['--checkpoint', str(path), '--dataset', str(tmp_path), '--device', 'cpu', '--calibration']
    assert main([*call, '--output', str(tmp_path / 'out.json')]) == 0
    arrays = load_images(str(tmp_path), 'test')
    assert arrays.images.shape == (2, 3, 48, 32)
    expected = evaluate(load_trained(checkpoint=path), arrays, calibration=True)
    assert json.loads((tmp_path / 'out.json').read_text()) == expected


def test_weights_without_metadata_need_the_models_name(folder, tmp_path, capsys):
    path = tmp_path / 'model.safetensors'
    save_model(path)
    call = ['--checkpoint', str(path), '--dataset', str(folder), '--device', 'cpu']
    assert main(call) == 2
    assert 'does not say which model it is of' in capsys.readouterr().err
    assert main([*call, '--model', MODEL]) == 0
    assert '(80 images)' in capsys.readouterr().out


def test_trained_models_carry_what_their_file_says(tmp_path):
    path = tmp_path / 'model.safetensors'
    save_model(path, **full_metadata())
    trained = load_trained(checkpoint=path)
    assert trained.class_names == ('green', 'red') and not trained.model.training
    assert tuple(trained.data_config['mean']) == (0.4, 0.4, 0.3) and trained.model.num_classes == 2
    with pytest.raises(ValueError, match='does not fit densenet121_cifar'):
        load_trained('densenet121_cifar', path)
    with pytest.raises(ValueError, match='res2net_converted stands for .* got base=None'):
        load_trained('res2net_converted', path)
    save_model(path, **full_metadata(model_args='{"growth": 12}'))
    with pytest.raises(ValueError, match=f"does not fit {MODEL}: .* unexpected keyword argument 'growth'"):
        load_trained(checkpoint=path)


def test_channels_of_images_are_those_the_file_names():
    # As of TResNet, whose first convolution sees 4x4 pixels side by side.
    cfg, weights = dict(first_conv='conv1', classifier='fc'), {'conv1.weight': torch.zeros(8, 48, 3, 3)}
    assert weights_shape(cfg, weights, dict(input_size='[3, 32, 32]')) == dict(in_chans=3)
    assert weights_shape(cfg, weights, {}) == dict(in_chans=48)


def test_a_model_of_several_classifiers(tmp_path):
    path = tmp_path / 'model.safetensors'
    model = timm.create_model('levit_128s', num_classes=2)
    save_weights(path, model.state_dict(), dict(model='levit_128s'))
    assert load_trained(checkpoint=path).model.num_classes == 2


def test_a_converted_model_is_converted_again(tmp_path):
    path = tmp_path / 'converted.safetensors'
    torch.manual_seed(0)
    model = convert_res2net(timm.create_model('resnet10t', num_classes=2), scale=2).eval()
    save_weights(path, model.state_dict(), dict(model='resnet10t', **conversion_metadata(model)))
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(load_trained(checkpoint=path).model(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize('arguments, message', [
    ([], 'give either --pretrained or --checkpoint'),
    (['--model', MODEL], 'give either --pretrained or --checkpoint'),
    (['--pretrained'], '--pretrained needs --model'),
    (['--pretrained', '--checkpoint', 'x'], 'give either --pretrained or --checkpoint'),
    (['--checkpoint', 'x', '-b', '0'], '--batch-size must be at least 1, got 0'),
    (['--checkpoint', 'x', '--output', '.'], '--output: . is a folder: name a file'),
    (['--checkpoint', 'x', '--output', 'nowhere/out.json'], '--output: nowhere/out.json: there is no folder nowhere'),
])
def test_a_wrong_call_is_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(['--dataset', 'digits', *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_named_before_the_work(tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        argv = ['--dataset', 'digits', '--model', MODEL, '--pretrained', '--output', f'{folder}/figures.json']
        process = start(argv, tmp_path / 'log', drop_privileges, main)
        assert finish(process) == 2
    log = (tmp_path / 'log').read_text()
    assert log.splitlines()[-1].endswith(f'figures.json: the folder {folder} cannot be written to')


def test_what_cannot_be_loaded_is_one_message(folder, tmp_path, capsys):
    torn = tmp_path / 'torn.safetensors'
    save_model(torn, **full_metadata())
    torn.write_bytes(torn.read_bytes()[:1000])
    whole = tmp_path / 'whole.safetensors'
    save_model(whole, **full_metadata())
    for arguments, message in [
            (['--checkpoint', str(tmp_path / 'none.safetensors'), '--dataset', 'digits'], 'no weights at'),
            (['--checkpoint', str(torn), '--dataset', 'digits'], 'not a whole safetensors file'),
            (['--checkpoint', str(whole), '--dataset', str(tmp_path / 'none')], 'none'),
            (['--model', 'dense2net1_s8', '--pretrained', '--dataset', 'digits'],
             "timm has no model 'dense2net1_s8', did you mean dense2net"),
            (['--model', 'dense2net1', '--checkpoint', str(whole), '--dataset', 'digits'], "no model 'dense2net1'"),
            (['--model', 'dense2net121d_s4', '--pretrained', '--dataset', 'digits'], 'No pretrained weights exist'),
            (['--checkpoint', str(whole), '--dataset', 'digits', '--device', 'abacus'], '--device abacus: '),
    ]:
        assert main(arguments) == 2
        err = capsys.readouterr().err.splitlines()
        assert err[-1].startswith('error: ') and message in err[-1]
