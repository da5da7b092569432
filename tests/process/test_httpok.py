"""httpok as a process: real servers, real mail, signals and faults of its surroundings."""
from __future__ import annotations

import base64
import os
import re
import resource
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from inbox import CommandInbox
from support import (
    C_LOCALE,
    NO_SUPERVISORD,
    PYTHON,
    TIMEOUT,
    Listener,
    find_children,
    is_alive,
    read,
    run_command_line,
    wait_for,
)
from web import Answer, Site, chunked, hang, make_head, response, stream

from superlance import __version__

FAILING = response(status='500 No')
SHORT = ['-t', '0.4']
BAD_LINE = 'status 500 No (expected 200)'


def mail_to(inbox: CommandInbox) -> list[str]:
    """Return the options that send all mail to an inbox."""
    return ['-m', 'bob@example.com', '-s', inbox.command]


@pytest.fixture
def inbox(tmp_path: Path) -> CommandInbox:
    return CommandInbox(tmp_path)


def messages(listener: Listener) -> list[str]:
    return [line.partition(' httpok: ')[2] for line in listener.log.splitlines()]


def test_an_outage_is_two_mails(inbox: CommandInbox) -> None:
    with Site(FAILING, FAILING, FAILING, response()) as site, \
            Listener(['httpok', '-n', 'w\nBcc: eve', *mail_to(inbox), site.url()]) as listener:
        for _ in range(5):
            listener.tick()
        assert listener.close() == 0
        assert len(site.requests) == 5
        assert f'\r\nUser-Agent: httpok/{__version__}\r\n' in site.requests[0]
    url = site.url()
    log = [line for line in messages(listener) if 'mail' not in line]
    assert log[:3] == [f'{url}: {BAD_LINE}'] * 3
    assert re.fullmatch(rf'{url}: recovered after [\d.]+s: status 200 in \d\.\d{{3}}s', log[3])
    assert len(log) == 4
    first, second = inbox.mails
    assert str(first['Subject']) == f'httpok [w | Bcc: eve]: {url}: bad status returned'
    assert str(second['Subject']).startswith(f'httpok [w | Bcc: eve]: {url}: recovered after ')
    assert (first['To'], first['Bcc']) == ('bob@example.com', None)
    body = first.get_content()
    assert body.startswith(f'{url}\n\n{BAD_LINE}\n')
    assert 'supervisor supervisor\n' in body


def test_the_first_lines_of_the_log() -> None:
    with Site() as site, Listener(['httpok', '-p', 'web', '-b', '', site.url()]) as listener:
        listener.tick()
        assert listener.close() == 0
        lines = messages(listener)
    assert lines[0] == (f'httpok {__version__}: checks {site.url()} (timeout 10s, expects status 200); restarts web; '
                        'no mail')
    assert lines[1] == 'warning: ignored option -b: its value is empty'
    assert lines[2].startswith(f'warning: supervisord at {NO_SUPERVISORD} does not answer ')
    assert len(lines) == 3


def test_failed_checks_are_only_logged_without_an_address() -> None:
    with Site(FAILING) as site, Listener(['httpok', '--failures=2', site.url()]) as listener:
        for _ in range(4):
            listener.tick()
        assert listener.close() == 0
        first = f'{site.url()}: {BAD_LINE} (failed check 1 of 2)'
        assert messages(listener)[1:] == [first, f'{site.url()}: {BAD_LINE}'] * 2


def test_a_hostile_reason_phrase_stays_one_line_of_log_and_mail(inbox: CommandInbox) -> None:
    answer = response(status='500 a\x1b[2J\x07\rBcc: eve@example.com\x85\x0b' + 'x' * 3000)
    with Site(answer) as site, Listener(['httpok', *mail_to(inbox), site.url()]) as listener:
        listener.tick()
        assert listener.close() == 0
    lines = listener.log.splitlines()[1:]
    assert len(lines) == 2 and 'status 500 a' in lines[0]
    assert all(line.isprintable() and len(line) < 500 for line in lines)
    mail, = inbox.mails
    assert mail['Bcc'] is None
    assert all(line.isprintable() and len(line) < 500 for line in mail.get_content().split('\n'))


PASSWORD = 's3cr#t!'
PAIR = base64.b64encode(f'bob:{PASSWORD}'.encode()).decode()


@pytest.mark.parametrize(('way', 'answer'), [
    ('URL', response(status='401 Unauthorized')), ('environment', b''), ('file', response())])
