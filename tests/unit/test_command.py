"""Commands with a deadline."""
from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Sequence

import pytest
from support import TIMEOUT, is_alive, read, wait_for, write_script
from table import for_each

from superlance import command as module
from superlance.command import CommandFailed, Deadline, is_command, run_command
from superlance.listener import ExitRequest


def within(seconds: float = TIMEOUT) -> Deadline:
    return Deadline(seconds)


@pytest.mark.parametrize(('command', 'message', 'output'), [
    ('echo out; echo err >&2', b'', b'out\nerr\n'),
    (['echo', 'a b', '$HOME', '*', ';'], b'', b'a b $HOME * ;\n'),
    ('cat', b'', b''),
    ('cat', b'one\ntwo\xff\0', b'one\ntwo\xff\0'),
    (['printf', 'größe'], b'', 'größe'.encode()),
    (['printf', '\udcff'], b'', b'\xff'),
    ('printf größe', b'', 'größe'.encode()),
    # It need not read the message, and may read it late or slowly: a pipe has a capacity of 64 KiB.
    ('true', b'x' * 1000000, b''),
    ('head -c 3', b'x' * 1000000, b'xxx'),
    ('exec <&-; sleep 0.3; echo done', b'x' * 1000000, b'done\n'),
    ('sleep 0.2; wc -c', b'x' * 300000, b'300000\n'),
    ('head -c 100000 >/dev/null; sleep 0.2; head -c 100000 >/dev/null; sleep 0.2; wc -c', b'x' * 300000, b'100000\n'),
    # It may print more than the capacity of a pipe, early, late, or close its output.
    ('head -c 1000000 /dev/zero', b'', b'\0' * 1000000),
    ('printf early; sleep 0.2; printf late', b'', b'earlylate'),
    ('printf early; exec >&- 2>&-; sleep 0.2', b'', b'early'),
    ('exec >&- 2>&-; sleep 0.2; wc -c >/dev/null', b'x' * 100000, b''),
    ('cat; sleep 0.2; echo', b'x' * 1000000, b'x' * 1000000 + b'\n'),
], ids=lambda value: repr(value)[:60])
def test_output_of_a_command(command: str | Sequence[str], message: bytes, output: bytes) -> None:
    found = run_command(command, within().seconds_left, message)
    assert found == output, (len(found), found[-99:])


@for_each('command, failure', [
    ('exit 3', 'exit 3: exit status 3'),
    ('echo one; echo two >&2; exit 75', 'echo one; echo two >&2; exit 75: exit status 75: one | two'),
    (['sh', '-c', 'kill -9 $$'], 'sh -c kill -9 $$: terminated by signal 9'),
    (['/nonexistent/ps', '-A'], '/nonexistent/ps -A: No such file or directory'),
    (['/'], '/: Permission denied'),
    (['a\0b'], 'a\0b: embedded null byte'),
    ('/nonexistent/ps 2>/dev/null', '/nonexistent/ps 2>/dev/null: exit status 127'),
    ("printf '\\377\\033[2J'; false", "printf '\\377\\033[2J'; false: exit status 1: \ufffd\\x1b[2J"),
])
def test_failure_has_status_and_output(command: str | Sequence[str], failure: str) -> None:
    with pytest.raises(CommandFailed) as error:
        run_command(command, within().seconds_left, b'message')
    assert str(error.value) == failure


def test_failure_shows_a_name_instead_of_the_command() -> None:
    with pytest.raises(CommandFailed, match=r'^the mail command: exit status 3$'):
        run_command(': secret; exit 3', within().seconds_left, shown='the mail command')


def test_failure_quotes_the_end_of_the_output() -> None:
    with pytest.raises(CommandFailed) as error:
        run_command('seq 100000; false', within().seconds_left)
    assert str(error.value).endswith(' | 99999 | 100000') and len(str(error.value)) < 5000


def test_command_gets_the_given_environment() -> None:
    assert run_command('echo "$LC_ALL $OTHER"', within().seconds_left, environment={'LC_ALL': 'C'}) == b'C \n'


def test_command_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    pids = tmp_path / 'pids'
    with pytest.raises(CommandFailed, match=r': timed out: starting$'):
        run_command(f"echo starting; sleep 99 & echo $! >> '{pids}'; echo $$ >> '{pids}'; wait",
                    lambda: 0.0 if read(pids).count('\n') == 2 else 9.0)
    for pid in map(int, read(pids).split()):
        wait_for(lambda: not is_alive(pid))


