"""memmon with a real supervisord. ps prints what the test says that the processes use."""
from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, List, Sequence, SupportsIndex

import pytest
from inbox import CommandInbox
from support import (
    Listener,
    Proxy,
    Supervisord,
    find_children,
    run_command_line,
    wait_for,
    write_script,
)

from superlance import __version__

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
[program:stubborn]
command=sh -c 'trap "" TERM; touch %(here)s/deaf; while [ ! -e %(here)s/end ]; do sleep 0.05; done'
startsecs=0
autostart=false
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
        self.folder = folder
        self._ps = folder / 'ps.txt'
        write_script(folder / 'ps', f'[ "$*" = "-A -o pid= -o ppid= -o rss=" ] && exec cat {self._ps}\n')
        for name in ALL:
            if supervisord.info(name)['statename'] != 'RUNNING':
                supervisord.rpc.startProcess(name)
        self.pids = {name: supervisord.info(name)['pid'] for name in ALL}
        self.show({name: USED_KIB for name in ALL})

    def show(self, used_kib: dict[str, int], others: Sequence[str] = ()) -> None:
        """Let ps print what processes use, by name, and other lines; all others use nothing."""
        lines = ['1 0 4', f'{self.supervisord.pid} 1 4']
        lines += [f'{pid:5} {self.supervisord.pid} {used_kib.get(name, 0)}' for name, pid in self.pids.items()]
        self.print('\n'.join([*lines, *others]) + '\n')

    def print(self, text: str) -> None:
        self._ps.write_text(text, 'utf-8')

    @property
    def path(self) -> str:
        return f"{self.folder}:{os.environ['PATH']}"

    @contextmanager
    def memmon(self, *arguments: str, group: str = 'listener') -> Iterator[Listener]:
        """Run a memmon that has checked what it checks at start."""
        with Listener(['memmon', '-m', 'bob@example.com', '-s', self.inbox.command, *arguments], {
                'SUPERVISOR_SERVER_URL': self.proxy.url, 'SUPERVISOR_GROUP_NAME': group,
                'PATH': self.path}) as listener:
            listener.serve_event('SUPERVISOR_STATE_CHANGE_RUNNING', '')
            del self.proxy.calls[:]
            yield listener
            assert listener.close() == 0

    def find_restarted(self) -> list[str]:
        """Return the names of the processes that have another pid than at the start of the test."""
        return [name for name in ALL if self.supervisord.info(name)['pid'] != self.pids[name]]


@pytest.fixture
def world(tmp_path: Path, supervisord: Supervisord) -> Iterator[World]:
    with Proxy(tmp_path / 'p.sock', supervisord.socket, {}) as proxy:
        yield World(tmp_path, supervisord, proxy)


def get_messages(log: str) -> list[str]:
    """Return the lines of a log without the time, the program and the first line."""
    lines = [line.partition(' memmon: ')[2] for line in log.splitlines()]
    assert lines[0].startswith(f'memmon {__version__}: ')
    return lines[1:]


@pytest.mark.parametrize(('argv', 'restarted'), [
    (['-a', '100KB'], ALL),
    (['-a', '300KB', '-v'], []),
    (['-p', 'foo=100KB'], ['foo:foo', 'bar:foo']),
    (['-p', 'pool=100KB'], ['pool:pool_0', 'pool:pool_1']),
    (['-p', 'bar=1MB', '-g', 'bar=100KB'], ['bar:foo', 'bar:x']),
    (['-a', '100KB', '-p', 'web=1MB', '-g', 'bar=1MB', '-p', 'bar:x=100KB', '-p', 'pool=1MB'], ['foo:foo', 'bar:x']),
    (['-a', '1KB', '-g', 'bar=2KB', '-p', 'bar:*=3KB', '-p', 'foo=4KB', '-p', 'bar:foo=5KB'], ALL),
])
def test_which_processes_are_restarted(world: World, argv: list[str], restarted: list[str]) -> None:
    with world.memmon(*argv) as listener:
        listener.tick()
        assert world.find_restarted() == restarted
        # Whatever limits match, each is restarted once.
        assert world.proxy.calls.count('stopProcess') == world.proxy.calls.count('startProcess') == len(restarted)
        assert listener.close() == 0
        assert listener.log.count('memmon: restarted ') == len(restarted)
    assert sorted(world.inbox.subjects) == sorted(f'memmon: process {name} restarted' for name in restarted)


