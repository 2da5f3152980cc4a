"""Knowledge distillation: timm's loss, whole runs with a teacher, and weights of more splits as a start."""
import json
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn as nn
from timm.loss import LabelSmoothingCrossEntropy
from timm.task import LogitDistillationTask
from training_runs import arguments, assert_same_run, finish, run_here, start

from timm_dense2net.build import RunData, build_distillation
from timm_dense2net.checkpoint import load_weights, save_weights
from timm_dense2net.cifar import CIFAR100_CLASSES
from timm_dense2net.dense2net import SplitHierarchyConv2d
from timm_dense2net.distillation import Distillation, loss_weights
from timm_dense2net.engine import TrainStep
from timm_dense2net.fused import FusedFeatures
from timm_dense2net.options import parse_args
from timm_dense2net.start import pretrained_overlay

STATS, TEACHER_STATS = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))


def small_resnet(mean, std):
    """A small net of 10 classes with random weights, its images normalised by mean and std."""
    return timm.create_model('test_resnet', num_classes=10, pretrained_cfg_overlay=dict(mean=mean, std=std)).eval()


@pytest.mark.parametrize('teacher_stats', [STATS, TEACHER_STATS])
@pytest.mark.parametrize('distill, task', [(None, None), (None, 0.3), (0.7, None), (0.6, 0.2)])
def test_loss_is_that_of_timms_task(teacher_stats, distill, task):
    torch.manual_seed(0)
    student, teacher = small_resnet(*STATS), small_resnet(*teacher_stats)
    images, targets = torch.randn(6, 3, 16, 16), torch.randint(10, (6,))
    criterion = LabelSmoothingCrossEntropy(0.1)
    reference = LogitDistillationTask(
        student, teacher, criterion, distill_loss_weight=distill, task_loss_weight=task, temperature=3., verbose=False)
    expected = reference(images, targets)['loss']
    wanted = torch.autograd.grad(expected, list(student.parameters()))
    distillation = Distillation(teacher, STATS, teacher_stats, 3., *loss_weights(distill, task))
    logits = student(images)
    loss = distillation(criterion(logits, targets), logits, images)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, list(student.parameters())), wanted)


