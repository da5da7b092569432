"""supervisord's XML-RPC interface: names and processes from tables; calls, answered by a server of the test."""
from __future__ import annotations

import io
import marshal
import os
import socket
import subprocess
import sys
import warnings
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Callable, Iterator
from xmlrpc.client import Fault, dumps

import pytest
from supervisor.xmlrpc import Faults
from support import find_children, read_until, serving
from table import for_each

from superlance import rpc
from superlance.listener import ExitRequest
from superlance.options import EVERY, Name, UsageError, parse_name
from superlance.rpc import (
    HttpError,
    Refused,
    State,
    Supervisor,
    Unknown,
    find_supervisor,
    make_process,
    resolve_names,
)

INFO: dict[str, Any] = {'group': 'g', 'name': 'web', 'pid': 100, 'state': 20, 'statename': 'RUNNING', 'start': 1000,
                        'now': 1060, 'spawnerr': ''}
PAIRS = [('shop', 'db'), ('shop', 'web'), ('pool', 'pool_0'), ('pool', 'pool_1'), ('web', 'web')]
SECONDS = 20


# Names and processes.

@for_each('name, resolved', [
    ('web', 'web'), ('shop:web', 'shop:web'), ('shop', 'shop:*'), ('shop:*', 'shop:*'), ('pool', 'pool:*'),
    ('pool_0', 'pool_0'), ('nobody', 'nobody'), ('shop:pool', 'shop:pool'),
])
def test_bare_name_of_a_group_is_resolved_to_the_group(name: str, resolved: str) -> None:
    assert list(map(str, resolve_names([EVERY, parse_name(name)], PAIRS))) == [str(EVERY), resolved]
    assert resolve_names([Name(None, 'shop')], iter(PAIRS)) == [Name('shop', None)]


def test_process() -> None:
    process = make_process(INFO)
    assert (process.namespec, process.title, process.uptime_seconds) == ('g:web', 'g:web', 60)
    assert process._replace(group='web').title == 'web'
    assert process._replace(now=900).uptime_seconds == 0
    assert process.state == State.RUNNING
    without = {key: value for key, value in INFO.items() if key != 'spawnerr'}
    assert make_process(without).spawn_error == ''


# Calls.

def answering(*answers: bytes) -> Callable[[socket.socket], None]:
    """Answer each call with the next of answers, the last for ever."""
    left = list(answers)

    def handle(client: socket.socket) -> None:
        read_until(client, b'</methodCall>')
        client.sendall(left.pop(0) if len(left) > 1 else left[0])
    return handle


def hang(client: socket.socket) -> None:
    client.settimeout(None)
    while client.recv(65536):
        pass


def http(status: str, body: bytes = b'', more: bytes = b'') -> bytes:
    return b'HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n' % (status.encode(), len(body) + len(more)) + body


def xml(answer: Any) -> bytes:
    if isinstance(answer, Fault):
        return http('200 OK', dumps(answer).encode())
    return http('200 OK', dumps((answer,), methodresponse=True).encode())


@contextmanager
def supervised(handle: Callable[[socket.socket], None], **arguments: Any) -> Iterator[Supervisor]:
    with serving(handle) as port:
        yield Supervisor({'SUPERVISOR_SERVER_URL': f'http://127.0.0.1:{port}', **arguments.pop('environment', {})},
                         **arguments)


def test_call_returns_the_answer_and_closes_the_connection() -> None:
    with supervised(answering(xml([INFO]), xml(INFO), xml({'text': 'größe'}))) as supervisor:
        assert supervisor.get_processes() == [make_process(INFO)]
        assert supervisor.get_process('g:web') == make_process(INFO)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always', ResourceWarning)
            assert supervisor.call('anything', 1, 'x') == {'text': 'größe'}
        assert [str(warning.message) for warning in caught] == []


def test_control_characters_of_a_log_become_visible() -> None:
    with supervised(answering(xml('a\0b\x1b[1m\tc\n'))) as supervisor:
        assert supervisor.call('readLog', -100, 0) == 'a\u2400b\u241b[1m\tc\n'


@pytest.mark.parametrize('fault', ['BAD_NAME', 'NOT_RUNNING', 'SHUTDOWN_STATE', 'SPAWN_ERROR'])
def test_fault_is_refused_with_its_name(fault: str) -> None:
    with supervised(answering(xml(Fault(getattr(Faults, fault), f'{fault}: web')))) as supervisor, \
            pytest.raises(Refused, match=f'^{fault}: web$') as refused:
        supervisor.call('stopProcess', 'web')
    assert refused.value.fault == fault


