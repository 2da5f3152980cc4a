"""The predict command: what it finds, what it prints, and pictures that cannot be read."""
import argparse
import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import timm_dense2net  # noqa: F401
from timm_dense2net.checkpoint import save_weights
from timm_dense2net.packaged import BEST_PACKAGED
from timm_dense2net.predict import Source, find_images, main, predict_images
from timm_dense2net.trained import load_trained

MODEL = 'dense2net40_k12_s4'
NAMES = ['ant', 'bee', 'cat', 'dog', 'eel', 'fox']


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """Weights of six classes whose logits differ between pictures."""
    path = tmp_path_factory.mktemp('run') / 'last.safetensors'
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=6)
    save_weights(path, model.state_dict(), dict(
        model=MODEL, model_args='{}', input_size='[3, 32, 32]', mean='[0.5, 0.4, 0.3]', std='[0.3, 0.2, 0.1]',
        class_names=json.dumps(NAMES)))
    return path


def picture(path, seed=0, size=(32, 32), mode='RGB'):
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).convert(mode).save(path)
    return path


@pytest.fixture
def pictures(tmp_path):
    """Ten pictures in two folders."""
    for index in range(10):
        picture(tmp_path / 'pictures' / ('a' if index < 4 else 'b') / f'{index}.png', seed=index)
    return tmp_path / 'pictures'


def expected_top(weights, path, k):
    """Class names and probabilities by timm alone."""
    model = load_trained(checkpoint=weights).model
    pixels = torch.tensor(list(Image.open(path).convert('RGB').tobytes())).view(32, 32, 3).permute(2, 0, 1) / 255
    x = (pixels - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.3, 0.2, 0.1]).view(3, 1, 1)
    with torch.no_grad():
        top = model(x[None]).softmax(1)[0].topk(k)
    return [(NAMES[index], value) for value, index in zip(top.values.tolist(), top.indices.tolist())]


def test_csv_holds_the_models_own_probabilities_in_order(weights, pictures, capsys):
    assert main([str(pictures), '--checkpoint', str(weights), '--format', 'csv', '--topk', '2', '-b', '3']) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    paths = sorted(str(path) for path in pictures.rglob('*.png'))
    assert [row['image'] for row in rows] == [path for path in paths for _ in range(2)]
    for path in paths[::3]:
        found = [(row['class'], float(row['probability'])) for row in rows if row['image'] == path]
        expected = expected_top(weights, path, 2)
        assert [name for name, _ in found] == [name for name, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], abs=2e-5)
    assert [row['rank'] for row in rows[:2]] == ['1', '2'] and NAMES[int(rows[0]['class_index'])] == rows[0]['class']


def test_one_process_of_a_slurm_job_works_alone(weights, pictures, capsys, monkeypatch):
    for name, value in (('SLURM_NTASKS', '2'), ('SLURM_PROCID', '0'), ('SLURM_LOCALID', '0')):
        monkeypatch.setenv(name, value)
    assert main([str(pictures), '--checkpoint', str(weights)]) == 0


def test_json_and_table_say_the_same(weights, pictures, capsys):
    call = [str(pictures / 'a'), '--checkpoint', str(weights), '--topk', '3']
    assert main([*call, '--format', 'json']) == 0
    objects = json.loads(capsys.readouterr().out)
    assert main(call) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(objects) == len(lines) == 4
    for item, line in zip(objects, lines):
        assert line.startswith(item['image']) and len(item['predictions']) == 3
        words = line[len(item['image']):].split()
        assert words[0::3] == [each['class'] for each in item['predictions']]
        assert words[1::3] == [f'{100 * each["probability"]:.1f}' for each in item['predictions']]


def test_more_classes_than_there_are_are_all(weights, pictures, capsys):
    assert main([str(pictures / 'a' / '0.png'), '--checkpoint', str(weights), '--topk', '50', '--format', 'json']) == 0
    predictions = json.loads(capsys.readouterr().out)[0]['predictions']
    assert sorted(each['class'] for each in predictions) == NAMES
    assert sum(each['probability'] for each in predictions) == pytest.approx(1, abs=1e-5)


