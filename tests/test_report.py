"""The table of runs, results.csv and the README's block."""
import csv
import json
import math
import statistics
from pathlib import Path

import pytest
import yaml
from timm.utils import update_summary

from timm_dense2net.deck import DECK
from timm_dense2net.options import build_parser
from timm_dense2net.recipe import list_recipes, load_recipe
from timm_dense2net.report import BEGIN, END, main, markdown_table, summarise
from timm_dense2net.results import COLUMNS, RunResult, read_results, read_run

ROOT = Path(__file__).parents[1]


def make_run(folder, name, args=None, **values):
    """A finished run's folder, of recipe deck_s8 unless told otherwise."""
    run = folder / name
    run.mkdir(parents=True)
    result = dict(
        model='dense2net121_s8', recipe='deck_s8', dataset='hfds/somewhere/cifar100', seed=1, params=6_096_420,
        macs=704_643_072, epochs=88, ema=False, hold_out=0, tested='last', test_top1=76.5, test_top5=93.25,
        last_top1=76.5, best_top1=77., best_epoch=80, train_seconds=3600.25, images_per_second=1234.5, world_size=1,
        hardware='NVIDIA H200', versions=dict(torch='2.15.0', timm='1.0.31'), commit='0123abc')
    result.update(values)
    (run / 'result.json').write_text(json.dumps(result))
    recipe = result['recipe'] if result['recipe'] in list_recipes() else 'deck_s8'
    arguments = vars(build_parser().parse_args([])) | load_recipe(recipe, build_parser())
    (run / 'args.yaml').write_text(yaml.safe_dump({**arguments, 'seed': result['seed'], **(args or {})}))
    return run


def rows_of(path):
    with open(path, newline='', encoding='utf-8') as f:
        return list(csv.DictReader(f))


def test_the_decks_rows_are_the_packaged_recipes():
    assert set(DECK) == {name for name in list_recipes() if name.startswith('deck_')}
    assert {row.name: row.top1 for row in DECK.values()} == {
        'DenseNet No Augmentation': 65.41, 'DenseNet': 71.91, 'Dense2Net No Augmentation': 68.96, 'Dense2Net': 75.85,
        'Dense2Net scale = 2': 75.26, 'Dense2Net scale = 8': 76.1, 'Dense2Net with Cutout': 75.23,
        'Dense2Net with Grouped Convs': 75.96, 'Dense2Net with SE': 74.77}


def test_report_shows_mean_and_spread_over_seeds_beside_the_deck(tmp_path, capsys):
    accuracies = (76., 77., 78.5)
    runs = [
        make_run(tmp_path, f's8-{seed}', seed=seed, test_top1=top1, epochs=88 + seed, train_seconds=3600 + 120 * seed)
        for seed, top1 in enumerate(accuracies)]
    runs.append(make_run(
        tmp_path, 'strong-0', recipe='strong', ema=True, test_top1=83.6, seed=0, epochs=300, train_seconds=None))
    runs.append(make_run(
        tmp_path, 'base', recipe='deck_densenet', model='densenet121_cifar', params=7_048_548, test_top1=71.5))

    assert main([*map(str, runs), '--output', str(tmp_path / 'out')]) == 0

    lines = (tmp_path / 'out/report.md').read_text().splitlines()
    assert lines[2] == (
        '| `deck_densenet` | `densenet121_cifar` | 7.05 | 705 | 88 | 60 | no | 1 | 71.50 | 93.25 | 77.00 | 71.91 '
        '| -0.41 |')
    assert lines[3] == (
        '| `deck_s8` | `dense2net121_s8` | 6.10 | 705 | 88-90 | 62 | no | 3 | 77.17 ± 1.26 | 93.25 ± 0.00 '
        '| 77.00 ± 0.00 | 76.10 | +1.07 |')
    assert lines[4].startswith('| `strong` | `dense2net121_s8` | 6.10 | 705 | 300 |  | yes | 1 | 83.60 |')
    assert lines[4].endswith('|  |  |') and len(lines) == 5
    assert '\n'.join(lines) in capsys.readouterr().out

    by_recipe = {row['recipe']: row for row in rows_of(tmp_path / 'out/report.csv')}
    row = by_recipe['deck_s8']
    assert (row['n'], row['deck_row'], row['deck_top1']) == ('3', 'Dense2Net scale = 8', '76.10')
    assert float(row['top1_mean']) == pytest.approx(statistics.fmean(accuracies), abs=0.005)
    assert float(row['top1_std']) == pytest.approx(statistics.stdev(accuracies), abs=0.005)
    assert by_recipe['strong']['top1_std'] == '' and by_recipe['strong']['deck_top1'] == ''


