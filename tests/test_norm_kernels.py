"""The GPU's training form equals the plain form, on a CPU."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

triton = pytest.importorskip('triton')


@pytest.mark.skipif(Version(triton.__version__) < Version('3.8'), reason="older interpreters fail with today's numpy")
def test_in_the_interpreter():
    """Triton must know that it is to interpret before it is imported."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', str(here / 'interpreted_kernels.py')],
        env=dict(os.environ, TRITON_INTERPRET='1', PYTHONPATH=os.pathsep.join(sys.path)), capture_output=True,
        text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ' passed' in done.stdout and 'skipped' not in done.stdout
