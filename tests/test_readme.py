"""The README's model table is what the package prints."""
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