@for_each('answer, reason', [
    (b'', 'does not answer getState: .'),
    (b'no http\r\n\r\n', 'does not answer getState: .'),
    (http('500 Oops'), 'answered getState with 500 Oops$'),
    (http('200 OK', b'<no xml'), 'does not answer getState: .'),
    (http('200 OK', b'<html></html>'), 'does not answer getState: .'),
    (http('200 OK', b'<methodResponse>', b'more'), 'does not answer getState: .'),
    (http('200 OK', b'\xff\xfe'), 'does not answer getState: .'),
    (xml(Fault(Faults.UNKNOWN_METHOD, 'UNKNOWN_METHOD')),
     r'does not offer this interface: supervisord.conf needs an \[rpcinterface:supervisor\] section$'),
])
def test_meaningless_answer_is_unknown(answer: bytes, reason: str) -> None:
    with supervised(answering(answer)) as supervisor, \
            pytest.raises(Unknown, match=rf'^supervisord at http://127.0.0.1:\d+ {reason}') as raised:
        supervisor.call('getState')
    assert isinstance(raised.value, HttpError) == reason.startswith('answered')


@for_each('method, answer', [
    ('getProcessInfo', True),
    ('getProcessInfo', {**INFO, 'pid': 'none'}),
    ('getProcessInfo', {key: value for key, value in INFO.items() if key != 'start'}),
    ('getAllProcessInfo', INFO),
    ('getAllProcessInfo', [INFO, 1]),
    ('getAllConfigInfo', [{'name': 'web'}]),
    ('readLog', 1),
])
def test_answer_that_supervisor_does_not_document_is_unknown(method: str, answer: Any) -> None:
    with supervised(answering(xml(answer))) as supervisor, \
            pytest.raises(Unknown, match=f'sent an unexpected answer to {method}: .'):
        supervisor.call(method)


@pytest.mark.parametrize(('environment', 'text'), [
    ({}, 'supervisord requires a user name and password (401): set SUPERVISOR_USERNAME and SUPERVISOR_PASSWORD with '
         "environment= in the listener's section (with --once: username and password in [supervisorctl])"),
    ({'SUPERVISOR_USERNAME': 'bob', 'SUPERVISOR_PASSWORD': 'SECRET'},
     'supervisord rejects the user name and password (401): check SUPERVISOR_USERNAME and SUPERVISOR_PASSWORD with '
     "environment= in the listener's section (with --once: username and password in [supervisorctl])"),
])
def test_401_names_the_remedy(environment: dict[str, str], text: str) -> None:
    with supervised(answering(http('401 Unauthorized')), environment=environment) as supervisor, \
            pytest.raises(Unknown) as raised:
        supervisor.call('getState')
    assert str(raised.value) == text


@pytest.mark.parametrize(('environment', 'reason'), [
    ({}, 'supervisord at  does not answer getState: Unknown protocol for serverurl'),
    ({'SUPERVISOR_SERVER_URL': 'ftp://x'}, 'supervisord at ftp://x does not answer getState: Unknown protocol'),
    ({'SUPERVISOR_SERVER_URL': 'unix:///nonexistent'},
     'supervisord at unix:///nonexistent does not answer getState: No such file or directory'),
    ({'SUPERVISOR_SERVER_URL': 'http://127.0.0.1:1'}, 'does not answer getState: Connection refused'),
    ({'SUPERVISOR_SERVER_URL': 'http://:9001'}, 'does not answer getState: the URL has no host'),
    # Half of the password would be taken for the port, and shown.
    ({'SUPERVISOR_SERVER_URL': 'http://bob:half/rest@127.0.0.1:1'},
     'supervisord at http://bob:***@127.0.0.1:1 does not answer getState: ValueError'),
])
def test_call_without_a_supervisord(environment: dict[str, str], reason: str) -> None:
    with pytest.raises(Unknown) as raised:
        Supervisor(environment).call('getState')
    assert reason in str(raised.value)


@pytest.mark.parametrize('url', ['http://admin:SECRET@127.0.0.1:1', 'https://admin:SECRET@127.0.0.1:1'])
def test_password_of_the_url_is_never_shown(url: str) -> None:
    with pytest.raises(Unknown) as raised:
        Supervisor({'SUPERVISOR_SERVER_URL': url}).get_processes()
    assert 'SECRET' not in str(raised.value) and 'admin:***@127.0.0.1:1' in str(raised.value)


