"""Names and states from tables; restarts on a real supervisord, in this process."""
from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

import pytest
from support import ALL_LOST, Proxy, Supervisord, find_children, read_until, serving, wait_for, write_script

from superlance import listener, processes
from superlance.listener import Event, make_log
from superlance.options import Rate, UsageError
from superlance.processes import (
    BACKOFF,
    DRY_RUN,
    EVERY,
    EXITED,
    FAILED,
    FATAL,
    HELD_BACK,
    LEAVE,
    LEFT_ALONE,
    RESTARTED,
    RUNNING,
    RUNS,
    START,
    START_FAILED,
    STARTING,
    STOP_FAILED,
    STOPPED,
    STOPPING,
    SUBJECTS,
    UNKNOWN,
    UNTOUCHED,
    WAIT,
    CantTell,
    Name,
    NameCheck,
    Outcome,
    Process,
    Refused,
    Restarter,
    Supervisor,
    find_supervisor,
    find_unmatched,
    judge_stopped,
    make_process,
    parse_name,
)

INFO: dict[str, Any] = dict(group='g', name='web', pid=100, state=RUNNING, statename='RUNNING', start=1000, now=1060,
                            spawnerr='')
PROGRAM = '[program:web]\ncommand=sleep 1000\nstartsecs=0\nautorestart=false\n'


@pytest.fixture(autouse=True)
def default_timeout() -> Iterator[None]:
    """Supervisor.call sets the timeout of all new sockets."""
    before = socket.getdefaulttimeout()
    yield
    socket.setdefaulttimeout(before)


# Names.

@pytest.mark.parametrize('text, name, shown', [
    ('web', Name(None, 'web'), 'web'),
    (' web ', Name(None, 'web'), 'web'),
    ('shop:web', Name('shop', 'web'), 'shop:web'),
    ('shop:*', Name('shop', None), 'shop:*'),
    ('shop:', Name('shop', None), 'shop:*'),
    ('größe', Name(None, 'größe'), 'größe'),
    ('my web', Name(None, 'my web'), 'my web'),
])
def test_name(text: str, name: Name, shown: str) -> None:
    assert parse_name(text) == name
    assert str(name) == shown


@pytest.mark.parametrize('text', ['', ' ', '*', ':', ':web', ':*', 'a:b:c'])
def test_name_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match='is not a process name; write program, group:program or group:'):
        parse_name(text)


@pytest.mark.parametrize('name, meant', [
    ('web', ['shop:web', 'web:web']),
    ('shop:web', ['shop:web']),
    ('shop:*', ['shop:db', 'shop:web']),
    ('web:*', ['web:web']),
    ('shop', []),
    ('we', []),
    ('web:db', []),
])
def test_what_a_name_means(name: str, meant: list[str]) -> None:
    known = [('shop', 'db'), ('shop', 'web'), ('web', 'web')]
    assert ['{}:{}'.format(*pair) for pair in known if parse_name(name).means(*pair)] == meant
    assert all(EVERY.means(*pair) for pair in known)


@pytest.mark.parametrize('names, lines', [
    ([], []),
    (['web', 'shop:*', 'shop:web'], []),
    (['wbe'], ['no process is called wbe']),
    (['shop:db'], ['no process is called shop:db']),
    (['sohp:*', 'web', 'wbe'], ['no process is called sohp:*', 'no process is called wbe']),
    (['shop'], ['no process is called shop; there is a group of that name: for all its processes, write shop:*']),
])
def test_unmatched_names(names: list[str], lines: list[str]) -> None:
    known = [make_process(dict(INFO, group='shop')), make_process(dict(INFO, group='x', name='y'))]
    assert find_unmatched([EVERY, *map(parse_name, names)], known) == lines
    assert find_unmatched([EVERY], []) == []


def test_process() -> None:
    process = make_process(INFO)
    assert (process.namespec, process.title, process.uptime_seconds) == ('g:web', 'g:web', 60)
    assert process._replace(group='web').title == 'web'
    assert process._replace(now=900).uptime_seconds == 0
    without = {key: value for key, value in INFO.items() if key != 'spawnerr'}
    assert make_process(without).spawn_error == ''


# Calls.

def answering(answer: bytes) -> Callable[[socket.socket], None]:
    def handle(client: socket.socket) -> None:
        read_until(client, b'</methodCall>')
        client.sendall(answer)
    return handle


def http(status: str, body: bytes = b'', more: bytes = b'') -> bytes:
    return b'HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n' % (status.encode(), len(body) + len(more)) + body


@pytest.mark.parametrize('answer, reason', [
    (b'', 'does not answer getState: '),
    (b'no http\r\n\r\n', 'does not answer getState: '),
    (http('500 Oops'), 'answers 500 to getState: Oops'),
    (http('401 Unauthorized'), 'set SUPERVISOR_USERNAME and SUPERVISOR_PASSWORD'),
    (http('200 OK', b'<no xml'), 'does not answer getState: '),
    (http('200 OK', b'<html></html>'), 'does not answer getState: '),
    (http('200 OK', b'<methodResponse>', b'more'), 'does not answer getState: '),
    (http('200 OK', b'\xff\xfe'), 'does not answer getState: '),
])
def test_call_with_a_bad_answer(answer: bytes, reason: str) -> None:
    with serving(answering(answer)) as port:
        url = 'http://127.0.0.1:%d' % port
        with pytest.raises(CantTell) as raised:
            Supervisor({'SUPERVISOR_SERVER_URL': url}).call('getState')
    assert str(raised.value).startswith(f'supervisord at {url} ')
    assert reason in str(raised.value)
    assert not str(raised.value).endswith(': ')