def test_log_and_mail_say_what_a_process_used_and_its_uptime(world: World) -> None:
    with world.memmon('-p', 'bar:x=100KB', '-n', 'db1') as listener:
        listener.tick()
        reason = f"restarted bar:x (pid {world.pids['bar:x']}: 300.0KB, over its limit of 100.0KB)"
        listener.wait_for_log(f'memmon: {reason}\n')
        mail = world.inbox.wait()[0]
    body = mail.get_content()
    assert mail['To'] == 'bob@example.com'
    assert mail['Subject'] == 'memmon [db1]: process bar:x restarted'
    assert body.startswith(f'{reason}\n\nProgram: x\nGroup: bar\nUptime: ')
    assert 'supervisor supervisor\n' in body  # the identifier in the event's header


def test_own_pool_is_left_alone(world: World) -> None:
    with world.memmon('-a', '100KB', '-p', 'bar:x=100KB', group='bar') as listener:
        listener.tick()
        assert world.find_restarted() == ['web:web', 'foo:foo', 'pool:pool_0', 'pool:pool_1']


def begin_to_stop(world: World, supervisord: Supervisord) -> Path:
    """Make a process STOPPING, until the file of the returned name exists."""
    end, deaf = supervisord.folder / 'end', supervisord.folder / 'deaf'
    for path in (end, deaf):
        if path.exists():
            path.unlink()
    supervisord.rpc.startProcess('stubborn')
    wait_for(deaf.exists)
    world.pids['stubborn'] = supervisord.info('stubborn')['pid']
    supervisord.rpc.stopProcess('stubborn', False)
    supervisord.wait_for_state('stubborn', 'STOPPING')
    return end


def test_stopping_process_is_left_alone(world: World, supervisord: Supervisord) -> None:
    end = begin_to_stop(world, supervisord)
    world.show({'stubborn': USED_KIB})
    try:
        with world.memmon('-a', '100KB') as listener:
            listener.tick()
            assert supervisord.info('stubborn')['statename'] == 'STOPPING'
            assert listener.close() == 0
            assert get_messages(listener.log) == []
            assert world.proxy.calls == ['getAllProcessInfo']
        printed = run_memmon_once(world, '-a', '100KB')
    finally:
        end.touch()
        supervisord.wait_for_state('stubborn', 'STOPPED')
    assert printed.returncode == 0
    assert read_rows(printed.stdout)['stubborn:stubborn'][3] == 'over its limit: left alone (STOPPING)'


def test_healthy_tick_makes_no_call_to_supervisord(world: World) -> None:
    with world.memmon('-a', '300KB') as listener:
        for _ in range(3):
            listener.tick()
        assert world.proxy.calls == []


def test_foreign_process_over_the_limit_costs_one_call(world: World) -> None:
    with world.memmon('-a', '400KB') as listener:
        world.show({}, [f'{os.getpid()} 1 900'])
        for _ in range(3):
            listener.tick()
        assert world.proxy.calls == ['getAllProcessInfo']
        world.show({'web:web': 500}, [f'{os.getpid()} 1 900'])
        listener.tick()
        assert world.find_restarted() == ['web:web']


def test_cumulative_finds_a_real_child(tmp_path: Path) -> None:
    """The child uses the memory, and ps is the real one."""
    (tmp_path / 'use.py').write_text(
        'import time; x = bytearray(60 * 1024 ** 2); open("ready", "w"); time.sleep(1000)', 'utf-8')
    program = "[program:family]\ncommand=sh -c 'PYTHON use.py & wait'\nstartsecs=0\nstopasgroup=true\n"
    with Supervisord(tmp_path, program) as supervisord:
        pid = supervisord.wait_for_state('family')['pid']
        wait_for((tmp_path / 'ready').exists, 'child')
        with Listener(['memmon', '-a', '50MB'], supervisord.environment) as listener:
            listener.tick()
            assert supervisord.info('family')['pid'] == pid, listener.log
        with Listener(['memmon', '-a', '50MB', '--cumulative'], supervisord.environment) as listener:
            listener.tick()
            assert supervisord.wait_for_restart('family', pid), listener.log
        assert len(find_children(supervisord.pid)) == 1


