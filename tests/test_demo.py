"""The demo page: its maps, what the server answers, and what a browser shows, without any network."""
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image, ImageStat

import timm_dense2net
from timm_dense2net.cam import class_activation_maps
from timm_dense2net.demo import build_demo, explain, main
from timm_dense2net.checkpoint import save_weights
from timm_dense2net.dense2net import SplitHierarchyConv2d
from timm_dense2net.drawings import DRAWINGS
from timm_dense2net.packaged import BEST_PACKAGED
from timm_dense2net.trained import load_trained

ROOT = Path(__file__).parent.parent
MODEL = 'dense2net40_k12_s4'
PACKAGED = pytest.mark.skipif(not timm.list_models(MODEL, pretrained=True), reason=f'no weights packaged for {MODEL}')


@pytest.mark.parametrize('scale', [2, 4, 8])
def test_maps_are_gradient_times_activation(scale):
    torch.manual_seed(0)
    model = timm.create_model(
        MODEL, block_config=(2, 2), growth_rate=16, scale=scale, num_classes=5).eval().requires_grad_(False)
    image = torch.randn(1, 3, 20, 28)
    maps = class_activation_maps(model, image, 3)
    with torch.inference_mode():
        again = class_activation_maps(model, image.clone(), 3)
    assert all(torch.equal(m, a) for m, a in zip(maps.by_block + maps.by_scale, again.by_block + again.by_scale))
    assert len(maps.by_scale) == scale and len(maps.by_block) == 2
    assert all(m.shape == (20, 28) and m.min() >= 0 for m in maps.by_scale + maps.by_block)
    assert not any(m._forward_hooks for m in model.modules())

    # The last block's map written out: average pooling and a linear classifier behind the final norm.
    features = model.features[:-1](image).requires_grad_()
    model.forward_head(model.features[-1](features))[0, 3].backward()
    expected = (features * features.grad).sum(1, keepdim=True).detach()
    expected = torch.nn.functional.interpolate(expected, (20, 28), mode='bilinear')[0, 0].clamp(min=0) / 4
    torch.testing.assert_close(maps.by_block[1], expected)


def test_maps_of_the_splits_share_the_logit():
    """Written out for one layer, at the image's size: activation times gradient of each split."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL, block_config=(1,), num_classes=5).eval()
    image, hierarchies = torch.randn(1, 3, 20, 28), []
    hierarchy = next(m for m in model.modules() if isinstance(m, SplitHierarchyConv2d))
    hook = hierarchy.register_forward_hook(lambda module, args, output: hierarchies.append(output))
    logit = model(image)[0, 3]
    hook.remove()
    contribution = hierarchies[0].detach() * torch.autograd.grad(logit, hierarchies)[0]
    expected = [split.sum((0, 1)).clamp(min=0) for split in contribution.chunk(4, 1)]
    assert all(m.any() for m in expected)
    torch.testing.assert_close(class_activation_maps(model, image, 3).by_scale, tuple(expected))
    plain = timm.create_model('densenet121_cifar', block_config=(1,)).eval()
    assert class_activation_maps(plain, image, 3).by_scale == ()


def test_map_points_at_what_counts():
    """Only the left half speaks for the class where the right half is cut off from the net."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL, block_config=(1,), num_classes=2).eval()
    image = torch.zeros(1, 3, 32, 32)
    image[..., :16] = torch.randn(1, 3, 32, 16)
    by_block = class_activation_maps(model, image, 0).by_block[0] + class_activation_maps(model, image, 1).by_block[0]
    assert by_block[:, :14].sum() > 20 * by_block[:, 18:].sum()


def test_fused_model_is_refused():
    model = timm.utils.reparameterize_model(timm.create_model(MODEL).eval())
    with pytest.raises(ValueError, match='not fused'):
        class_activation_maps(model, torch.zeros(1, 3, 32, 32), 0)


@PACKAGED
@pytest.mark.parametrize('name', DRAWINGS)
def test_drawings_are_recognised(name):
    labels, by_scale, by_block = explain(load_trained(BEST_PACKAGED), DRAWINGS[name]())
    assert next(iter(labels)) == name and len(labels) == 5
    assert list(labels.values()) == sorted(labels.values(), reverse=True)
    assert [caption.split(',')[0] for _, caption in by_scale] == [
        f'split {i}: {2 * i - 1}x{2 * i - 1} pixels' for i in range(1, 9)]
    assert len(by_block) == 4