def test_class_names_of_a_configuration_by_index(tmp_path):
    """As timm's config.json may have them."""
    model = timm.create_model('test_resnet', num_classes=12)
    names = {str(index): f'kind {index}' for index in reversed(range(12))}
    timm.models.save_for_hf(model, tmp_path, model_config=dict(label_names=names), safe_serialization=True)
    assert load_trained(f'local-dir:{tmp_path}').class_names == tuple(f'kind {index}' for index in range(12))


def test_a_model_of_other_channels_is_refused(tmp_path, pictures, capsys):
    path = tmp_path / 'weights.safetensors'
    save_weights(path, timm.create_model(MODEL, in_chans=4).state_dict(), dict(model=MODEL, input_size='[4, 32, 32]'))
    assert main([str(pictures), '--checkpoint', str(path)]) == 2
    assert f'{path} takes images of 4 channels' in capsys.readouterr().err


@pytest.mark.parametrize('arguments', [dict(in_chans=1), dict(in_chans=1, img_size=32)])
def test_grey_nets_of_timms_train_script(tmp_path, pictures, capsys, arguments):
    path = tmp_path / 'checkpoint.pth.tar'
    state = timm.create_model(MODEL, in_chans=1, num_classes=6).state_dict()
    torch.save(dict(arch=MODEL, state_dict=state, args=argparse.Namespace(**arguments)), path)
    assert load_trained(checkpoint=path).data_config['input_size'] == (1, 32, 32)
    assert main([str(pictures), '--checkpoint', str(path)]) == 0
    assert capsys.readouterr().out.count('.png') == 10


def test_batches_change_nothing(weights, pictures):
    trained = load_trained(checkpoint=weights)
    sources = list(find_images([str(pictures)]))
    one, all_at_once = (list(predict_images(trained, sources, batch_size=size)) for size in (1, 64))
    for first, second in zip(one, all_at_once, strict=True):
        assert first.image == second.image
        assert [index for index, _, _ in first.classes] == [index for index, _, _ in second.classes]
        torch.testing.assert_close(
            torch.tensor([value for _, _, value in first.classes]),
            torch.tensor([value for _, _, value in second.classes]), rtol=1e-4, atol=1e-6)


def test_files_folders_and_patterns_are_found_in_order(pictures):
    def names(*arguments):
        return [(Path(source.name).name, source.error) for source in find_images(arguments)]

    (pictures / 'a' / 'notes.txt').touch()
    picture(pictures / 'a' / 'UPPER.JPG')
    assert names(str(pictures / 'b')) == [(f'{index}.png', None) for index in range(4, 10)]
    assert names(f'{pictures}/**/[13].png', str(pictures / 'a' / '0.png')) == [
        ('1.png', None), ('3.png', None), ('0.png', None)]
    assert [name for name, _ in names(str(pictures))][:5] == ['0.png', '1.png', '2.png', '3.png', 'UPPER.JPG']
    assert names(f'{pictures}/*.gif') == [('*.gif', 'no file matches this pattern')]
    (pictures / 'empty' / 'folder.jpg').mkdir(parents=True)
    assert names(str(pictures / 'empty')) == [('empty', 'no picture in this folder')]
    bracket = picture(pictures / 'odd[1].png')
    assert names(str(bracket)) == [('odd[1].png', None)]