def test_loss_by_hand_in_float64():
    """The formula: the labels' loss, and the temperature's square times the mean divergence from the teacher."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).double()
    images, logits = torch.randn(4, 3, 2, 2, dtype=torch.double), torch.randn(4, 5, dtype=torch.double)
    distillation = Distillation(teacher, STATS, STATS, 2., 0.8, 0.2).double()
    p, q = (teacher(images) / 2).softmax(1), (logits / 2).softmax(1)
    expected = 0.2 * 1.5 + 0.8 * 4 * (p * (p / q).log()).sum() / 4
    got = distillation(torch.tensor(1.5, dtype=torch.double), logits, images)
    torch.testing.assert_close(got.double(), expected.detach(), rtol=1e-6, atol=0)


def test_a_teacher_alone_is_learned_from():
    """Without weight on the labels a student comes to answer as its teacher does, and the teacher stays as it is."""
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(12, 5)) for _ in range(2))
    before = [p.clone() for p in teacher.parameters()]
    step = TrainStep(
        student, nn.CrossEntropyLoss(), torch.optim.Adam(student.parameters(), 0.05),
        distillation=Distillation(teacher.requires_grad_(False), STATS, STATS, 1., 1., 0.))
    images = torch.randn(256, 3, 2, 2)
    for _ in range(200):
        step([(images, torch.zeros(256, dtype=torch.long))])
    agree = (student(images).argmax(1) == teacher(images).argmax(1)).float().mean()
    assert agree > 0.97
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters()))


@pytest.fixture(scope='module')
def taught(tmp_path_factory):
    """Folder with a teacher's run and a student's, its images normalised by other figures."""
    folder = tmp_path_factory.mktemp('taught')
    assert finish(start(arguments(folder, '--epochs', '1', name='teacher'), folder / 'teacher.log')) == 0
    assert finish(start(student(folder, 'student'), folder / 'student.log')) == 0, (folder / 'student.log').read_text()
    return folder


def student(folder, name, *more):
    return arguments(
        folder, '--kd-pretrained-path', folder / 'teacher', '--task-loss-weight', '0.2', '--kd-temperature', '2',
        '--mean', '0.4', '--std', '0.5', '--epochs', '2', *more, name=name)


def test_run_with_a_teacher_resumes_exactly(taught):
    assert finish(start(student(taught, 'resumed', '--epochs', '1'), taught / 'resumed.log')) == 0
    assert finish(start(['--resume', str(taught / 'resumed'), '--epochs', '2'], taught / 'resumed.log')) == 0
    assert_same_run(taught / 'student', taught / 'resumed')


def test_teacher_counts(taught):
    """The loss of its first epoch is not that without it; where the teacher lay is not told."""
    assert finish(start(student(taught, 'labels', '--task-loss-weight', '1'), taught / 'labels.log')) == 0
    rows = [(taught / name / 'summary.csv').read_text().splitlines()[1] for name in ('student', 'labels')]
    assert rows[0].split(',')[1] != rows[1].split(',')[1]
    metadata = load_weights(taught / 'student' / 'last.safetensors')[1]
    assert json.loads(metadata['args'])['task_loss_weight'] == 0.2
    for text in (json.dumps(metadata), (taught / 'student' / 'result.json').read_text()):
        assert str(taught) not in text


def test_teacher_of_packaged_weights_is_in_its_form_for_inference():
    """And sees images as it was trained on them, whatever the student's are normalised by."""
    args = parse_args(['--kd-model-name', 'dense2net40_k12_s4.small_c100'])
    train = SimpleNamespace(num_classes=100, class_names=CIFAR100_CLASSES, image_shape=(3, 32, 32))
    data = RunData(train, train, train, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    distillation = build_distillation(args, data, torch.device('cpu'))
    assert not distillation.teacher.training and not any(p.requires_grad for p in distillation.parameters())
    assert any(isinstance(module, FusedFeatures) for module in distillation.teacher.modules())
    model = timm.create_model('dense2net40_k12_s4.small_c100', pretrained=True).eval()
    pixels = torch.rand(4, 3, 32, 32)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    with torch.no_grad():
        wanted = model((pixels - mean) / std)
        images = (pixels - 0.5) / 0.25
        got = distillation.teacher(torch.addcmul(distillation.shift, images, distillation.scale))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('more, words', [
    (['--kd-model-name', 'dense2net9'], ['--kd-model-name', "'dense2net9'"]),
    (['--kd-model-name', 'dense2net121_s8', '--kd-pretrained-path', 'x'], ['--kd-model-name', '--kd-pretrained-path']),
    (['--kd-model-name', 'dense2net169_s8'], ['No pretrained weights exist for dense2net169_s8']),
    (['--kd-model-name', 'dense2net40_k12_s4'], ['dense2net40_k12_s4 has 100 classes, the data 10']),
    (['--kd-pretrained-path', 'nowhere'], ['--kd-pretrained-path', 'nowhere']),
    (['--kd-model-name', 'test_resnet', '--kd-temperature', '0'], ['--kd-temperature', 'above 0', '0']),
    (['--kd-model-name', 'test_resnet', '--distill-loss-weight', '-1'], ['--distill-loss-weight', 'at least 0']),
    (['--kd-model-name', 'test_resnet', '--task-loss-weight', '1.5'], ['--task-loss-weight', 'at most 1', '1.5']),
    (['--task-loss-weight', '0.5'], ['--task-loss-weight', '--kd-model-name']),
])
def test_mistakes_are_one_message(tmp_path, monkeypatch, capsys, more, words):
    monkeypatch.chdir(tmp_path)
    assert run_here(arguments('output', *more)) in (1, 2)
    error = capsys.readouterr().err
    assert error.count('error: ') == 1 and 'Traceback' not in error
    assert all(word in error for word in words), error
    assert not (tmp_path / 'output').exists()


@pytest.mark.parametrize('cardinality', [1, 4])
def test_weights_of_more_splits_start_a_net_of_fewer(tmp_path, cardinality):
    """A convolution of the new hierarchy does what those of its splits did, norm and activation too."""
    torch.manual_seed(0)
    small = dict(block_config=(1, 2), num_classes=10, cardinality=cardinality)
    source = timm.create_model('dense2net121_s8', **small).train()
    source(torch.randn(8, 3, 16, 16))  # running statistics of its own
    file = tmp_path / 'source.safetensors'
    save_weights(file, source.state_dict(), {})
    target = timm.create_model('dense2net121_s4', **small)
    overlay = pretrained_overlay(file, target, [str(i) for i in range(10)])
    target = timm.create_model('dense2net121_s4', pretrained=True, pretrained_cfg_overlay=overlay, **small).eval()
    source.eval()
    layers = [module for module in target.modules() if isinstance(module, SplitHierarchyConv2d)]
    sources = [module for module in source.modules() if isinstance(module, SplitHierarchyConv2d)]
    assert len(layers) == len(sources) == 3
    for new, old in zip(layers, sources):
        for i in range(3):
            x = torch.randn(2, 32, 8, 8)
            got = new.norms[i](new.convs[i](x))
            halves = [old.norms[j](old.convs[j](half)) for j, half in zip((2 * i + 1, 2 * i + 2), x.split(16, 1))]
            torch.testing.assert_close(got, torch.cat(halves, 1))
    own, others = target.state_dict(), source.state_dict()
    assert all(torch.equal(own[name], others[name]) for name in own if '.conv2.' not in name)


@pytest.mark.parametrize('before', [1, 4])
def test_weights_of_fewer_groups_start_a_net_of_more(tmp_path, caplog, before):
    """A convolution of the new hierarchy does to each of its groups what the old one did to it alone."""
    small = dict(block_config=(1, 2), num_classes=10)
    source = timm.create_model('dense2net121_s4', cardinality=before, **small).eval()
    file = tmp_path / 'source.safetensors'
    save_weights(file, source.state_dict(), {})
    target = timm.create_model('dense2net121_s4', cardinality=16, **small)
    with caplog.at_level('INFO'):
        overlay = pretrained_overlay(file, target, [str(i) for i in range(10)])
    assert f'{file}: of fewer groups than the model' in caplog.text and 'side by side' not in caplog.text
    target = timm.create_model(
        'dense2net121_s4', cardinality=16, pretrained=True, pretrained_cfg_overlay=overlay, **small).eval()
    pairs = [
        (new, old) for new, old in zip(target.modules(), source.modules()) if isinstance(new, SplitHierarchyConv2d)]
    assert len(pairs) == 3
    x = torch.randn(2, 32, 8, 8)
    for new, old in pairs:
        for new_conv, old_conv in zip(new.convs, old.convs, strict=True):
            assert new_conv.groups == 16
            got = new_conv(x)
            for first in range(0, 32, 2):
                alone = torch.zeros_like(x)
                alone[:, first:first + 2] = x[:, first:first + 2]
                torch.testing.assert_close(got[:, first:first + 2], old_conv(alone)[:, first:first + 2])
    own, others = target.state_dict(), source.state_dict()
    assert all(torch.equal(own[name], others[name]) for name in own if '.convs.' not in name)


@pytest.mark.parametrize('model_args', [dict(growth_rate=24), dict(cardinality=32)])
def test_splits_that_do_not_go_together_stay_apart(tmp_path, model_args):
    file = tmp_path / 'source.safetensors'
    save_weights(file, timm.create_model('dense2net121_s8', block_config=(1,)).state_dict(), dict(model='net'))
    target = timm.create_model('dense2net121_s4', block_config=(1,), **model_args)
    with pytest.raises(ValueError, match='holds weights of net and does not fit .*convs.3.weight'):
        pretrained_overlay(file, target, [str(i) for i in range(100)])
