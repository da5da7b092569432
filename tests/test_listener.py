"""The event protocol, the log, signals and commands, as superlance/listener.py has them."""
from __future__ import annotations

import fcntl
import io
import math
import os
import random
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import pytest
from support import C_LOCALE, PYTHON, TIMEOUT, is_alive, read, wait_for

from superlance import listener
from superlance.listener import (
    CommandFailed,
    Event,
    ProtocolError,
    one_line,
    parse_tokens,
    printable,
    read_event,
    run_command,
    timestamp,
)


def run_script(text: str, environment: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[
        bytes]:
    """Run a Python script that has all of the module's names."""
    options.setdefault('stdin', subprocess.DEVNULL)
    return subprocess.run(
        [PYTHON, '-c', 'import os, signal, sys\nfrom superlance.listener import *\nfrom superlance import listener\n'
         + text], env=dict(os.environ, **(environment or {})), capture_output=True, timeout=TIMEOUT, check=False, **options)


# Text.

@pytest.mark.parametrize('text, expected', [
    ('', ''),
    ('plain text', 'plain text'),
    ('größe 日本', 'größe 日本'),
    ('a\nb\tc\0', 'a\\nb\\tc\\x00'),
    ('\x1b[2J', '\\x1b[2J'),
    ('\u2028\u202e', '\\u2028\\u202e'),
    ('\udcff', '\\udcff'),
    ('\U000e0001', '\\U000e0001'),
])
def test_printable_escapes_what_can_not_be_shown(text: str, expected: str) -> None:
    assert printable(text) == expected


@pytest.mark.parametrize('text, expected', [
    ('', ''),
    ('one', 'one'),
    ('  one  ', 'one'),
    ('one\n\n  two\r\nthree\n', 'one | two | three'),
    ('web\rBcc: all@example.com', 'web | Bcc: all@example.com'),
    ('a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g', 'a | b | c | d | e | f | g'),
    ('a\0b', 'a\\x00b'),
    ('\ud800', '\\ud800'),
    (OSError(2, 'No such\nfile'), '[Errno 2] No such | file'),
])
def test_one_line_is_one_line(text: object, expected: str) -> None:
    assert one_line(text) == expected
    assert len(one_line(text).splitlines()) <= 1


@pytest.fixture
def in_tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv('TZ', 'JST-9')
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize('now, expected', [
    (0, '1970-01-01 09:00:00,000'),
    (1.0625, '1970-01-01 09:00:01,062'),
    (1e9 + 0.99999, '2001-09-09 10:46:40,999'),
])
def test_a_timestamp_is_local_time_with_milliseconds(in_tokyo: None, now: float, expected: str) -> None:
    assert timestamp(now) == expected


# The log.

def test_a_log_entry_is_a_line_on_stderr_in_utf_8_whatever_the_locale() -> None:
    done = run_script("log = make_log('memmon')\n"
                      "log('one\\ntwo gr\\u00f6\\u00dfe \\udcff \\x1b[2J')\nlog('three')\n", C_LOCALE)
    assert done.returncode == 0, done.stderr
    first, second = done.stderr.decode('utf-8').splitlines()
    stamp, text = first[:23], first[23:]
    assert time.strptime(stamp[:19], '%Y-%m-%d %H:%M:%S') and stamp[19] == ',' and stamp[20:].isdigit()
    assert text == ' memmon: one | two größe \\udcff \\x1b[2J'
    assert second.endswith(' memmon: three')
    assert done.stdout == b''


@pytest.mark.parametrize('close', [
    'os.close(2)',
    'r, w = os.pipe(); os.dup2(w, 2); os.close(w); os.close(r)',
    "os.dup2(os.open('/dev/full', os.O_WRONLY), 2)",
])
def test_a_log_that_nobody_reads_ends_nothing(close: str) -> None:
    done = run_script(f"log = make_log('memmon')\n{close}\nlog('lost')\nprint('goes on')\n")
    assert (done.returncode, done.stdout) == (0, b'goes on\n'), done.stderr


# The protocol.

@pytest.mark.parametrize('line, expected', [
    ('', {}),
    ('when:1', {'when': '1'}),
    ('ver:3.0 server:super eventname:TICK_5 len:15', {
        'ver': '3.0', 'server': 'super', 'eventname': 'TICK_5', 'len': '15'}),
    ('a:1:2 b:: c:', {'a': '1:2', 'b': ':', 'c': ''}),
    ('word a:1  b:2 ', {'a': '1', 'b': '2'}),
    ('processname:größe', {'processname': 'größe'}),
])
def test_tokens_are_split_at_spaces_and_first_colons(line: str, expected: dict[str, str]) -> None:
    assert parse_tokens(line) == expected


class InPieces(io.RawIOBase):
    """A stream whose bytes come in pieces of a given size."""

    def __init__(self, data: bytes, size: int) -> None:
        self._data = data
        self._size = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece, self._data = self._data[:self._size], self._data[self._size:]
        buffer[:len(piece)] = piece
        return len(piece)


def make_events(data: bytes, size: int = 4096) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedReader(InPieces(data, size)), encoding='utf-8', errors='surrogateescape',
                            newline='\n')


