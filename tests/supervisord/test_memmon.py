"""memmon with a real supervisord: which processes it restarts, a child process, its exit, and --once.

Each decision and each fault is in tests/unit. Except for the child process, ps prints what the test says.
"""
from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import pytest
from inbox import CommandInbox
from support import Listener, Proxy, Supervisord, find_children, run_command_line, wait_for, write_script

PROGRAMS = """
[program:web]
command=sleep 1000
startsecs=0
[program:foo]
command=sleep 1000
startsecs=0
[program:barfoo]
process_name=foo
command=sleep 1000
startsecs=0
[program:x]
command=sleep 1000
startsecs=0
[group:bar]
programs=barfoo,x
[program:pool]
process_name=%(program_name)s_%(process_num)d
numprocs=2
command=sleep 1000
startsecs=0
[program:off]
command=sleep 1000
autostart=false
"""
ALL = ['web:web', 'foo:foo', 'bar:foo', 'bar:x', 'pool:pool_0', 'pool:pool_1']
USED_KIB = 300


@pytest.fixture(scope='module')
def supervisord(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisord]:
    with Supervisord(tmp_path_factory.mktemp('memmon'), PROGRAMS) as running:
        yield running


class World:
    """supervisord behind a proxy that counts calls, a ps that prints what the test says, and an inbox."""

    def __init__(self, folder: Path, supervisord: Supervisord, proxy: Proxy) -> None:
        self.supervisord = supervisord
        self.proxy = proxy
        self.inbox = CommandInbox(folder)
        self._ps = folder / 'ps.txt'
        self.path = f"{folder}:{os.environ['PATH']}"
        write_script(folder / 'ps', f'[ "$*" = "-A -o pid= -o ppid= -o rss=" ] && exec cat {self._ps}\n')
        self.pids = {name: supervisord.wait_for_state(name)['pid'] for name in ALL}

    def show(self, used_kib: dict[str, int], *others: str) -> None:
        """Let ps print what processes use, by name, and other lines; all others use nothing."""
        lines = ['1 0 4', f'{self.supervisord.pid} 1 4']
        lines += [f'{pid:5} {self.supervisord.pid} {used_kib.get(name, 0)}' for name, pid in self.pids.items()]
        self._ps.write_text('\n'.join([*lines, *others]) + '\n', 'utf-8')

    @contextmanager
    def memmon(self, *arguments: str) -> Iterator[Listener]:
        """Run a memmon that has checked what it checks at start."""
        with Listener(['memmon', '-m', 'bob@example.com', '-s', self.inbox.command, *arguments], {
                'SUPERVISOR_SERVER_URL': self.proxy.url, 'PATH': self.path}) as listener:
            listener.serve_event('SUPERVISOR_STATE_CHANGE_RUNNING', '')
            del self.proxy.calls[:]
            yield listener

    def find_restarted(self) -> list[str]:
        """Return the names of the processes that have another pid than at the start of the test."""
        return [name for name in ALL if self.supervisord.info(name)['pid'] != self.pids[name]]


@pytest.fixture
def world(tmp_path: Path, supervisord: Supervisord) -> Iterator[World]:
    with Proxy(tmp_path / 'p.sock', supervisord.socket, {}) as proxy:
        yield World(tmp_path, supervisord, proxy)


def test_processes_over_their_most_specific_limit_are_restarted_and_mailed(world: World) -> None:
    world.show({})
    with world.memmon('-a', '100KB', '-p', 'web=1MB', '-g', 'bar=1MB', '-p', 'bar:x=100KB', '-p', 'pool=1MB',
                      '-n', 'db1') as listener:
        listener.tick()
        assert world.proxy.calls == []      # all is well
        world.show(dict.fromkeys(ALL, USED_KIB))
        listener.tick()
        assert world.find_restarted() == ['foo:foo', 'bar:x']
        assert world.proxy.calls.count('stopProcess') == world.proxy.calls.count('startProcess') == 2
        reason = f"restarted bar:x (pid {world.pids['bar:x']}: 300.0KB, over its limit of 100.0KB)"
        assert f'memmon: {reason}\n' in listener.log
        assert listener.log.count('memmon: restarted ') == 2
        mails = {str(mail['Subject']): mail for mail in world.inbox.wait(2)}
        assert listener.close() == 0
    assert sorted(mails) == ['memmon [db1]: process bar:x restarted', 'memmon [db1]: process foo:foo restarted']
    mail = mails['memmon [db1]: process bar:x restarted']
    assert mail['To'] == 'bob@example.com'
    assert mail.get_content().startswith(f'{reason}\n\nProgram: x\nGroup: bar\nUptime: ')
    assert 'supervisor supervisor\n' in mail.get_content()      # the identifier in the event's header


