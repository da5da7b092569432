"""memmon: its limits, how it reads memory, which process it restarts, and what it tells of that."""
from __future__ import annotations

import os
import subprocess
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, List, Sequence, SupportsIndex

import pytest
from inbox import CommandInbox
from support import PYTHON, Listener, Proxy, Supervisord, find_children, read, run_by_hand, wait_for, write_script

from superlance import mail, memmon
from superlance.listener import make_log
from superlance.memmon import Limit, Usage
from superlance.options import Rate, read_argv
from superlance.processes import EVERY, RESTARTED, RUNNING, STOPPED, STOPPING, CantTell, Name, Outcome, Process

KB, MB, GB = 1024, 1024 ** 2, 1024 ** 3


# Options.

PROGRAM_LIMITS = [
    ('foo=200MB', Limit(Name(None, 'foo'), 200 * MB)),
    ('foo=4096', Limit(Name(None, 'foo'), 4096)),
    ('foo=1.5g', Limit(Name(None, 'foo'), 3 * GB // 2)),
    (' foo = 1 KB ', Limit(Name(None, 'foo'), KB)),
    ('foo:bar=1kb', Limit(Name('foo', 'bar'), KB)),
    ('foo:*=1TB', Limit(Name('foo', None), 1024 * GB)),
    ('foo:=1m', Limit(Name('foo', None), MB)),
    ('a=b=1MB', Limit(Name(None, 'a=b'), MB)),
    ('größe=1MB', Limit(Name(None, 'größe'), MB)),
]
GROUP_LIMITS = [
    ('bar=200MB', Limit(Name('bar', None), 200 * MB)),
    (' bar = 1 KB ', Limit(Name('bar', None), KB)),
    ('größe=0', Limit(Name('größe', None), 0)),
]
NO_LIMITS = [
    (['-p', 'foo'], "option -p: 'foo' has no size; write NAME=SIZE, as in name=200MB"),
    (['--program', '=1MB'], "option --program: '=1MB' has no name; write NAME=SIZE, as in name=200MB"),
    (['-p', 'foo='], "option -p: '' is not a size; write bytes, or a number with KB, MB, GB or TB, as in 200MB"),
    (['-p', 'foo=-1'], "option -p: '-1' is not a size; write bytes, or a number with KB, MB, GB or TB, as in 200MB"),
    (['-p', 'foo=1PB'], "option -p: '1PB' is not a size; write bytes, or a number with KB, MB, GB or TB, as in 200MB"),
    (['-p', '*=1MB'], "option -p: '*' is not a process name; write program, group:program or group:*"),
    (['-p', ':bar=1MB'], "option -p: ':bar' is not a process name; write program, group:program or group:*"),
    (['-p', 'a:b:c=1MB'], "option -p: 'a:b:c' is not a process name; write program, group:program or group:*"),
    (['-g', 'bar'], "option -g: 'bar' has no size; write GROUP=SIZE, as in group=200MB"),
    (['-g', '=1MB'], "option -g: '=1MB' has no name; write GROUP=SIZE, as in group=200MB"),
    (['-g', ' =1MB'], "option -g: ' ' is not a group's name; write GROUP=SIZE, as in group=200MB"),
    (['-g', 'bar:*=1MB'], "option -g: 'bar:*' is not a group's name; write GROUP=SIZE, as in group=200MB"),
    (['-g', 'bar=x'], "option -g: 'x' is not a size; write bytes, or a number with KB, MB, GB or TB, as in 200MB"),
    (['-a', 'foo=1MB'], "option -a: 'foo=1MB' is not a size; write bytes, or a number with KB, MB, GB or TB, "
                        "as in 200MB"),
    (['-a', '1MB', '--samples=0'], "option --samples: '0' is not a count; write a whole number from 1"),
    (['-a', '1MB', '--max-restarts=3'], "option --max-restarts: '3' is not a number within a time; write N/TIME, "
                                        "as in 3/1h"),
    (['-a', '1MB', '-u', 'soon'], "option -u: 'soon' is not a time; write seconds, or a number with s, m, h or d, "
                                  "as in 10m"),
    (['-a', '1MB', 'web'], "unexpected argument 'web'; memmon takes options only"),
    ([], 'nothing to watch; give -p, -g or -a, as in -a 200MB'),
    (['-m', 'bob@example.com'], 'nothing to watch; give -p, -g or -a, as in -a 200MB'),
    (['--once'], 'nothing to watch; give -p, -g or -a, as in -a 200MB'),
]


@pytest.mark.parametrize('text, limit', PROGRAM_LIMITS)
def test_parse_program_limit(text: str, limit: Limit) -> None:
    assert memmon.parse_program_limit(text) == limit


@pytest.mark.parametrize('text, limit', GROUP_LIMITS)
def test_parse_group_limit(text: str, limit: Limit) -> None:
    assert memmon.parse_group_limit(text) == limit


@pytest.mark.parametrize('argv, error', NO_LIMITS)
def test_bad_options_are_one_line_and_exit_status_2(
        argv: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert memmon.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.err == f"memmon: {error}; try 'memmon --help'\n"
    assert printed.out == ''


def build(*argv: str) -> memmon.Options:
    return memmon.build_options(*read_argv(argv, memmon.OPTIONS))


def test_options_by_default() -> None:
    assert build('-a', '1MB') == memmon.Options(
        limits=(Limit(EVERY, MB),), cumulative=False, uptime_seconds=None, name=None, samples=1, max_restarts=None,
        dry_run=False, verbose=False, mail=mail.Settings((), mail.SENDMAIL, None, None), once=False,
        configuration=None)


@pytest.mark.parametrize('argv, field, value', [
    (['-c'], 'cumulative', True),
    (['--cumulative'], 'cumulative', True),
    (['-u', '90'], 'uptime_seconds', 90),
    (['--uptime=2h'], 'uptime_seconds', 7200),
    (['-n', 'db1'], 'name', 'db1'),
    (['--name=db1'], 'name', 'db1'),
    (['--samples=3'], 'samples', 3),
    (['--max-restarts=3/1h'], 'max_restarts', Rate(3, 3600)),
    (['--dry-run'], 'dry_run', True),
    (['-v'], 'verbose', True),
    (['--verbose'], 'verbose', True),
    (['--once'], 'once', True),
    (['--configuration=x.conf'], 'configuration', 'x.conf'),
    (['-m', 'a@b.c, d@e.f', '--email=g@h.i', '-s', 'true', '--from=x@y.z'], 'mail',
     mail.Settings(('a@b.c', 'd@e.f', 'g@h.i'), 'true', None, 'x@y.z')),
    (['-p', 'a=1', '--program=b=2', '-g', 'c=3', '--groupname=d=4', '--group=e=5', '--any=6'], 'limits',
     (Limit(Name(None, 'a'), 1), Limit(Name(None, 'b'), 2), Limit(Name('c', None), 3), Limit(Name('d', None), 4),
      Limit(Name('e', None), 5), Limit(EVERY, MB), Limit(EVERY, 6))),
])
def test_each_option_has_its_field(argv: list[str], field: str, value: Any) -> None:
    assert getattr(build('-a', '1MB', *argv), field) == value


# Probe.

@pytest.mark.parametrize('output, usages', [
    ('1 0 4\n', {1: Usage(0, 4 * KB)}),
    ('    1     0  4\n  312     1 12345\n\n', {1: Usage(0, 4 * KB), 312: Usage(1, 12345 * KB)}),
    ('0 0 0', {0: Usage(0, 0)}),
    ('1\t0\t4\r\n', {1: Usage(0, 4 * KB)}),
])
def test_parse_ps(output: str, usages: dict[int, Usage]) -> None:
    assert memmon.parse_ps(output) == usages


@pytest.mark.parametrize('output, error', [
    ('', 'ps printed no process'),
    (' \n\n', 'ps printed no process'),
    ('1 0\n', "ps printed '1 0' where pid, parent pid and RSS were asked for"),
    ('1 0 4 5\n', "ps printed '1 0 4 5' where pid, parent pid and RSS were asked for"),
    ('1 0 12m\n', "ps printed '1 0 12m' where pid, parent pid and RSS were asked for"),
    ('1 0 -4\n', "ps printed '1 0 -4' where pid, parent pid and RSS were asked for"),
    ('PID PPID RSS\n1 0 4\n', "ps printed 'PID PPID RSS' where pid, parent pid and RSS were asked for"),
    ('1 0 4\n' + 'x' * 200, "ps printed '%s' where pid, parent pid and RSS were asked for" % ('x' * 80)),
])
def test_parse_ps_can_not_tell(output: str, error: str) -> None:
    with pytest.raises(CantTell) as why:
        memmon.parse_ps(output)
    assert str(why.value) == error


@pytest.fixture
def big_child(tmp_path: Path) -> Iterator[int]:
    """The pid of a child that holds 80 MB, with a name that a careless reader of /proc stumbles over."""
    odd = tmp_path / 'a) R 7 (b'
    odd.symlink_to(PYTHON)
    code = 'x = bytearray(80 * 1024 ** 2); print(flush=True); input()'
    with subprocess.Popen([str(odd), '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout and child.stdout.readline()
            assert read(Path('/proc/%d/comm' % child.pid)) == odd.name + '\n'
            yield child.pid
        finally:
            child.kill()


@pytest.mark.skipif(not os.path.exists('/proc/self/stat'), reason='there is no /proc')
def test_proc_says_what_ps_says(big_child: int) -> None:
    by_ps, by_proc = memmon.run_ps(), memmon.read_proc()
    assert by_proc[big_child].parent_pid == by_ps[big_child].parent_pid == os.getpid()
    assert 80 * MB < by_proc[big_child].rss_bytes < 160 * MB
    assert by_proc[big_child].rss_bytes == pytest.approx(by_ps[big_child].rss_bytes, rel=0.05)
    assert set(by_ps) & set(by_proc) >= {os.getpid(), os.getppid(), big_child}


@pytest.mark.parametrize('found, error', [
    ([], '/proc has no processes'),
    (['self', 'version'], '/proc has no processes'),
    (PermissionError(13, 'Permission denied'), '/proc: Permission denied'),
])
def test_proc_that_tells_nothing(found: Any, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def listdir(path: str) -> list[str]:
        if isinstance(found, list):
            return found
        raise found
    monkeypatch.setattr(os, 'listdir', listdir)
    with pytest.raises(CantTell) as why:
        memmon.read_proc()
    assert str(why.value) == error


def test_proc_of_a_process_that_ends_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, 'listdir', lambda path: [str(2 ** 30), str(os.getpid())])
    assert list(memmon.read_proc()) == [os.getpid()]


def test_ps_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_script(tmp_path / 'ps', 'sleep 600\n')
    monkeypatch.setenv('PATH', '{}:{}'.format(tmp_path, os.environ['PATH']))
    monkeypatch.setattr(memmon, 'PS_TIMEOUT_SECONDS', 0.2)
    with pytest.raises(CantTell, match='ps -A .*: did not end in time'):
        memmon.run_ps()


def test_no_ps_and_no_proc(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv('PATH', '/nonexistent')
    read_memory = memmon.MemoryReader(make_log('memmon'))
    with monkeypatch.context() as without:
        without.setattr(os.path, 'exists', lambda path: False)
        with pytest.raises(CantTell, match='ps -A .*: No such file'):
            read_memory()
    assert os.getpid() in read_memory()
    assert capfd.readouterr().err.count('memory is read from /proc from now on') == 1
    monkeypatch.setattr(os, 'listdir', lambda path: [])
    with pytest.raises(CantTell, match='/proc has no processes'):
        read_memory()


# A family of processes: pid to (parent pid, bytes), and what each holds with its descendants.
FAMILIES = [
    ('alone', {5: (1, 7)}, {5: 7}),
    ('tree', {1: (0, 1), 2: (1, 10), 3: (1, 100), 4: (2, 1000), 5: (4, 10000)},
     {1: 11111, 2: 11010, 3: 100, 4: 11000, 5: 10000}),
    ('parents after children', {9: (8, 1), 8: (7, 10), 7: (0, 100)}, {9: 1, 8: 11, 7: 111}),
    ('pid 0 is its own parent', {0: (0, 1), 1: (0, 10), 2: (1, 100)}, {0: 111, 1: 110, 2: 100}),
    ('circle', {1: (2, 1), 2: (1, 10), 3: (0, 100)}, {1: 1, 2: 10, 3: 100}),
    ('circle with a child', {1: (2, 1), 2: (1, 10), 3: (1, 100)}, {1: 101, 2: 10, 3: 100}),
    ('missing parent', {4: (3, 1), 5: (4, 10), 6: (3, 100)}, {4: 11, 5: 10, 6: 100}),
    ('nobody', {}, {}),
    ('a long chain', {n: (n - 1, 1) for n in range(1, 5001)}, {n: 5001 - n for n in range(1, 5001)}),
]


@pytest.mark.parametrize('family, totals', [case[1:] for case in FAMILIES], ids=[case[0] for case in FAMILIES])
def test_sum_descendants(family: dict[int, tuple[int, int]], totals: dict[int, int]) -> None:
    usages = {pid: Usage(*numbers) for pid, numbers in family.items()}
    assert memmon.sum_descendants(usages) == totals
    assert memmon.measure(usages, cumulative=True) == totals
    assert memmon.measure(usages, cumulative=False) == {pid: numbers[1] for pid, numbers in family.items()}


# Judge.

@pytest.mark.parametrize('argv, limit_bytes', [
    (['-a', '1'], 1),
    (['-a', '1', '-a', '2'], 2),
    (['-g', 'bar=3', '-a', '1'], 3),
    (['-p', 'bar:*=4', '-a', '1'], 4),
    (['-g', 'bar=3', '-g', 'bar=5', '-a', '9'], 5),
    (['-p', 'foo=6', '-g', 'bar=3', '-a', '1'], 6),
    (['-p', 'foo=6', '-p', 'bar:*=4'], 6),
    (['-p', 'foo=6', '-p', 'foo=7'], 7),
    (['-p', 'bar:foo=8', '-p', 'foo=6', '-g', 'bar=3', '-a', '1'], 8),
    (['-p', 'bar:foo=8', '-p', 'bar:foo=0', '-p', 'foo=6'], 0),
    (['-p', 'foo=999', '-p', 'bar:foo=8'], 8),
    (['-p', 'bar=1', '-p', 'foo:bar=1', '-g', 'foo=1', '-p', 'foo:*=1', '-p', 'foo:foo=1'], None),
    (['-p', 'Foo=1', '-p', 'fo=1', '-g', 'ba=1'], None),
])
def test_the_most_specific_limit_holds(argv: list[str], limit_bytes: int | None) -> None:
    assert memmon.find_limit(build(*argv).limits, 'bar', 'foo') == limit_bytes


@pytest.mark.parametrize('changes, held_bytes, limit_bytes, verdict', [
    ({}, 2, 1, memmon.OVER),
    ({}, 1, 1, 'ok'),
    ({}, 2, None, 'not watched'),
    ({}, None, 1, 'unable to see its memory'),
    ({'state': STOPPING}, 2, 1, 'over its limit: left alone (STOPPING)'),
    ({'state': STOPPING}, 1, 1, 'ok'),
    ({'pid': 0, 'state_name': 'EXITED'}, None, 1, 'not running (EXITED)'),
])
def test_judge(changes: dict[str, Any], held_bytes: int | None, limit_bytes: int | None, verdict: str) -> None:
    process = Process('web', 'web', 7, RUNNING, 'RUNNING', 1, 2, '')._replace(**changes)
    assert memmon.judge(process, held_bytes, limit_bytes) == verdict


@pytest.mark.parametrize('size_bytes, text', [
    (0, '0B'), (1023, '1023B'), (1024, '1.0KB'), (1536, '1.5KB'), (MB, '1.0MB'), (200 * MB, '200.0MB'),
    (3 * GB // 2, '1.5GB'), (2048 * GB, '2048.0GB'),
])
def test_format_size(size_bytes: int, text: str) -> None:
    assert memmon.format_size(size_bytes) == text


@pytest.mark.parametrize('held, limit, text', [
    (5 * MB, None, '5.0MB, and no limit'),
    (5 * MB, 4 * MB, '5.0MB, over its limit of 4.0MB'),
    (5 * MB, 5 * MB, '5.0MB, within its limit of 5.0MB'),
    (5 * MB, 6 * MB, '5.0MB, within its limit of 6.0MB'),
])
def test_describe(held: int, limit: int | None, text: str) -> None:
    assert memmon.describe(held, limit) == text


# The listener. supervisord and its processes are real; ps prints what the test says they hold.

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
[program:stubborn]
command=sh -c 'trap "" TERM; touch %(here)s/deaf; while [ ! -e %(here)s/end ]; do sleep 0.05; done'
startsecs=0
autostart=false
[program:off]
command=sleep 1000
autostart=false
"""
ALL = ['web:web', 'foo:foo', 'bar:foo', 'bar:x']
HELD_KIB = 300


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
        self._folder = folder
        self._ps = folder / 'ps.txt'
        write_script(folder / 'ps', f'[ "$*" = "-A -o pid= -o ppid= -o rss=" ] && exec cat {self._ps}\n')
        for name in ALL:
            if supervisord.info(name)['statename'] != 'RUNNING':
                supervisord.rpc.startProcess(name)
        self.pids = {name: supervisord.info(name)['pid'] for name in ALL}
        self.show({name: HELD_KIB for name in ALL})

    def show(self, held_kib: dict[str, float], others: Sequence[str] = ()) -> None:
        """Let ps print what processes hold, by name, and other lines."""
        lines = ['1 0 4', '%d 1 4' % self.supervisord.pid]
        lines += ['%5d %5d %d' % (self.pids[name], self.supervisord.pid, kib) for name, kib in held_kib.items()]
        self._ps.write_text('\n'.join(lines + list(others)) + '\n', 'utf-8')

    def fail_ps(self, text: str) -> None:
        self._ps.write_text(text, 'utf-8')

    @contextmanager
    def memmon(self, *arguments: str, group: str = 'listener') -> Iterator[Listener]:
        with Listener(['memmon', '-m', 'bob@example.com', '-s', self.inbox.command, *arguments], {
                'SUPERVISOR_SERVER_URL': self.proxy.url, 'SUPERVISOR_GROUP_NAME': group,
                'PATH': '{}:{}'.format(self._folder, os.environ['PATH'])}) as listener:
            yield listener
            assert listener.close() == 0

    def find_restarted(self) -> list[str]:
        """Return the names of the processes that have another pid than at the start of the test."""
        return [name for name in ALL if self.supervisord.info(name)['pid'] != self.pids[name]]


@pytest.fixture
def world(tmp_path: Path, supervisord: Supervisord) -> Iterator[World]:
    with Proxy(tmp_path / 'p.sock', supervisord.socket, {}) as proxy:
        yield World(tmp_path, supervisord, proxy)


@pytest.mark.parametrize('argv, restarted', [
    (['-a', '100KB'], ALL),
    (['-a', '100KB', '-a', '1MB'], []),
    (['-a', '300KB'], []),
    (['-a', '300KB', '-v'], []),
    (['-a', '307199'], ALL),
    (['-p', 'foo=100KB'], ['foo:foo', 'bar:foo']),
    (['-p', 'bar:foo=100KB'], ['bar:foo']),
    (['-p', 'bar:*=100KB'], ['bar:foo', 'bar:x']),
    (['-g', 'bar=100KB'], ['bar:foo', 'bar:x']),
    (['--group', 'bar=100KB'], ['bar:foo', 'bar:x']),
    (['-a', '100KB', '-p', 'web=1MB', '-g', 'bar=1MB', '-p', 'bar:x=100KB'], ['foo:foo', 'bar:x']),
    (['-a', '1MB', '-p', 'web=299KB'], ['web:web']),
    (['-a', '1KB', '-g', 'bar=2KB', '-p', 'bar:*=3KB', '-p', 'foo=4KB', '-p', 'bar:foo=5KB'], ALL),
])
def test_which_processes_are_restarted(world: World, argv: list[str], restarted: list[str]) -> None:
    with world.memmon(*argv) as listener:
        listener.tick()
        assert world.find_restarted() == restarted
        # Whatever rules it meets, each is restarted once.
        assert world.proxy.calls.count('stopProcess') == world.proxy.calls.count('startProcess') == len(restarted)
        assert listener.close() == 0
        assert listener.log.count('memmon: restarted ') == len(restarted)
    titles = {'web:web': 'web', 'foo:foo': 'foo'}
    assert sorted(world.inbox.subjects) == sorted(
        f'memmon: process {titles.get(name, name)} restarted' for name in restarted)


def test_log_and_mail_say_how_much_and_how_long(world: World) -> None:
    with world.memmon('-p', 'bar:x=100KB', '-n', 'db1') as listener:
        listener.tick()
        reason = 'restarted bar:x (pid %d: 300.0KB, over its limit of 100.0KB)' % world.pids['bar:x']
        listener.wait_for_log(f'memmon: {reason}\n')
        mail = world.inbox.wait()[0]
    body = mail.get_content()
    assert mail['To'] == 'bob@example.com'
    assert mail['Subject'] == 'memmon [db1]: process bar:x restarted'
    assert body.startswith(reason + '\n')
    assert 'It is program x of group bar and had run for ' in body
    assert 'supervisor supervisor\n' in body  # the identifier in the event's header


def test_other_events_are_ignored(world: World) -> None:
    with world.memmon('-a', '100KB') as listener:
        listener.crash('web')
        listener.serve_event('SUPERVISOR_STATE_CHANGE_RUNNING', '')
        assert world.proxy.calls == []
        listener.serve_event('TICK_3600', 'when:%d' % 2 ** 31)
        assert world.find_restarted() == ALL


def test_own_pool_is_left_alone(world: World) -> None:
    with world.memmon('-a', '100KB', '-p', 'bar:x=100KB', group='bar') as listener:
        listener.tick()
        assert world.find_restarted() == ['web:web', 'foo:foo']


def begin_to_stop(world: World, supervisord: Supervisord) -> Path:
    """Make a process STOPPING, until the file of the returned name is there."""
    end, deaf = supervisord.folder / 'end', supervisord.folder / 'deaf'
    for path in (end, deaf):
        if path.exists():
            path.unlink()
    supervisord.rpc.startProcess('stubborn')
    wait_for(deaf.exists)
    world.pids['stubborn'] = supervisord.info('stubborn')['pid']
    supervisord.rpc.stopProcess('stubborn', False)
    return end


def test_stopping_process_is_left_alone(world: World, supervisord: Supervisord) -> None:
    end = begin_to_stop(world, supervisord)
    supervisord.wait_for_state('stubborn', 'STOPPING')
    world.show({'stubborn': HELD_KIB})
    try:
        with world.memmon('-a', '100KB') as listener:
            listener.tick()
            assert supervisord.info('stubborn')['statename'] == 'STOPPING'
            assert listener.close() == 0
            assert listener.log == ''
            assert world.proxy.calls == ['getAllProcessInfo']
    finally:
        end.touch()
        supervisord.wait_for_state('stubborn', 'STOPPED')


@pytest.mark.parametrize('held_kib, calls', [
    ({'web:web': 100, 'foo:foo': 1}, 0),        # nothing is over a limit
    ({'web:web': 150}, 1),                      # within a higher limit of its own
    ({'bar:x': 150}, 1),                        # nothing limits it
])
def test_supervisord_is_asked_no_more_than_once(world: World, held_kib: dict[str, float], calls: int) -> None:
    with world.memmon('-p', 'web=200KB', '-p', 'foo=100KB') as listener:
        world.show({})
        listener.tick()  # this asks whether the names mean something
        del world.proxy.calls[:]
        world.show(held_kib)
        for _ in range(3):
            listener.tick()
        assert world.proxy.calls == ['getAllProcessInfo'] * calls
        assert world.find_restarted() == []


def test_known_foreign_process_costs_no_call(world: World) -> None:
    with world.memmon('-a', '200KB') as listener:
        world.show({}, ['%d 1 900' % os.getpid()])
        for _ in range(3):
            listener.tick()
        assert world.proxy.calls == ['getAllProcessInfo']
        world.show({}, ['%d 1 900' % os.getpid(), '%d 1 900' % os.getppid()])  # another one
        listener.tick()
        assert world.proxy.calls == ['getAllProcessInfo'] * 2
        world.show({'web:web': HELD_KIB}, ['%d 1 900' % os.getpid()])
        listener.tick()
        assert world.find_restarted() == ['web:web']


def test_process_that_grows_beyond_its_own_limit_is_seen(world: World) -> None:
    with world.memmon('-a', '100KB', '-p', 'web=200KB') as listener:
        world.show({'web:web': 150})
        listener.tick()
        world.show({'web:web': 201})
        listener.tick()
        assert world.find_restarted() == ['web:web']


def test_what_is_known_is_forgotten_in_time(
        world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A pid may come to mean another process."""
    monkeypatch.setattr(memmon.Memmon, 'FORGET_SECONDS', 0)
    monkeypatch.setenv('PATH', '{}:{}'.format(world._folder, os.environ['PATH']))
    watching = memmon.Memmon(build('-a', '200KB'), {'SUPERVISOR_SERVER_URL': world.proxy.url})
    world.show({}, ['%d 1 900' % os.getpid()])
    for number in range(1, 4):
        watching._check()
        assert world.proxy.calls == ['getAllProcessInfo'] * number


def test_cumulative_counts_descendants(world: World) -> None:
    families = ['900001 %d 60' % world.pids['web:web'], '900002 900001 60', '900003 %d 60' % world.pids['foo:foo']]
    world.show({name: 90 for name in ALL}, families)
    with world.memmon('-a', '200KB') as listener:
        listener.tick()
        assert world.find_restarted() == []
    with world.memmon('-a', '200KB', '-c') as listener:
        listener.tick()
        assert world.find_restarted() == ['web:web']
        listener.wait_for_log('pid %d: 210.0KB, over' % world.pids['web:web'])


def test_cumulative_finds_a_real_child(tmp_path: Path) -> None:
    """The child holds the memory, and ps is the machine's own."""
    hold = 'import time; x = bytearray(60 * 1024 ** 2); open("ready", "w"); time.sleep(1000)'
    (tmp_path / 'hold.py').write_text(hold, 'utf-8')
    program = "[program:family]\ncommand=sh -c 'PYTHON hold.py & wait'\nstartsecs=0\nstopasgroup=true\n"
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


@pytest.mark.parametrize('uptime, mails', [('1d', 1), ('0', 0)])
@pytest.mark.parametrize('argv, subject', [
    ([], 'memmon: process web restarted'),
    (['--dry-run'], 'memmon: dry run: process web not restarted'),
])
def test_mail_only_within_uptime(world: World, argv: list[str], subject: str, uptime: str, mails: int) -> None:
    wait_for(lambda: world.supervisord.info('web')['now'] > world.supervisord.info('web')['start'], 'a second')
    with world.memmon('-p', 'web=100KB', '-u', uptime, *argv) as listener:
        listener.tick()
        listener.close()
        assert 'over its limit' in listener.log
    assert world.inbox.subjects == [subject] * mails


def test_samples_are_counted_for_each_process_and_pid(world: World) -> None:
    with world.memmon('-a', '100KB', '--samples=3') as listener:
        def find_restarted(*over: str) -> list[str]:
            world.show({name: HELD_KIB for name in over})
            listener.tick()
            return world.find_restarted()

        assert find_restarted('web:web', 'foo:foo') == []
        assert find_restarted('web:web') == []
        assert find_restarted('web:web', 'foo:foo') == ['web:web']       # the other's count has started again
        old, world.pids['web:web'] = world.pids['web:web'], world.supervisord.info('web')['pid']
        assert find_restarted('web:web', 'foo:foo') == []                # another pid, another count
        assert find_restarted('web:web', 'foo:foo') == ['foo:foo']
        assert find_restarted('web:web') == ['web:web', 'foo:foo']
        assert old not in [info['pid'] for info in world.supervisord.rpc.getAllProcessInfo()]


def test_samples_start_again_after_a_quiet_tick(world: World) -> None:
    with world.memmon('-a', '100KB', '--samples=2') as listener:
        for held_kib in (HELD_KIB, 50, HELD_KIB, 100, HELD_KIB):
            world.show({'web:web': held_kib})
            listener.tick()
            assert world.find_restarted() == []
        listener.tick()
        assert world.find_restarted() == ['web:web']


def test_samples_start_again_after_a_restart_that_failed(world: World) -> None:
    world.show({'web:web': HELD_KIB})
    world.proxy.rules['getProcessInfo'] = ['lose call'] * 9
    with world.memmon('-a', '100KB', '--samples=2') as listener:
        for number in range(1, 5):
            listener.tick()
            wait_for(lambda: listener.log.count('failed to stop web') >= number // 2, 'log')
        listener.close()
        assert listener.log.count('memmon: failed to stop web') == 2
    assert world.inbox.subjects == ['memmon: failed to stop process web'] * 2


def test_max_restarts(world: World) -> None:
    with world.memmon('-a', '100KB', '--max-restarts=2/1h') as listener:
        seen = []
        for _ in range(4):
            world.pids['web:web'] = world.supervisord.info('web')['pid']
            world.show({'web:web': HELD_KIB})
            listener.tick()
            seen.append(world.find_restarted())
        assert seen == [['web:web'], ['web:web'], [], []]
        world.show({'foo:foo': HELD_KIB})   # another process is counted on its own
        listener.tick()
        assert world.find_restarted() == ['foo:foo']
        listener.close()
        assert listener.log.count('left web alone') == 1
    assert world.inbox.subjects == ['memmon: process web restarted', 'memmon: process web restarted',
                                    'memmon: process web left alone', 'memmon: process foo restarted']


def test_dry_run_says_so_and_does_nothing(world: World) -> None:
    with world.memmon('-p', 'web=100KB', '--dry-run') as listener:
        for _ in range(2):
            listener.tick()
        listener.close()
        assert listener.log.count('memmon: dry run: would have restarted web (pid %d: 300.0KB, over its limit of '
                                  '100.0KB)\n' % world.pids['web:web']) == 1
        assert world.find_restarted() == []
        assert 'stopProcess' not in world.proxy.calls
    assert world.inbox.subjects == ['memmon: dry run: process web not restarted']
    assert world.inbox.mails[0].get_content().startswith('dry run: would have restarted web')


def test_verbose_tells_of_every_process_at_every_tick(world: World) -> None:
    world.show({name: 50 for name in ALL}, ['%d 1 900' % os.getpid()])
    with world.memmon('-g', 'bar=100KB', '-v', group='foo') as listener:
        for ticks in (1, 2):
            listener.tick()
            for name, title, rest in [('web:web', 'web', ', and no limit'), ('foo:foo', 'foo', ', and no limit'),
                                      ('bar:foo', 'bar:foo', ', within its limit of 100.0KB'),
                                      ('bar:x', 'bar:x', ', within its limit of 100.0KB')]:
                line = 'memmon: %s (pid %d): 50.0KB%s\n' % (title, world.pids[name], rest)
                wait_for(lambda: listener.log.count(line) == ticks, line)
        listener.close()
        assert listener.log.count('\n') == 8


def test_names_that_mean_nothing_are_told_once(world: World) -> None:
    with world.memmon('-p', 'bar=1MB', '-p', 'web=1MB', '-g', 'web=1MB', '-p', 'wbe=1MB', '-g', 'baz=1MB',
                      '-p', 'bar:web=1MB', '-a', '1GB') as listener:
        for _ in range(3):
            listener.tick()
        listener.close()
        assert [line.partition('memmon: ')[2] for line in listener.log.splitlines()] == [
            'no process is called bar; there is a group of that name: for all its processes, write bar:*',
            'no process is called wbe',
            'no process is called bar:web',
            'no process is called baz:*']


def test_names_are_told_as_soon_as_supervisord_answers(world: World) -> None:
    world.proxy.rules['getAllProcessInfo'] = ['lose call']
    with world.memmon('-p', 'wbe=1MB', '-a', '1GB') as listener:
        listener.tick()
        assert world.proxy.calls == ['getAllProcessInfo']
        assert listener.log == ''
        world.show({'web:web': 2 * MB})
        listener.tick()
        listener.wait_for_log('memmon: no process is called wbe\n')


@pytest.mark.parametrize('output, said', [
    ('', 'ps printed no process'),
    ('1 0 12m\n', "ps printed '1 0 12m' where"),
])
def test_useless_ps_is_told_and_proc_is_read_instead(world: World, output: str, said: str) -> None:
    world.fail_ps(output)
    with world.memmon('-p', 'web=1KB') as listener:
        listener.tick()
        assert world.find_restarted() == ['web:web']    # sleep holds more than that, really
        world.show({})
        listener.tick()
        listener.close()
        assert listener.log.count('memory is read from /proc from now on') == 1
        assert said in listener.log
        assert listener.log.count('memmon: restarted web') == 2


def test_supervisord_that_can_not_be_asked_is_told(world: World) -> None:
    with world.memmon('-a', '100KB') as listener:
        world.proxy.rules['getAllProcessInfo'] = ['lose call']
        listener.tick()
        listener.wait_for_log(f'memmon: unable to check memory: supervisord at {world.proxy.url} does not answer getAllProcessInfo')
        assert world.find_restarted() == []
        listener.tick()
        assert world.find_restarted() == ALL


def test_process_whose_start_was_lost_is_started_at_the_next_tick(world: World) -> None:
    world.show({'web:web': HELD_KIB})
    world.proxy.rules['startProcess'] = ['lose call'] * 3
    with world.memmon('-a', '100KB') as listener:
        listener.tick()
        listener.wait_for_log('memmon: failed to start web')
        assert world.supervisord.info('web')['statename'] == 'STOPPED'
        world.show({'foo:foo': HELD_KIB})
        listener.tick()
        assert world.find_restarted() == ['web:web'], 'what else is to be done waits for the next tick'
        listener.close()
    assert world.inbox.subjects == ['memmon: failed to start process web', 'memmon: process web restarted']
    body = world.inbox.mails[1].get_content()
    assert body.startswith('restarted web (pid %d: ' % world.pids['web:web'])


def test_process_left_down_is_started_when_the_listener_ends(world: World) -> None:
    world.show({'foo:foo': HELD_KIB, 'web:web': 2 * HELD_KIB})
    world.proxy.rules['startProcess'] = ['lose call'] * 3
    with world.memmon('-a', '100KB') as listener:
        listener.tick()
        assert world.supervisord.info('foo')['statename'] == 'STOPPED'
        assert listener.terminate() == 0
        assert world.supervisord.info('foo')['statename'] == 'RUNNING'
        # For its own reason, not for that of the last one.
        listener.wait_for_log('memmon: restarted foo (pid %d: 300.0KB, ' % world.pids['foo:foo'])
        listener.wait_for_log('memmon: restarted web (pid %d: 600.0KB, ' % world.pids['web:web'])


def test_tick_from_before_the_end_of_a_restart_is_skipped(world: World) -> None:
    with world.memmon('-a', '100KB') as listener:
        sent = time.time() - 1
        world.show({'web:web': HELD_KIB})
        listener.tick()
        world.show({'foo:foo': HELD_KIB})
        listener.serve_event('TICK_5', 'when:%d' % sent)
        assert world.find_restarted() == ['web:web']
        listener.tick()
        assert world.find_restarted() == ['web:web', 'foo:foo']


class Meanwhile(List[str]):
    """A rule of the proxy that does something before the call goes on."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__(['pass'])
        self._act = act

    def pop(self, index: SupportsIndex = -1) -> str:
        self._act()
        return super().pop(index)


def test_process_that_somebody_restarts_meanwhile_is_not_stopped(world: World) -> None:
    def restart() -> None:
        world.supervisord.rpc.stopProcess('web')
        world.supervisord.rpc.startProcess('web')

    world.show({'web:web': HELD_KIB})
    world.proxy.rules['getProcessInfo'] = Meanwhile(restart)
    with world.memmon('-a', '100KB') as listener:
        listener.tick()
        listener.close()
        assert listener.log.count(' failed to stop web: it is RUNNING with pid ') == 1
        assert 'stopProcess' not in world.proxy.calls
    assert world.inbox.subjects == ['memmon: failed to stop process web']


# One look by hand.

def test_print_table(capsys: pytest.CaptureFixture[str]) -> None:
    memmon.print_table([('name', 'size', 'what'), ('a', '200MB', ''), ('group:program', '1', 'too much')])
    assert capsys.readouterr().out == (
        'name           size   what\n'
        'a              200MB\n'
        'group:program  1      too much\n')


look = partial(run_by_hand, 'memmon', '--once')


def read_rows(printed: str) -> dict[str, list[str]]:
    """Return the rows of the table by group and process."""
    rows = [line.split(None, 5) for line in printed.splitlines() if line.count('  ')]
    assert rows[0] == ['GROUP', 'PROCESS', 'PID', 'MEMORY', 'LIMIT', 'VERDICT']
    return {f'{row[0]}:{row[1]}': row[2:] for row in rows[1:]}


def look_at(world: World, *arguments: str) -> subprocess.CompletedProcess[str]:
    return look(*arguments, folder=world._folder, SUPERVISOR_SERVER_URL=world.proxy.url,
                PATH='{}:{}'.format(world._folder, os.environ['PATH']))


def test_once_prints_a_table(world: World) -> None:
    printed = look_at(world, '-p', 'web=1MB', '-g', 'bar=300KB')
    assert (printed.returncode, printed.stderr) == (0, '')
    pids = {name: str(pid) for name, pid in world.pids.items()}
    assert read_rows(printed.stdout) == {
        'bar:foo': [pids['bar:foo'], '300.0KB', '300.0KB', 'ok'],
        'bar:x': [pids['bar:x'], '300.0KB', '300.0KB', 'ok'],
        'foo:foo': [pids['foo:foo'], '300.0KB', '-', 'not watched'],
        'off:off': ['-', '-', '-', 'not running (STOPPED)'],
        'stubborn:stubborn': ['-', '-', '-', 'not running (STOPPED)'],
        'web:web': [pids['web:web'], '300.0KB', '1.0MB', 'ok'],
    }


def test_once_finds_a_fault_and_does_nothing(world: World) -> None:
    printed = look_at(world, '-p', 'web=100KB', '-m', 'bob@example.com', '-s', world.inbox.command)
    assert (printed.returncode, printed.stderr) == (1, '')
    assert read_rows(printed.stdout)['web:web'][3] == 'over its limit: would be restarted'
    assert world.find_restarted() == []
    assert world.proxy.calls == ['getAllProcessInfo']
    assert world.inbox.subjects == []


def test_once_says_that_a_stopping_process_would_be_left_alone(world: World, supervisord: Supervisord) -> None:
    end = begin_to_stop(world, supervisord)
    world.show({'stubborn': HELD_KIB})
    try:
        printed = look_at(world, '-a', '100KB')
        assert supervisord.info('stubborn')['statename'] == 'STOPPING'
    finally:
        end.touch()
        supervisord.wait_for_state('stubborn', 'STOPPED')
    assert printed.returncode == 0
    rows = read_rows(printed.stdout)
    assert rows['stubborn:stubborn'][3] == 'over its limit: left alone (STOPPING)'
    assert rows['web:web'][3] == 'unable to see its memory'     # ps does not show it


def test_once_with_a_name_that_means_nothing(world: World) -> None:
    printed = look_at(world, '-p', 'bar=1MB', '-a', '1MB')
    assert printed.returncode == 1
    assert printed.stdout.splitlines()[-1] == (
        'no process is called bar; there is a group of that name: for all its processes, write bar:*')


def test_once_counts_descendants(world: World) -> None:
    world.show({'web:web': 90}, ['900001 %d 60' % world.pids['web:web']])
    assert look_at(world, '-a', '100KB').returncode == 0
    printed = look_at(world, '-a', '100KB', '-c')
    assert printed.returncode == 1
    assert read_rows(printed.stdout)['web:web'][1] == '150.0KB'


def test_once_finds_supervisord_by_its_configuration(world: World, supervisord: Supervisord) -> None:
    path = '{}:{}'.format(world._folder, os.environ['PATH'])
    printed = look('-a', '1MB', '--configuration', str(supervisord.configuration), folder=world._folder, PATH=path)
    assert (printed.returncode, printed.stderr) == (0, '')
    assert read_rows(printed.stdout)['web:web'][0] == str(world.pids['web:web'])
    # As supervisorctl does, it looks for supervisord.conf in the current folder too.
    printed = look('-a', '1MB', folder=supervisord.folder, PATH=path)
    assert read_rows(printed.stdout)['web:web'][0] == str(world.pids['web:web'])


def test_once_without_a_configuration(tmp_path: Path) -> None:
    printed = look('-a', '1MB', '--configuration=missing.conf', folder=tmp_path)
    assert (printed.returncode, printed.stdout) == (2, '')
    assert printed.stderr.startswith('memmon: option --configuration: ')
    assert 'missing.conf' in printed.stderr
    assert printed.stderr.endswith("; try 'memmon --help'\n")
    assert printed.stderr.count('\n') == 1


def test_once_with_nothing_running(tmp_path: Path) -> None:
    (tmp_path / 'x.conf').write_text('[supervisorctl]\nserverurl=unix://%(here)s/none.sock\n', 'utf-8')
    for arguments, environment in [(['--configuration=x.conf'], {}),
                                   ([], {'SUPERVISOR_SERVER_URL': f'unix://{tmp_path}/none.sock'})]:
        printed = look('-a', '1MB', *arguments, folder=tmp_path, **environment)
        assert (printed.returncode, printed.stdout) == (1, '')
        assert 'memmon: unable to check memory: supervisord at unix://' in printed.stderr
        assert printed.stderr.count('\n') == 1


def test_once_without_memory(world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def can_not_tell() -> dict[int, Usage]:
        raise CantTell('no memory')
    monkeypatch.setattr(memmon, 'run_ps', can_not_tell)
    monkeypatch.setattr(memmon, 'read_proc', can_not_tell)
    monkeypatch.setenv('SUPERVISOR_SERVER_URL', world.proxy.url)
    assert memmon.main(['--once', '-a', '1MB']) == 1
    printed = capfd.readouterr()
    assert printed.err.endswith('memmon: unable to check memory: no memory\n')
    assert printed.out == ''


# Beyond the usual.

def test_mail_of_a_restart_is_for_an_uptime_of_no_more_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = memmon.Memmon(build('-a', '1', '-u', '60'), {})
    mails: list[str] = []
    monkeypatch.setattr(listener._outbox, 'put', lambda subject, body, server: mails.append(subject))
    for now in (1059, 1060, 1061):
        process = Process('web', str(now), 7, RUNNING, 'RUNNING', 1000, now, '')
        listener._tell(Outcome(process, RESTARTED, 'restarted'))
    assert mails == ['memmon: process web:%d restarted' % now for now in (1059, 1060)]


def test_supervisord_is_asked_anew_about_a_pid_of_another_parent_and_after_an_hour() -> None:
    listener = memmon.Memmon(build('-a', '1KB'), {})
    listener._known = {(5, 1): None}
    held = {5: 2 * KB}
    assert not listener._must_ask({5: Usage(1, 2 * KB)}, held)
    assert listener._must_ask({5: Usage(2, 2 * KB)}, held)
    listener._known_since -= 3601
    assert listener._must_ask({5: Usage(1, 2 * KB)}, held)


def test_pid_0_of_ps_is_no_process_of_supervisord(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process has pid 0, and so has the kernel on a BSD."""
    listener = memmon.Memmon(memmon.build_options(*read_argv(['-a', '1KB'], memmon.OPTIONS)), {})
    stopped = Process('web', 'web', 0, STOPPED, 'STOPPED', 1, 2, '')
    monkeypatch.setattr(listener._supervisor, 'get_processes_in_child', lambda seconds: [stopped])
    usages = {0: memmon.Usage(0, 1 << 30)}
    assert listener._find_over(usages, memmon.measure(usages, False)) == {}


def test_password_in_an_argument_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert memmon.main(['-a', '1KB', 'smtp://robot:secret@host']) == 2
    assert capsys.readouterr().err.startswith("memmon: unexpected argument 'smtp://robot:***@host'; ")