def make_event(payload: str, header: str = 'ver:3.0 server:sup eventname:TICK_5') -> bytes:
    return ('%s len:%d\n%s' % (header, len(payload), payload)).encode('utf-8', 'surrogateescape')


def read_all(data: bytes, size: int = 4096) -> list[Event]:
    events = make_events(data, size)
    return list(iter(lambda: read_event(events), None))


PAYLOADS = ['when:1', '', 'größe 日本 \U0001f600', 'one\ntwo\r\nthree\rfour\n', '\udcff\udcfe', '\0']


@pytest.mark.parametrize('size', [1, 2, 3, 4096])
def test_an_event_has_its_len_of_characters_however_it_comes(size: int) -> None:
    before = time.time()
    found = read_all(b''.join(map(make_event, PAYLOADS)), size)
    assert [event[:3] for event in found] == [('TICK_5', payload, 'sup') for payload in PAYLOADS]
    assert all(before <= event.received <= time.time() for event in found)


@pytest.mark.parametrize('header, name, server', [
    ('ver:3.0 server:a:b:c serial:21 pool:x poolserial:10 eventname:TICK_60 new:1:2 flag', 'TICK_60', 'a:b:c'),
    ('eventname:TICK_60', 'TICK_60', ''),
    ('server:größe', '', 'größe'),
])
def test_a_header_may_hold_more_or_less(header: str, name: str, server: str) -> None:
    event, = read_all(make_event('when:1', header))
    assert (event.name, event.server) == (name, server)


def test_a_header_may_end_with_carriage_return() -> None:
    assert [event.payload for event in read_all(b'eventname:TICK_5 len:3\r\nabc')] == ['abc']


def test_the_end_of_input_anywhere_is_no_event() -> None:
    data = make_event('when:größe')
    for length in range(len(data)):
        assert read_all(data[:length]) == [], data[:length]
    assert len(read_all(data)) == 1


BROKEN_HEADERS = [
    b'\n', b'garbage\n', b'eventname:TICK_5\n', b'len:\n', b'len:x\n', b'len:-1\n', b'len:1.5\n', b'len:0x10\n',
    b'len: 5\n', 'len:\u0663\n'.encode(), '\u00b2 len:\u00b2\n'.encode(), b'\xff\xfe\n', b'\0\n',
    b'len:99999999999999999999\n', b'len:' + b'9' * 5000 + b'\n', b'READY\nRESULT 2\nOK',
]


@pytest.mark.parametrize('data', BROKEN_HEADERS, ids=lambda data: repr(data[:20]))
def test_a_line_that_is_no_header_is_an_error_of_one_short_line(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="^not an event's header, for want of a number after len: '") as error:
        read_all(data)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 1500