def test_maps_lie_on_what_a_net_of_other_than_square_images_sees(tmp_path):
    own = tmp_path / 'own.safetensors'
    metadata = dict(model=MODEL, input_size='[3, 24, 48]', crop_pct='1.0')
    save_weights(own, timm.create_model(MODEL, num_classes=3).state_dict(), metadata)
    picture = Image.new('RGB', (48, 24))
    picture.paste('white', (44, 0, 48, 24))  # beyond the square in the middle
    _, by_scale, by_block = explain(load_trained(None, own), picture)
    for view, _ in [*by_scale, *by_block]:
        assert view.size == (288, 144)
        edge = view.convert('L').crop((280, 0, 288, 144))
        middle = view.convert('L').crop((100, 0, 180, 144))
        assert ImageStat.Stat(edge).mean > ImageStat.Stat(middle).mean


def test_a_port_that_is_taken_is_named(capsys):
    pytest.importorskip('gradio')
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        assert main(['--port', str(port)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f'error: cannot serve at 127.0.0.1:{port}, which may be taken: try another --port')


def test_wrong_checkpoint_gives_one_line(tmp_path, capsys):
    pytest.importorskip('gradio')
    assert main(['--checkpoint', str(tmp_path / 'nowhere')]) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and 'nowhere' in err and err.count('\n') == 1
    other = tmp_path / 'other.safetensors'
    save_weights(other, timm.create_model('test_resnet').state_dict(), dict(model='test_resnet'))
    assert main(['--checkpoint', str(other)]) == 2
    assert 'expected a run of a Dense2Net or DenseNet' in capsys.readouterr().err
    grey = tmp_path / 'grey.safetensors'
    save_weights(grey, timm.create_model(MODEL, in_chans=1).state_dict(), dict(model=MODEL, input_size='[1, 32, 32]'))
    assert main(['--checkpoint', str(grey)]) == 2
    assert 'expected a net for pictures in colour' in capsys.readouterr().err


def test_classes_that_differ_by_an_underscore_stay_apart(tmp_path):
    own = tmp_path / 'own.safetensors'
    net = timm.create_model(MODEL, num_classes=3, block_config=(1, 1, 1))
    save_weights(own, net.state_dict(), dict(
        model=MODEL, num_classes='3', model_args='{"block_config": [1, 1, 1]}', class_names='["a_b", "a b", "c"]'))
    assert explain(load_trained(None, own), Image.new('RGB', (32, 32)))[0].keys() == {'a_b', 'a b', 'c'}


def test_own_weights_go_first(tmp_path):
    pytest.importorskip('gradio', reason='the demo needs gradio')
    own = tmp_path / 'own.safetensors'
    save_weights(own, timm.create_model(MODEL, num_classes=5).state_dict(), dict(model=MODEL))
    menu = next(block for block in build_demo([own]).blocks.values() if block.elem_id == 'model')
    assert menu.value == str(own) and (str(own), str(own)) in menu.choices


# Read by Python at its start: notes and refuses every connection that leaves the machine.
NO_NETWORK = '''
import os, socket
connect, resolve = socket.socket.connect, socket.getaddrinfo
def note(what):
    with open(os.environ['REFUSED'], 'a') as f:
        f.write(f'{what}\\n')
    raise OSError(f'refused: {what}')
def checked_connect(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ('127.0.0.1', '::1', '0.0.0.0'):
        note(address)
    return connect(self, address)
def checked_resolve(host, *args, **kwargs):
    if host not in (None, '127.0.0.1', '::1', '0.0.0.0', 'localhost'):
        note(host)
    return resolve(host, *args, **kwargs)
socket.socket.connect, socket.getaddrinfo = checked_connect, checked_resolve
'''


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    """Address of the command's page, in a process that can reach nothing but this machine."""
    pytest.importorskip('gradio')
    folder = tmp_path_factory.mktemp('server')
    (folder / 'sitecustomize.py').write_text(NO_NETWORK)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = dict(
        os.environ, PYTHONPATH=f'{folder}{os.pathsep}{ROOT}', REFUSED=str(folder / 'refused'), OMP_NUM_THREADS='1',
        GRADIO_TEMP_DIR=str(folder / 'gradio'))
    with open(folder / 'log', 'w+') as log:
        process = subprocess.Popen(
            [sys.executable, '-m', 'timm_dense2net', 'demo', '--port', str(port)], env=env, cwd=folder, stdout=log,
            stderr=log)
        try:
            for _ in range(240):
                with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port), 1):
                    break
                assert process.poll() is None, (folder / 'log').read_text()
                time.sleep(0.5)
            yield f'http://127.0.0.1:{port}/'
        finally:
            process.terminate()
            process.wait(30)
    assert not (folder / 'refused').exists(), (folder / 'refused').read_text()
    assert 'Traceback' not in (folder / 'log').read_text()


