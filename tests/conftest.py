"""What every test has in common."""
import logging
import os

import pytest

# Threads that wait for each other in a spin take many times as long where other processes want the cores, too. Read
# when torch is imported, here and by the processes that tests start.
os.environ.setdefault('GOMP_SPINCOUNT', '1000')


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    """Servers that a test starts are on this machine, whatever proxy it has."""
    for name in ('NO_PROXY', 'no_proxy'):
        monkeypatch.setenv(name, '127.0.0.1,localhost')


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    """A command run in this process sets up logging to the output of its test, which is closed when the next runs."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