def test_report_draws_the_table(tmp_path):
    image = pytest.importorskip('PIL.Image')
    pytest.importorskip('matplotlib')
    runs = [make_run(tmp_path, f's8-{seed}', seed=seed, test_top1=75. + seed) for seed in range(3)]
    assert main([*map(str, runs), '--output', str(tmp_path / 'out')]) == 0
    picture = image.open(tmp_path / 'out/report.png')
    picture.load()
    assert picture.format == 'PNG' and picture.width == 1200


def result_of(**values):
    defaults = dict(
        run='run', model='dense2net121_s8', recipe='deck_s8', dataset='cifar100', seed=0, epochs=100, top1=70)
    return RunResult.from_mapping({**defaults, **values})


@pytest.mark.parametrize('values, expected', [
    (dict(), True),
    (dict(overrides='amp=True amp_dtype=float16'), True),
    (dict(model='dense2net40_k12_s4'), False),
    (dict(dataset='cifar10'), False),
    (dict(overrides='lr=0.05'), False),
    (dict(recipe='strong'), False),
])
def test_the_decks_figure_stands_only_beside_the_same_recipe_model_and_data(values, expected):
    row, = summarise([result_of(**values)])
    assert (row.deck is not None) == expected


@pytest.mark.parametrize('changes', [
    dict(model='densenet121_cifar'), dict(recipe='strong'), dict(dataset='digits'), dict(overrides='lr=0.05'),
    dict(epochs=2), dict(hold_out=5000), dict(ema=True), dict(params=1), dict(macs=1)])
def test_only_runs_that_differ_in_nothing_but_the_seed_are_averaged(changes):
    assert len(summarise([result_of(seed=0), result_of(seed=1)])) == 1
    assert len(summarise([result_of(seed=0), result_of(seed=1, **changes)])) == 2


def test_what_a_run_was_given_beyond_its_recipe_is_told(tmp_path):
    plain = read_run(make_run(tmp_path, 'plain', dict(output='elsewhere', workers=9, device='cuda', data_dir='data')))
    changed = read_run(make_run(tmp_path, 'changed', dict(lr=0.05, epochs=3, drop_path=0.1)))
    assert plain.overrides == '' and plain.epochs == 100 and plain.epochs_trained == 88
    assert changed.overrides == 'drop_path=0.1 epochs=3 lr=0.05' and changed.epochs == 3
    shape = make_run(tmp_path, 'shape', dict(model_kwargs=dict(block_config=[4, 4])))
    assert read_run(shape).overrides == "model_kwargs={'block_config':[4,4]}"  # one word
    row, = summarise([changed])
    assert row.title == '`deck_s8` `drop_path=0.1` `epochs=3` `lr=0.05`'
    for path, told in (('elsewhere/short_ft', ''), ('elsewhere/other', 'pretrained_path')):  # of output/short_ft
        run = make_run(tmp_path, Path(path).name, dict(pretrained_path=path), recipe='short_ft2')
        assert read_run(run).overrides == told


def test_a_run_given_twice_counts_once(tmp_path, capsys):
    run = make_run(tmp_path, 'run')
    (tmp_path / 'latest').symlink_to('run')
    assert main([str(tmp_path / 'latest'), str(run), str(run)]) == 0
    twice = capsys.readouterr().out
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == twice


