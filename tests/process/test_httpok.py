"""httpok as a process: real servers, real mail, signals and faults of its surroundings."""
from __future__ import annotations

import os
import re
import resource
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from inbox import CommandInbox
from support import (
    PYTHON,
    TIMEOUT,
    Listener,
    find_children,
    is_alive,
    run_command_line,
    wait_for,
)
from web import Site, chunked, hang, make_head, response, stream

from superlance import __version__

FAILING = response(status='500 No')
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


def test_a_signal_abandons_the_check_and_the_event_is_acknowledged(inbox: CommandInbox) -> None:
    with Site(hang) as site, Listener(['httpok', '-t', '600', *mail_to(inbox), site.url()]) as listener:
        listener.expect(b'READY\n')
        listener.send_event('TICK_5', f'when:{int(time.time())}')
        wait_for(lambda: site.requests, 'the check')
        assert listener.terminate() == 0
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
        assert listener.terminate() == 0    # although the thread hangs
    assert inbox.mails == []


def test_a_lack_of_file_descriptors_is_not_an_outage(inbox: CommandInbox) -> None:
    with Site(response(), response(), FAILING) as site, \
            Listener(['httpok', *mail_to(inbox), site.url()]) as listener:
        listener.serve_event('PROCESS_GROUP_ADDED', 'groupname:web\n')     # when it is served, the listener is idle
        limits = resource.prlimit(listener.pid, resource.RLIMIT_NOFILE)
        used = max(map(int, os.listdir(f'/proc/{listener.pid}/fd'))) + 1
        listener.tick()     # imports what a check needs
        listener.expect(b'READY\n')
        # Python 3.8 loads a library at the end of the first thread, and aborts if it can't open it.
        wait_for(lambda: len(os.listdir(f'/proc/{listener.pid}/task')) == 1, 'the end of the thread')
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

PIECE = b'x' * 2 ** 20
BODIES = {
    'until the end': (make_head(), PIECE, b'fine'),
    'in chunks': (chunked(end=b''), b'100000\r\n%s\r\n' % PIECE, b'4\r\nfine\r\n0\r\n\r\n'),
    'in one chunk': (chunked(end=b'fffffff\r\n'), PIECE, b'fine'),
}
# Check each URL, then print the peak of RSS in KiB; first the small bodies, then the large ones.
CHECK_ALL = """
import re, sys
from superlance import httpok
for urls in sys.argv[1].split(), sys.argv[2].split():
    for url in urls:
        assert httpok.main(['--once', '-t', '60', url, *(['-b', 'fine'] if url.endswith('fine') else [])]) == 0
    print('peak', *re.findall(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read()))
"""


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='RSS is read from /proc')
def test_memory_does_not_grow_with_the_body() -> None:
    with ExitStack() as stack:
        urls: list[list[str]] = [
            [stack.enter_context(Site(stream(head, piece, size, end))).url(path)
             for head, piece, end in BODIES.values() for path in ('/fine', '/')] for size in (1, 32)]
        run = subprocess.run([PYTHON, '-c', CHECK_ALL, *map(' '.join, urls)],
                             stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, encoding='utf-8', timeout=TIMEOUT)
    assert run.returncode == 0, run.stdout
    small, large = map(int, re.findall(r'^peak (\d+)$', run.stdout, re.M))
    assert large - small < 8 * 1024


# A server of another project.

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
    finally:
        gunicorn.terminate()
        gunicorn.wait(TIMEOUT)
        for pid in workers:
            wait_for(lambda: not is_alive(pid), 'end of gunicorn')
