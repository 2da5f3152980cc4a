"""Pretrained weights that come with the package."""
import csv
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import timm_dense2net  # noqa: F401
from timm_dense2net import packaged
from timm_dense2net.checkpoint import load_weights, save_weights
from timm_dense2net.cifar import CIFAR100_CLASSES
from timm_dense2net.evaluate import main as evaluate_main
from timm_dense2net.files import sha256_of
from timm_dense2net.package import main as package_main
from timm_dense2net.package import package_run
from timm_dense2net.public_args import is_place
from timm_dense2net.start import pretrained_overlay
from timm_dense2net.trained import load_trained

ROOT = Path(__file__).parent.parent
CIFAR100 = ROOT.parent / 'shared' / 'cifar100'
PRETRAINED = [n for n in timm.list_pretrained('*dense*net*') if timm.get_pretrained_cfg(n).file]
TAGGED = [n for n in PRETRAINED if '.' in n]
NAME = 'dense2net40_k12_s4'


@pytest.fixture
def no_cache():
    packaged.check_packaged.cache_clear()
    yield
    packaged.check_packaged.cache_clear()


def test_list_pretrained_is_true():
    assert {
        f'{NAME}.small_c100', f'{NAME}.quick_c100', f'{NAME}.sprint_40_k12_c100', 'dense2net100_k12_s4.small_c100',
        'dense2net100_k12_s4.small_ft_c100', 'dense2net100_k12_s4.sprint_k12_c100',
        'dense2net121_s8.short_ft7_c100', 'dense2net121_s8.sprint_c100', 'dense2net121_s8_se.sprint_s8_se_c100',
        'dense2net121_s2.sprint_s2_c100', 'dense2net121_s4.merged_s4_c100', 'dense2net121_s4_c32.sprint_s4_c32_ft_c100',
        'dense2net121_s4_se.sprint_s4_se_c100', 'densenet40_k12_cifar.small_c100',
    } <= set(TAGGED)
    ours = {n for n in timm.list_pretrained() if n.split('.')[0] in timm.list_models(module='dense2net')}
    assert ours == set(TAGGED)
    files = {f'{n}.safetensors' for n in TAGGED}
    assert {p.name for p in packaged.WEIGHTS_DIR.glob('*.safetensors')} == files == set(packaged.read_sums())


@pytest.mark.parametrize('name', TAGGED)
def test_weights_load_exactly_and_are_half_precision(name):
    stored = load_file(packaged.packaged_file(name))
    assert {t.dtype for t in stored.values()} <= {torch.float16, torch.int64}
    model = timm.create_model(name, pretrained=True)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[key].to(tensor.dtype)), key


@pytest.mark.parametrize('name', TAGGED)
def test_metadata_tell_nothing_of_the_machine(name):
    metadata = load_weights(packaged.packaged_file(name))[1]
    assert metadata['dataset'] == 'cifar100'
    # Weights that these started from, in the package no more.
    former = {('pretrained_path', f'dense2net121_{name}_c100') for name in ('s4.short_s4', 's4_se.short_s4_se')}
    assert not [
        key for key, value in json.loads(metadata['args']).items()
        if is_place(key, value) and (key, value) not in former]
    assert not re.search(r'"[/~]|/(home|root|tmp|work)/|local-dir:', json.dumps(metadata).replace('\\"', '"'))


