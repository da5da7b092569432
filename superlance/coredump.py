"""Core dumps of the processes that httpok -d is about to restart, and what would keep it from writing them."""
from __future__ import annotations

import os
import shlex
import stat
from typing import Sequence

from superlance.command import CommandFailed, Deadline, decode_end, is_command, run_command
from superlance.listener import ExitRequest
from superlance.rpc import Process

GCORE = ['/usr/bin/gcore', '-o']
GCORE_SECONDS = 300


def parse_command(text: str) -> list[str]:
    """Return the words of a command, split as by a shell. Raises ValueError."""
    try:
        return shlex.split(text)
    except ValueError as why:
        raise ValueError(f'{text!r} is not a command: {why}') from None


def find_problems(directory: str, command: Sequence[str]) -> list[str]:
    """Return what is wrong with the directory for core dumps and with the command that writes them."""
    problems = [check_directory(directory)]
    if not is_command(command[0]):
        problems.append(f'core dump command "{command[0]}" not found: '
                        'install it (gcore is part of gdb), or name another with -g')
    return problems


def check_directory(path: str) -> str:
    """Return what is wrong with a directory for core dumps, which may contain passwords; '' if nothing is."""
    try:
        mode = os.stat(path).st_mode
    except OSError as why:
        return f'core directory {path}: {why.strerror}; create it, and make it writable by uid {os.geteuid()}'
    if not stat.S_ISDIR(mode):
        return f'core directory {path} is not a directory'
    if not os.access(path, os.W_OK | os.X_OK):
        return f'core directory {path} is not writable by uid {os.geteuid()}, the user of this listener'
    if mode & stat.S_IWOTH:
        return f'core directory {path} is writable by other users, who could read or replace core dumps: ' \
               'use a directory that only this listener can write to'
    return ''


def make_file_name(title: str) -> str:
    """Return the title of a process as a file name that stays in its directory."""
    name = ''.join(c if c.isalnum() or c in '-_.:@+' else '_' for c in title)
    return '_' + name[1:] if name.startswith('.') else name


def write_core_dump(process: Process, directory: str, command: Sequence[str], interrupt: ExitRequest) -> list[str]:
    """Write a core dump with a command such as gcore -o, within 5 minutes.

    Return what happened, in one line for the log, and the output of the command.
    """
    path = os.path.join(directory, make_file_name(process.title))
    words = [*command, path, str(process.pid)]
    try:
        # A shell, only to set the mode of the file: a core dump may contain passwords.
        output = run_command(['/bin/sh', '-c', 'umask 077; exec "$@"', 'sh', *words],
                             Deadline(GCORE_SECONDS).seconds_left, interrupt=interrupt, shown=' '.join(words))
    except CommandFailed as why:
        return [f'unable to write a core dump of {process.title}: {why}']
    files = [name for name in (f'{path}.{process.pid}', path) if os.path.exists(name)]
    return [f"wrote a core dump of {process.title}{f' to {files[0]}' if files else ''}",
            *decode_end(output).splitlines()]