def test_a_password_is_never_logged_or_mailed(way: str, answer: bytes, tmp_path: Path, inbox: CommandInbox) -> None:
    argv = ['-b', 'fine', '-p', 'web']
    environment: Any = {}
    user = {'URL': 'bob:s3cr%23t%21@', 'environment': 'bob@', 'file': ''}[way]
    if way == 'environment':
        environment['SUPERLANCE_HTTP_PASSWORD'] = PASSWORD
    elif way == 'file':
        (tmp_path / 'headers').write_text(f'Authorization: Basic {PAIR}\n', 'utf-8')
        argv.append(f'--header=@{tmp_path}/headers')
    with Site(answer) as site:
        url = site.url(user=user)
        with Listener(['httpok', '-v', *argv, *mail_to(inbox), url], environment) as listener:
            listener.tick()
            assert listener.close() == 0
        printed = run_command_line('httpok', '--once', *argv, url, SUPERVISOR_SERVER_URL=NO_SUPERVISORD, **environment)
        assert all(f'Authorization: Basic {PAIR}\r\n' in request for request in site.requests)
        assert len(site.requests) == 2
    assert (printed.returncode, printed.stderr) == (1, '')
    mail, = inbox.mails
    for text in (listener.log, read(tmp_path / 'inbox'), str(mail['Subject']), printed.stdout):
        assert site.url(user={'URL': 'bob:***@'}.get(way, user)) in text
        assert not any(secret in text for secret in ('s3cr', PAIR))


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_abandons_the_check_and_the_event_is_acknowledged(signum: int, inbox: CommandInbox) -> None:
    with Site(hang) as site, Listener(['httpok', '-t', '600', *mail_to(inbox), site.url()]) as listener:
        listener.expect(b'READY\n')
        listener.send_event('TICK_5', f'when:{int(time.time())}')
        wait_for(lambda: site.requests, 'the check')
        assert listener.terminate(signum) == 0
        listener.expect(b'RESULT 2\nOK')
        assert messages(listener)[1:] == [f'{site.url()}: check abandoned: httpok is shutting down']
    assert inbox.mails == []


def hang_in_look_ups(folder: Path) -> dict[str, str]:
    """Return an environment in which a DNS lookup does not end."""
    (folder / 'sitecustomize.py').write_text(
        'import socket, time\nsocket.getaddrinfo = lambda *arguments, **options: time.sleep(600)\n', 'utf-8')
    return {'PYTHONPATH': str(folder)}


def test_a_hanging_dns_lookup_is_abandoned_and_has_one_thread(tmp_path: Path, inbox: CommandInbox) -> None:
    command = ['httpok', '-t', '0.1', *mail_to(inbox), 'http://web.example/']
    with Listener(command, hang_in_look_ups(tmp_path)) as listener:
        for _ in range(3):
            listener.tick()
        assert messages(listener)[1:] == ['http://web.example/: unable to check: DNS lookup of web.example timed out']
        assert len(os.listdir(f'/proc/{listener.pid}/task')) == 2
        started = time.monotonic()
        assert listener.terminate() == 0
        assert time.monotonic() - started < 5
    assert inbox.mails == []


def test_a_lack_of_file_descriptors_is_not_an_outage(inbox: CommandInbox) -> None:
    with Site(response(), response(), FAILING) as site, \
            Listener(['httpok', *mail_to(inbox), site.url()]) as listener:
        listener.serve_event('PROCESS_GROUP_ADDED', 'groupname:web\n')     # when it is served, the listener is idle
        limits = resource.prlimit(listener.pid, resource.RLIMIT_NOFILE)
        used = max(map(int, os.listdir(f'/proc/{listener.pid}/fd'))) + 1
        listener.tick()     # imports what a check needs
        listener.expect(b'READY\n')
        for spare in range(3):  # none for the thread's pipe, half a pipe, none for the socket
            resource.prlimit(listener.pid, resource.RLIMIT_NOFILE, (used + spare, limits[1]))
            listener.send_event('TICK_5', f'when:{int(time.time()) + 1}')
            listener.expect(b'RESULT 2\nOKREADY\n')
        assert len(site.requests) == 1
        resource.prlimit(listener.pid, resource.RLIMIT_NOFILE, limits)
        listener.send_event('TICK_5', f'when:{int(time.time()) + 1}')
        listener.expect(b'RESULT 2\nOK')
        assert listener.close() == 0
        assert messages(listener)[1:] == [f'{site.url()}: unable to check: Too many open files']
    assert inbox.mails == []


# Memory.