def test_weights_adapt_to_other_heads_and_inputs():
    model = timm.create_model(NAME, pretrained=True)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    grey = timm.create_model(NAME, pretrained=True, in_chans=1, num_classes=7)
    torch.testing.assert_close(  # timm sums in the precision of the file
        grey.features.conv0.weight, model.features.conv0.weight.sum(1, keepdim=True), rtol=1e-3, atol=1e-3)
    assert grey(x[:, :1]).shape == (2, 7)
    net = timm.create_model(NAME, pretrained=True, features_only=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(net(x)[-1], model.eval().forward_features(x))
    assert timm.create_model(NAME, pretrained=True, num_classes=0).eval()(x).shape == (2, model.num_features)


def test_names_of_classes_come_with_the_weights():
    """As timm's inference.py reads them; not with random weights, nor where the classifier is another."""
    def names(**kwargs):
        return timm.create_model(NAME, **kwargs).pretrained_cfg.get('label_names')

    own = timm.create_model(NAME).state_dict()
    assert names(pretrained=True) == CIFAR100_CLASSES
    assert names() is names(pretrained=True, num_classes=7) is None
    assert names(pretrained=True, pretrained_cfg_overlay=dict(state_dict=own)) is None
    assert names(pretrained=True, features_only=True) is None


def test_weights_of_other_classes_by_timms_train_script():
    """It gives -1 classes with the file: the net has its own number of them, its classifier random weights."""
    overlay = dict(file=packaged.packaged_file(f'{NAME}.small_c100'), num_classes=-1)
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay)
    stored = load_file(overlay['file'])
    assert torch.equal(model.features.conv0.weight, stored['features.conv0.weight'].float())
    assert model.num_classes == 100
    assert not torch.equal(model.classifier.weight, stored['classifier.weight'].float())
    assert 'label_names' not in model.pretrained_cfg
    large = timm.create_model('dense2net121d_s8', pretrained_cfg_overlay=dict(num_classes=-1), device='meta')
    assert large.num_classes == 1000


def test_best_packaged_weights_are_those_of_the_highest_top1():
    with open(ROOT / 'results' / 'results.csv', newline='') as f:
        rows = [row for row in csv.DictReader(f) if row['dataset'] == 'cifar100']
    best = max(rows, key=lambda row: float(row['top1']))
    assert packaged.BEST_PACKAGED == f'{best["model"]}.{best["tag"]}'
    readme = (ROOT / 'README.md').read_text()
    evaluated = re.search(rf'^\| `{best["model"]}` \| `{best["tag"]}` \| ([\d.]+) \|', readme, re.MULTILINE)[1]
    assert f'`{packaged.BEST_PACKAGED}`, have {evaluated} % top-1' in readme


def test_a_name_without_weights_says_so():
    with pytest.raises(RuntimeError) as info:
        timm.create_model('dense2net201_s8', pretrained=True)
    assert 'dense2net201_s8' in str(info.value) and f'{NAME}.small_c100' in str(info.value)


def test_own_weights_by_overlay(tmp_path):
    own = timm.create_model('dense2net40_k12_s4', num_classes=7)
    save_file(own.state_dict(), tmp_path / 'own.safetensors')
    model = timm.create_model(
        'dense2net40_k12_s4', pretrained=True, num_classes=7,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'own.safetensors'), num_classes=7))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), own.state_dict().values()))


def test_an_overlay_with_weights_elsewhere_goes_before_the_packaged_ones():
    for source in (dict(hf_hub_id='owner/name'), dict(url='https://example.org/x.safetensors')):
        cfg = timm.create_model(NAME, pretrained_cfg_overlay=source).pretrained_cfg
        assert not cfg.get('file') and source.items() <= cfg.items()


def test_random_weights_in_a_folder_have_no_class_names(tmp_path):
    timm.models.save_for_hf(timm.create_model(NAME), str(tmp_path / 'own'), safe_serialization=True)
    assert load_trained(f'local-dir:{tmp_path}/own').class_names is None
    assert load_trained(f'{NAME}.small_c100').class_names == CIFAR100_CLASSES


def test_damaged_weights_are_refused(tmp_path, monkeypatch, no_cache):
    path = Path(packaged.packaged_file(f'{NAME}.quick_c100'))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    monkeypatch.setattr(packaged, 'WEIGHTS_DIR', tmp_path)
    (tmp_path / path.name).write_bytes(data)
    with pytest.raises(RuntimeError, match='damaged.*install timm_dense2net again'):
        packaged.check_packaged(str(tmp_path / path.name))
    with pytest.raises(RuntimeError, match='not there'):
        packaged.check_packaged(str(tmp_path / 'absent.safetensors'))


def test_weights_are_checked_wherever_they_are_loaded(tmp_path, monkeypatch, no_cache):
    other = tmp_path / 'SHA256SUMS'
    other.write_text(''.join(f'{"0" * 64}  {name}\n' for name in packaged.read_sums()))
    monkeypatch.setattr(packaged, 'SUMS_FILE', other)
    with pytest.raises(RuntimeError, match=f'{NAME}.sprint_40_k12_c100.safetensors are damaged'):
        timm.create_model(NAME, pretrained=True)
    with pytest.raises(RuntimeError, match=f'{NAME}.quick_c100.safetensors are damaged'):
        pretrained_overlay(f'{NAME}.quick_c100', timm.create_model(NAME), CIFAR100_CLASSES)


