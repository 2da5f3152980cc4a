"""Every command and every Python block of the pages runs, in small; those that cannot are listed with the reason.

A page's commands run in their order in one folder, as a reader would run them. What they name is there: a run,
pictures, an image folder. Values that would take hours or a network are replaced by small ones.
"""
import contextlib
import functools
import io
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import timm
import torch
from test_fine_tuning import write_folder
from training_runs import run_here

from timm_dense2net import figures
from timm_dense2net.__main__ import main
from timm_dense2net.checkpoint import save_weights
from timm_dense2net.options import build_parser, parse_args

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')), ROOT / 'benchmarks' / 'README.md']

# Replaces the data and the model of a training command, and its length. In float32, as torch 2.14 gives gradients from
# memory never written for a 3x3 convolution of stride 2 on a 1x1 map in bfloat16 on CPUs that have it.
SMALL = [
    '--dataset', 'digits', '--img-size', '8', '--model', 'test_resnet', '--model-kwargs', '--drop-path', '0',
    '--epochs', '1', '--warmup-epochs', '0', '--mixup-off-epoch', '0', '-b', '256', '--device', 'cpu', '--no-amp']

# Pattern of a command -> why it does not run here. What is true of the command as it stands is still checked.
NOT_RUN = {
    r'pip install ': 'the tests run in an environment that has it; the extras it names are checked',
    r'python -m pytest': 'it is what runs this',
    r'torchrun .*train_cifar\.py ': 'test_distributed.py starts torchrun; its arguments are parsed',
    r'python train\.py |(python|torchrun .*) -m timm_dense2net (train|validate|bulk_runner)\.py ':
        "timm's scripts are not in its wheel; the model it names is looked up, test_entry_points.py runs such scripts, "
        "and test_fine_tuning.py timm's own where TIMM_TRAIN_SCRIPT is set",
    r'python benchmarks/': 'it measures the machine for minutes; its options are parsed',
    r'python -m timm_dense2net demo': 'it serves until it is stopped, test_demo.py opens it; its options are parsed',
    r'python -m timm_dense2net publish .* --push': 'it needs the Hub, test_publish.py stands one in',
    r'python -m timm_dense2net search ': 'test_search.py runs it; its options are parsed',
    r'python -m timm_dense2net package ': 'it changes the package, test_packaged.py runs it on a copy',
}

# What commands name -> what is there in small, in commands that run.
COMMAND_VALUES = [
    ('torch/cifar100 --data-dir data', 'digits --img-size 16'),
    ('evaluate --model dense2net40_k12_s4 --pretrained', 'evaluate --checkpoint output/RUN'),
    ('--model dense2net40_k12_s4 --format torch-export', '--checkpoint output/RUN --format torch-export'),
    ('enlarge output/RUN', 'enlarge enlarged.safetensors'),
    ('--experiment RUN --resume auto', '--experiment NEW --resume auto'),
    ('report output/*', 'report output/RUN'),
    ('--kd-model-name dense2net121_s8', '--kd-pretrained-path output/RUN'),
    ('--pretrained-path output/RUN', '--pretrained-path output/RUN --model-kwargs block_config=(1,1,1)'),
]

# The same in Python blocks.
PYTHON_VALUES = [
    ("'path/to/checkout'", f"'{ROOT}'"),
    ("'hfds/uoft-cs/cifar100'", "'digits'"),
    ("device='cuda'", "device='cpu'"),
    ('range(300)', 'range(1)'),
    ("'resnet50'", "'resnet18'"),
    ("'--recipe', 'nano', '--experiment', 'mine'", f"*{SMALL}, '--experiment', 'mine'"),
    ("'hf-hub:OWNER/NAME'", "'local-dir:output/RUN/hub'"),
    ("hf_hub_id='OWNER/NAME'", "file='output/RUN/hub/model.safetensors', num_classes=10"),
    ("'dense2net121_s8', pretrained=True, pretrained_cfg_overlay", (
        "'dense2net40_k12_s4', block_config=(1, 1, 1), pretrained=True, pretrained_cfg_overlay")),
    ("build_demo().launch(max_file_size='64mb')", 'build_demo()'),
]


def blocks(page):
    """Language and text of a page's fenced blocks; those without a language hold commands too."""
    return re.findall(r'^```(\w*)\n(.*?)^```$', page.read_text(), re.S | re.M)


def commands(text):
    """The commands of a block, without comments, a command a line."""
    lines = (re.sub(r'(^|\s)#.*', '', line).strip() for line in text.replace('\\\n', ' ').splitlines())
    return [' '.join(line.split()) for line in lines if line]


def replaced(text, values):
    for old, new in values:
        text = text.replace(old, new)
    return text


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """What the pages' commands find where they are run."""
    folder = tmp_path_factory.mktemp('reader')
    write_folder(folder / 'flowers', ('cross', 'disc', 'frame', 'ring', 'up'), 4, 2, (48, 40), seed=0)
    picture = (folder / 'flowers' / 'train' / 'disc' / '0.png').read_bytes()
    for name in ('cat.jpg', 'pictures/1.png', 'more/and/more/2.png'):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture)
    (folder / 'results').mkdir()
    for name in ('README.md', 'results/results.csv'):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    torch.manual_seed(0)
    state_dict = timm.create_model('dense2net121_s4', num_classes=10).state_dict()
    save_weights(folder / 'enlarged.safetensors', state_dict, dict(model='dense2net121_s4', num_classes='10'))
    assert run_here([
        *SMALL, '--img-size', '16', '--model', 'dense2net40_k12_s4', '--model-kwargs', 'block_config=(1,1,1)',
        '--output', folder / 'output', '--experiment', 'RUN']) == 0
    return folder


