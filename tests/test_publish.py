"""Publishing a run and loading it back: the Hub folder, the real Hub client against a loopback server, and faults.

The Hub's address, cache and offline mode are read when huggingface_hub is imported, so calls run in worker processes
of their own, one online and one offline, that share a cache.
"""
import io
import json
import os
import re
import shutil
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import timm
import torch
import yaml
from hub_server import TOKEN, HubServer
from PIL import Image
from safetensors.torch import load_file
from timm.utils import update_summary

import timm_dense2net  # noqa: F401
from timm_dense2net.checkpoint import load_weights, save_weights
from timm_dense2net.cifar import CIFAR100_CLASSES
from timm_dense2net.convert import conversion_metadata, convert_res2net
from timm_dense2net.files import sha256_of
from timm_dense2net.hub import DIGEST_KEY
from timm_dense2net.options import build_parser, saved_args
from timm_dense2net.publish import main, write_hub_folder
from timm_dense2net.recipe import load_recipe

MODEL = 'dense2net40_k12_s4'
REPO = 'owner/net'


def make_run(folder, num_classes=100, names=CIFAR100_CLASSES):
    """A finished run of the small model."""
    run = folder / 'run'
    run.mkdir()
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=num_classes)
    save_weights(run / 'last.safetensors', model.state_dict(), dict(
        model=MODEL, model_args='{}', num_classes=str(num_classes), input_size='[3, 32, 32]',
        mean='[0.5, 0.4, 0.3]', std='[0.3, 0.2, 0.1]', class_names=json.dumps(names),
        args=json.dumps(dict(model=MODEL))))
    args = saved_args(build_parser().parse_args([])) | dict(
        model=MODEL, dataset='hfds//home/somebody/cifar100', data_dir='/home/somebody/data', seed=7, lr=0.2)
    (run / 'args.yaml').write_text(yaml.safe_dump(args))
    (run / 'result.json').write_text(json.dumps(dict(
        model=MODEL, recipe='', dataset=args['dataset'], seed=7, params=190_000, epochs=3, ema=False, hold_out=0,
        tested='last', test_top1=61.25, test_top5=88.5, best_top1=62., best_epoch=2, train_seconds=7200.,
        images_per_second=1000., world_size=1, hardware='NVIDIA H200', versions=dict(torch='2.15.0'), commit='abc',
        command=['train_cifar.py', '--data-dir', '/home/somebody/data'])))
    for epoch in range(3):
        update_summary(epoch, dict(loss=3., top1=30.), dict(loss=3., top1=31.), run / 'summary.csv', lr=0.1)
    (run / 'curves.png').write_bytes(b'\x89PNG not looked at here')
    return run


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


# What the worker processes do: calls of the package, one a line, until the input ends.

def serve_worker():
    """Runs the functions named on standard input; waits of the client between two tries are cut short."""
    import time
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.02))
    for line in sys.stdin:
        request = json.loads(line)
        os.environ.pop('HF_TOKEN', None)
        if request['token']:
            os.environ['HF_TOKEN'] = request['token']
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                value = globals()[f'do_{request["name"]}'](*request['args'])
            except Exception:
                value = None
                traceback.print_exc()
        print(json.dumps(dict(value=value, out=out.getvalue(), err=err.getvalue())), flush=True)


def do_publish(*argv):
    return main([*argv])


def do_load(name):
    """Loads as the package's commands do; the message where it fails."""
    from timm_dense2net.trained import load_trained
    try:
        trained = load_trained(name)
    except ValueError as e:
        return f'ValueError: {e}'
    return logits_of(trained.model)


def do_create(name, overlay=None):
    return logits_of(timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval())


def logits_of(model):
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32))[0].tolist()


class Worker:
    def __init__(self, **environment):
        root = Path(__file__).parents[1]
        environment |= dict(
            PYTHONPATH=f'{root}{os.pathsep}{root / "tests"}', HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_PROGRESS_BARS='1',
            HF_HUB_DISABLE_TELEMETRY='1', NO_PROXY='127.0.0.1,localhost')
        own = ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE', 'HF_HUB_CACHE', 'HUGGING_FACE_HUB_TOKEN')
        inherited = {key: value for key, value in os.environ.items() if key not in own}
        self.process = subprocess.Popen(
            [sys.executable, '-c', 'import test_publish; test_publish.serve_worker()'], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env={**inherited, **environment})

    def __call__(self, name, *args, token=TOKEN):
        print(json.dumps(dict(name=name, args=args, token=token)), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        assert 'Traceback' not in answer['err'], answer['err']
        return answer['value'], answer['out'], answer['err']

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    return tmp_path_factory.mktemp('hf')


@pytest.fixture(scope='module')
def server():
    server = HubServer()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope='module')