def find_peak_kib(*argv: str) -> int:
    """Run a check, which must find all well, and return the peak of its RSS."""
    run = subprocess.run(
        [PYTHON, '-c', 'import sys\nfrom superlance import httpok\nstatus = httpok.main(sys.argv[1:])\n'
         'print(open("/proc/self/status").read())\nsys.exit(status)', '--once', '-t', '60', *argv],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=90)
    assert run.returncode == 0, run.stdout
    found = re.search(rb'VmHWM:\s*(\d+) kB', run.stdout)
    assert found
    return int(found.group(1))


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='RSS is read from /proc')
@pytest.mark.parametrize(('head', 'piece', 'end', 'argv'), [
    (make_head(), b'x' * 2 ** 20, b'fine', ['-b', 'fine']),
    (chunked(end=b''), b'100000\r\n%s\r\n' % (b'x' * 2 ** 20), b'4\r\nfine\r\n0\r\n\r\n', ['-b', 'fine']),
    (chunked(end=b'fffffff\r\n'), b'x' * 2 ** 20, b'fine', ['-b', 'fine']),
    (make_head(), b'x' * 2 ** 20, b'', []),
], ids=['until the end', 'in chunks', 'in one chunk', 'without -b'])
def test_memory_does_not_grow_with_the_body(head: bytes, piece: bytes, end: bytes, argv: list[str]) -> None:
    with Site(stream(head, piece, 1, end), stream(head, piece, 64, end)) as site:
        small, large = (find_peak_kib(*argv, site.url()) for _ in range(2))
        assert len(site.requests) == 2
    assert large - small < 16 * 1024


# --once

def test_once() -> None:
    with Site(response(b'fine', status='200 All Right')) as site:
        printed = run_command_line('httpok', '--once', '-b', 'fine', site.url('/x'))
    assert (printed.returncode, printed.stderr) == (0, '')
    assert re.fullmatch(r"""url      {}
status   200 All Right
time     \d\.\d{{3}}s
body     contains 'fine'
verdict  ok
""".format(re.escape(site.url('/x'))), printed.stdout)


@pytest.mark.parametrize(('answer', 'argv', 'verdict'), [
    (response(), ['-b', 'fine'], "the body does not contain 'fine'"),
    (response(status='500 a\x1b\rb'), [], r'status 500 a\x1b | b (expected 200)'),
    (b'', [], 'Remote end closed connection without response'),
    (hang, SHORT, 'no complete response within 0.4s'),
])
def test_once_that_finds_a_fault(answer: Answer, argv: list[str], verdict: str) -> None:
    with Site(answer) as site:
        printed = run_command_line('httpok', '--once', *argv, site.url())
    assert (printed.returncode, printed.stderr) == (1, '')
    assert printed.stdout.splitlines()[-1] == f'verdict  {verdict}'


def test_once_in_the_c_locale(tmp_path: Path) -> None:
    with Site(response('grün'.encode())) as site:
        printed = run_command_line('httpok', '--once', '-b', 'grün', site.url(), folder=tmp_path, **C_LOCALE)
    assert (printed.returncode, printed.stderr) == (0, '')
    assert r"contains 'gr\xfcn'" in printed.stdout


def test_once_without_a_supervisord() -> None:
    with Site() as site:
        printed = run_command_line('httpok', '--once', '-p', 'web', site.url(), SUPERVISOR_SERVER_URL=NO_SUPERVISORD)
    assert (printed.returncode, printed.stderr) == (1, '')
    assert f'\nverdict  ok\nwarning: supervisord at {NO_SUPERVISORD} does not answer ' in printed.stdout


def test_once_with_a_configuration_that_is_missing() -> None:
    with Site() as site:
        printed = run_command_line('httpok', '--once', '--configuration=/nonexistent', '-p', 'web', site.url())
    assert (printed.returncode, printed.stdout, site.requests) == (2, '', [])
    assert printed.stderr.startswith('httpok: option --configuration: ') and printed.stderr.count('\n') == 1


def test_gunicorn_on_a_unix_socket(tmp_path: Path) -> None:
    pytest.importorskip('gunicorn')
    (tmp_path / 'app.py').write_text(
        'def app(environ, start_response):\n'
        '    start_response("200 OK", [("Content-Type", "text/plain")])\n'
        '    return [b"host ", environ["HTTP_HOST"].encode(), b" path ", environ["PATH_INFO"].encode()]\n', 'utf-8')
    path = tmp_path / 'g.sock'
    argv = ['httpok', '--once', '--unix-socket', str(path), 'http://a.example/health']
    gunicorn = subprocess.Popen(
        [PYTHON, '-m', 'gunicorn', '--bind', f'unix:{path}', '--worker-tmp-dir', str(tmp_path), 'app:app'],
        cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    workers: list[int] = []
    try:
        # The socket does not exist yet, and is waited for.
        assert run_command_line(*argv, '-t', '30', '-b', 'host a.example path /health').returncode == 0
        workers = find_children(gunicorn.pid)
        assert "does not contain 'else'" in run_command_line(*argv, '-t', '30', '-b', 'else').stdout
    finally:
        gunicorn.terminate()
        gunicorn.wait(TIMEOUT)
        for pid in workers:
            wait_for(lambda: not is_alive(pid), 'end of gunicorn')
    assert run_command_line(*argv, *SHORT).returncode == 1