def check_as_it_stands(command):
    """What can be checked of a command that is not run."""
    words = shlex.split(replaced(command, COMMAND_VALUES))
    if 'install' in words:
        known = re.findall(r'^(\w+) = \[', (ROOT / 'pyproject.toml').read_text(), re.M)
        assert set(re.findall(r'\w+', ''.join(re.findall(r'\[(.*?)\]', command)))) <= set(known), command
    elif 'train_cifar.py' in command:
        parse_args(words[words.index('train_cifar.py') + 1:])
    elif 'train.py' in command or 'validate.py' in command:
        assert timm.is_model(words[words.index('--model') + 1]), command
    elif 'bulk_runner.py' in command:
        assert timm.list_models(words[words.index('--model-list') + 1]), command
    elif 'benchmarks/' in command:
        check_options(words, help_of_script(words[1]))
    elif 'timm_dense2net' in command:
        # What search does not know it hands on to a training run.
        more = build_parser().format_help() if words[3] == 'search' else ''
        check_options(words, help_of(words[3]) + more)


def help_of(command):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
        main([command, '--help'])
    return out.getvalue()


@functools.lru_cache(maxsize=None)
def help_of_script(path):
    return subprocess.run([sys.executable, str(ROOT / path), '--help'], capture_output=True, text=True).stdout


def check_options(words, help_text):
    unknown = {word for word in words if word.startswith('--')} - set(re.findall(r'--[\w-]+', help_text))
    assert not unknown, f'{" ".join(words)}: no option {unknown}'


def run_command(command, monkeypatch):
    """Runs a command in this process, where it can; returns its exit code."""
    if ' | ' in command and 'timm_dense2net' in command:
        left, command = command.split(' | ')
        data = subprocess.run(left, shell=True, capture_output=True, check=True).stdout
        monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(data)))
    words = shlex.split(replaced(command, COMMAND_VALUES))
    if words[:2] == ['python', 'train_cifar.py']:
        # Drawing takes most of a tiny run's time, and a run does without it where matplotlib is missing.
        with monkeypatch.context() as patch:
            patch.setattr(figures, 'has_matplotlib', lambda: False)
            return run_training(words[2:])
    if words[:3] == ['python', '-m', 'timm_dense2net']:
        return main(words[3:])
    if command.startswith('echo '):
        digest = subprocess.run(['sha256sum', 'dense2net.pt2'], capture_output=True, text=True).stdout.split()[0]
        return subprocess.run(command, shell=True, env=dict(os.environ, SHA256=digest)).returncode
    pytest.fail(f'"{command}" is neither run here nor in NOT_RUN')


def run_training(words):
    if '--eval-only' in words:
        return run_here([*words, '--dataset', 'digits', '--img-size', '16', '--device', 'cpu'])
    if '--resume' in words and 'auto' not in words:
        return run_here([*words, '--epochs', '2'])
    name = f'run{len(list(Path("output").iterdir()))}'
    small = ['--epochs', '1', '--device', 'cpu'] if 'flowers' in words else SMALL
    if parse_args(words).initial_img_size:  # parsed before its values are made small
        small = [*small, '--initial-img-size', '4', '--full-size-epoch', '2']
    return run_here([*words, *small, '--experiment', name])


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page, folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    module = types.ModuleType(f'docs_{page.stem}')
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec('import torch', module.__dict__)
    for language, text in blocks(page):
        if language == 'python':
            if 'build_demo' in text:
                pytest.importorskip('gradio')
            exec(compile(replaced(text, PYTHON_VALUES), str(page), 'exec'), module.__dict__)
        elif language in ('', 'bash'):
            for command in commands(text):
                if any(re.match(pattern, command) for pattern in NOT_RUN):
                    check_as_it_stands(command)
                else:
                    code = run_command(command, monkeypatch)
                    assert code == 0, f'{command}\nends with {code}\n{capfd.readouterr().err[-2000:]}'


def test_every_listed_reason_is_needed():
    every = [command for page in PAGES for language, text in blocks(page) if language != 'python'
             for command in commands(text)]
    assert not [pattern for pattern in NOT_RUN if not any(re.match(pattern, command) for command in every)]
    assert not [old for old, _ in COMMAND_VALUES if not any(old in command for command in every)]
    python = ''.join(text for page in PAGES for language, text in blocks(page) if language == 'python')
    assert not [old for old, _ in PYTHON_VALUES if old not in python]


def test_the_pages_variant_is_a_model(monkeypatch):
    text = next(text for _, text in blocks(ROOT / 'docs' / 'models.md') if '@register_model' in text)
    module = types.ModuleType('docs_variant')
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(text, module.__dict__)
    model = timm.create_model('dense2net58_k24_s4', num_classes=3)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3) and model.pretrained_cfg['input_size'] == (3, 32, 32)