@pytest.mark.parametrize('changed, message', [
    (dict(num_classes='10'), f'100 classes, got {NAME} with 10$'),
    (dict(model_args='{"growth_rate": 16}'), 'growth_rate'),
    (dict(class_names='["cat", "dog"]'), "CIFAR-100's classes"),
    (dict(res2net_conversion='{}'), 'converted'),
])
def test_weights_that_fit_no_name_are_not_packaged(changed, message, tmp_path, monkeypatch):
    metadata = dict(model=NAME, num_classes='100', model_args='{}', class_names=json.dumps(CIFAR100_CLASSES))
    save_weights(tmp_path / 'last.safetensors', timm.create_model(NAME).state_dict(), metadata | changed)
    monkeypatch.setattr(packaged, 'WEIGHTS_DIR', tmp_path / 'weights')
    with pytest.raises(ValueError, match=message):
        package_run(tmp_path, 'quick')
    assert not (tmp_path / 'weights').exists()


def test_the_weights_that_the_run_tested_are_packaged(tmp_path, monkeypatch, capsys):
    metadata = dict(model=NAME, num_classes='100', model_args='{}', class_names=json.dumps(CIFAR100_CLASSES))
    for name in ('last', 'best'):
        state_dict = timm.create_model(NAME).state_dict()
        save_weights(tmp_path / f'{name}.safetensors', state_dict, metadata | dict(epoch=name))
    monkeypatch.setattr(packaged, 'WEIGHTS_DIR', tmp_path / 'weights')
    monkeypatch.setattr(packaged, 'SUMS_FILE', tmp_path / 'weights' / 'SHA256SUMS')
    packaged.WEIGHTS_DIR.mkdir()
    packaged.SUMS_FILE.write_text(f'{"0" * 64}  other.safetensors\n')
    assert load_weights(package_run(tmp_path, 'quick'))[1]['epoch'] == 'last'
    (tmp_path / 'result.json').write_text('{"tested": "best"}')
    assert package_main([str(tmp_path), '--recipe', 'quick']) == 0
    path = tmp_path / 'weights' / f'{NAME}.quick_c100.safetensors'
    assert load_weights(path)[1]['epoch'] == 'best' and str(path) in capsys.readouterr().out
    assert packaged.read_sums() == {'other.safetensors': '0' * 64, path.name: sha256_of(path)}
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16, torch.int64}
    state_dict['features.conv0.weight'][0, 0, 0, 0] = 1e6
    save_weights(tmp_path / 'best.safetensors', state_dict, metadata)
    assert package_main([str(tmp_path), '--recipe', 'quick']) == 1
    assert 'features.conv0.weight does not fit half precision' in capsys.readouterr().err
    (tmp_path / 'result.json').write_text('{')
    assert package_main([str(tmp_path), '--recipe', 'quick']) == 1
    assert f'{tmp_path / "result.json"} cannot be read' in capsys.readouterr().err
    assert package_main([str(tmp_path), '--recipe', '../quick']) == 1
    assert "got '../quick'" in capsys.readouterr().err


@pytest.mark.skipif(not CIFAR100.is_dir(), reason='needs ../shared/cifar100, the CIFAR-100 parquet files')
def test_test_split_accuracy_is_that_of_the_table(tmp_path):
    measured = json.loads((ROOT / 'results' / f'{NAME}-sprint_40_k12-seed42' / 'evaluate.json').read_text())
    figures = tmp_path / 'figures.json'
    args = ['--model', NAME, '--pretrained', '--dataset', f'hfds/{CIFAR100}', '--data-dir', str(tmp_path)]
    assert evaluate_main([*args, '--output', str(figures)]) == 0
    # Another machine's rounding may move an image or two of 10,000 across a boundary.
    assert json.loads(figures.read_text())['top1'] == pytest.approx(measured['top1'], abs=0.03)
