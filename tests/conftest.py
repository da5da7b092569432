"""What every test gets: an environment without the variables that a supervisord around the tests would set."""
from __future__ import annotations

import os
import socket
import threading
from typing import Iterator

import pytest
from hypothesis import settings

# A run is repeatable, and a busy machine is no failure.
settings.register_profile('superlance', deadline=None, derandomize=True)
settings.load_profile('superlance')


COVERAGE = 'COVERAGE_PROCESS_CONFIG'    # with this, Python measures the coverage of a process from its start


@pytest.fixture(autouse=True, scope='session')
def _own_environment() -> str:
    """Remove variables from the environment; return that of the coverage."""
    coverage = os.environ.pop(COVERAGE, '')
    for name in list(os.environ):
        # Output is buffered, and modules are compiled once, as a user has it.
        if name.startswith(('SUPERVISOR_', 'SUPERLANCE_')) or name in ('PYTHONUNBUFFERED', 'PYTHONDONTWRITEBYTECODE'):
            del os.environ[name]
    return coverage


@pytest.fixture
def measured(_own_environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the coverage of a test's processes, too: for lines that no test runs in its own process.

    The start of the measurement takes longer than most processes.
    """
    if _own_environment:
        monkeypatch.setenv(COVERAGE, _own_environment)


@pytest.fixture
def _no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the process limit were reached."""
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")
    monkeypatch.setattr(threading.Thread, 'start', fail)


@pytest.fixture(autouse=True)
def _default_timeout() -> Iterator[None]:
    """superlance.rpc sets the timeout of all new sockets: supervisor's connections have none of their own."""
    yield
    socket.setdefaulttimeout(None)
