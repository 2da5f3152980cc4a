"""Curves, the final report of a classifier, and calibration."""
import argparse
import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.utils import update_summary

from timm_dense2net import curves
from timm_dense2net.calibration import expected_calibration_error, fit_temperature
from timm_dense2net.cifar import CIFAR100_CLASSES, CIFAR100_SUPERCLASS_OF, CIFAR100_SUPERCLASSES
from timm_dense2net.curves import read_summary, update_curves
from timm_dense2net.files import LEFTOVERS, output_file, replace_file, write_text
from timm_dense2net.final_report import write_final_report

CIFAR100 = Path(__file__).parents[1] / '../shared/cifar100'


def read_csv(path):
    with open(path, newline='', encoding='utf-8') as f:
        return list(csv.DictReader(f))


def write_summary(run_dir, epochs=3, first=0):
    for epoch in range(first, first + epochs):
        update_summary(
            epoch,
            dict(loss=4. - epoch, top1=10. * epoch),
            dict(loss=4.2 - epoch, top1=9. * epoch, top5=20. * epoch),
            run_dir / 'summary.csv',
            lr=0.1,
        )


def noisy_logits(n=600, num_classes=10, scale=3., seed=0):
    """Overconfident logits of a classifier that is right about half of the time."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(num_classes, (n,), generator=generator)
    logits = torch.randn(n, num_classes, generator=generator)
    logits[torch.arange(n), targets] += 1.5
    return scale * logits, targets


def reference_ece(logits, targets, bins):
    """The formula of Guo et al. (2017), one sample and one bin at a time."""
    logits = logits.double().numpy()
    members = [[] for _ in range(bins)]
    for row, target in zip(logits, targets.tolist()):
        probability = np.exp(row) / np.exp(row).sum()
        confidence = probability.max()
        for m in range(bins):
            if m / bins < confidence <= (m + 1) / bins:
                members[m].append((confidence, probability.argmax() == target))
    return sum(
        len(b) / len(logits) * abs(np.mean([hit for _, hit in b]) - np.mean([c for c, _ in b])) for b in members if b)


@pytest.mark.parametrize('bins', [1, 10, 15])
@pytest.mark.parametrize('scale', [0.3, 1., 4.])
def test_ece_agrees_with_the_formula_sample_by_sample(bins, scale):
    logits, targets = noisy_logits(scale=scale)
    assert expected_calibration_error(logits, targets, bins) == pytest.approx(
        reference_ece(logits, targets, bins), abs=1e-12)


def test_ece_of_known_cases():
    sure = torch.tensor([[50., -50.]] * 4)
    assert expected_calibration_error(sure, torch.zeros(4, dtype=torch.long)) == pytest.approx(0, abs=1e-12)
    assert expected_calibration_error(sure, torch.tensor([0, 0, 0, 1])) == pytest.approx(0.25)
    # Confidence 0.8 in every sample, right in half of them.
    logits = torch.tensor([[math.log(4.), 0.]] * 10)
    assert expected_calibration_error(logits, torch.arange(10) % 2) == pytest.approx(0.3)


@pytest.mark.parametrize('scale', [0.2, 1., 5.])
def test_temperature_is_the_minimum_of_the_cross_entropy(scale):
    logits, targets = noisy_logits(scale=scale)
    temperature = fit_temperature(logits, targets)
    grid = torch.linspace(math.log(0.05), math.log(20.), 4001, dtype=torch.double).exp()
    losses = torch.stack([torch.nn.functional.cross_entropy(logits.double() / t, targets) for t in grid])
    assert temperature == pytest.approx(grid[losses.argmin()].item(), rel=2e-3)


def test_temperature_undoes_a_known_scale_and_lowers_the_calibration_error():
    logits, targets = noisy_logits(n=4000, scale=1.)
    assert fit_temperature(3 * logits, targets) == pytest.approx(3 * fit_temperature(logits, targets), rel=1e-6)
    overconfident = 5 * logits
    calibrated = overconfident / fit_temperature(overconfident, targets)
    assert expected_calibration_error(calibrated, targets) < 0.2 * expected_calibration_error(overconfident, targets)


def test_temperature_stays_in_its_range_where_there_is_no_minimum():
    logits = torch.eye(4) * 5
    assert fit_temperature(logits, torch.arange(4)) == pytest.approx(0.01)
    assert fit_temperature(logits, (torch.arange(4) + 1) % 4) == pytest.approx(100.)


@pytest.mark.parametrize('logits, targets, message', [
    (torch.zeros(3, 4), torch.zeros(2, dtype=torch.long), r'\(3, 4\) and \(2,\)'),
    (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), 'N > 0'),
    (torch.zeros(2, 4), torch.tensor([0, 4]), r'0\.\.3, got 0\.\.4'),
    (torch.tensor([[math.nan, 0.]]), torch.tensor([0]), 'not finite'),
])
def test_logits_and_targets_that_do_not_fit_are_named(tmp_path, logits, targets, message):
    for call in (
            expected_calibration_error,
            fit_temperature,
            lambda x, y: write_final_report(tmp_path, x, y, [str(i) for i in range(x.shape[1])]),
    ):
        with pytest.raises(ValueError, match=message):
            call(logits, targets)
    assert not list(tmp_path.iterdir())


def test_classes_and_superclasses_are_complete():
    assert len(CIFAR100_CLASSES) == 100 and len(CIFAR100_SUPERCLASSES) == 20
    for superclass in CIFAR100_SUPERCLASSES:
        assert sum(CIFAR100_SUPERCLASS_OF[name] == superclass for name in CIFAR100_CLASSES) == 5


def test_classes_and_superclasses_are_the_data_sets_own():
    files = sorted(CIFAR100.glob('data/*.parquet'))
    if not files:
        pytest.skip('the CIFAR-100 folder ../shared/cifar100 is not there')
    parquet = pytest.importorskip('pyarrow.parquet')
    seen = set()
    for file in files:
        features = json.loads(parquet.read_schema(file).metadata[b'huggingface'])['info']['features']
        assert tuple(features['fine_label']['names']) == CIFAR100_CLASSES
        assert tuple(features['coarse_label']['names']) == CIFAR100_SUPERCLASSES
        labels = parquet.read_table(file, columns=['fine_label', 'coarse_label'])
        seen |= set(zip(labels['fine_label'].to_pylist(), labels['coarse_label'].to_pylist()))
    assert seen == {
        (fine, CIFAR100_SUPERCLASSES.index(CIFAR100_SUPERCLASS_OF[name]))
        for fine, name in enumerate(CIFAR100_CLASSES)}


def test_final_report_of_cifar100_counts_classes_superclasses_and_confusions(tmp_path):
    targets = torch.arange(200) % 100
    predicted = targets.clone()
    apple, bowl, orange = (CIFAR100_CLASSES.index(name) for name in ('apple', 'bowl', 'orange'))
    predicted[apple], predicted[100 + apple] = orange, bowl
    logits = torch.nn.functional.one_hot(predicted, 100) * 10.
    # The true class comes second in one of the two wrong answers and last in the other.
    logits[apple, apple], logits[100 + apple, apple] = 5., -5.

    figures = write_final_report(tmp_path, logits, targets, CIFAR100_CLASSES)

    assert figures['samples'] == 200
    assert figures['top1'] == pytest.approx(99.)
    assert figures['top5'] == pytest.approx(99.5)
    assert figures['superclass_top1'] == pytest.approx(99.5)
    assert figures['ece'] == pytest.approx(reference_ece(logits, targets, 15), abs=1e-9)
    assert json.loads((tmp_path / 'report.json').read_text()) == figures

    per_class = {row['class']: row for row in read_csv(tmp_path / 'per_class.csv')}
    assert list(per_class) == list(CIFAR100_CLASSES)
    assert per_class['apple'] == dict(
        {'class': 'apple'}, superclass='fruit_and_vegetables', samples='2', correct='0', accuracy='0.00',
        most_mistaken_for='bowl', mistaken='1')
    assert per_class['wolf']['accuracy'] == '100.00' and per_class['wolf']['most_mistaken_for'] == ''

    per_superclass = {row['superclass']: row for row in read_csv(tmp_path / 'per_superclass.csv')}
    assert list(per_superclass) == list(CIFAR100_SUPERCLASSES)
    assert per_superclass['fruit_and_vegetables'] == dict(
        superclass='fruit_and_vegetables', samples='10', class_accuracy='80.00', superclass_accuracy='90.00')

    confusion = read_csv(tmp_path / 'confusion_matrix.csv')
    assert len(confusion) == 100
    assert confusion[apple]['orange'] == '1' and confusion[apple]['bowl'] == '1' and confusion[apple]['apple'] == '0'
    assert sum(int(row[name]) for row in confusion for name in CIFAR100_CLASSES) == 200


def test_final_report_of_other_classes_has_no_superclasses(tmp_path):
    logits, targets = noisy_logits(num_classes=3)
    figures = write_final_report(tmp_path, logits, targets, ['cat', 'dog', 'eel'])
    assert figures['top5'] == 100. and 'superclass_top1' not in figures
    assert not (tmp_path / 'per_superclass.csv').exists()
    write_final_report(tmp_path, logits, targets, ['a $^$', '$', r'\frac{$x$}'])  # no mathematics
    assert read_csv(tmp_path / 'per_class.csv')[1]['class'] == '$'
    with pytest.raises(ValueError, match='2 class names for 3 logits'):
        write_final_report(tmp_path, logits, targets, ['cat', 'dog'])


def test_confusion_picture_shows_rows_as_true_classes(tmp_path):
    image = pytest.importorskip('PIL.Image')
    pytest.importorskip('matplotlib')
    targets = torch.arange(4)
    # Everything is called class 0: one dark column, the first.
    write_final_report(tmp_path, torch.eye(4)[torch.zeros(4, dtype=torch.long)], targets, ['a', 'b', 'c', 'd'])
    pixels = np.asarray(image.open(tmp_path / 'confusion_matrix.png').convert('L'))
    # The axes are 4 inches wide and start 0.57 inches from the left and the bottom, at 90 dots an inch.
    height = pixels.shape[0]
    cell = [[pixels[height - int(90 * (0.57 + 3.5 - row)), int(90 * (0.57 + 0.5 + column))] for column in range(4)]
            for row in range(4)]
    assert (np.array(cell) < 128).tolist() == [[True, False, False, False]] * 4


def test_curves_are_drawn_after_every_epoch(tmp_path):
    image = pytest.importorskip('PIL.Image')
    pytest.importorskip('matplotlib')
    pictures = []
    for epoch in range(3):
        write_summary(tmp_path, epochs=1, first=epoch)
        path = update_curves(tmp_path)
        assert path == tmp_path / 'curves.png'
        picture = image.open(path)
        picture.load()
        assert picture.format == 'PNG' and picture.width > 1000
        pictures.append(path.read_bytes())
    assert len(set(pictures)) == 3
    update_curves(tmp_path)
    assert (tmp_path / 'curves.png').read_bytes() == pictures[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ['curves.png', 'summary.csv']


def test_curves_of_a_run_whose_name_is_not_utf8(tmp_path):
    pytest.importorskip('matplotlib')
    run = tmp_path / os.fsdecode(b'caf\xe9 $1')
    run.mkdir()
    write_summary(run)
    assert update_curves(run).is_file()


def test_curves_draw_every_known_column_and_annotate_best_and_last(tmp_path, monkeypatch):
    pytest.importorskip('matplotlib')
    drawn = []
    monkeypatch.setattr(curves, 'save_figure', lambda figure, path: drawn.append(figure))
    write_summary(tmp_path)
    update_curves(tmp_path)
    accuracy_axes, loss_axes = drawn[0].axes
    lines = {line.get_label(): line.get_ydata() for line in accuracy_axes.lines if line.get_label()[0] != '_'}
    assert list(lines['training']) == [0., 10., 20.]
    assert list(lines['validation (best 18.00 after 3)']) == [0., 9., 18.]
    assert [text.get_text() for text in accuracy_axes.texts] == ['18.00', '20.00']
    assert [text.get_text() for text in loss_axes.texts] == ['2.00', '2.20']


def test_losses_far_above_the_others_are_cut_off(tmp_path, monkeypatch):
    pytest.importorskip('matplotlib')
    drawn = []
    monkeypatch.setattr(curves, 'save_figure', lambda figure, path: drawn.append(figure))
    (tmp_path / 'summary.csv').write_text(
        'epoch,train_loss,eval_loss,train_top1,eval_top1\n0,4.0,125323,7,1\n1,3.0,3.5,19,13\n')
    update_curves(tmp_path)
    accuracy_axes, loss_axes = drawn[0].axes
    assert loss_axes.get_ylim() == (0, 8) and accuracy_axes.get_ylim()[1] > 19
    assert [text.get_text() for text in loss_axes.texts] == ['3.00', '3.50']


def test_summary_with_a_torn_line_a_repeated_epoch_and_missing_values(tmp_path):
    path = tmp_path / 'summary.csv'
    path.write_text('epoch,train_loss,eval_top1,lr\n0,4.0,10,0.1\n1,3.0,,0.1\n1,2.5,20,0.1\n2,nan,30,0.1\n3,1.0,4')
    summary = read_summary(path)
    assert summary['epoch'] == [0, 1, 2]
    assert summary['eval_top1'] == [10, 20, 30]
    assert summary['train_loss'][:2] == [4.0, 2.5] and math.isnan(summary['train_loss'][2])
    pytest.importorskip('matplotlib')
    assert update_curves(tmp_path).stat().st_size > 1000


def test_summary_that_is_none_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='summary.csv'):
        update_curves(tmp_path)
    (tmp_path / 'summary.csv').write_text('a,b\n1,2\n')
    with pytest.raises(ValueError, match="no 'epoch' column"):
        update_curves(tmp_path)
    (tmp_path / 'summary.csv').write_text('epoch,train_loss\n')
    with pytest.raises(ValueError, match='no epoch is recorded'):
        update_curves(tmp_path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'figures.csv'
    path.write_text('old')
    with pytest.raises(RuntimeError), replace_file(path) as temporary:
        temporary.write_text('half of the n')
        raise RuntimeError
    assert path.read_text() == 'old'
    with replace_file(path) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == '.csv'
        assert list(tmp_path.glob(LEFTOVERS)) == [temporary]
        temporary.write_text('new')
        assert path.read_text() == 'old'
    assert path.read_text() == 'new'
    umask = os.umask(0o022)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert [file.name for file in tmp_path.iterdir()] == ['figures.csv']


def test_what_a_link_leads_to_is_replaced(tmp_path):
    (tmp_path / 'folder').mkdir()
    file, link = tmp_path / 'folder' / 'file.csv', tmp_path / 'link.csv'
    file.write_text('old')
    link.symlink_to(file)
    write_text(link, 'new')
    assert link.is_symlink() and file.read_text() == 'new' and list((tmp_path / 'folder').iterdir()) == [file]


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='this system has no pipes in folders')
def test_only_files_are_written(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'to_pipe').symlink_to(tmp_path / 'pipe')
    for name in (tmp_path / 'pipe', tmp_path / 'to_pipe', os.devnull):
        with pytest.raises(argparse.ArgumentTypeError, match=f'{name} is no regular file'):
            output_file(str(name))


def test_a_file_that_cannot_be_made_is_named_itself(tmp_path):
    path = tmp_path / 'nowhere' / 'figures.csv'
    with pytest.raises(FileNotFoundError) as info, replace_file(path):
        pass
    assert info.value.filename == str(path)


def test_without_matplotlib_one_warning_is_given_and_the_figures_are_written(tmp_path):
    """In a fresh interpreter in which `import matplotlib` fails."""
    write_summary(tmp_path)
    code = f'''
import sys
sys.modules['matplotlib'] = None
import torch
from timm_dense2net.curves import update_curves
from timm_dense2net.final_report import write_final_report
print(update_curves({str(tmp_path)!r}), update_curves({str(tmp_path)!r}))
write_final_report({str(tmp_path)!r}, torch.eye(3), torch.arange(3), ['a', 'b', 'c'])
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout == 'None None\n'
    assert done.stderr.count('matplotlib is not installed') == 1
    assert {path.name for path in tmp_path.iterdir()} == {
        'summary.csv', 'report.json', 'per_class.csv', 'confusion_matrix.csv'}