@pytest.mark.parametrize('environment, reason', [
    ({}, 'supervisord at  does not answer getState: Unknown protocol for serverurl'),
    ({'SUPERVISOR_SERVER_URL': 'ftp://x'}, 'supervisord at ftp://x does not answer getState: Unknown protocol'),
    ({'SUPERVISOR_SERVER_URL': 'unix:///nonexistent'},
     'supervisord at unix:///nonexistent does not answer getState: No such file or directory'),
    ({'SUPERVISOR_SERVER_URL': 'http://127.0.0.1:1'}, 'does not answer getState: Connection refused'),
    ({'SUPERVISOR_SERVER_URL': 'http://:9001'}, 'does not answer getState: the URL has no host'),
    # Half of the password would be taken for the port, and told.
    ({'SUPERVISOR_SERVER_URL': 'http://bob:half/rest@127.0.0.1:1'},
     'supervisord at http://bob:***@127.0.0.1:1 does not answer getState: ValueError'),
])
def test_call_without_supervisord(environment: dict[str, str], reason: str) -> None:
    with pytest.raises(CantTell) as raised:
        Supervisor(environment).call('getState')
    assert reason in str(raised.value)


def test_call_that_may_not_open_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    # As root nothing is forbidden; test_faults.py has this with a real socket.
    def refuse(*_: object) -> None:
        raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr('supervisor.xmlrpc.UnixStreamHTTPConnection.connect', refuse)
    with pytest.raises(CantTell, match='socket unix:///x may not be opened by user %d: see chmod' % os.getuid()):
        Supervisor({'SUPERVISOR_SERVER_URL': 'unix:///x'}).call('getState')


def test_call(tmp_path: Path) -> None:
    with Supervisord(tmp_path, PROGRAM) as supervisord:
        supervisor = Supervisor(supervisord.environment)
        pid = supervisord.wait_for_state('web')['pid']
        assert [process.pid for process in supervisor.get_processes()] == [pid]
        assert supervisor.get_process('web:web').pid == pid
        for method, name, fault in (('getProcessInfo', 'x:y', 'BAD_NAME'), ('startProcess', 'web', 'ALREADY_STARTED')):
            with pytest.raises(Refused, match=fault) as refused:
                supervisor.call(method, name)
            assert refused.value.fault == fault
        with pytest.raises(CantTell, match=r'needs an \[rpcinterface:supervisor\] section'):
            supervisor.call('noSuchMethod')
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always', ResourceWarning)
            supervisor.call('getState')
        assert [str(warning.message) for warning in caught] == [], 'it is closed, not left to be collected'


def test_call_of_a_supervisord_that_hangs(tmp_path: Path) -> None:
    with Supervisord(tmp_path, '') as supervisord:
        supervisor = Supervisor(supervisord.environment, timeout_seconds=0.5)
        os.kill(supervisord.pid, signal.SIGSTOP)
        try:
            with pytest.raises(CantTell, match='does not answer getState: timed out'):
                supervisor.call('getState')
        finally:
            os.kill(supervisord.pid, signal.SIGCONT)
        wait_for(lambda: answers(supervisor))


def answers(supervisor: Supervisor) -> bool:
    try:
        return bool(supervisor.call('getState'))
    except CantTell:
        return False


# Which supervisord.

def test_find_supervisor_by_environment_or_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Supervisord(tmp_path, '') as supervisord:
        good, bad = supervisord.environment, {'SUPERVISOR_SERVER_URL': 'unix:///nonexistent'}
        assert answers(find_supervisor(None, good))
        assert not answers(find_supervisor(None, bad))
        assert answers(find_supervisor(str(supervisord.configuration), bad))
        monkeypatch.chdir(tmp_path)
        assert answers(find_supervisor(None, {}))


def test_find_supervisor_with_a_password(tmp_path: Path) -> None:
    server = 'username=bob\npassword=größe\n'
    with Supervisord(tmp_path, '', server) as supervisord:
        with pytest.raises(CantTell, match=r'\(401\): set SUPERVISOR_USERNAME and SUPERVISOR_PASSWORD'):
            find_supervisor(str(supervisord.configuration), {}).call('getState')
        text = supervisord.configuration.read_text('utf-8')
        supervisord.configuration.write_text(text.replace('[supervisorctl]', '[supervisorctl]\n' + server), 'utf-8')
        assert answers(find_supervisor(str(supervisord.configuration), {}))


def test_find_supervisor_without_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('supervisor.options.ClientOptions.default_configfile', lambda self: None)
    with pytest.raises(CantTell, match='supervisord at http://localhost:9001 '):
        find_supervisor(None, {}).call('noSuchMethod')


@pytest.mark.parametrize('text, complaint', [
    (None, 'could not find config file'),
    ('[supervisord]\n', 'does not include supervisorctl section'),
    ('no section\n', 'no section headers'),
    ('[supervisorctl]\nserverurl=%(nonsense)s\n', 'nonsense'),
])
def test_find_supervisor_by_a_bad_configuration(tmp_path: Path, text: str | None, complaint: str) -> None:
    path = tmp_path / 'x.conf'
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match='option --configuration: .*' + complaint):
        find_supervisor(str(path), {})


def test_find_supervisor_by_a_bad_configuration_that_was_not_named(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'supervisord.conf').write_text('[supervisord]\n')
    with pytest.raises(UsageError, match='supervisord.conf: .* supervisorctl section; name another file by --conf'):
        find_supervisor(None, {})


# Names that mean nothing are told.

REAL_MONOTONIC = time.monotonic


def test_name_check_tells_once() -> None:
    lines: list[str] = []
    names = NameCheck([parse_name('wbe')], Supervisor({}), lines.append)
    names.tell_unmatched([make_process(INFO)])
    names.tell_unmatched([make_process(INFO)])
    names.ask_and_tell()  # would fail: there is no supervisord
    assert lines == ['no process is called wbe']


@pytest.fixture
def unpaid(monkeypatch: pytest.MonkeyPatch) -> None:
    """supervisor.childutils has not been imported yet."""
    monkeypatch.delitem(sys.modules, 'supervisor.childutils')


