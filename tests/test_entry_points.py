"""The ways in: torch.hub, scripts run with the models registered, the package's commands."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm

import timm_dense2net
from timm_dense2net.__main__ import COMMANDS, main

ROOT = Path(__file__).parent.parent
SCRIPT = '''
import os, sys
import helper
import timm
model = timm.create_model(sys.argv[1], num_classes=helper.NUM_CLASSES)
print(__name__, type(model).__name__, model.num_classes, sys.argv[1:], os.environ.get('RANK'))
'''


@pytest.fixture
def script(tmp_path):
    """A script as timm's are: it imports a module beside itself and knows nothing of this package."""
    (tmp_path / 'helper.py').write_text('NUM_CLASSES = 7\n')
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT)
    return path


def run(*args, cwd, **kwargs):
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, **kwargs)


def test_hub_lists_our_models_only():
    module = {}
    exec((ROOT / 'hubconf.py').read_text(), module)
    public = [k for k, v in module.items() if callable(v) and not k.startswith('_')]  # as torch.hub.list does
    assert sorted(public) == sorted(timm.list_models(module='dense2net'))


def test_hub_loads_from_a_checkout(tmp_path):
    code = (
        f'import torch; m = torch.hub.load({str(ROOT)!r}, "dense2net40_k12_s4", source="local", num_classes=7); '
        'print(type(m).__name__, m.num_classes)')
    result = run('-c', code, cwd=tmp_path)
    assert result.stdout.split() == ['Dense2Net', '7'], result.stderr


def test_hub_names_missing_packages(tmp_path):
    code = (
        'import importlib.util as u; find = u.find_spec\n'
        'u.find_spec = lambda name, *a: None if name in ("timm", "safetensors") else find(name, *a)\n'
        f'import torch; torch.hub.load({str(ROOT)!r}, "dense2net40_k12_s4", source="local")')
    result = run('-c', code, cwd=tmp_path)
    assert result.returncode
    assert 'missing packages: timm, safetensors' in result.stderr


def test_runs_a_script_with_the_models(script, tmp_path):
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    result = run('-m', 'timm_dense2net', script, 'dense2net40_k12_s4', '--flag', cwd=elsewhere)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ['__main__', 'Dense2Net', '7', "['dense2net40_k12_s4',", "'--flag']", 'None']


def test_runs_a_script_under_torchrun(script, tmp_path):
    result = run(
        '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2, '-m', 'timm_dense2net', script,
        'dense2net40_k12_s4', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(line.split()[-1] for line in result.stdout.splitlines() if 'Dense2Net' in line) == ['0', '1']


def test_import_registers_for_a_device_module(tmp_path):
    """timm's train.py imports the modules that --device-modules names, by importlib."""
    code = (
        'import importlib, timm; assert not timm.is_model("dense2net121_s8"); '
        'importlib.import_module("timm_dense2net"); assert timm.is_model("dense2net121_s8")')
    result = run('-c', code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_names_an_unknown_command(capsys):
    assert main(['no_such_script.py']) == 2
    assert "'no_such_script.py' is neither a command nor a script" in capsys.readouterr().err
    assert main([]) == 2
    assert main(['--help']) == 0
    usage = capsys.readouterr().out
    assert all(name in usage for name in COMMANDS)


def test_tells_its_version(capsys):
    assert main(['--version']) == 0
    assert capsys.readouterr().out == f'timm_dense2net {timm_dense2net.__version__}\n'


@pytest.mark.parametrize('command', COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as info:
        main([command, '--help'])
    assert info.value.code == 0
    assert f'timm_dense2net {command}' in capsys.readouterr().out


@pytest.mark.parametrize('argv, words', [
    (['demo', '--port', '70000'], ['--port must be from 1 to 65535', '70000']),
    (['demo', '--host', 'no host'], ['--host no host: no such address']),
    (['export', '--model', 'resnet18', '--output', 'no/x.onnx'], ['no/x.onnx: there is no folder no']),
    (['export', '--model', 'resnet18', '--output', '.'], ['--output', 'is a folder']),
    (['report', 'run', '--output', __file__], [f'--output {__file__} is a file: name a folder']),
    (['convert', 'resnet18', '--num-classes', '-3'], ['--num-classes must be at least 0', '-3']),
    (['evaluate', '--model', 'resnet18', '--pretrained', '--dataset', 'digits', '--img-size', '0'],
     ['--img-size must be at least 1', '0']),
])
def test_bad_values_of_commands(argv, words, capsys):
    with pytest.raises(SystemExit) as e:
        main(argv)
    error = capsys.readouterr().err
    assert e.value.code == 2 and all(word in error for word in words)


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr('timm_dense2net.listing.main', interrupted)
    assert main(['models']) == 130
    assert capsys.readouterr().err == 'interrupted\n'


def test_a_package_that_a_command_lacks_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'optuna', None)
    monkeypatch.delitem(sys.modules, 'timm_dense2net.search', raising=False)
    assert main(['search', '--help']) == 2
    assert capsys.readouterr().err == "error: the search needs Optuna: pip install -e '.[search]'\n"


@pytest.mark.skipif(os.name != 'posix', reason='needs pipes that break')
def test_a_reader_may_have_enough_and_a_disk_be_full():
    command = [sys.executable, '-m', 'timm_dense2net', 'models', '--module', 'dense2net']
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, 'wb') as pipe:
        broken = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert (broken.returncode, broken.stderr) == (1, '')
    if os.path.exists('/dev/full'):
        with open('/dev/full', 'wb') as disk:
            full = subprocess.run(command, stdout=disk, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        assert full.returncode == 1 and full.stderr.splitlines() == ['error: [Errno 28] No space left on device']