@pytest.mark.parametrize('command', ['exec >&- 2>&- <&-; sleep 99', 'cat >/dev/null; sleep 99', 'sleep 99'])
def test_deadline_applies_whatever_the_command_has_closed(command: str) -> None:
    with pytest.raises(CommandFailed, match='timed out'):
        run_command(command, within(0.2).seconds_left, b'x' * 100000)


def test_deadline_may_have_passed_already() -> None:
    with pytest.raises(CommandFailed, match='timed out'):
        run_command('sleep 99', lambda: -1.0)


def test_deadline_may_be_moved_while_the_command_runs() -> None:
    left = [math.inf, math.inf, math.inf, 0.0]
    with pytest.raises(CommandFailed, match='timed out'):
        run_command('sleep 99', lambda: left.pop(0) if len(left) > 1 else left[0])


def test_request_to_exit_interrupts_a_command_that_allows_it() -> None:
    request = ExitRequest()
    request.requested = True
    with pytest.raises(CommandFailed, match=r'^sleep 99: interrupted, because the listener is shutting down$'):
        run_command('sleep 99', within().seconds_left, interrupt=request)
    assert run_command('echo done', within().seconds_left) == b'done\n'


def test_command_with_endless_output_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'OUTPUT_LIMIT_BYTES', 1000000)
    with pytest.raises(CommandFailed, match=r'^yes: printed more than 1000000 bytes: y \| y'):
        run_command('yes', within().seconds_left)


def test_command_has_finished_although_a_child_of_it_runs_on(tmp_path: Path) -> None:
    pid = tmp_path / 'pid'
    assert run_command(f"sleep 99 & echo $! > '{pid}'; printf all", within().seconds_left) == b'all'
    child = int(read(pid))
    assert is_alive(child)
    os.kill(child, signal.SIGKILL)


def test_child_that_runs_on_and_prints_delays_nothing(tmp_path: Path) -> None:
    pid = tmp_path / 'pid'
    output = run_command(f"yes & echo $! > '{pid}'; printf all", within().seconds_left)
    assert len(output) < module.OUTPUT_LIMIT_BYTES
    # Nobody reads its output any more, so a broken pipe ends it.
    wait_for(lambda: not is_alive(int(read(pid))))


def test_exception_while_a_command_runs_kills_it(tmp_path: Path) -> None:
    pid = tmp_path / 'pid'

    def seconds_left() -> float:
        if read(pid).endswith('\n'):
            raise KeyError
        return 9.0

    with pytest.raises(KeyError):
        run_command(f"echo $$ > '{pid}'; sleep 99", seconds_left)
    assert not is_alive(int(read(pid)))


def test_command_that_cannot_be_killed_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a command that sudo runs as another user."""
    pid = tmp_path / 'pid'

    def refuse(group: int, signum: int) -> None:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(os, 'killpg', refuse)
        patch.setattr(module, 'KILL_SECONDS', 0.1)
        with pytest.raises(CommandFailed, match='timed out'):
            run_command(f"echo $$ > '{pid}'; exec sleep 99", lambda: 0.0 if read(pid).endswith('\n') else 9.0)
    left = int(read(pid))
    assert is_alive(left)
    os.kill(left, signal.SIGKILL)
    wait_for(lambda: not is_alive(left))


def test_commands_leave_no_descriptor_and_no_zombie() -> None:
    before = set(os.listdir('/dev/fd'))
    for command in ('true', 'cat', ['/nonexistent'], 'exit 3', 'exec >&-', 'sleep 99'):
        try:
            run_command(command, within(0.2).seconds_left, b'message')
        except CommandFailed:
            continue
    assert set(os.listdir('/dev/fd')) <= before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_deadline_counts_down(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 5000.0
    monkeypatch.setattr(module, 'time', SimpleNamespace(monotonic=lambda: now))
    deadline = Deadline(10)
    assert deadline.seconds_left() == 10
    now += 11
    assert deadline.seconds_left() == -1


def test_command_is_an_executable_file_by_path_or_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_script(tmp_path / 'tool', 'true\n')
    (tmp_path / 'text').touch()
    (tmp_path / 'folder').mkdir()
    monkeypatch.setenv('PATH', f'/nonexistent:{tmp_path}')
    found = {word: is_command(word) for word in (
        'tool', 'text', 'folder', 'none', str(tmp_path / 'tool'), str(tmp_path / 'text'), str(tmp_path / 'none'), '')}
    assert [word for word, is_found in found.items() if is_found] == ['tool', str(tmp_path / 'tool')]