def test_runs_of_no_packaged_recipe_tell_what_they_were_given(tmp_path):
    defaults = vars(build_parser().parse_args([]))
    bare = read_run(make_run(tmp_path, 'bare', dict(defaults, lr=0.3), recipe=None))
    assert (bare.recipe, bare.overrides) == ('', 'lr=0.3')
    file = tmp_path / 'mine.yaml'
    file.write_text('lr: 0.3\n')
    own = make_run(tmp_path, 'own', dict(defaults, lr=0.3, epochs=7), recipe=str(file))
    assert (read_run(own).recipe, read_run(own).overrides) == ('mine.yaml', 'epochs=7 lr=0.3')


def test_the_data_set_is_told_where_there_are_several():
    one = markdown_table(summarise([result_of()]))
    assert 'Data' not in one
    two = markdown_table(summarise([result_of(), result_of(dataset='digits')]))
    assert '| Data |' in two and '| `digits` |' in two and len({line.count('|') for line in two.splitlines()}) == 1


def test_recipes_of_one_file_name_are_not_one_recipe(tmp_path):
    defaults = vars(build_parser().parse_args([]))
    runs = []
    for name, lr in (('first', 0.05), ('second', 0.4)):
        file = tmp_path / f'{name}_recipe' / 'args.yaml'
        file.parent.mkdir()
        file.write_text(f'lr: {lr}\n')
        runs.append(read_run(make_run(tmp_path, name, dict(defaults, lr=lr), recipe=str(file))))
    assert [len(row.runs) for row in summarise(runs)] == [1, 1]


def test_other_first_weights_are_told(tmp_path):
    args = dict(load_recipe('small_ft', build_parser()), model='dense2net100_k12_s4.small_ft_c100')
    assert read_run(make_run(tmp_path, 'same', recipe='small_ft')).overrides == ''
    stats = dict(mean=[0.5], std=[0.25])  # of the weights that it starts from
    assert read_run(make_run(tmp_path, 'noted', stats, recipe='small_ft')).overrides == ''
    assert read_run(make_run(tmp_path, 'given', stats)).overrides == 'mean=[0.5] std=[0.25]'
    assert read_run(make_run(tmp_path, 'other', args, recipe='small_ft')).overrides == (
        'model=dense2net100_k12_s4.small_ft_c100')


def test_the_global_batch_is_what_counts(tmp_path):
    four = read_run(make_run(tmp_path, 'four', dict(batch_size=32), world_size=4))
    half = read_run(make_run(tmp_path, 'half', dict(batch_size=32), world_size=2))
    accumulated = read_run(make_run(tmp_path, 'accumulated', dict(batch_size=64, grad_accum_steps=2)))
    assert (four.overrides, half.overrides, accumulated.overrides) == ('', 'batch=64', '')
    assert four.hardware == '4 x NVIDIA H200'


def test_a_held_out_runs_best_epoch_is_not_one_of_the_test_split(tmp_path):
    result = read_run(make_run(tmp_path, 'held', dict(hold_out=5000), hold_out=5000, tested='best', last_top1=80.))
    assert result.top1 == 76.5 and math.isnan(result.best_top1) and result.hold_out == 5000