def online_worker(server, home):
    worker = Worker(HF_ENDPOINT=server.url, HF_HOME=str(home))
    yield worker
    worker.close()


@pytest.fixture(scope='module')
def offline_worker(server, home):
    worker = Worker(HF_ENDPOINT=server.url, HF_HOME=str(home), HF_HUB_OFFLINE='1')
    yield worker
    worker.close()


@pytest.fixture
def hub(server, home):
    """The server, empty and without faults, and an empty cache."""
    server.reset()
    shutil.rmtree(home / 'hub', ignore_errors=True)
    return server


@pytest.fixture
def published(hub, run, online_worker):
    """A run that lies on the Hub; its logits."""
    code, _, err = online_worker('publish', str(run), '--repo-id', REPO, '--push')
    assert code == 0, err
    model = timm.create_model(MODEL)
    model.load_state_dict(load_file(run / 'last.safetensors'))
    return logits_of(model.eval())


# The folder.

def test_hub_folder_loads_with_timm(run, capsys):
    assert main([str(run), '--repo-id', REPO]) == 0
    folder = run / 'hub'
    out = capsys.readouterr().out
    assert all(path.name in out for path in folder.iterdir()) and 'timm.create_model' in out
    assert {path.name for path in folder.iterdir()} == {
        'README.md', 'config.json', 'model.safetensors', 'recipe.yaml', 'summary.csv', 'curves.png'}

    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    expected = load_file(run / 'last.safetensors')
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    config = timm.data.resolve_model_data_config(model)
    assert tuple(config['mean']) == (0.5, 0.4, 0.3) and tuple(config['std']) == (0.3, 0.2, 0.1)
    assert config['crop_pct'] == 1. and config['input_size'] == (3, 32, 32)
    assert tuple(model.pretrained_cfg['label_names']) == CIFAR100_CLASSES
    assert not model.pretrained_cfg['tag']  # the run has no recipe
    assert timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=5).num_classes == 5


def test_hub_folder_keeps_another_number_of_classes(tmp_path):
    run = make_run(tmp_path, num_classes=3, names=['cat', 'dog', 'eel'])
    folder = write_hub_folder(run, REPO, tmp_path / 'out')
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert model.num_classes == 3 and list(model.pretrained_cfg['label_names']) == ['cat', 'dog', 'eel']


def test_model_card_states_figures_licence_and_use(run):
    card = (write_hub_folder(run, REPO, run / 'hub') / 'README.md').read_text()
    metadata = yaml.safe_load(card.split('---\n')[1])
    assert metadata['license'] == 'apache-2.0' and metadata['library_name'] == 'timm'
    assert metadata['datasets'] == ['uoft-cs/cifar100']
    result, = metadata['model-index'][0]['results']
    assert result['dataset'] == dict(name='CIFAR-100', type='uoft-cs/cifar100', split='test')
    assert {item['name']: item['value'] for item in result['metrics']} == {
        'Top-1 accuracy (%)': 61.25, 'Top-5 accuracy (%)': 88.5}
    for text in ('61.25 % / 88.50 %', 'import timm_dense2net', '![', 'curves.png', 'Code and weights: apache-2.0',
                 '1 x NVIDIA H200, 2.00 h', '@article{gao2019res2net', 'huang2017densely', 'starliper'):
        assert text in card
    assert 'confusion_matrix.png' not in card


