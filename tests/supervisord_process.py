"""Runs supervisord in a process that multiprocessing's fork server has forked, which has imported supervisor already.

Importing it takes longer than most tests of it.
"""
from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(['supervisor.supervisord'])


def start(configuration: Path, environment: dict[str, str]) -> BaseProcess:
    """Start supervisord with this environment, in the folder of its configuration."""
    process = _context.Process(target=_run, args=(configuration, environment))
    process.start()
    return process


def _run(configuration: Path, environment: dict[str, str]) -> None:
    from supervisor import supervisord

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(configuration.parent)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.close(null)
    sys.argv = ['supervisord']
    supervisord.main(['-n', '-c', str(configuration)])
