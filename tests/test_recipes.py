"""Recipes and arguments: the deck's rows as the deck has them, one clear message for what cannot be."""
from pathlib import Path

import pytest
import timm
import yaml

import timm_dense2net  # noqa: F401
from timm_dense2net.deck import DECK
from timm_dense2net.options import build_parser, parse_args
from timm_dense2net.packaged import is_packaged
from timm_dense2net.recipe import list_recipes, load_recipe


def run_error(capsys, *argv):
    from training_runs import run_here
    assert run_here(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1
    return error


def test_packaged_recipes():
    short = (
        'short', 'short_ft', *(f'short_ft{i}' for i in range(2, 8)),
        'short_se', 'short_s2', 'short_s4', 'short_s4_se', 'short_s8', 'short_s8_se',
    )
    sprint = (
        'sprint', 'sprint_s2', 'sprint_s4', 'sprint_s4_c32', 'sprint_s4_c32_ft', 'sprint_s4_se', 'sprint_s8',
        'sprint_s8_se', 'sprint_k12', 'sprint_40_k12',
    )
    assert set(list_recipes()) == {*DECK, 'strong', *sprint, *short, 'merged_s4', 'small', 'small_ft', 'quick', 'nano'}


@pytest.mark.parametrize('name', list_recipes())
def test_recipe_parses_and_names_a_model(name):
    args = parse_args(['--recipe', name])
    assert timm.is_model(args.model) and args.recipe == name
    for key, value in load_recipe(name, build_parser()).items():
        assert getattr(args, key) == value
    assert not args.pretrained or args.model in timm.list_pretrained()
    for path in filter(None, (args.pretrained_path, args.kd_pretrained_path)):  # of another recipe, or packaged
        run = Path(path)
        assert is_packaged(run) or run.parent == Path('output') and run.name in list_recipes()


@pytest.mark.parametrize('name', DECK)
def test_deck_rows(name):
    """SGD, momentum 0.9, weight decay 1e-4, batch 128, 100 epochs, decay on plateau, early stopping."""
    args = parse_args(['--recipe', name])
    assert args.model == DECK[name].model
    assert (args.opt, args.momentum, args.weight_decay, args.batch_size, args.epochs, args.sched) == (
        'momentum', 0.9, 1e-4, 128, 100, 'plateau')
    assert (args.lr, args.decay_rate, args.patience_epochs) == (0.1, 0.1, 10) and args.early_stop_patience > 10
    assert args.aug == (not name.endswith('noaug'))
    assert (args.hflip, args.crop_padding, args.aa, args.mixup, args.cutmix, args.smoothing) == (0.5, 4, '', 0, 0, 0)
    assert (args.cutout_holes, args.cutout_length) == ((1, 8) if name == 'deck_cutout' else (0, 8))


def test_defaults_are_the_decks():
    deck = dict(recipe='deck_dense2net', early_stop_patience=25)
    assert vars(parse_args([])) | deck == vars(parse_args(['--recipe', 'deck_dense2net']))


def test_strong_recipe():
    args = parse_args(['--recipe', 'strong'])
    assert 6e6 < sum(p.numel() for p in timm.create_model(args.model, num_classes=100).parameters()) < 7e6
    assert args.opt == 'sgd' and args.weight_decay == 5e-4 and args.sched == 'cosine' and args.warmup_epochs
    assert args.mixup and args.cutmix and 0 < args.epochs - args.mixup_off_epoch <= 20 and args.aa == 'cifar10'
    assert args.model_ema and args.model_ema_warmup and args.drop_path and args.amp and args.amp_dtype == 'bfloat16'


def test_command_line_overrides_everything():
    args = parse_args(['--recipe', 'strong', '--no-amp', '--lr', '0.2', '--model', 'resnet18', '--aa', '', '--no-aug'])
    assert (args.amp, args.lr, args.model, args.aa, args.aug) == (False, 0.2, 'resnet18', '', False)
    assert parse_args(['--recipe', 'deck_densenet_noaug', '--aug']).aug


def test_own_recipe_file(tmp_path):
    path = tmp_path / 'mine.yaml'
    path.write_text('lr: 1e-3\nmodel_kwargs: {growth_rate: 8}\ndecay_milestones: [3, 4]\nclip_grad: null\namp: true\n')
    args = parse_args(['--recipe', str(path)])
    assert (args.lr, args.model_kwargs, args.decay_milestones) == (1e-3, {'growth_rate': 8}, [3, 4])
    assert args.clip_grad is None and args.amp


@pytest.mark.parametrize('text, words', [
    ('lrr: 1', ["unknown key 'lrr'", 'did you mean lr?']),
    ('lr: fast', ['lr must be a number', "'fast'"]),
    ('epochs: 1.5', ['epochs must be a whole number', '1.5']),
    ('epochs: true', ['epochs must be a whole number', 'True']),
    ('amp: 1', ['amp must be true or false', '1']),
    ('amp_dtype: float8', ['amp_dtype', "'bfloat16', 'float16'", 'float8']),
    ('decay_milestones: 3', ['decay_milestones must be a list', '3']),
    ('model_kwargs: [a]', ['model_kwargs must be a mapping']),
    ('epochs:', ['epochs has no value']),
    ('experiment: run', ["'experiment' is no part of how a run is made", '--experiment']),
    ('resume: output/run', ["unknown key 'resume'"]),
    ('- lr', ['a mapping']),
    ('lr: [', ['not YAML']),
    ('epochs: 0', ['--epochs must be at least 1, got 0']),
])
def test_bad_recipe_is_one_message(tmp_path, capsys, text, words):
    path = tmp_path / 'bad.yaml'
    path.write_text(text)
    error = run_error(capsys, '--recipe', path)
    assert all(word in error for word in words), error


def test_unknown_recipe_lists_those_there_are(capsys):
    error = run_error(capsys, '--recipe', 'stong')
    assert "'stong'" in error and all(name in error for name in list_recipes())


@pytest.mark.parametrize('argv, words', [
    (['--sched', 'plateau', '--warmup-epochs', '3'], ['plateau', '--warmup-epochs']),
    (['--sched', 'plateau', '--sched-on-updates'], ['plateau', '--sched-on-updates']),
    (['--sched', 'cosine', '--warmup-epochs', '5', '--epochs', '5'], ['--warmup-epochs 5', '--epochs 5']),
    (['--eval-only'], ['--eval-only', '--checkpoint', '--pretrained']),
    (['--eval-only', '--checkpoint', 'x', '--recipe', 'small_ft'], ['--eval-only', 'either', '--no-pretrained']),
    (['--opt', 'adamw', '--opt-betas', '0.9', '1.5'], ['--opt-betas', 'in [0, 1)', '1.5']),
    (['--eval-only', '--pretrained', '--resume', 'x'], ['--resume']),
    (['--eval-only', '--pretrained', '--res2net-scale', '4'], ['--eval-only', '--res2net-scale', 'without weights']),
    (['--eval-only', '--checkpoint', 'x', '--initial-checkpoint', 'y'], ['--initial-checkpoint', '--checkpoint']),
    (['--eval-only', '--checkpoint', 'x', '--recipe', 'short_s8_se'], ['--pretrained-path', 'ARCH.TAG', 'recipe']),
    (['--checkpoint', 'x'], ['--checkpoint', '--eval-only']),
    (['--pretrained', '--initial-checkpoint', 'x'], ['--pretrained', '--initial-checkpoint']),
    (['--sync-bn'], ['--sync-bn', 'torchrun']),
    (['--resume', 'auto'], ['--resume auto', '--experiment']),
    (['--resume', '.'], ['--resume .: no run is there', 'args.yaml is missing']),
    (['--model', 'resnet18', '--drop-path', '1.5'], ['--drop-path must be in [0, 1)', 'got 1.5']),
    (['--smoothing', '1'], ['--smoothing', '1.0']),
    (['--batch-size', '0'], ['--batch-size must be at least 1, got 0']),
    (['--lr', '-1'], ['--lr must be at least 0, got -1']),
    (['--sched', 'cosin'], ['cosin', 'cosine']),
    (['--opt', 'sdg'], ['sdg', 'sgd']),
    (['--torchcompile', 'inductr'], ['inductr', 'inductor']),
    (['--cuda-graph', '--grad-accum-steps', '2'], ['--cuda-graph', '--grad-accum-steps must be 1, got 2']),
    (['--cuda-graph', '--grad-checkpointing'], ['--cuda-graph', '--grad-checkpointing']),
    (['--cuda-graph', '--amp', '--amp-dtype', 'float16'], ['--cuda-graph', 'float16', 'bfloat16']),
    (['--model-kwargs', 'scale=None'], ['--model-kwargs', 'scale=None', '--model']),
    (['--dataset', 'flowers\udcff'], ['--dataset', r"'flowers\udcff' is not UTF-8"]),
    (['--mean', '0.5', '--std', '0'], ['--std', '0']),
    (['--initial-img-size', '18', '--full-size-epoch', '2'], ['--initial-img-size must be a multiple of 4', 'got 18']),
    (['--initial-img-size', '16'], ['--initial-img-size', '--full-size-epoch', 'both']),
])
def test_what_cannot_be_is_said_at_the_start(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    error = run_error(capsys, *argv)
    assert all(word in error for word in words), error
    assert not list(tmp_path.iterdir())


def test_sync_bn_on_a_cpu(monkeypatch, capsys):
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert '--sync-bn works between GPUs only' in run_error(capsys, '--sync-bn', '--device', 'cpu')


@pytest.mark.parametrize('package, flag', [('wandb', '--log-wandb'), ('tensorboard', '--log-tensorboard')])
def test_missing_logger_is_said_at_the_start(monkeypatch, capsys, package, flag):
    import sys
    monkeypatch.setitem(sys.modules, package, None)
    assert f'{package} is not installed' in run_error(capsys, flag)


def test_names_are_those_of_timm():
    """Flags of timm's train.py (1.0.31)."""
    flags = {option for action in build_parser()._actions for option in action.option_strings}
    assert flags >= {
        '--model', '--model-kwargs', '--dataset', '-d', '--data-dir', '--dataset-download', '--num-classes',
        '--pretrained', '--initial-checkpoint', '--epochs', '--batch-size', '-b', '--validation-batch-size', '-vb',
        '--lr', '--opt',
        '--momentum', '--weight-decay', '--sched', '--sched-on-updates', '--warmup-epochs', '--warmup-lr', '--min-lr',
        '--patience-epochs', '--decay-rate', '--decay-epochs', '--decay-milestones', '--cooldown-epochs', '--drop',
        '--drop-path', '--smoothing', '--mixup', '--cutmix', '--mixup-prob', '--mixup-switch-prob', '--mixup-off-epoch',
        '--aa', '--hflip', '--no-aug', '--model-ema', '--model-ema-decay', '--model-ema-warmup', '--amp', '--amp-dtype',
        '--grad-accum-steps', '--clip-grad', '--clip-mode', '--channels-last', '--torchcompile', '--layer-decay',
        '--output', '--experiment', '--resume', '--seed', '--log-interval', '--log-wandb', '--device', '--workers',
        '-j', '--sync-bn', '--dist-bn', '--mean', '--std', '--img-size', '--input-key', '--target-key'}


def test_saved_arguments_are_a_recipe(tmp_path):
    """args.yaml of a run can be given as a recipe for another."""
    from timm_dense2net.options import saved_args
    args = parse_args(['--recipe', 'nano', '--lr', '0.3', '--model-kwargs', 'growth_rate=8', '--experiment', 'first'])
    path = tmp_path / 'args.yaml'
    path.write_text(yaml.safe_dump(saved_args(args)))
    again = parse_args(['--recipe', str(path)])
    assert {**vars(again), 'recipe': 'nano', 'experiment': 'first'} == vars(args) and again.experiment is None


def test_files_that_are_no_text_are_named(tmp_path, capsys):
    (tmp_path / 'args.yaml').write_bytes(b'\xff\xfe\x00')
    for option in (['--recipe', tmp_path / 'args.yaml'], ['--resume', tmp_path]):
        assert f'{tmp_path / "args.yaml"} is not a text file' in run_error(capsys, *option)