def test_socket_without_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing is forbidden to root; tests/supervisord has this with a real socket.
    def refuse(*_: object) -> None:
        raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr('supervisor.xmlrpc.UnixStreamHTTPConnection.connect', refuse)
    complaint = rf"^uid {os.getuid()} is not allowed to open supervisord's socket unix:///x: see chmod"
    with pytest.raises(Unknown, match=complaint):
        Supervisor({'SUPERVISOR_SERVER_URL': 'unix:///x'}).call('getState')


def test_call_has_a_timeout() -> None:
    with supervised(hang, timeout_seconds=0.2) as supervisor, \
            pytest.raises(Unknown, match='does not answer getState: timed out'):
        supervisor.call('getState')


# Calls in a helper process.

@pytest.fixture
def not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """supervisor.childutils has not been imported yet."""
    monkeypatch.delitem(sys.modules, 'supervisor.childutils', raising=False)


def is_imported() -> bool:
    return 'supervisor.childutils' in sys.modules


@pytest.fixture
def helper_here(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What a helper process would do is done in this process; the list has the seconds that each one got."""
    seconds: list[float] = []

    def run(command: list[str], seconds_left: Callable[[], float], environment: dict[str, str], **_: object) -> bytes:
        seconds.append(seconds_left())
        with redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            exec(command[2], {})
        patch.delitem(sys.modules, 'supervisor.childutils')
        return printed.getvalue().encode('ascii')
    monkeypatch.setattr(rpc, 'run_command', run)
    return seconds


@pytest.mark.usefixtures('not_imported')
def test_helper_spares_the_import_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is imported from the working directory, and warnings that are printed at start and end do no harm."""
    trap = f'open({str(tmp_path / "executed")!r}, "a").write(__name__)\n'
    (tmp_path / 'superlance').mkdir()
    for name in ('superlance/__init__.py', 'superlance/rpc.py', 'json.py', 'marshal.py', 're.py', 'xmlrpc.py',
                 'socket.py', 'supervisor.py', 'sitecustomize.py'):
        (tmp_path / name).write_text(trap)
    path = tmp_path / 'path'
    path.mkdir()
    (path / 'sitecustomize.py').write_text(
        'import atexit, sys\nprint("out", flush=True)\nsys.stderr.write("no newline")\n'
        'atexit.register(print, "ResourceWarning: unclosed", flush=True)\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PYTHONPATH', str(path))
    monkeypatch.setattr(sys, 'path', [path for path in sys.path if path])
    children = set(find_children(os.getpid()))
    with supervised(answering(xml(1), xml('größe'))) as supervisor:
        assert supervisor.call_in_helper([('one',), ('two', 'größe', 2)], SECONDS) == [1, 'größe']
    assert not is_imported()
    assert set(find_children(os.getpid())) <= children
    assert not (tmp_path / 'executed').exists()


@pytest.mark.usefixtures('not_imported')
def test_helper_is_not_used_after_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    with supervised(answering(xml(1))) as supervisor:
        supervisor.call('getState')
        monkeypatch.setattr(subprocess, 'Popen', None)
        assert supervisor.call_in_helper([('getState',)], SECONDS) == [1]


@pytest.mark.usefixtures('not_imported')
def test_helper_that_is_needed_often_is_replaced_by_the_import(
        helper_here: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, 'HELPERS', 1)
    with supervised(answering(xml(1))) as supervisor:
        supervisor.call_in_helper([('getState',)], SECONDS)
        assert len(helper_here) == 1
        supervisor._helpers[0] -= rpc.HELPERS_SECONDS
        supervisor.call_in_helper([('getState',)], SECONDS)
        assert len(helper_here) == 2 and not is_imported()
        supervisor.call_in_helper([('getState',)], SECONDS)
        assert len(helper_here) == 2 and is_imported()


def refuse_to_start(*_: object, **__: object) -> None:
    """As fork() does under `ulimit -u`."""
    raise BlockingIOError(11, 'Resource temporarily unavailable')


@pytest.mark.usefixtures('not_imported')
@pytest.mark.parametrize(('target', 'value'), [
    pytest.param('subprocess.Popen', refuse_to_start, id='no process left'),
    pytest.param('sys.executable', '/bin/false', id='failure'),
    pytest.param('sys.executable', '/bin/echo', id='no answer'),
])
def test_call_is_made_here_if_a_helper_does_not_work(target: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, value)
    with supervised(answering(xml(1))) as supervisor:
        assert supervisor.call_in_helper([('getState',)], SECONDS) == [1]
    assert is_imported()


@pytest.mark.usefixtures('not_imported')
def test_processes_from_a_helper_or_why_there_is_no_answer(tmp_path: Path, helper_here: list[float]) -> None:
    with supervised(answering(xml([INFO]), xml(Fault(Faults.SHUTDOWN_STATE, 'SHUTDOWN_STATE')))) as supervisor:
        assert supervisor.get_processes_in_helper(SECONDS) == [make_process(INFO)]
        with pytest.raises(Refused) as refused:
            supervisor.get_processes_in_helper(SECONDS)
    assert refused.value.fault == 'SHUTDOWN_STATE'
    with pytest.raises(Unknown, match=r'supervisord at unix://.* does not answer getAllProcessInfo: No such file'):
        Supervisor({'SUPERVISOR_SERVER_URL': f'unix://{tmp_path}/none'}).get_processes_in_helper(SECONDS)
    assert len(helper_here) == 3 and all(SECONDS / 2 < seconds <= SECONDS for seconds in helper_here)


@pytest.mark.usefixtures('not_imported')
def test_helper_has_a_deadline_and_is_killed() -> None:
    children = set(find_children(os.getpid()))
    with supervised(hang) as supervisor, pytest.raises(Unknown, match=r'^supervisord did not answer within 0\.5s$'):
        supervisor.get_processes_in_helper(0.5)
    assert set(find_children(os.getpid())) <= children


@pytest.mark.usefixtures('not_imported')
def test_request_to_exit_interrupts_a_helper() -> None:
    request = ExitRequest()

    def handle(client: socket.socket) -> None:
        request.requested = True
        hang(client)

    with supervised(handle) as supervisor, \
            pytest.raises(Unknown, match=r'^interrupted, because the listener is shutting down$'):
        supervisor.get_processes_in_helper(600, request)     # longer than the timeout of a test


@pytest.mark.parametrize('answer', [Unknown('lost'), Refused('BAD_NAME', 'BAD_NAME: x'), [1, 'größe']])
def test_answers_of_a_helper(answer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The side of the helper, in this process."""
    def call(self: Supervisor, method: str, *arguments: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer
    monkeypatch.setattr(Supervisor, 'call', call)
    rpc.answer_calls(marshal.dumps((1.0, [('getState',), ('x', 1)])).hex())
    out, _ = capsys.readouterr()
    answers, fault, reason = marshal.loads(bytes.fromhex(out.split()[-1]))
    assert answers == ([] if isinstance(answer, Exception) else [answer, answer])
    assert fault == getattr(answer, 'fault', '')
    assert reason == (str(answer) if isinstance(answer, Exception) else '')


# Which supervisord --once asks.

def get_url(configuration: str | None, environment: dict[str, str]) -> str:
    return find_supervisor(configuration, environment)._environment['SUPERVISOR_SERVER_URL']


def test_supervisor_is_found_by_environment_or_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / 'supervisord.conf'
    path.write_text('[supervisorctl]\nserverurl=unix:///from-configuration\nusername=bob\npassword=größe\n', 'utf-8')
    environment = {'SUPERVISOR_SERVER_URL': 'unix:///from-environment'}
    assert get_url(None, environment) == 'unix:///from-environment'
    assert get_url(str(path), environment) == 'unix:///from-configuration'
    monkeypatch.chdir(tmp_path)
    assert find_supervisor(None, {})._environment == {
        'SUPERVISOR_SERVER_URL': 'unix:///from-configuration', 'SUPERVISOR_USERNAME': 'bob',
        'SUPERVISOR_PASSWORD': 'größe'}


def test_missing_configuration_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr('supervisor.options.ClientOptions.default_configfile', lambda self: None)
    assert get_url(None, {}) == 'http://localhost:9001'
    error = capsys.readouterr().err
    assert error.startswith('no supervisord.conf found (looked for ') and error.count('\n') == 1
    assert error.endswith('): using http://localhost:9001; name a file with --configuration=FILE\n')


@pytest.mark.parametrize(('text', 'complaint'), [
    (None, 'could not find config file'),
    ('[supervisord]\n', 'does not include supervisorctl section'),
    ('no section\n', 'no section headers'),
    ('[supervisorctl]\nserverurl=%(nonsense)s\n', 'nonsense'),
])
def test_configuration_that_cannot_be_used(tmp_path: Path, text: str | None, complaint: str) -> None:
    path = tmp_path / 'x.conf'
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=f'option --configuration: .*{complaint}'):
        find_supervisor(str(path), {})


def test_configuration_that_cannot_be_used_and_was_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'supervisord.conf').write_text('[supervisord]\n')
    with pytest.raises(UsageError, match=r'supervisord.conf: .* supervisorctl section; name another file with --conf'):
        find_supervisor(None, {})