@PACKAGED
def test_answers_of_the_server(server, tmp_path):
    client_module = pytest.importorskip('gradio_client')
    client = client_module.Client(server, verbose=False, analytics_enabled=False)
    DRAWINGS['clock']().save(tmp_path / 'clock.png')
    model = timm.list_models(MODEL, pretrained=True)[0]
    labels, by_scale, by_block = client.predict(
        client_module.handle_file(str(tmp_path / 'clock.png')), model, api_name='/classify')
    assert labels['label'] == 'clock' and len(labels['confidences']) == 5
    assert len(by_scale) == 4 and len(by_block) == 3
    with pytest.raises(Exception, match='not a picture'):
        (tmp_path / 'text.png').write_text('no picture')
        client.predict(client_module.handle_file(str(tmp_path / 'text.png')), model, api_name='/classify')


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip('selenium.webdriver')
    chromium, driver = shutil.which('chromium'), shutil.which('chromedriver')
    if not (chromium and driver):
        pytest.skip('chromium and chromedriver are not installed')
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ('headless', 'no-sandbox', 'disable-gpu', 'disable-background-networking', 'window-size=1280,1600',
                 f'user-data-dir={tmp_path / "profile"}'):
        options.add_argument(f'--{flag}')
    browser = webdriver.Chrome(options=options, service=webdriver.chrome.service.Service(driver))
    yield browser
    browser.quit()


def wait_for(condition, what, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.2)
    raise AssertionError(f'{what} did not show within {seconds} s')


@PACKAGED
def test_in_a_browser(server, browser, tmp_path):
    def find(selector):
        return browser.find_elements('css selector', selector)

    def upload(path):
        browser.get(server)
        wait_for(lambda: find('#picture input[type=file]'), 'the upload')[0].send_keys(str(path))

    def shown_class():
        return wait_for(lambda: [e.text for e in find('#classes h2') if e.text], 'the class')[0]

    DRAWINGS['sunflower']().save(tmp_path / 'sunflower.png')
    upload(tmp_path / 'sunflower.png')
    assert shown_class() == 'sunflower'
    model = timm.create_model(BEST_PACKAGED, device='meta')
    scales = next(m.scale for m in model.modules() if isinstance(m, SplitHierarchyConv2d))
    blocks = len(model.feature_info) - 1
    wait_for(lambda: len(find('#by_scale img')) >= scales and len(find('#by_block img')) >= blocks, 'the maps')
    loaded = browser.execute_script('return performance.getEntriesByType("resource").map(e => e.name)')
    assert not [name for name in loaded if not name.startswith((server, 'data:', 'blob:'))]
    if 'DEMO_SCREENSHOT' in os.environ:
        wait_for(lambda: browser.execute_script(
            'return [...document.querySelectorAll("img")].every(e => e.complete)'), 'every picture')
        browser.save_screenshot(os.environ['DEMO_SCREENSHOT'])
    browser.set_window_size(500, 1600)
    rights = wait_for(lambda: browser.execute_script(
        'return [...document.querySelectorAll(".maps img")].map(e => e.getBoundingClientRect().right)'), 'the maps')
    assert len(rights) == scales + blocks and max(rights) <= browser.execute_script('return innerWidth'), rights
    browser.set_window_size(1280, 1600)

    DRAWINGS['sea']().resize((9000, 9000)).save(tmp_path / 'large.jpg')
    upload(tmp_path / 'large.jpg')
    assert shown_class() == 'sea'

    (tmp_path / 'text.png').write_text('no picture')
    upload(tmp_path / 'text.png')
    wait_for(lambda: 'This file cannot be used: not a picture.' in find('body')[0].text, 'the message')
    assert not find('#by_scale img')


def test_the_page_begins_with_the_best_packaged_weights():
    pytest.importorskip('gradio', reason='the demo needs gradio')
    menu = next(block for block in build_demo().blocks.values() if block.elem_id == 'model')
    assert menu.value == BEST_PACKAGED
    assert (BEST_PACKAGED, BEST_PACKAGED) in menu.choices
    assert not list(Path(timm_dense2net.__file__).parent.glob('*.pyi'))  # gradio's, of a class of one's own