def test_whatever_comes_is_events_or_the_end_or_a_protocol_error() -> None:
    chance = random.Random(1)
    whole = b''.join(map(make_event, PAYLOADS))
    ends = set()
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(chance.randrange(4)):
            place = chance.randrange(len(data))
            data[place:place + chance.randrange(3)] = bytes(chance.choices(range(256), k=chance.randrange(3)))
        try:
            ends.add(len(read_all(bytes(data[:chance.randrange(len(data) + 1)]), chance.randrange(1, 100))))
        except ProtocolError:
            ends.add(-1)
    assert ends >= {-1, 0, 1, 2}


# The streams.

@pytest.mark.parametrize('closed', [
    fds for fds in ((), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2))], ids=str)
def test_streams_taken_leave_nothing_of_the_protocol_at_0_1_and_2(closed: Sequence[int], tmp_path: Path) -> None:
    done = run_script('\n'.join((
        f'for fd in {closed!r}: os.close(fd)',
        'events, results = take_streams()',
        "report = open('report', 'w')",
        'null = os.stat(os.devnull).st_rdev',
        'facts = [events.readline(), os.read(0, 9), min(events.fileno(), results, report.fileno()) > 2]',
        'facts += [os.fstat(fd).st_rdev == null for fd in (0, 1, 2)]',
        'facts += [os.get_inheritable(events.fileno()), os.get_inheritable(results)]',
        'report.write(repr(facts))',
        "os.write(results, b'result')",
        "print('stray', flush=True)",
        "os.system('cat; echo child')")), input=b'event\n', stdin=None, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    no_log = 2 in closed
    assert read(tmp_path / 'report') == repr([
        '' if 0 in closed else 'event\n', b'', True, True, no_log, no_log, False, False])
    assert done.stdout == (b'' if 1 in closed else b'result')
    assert done.stderr == (b'' if no_log else b'stray\nchild\n')


def test_events_are_utf_8_in_any_locale() -> None:
    done = run_script('events, results = take_streams()\n'
                      "os.write(results, ascii(events.read()).encode('ascii'))", C_LOCALE,
                      stdin=None, input='größe\r\n'.encode() + b'\xff')
    assert done.stdout == rb"'gr\xf6\xdfe\r\n\udcff'"


# Signals.

HANDLED = 'for s in (signal.SIGTERM, signal.SIGINT): signal.signal(s, listener._end)\n'


@pytest.mark.parametrize('script, expected', [
    # A signal ends what is not protected, at once.
    ("""
try:
    os.kill(os.getpid(), signal.SIGINT)
    print('not here')
except Ended:
    print('ended')
     """, 'ended'),
    # What is protected is finished first; a second signal changes nothing.
    ("""
try:
    with uninterrupted():
        os.kill(os.getpid(), signal.SIGTERM)
        print('finished')
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    print('not here')
except Ended:
    print('ended')
with uninterrupted():
    print('retried')
os.kill(os.getpid(), signal.SIGTERM)
print('closed')
     """, 'finished ended retried closed'),
    # Without a signal nothing ends, and the protection is over after the block.
    ("""
with uninterrupted():
    print('one')
try:
    os.kill(os.getpid(), signal.SIGTERM)
    print('not here')
except Ended:
    print('ended')
     """, 'one ended'),
    # An error in the block is not hidden by a signal, and the protection is over all the same.
    ("""
try:
    with uninterrupted():
        raise KeyError
except KeyError:
    print('error')
try:
    os.kill(os.getpid(), signal.SIGTERM)
    print('not here')
except Ended:
    print('ended')
     """, 'error ended'),
    ("""
try:
    with uninterrupted():
        os.kill(os.getpid(), signal.SIGTERM)
        raise KeyError
except KeyError:
    print('error')
     """, 'error'),
])
def test_signals(script: str, expected: str) -> None:
    done = run_script(HANDLED + script.strip())
    assert (done.returncode, done.stdout.split()) == (0, expected.encode().split()), done.stderr


def test_a_signal_in_the_moment_before_a_read_ends_it() -> None:
    """Its handler has run, and nothing is going to interrupt the read."""
    events, supervisord = os.pipe()
    done = run_script('events, results = take_streams()\n'
                      "signal.signal(signal.SIGTERM, lambda *_: setattr(listener, '_ending', True))\n"
                      'os.kill(os.getpid(), signal.SIGTERM)\n'
                      "try:\n    events.readline()\nexcept Ended:\n    os.write(results, b'ended')", stdin=events)
    os.close(events)
    os.close(supervisord)
    assert done.stdout == b'ended', done.stderr


FORKED_CHILD = """
import select, threading, time
reading, writing = os.pipe()
os.dup2(reading, 0)
events, results = take_streams()
child = os.fork()
if not child:
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except Ended:
        os._exit(0)
assert os.waitpid(child, 0)[1] == 0
def send_event():
    while select.select([events.buffer.raw._signals], [], [], 0)[0]:
        time.sleep(0.01)
    os.write(writing, b'event\\n')
threading.Thread(target=send_event, daemon=True).start()
os.write(results, events.readline().encode())
"""


def test_a_signal_to_a_forked_child_is_nothing_to_its_parent() -> None:
    """They share the pipe that tells of signals; the event comes after that was looked at."""
    done = run_script(HANDLED + FORKED_CHILD)
    assert done.stdout == b'event\n', done.stderr


# The loop.

LOOP = """
finished = []
def handle(event):
    os.write(2, b'[%s]' % event.payload.encode())
    exec(event.payload)
def finish():
    os.write(2, b'[finish]')
    exec(os.environ.get('FINISH', ''))
raise SystemExit(listen('test', handle, finish))
"""
READY, RESULT = b'READY\n', b'RESULT 2\nOK'
TERMINATE = 'os.kill(os.getpid(), signal.SIGTERM)'


@pytest.mark.parametrize('payloads, status, results, end', [
    ([], 0, READY, b'[finish]'),
    (['1', '2'], 0, READY + RESULT + READY + RESULT + READY, b'[1][2][finish]'),
    ([TERMINATE, '2'], 0, READY, b'[%s][finish]' % TERMINATE.encode()),
    # An exception in a destructor goes nowhere, and the signal is not forgotten.
    ([f'class Last:\n def __del__(self): {TERMINATE}\nLast()', '2'], 0, READY + RESULT, b'[finish]'),
    # A fault of the program itself: supervisord is to see it.
    (['1/0', '2'], 1, READY, b'ZeroDivisionError: division by zero\n'),
])
def test_the_loop(payloads: list[str], status: int, results: bytes, end: bytes) -> None:
    done = run_script(LOOP, {'SUPERVISOR_SERVER_URL': 'http://127.0.0.1:1', 'FINISH': TERMINATE},
                      stdin=None, input=b''.join(map(make_event, payloads)))
    assert (done.returncode, done.stdout) == (status, results), done.stderr
    assert done.stderr.endswith(end)
    assert done.stderr.count(b'[finish]') == 1 and b'[2]' not in done.stderr.partition(TERMINATE.encode())[2]


def test_a_signal_as_soon_as_it_is_handled_ends_the_loop() -> None:
    done = run_script('''
really_signal = signal.signal
def handle_and_send(signum, handler):
    really_signal(signum, handler)
    if signum == signal.SIGTERM:
        os.kill(os.getpid(), signum)
signal.signal = handle_and_send
''' + LOOP, dict(os.environ, SUPERVISOR_SERVER_URL='unix:///x'))
    assert (done.returncode, done.stdout, done.stderr) == (0, b'', b'[finish]')


def test_a_broken_header_ends_the_loop_with_one_line() -> None:
    done = run_script(LOOP, {'SUPERVISOR_SERVER_URL': 'http://127.0.0.1:1'},
                      stdin=None, input=make_event('1') + b'nonsense\n')
    assert (done.returncode, done.stdout) == (1, READY + RESULT + READY)
    assert done.stderr.startswith(b'[1]') and done.stderr.endswith(b"'nonsense\\n'\n[finish]")
    assert done.stderr.count(b'\n') == 1


def test_the_loop_is_for_supervisord_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('SUPERVISOR_SERVER_URL', raising=False)
    done = run_script(LOOP)
    assert (done.returncode, done.stdout) == (1, b'')
    assert done.stderr.startswith(b'test must be run as a supervisor event listener')
    assert b"'test --once'" in done.stderr and b'README' in done.stderr and done.stderr.count(b'\n') == 1


@pytest.mark.parametrize('payload', [None, '1'])
def test_nobody_to_hear_the_result_is_the_end(payload: str | None) -> None:
    """supervisord is gone with the end of stdout too."""
    out, hear = os.pipe()
    process = subprocess.Popen(
        [PYTHON, '-c', 'import os\nfrom superlance.listener import *\n' + LOOP], stdin=subprocess.PIPE, stdout=hear,
        stderr=subprocess.PIPE, env=dict(os.environ, SUPERVISOR_SERVER_URL='http://127.0.0.1:1'))
    os.close(hear)
    if payload:
        assert os.read(out, 100) == READY
    os.close(out)
    assert process.communicate(make_event(payload) if payload else b'', TIMEOUT)[1].endswith(b'[finish]')
    assert process.returncode == 0


def count_unread(pipe: Any) -> int:
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def get_state(pid: int) -> str:
    return read(Path('/proc/%d/stat' % pid)).rpartition(')')[2].split()[0]


def test_a_signal_while_the_last_line_is_written_does_no_harm() -> None:
    """The reader of the log is slow, so the line on the broken protocol takes its time."""
    said, log = os.pipe()
    script = "import os\nfrom superlance.listener import *\nos.set_blocking(2, False)\n" \
             "try:\n    while True: os.write(2, b'.')\nexcept BlockingIOError: os.set_blocking(2, True)\n"
    process = subprocess.Popen(
        [PYTHON, '-c', script + LOOP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        env=dict(os.environ, SUPERVISOR_SERVER_URL='http://127.0.0.1:1'))
    os.close(log)
    assert process.stdin and process.stdout
    with process:
        assert process.stdout.read(6) == READY
        process.stdin.write(b'nonsense\n')
        process.stdin.flush()
        wait_for(lambda: count_unread(process.stdin) == 0)
        wait_for(lambda: get_state(process.pid) == 'S', 'that it sleeps, since the log takes no more')
        process.terminate()
        output = b''
        for chunk in iter(lambda: os.read(said, 65536), b''):
            output += chunk
    os.close(said)
    assert b'Traceback' not in output and output.endswith(b'[finish]')
    assert process.returncode in (0, 1)


# Commands.

def within(seconds: float) -> Callable[[], float]:
    end = time.monotonic() + seconds
    return lambda: end - time.monotonic()


@pytest.mark.parametrize('command, message, output', [
    ('echo out; echo err >&2', b'', b'out\nerr\n'),
    (['echo', 'a b', '$HOME', '*', ';'], b'', b'a b $HOME * ;\n'),
    ('cat', b'', b''),
    ('cat', b'one\ntwo\xff\0', b'one\ntwo\xff\0'),
    (['printf', 'größe'], b'', 'größe'.encode()),
    (['printf', '\udcff'], b'', b'\xff'),
    ('printf größe', b'', 'größe'.encode()),
    # It need not read the message, and may read it late or slowly: a pipe holds no more than 64 KiB.
    ('true', b'x' * 1000000, b''),
    ('head -c 3', b'x' * 1000000, b'xxx'),
    ('exec <&-; sleep 0.3; echo done', b'x' * 1000000, b'done\n'),
    ('sleep 0.3; wc -c', b'x' * 300000, b'300000\n'),
    ('head -c 100000 >/dev/null; sleep 0.3; head -c 100000 >/dev/null; sleep 0.3; wc -c', b'x' * 300000, b'100000\n'),
    # It may say more than a pipe holds, early, late, or close its output.
    ('head -c 1000000 /dev/zero', b'', b'\0' * 1000000),
    ('printf early; sleep 0.3; printf late', b'', b'earlylate'),
    ('printf early; exec >&- 2>&-; sleep 0.3', b'', b'early'),
    ('exec >&- 2>&-; sleep 0.3; wc -c >/dev/null', b'x' * 100000, b''),
    ('cat; sleep 0.2; echo', b'x' * 1000000, b'x' * 1000000 + b'\n'),
], ids=lambda value: repr(value)[:60])
def test_a_command_s_output(command: str | Sequence[str], message: bytes, output: bytes) -> None:
    found = run_command(command, within(TIMEOUT), message)
    assert found == output, (len(found), found[-99:])


@pytest.mark.parametrize('command, failure', [
    ('exit 3', 'exit 3: exit status 3'),
    ('echo one; echo two >&2; exit 75', 'echo one; echo two >&2; exit 75: exit status 75: one | two'),
    (['sh', '-c', 'kill -9 $$'], 'sh -c kill -9 $$: killed by signal 9'),
    (['/nonexistent/ps', '-A'], '/nonexistent/ps -A: No such file or directory'),
    (['/'], '/: Permission denied'),
    (['a\0b'], 'a\0b: embedded null byte'),
    ('/nonexistent/ps 2>/dev/null', '/nonexistent/ps 2>/dev/null: exit status 127'),
    ("printf '\\377\\033[2J'; false", "printf '\\377\\033[2J'; false: exit status 1: \ufffd\\x1b[2J"),
])
def test_a_command_that_fails(command: str | Sequence[str], failure: str) -> None:
    with pytest.raises(CommandFailed) as error:
        run_command(command, within(TIMEOUT), b'message')
    assert str(error.value) == failure


def test_no_more_than_the_end_of_what_it_said_is_told() -> None:
    with pytest.raises(CommandFailed) as error:
        run_command('seq 100000; false', within(TIMEOUT))
    assert str(error.value).endswith(' | 99999 | 100000') and len(str(error.value)) < 5000


def test_a_command_in_a_locale_of_its_own_environment() -> None:
    assert run_command('echo "$LC_ALL $OTHER"', within(TIMEOUT), environment={'LC_ALL': 'C'}) == b'C \n'


def test_a_command_is_utf_8_in_any_locale() -> None:
    done = run_script("for command in ['printf', 'gr\\u00f6\\u00dfe'], 'printf gr\\u00f6\\u00dfe':\n"
                      "    print(ascii(run_command(command, lambda: 9).decode('utf-8')))", C_LOCALE)
    assert done.stdout == rb"'gr\xf6\xdfe'" + b'\n' + rb"'gr\xf6\xdfe'" + b'\n', done.stderr


def test_a_command_that_hangs_is_killed_with_all_it_started(tmp_path: Path) -> None:
    pids = tmp_path / 'pids'
    with pytest.raises(CommandFailed, match=r': did not end in time: starting$'):
        run_command(f"echo starting; sleep 99 & echo $! >> '{pids}'; echo $$ >> '{pids}'; wait", within(1))
    for pid in map(int, read(pids).split()):
        wait_for(lambda: not is_alive(pid))
    assert len(read(pids).split()) == 2


@pytest.mark.parametrize('command', ['exec >&- 2>&- <&-; sleep 99', 'cat >/dev/null; sleep 99', 'sleep 99'])
def test_the_end_of_the_time_is_seen_whatever_is_open(command: str) -> None:
    with pytest.raises(CommandFailed, match='did not end in time'):
        run_command(command, within(0.5), b'x' * 100000)


def test_no_time_at_all() -> None:
    with pytest.raises(CommandFailed, match='did not end in time'):
        run_command('sleep 99', lambda: -1.0)


def test_the_time_may_be_cut_short_meanwhile() -> None:
    left = [math.inf, math.inf, math.inf, 0.0]
    with pytest.raises(CommandFailed, match='did not end in time'):
        run_command('sleep 99', lambda: left.pop(0) if len(left) > 1 else left[0])


def test_a_command_that_floods_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, 'OUTPUT_LIMIT_BYTES', 1000000)
    with pytest.raises(CommandFailed, match=r'^yes: printed more than 1000000 bytes: y \| y'):
        run_command('yes', within(TIMEOUT))


def test_a_command_has_ended_where_a_child_of_it_lives_on(tmp_path: Path) -> None:
    pid = tmp_path / 'pid'
    assert run_command(f"sleep 99 & echo $! > '{pid}'; printf all", within(TIMEOUT)) == b'all'
    child = int(read(pid))
    assert is_alive(child)
    os.kill(child, signal.SIGKILL)


def test_a_child_that_lives_on_and_talks_keeps_nobody(tmp_path: Path) -> None:
    pid = tmp_path / 'pid'
    assert len(run_command(f"yes & echo $! > '{pid}'; printf all", within(TIMEOUT))) < listener.OUTPUT_LIMIT_BYTES
    # Nobody reads its output now, so the pipe's end ends it.
    wait_for(lambda: not is_alive(int(read(pid))))


def test_an_exception_meanwhile_kills_the_command(tmp_path: Path) -> None:
    pid = tmp_path / 'pid'

    def seconds_left() -> float:
        if read(pid).endswith('\n'):
            raise KeyError
        return 9.0

    with pytest.raises(KeyError):
        run_command(f"echo $$ > '{pid}'; sleep 99", seconds_left)
    assert not is_alive(int(read(pid)))


def test_a_command_that_can_not_be_killed_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with sudo, where it has become another user's."""
    pid = tmp_path / 'pid'

    def refuse(group: int, signum: int) -> None:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(os, 'killpg', refuse)
        patch.setattr(listener, 'KILL_SECONDS', 0.1)
        with pytest.raises(CommandFailed, match='did not end in time'):
            run_command(f"echo $$ > '{pid}'; exec sleep 99", lambda: 0.0 if read(pid).endswith('\n') else 9.0)
    left = int(read(pid))
    assert is_alive(left)
    os.kill(left, signal.SIGKILL)
    wait_for(lambda: not is_alive(left))


def test_commands_leave_nothing_behind() -> None:
    before = sorted(os.listdir('/proc/self/fd'))
    for command in ('true', 'cat', ['/nonexistent'], 'exit 3', 'exec >&-', 'sleep 99'):
        try:
            run_command(command, within(0.2), b'message')
        except CommandFailed:
            pass
    assert sorted(os.listdir('/proc/self/fd')) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_signal_while_a_command_is_being_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A signal after the fork must not leave the command behind: it is killed, and then the listener ends."""
    started: list[int] = []
    real = subprocess.Popen._execute_child  # type: ignore[attr-defined]

    def execute_child(process: Any, *arguments: Any) -> None:
        real(process, *arguments)
        started.append(process.pid)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(listener, '_ending', False)
    monkeypatch.setattr(subprocess.Popen, '_execute_child', execute_child)
    before = signal.signal(signal.SIGTERM, listener._end)
    try:
        with pytest.raises(listener.Ended):
            listener.run_command(['sleep', '1000'], lambda: 1000.0)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert started and not is_alive(started[0])


def test_uninterrupted_blocks_nest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, '_ending', False)
    before = signal.signal(signal.SIGTERM, listener._end)
    reached = []
    try:
        with pytest.raises(listener.Ended):
            with listener.uninterrupted():
                with listener.uninterrupted():
                    os.kill(os.getpid(), signal.SIGTERM)
                reached.append('after the inner block')
    finally:
        signal.signal(signal.SIGTERM, before)
    assert reached


def test_uninterrupted_without_raising_leaves_the_end_to_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, '_ending', False)
    before = signal.signal(signal.SIGTERM, listener._end)
    try:
        with listener.uninterrupted(raising=False):
            os.kill(os.getpid(), signal.SIGTERM)
        assert listener._ending
    finally:
        signal.signal(signal.SIGTERM, before)