@pytest.mark.usefixtures('unpaid')
def test_name_check_in_child(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    children = find_children(os.getpid())
    with Supervisord(tmp_path, PROGRAM) as supervisord, Proxy(tmp_path / 'p.sock', supervisord.socket, {}) as proxy:
        supervisor = Supervisor({'SUPERVISOR_SERVER_URL': proxy.url})
        names = NameCheck([parse_name('wbe')], supervisor, make_log('x'))
        names.ask_and_tell()
        names.ask_and_tell()
        assert proxy.calls == ['getAllProcessInfo']
        NameCheck([EVERY], supervisor, make_log('x')).ask_and_tell()
        assert proxy.calls == ['getAllProcessInfo']
        assert set(find_children(os.getpid())) <= {*children, supervisord.pid}
    assert capfd.readouterr().err.count('no process is called wbe') == 1


@pytest.mark.usefixtures('unpaid')
def test_name_check_in_child_without_supervisord(tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    children = find_children(os.getpid())
    with Supervisord(tmp_path, PROGRAM) as supervisord, \
            Proxy(tmp_path / 'p.sock', supervisord.socket, {'getAllProcessInfo': ['lose call']}) as proxy:
        names = NameCheck([parse_name('wbe')], Supervisor({'SUPERVISOR_SERVER_URL': proxy.url}), make_log('x'))
        clock = [1000.0]
        monkeypatch.setattr(time, 'monotonic', lambda: clock[0])
        for seconds in (0, 1, 58):
            clock[0] += seconds
            names.ask_and_tell()
            assert len(proxy.calls) == 1
        clock[0] += 2
        names.ask_and_tell()
        assert len(proxy.calls) == 2
        monkeypatch.setattr(time, 'monotonic', REAL_MONOTONIC)
        assert set(find_children(os.getpid())) <= {*children, supervisord.pid}
    assert capfd.readouterr().err.count('no process is called wbe') == 1


@pytest.mark.usefixtures('unpaid')
def test_processes_by_a_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = find_children(os.getpid())
    with Supervisord(tmp_path, PROGRAM + PROGRAM.replace('web', 'größe')) as supervisord:
        supervisor = Supervisor(supervisord.environment)
        by_child = supervisor.get_processes_in_child(20)
        assert 'supervisor.childutils' not in sys.modules
        assert [process.namespec for process in by_child] == ['größe:größe', 'web:web']
        assert [process._replace(now=0) for process in supervisor.get_processes()] == [
            process._replace(now=0) for process in by_child]
        assert set(find_children(os.getpid())) <= {*children, supervisord.pid}
        # Once the imports are paid for there is no child.
        monkeypatch.setattr(os, 'fork', None)
        assert len(supervisor.get_processes_in_child(20)) == 2


@pytest.mark.usefixtures('unpaid')
def test_child_that_can_not_tell(tmp_path: Path) -> None:
    with pytest.raises(CantTell, match='supervisord at unix://.* does not answer getAllProcessInfo: No such file'):
        Supervisor({'SUPERVISOR_SERVER_URL': f'unix://{tmp_path}/none'}).get_processes_in_child(20)


class Failing(Supervisor):
    """Fails as a bug, or is killed as by the kernel that is out of memory."""

    def get_processes(self) -> list[Process]:
        if self._timeout_seconds:
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError('a bug')


@pytest.mark.usefixtures('unpaid')
def test_child_that_fails_is_not_taken_for_a_supervisord_that_hangs(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CantTell, match=r'the process that asks supervisord has failed \(wait status 256\)'):
        Failing({}, 0).get_processes_in_child(20)
    assert 'RuntimeError: a bug' in capfd.readouterr().err
    with pytest.raises(CantTell, match=r'has failed \(wait status 9\)'):
        Failing({}, 1).get_processes_in_child(20)
    assert capfd.readouterr().err == ''


@pytest.mark.usefixtures('unpaid')
def test_name_check_in_child_with_a_supervisord_that_hangs(tmp_path: Path) -> None:
    children = find_children(os.getpid())
    asked: list[int] = []

    def hang(client: socket.socket) -> None:
        asked.append(1)
        while client.recv(65536):
            pass

    with serving(hang, socket.AF_UNIX, str(tmp_path / 's.sock')):
        names = NameCheck([parse_name('wbe')], Supervisor({'SUPERVISOR_SERVER_URL': f'unix://{tmp_path}/s.sock'}),
                          make_log('x'))
        begun = time.monotonic()
        names.ask_and_tell()
        assert time.monotonic() - begun < 20
        names.ask_and_tell()
    assert asked == [1]
    assert find_children(os.getpid()) == children


# What to do about a process that was stopped here.

@pytest.mark.parametrize('state, pid, start, todo', [
    (RUNNING, 100, 1000, UNTOUCHED),
    (RUNNING, 101, 1005, RUNS),
    (RUNNING, 101, 1000, RUNS),             # restarted within the second in which it had started
    (STARTING, 100, 1000, WAIT),            # judged while it was STARTING
    (STARTING, 101, 1005, WAIT),
    (STOPPING, 100, 1000, WAIT),
    (STOPPING, 101, 1005, WAIT),
    (BACKOFF, 0, 1000, FAILED),
    (BACKOFF, 0, 1005, FAILED),
    (FATAL, 0, 1000, START),
    (FATAL, 0, 1005, START),
    (STOPPED, 0, 1000, START),
    (STOPPED, 0, 1005, LEAVE),              # started since, and stopped by somebody
    (EXITED, 0, 1000, LEAVE),               # it ended by itself before the stop
    (EXITED, 0, 1005, LEAVE),
    (EXITED, 0, 1007, START),               # that start was ours, and supervisord called it failed
    (STOPPED, 0, 1007, LEAVE),              # somebody stopped what had failed
    (UNKNOWN, 0, 1000, LEAVE),
    (UNKNOWN, 0, 1005, LEAVE),
])
def test_judge_stopped(state: int, pid: int, start: int, todo: str) -> None:
    judged = make_process(INFO)
    assert judge_stopped(judged, judged._replace(state=state, pid=pid, start=start), 1007) == todo


# Restarts, with answers from a script.

class Clock:
    """A clock whose time passes only in sleep."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Scripted(Supervisor):
    """Answers each method from a list, the last answer for ever; an exception is raised."""

    def __init__(self, **answers: list[Any]) -> None:
        super().__init__({})
        self.calls: list[str] = []
        self.answers: dict[str, list[Any]] = dict(
            {'getProcessInfo': [INFO], 'stopProcess': [True], 'startProcess': [True]}, **answers)

    def call(self, method: str, *arguments: Any) -> Any:
        self.calls.append(method)
        answers = self.answers[method]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def became(state: int, name: str, **changes: Any) -> dict[str, Any]:
    return dict(INFO, **dict(dict(state=state, statename=name, pid=0), **changes))


def refused(fault: str) -> Refused:
    return Refused(fault, fault + ': g:web')


def make_restarter(supervisor: Supervisor, **arguments: Any) -> tuple[Restarter, list[Outcome], Clock]:
    outcomes: list[Outcome] = []
    clock = Clock()
    return Restarter(supervisor, outcomes.append, sleep=clock.sleep, clock=clock, **arguments), outcomes, clock


LOST = CantTell('lost')
TRY = '; this is tried again at every event'
SAME = '; if it stops all the same, it is started again'


@pytest.mark.parametrize('answers, result, text, then', [
    pytest.param(dict(stopProcess=[refused('NOT_RUNNING')]),
                 STOP_FAILED, 'failed to stop g:web: NOT_RUNNING: g:web', [], id='ended before the stop'),
    pytest.param(dict(stopProcess=[refused('SHUTDOWN_STATE')]),
                 LEFT_ALONE, 'left g:web alone: SHUTDOWN_STATE: g:web', [], id='shutdown before the stop'),
    pytest.param(dict(stopProcess=[refused('FAILED')]),
                 STOP_FAILED, 'failed to stop g:web: FAILED: g:web', [], id='stop refused'),
    pytest.param(dict(getProcessInfo=[LOST]),
                 STOP_FAILED, 'failed to stop g:web: lost', [], id='no look before the stop'),
    pytest.param(dict(stopProcess=[LOST], getProcessInfo=[INFO, LOST]),
                 STOP_FAILED, 'failed to stop g:web: lost' + SAME, ['getProcessInfo'] * 3,
                 id='stop lost, and no look after it'),
    pytest.param(dict(stopProcess=[LOST], getProcessInfo=[INFO, became(STOPPING, 'STOPPING')]),
                 STOP_FAILED, 'failed to stop g:web: it is still STOPPING after 60 s' + SAME, None,
                 id='a stop that takes minutes'),
    pytest.param(dict(startProcess=[refused('SHUTDOWN_STATE')]),
                 LEFT_ALONE, 'left g:web alone: SHUTDOWN_STATE: g:web', [], id='shutdown before the start'),
    pytest.param(dict(startProcess=[refused('BAD_NAME')]),
                 LEFT_ALONE, 'left g:web alone: BAD_NAME: g:web', [], id='removed before the start'),
    pytest.param(dict(startProcess=[LOST], getProcessInfo=[INFO, became(STARTING, 'STARTING', pid=101)]),
                 START_FAILED, 'failed to start g:web: it is still STARTING after 60 s' + TRY, None,
                 id='a start that takes minutes'),
    pytest.param(dict(startProcess=[LOST], getProcessInfo=[INFO, LOST]),
                 START_FAILED, 'failed to start g:web: lost' + TRY, ['getProcessInfo'] * 3,
                 id='start lost, and no look'),
    pytest.param(dict(startProcess=[LOST], getProcessInfo=[INFO, became(BACKOFF, 'BACKOFF', spawnerr='quick')]),
                 START_FAILED, 'failed to start g:web: quick' + TRY, ['getProcessInfo'],
                 id='start lost, and failed'),
    pytest.param(dict(startProcess=[refused('SPAWN_ERROR')],
                      getProcessInfo=[INFO, became(FATAL, 'FATAL', spawnerr='quick')]),
                 START_FAILED, 'failed to start g:web: quick' + TRY,
                 ['getProcessInfo', 'startProcess', 'getProcessInfo'], id='spawn error'),
    pytest.param(dict(startProcess=[refused('NO_FILE')],
                      getProcessInfo=[INFO, became(FATAL, 'FATAL', spawnerr='quick')]),
                 START_FAILED, 'failed to start g:web: NO_FILE: g:web' + TRY,
                 ['getProcessInfo', 'startProcess', 'getProcessInfo'], id='an old spawn error'),
    pytest.param(dict(startProcess=[refused('ABNORMAL_TERMINATION')],
                      getProcessInfo=[INFO, became(EXITED, 'EXITED', start=1060)]),
                 START_FAILED, 'failed to start g:web: ABNORMAL_TERMINATION: g:web' + TRY,
                 ['getProcessInfo', 'startProcess', 'getProcessInfo'], id='ended at once'),
    pytest.param(dict(startProcess=[refused('SPAWN_ERROR')],
                      getProcessInfo=[INFO, became(EXITED, 'EXITED', start=1060, spawnerr='Bad exit code 3')]),
                 START_FAILED, 'failed to start g:web: Bad exit code 3' + TRY,
                 ['getProcessInfo', 'startProcess', 'getProcessInfo'], id='ended as soon as it ran'),
    pytest.param(dict(startProcess=[refused('ALREADY_STARTED')],
                      getProcessInfo=[INFO, became(RUNNING, 'RUNNING', pid=101)]),
                 RESTARTED, 'restarted g:web', [], id='started by somebody'),
    pytest.param(dict(startProcess=[refused('FAILED')], getProcessInfo=[INFO, refused('FAILED')]),
                 START_FAILED, 'failed to start g:web: FAILED: g:web' + TRY, ['getProcessInfo'] * 3,
                 id='everything refused'),
    pytest.param(dict(startProcess=[LOST, True], getProcessInfo=[INFO, became(EXITED, 'EXITED', start=1060)]),
                 LEFT_ALONE, 'left g:web alone: it is EXITED by now', [], id='start lost, and ended since'),
])
def test_restart_that_fails(answers: dict[str, list[Any]], result: str, text: str, then: list[str] | None) -> None:
    supervisor = Scripted(**answers)
    restarter, outcomes, clock = make_restarter(supervisor)
    restarter.restart(make_process(INFO))
    assert [(outcome.result, outcome.text) for outcome in outcomes] == [(result, text)]
    assert clock.now < 1000 + 62
    # Told once, and looked after where it may be down.
    supervisor.calls = []
    restarter.retry()
    assert len(outcomes) == 1
    if then is None:
        assert set(supervisor.calls) == {'getProcessInfo'}
    else:
        assert supervisor.calls == then


def test_restart_that_ends_at_a_later_tick_counts_among_the_most() -> None:
    slow = [became(STOPPING, 'STOPPING')] * 400
    supervisor = Scripted(stopProcess=[LOST])
    restarter, outcomes, clock = make_restarter(supervisor, limit=Rate(2, 3600))
    for _ in range(3):
        supervisor.answers['getProcessInfo'] = [INFO, *slow, became(STOPPED, 'STOPPED')]
        restarter.restart(make_process(INFO))
        restarter.retry()
    assert [outcome.result for outcome in outcomes] == [STOP_FAILED, RESTARTED] * 2 + [HELD_BACK]
    clock.sleep(3600)
    supervisor.answers.update(getProcessInfo=[INFO], stopProcess=[True])
    restarter.restart(make_process(INFO))
    assert outcomes[-1].result == RESTARTED


def test_start_that_fails_and_is_mended_counts_once() -> None:
    supervisor = Scripted(startProcess=[LOST, LOST, LOST, True], getProcessInfo=[
        INFO, *[became(STOPPED, 'STOPPED')] * 3, INFO])
    restarter, outcomes, _ = make_restarter(supervisor, limit=Rate(2, 3600))
    restarter.restart(make_process(INFO))
    supervisor.answers['getProcessInfo'] = [became(STOPPED, 'STOPPED'), INFO]
    restarter.retry()
    restarter.restart(make_process(INFO))
    assert [outcome.result for outcome in outcomes] == [START_FAILED, RESTARTED, RESTARTED]


def test_signal_while_a_process_is_started_again_waits_until_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Signalled(Scripted):
        def call(self, method: str, *arguments: Any) -> Any:
            if method == 'startProcess' and method in self.calls:
                listener._end(signal.SIGTERM, None)
            return super().call(method, *arguments)

    monkeypatch.setattr(listener, '_ending', False)
    restarter, outcomes, _ = make_restarter(Signalled(startProcess=[refused('NO_FILE'), True], getProcessInfo=[
        INFO, became(STOPPED, 'STOPPED')]))
    restarter.restart(make_process(INFO))
    with pytest.raises(listener.Ended):
        restarter.retry()
    assert [outcome.result for outcome in outcomes] == [START_FAILED, RESTARTED]


def test_dry_run_does_not_say_that_its_restart_was_of_no_help() -> None:
    restarter, outcomes, _ = make_restarter(Scripted(), limit=Rate(1, 3600), dry_run=True)
    restarter.restart(make_process(INFO))
    restarter.restart(make_process(INFO))
    assert [outcome.result for outcome in outcomes] == [DRY_RUN]


def test_lost_calls_are_not_made_again_at_once() -> None:
    restarter, _, clock = make_restarter(Scripted(startProcess=[LOST], getProcessInfo=[INFO, LOST]))
    restarter.restart(make_process(INFO))
    assert clock.now - 1000 == pytest.approx(3 * processes.LOOK_SECONDS)


@pytest.mark.parametrize('later, told, calls', [
    (became(STOPPED, 'STOPPED'), ['restarted g:web'], ['getProcessInfo', 'startProcess']),
    (INFO, [], ['getProcessInfo']),
])
def test_stop_that_is_lost_may_yet_come(later: dict[str, Any], told: list[str], calls: list[str]) -> None:
    supervisor = Scripted(stopProcess=[LOST], getProcessInfo=[INFO, INFO, later])
    restarter, outcomes, _ = make_restarter(supervisor)
    restarter.restart(make_process(INFO))
    assert [outcome.text for outcome in outcomes] == ['failed to stop g:web: lost' + SAME]
    supervisor.calls = []
    for _ in range(2):
        restarter.retry()
    assert [outcome.text for outcome in outcomes[1:]] == told
    assert supervisor.calls == calls


def test_start_that_supervisord_tries_again_and_that_fails_again() -> None:
    again = became(STARTING, 'STARTING', start=1061, pid=102)
    supervisor = Scripted(startProcess=[refused('SPAWN_ERROR'), True], getProcessInfo=[
        INFO, again, became(EXITED, 'EXITED', start=1061, spawnerr='Bad exit code 3')])
    restarter, outcomes, _ = make_restarter(supervisor)
    restarter.restart(make_process(INFO))
    restarter.retry()
    assert [outcome.text for outcome in outcomes] == [
        'failed to start g:web: SPAWN_ERROR: g:web' + TRY, 'restarted g:web']


def test_restart_that_fails_in_changing_ways_is_told_once_for_each() -> None:
    quick = became(BACKOFF, 'BACKOFF', spawnerr='quick', start=1060)
    supervisor = Scripted(startProcess=[refused('SPAWN_ERROR')], getProcessInfo=[INFO, quick])
    restarter, outcomes, _ = make_restarter(supervisor)
    restarter.restart(make_process(INFO))
    for infos in ([quick], [dict(quick, state=FATAL)], [quick], [LOST], [quick]):
        supervisor.answers['getProcessInfo'] = infos
        restarter.retry()
    assert [outcome.text for outcome in outcomes] == ['failed to start g:web: quick' + TRY]
    supervisor.answers.update(getProcessInfo=[dict(quick, state=FATAL)], startProcess=[refused('NO_FILE')])
    restarter.retry()
    restarter.retry()
    assert [outcome.text for outcome in outcomes[1:]] == ['failed to start g:web: NO_FILE: g:web' + TRY]
    supervisor.answers.update(getProcessInfo=[dict(quick, state=FATAL)], startProcess=[True])
    restarter.retry()
    restarter.retry()
    assert [outcome.text for outcome in outcomes[2:]] == ['restarted g:web']


@pytest.mark.parametrize('seconds, stopping, result', [(40, 3, RESTARTED), (100, 1, STOP_FAILED)])
def test_restart_with_a_slow_stop(seconds: int, stopping: int, result: str) -> None:
    """The stop's answer does not come in time; the process ends later."""
    class Slow(Scripted):
        def call(self, method: str, *arguments: Any) -> Any:
            super().call(method, *arguments)
            if method == 'stopProcess':
                self.stop_at = clock.now
                clock.now += processes.CALL_TIMEOUT_SECONDS
                raise LOST
            if method == 'getProcessInfo' and 'stopProcess' in self.calls:
                return (became(STOPPED, 'STOPPED') if clock.now >= self.stop_at + seconds
                        else became(STOPPING, 'STOPPING', pid=100))
            return INFO

    supervisor = Slow()
    restarter, outcomes, clock = make_restarter(supervisor)
    restarter.restart(make_process(INFO))
    restarter.retry()
    assert [outcome.result for outcome in outcomes] == [result, RESTARTED][:2 if result == STOP_FAILED else 1]
    assert supervisor.calls.count('stopProcess') == supervisor.calls.count('startProcess') == 1


def test_restart_of_a_name_with_a_percent_sign() -> None:
    info = dict(INFO, name='a%b')
    restarter, outcomes, _ = make_restarter(Scripted(
        getProcessInfo=[info], startProcess=[Refused('BAD_NAME', 'BAD_NAME: a%b')]))
    restarter.restart(make_process(info))
    assert outcomes[0].text == 'left g:a%b alone: BAD_NAME: a%b'


def test_max_restarts() -> None:
    supervisor = Scripted()
    restarter, outcomes, clock = make_restarter(supervisor, limit=Rate(2, 100))
    told: list[list[str]] = []
    for seconds in (0, 10, 10, 10, 69, 1, 1, 9, 1):
        clock.now += seconds
        del outcomes[:]
        restarter.restart(make_process(INFO))
        told.append([outcome.result for outcome in outcomes])
    # At 0, 10, 20, 30, 99, 100, 101, 110 and 111 s.
    assert told == [[RESTARTED], [RESTARTED], [HELD_BACK], [], [], [RESTARTED], [HELD_BACK], [RESTARTED], [HELD_BACK]]
    assert supervisor.calls.count('stopProcess') == 4
    assert '2 restarts within 100 s' in outcomes[0].text and 'supervisorctl restart g:web' in outcomes[0].text
    assert 'watched again in 90 s' in outcomes[0].text
    del outcomes[:]
    restarter.restart(make_process(dict(INFO, name='db')))
    assert [outcome.result for outcome in outcomes] == [RESTARTED]


def test_max_restarts_counts_what_was_stopped() -> None:
    supervisor = Scripted(stopProcess=[refused('FAILED'), refused('NOT_RUNNING'), True],
                          startProcess=[refused('BAD_NAME'), refused('NO_FILE'), True],
                          getProcessInfo=[INFO, INFO, INFO, INFO, became(STOPPED, 'STOPPED'), INFO])
    restarter, outcomes, _ = make_restarter(supervisor, limit=Rate(1, 100))
    for _ in range(5):
        restarter.restart(make_process(INFO))
    assert [outcome.result for outcome in outcomes] == [
        STOP_FAILED, STOP_FAILED, LEFT_ALONE, START_FAILED, HELD_BACK]


def test_dry_run() -> None:
    supervisor = Scripted()
    restarter, outcomes, _ = make_restarter(supervisor, dry_run=True)
    prepared: list[Process] = []
    for pid in (100, 100, 101):
        restarter.restart(make_process(dict(INFO, pid=pid)), prepared.append)
    restarter.retry()
    assert [(outcome.result, outcome.process.pid) for outcome in outcomes] == [(DRY_RUN, 100), (DRY_RUN, 101)]
    assert outcomes[0].text == 'dry run: would have restarted g:web'
    assert supervisor.calls == [] and prepared == []


def test_dry_run_with_max_restarts() -> None:
    restarter, outcomes, _ = make_restarter(Scripted(), dry_run=True, limit=Rate(1, 100))
    for pid in (100, 101):
        restarter.restart(make_process(dict(INFO, pid=pid)))
    assert [outcome.result for outcome in outcomes] == [DRY_RUN, HELD_BACK]


def test_every_outcome_but_one_has_a_subject() -> None:
    assert set(SUBJECTS) == {RESTARTED, STOP_FAILED, START_FAILED, HELD_BACK, DRY_RUN}
    assert all(subject % 'web' for subject in SUBJECTS.values())


def test_prepare_is_called_only_for_the_judged_process() -> None:
    supervisor = Scripted()
    restarter, outcomes, _ = make_restarter(supervisor)
    prepared: list[tuple[Process, list[str]]] = []

    def prepare(process: Process) -> None:
        prepared.append((process, list(supervisor.calls)))

    restarter.restart(make_process(INFO), prepare)
    assert prepared == [(make_process(INFO), ['getProcessInfo'])]
    restarter.restart(make_process(dict(INFO, pid=99)), prepare)
    assert len(prepared) == 1
    assert [outcome.result for outcome in outcomes] == [RESTARTED, STOP_FAILED]


def test_process_that_changes_while_it_is_prepared_is_not_stopped() -> None:
    supervisor = Scripted(getProcessInfo=[INFO, dict(INFO, pid=101)])
    restarter, outcomes, _ = make_restarter(supervisor)
    restarter.restart(make_process(INFO), lambda process: None)
    assert [outcome.result for outcome in outcomes] == [STOP_FAILED]
    assert 'stopProcess' not in supervisor.calls


# Ticks that waited.

def tick(when: str) -> Event:
    return Event('TICK_5', when, 'supervisor', 0.0)


def test_stale_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [5000.5]
    monkeypatch.setattr(time, 'time', lambda: now[0])
    restarter, _, _ = make_restarter(Scripted())
    assert not restarter.is_stale(tick('when:4000'))
    restarter.restart(make_process(INFO))
    now[0] = 5010.0
    for when, stale in (('when:4995', True), ('when:4999\n', True), ('when:5000', False), ('when:5001', False),
                        ('', False), ('when:', False), ('when:x', False), ('when:-1', False)):
        assert restarter.is_stale(tick(when)) is stale, when
    now[0] = 3000.0     # the clock was set back
    assert not restarter.is_stale(tick('when:3000'))


def test_ticks_from_before_a_late_start_are_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [5000.5]
    monkeypatch.setattr(time, 'time', lambda: now[0])
    stopped = became(STOPPED, 'STOPPED')
    restarter, outcomes, _ = make_restarter(Scripted(
        startProcess=[refused('NO_FILE'), refused('NO_FILE'), True], getProcessInfo=[INFO, stopped]))
    restarter.restart(make_process(INFO))
    now[0] = 6000.5
    restarter.retry()
    assert not restarter.is_stale(tick('when:5999'))    # nothing was started
    restarter.retry()
    assert restarter.is_stale(tick('when:5999'))
    assert not restarter.is_stale(tick('when:6000'))
    assert [outcome.result for outcome in outcomes] == [START_FAILED, RESTARTED]


# Restarts on a real supervisord.

def judge(supervisord: Supervisord, name: str = 'web') -> Process:
    supervisord.wait_for_state(name)
    return make_process(supervisord.info(name))


def restarter_of(supervisor: Supervisor, limit: Rate | None = None) -> tuple[Restarter, list[Outcome]]:
    outcomes: list[Outcome] = []
    return Restarter(supervisor, outcomes.append, limit), outcomes


def results(outcomes: list[Outcome]) -> list[str]:
    return [outcome.result for outcome in outcomes]


def retry_until_restarted(restarter: Restarter, outcomes: list[Outcome]) -> None:
    def retry() -> bool:
        restarter.retry()
        return RESTARTED in results(outcomes)
    wait_for(retry)


def test_restart(tmp_path: Path) -> None:
    with Supervisord(tmp_path, PROGRAM + PROGRAM.replace('web', 'größe')) as supervisord:
        restarter, outcomes = restarter_of(Supervisor(supervisord.environment))
        for name in ('web', 'größe'):
            judged = judge(supervisord, name)
            restarter.restart(judged)
            info = supervisord.info(name)
            assert info['statename'] == 'RUNNING' and info['pid'] != judged.pid
            assert outcomes.pop() == Outcome(judged, RESTARTED, 'restarted ' + name)
            # Its pid is another by now.
            restarter.restart(judged)
            assert supervisord.info(name)['pid'] == info['pid']
            assert outcomes.pop() == Outcome(judged, STOP_FAILED, (
                'failed to stop %s: it is RUNNING with pid %d now, and pid %d was judged'
                % (name, info['pid'], judged.pid)))
        assert outcomes == []


@pytest.mark.parametrize('change, result, reason', [
    ('stop', STOP_FAILED, 'it is STOPPED with pid 0 now'),
    ('stopping', LEFT_ALONE, 'it is STOPPING'),
    ('kill', STOP_FAILED, 'it is EXITED with pid 0 now'),
    ('remove', STOP_FAILED, 'BAD_NAME: web'),
])
def test_process_that_has_changed_is_not_stopped(tmp_path: Path, change: str, result: str, reason: str) -> None:
    # It stops only when it is killed.
    program = write_script(tmp_path / 'web', 'trap "" TERM; touch ready; while :; do sleep 0.1; done\n')
    with Supervisord(tmp_path, '[program:web]\ncommand={}\ndirectory=%(here)s\nstartsecs=0\nautorestart=false\n'
                               'stopsignal={}\nstopwaitsecs=2\n'.format(program, 'TERM' if change == 'stopping' else 'KILL')) as supervisord:
        judged = judge(supervisord)
        wait_for((tmp_path / 'ready').exists)
        if change == 'kill':
            os.kill(judged.pid, signal.SIGKILL)
            supervisord.wait_for_state('web', 'EXITED')
        else:
            supervisord.rpc.stopProcess('web', change != 'stopping')
        if change == 'remove':
            supervisord.rpc.removeProcessGroup('web')
        restarter, outcomes = restarter_of(Supervisor(supervisord.environment))
        restarter.restart(judged)
        restarter.retry()
        assert results(outcomes) == [result]
        assert reason in outcomes[0].text
        assert supervisord.log.count('spawned:') == 1


def break_file(path: Path) -> None:
    path.unlink()


def break_mode(path: Path) -> None:
    path.chmod(0o644)


def break_code(path: Path) -> None:
    write_script(path, 'exit 3\n')


@pytest.mark.parametrize('breaks, reason', [
    (break_file, "NO_FILE: can't find command"),
    (break_mode, 'NOT_EXECUTABLE: command at '),
    (break_code, '(Exited too quickly|Bad exit code 3)'),   # as supervisord sees the end before or after a second
])
def test_start_that_fails_is_tried_again(tmp_path: Path, breaks: Callable[[Path], None], reason: str) -> None:
    program = write_script(tmp_path / 'web', 'exec sleep 1000\n')
    with Supervisord(tmp_path, f'[program:web]\ncommand={program}\nstartsecs=1\nstartretries=0\nautorestart=false\n') as supervisord:
        restarter, outcomes = restarter_of(Supervisor(supervisord.environment))
        judged = judge(supervisord)
        breaks(program)
        restarter.restart(judged)
        assert results(outcomes) == [START_FAILED]
        assert re.match('failed to start web: ' + reason, outcomes[0].text)
        for _ in range(2):
            wait_for(lambda: supervisord.info('web')['statename'] in ('FATAL', 'STOPPED', 'EXITED'))
            restarter.retry()
        failures = [outcome.text for outcome in outcomes]
        assert len(failures) == len(set(failures)) and (breaks is break_code or len(failures) == 1)
        del outcomes[:]
        write_script(program, 'exec sleep 1000\n')
        restarter.retry()
        assert results(outcomes) == [RESTARTED]
        assert supervisord.info('web')['statename'] == 'RUNNING'
        restarter.retry()
        assert len(outcomes) == 1


def test_start_that_supervisord_retries_itself(tmp_path: Path) -> None:
    """A process in BACKOFF is supervisord's to start; when it runs, that is told."""
    program = write_script(tmp_path / 'web', 'exec sleep 1000\n')
    with Supervisord(tmp_path, f'[program:web]\ncommand={program}\nstartsecs=1\nstartretries=9\n') as supervisord:
        restarter, outcomes = restarter_of(Supervisor(supervisord.environment))
        judged = judge(supervisord)
        break_code(program)
        restarter.restart(judged)
        assert results(outcomes) == [START_FAILED]
        write_script(program, 'exec sleep 1000\n')
        retry_until_restarted(restarter, outcomes)
        assert set(results(outcomes)) == {START_FAILED, RESTARTED}
        assert supervisord.info('web')['statename'] == 'RUNNING'


def test_stop_that_comes_late(tmp_path: Path) -> None:
    """supervisord hangs when the stop is sent, and obeys when nobody waits for its answer any more."""
    class Freezing(Supervisor):
        def call(self, method: str, *arguments: Any) -> Any:
            if method == 'stopProcess':
                os.kill(supervisord.pid, signal.SIGSTOP)
            return super().call(method, *arguments)

    with Supervisord(tmp_path, PROGRAM) as supervisord:
        restarter, outcomes = restarter_of(Freezing(supervisord.environment, timeout_seconds=0.5))
        judged = judge(supervisord)
        try:
            restarter.restart(judged)
            assert results(outcomes) == [STOP_FAILED]
            assert 'does not answer stopProcess: timed out' in outcomes[0].text
            restarter.retry()
            assert len(outcomes) == 1
        finally:
            os.kill(supervisord.pid, signal.SIGCONT)
        supervisord.wait_for_state('web', 'STOPPED')
        retry_until_restarted(restarter, outcomes)
        assert results(outcomes) == [STOP_FAILED, RESTARTED]
        assert supervisord.info('web')['statename'] == 'RUNNING'
        assert supervisord.log.count('spawned:') == 2


@pytest.mark.parametrize('rules, expected', [
    ({'stopProcess': ['lose answer'], 'startProcess': ['lose call', 'lose answer']}, [RESTARTED]),
    ({'stopProcess': ['lose answer'], 'getProcessInfo': ALL_LOST}, [STOP_FAILED, RESTARTED]),
    ({'startProcess': ['lose answer'], 'getProcessInfo': ALL_LOST}, [START_FAILED, RESTARTED]),
    ({'stopProcess': ['lose call']}, [STOP_FAILED]),
])
def test_lost_calls(tmp_path: Path, rules: Mapping[str, list[str]], expected: list[str]) -> None:
    with Supervisord(tmp_path, PROGRAM) as supervisord:
        judged = judge(supervisord)
        proxy_rules = {method: list(words) for method, words in rules.items()}
        with Proxy(tmp_path / 'p.sock', supervisord.socket, proxy_rules) as proxy:
            restarter, outcomes = restarter_of(Supervisor({'SUPERVISOR_SERVER_URL': proxy.url}))
            restarter.restart(judged)
            for _ in range(3):
                restarter.retry()
        assert results(outcomes) == expected
        assert supervisord.log.count('spawned:') == (2 if RESTARTED in expected else 1)
        assert supervisord.info('web')['statename'] == 'RUNNING'


@pytest.mark.parametrize('operator, state, expected', [
    ('start', 'RUNNING', [START_FAILED, RESTARTED]),
    ('start stop', 'STOPPED', [START_FAILED, LEFT_ALONE]),
    ('remove', None, [START_FAILED, LEFT_ALONE]),
])
def test_process_that_was_left_down_is_its_operators(tmp_path: Path, operator: str, state: str | None,
                                                     expected: list[str]) -> None:
    with Supervisord(tmp_path, PROGRAM) as supervisord:
        judged = judge(supervisord)
        # start is in whole seconds, and tells whether it was started since
        wait_for(lambda: time.time() > judged.start + 1)
        rules = {'startProcess': ['lose call'], 'getProcessInfo': list(ALL_LOST)}
        with Proxy(tmp_path / 'p.sock', supervisord.socket, rules) as proxy:
            restarter, outcomes = restarter_of(Supervisor({'SUPERVISOR_SERVER_URL': proxy.url}))
            restarter.restart(judged)
            rules.clear()
            assert supervisord.info('web')['statename'] == 'STOPPED'
            if operator == 'remove':
                supervisord.rpc.removeProcessGroup('web')
            else:
                for word in operator.split():
                    getattr(supervisord.rpc, word + 'Process')('web')
            spawned = supervisord.log.count('spawned:')
            for _ in range(2):
                restarter.retry()
        assert results(outcomes) == expected
        assert supervisord.log.count('spawned:') == spawned
        if state:
            assert supervisord.info('web')['statename'] == state


def test_signal_ends_the_listener_after_the_restart_and_its_outcome(tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the stop and the start a signal comes; the next process is left alone, and retry still works."""
    monkeypatch.setattr(listener, '_ending', False)

    class Signalled(Supervisor):
        def call(self, method: str, *arguments: Any) -> Any:
            if method == 'startProcess':
                listener._end(signal.SIGTERM, None)
            return super().call(method, *arguments)

    with Supervisord(tmp_path, PROGRAM) as supervisord:
        restarter, outcomes = restarter_of(Signalled(supervisord.environment))
        judged = judge(supervisord)
        with pytest.raises(listener.Ended):
            restarter.restart(judged)
        assert results(outcomes) == [RESTARTED]
        assert supervisord.info('web')['statename'] == 'RUNNING'


# Shortages, and what must not be told.

@pytest.mark.usefixtures('unpaid')
@pytest.mark.parametrize('function', ['pipe', 'fork'])
def test_no_child_to_be_had(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise BlockingIOError(11, 'Resource temporarily unavailable')

    monkeypatch.setattr(os, function, fail)
    fds = os.listdir('/proc/self/fd')
    with pytest.raises(CantTell, match='^unable to start a process that asks supervisord: Resource temporarily'):
        Supervisor({'SUPERVISOR_SERVER_URL': 'unix:///none'}).get_processes_in_child(5)
    assert os.listdir('/proc/self/fd') == fds


@pytest.mark.parametrize('url', ['http://admin:SECRET@127.0.0.1:1', 'https://admin:SECRET@127.0.0.1:1'])
def test_password_of_the_server_url_is_not_told(url: str) -> None:
    with pytest.raises(CantTell) as raised:
        Supervisor({'SUPERVISOR_SERVER_URL': url}).get_processes()
    assert 'SECRET' not in str(raised.value) and 'admin:***@127.0.0.1:1' in str(raised.value)
