"""Core dumps: their files, their command and what is said about them."""
from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from support import write_script
from table import for_each

from superlance import coredump
from superlance.coredump import check_directory, find_problems, make_file_name, write_core_dump
from superlance.listener import ExitRequest
from superlance.rpc import Process

PID = 7
WEB = Process('web', 'web', PID, 20, 'RUNNING', 1000, 1100, '')


@for_each('title, expected', [
    ('web', 'web'),
    ('site:web_00', 'site:web_00'),
    ('grün-1.2@a+b', 'grün-1.2@a+b'),
    ('../../etc/passwd', '_._.._etc_passwd'),
    ('..', '_.'),
    ('.hidden', '_hidden'),
    ('$(touch x)', '__touch_x_'),
    ('a"b\'c`d;e|f&g*h\n\x00', 'a_b_c_d_e_f_g_h__'),
])
def test_make_file_name(title: str, expected: str) -> None:
    assert make_file_name(title) == expected


def test_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_directory(str(tmp_path)) == ''
    file = tmp_path / 'file'
    file.touch()
    assert check_directory(str(file)) == f'core directory {file} is not a directory'
    missing = tmp_path / 'none'
    assert check_directory(str(missing)) == (
        f'core directory {missing}: No such file or directory; create it, and make it writable by uid {os.geteuid()}')
    tmp_path.chmod(0o777)
    assert check_directory(str(tmp_path)).startswith(f'core directory {tmp_path} is writable by other users')
    monkeypatch.setattr(os, 'access', lambda path, mode: False)     # root may write anywhere
    assert check_directory(str(tmp_path)).startswith(f'core directory {tmp_path} is not writable by uid ')


def test_command_that_is_not_installed(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    assert find_problems(str(tmp_path), [sys.executable, '-o']) == ['']
    assert find_problems(str(tmp_path), ['nonexistent-gcore', '-o']) == ['', (
        'core dump command "nonexistent-gcore" not found: install it (gcore is part of gdb), or name another with -g')]


def dump_core(script: Path, *words: str) -> list[str]:
    return write_core_dump(WEB, str(script.parent), [str(script), *words], ExitRequest())


def test_a_core_dump_has_mode_0600_and_its_command_gets_no_shell(tmp_path: Path) -> None:
    script = write_script(tmp_path / 'my gcore', 'printf "%s|" "$@"\necho\necho done\n: > "$3.$4"\n')
    file = tmp_path / f'web.{PID}'
    assert dump_core(script, 'a  b', '$HOME') == [
        f'wrote a core dump of web to {file}', f'a  b|$HOME|{tmp_path}/web|{PID}|', 'done']
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize('name', ['$(touch${IFS}x)', 'a"b\'c', '..', '.hidden', '-o', 'a&touch${IFS}x&', 'a\\b'])
def test_a_core_dump_of_a_process_with_an_unusual_name_reaches_no_shell_and_stays_in_the_directory(
        name: str, tmp_path: Path) -> None:
    script = write_script(tmp_path / 'gcore', 'touch "$1.$2"\n')
    cores = tmp_path / 'here' / 'cores'
    cores.mkdir(parents=True)
    before = sorted(os.listdir(tmp_path)), sorted(os.listdir())
    write_core_dump(WEB._replace(group=name, program=name), str(cores), [str(script)], ExitRequest())
    assert os.listdir(cores) == [f'{make_file_name(name)}.{PID}']
    assert os.listdir(cores.parent) == ['cores']
    assert (sorted(os.listdir(tmp_path)), sorted(os.listdir())) == before


def test_a_core_dump_in_another_place(tmp_path: Path) -> None:
    assert dump_core(write_script(tmp_path / 'gcore', 'exit 0\n')) == ['wrote a core dump of web']
    assert dump_core(write_script(tmp_path / 'gcore', ': > "$1"\n')) == [f'wrote a core dump of web to {tmp_path}/web']


@pytest.mark.parametrize(('text', 'reason'), [
    ('echo disk full\nexit 3\n', 'exit status 3: disk full'), ('exec sleep 600\n', 'timed out')])
def test_a_core_dump_that_fails(text: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason == 'timed out':
        monkeypatch.setattr(coredump, 'GCORE_SECONDS', 0.2)
    assert dump_core(write_script(tmp_path / 'gcore', text)) == [
        f'unable to write a core dump of web: {tmp_path}/gcore {tmp_path}/web {PID}: {reason}']