@pytest.mark.parametrize('converted', [False, True])
def test_the_card_of_another_timm_model_tells_what_it_has_from_here(run, converted):
    model = timm.create_model('test_resnet', num_classes=100)
    if converted:
        convert_res2net(model, 2)
    metadata = load_weights(run / 'last.safetensors')[1] | dict(model='test_resnet', **conversion_metadata(model))
    save_weights(run / 'last.safetensors', model.state_dict(), metadata)
    card = (write_hub_folder(run, REPO, run / 'hub') / 'README.md').read_text()
    assert yaml.safe_load(card.split('---\n')[1])['tags'] == ['timm', 'image-classification']
    assert 'starliper' not in card and 'huang2017densely' not in card
    for text in ('import timm_dense2net', 'pip install .', 'gao2019res2net', '## Citation', 'hierarchy (scale 2)'):
        assert (text in card) == converted
    assert ('pip install timm\n' in card) != converted


@pytest.mark.parametrize('name, cited', [('resnext29_8x64d', False), ('res2next29_6x24d_4s', True)])
def test_the_card_of_a_model_of_this_package_imports_it(run, name, cited):
    model_args = dict(layers=(1, 1, 1))
    metadata = load_weights(run / 'last.safetensors')[1] | dict(model=name, model_args=json.dumps(model_args))
    save_weights(run / 'last.safetensors', timm.create_model(name, **model_args).state_dict(), metadata)
    card = (write_hub_folder(run, REPO, run / 'hub') / 'README.md').read_text()
    assert 'import timm_dense2net' in card and 'pip install .' in card
    assert ('gao2019res2net' in card) == cited and 'starliper' not in card


def test_the_cards_code_runs_as_it_stands(run, tmp_path):
    folder = write_hub_folder(run, REPO, run / 'hub')
    code = re.search(r'```python\n(.*?)```', (folder / 'README.md').read_text(), re.DOTALL)[1]
    assert f"'hf-hub:{REPO}'" in code
    Image.new('RGB', (40, 50), (200, 10, 10)).save(tmp_path / 'image.png')
    code = code.replace(f'hf-hub:{REPO}', f'local-dir:{folder}')
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1])})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5 and all(line.partition(':')[0] in CIFAR100_CLASSES for line in lines)


def test_nothing_of_the_machine_and_no_pickle_is_published(run):
    folder = write_hub_folder(run, REPO, run / 'hub')
    for path in folder.iterdir():
        assert b'somebody' not in path.read_bytes() and path.suffix not in ('.bin', '.pth', '.pt', '.pkl')
    recipe = load_recipe(str(folder / 'recipe.yaml'), build_parser())
    assert recipe['lr'] == 0.2 and recipe['dataset'] == 'hfds/uoft-cs/cifar100' and 'data_dir' not in recipe
    assert json.loads((folder / 'config.json').read_text())[DIGEST_KEY] == sha256_of(folder / 'model.safetensors')


def test_a_run_by_several_processes_is_trained_again_by_as_many(run):
    command = 'train_cifar.py --recipe recipe.yaml'
    assert f'`python {command}`' in (write_hub_folder(run, REPO, run / 'hub') / 'README.md').read_text()
    result = json.loads((run / 'result.json').read_text())
    (run / 'result.json').write_text(json.dumps(result | dict(world_size=2)))
    folder = write_hub_folder(run, REPO, run / 'hub')
    assert f'`torchrun --nproc-per-node 2 {command}`' in (folder / 'README.md').read_text()


@pytest.mark.parametrize('option', ['--pretrained-path', '--initial-checkpoint'])
def test_weights_of_another_run_are_said_to_be_missing(run, option):
    wanted = f'`{option}` says which weights it starts from'
    assert wanted not in (write_hub_folder(run, REPO, run / 'hub') / 'README.md').read_text()
    args = yaml.safe_load((run / 'args.yaml').read_text())
    (run / 'args.yaml').write_text(yaml.safe_dump(args | {option[2:].replace('-', '_'): '/somewhere'}))
    folder = write_hub_folder(run, REPO, run / 'hub')
    card = (folder / 'README.md').read_text()
    assert wanted in card and 'from weights of another run' in card and 'somewhere' not in card