def test_samples_start_again_after_a_restart_that_failed(world: World) -> None:
    world.show({'web:web': USED_KIB})
    world.proxy.rules['getProcessInfo'] = ['lose call'] * 9
    with world.memmon('-a', '100KB', '--samples=2') as listener:
        for number in range(1, 5):
            listener.tick()
            wait_for(lambda: listener.log.count('failed to stop web') >= number // 2, 'log')
        listener.close()
        assert listener.log.count('memmon: failed to stop web') == 2
    assert world.inbox.subjects == ['memmon: failed to stop process web:web'] * 2


def test_max_restarts(world: World) -> None:
    with world.memmon('-a', '100KB', '--max-restarts=2/1h') as listener:
        seen = []
        for _ in range(4):
            world.pids['web:web'] = world.supervisord.info('web')['pid']
            world.show({'web:web': USED_KIB})
            listener.tick()
            seen.append(world.find_restarted())
        assert seen == [['web:web'], ['web:web'], [], []]
        world.show({'foo:foo': USED_KIB})   # another process has a count of its own
        listener.tick()
        assert world.find_restarted() == ['foo:foo']
        listener.close()
        assert listener.log.count('restart limit reached (2 in 1h)') == 1
    assert world.inbox.subjects == ['memmon: process web:web restarted', 'memmon: process web:web restarted',
                                    'memmon: process web:web left alone', 'memmon: process foo:foo restarted']


def test_dry_run_is_reported_once_and_restarts_nothing(world: World) -> None:
    with world.memmon('-p', 'web=100KB', '--dry-run') as listener:
        for _ in range(2):
            listener.tick()
        listener.close()
        line = f"dry run: would have restarted web (pid {world.pids['web:web']}: 300.0KB, over its limit of 100.0KB)"
        assert get_messages(listener.log)[0] == line
        assert listener.log.count(line) == 1
        assert world.find_restarted() == []
        assert 'stopProcess' not in world.proxy.calls
    assert world.inbox.subjects == ['memmon: dry run: process web:web not restarted']
    assert world.inbox.mails[0].get_content().startswith(line)


@pytest.mark.parametrize(('output', 'reason'), [
    ('', 'ps printed no process'),
    ('1 0 12m\n', "ps printed '1 0 12m' instead of"),
])
def test_useless_ps_is_logged_and_proc_is_read_instead(world: World, output: str, reason: str) -> None:
    with world.memmon('-p', 'web=1KB', '-p', 'bar:foo=1KB') as listener:
        world.print(output)
        listener.tick()
        assert world.find_restarted() == ['web:web', 'bar:foo']     # really, sleep uses more than that
        world.show({})
        listener.tick()
        listener.close()
        assert listener.log.count('reading memory from /proc from now on') == 1
        assert reason in listener.log
        assert listener.log.count('memmon: restarted web') == 2


def test_supervisord_that_does_not_answer_is_logged_and_nothing_is_restarted(world: World) -> None:
    with world.memmon('-a', '100KB') as listener:
        world.proxy.rules['getAllProcessInfo'] = ['lose call']
        listener.tick()
        listener.wait_for_log(f'memmon: unable to check memory: supervisord at {world.proxy.url} does not answer '
                              'getAllProcessInfo')
        assert world.find_restarted() == []
        listener.tick()
        assert world.find_restarted() == ALL


def test_process_whose_start_was_lost_is_started_at_the_next_tick(world: World) -> None:
    world.show({'web:web': USED_KIB})
    world.proxy.rules.update(startProcess=['lose call'], getProcessInfo=['pass', 'lose call', 'lose call'])
    with world.memmon('-a', '100KB') as listener:
        listener.tick()
        listener.wait_for_log('memmon: failed to start web')
        assert world.supervisord.info('web')['statename'] == 'STOPPED'
        listener.tick()
        assert world.supervisord.wait_for_state('web')
        listener.close()
    assert world.inbox.subjects == ['memmon: failed to start process web:web', 'memmon: process web:web restarted']
    body = world.inbox.mails[1].get_content()
    assert body.startswith('restarted web')
    assert f"(pid {world.pids['web:web']}: 300.0KB, over its limit of 100.0KB)\n" in body


def test_process_left_down_is_started_when_the_listener_exits(world: World) -> None:
    world.show({'foo:foo': USED_KIB, 'web:web': 2 * USED_KIB})
    with world.memmon('-a', '100KB', '-p', 'web=400KB') as listener:
        # foo is the last: supervisord sorts its list by group.
        world.proxy.rules.update(startProcess=['lose call'], getProcessInfo=['pass', 'lose call', 'lose call'])
        listener.tick()
        assert world.supervisord.info('foo')['statename'] == 'STOPPED'
        assert listener.terminate() == 0
        wait_for(lambda: world.supervisord.info('foo')['statename'] == 'RUNNING', 'foo')
        # Each with its own reason.
        assert f"(pid {world.pids['foo:foo']}: 300.0KB, " in listener.log
        listener.wait_for_log(f"memmon: restarted web (pid {world.pids['web:web']}: 600.0KB, ")


def test_tick_from_before_the_end_of_a_restart_is_skipped(world: World) -> None:
    with world.memmon('-a', '100KB') as listener:
        sent = time.time() - 1
        world.show({'web:web': USED_KIB})
        listener.tick()
        world.show({'foo:foo': USED_KIB})
        listener.serve_event('TICK_5', f'when:{int(sent)}')
        assert world.find_restarted() == ['web:web']
        listener.tick()
        assert world.find_restarted() == ['web:web', 'foo:foo']


class Meanwhile(List[str]):
    """A rule of the proxy that does something before the call continues."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__(['pass'])
        self._act = act

    def pop(self, index: SupportsIndex = -1) -> str:
        self._act()
        return super().pop(index)


def test_process_that_somebody_restarts_meanwhile_is_left_alone(world: World) -> None:
    def restart() -> None:
        world.supervisord.rpc.stopProcess('web')
        world.supervisord.rpc.startProcess('web')

    world.show({'web:web': USED_KIB})
    world.proxy.rules['getProcessInfo'] = Meanwhile(restart)
    with world.memmon('-a', '100KB') as listener:
        listener.tick()
        listener.close()
        assert listener.log.count(' left web alone: it is now RUNNING with pid ') == 1
        assert 'stopProcess' not in world.proxy.calls
    assert world.inbox.subjects == []


def test_signal_lets_the_restart_finish_and_none_begin_after_it(world: World) -> None:
    with world.memmon('-a', '100KB') as listener:
        world.proxy.rules['stopProcess'] = Meanwhile(lambda: listener.process.send_signal(signal.SIGTERM))
        listener.expect(b'READY\n')
        listener.send_event('TICK_5', f'when:{int(time.time() + 1)}')
        listener.expect(b'RESULT 2\nOK')
        assert listener.process.wait(10) == 0
        assert len(world.find_restarted()) == 1
        assert {world.supervisord.info(name)['statename'] for name in ALL} <= {'STARTING', 'RUNNING'}


# From the command line.

memmon_once = partial(run_command_line, 'memmon', '--once')


def read_rows(printed: str) -> dict[str, list[str]]:
    """Return the rows of the table by group and process."""
    rows = [line.split(None, 5) for line in printed.splitlines() if line.count('  ')]
    assert rows[0] == ['GROUP', 'PROCESS', 'PID', 'MEMORY', 'LIMIT', 'VERDICT']
    return {f'{row[0]}:{row[1]}': row[2:] for row in rows[1:]}


def run_memmon_once(world: World, *arguments: str) -> subprocess.CompletedProcess[str]:
    return memmon_once(*arguments, folder=world.folder, SUPERVISOR_SERVER_URL=world.proxy.url, PATH=world.path)


def test_once_prints_a_table(world: World) -> None:
    printed = run_memmon_once(world, '-p', 'web=1MB', '-g', 'bar=300KB', '-p', 'pool=2MB')
    assert (printed.returncode, printed.stderr) == (0, '')
    pids = {name: str(pid) for name, pid in world.pids.items()}
    assert read_rows(printed.stdout) == {
        'bar:foo': [pids['bar:foo'], '300.0KB', '300.0KB', 'ok'],
        'bar:x': [pids['bar:x'], '300.0KB', '300.0KB', 'ok'],
        'foo:foo': [pids['foo:foo'], '300.0KB', '-', 'not watched'],
        'off:off': ['-', '-', '-', 'not running (STOPPED)'],
        'pool:pool_0': [pids['pool:pool_0'], '300.0KB', '2.0MB', 'ok'],
        'pool:pool_1': [pids['pool:pool_1'], '300.0KB', '2.0MB', 'ok'],
        'stubborn:stubborn': ['-', '-', '-', 'not running (STOPPED)'],
        'web:web': [pids['web:web'], '300.0KB', '1.0MB', 'ok'],
    }
    assert printed.stdout.splitlines()[-1] == 'no process is named "pool"; using all processes of group "pool"'


def test_once_finds_a_process_over_its_limit_and_restarts_nothing(world: World) -> None:
    printed = run_memmon_once(world, '-p', 'web=100KB', '-m', 'bob@example.com', '-s', world.inbox.command)
    assert (printed.returncode, printed.stderr) == (1, '')
    assert read_rows(printed.stdout)['web:web'][3] == 'over its limit: would be restarted'
    assert world.find_restarted() == []
    assert set(world.proxy.calls) == {'getAllConfigInfo', 'getAllProcessInfo'}
    assert world.inbox.subjects == []


def test_once_with_a_name_that_matches_nothing(world: World) -> None:
    printed = run_memmon_once(world, '-p', 'wbe=1MB', '-a', '1MB', 'stray')
    assert printed.returncode == 1
    assert printed.stdout.splitlines()[-2:] == [
        "warning: ignored argument 'stray': memmon takes options only; a value that contains spaces needs quotes",
        'warning: no process matches "wbe"']


def test_once_includes_descendants(world: World) -> None:
    world.show({'web:web': 90}, [f"900001 {world.pids['web:web']} 60"])
    assert run_memmon_once(world, '-a', '100KB').returncode == 0
    printed = run_memmon_once(world, '-a', '100KB', '-c')
    assert printed.returncode == 1
    assert read_rows(printed.stdout)['web:web'][1] == '150.0KB'


def test_once_with_memory_that_cannot_be_read(world: World) -> None:
    world.print(f"1 0 4\n{world.pids['foo:foo']} 1 4\n")
    printed = run_memmon_once(world, '-p', 'web=1MB', '-p', 'foo:foo=1MB')
    assert printed.returncode == 1
    assert read_rows(printed.stdout)['web:web'][3] == 'unable to read its memory'
    assert printed.stdout.splitlines()[-1].startswith('warning: unable to read the memory of web: ')
    assert run_memmon_once(world, '-p', 'foo:foo=1MB').returncode == 0


def test_once_finds_supervisord_through_its_configuration(world: World, supervisord: Supervisord) -> None:
    printed = memmon_once('-a', '1MB', '--configuration', str(supervisord.configuration), folder=world.folder,
                          PATH=world.path)
    assert (printed.returncode, printed.stderr) == (0, '')
    assert read_rows(printed.stdout)['web:web'][0] == str(world.pids['web:web'])
    # As supervisorctl does, it looks for supervisord.conf in the current folder too.
    printed = memmon_once('-a', '1MB', folder=supervisord.folder, PATH=world.path)
    assert read_rows(printed.stdout)['web:web'][0] == str(world.pids['web:web'])