def test_cumulative_counts_a_real_child(tmp_path: Path) -> None:
    """The child uses the memory, and ps is the real one."""
    (tmp_path / 'use.py').write_text(
        'import time; x = bytearray(60 * 1024 ** 2); open("ready", "w"); time.sleep(1000)', 'utf-8')
    program = "[program:family]\ncommand=sh -c 'PYTHON use.py & wait'\nstartsecs=0\nstopasgroup=true\n"
    with Supervisord(tmp_path, program) as supervisord:
        pid = supervisord.wait_for_state('family')['pid']
        wait_for((tmp_path / 'ready').exists, 'child')
        with Listener(['memmon', '-a', '50MB', '--cumulative'], supervisord.environment) as listener:
            listener.tick()
            assert supervisord.info('family')['pid'] not in (0, pid), listener.log
            assert listener.close() == 0
        assert len(find_children(supervisord.pid)) == 1


def test_process_left_down_is_started_when_the_listener_exits(world: World) -> None:
    world.show({'foo:foo': USED_KIB})
    world.proxy.rules.update(startProcess=['lose call'], getProcessInfo=['pass', 'lose call', 'lose call'])
    with world.memmon('-a', '100KB') as listener:
        listener.tick()
        assert 'memmon: failed to start foo' in listener.log
        assert world.supervisord.info('foo')['statename'] == 'STOPPED'
        assert listener.terminate() == 0
        pid = world.pids['foo:foo']
        assert f'memmon: restarted foo: supervisord has accepted the start (pid {pid}: ' in listener.log
    assert world.supervisord.info('foo')['statename'] in ('STARTING', 'RUNNING')


def test_once_prints_a_table_and_restarts_nothing(world: World) -> None:
    world.show({**dict.fromkeys(ALL, USED_KIB), 'web:web': 90}, f"900001 {world.pids['web:web']} 60")
    # As supervisorctl does, it finds supervisord.conf in the current folder.
    printed = run_command_line('memmon', '--once', '-c', '-p', 'web=140KB', '-g', 'bar=300KB', '-p', 'pool=2MB',
                               '-p', 'wbe=1KB', folder=world.supervisord.folder, PATH=world.path)
    assert (printed.returncode, printed.stderr) == (1, '')
    lines = printed.stdout.splitlines()
    table = [line.split(None, 5) for line in lines if line.count('  ')]
    assert table[0] == ['GROUP', 'PROCESS', 'PID', 'MEMORY', 'LIMIT', 'VERDICT']
    pids = {name: str(pid) for name, pid in world.pids.items()}
    assert {f'{row[0]}:{row[1]}': row[2:] for row in table[1:]} == {
        'bar:foo': [pids['bar:foo'], '300.0KB', '300.0KB', 'ok'],
        'bar:x': [pids['bar:x'], '300.0KB', '300.0KB', 'ok'],
        'foo:foo': [pids['foo:foo'], '300.0KB', '-', 'not watched'],
        'off:off': ['-', '-', '-', 'not running (STOPPED)'],
        'pool:pool_0': [pids['pool:pool_0'], '300.0KB', '2.0MB', 'ok'],
        'pool:pool_1': [pids['pool:pool_1'], '300.0KB', '2.0MB', 'ok'],
        'web:web': [pids['web:web'], '150.0KB', '140.0KB', 'over its limit: would be restarted'],
    }
    assert lines[len(table):] == ['no process is named "pool"; using all processes of group "pool"',
                                  'warning: no process matches "wbe"']
    assert world.find_restarted() == []