@pytest.mark.parametrize('option, value, told, missing', [
    ('kd_model_name', f'{MODEL}.small_c100', f'with `{MODEL}.small_c100` as its teacher', None),
    ('kd_model_name', 'local-dir:/somewhere', 'with a teacher from another run', '--kd-model-name'),
    ('kd_pretrained_path', '/somewhere', 'with a teacher from another run', '--kd-pretrained-path'),
])
def test_the_teacher_is_told_and_where_it_lay_is_not(run, option, value, told, missing):
    args = yaml.safe_load((run / 'args.yaml').read_text())
    (run / 'args.yaml').write_text(yaml.safe_dump(args | {option: value}))
    folder = write_hub_folder(run, REPO, run / 'hub')
    card = (folder / 'README.md').read_text()
    assert told in card and 'somewhere' not in card
    assert missing is None or f'`{missing}` says which teacher it has' in card
    assert (option in yaml.safe_load((folder / 'recipe.yaml').read_text())) == (missing is None)


@pytest.mark.parametrize('model, told, recipe', [
    ('hf-hub:owner/other', 'the weights of `hf-hub:owner/other`', dict(model='hf-hub:owner/other', pretrained=True)),
    ('local-dir:/somewhere', '`--pretrained-path` says which weights it starts from',
     dict(model=MODEL, pretrained=False, model_kwargs=dict(growth_rate=8), res2net_scale=None)),
])
def test_a_model_on_the_hub_or_in_a_folder_that_a_run_starts_from(run, model, told, recipe):
    args = yaml.safe_load((run / 'args.yaml').read_text())
    (run / 'args.yaml').write_text(yaml.safe_dump(args | dict(model=model, pretrained=True)))
    kwargs = dict(growth_rate=8)  # as the model on the Hub or in the folder says, and no argument does
    metadata = load_weights(run / 'last.safetensors')[1] | dict(model_args=json.dumps(kwargs))
    save_weights(run / 'last.safetensors', timm.create_model(MODEL, **kwargs).state_dict(), metadata)
    folder = write_hub_folder(run, REPO, run / 'hub')
    card = (folder / 'README.md').read_text()
    assert told in card and 'somewhere' not in card
    assert recipe.items() <= yaml.safe_load((folder / 'recipe.yaml').read_text()).items()


def test_packaged_weights_that_a_run_starts_from_are_told(run):
    start = f'{MODEL}.small_c100'
    args = yaml.safe_load((run / 'args.yaml').read_text())
    (run / 'args.yaml').write_text(yaml.safe_dump(args | dict(pretrained_path=start)))
    folder = write_hub_folder(run, REPO, run / 'hub')
    card = (folder / 'README.md').read_text()
    assert f'from the packaged weights `{start}`' in card and 'which weights it starts from' not in card
    assert f'pretrained_path={start}' in card  # what the run was given beyond its recipe
    assert yaml.safe_load((folder / 'recipe.yaml').read_text())['pretrained_path'] == start


@pytest.mark.parametrize('dataset, told, option', [
    ('hfds/somebody/cifar100', 'hfds/uoft-cs/cifar100', None),
    ('hfds/them/birds', 'hfds/them/birds', None),
    ('torch/emnist', 'torch/emnist', '--data-dir'),
    ('hfds/somebody/birds', 'birds', '--dataset'),
    ('/home/somebody/birds', 'birds', '--dataset'),
    ('', 'data', '--dataset'),  # --data-dir /home/somebody/data
    ('folder', 'data', '--dataset'),
    ('.', 'somewhere', '--dataset'),
    ('digits', 'digits', None),
])
def test_data_in_a_folder_is_told_without_its_place(run, monkeypatch, dataset, told, option):
    (run.parent / 'somewhere').mkdir()
    monkeypatch.chdir(run.parent / 'somewhere')
    for name in ('cifar100', 'birds'):
        Path('somebody', name).mkdir(parents=True)
    args = yaml.safe_load((run / 'args.yaml').read_text())
    (run / 'args.yaml').write_text(yaml.safe_dump(args | dict(dataset=dataset)))
    folder = write_hub_folder(run, REPO, run / 'hub')
    assert load_recipe(str(folder / 'recipe.yaml'), build_parser())['dataset'] == told
    left_out = f'; `{option}` says where the data is' if option else ''
    assert f'trains it again{left_out}), the' in (folder / 'README.md').read_text()


def test_data_are_named_as_training_found_them(run):
    weights, metadata = load_weights(run / 'last.safetensors')
    save_weights(run / 'last.safetensors', weights, metadata | dict(dataset='birds'))  # a folder that is gone by now
    args = yaml.safe_load((run / 'args.yaml').read_text())
    (run / 'args.yaml').write_text(yaml.safe_dump(args | dict(dataset='hfds/somebody/birds')))
    folder = write_hub_folder(run, REPO, run / 'hub')
    assert load_recipe(str(folder / 'recipe.yaml'), build_parser())['dataset'] == 'birds'