def test_bad_run_folders_are_reported_and_counted_and_the_rest_goes_on(tmp_path, capsys):
    good = make_run(tmp_path, 'good')
    unfinished = tmp_path / 'unfinished'
    unfinished.mkdir()
    for epoch in range(5):
        update_summary(epoch, dict(loss=1.), dict(top1=2.), unfinished / 'summary.csv')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'begun').mkdir()
    (tmp_path / 'begun' / 'args.yaml').write_text('model: resnet18\n')
    torn = make_run(tmp_path, 'torn')
    (torn / 'result.json').write_text('{"model": "dense2')
    bare = make_run(tmp_path, 'bare')
    (bare / 'args.yaml').unlink()
    lacking = make_run(tmp_path, 'lacking', test_top1=None)
    wrong = make_run(tmp_path, 'wrong', test_top1=7650)
    text = make_run(tmp_path, 'text', params='many')
    mixed = make_run(tmp_path, 'mixed', recipe=['deck_s8'])

    begun, empty = tmp_path / 'begun', tmp_path / 'empty'
    paths = [unfinished, begun, empty, tmp_path / 'nowhere', torn, bare, lacking, wrong, text, mixed, good]
    assert main([*map(str, paths), '--results', str(tmp_path / 'results.csv')]) == 1

    out, err = capsys.readouterr()
    assert '| `deck_s8` |' in out
    for path, message in [
            (unfinished, 'the run has not finished (no result.json; last epoch 4)'),
            (tmp_path / 'begun', 'the run has not finished its first epoch'),
            (tmp_path / 'empty', 'not a run folder'),
            (tmp_path / 'nowhere', 'no such folder'),
            (torn, 'result.json or args.yaml cannot be read'),
            (bare, 'No such file or directory'),
            (lacking, 'result.json or args.yaml: top1 not given'),
            (wrong, 'top1 must be a percentage, got 7650'),
            (text, "params must be of type int, got 'many'"),
            (mixed, 'result.json or args.yaml: '),
    ]:
        assert any(line.startswith(f'error: {path}: ') and message in line for line in err.splitlines())
    assert '10 of 11 runs could not be read' in err
    assert [result.run for result in read_results(tmp_path / 'results.csv')] == ['good']


def test_results_csv_has_one_row_a_run_and_takes_a_run_only_once(tmp_path):
    path = tmp_path / 'results.csv'
    strong = make_run(tmp_path, 'strong-7', recipe='strong', seed=7, ema=True, test_top5=None)
    deck = make_run(tmp_path, 's8-1')
    assert main([str(strong), '--results', str(path)]) == 0
    assert main([str(deck), '--results', str(path)]) == 0
    rows = rows_of(path)
    assert list(rows[0]) == list(COLUMNS)
    assert [row['run'] for row in rows] == ['s8-1', 'strong-7']
    assert rows[0] == dict(
        run='s8-1', model='dense2net121_s8', tag='deck_c100', recipe='deck_s8', overrides='', dataset='cifar100',
        params='6096420', macs='704643072', seed='1', epochs='100', epochs_trained='88', hold_out='0', ema='False',
        top1='76.50', top5='93.25', best_top1='77.00', best_epoch='80', images_per_second='1234.50',
        wall_time='3600.25', hardware='1 x NVIDIA H200', versions='torch 2.15.0, timm 1.0.31', commit='0123abc')
    assert rows[1]['ema'] == 'True' and rows[1]['top5'] == '' and rows[1]['tag'] == 'strong_c100'

    before = path.read_bytes()
    assert main([str(strong), str(deck), '--results', str(path)]) == 0
    assert path.read_bytes() == before
    values = json.loads((deck / 'result.json').read_text())
    (deck / 'result.json').write_text(json.dumps({**values, 'test_top1': 76.9}))
    assert main([str(deck), '--results', str(path)]) == 0
    assert [(row['run'], row['top1']) for row in rows_of(path)] == [('s8-1', '76.90'), ('strong-7', '76.50')]


def test_runs_of_one_name_are_not_taken_for_each_other(tmp_path, capsys):
    path = tmp_path / 'results.csv'
    first, second = make_run(tmp_path, 's4/seed1'), make_run(tmp_path, 's8/seed1', recipe='strong')
    third = make_run(tmp_path, 'again/seed1')
    assert main([str(first), '--results', str(path)]) == 0
    before = path.read_bytes()
    for runs in ([second], [first, third]):
        assert main([*map(str, runs), '--results', str(path)]) == 1
        assert 'two runs are named seed1' in capsys.readouterr().err and path.read_bytes() == before


