"""The README is true: its model table and its Python are what the package prints and runs."""
import re
from pathlib import Path

from timm_dense2net.listing import main, model_table

README = (Path(__file__).parent.parent / 'README.md').read_text()


def test_model_table_is_the_command_s(capsys):
    table = README.split('<!-- models:begin -->\n')[1].split('\n<!-- models:end -->')[0]
    assert table == model_table(), 'run: python -m timm_dense2net models'
    assert main([]) == 0 and capsys.readouterr().out == table + '\n'


def test_models_of_an_unknown_module(capsys):
    assert main(['--module', 'no_such_module']) == 2
    assert "'no_such_module'" in capsys.readouterr().err


def test_python_examples_run():
    blocks = [b for b in re.findall(r'```python\n(.*?)```', README, re.S) if 'path/to/checkout' not in b]
    assert len(blocks) >= 2
    for block in blocks:
        exec(block, {})