def test_what_the_run_began_with_is_published(run):
    weights, metadata = load_weights(run / 'last.safetensors')
    first = 'vit_base_patch16_224.mae'  # as far as publishing goes
    save_weights(run / 'last.safetensors', weights, metadata | dict(args=json.dumps(dict(model=first))))
    args = yaml.safe_load((run / 'args.yaml').read_text())
    (run / 'args.yaml').write_text(yaml.safe_dump(args | dict(model=first, pretrained=True, dataset='hfds/them/birds')))
    folder = write_hub_folder(run, REPO, run / 'hub')
    recipe = load_recipe(str(folder / 'recipe.yaml'), build_parser())
    assert (recipe['model'], recipe['dataset']) == (first, 'hfds/them/birds')
    card = (folder / 'README.md').read_text()
    assert yaml.safe_load(card.split('---\n')[1])['license'] == 'cc-by-nc-4.0' and 'weights: cc-by-nc-4.0' in card


def test_altered_local_weights_are_noticed(run):
    from timm_dense2net.trained import load_trained
    folder = write_hub_folder(run, REPO, run / 'hub')
    assert load_trained(f'local-dir:{folder}').class_names == CIFAR100_CLASSES
    data = bytearray((folder / 'model.safetensors').read_bytes())
    data[-1] ^= 1
    (folder / 'model.safetensors').write_bytes(data)
    with pytest.raises(ValueError, match='model.safetensors is not what was published'):
        load_trained(f'local-dir:{folder}')


def test_a_hub_folder_is_replaced_and_nothing_else_is(run, tmp_path, capsys):
    assert main([str(run), '--repo-id', REPO]) == 0
    (run / 'hub' / 'per_class.csv').touch()  # of a run that had one
    assert main([str(run), '--repo-id', REPO]) == 0
    assert not (run / 'hub' / 'per_class.csv').exists()
    (run / 'hub' / '.git').mkdir()
    capsys.readouterr()
    assert main([str(run), '--repo-id', REPO]) == 1
    assert capsys.readouterr().err.startswith(f'error: {run / "hub"} holds .git, which publish does not write')
    assert (run / 'hub' / '.git').is_dir()
    own = tmp_path / 'own'
    own.mkdir()
    (own / 'thesis.tex').touch()
    assert main([str(run), '--repo-id', REPO, '--output', str(own)]) == 1
    assert f'error: {own} is there and no Hub folder' in capsys.readouterr().err
    assert [path.name for path in own.iterdir()] == ['thesis.tex']