@pytest.mark.parametrize('content, message', [
    ('model,seed\n', 'no column run'),
    (','.join(COLUMNS) + '\n' + ','.join(['x'] * len(COLUMNS)) + '\n', 'line 2: params must be of type int'),
])
def test_results_csv_that_is_none_is_named_and_left_alone(tmp_path, capsys, content, message):
    path = tmp_path / 'results.csv'
    path.write_text(content)
    run = make_run(tmp_path, 'run')
    assert main([str(run), '--results', str(path)]) == 1
    assert f'error: {path}' in (err := capsys.readouterr().err) and message in err
    assert path.read_text() == content


def test_results_csv_as_excel_writes_it(tmp_path):
    path = tmp_path / 'results.csv'
    assert main([str(make_run(tmp_path, 'run')), '--results', str(path)]) == 0
    results = read_results(path)
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes().replace(b'\n', b'\r\n'))
    assert read_results(path) == results
    path.write_text(','.join(COLUMNS) + '\n"' + 'x' * (csv.field_size_limit() + 1) + '"\n')
    with pytest.raises(ValueError, match=f'{path}: field larger than field limit'):
        read_results(path)


@pytest.fixture
def project(tmp_path):
    """A README with marks and a results.csv of one run."""
    readme, results = tmp_path / 'README.md', tmp_path / 'results.csv'
    readme.write_text(f'# Title\n\n{BEGIN}\nold\n{END}\n\nThe end.\n')
    assert main([str(make_run(tmp_path, 'run')), '--results', str(results)]) == 0
    return readme, results


def test_readme_table_is_written_checked_and_found_to_differ(project, capsys):
    readme, results = project
    call = ['--results', str(results), '--readme', str(readme)]
    assert main([*call, '--check']) == 1
    assert f'error: {readme} does not hold the table of {results}' in capsys.readouterr().err
    assert '\nold\n' in readme.read_text()

    assert main(call) == 0
    text = readme.read_text()
    assert text.startswith(f'# Title\n\n{BEGIN}\n| Recipe |') and text.endswith(f'{END}\n\nThe end.\n')
    assert '| `deck_s8` | `dense2net121_s8` | 6.10 |' in text and 'old' not in text
    assert main([*call, '--check']) == 0

    for changed in (text.replace('76.50', '79.50'), text.replace(END, f'| one more |\n{END}')):
        readme.write_text(changed)
        assert main([*call, '--check']) == 1
        assert readme.read_text() == changed
    readme.write_text(text)
    results.write_text(results.read_text().replace('76.50', '80.50'))
    assert main([*call, '--check']) == 1


@pytest.mark.parametrize('text', ['no marks', BEGIN, f'{END}\n{BEGIN}', f'{BEGIN}\n{END}\n{BEGIN}\n{END}'])
def test_readme_without_its_marks_is_left_alone(project, capsys, text):
    readme, results = project
    readme.write_text(text)
    assert main(['--results', str(results), '--readme', str(readme)]) == 1
    assert f'error: {readme}: one line {BEGIN}' in capsys.readouterr().err
    assert readme.read_text() == text


@pytest.mark.parametrize('call, message', [
    ([], 'give run folders, or --results'),
    (['run', '--readme', 'README.md'], '--readme needs --results'),
    (['--results', 'r.csv', '--check'], '--check needs --readme'),
    (['run', '--results', 'r.csv', '--readme', 'R.md', '--check'], 'no runs'),
    (['--results', 'r.csv', '--readme', 'R.md', '--check', '--output', 'out'], 'no --output'),
])
def test_a_wrong_call_is_refused(capsys, call, message):
    with pytest.raises(SystemExit) as stop:
        main(call)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_results_or_readme_is_one_clear_message(project, capsys, tmp_path):
    readme, results = project
    assert main(['--results', str(tmp_path / 'none.csv'), '--readme', str(readme), '--check']) == 1
    assert main(['--results', str(results), '--readme', str(tmp_path / 'none.md'), '--check']) == 1
    assert capsys.readouterr().err.count('No such file or directory') == 2


def test_the_projects_readme_holds_the_table_of_its_results(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code = main(['--results', 'results/results.csv', '--readme', 'README.md', '--check'])
    assert code == 0, capsys.readouterr().err