def test_standard_input_is_a_picture_or_a_list_of_paths(weights, pictures, monkeypatch):
    def find(data):
        monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(data)))
        return list(find_images(['-']))

    path = pictures / 'a' / '0.png'
    listed = find(f'{path}\n\n{pictures}/b/4.png\n'.encode())
    assert listed == [Source(str(path)), Source(f'{pictures}/b/4.png')]
    assert find(b' \n') == [Source('-', error='standard input is empty')]
    assert find(b' a b.png \r\n') == [Source(' a b.png ')]
    assert find(b'P5 scans/1.png\n') == [Source('P5 scans/1.png')]
    plain = b'P3 1 1 255 9 9 9\n'  # a picture in ASCII
    torn = io.BytesIO()
    Image.open(path).save(torn, 'WEBP')
    for data in (plain, b'\xff\xff', torn.getvalue()[:100]):
        assert find(data) == [Source('-', data)]

    trained = load_trained(checkpoint=weights)
    piped = list(predict_images(trained, find(path.read_bytes())))
    direct = list(predict_images(trained, [Source(str(path))]))
    assert piped[0].image == '-' and piped[0].classes == direct[0].classes


def test_any_kind_of_picture_is_taken(weights, tmp_path, capsys):
    picture(tmp_path / 'grey.png', mode='L')
    picture(tmp_path / 'palette.gif', mode='P')
    picture(tmp_path / 'alpha.png', mode='RGBA')
    picture(tmp_path / 'cmyk.jpg', mode='CMYK')
    picture(tmp_path / 'deep.tif', mode='I;16')
    picture(tmp_path / 'wide.webp', size=(500, 90))
    picture(tmp_path / 'tiny.bmp', size=(1, 1))
    assert main([str(tmp_path), '--checkpoint', str(weights), '--format', 'json']) == 0
    assert len(json.loads(capsys.readouterr().out)) == 7


def test_a_turned_photograph_is_set_upright(weights, tmp_path):
    upright = picture(tmp_path / 'upright.png')
    image = Image.open(upright).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn clockwise by 90 degrees to see it upright
    image.save(tmp_path / 'turned.png', exif=exif)
    trained = load_trained(checkpoint=weights)
    first, second = predict_images(trained, [Source(str(upright)), Source(str(tmp_path / 'turned.png'))])
    assert first.classes == second.classes


def test_unreadable_pictures_are_reported_and_counted_and_the_rest_goes_on(weights, pictures, tmp_path, capsys):
    bad = tmp_path / 'bad'
    bad.mkdir()
    (bad / 'text.png').write_text('no picture')
    (bad / 'empty.jpg').touch()
    (bad / 'gone.png').symlink_to(bad / 'moved.png')
    (bad / 'torn.png').write_bytes(picture(tmp_path / 'whole.png', size=(200, 200)).read_bytes()[:5000])
    good = pictures / 'a' / '0.png'
    call = [
        str(good), str(bad), str(bad / 'none.png'), str(pictures / 'b' / '5.png'), '--checkpoint', str(weights),
        '-b', '2', '--format', 'json']
    assert main(call) == 1
    out, err = capsys.readouterr()
    for name, message in [
            ('text.png', 'not a picture'), ('empty.jpg', 'not a picture'), ('torn.png', 'cannot be read'),
            ('none.png', 'No such file or directory'), ('gone.png', 'No such file or directory')]:
        assert f'error: {bad / name}: {message}' in err
    assert '5 of 7 pictures could not be read' in err
    objects = json.loads(out)
    assert [Path(item['image']).name for item in objects if 'predictions' in item] == ['0.png', '5.png']
    assert sum('error' in item for item in objects) == 5
    top = objects[0]['predictions'][0]
    name, probability = expected_top(weights, good, 1)[0]
    assert top['class'] == name and top['probability'] == pytest.approx(probability, abs=2e-5)


def test_a_picture_too_large_to_be_one_is_reported(weights, tmp_path, monkeypatch, capsys):
    picture(tmp_path / 'large.png', size=(300, 300))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10_000)
    assert main([str(tmp_path), '--checkpoint', str(weights)]) == 1
    assert 'large.png: more than 20,000 pixels' in capsys.readouterr().err


def test_output_goes_to_a_file(weights, pictures, tmp_path, capsys):
    path = tmp_path / 'out.csv'
    assert main([str(pictures), '--checkpoint', str(weights), '--format', 'csv', '--output', str(path)]) == 0
    assert capsys.readouterr().out == '' and len(path.read_text().splitlines()) == 1 + 10 * 5


