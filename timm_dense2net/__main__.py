"""Runs the package's commands, and any Python script with the Dense2Net models registered in timm.

    python -m timm_dense2net SCRIPT ARGS...                       e.g. timm's validate.py
    torchrun --nproc-per-node 4 -m timm_dense2net train.py ...    the same in every worker
    python -m timm_dense2net COMMAND --help
    python -m timm_dense2net --version
"""
import importlib
import os
import runpy
import signal
import sys
from pathlib import Path

from .version import __version__

# Command -> module of this package whose main(argv) runs it.
COMMANDS = {
    'convert': 'convert',
    'demo': 'demo',
    'enlarge': 'enlarge',
    'evaluate': 'evaluate',
    'export': 'export',
    'models': 'listing',
    'package': 'package',
    'predict': 'predict',
    'publish': 'publish',
    'report': 'report',
    'search': 'search',
    'table': 'table',
}


def _usage() -> str:
    commands = ','.join(COMMANDS)
    return (
        f'usage: python -m timm_dense2net SCRIPT ARGS...\n       python -m timm_dense2net {{{commands}}} ...\n'
        '       python -m timm_dense2net --version')


def run_script(script: str, args: list[str]) -> None:
    """Run a Python script as ``python script args...`` would, after registering the models."""
    importlib.import_module('timm_dense2net')
    # The script finds modules beside itself, as it would when started directly.
    sys.path[0] = str(Path(script).resolve().parent)
    sys.argv = [script, *args]
    runpy.run_path(script, run_name='__main__')


def _run_command(name: str, args: list[str]) -> int:
    try:
        command = importlib.import_module(f'timm_dense2net.{COMMANDS[name]}')
    except ImportError as e:  # of a package that only some commands need
        print(f'error: {e}', file=sys.stderr)
        return 2
    return command.main(args)


def _output_failed(error: OSError) -> int:
    """Exit code where a command's own output could not be written; a reader that has enough, as `head`, is no fault."""
    if not isinstance(error, BrokenPipeError):
        print(f'error: {error}', file=sys.stderr)
    return 1


def main(argv: list[str] | None = None) -> int:
    """Run a command or script; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ('-h', '--help'):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == '--version':
        print(f'timm_dense2net {__version__}')
        return 0
    name, args = argv[0], argv[1:]
    if name in COMMANDS:
        try:
            code = _run_command(name, args)
        except KeyboardInterrupt:
            print('interrupted', file=sys.stderr)
            return 128 + signal.SIGINT
        except OSError as e:
            code = _output_failed(e)
        try:
            sys.stdout.flush()
        except OSError as e:
            code = _output_failed(e)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or it would be tried again at exit
        return code
    if not Path(name).is_file():
        print(f"error: '{name}' is neither a command nor a script that exists\n{_usage()}", file=sys.stderr)
        return 2
    run_script(name, args)
    return 0


if __name__ == '__main__':
    sys.exit(main())
