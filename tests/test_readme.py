"""The README's tables of models and of weights are what the package prints and what was measured."""
import json
import re
from pathlib import Path

import timm

from timm_dense2net.listing import main

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()


def test_model_table_is_the_command_s(capsys):
    table = README.split('<!-- models:begin -->\n')[1].split('\n<!-- models:end -->')[0]
    assert main([]) == 0
    assert capsys.readouterr().out == table + '\n', 'run: python -m timm_dense2net models'


def test_models_of_an_unknown_module(capsys):
    assert main(['--module', 'no_such_module']) == 2
    assert "'no_such_module'" in capsys.readouterr().err


def test_weights_table_is_what_was_measured():
    """One row for the default weights of each name, by falling top-1, from the record of their run."""
    rows = re.findall(r'^\| `(\w+)` \| `(\w+)_c100` \| ([\d. |]+) \|$', README, re.MULTILINE)
    names = {name.split('.')[0] for name in timm.list_models(module='dense2net', pretrained=True)}
    assert sorted(name for name, _, _ in rows) == sorted(names)
    top1 = []
    for name, recipe, cells in rows:
        assert timm.get_pretrained_cfg(name).tag == f'{recipe}_c100'
        found = json.loads((ROOT / 'results' / f'{name}-{recipe}-seed42' / 'evaluate.json').read_text())
        calibration = found['calibration']
        assert cells.split(' | ') == [
            f'{found["top1"]:.2f}', f'{found["top1_flip"]:.2f}', f'{calibration["ece"]:.3f}',
            f'{calibration["ece_scaled"]:.3f}']
        top1.append(found['top1'])
    assert top1 == sorted(top1, reverse=True)