@pytest.mark.skipif(sys.platform != 'linux', reason='other systems have no such names')
def test_a_name_that_is_not_utf_8(weights, tmp_path, capsys):
    name = os.fsdecode(b'\xff.png')
    picture(tmp_path / name)
    call = [str(tmp_path), '--checkpoint', str(weights), '--format', 'csv', '--topk', '1']
    assert main(call) == 0
    assert r'\udcff.png' in capsys.readouterr().out
    assert main([*call, '--output', str(tmp_path / 'out.csv')]) == 0
    assert os.fsencode(tmp_path / name) in (tmp_path / 'out.csv').read_bytes()
    assert main([*call, '--format', 'json', '--output', str(tmp_path / 'out.json')]) == 0
    assert json.loads((tmp_path / 'out.json').read_text(encoding='utf-8'))[0]['image'] == str(tmp_path / name)


def test_weights_without_class_names_give_numbers(tmp_path, pictures, capsys):
    path = tmp_path / 'plain.safetensors'
    save_weights(path, timm.create_model(MODEL, num_classes=3).state_dict(), {})
    call = [str(pictures / 'a' / '0.png'), '--checkpoint', str(path), '--model', MODEL, '--format', 'json']
    assert main(call) == 0
    predictions = json.loads(capsys.readouterr().out)[0]['predictions']
    assert sorted(each['class'] for each in predictions) == ['class 0', 'class 1', 'class 2']


def test_a_model_that_cannot_be_used_is_one_message(pictures, tmp_path, capsys):
    for arguments, message in [
            (['--model', 'dense2net999'], "timm has no model 'dense2net999', did you mean dense"),
            (['--model', 'owner/net'], 'has no source prefix'),
            (['--model', 'dense2net121d_s8'], 'No pretrained weights exist'),
            (['--model', f'local-dir:{tmp_path}'], 'Config file not found'),
            (['--checkpoint', str(tmp_path / 'none.safetensors')], 'no weights at'),
            (['--model', MODEL, '--device', 'abacus'], '--device abacus: '),
    ]:
        assert main([str(pictures), *arguments]) == 2
        err = capsys.readouterr().err
        assert err.startswith('error: ') and message in err and err.count('\n') == 1


@pytest.mark.parametrize('option, message', [
    (['--topk', '0'], '--topk must be at least 1, got 0'), (['-b', '0'], '--batch-size must be at least 1, got 0'),
    (['--format', 'xml'], 'invalid choice'), (['--output', 'no/where.csv'], 'there is no folder no')])
def test_a_wrong_call_is_refused(option, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(['a.png', *option])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_default_is_a_packaged_model(pictures, capsys):
    outputs = []
    for model in ([], ['--model', BEST_PACKAGED]):
        assert main([str(pictures / 'a'), '--format', 'json', *model]) == 0
        outputs.append(json.loads(capsys.readouterr().out))
    assert len(outputs[0]) == 4 and outputs[0] == outputs[1]


def test_pipes_and_exit_codes_hold_for_a_process(weights, pictures):
    root = Path(__file__).parents[1]
    listed = '\n'.join(map(str, sorted(pictures.rglob('*.png')))) + '\nnone.png\n'
    done = subprocess.run(
        [sys.executable, '-m', 'timm_dense2net', 'predict', '-', '--checkpoint', str(weights), '--format', 'csv',
         '--topk', '1'],
        input=listed, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(root)})
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 11
    assert 'error: none.png: No such file or directory' in done.stderr and 'Traceback' not in done.stderr


def test_a_reader_that_has_enough_is_no_fault(weights, pictures):
    arguments = ['predict', *[str(pictures)] * 60, '--checkpoint', str(weights), '--format', 'csv']
    with subprocess.Popen(
            [sys.executable, '-m', 'timm_dense2net', *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env={**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1])}) as process:
        process.stdout.close()
        assert 'error' not in process.stderr.read()
    assert process.returncode == 1