@pytest.mark.skipif(sys.platform == 'win32', reason='needs limits of a process')
def test_a_folder_that_cannot_be_written_is_one_error_and_leaves_nothing(run, capsys):
    import resource
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert main([str(run), '--repo-id', REPO]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1 and 'large' in error
    assert not [path.name for path in run.iterdir() if 'hub' in path.name]


def test_runs_that_cannot_be_published_leave_nothing(run, tmp_path, capsys):
    for spoil, message in [
            (lambda: (run / 'last.safetensors').write_bytes(b'torn'), 'not a whole safetensors file'),
            (lambda: (run / 'last.safetensors').unlink(), 'no weights at'),
            (lambda: (run / 'result.json').unlink(), 'the run has not finished'),
            (lambda: shutil.rmtree(run), 'no such folder'),
    ]:
        spoil()
        assert main([str(run), '--repo-id', REPO, '--output', str(tmp_path / 'hub')]) == 1
        err = capsys.readouterr().err
        assert err.startswith(f'error: {run}: ') and message in err and err.count('\n') == 1
        assert not [path for path in tmp_path.iterdir() if 'hub' in path.name]


@pytest.mark.parametrize('repo_id, message', [
    ('net', 'must be OWNER/NAME'), ('a/b/c', 'repo-id'), ('owner/--', 'repo-id'), ('owner/n et', 'repo-id')])
def test_bad_repository_names_are_refused(run, capsys, repo_id, message):
    with pytest.raises(SystemExit) as stop:
        main([str(run), '--repo-id', repo_id])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (run / 'hub').exists()


# The Hub.

def test_a_pushed_run_is_loaded_back_by_name_and_by_the_cfgs_id(hub, run, published, online_worker):
    files = hub.repos[REPO].head[1]
    assert files == {path.name: path.read_bytes() for path in (run / 'hub').iterdir()}
    assert online_worker('create', f'hf-hub:{REPO}')[0] == published
    assert online_worker('load', f'hf-hub:{REPO}')[0] == published
    # A cfg without our config.json: the architecture's own, its weights found by hf_hub_id.
    assert online_worker('create', MODEL, dict(hf_hub_id=REPO))[0] == published


def test_pushing_again_sends_only_what_changed(hub, run, published, online_worker):
    uploads = hub.calls('PUT', '/storage/')
    code, out, err = online_worker('publish', str(run), '--repo-id', REPO, '--push')
    assert code == 0, err
    assert f'pushed: {hub.url}/{REPO}/commit/' in out
    assert hub.calls('PUT', '/storage/') == uploads == 2 and len(hub.repos[REPO].commits) == 1


def test_the_server_speaks_all_that_the_client_asks(hub, published, online_worker):
    online_worker('create', f'hf-hub:{REPO}')
    assert hub.calls('POST', '/api/repos/create') == 1 and hub.calls('POST', '/preupload/') == 1
    assert hub.calls('POST', '/objects/batch') == 1 and hub.calls('POST', '/verify/') == 2
    assert hub.calls('POST', '/commit/') == 1 and hub.calls('HEAD', '/resolve/') >= 2


@pytest.mark.parametrize('fault, message', [
    (('POST', '/create', 'status', 401), 'does not know the token'),
    (('POST', '/create', 'status', 403), 'the token does not allow this (403)'),
    (('POST', '/create', 'status', 429), 'refuses more requests for now (429)'),
    (('POST', '/create', 'status', 500), 'is at fault (500)'),
    (('POST', '/preupload/', 'status', 404), 'no such repository or revision'),
    (('POST', '/preupload/', 'status', 429), 'refuses more requests for now (429)'),
    (('POST', '/objects/batch', 'status', 503), 'is at fault (503)'),
    (('PUT', '/storage/', 'status', 500), 'is at fault (500)'),
    (('PUT', '/storage/', 'drop'), 'the connection to'),
    (('PUT', '/storage/', 'garble'), 'The SHA-256 checksum does not match'),
    (('POST', '/commit/', 'status', 500), 'is at fault (500)'),
    (('POST', '/commit/', 'drop'), 'the connection to'),
    (('POST', '/paths-info/', 'garble'), 'does not hold the model.safetensors that was sent'),
])
def test_faults_of_a_push_are_one_message(hub, run, online_worker, fault, message):
    hub.fail(*fault)
    code, out, err = online_worker('publish', str(run), '--repo-id', REPO, '--push')
    errors = [line for line in err.splitlines() if line.startswith('error: ')]
    assert code == 1 and len(errors) == 1 and message in errors[0] and REPO in errors[0]
    assert 'pushed' not in out
    if '/paths-info/' not in fault[1]:
        assert not hub.repos.get(REPO) or not hub.repos[REPO].commits
    # The folder is whole: once the fault is gone, it goes through.
    assert sha256_of(run / 'hub/model.safetensors') == json.loads((run / 'hub/config.json').read_text())[DIGEST_KEY]
    hub.faults.clear()
    code, out, err = online_worker('publish', str(run), '--repo-id', REPO, '--push')
    assert code == 0 and 'pushed: ' in out, err


@pytest.mark.parametrize('fault', [
    ('PUT', '/storage/', 'status', 500, 1), ('PUT', '/storage/', 'drop', None, 1),
    ('POST', '/preupload/', 'status', 429, 1)])
def test_passing_faults_of_a_push_are_overcome(hub, run, online_worker, fault):
    hub.fail(*fault)
    code, out, err = online_worker('publish', str(run), '--repo-id', REPO, '--push')
    assert code == 0 and 'pushed: ' in out, err


def test_a_push_without_or_with_a_wrong_token_sends_nothing(hub, run, online_worker):
    code, _, err = online_worker('publish', str(run), '--repo-id', REPO, '--push', token=None)
    assert code == 1 and 'error: no token for the Hub: run `hf auth login` or set HF_TOKEN' in err
    assert not hub.log
    code, _, err = online_worker('publish', str(run), '--repo-id', REPO, '--push', token='hf_stranger')
    assert code == 1 and 'does not know the token' in err and not hub.repos


def test_a_push_in_offline_mode_says_so(hub, run, offline_worker):
    code, _, err = offline_worker('publish', str(run), '--repo-id', REPO, '--push')
    assert code == 1 and 'offline mode is on (HF_HUB_OFFLINE)' in err and not hub.log


def test_a_repository_that_is_not_there_or_private_is_named(hub, published, online_worker):
    assert 'no such repository or revision' in online_worker('load', 'hf-hub:owner/none')[0]
    assert '(401)' in online_worker('load', 'hf-hub:owner/none', token=None)[0]
    assert '(404)' in online_worker('load', f'hf-hub:{REPO}@v9')[0]
    hub.repos[REPO].private = True
    assert '(401)' in online_worker('load', f'hf-hub:{REPO}', token=None)[0]
    assert online_worker('load', f'hf-hub:{REPO}')[0] == published


def test_a_repository_without_weights_is_named(hub, published, online_worker):
    del hub.repos[REPO].head[1]['model.safetensors']
    assert 'no such file' in online_worker('load', f'hf-hub:{REPO}')[0]


def cached_blobs(home):
    return [path for path in (home / 'hub').rglob('*') if path.is_file() and path.parent.name == 'blobs']


def test_a_download_that_is_cut_goes_on_where_it_was(hub, published, online_worker):
    hub.fail('GET', '/cdn/', 'cut', 100_000, times=1)
    assert online_worker('load', f'hf-hub:{REPO}')[0] == published
    assert hub.calls('GET', '/cdn/') == 2


def test_a_download_that_stays_cut_leaves_nothing_that_passes_for_good(hub, home, published, online_worker):
    hub.fail('GET', '/cdn/', 'cut', 100_000, times=1)
    hub.fail('GET', '/cdn/', 'drop')
    message = online_worker('load', f'hf-hub:{REPO}')[0]
    assert message.startswith('ValueError: ') and f'the connection to {hub.url} failed' in message
    weights = hub.repos[REPO].head[1]['model.safetensors']
    assert all(blob.stat().st_size < len(weights) for blob in cached_blobs(home))
    hub.faults.clear()
    assert online_worker('load', f'hf-hub:{REPO}')[0] == published


def test_weights_with_a_wrong_checksum_are_refused_and_fetched_anew(hub, published, online_worker):
    hub.fail('GET', '/cdn/', 'garble', times=1)
    message = online_worker('load', f'hf-hub:{REPO}')[0]
    assert 'model.safetensors is not what was published' in message and 'the cached copy was deleted' in message
    assert online_worker('load', f'hf-hub:{REPO}')[0] == published


@pytest.mark.parametrize('action, value, message', [
    ('status', 429, '(429)'), ('status', 500, 'is at fault (500)'), ('status', 503, 'is at fault (503)'),
    ('drop', None, 'the connection to')])
def test_a_hub_that_fails_is_named_and_what_is_cached_still_loads(
        hub, home, published, online_worker, action, value, message):
    hub.fail('HEAD', '/resolve/', action, value)
    assert message in online_worker('load', f'hf-hub:{REPO}')[0]
    assert not cached_blobs(home)
    hub.faults.clear()
    assert online_worker('load', f'hf-hub:{REPO}')[0] == published
    if action == 'status':
        hub.fail('HEAD', '/resolve/', action, value)
        assert online_worker('load', f'hf-hub:{REPO}')[0] == published


def test_offline_mode_uses_the_cache_and_says_where_there_is_none(hub, published, online_worker, offline_worker):
    message = offline_worker('load', f'hf-hub:{REPO}')[0]
    assert f'{REPO} is not in the cache and offline mode is on (HF_HUB_OFFLINE)' in message
    online_worker('load', f'hf-hub:{REPO}')
    hub.log.clear()
    assert offline_worker('load', f'hf-hub:{REPO}')[0] == published
    assert not hub.log
