"""The event protocol, the log, the request to exit and the event loop."""
from __future__ import annotations

import io
import os
import signal
import time
from typing import Any, Callable, Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import READY, RESULT, Run, acknowledge, make_event, run_in_process
from table import CHARACTERS, SURROGATES, for_each

from superlance import listener
from superlance.listener import (
    Event,
    ExitRequest,
    ProtocolError,
    exit_request,
    listen,
    make_log,
    one_line,
    parse_tokens,
    printable,
    read_event,
    timestamp,
)

# Text.


@for_each('text, expected', [
    ('', ''),
    ('plain text', 'plain text'),
    ('größe 日本', 'größe 日本'),
    ('a\nb\tc\0', 'a\\nb\\tc\\x00'),
    ('\x1b[2J', '\\x1b[2J'),
    ('\u2028\u202e', '\\u2028\\u202e'),
    ('\udcff', '\\udcff'),
    ('\U000e0001', '\\U000e0001'),
])
def test_printable_escapes_line_ends_and_control_characters(text: str, expected: str) -> None:
    assert printable(text) == expected


@for_each('text, expected', [
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
def test_one_line_joins_lines(text: object, expected: str) -> None:
    assert one_line(text) == expected


@given(st.text(CHARACTERS + SURROGATES))
def test_one_line_of_any_text_is_a_printable_line(text: str) -> None:
    assert one_line(text).isprintable()
    assert len(one_line(text).splitlines()) <= 1


@pytest.fixture
def _in_tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv('TZ', 'JST-9')
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(('now', 'expected'), [
    (0, '1970-01-01 09:00:00,000'),
    (1.0625, '1970-01-01 09:00:01,062'),
    (1e9 + 0.99999, '2001-09-09 10:46:40,999'),
])
@pytest.mark.usefixtures('_in_tokyo')
def test_timestamp_is_local_time_with_milliseconds(now: float, expected: str) -> None:
    assert timestamp(now) == expected


# The log.

def test_log_entry_is_one_line_on_stderr_in_utf_8(capfd: pytest.CaptureFixture[str]) -> None:
    log = make_log('memmon')
    log('one\ntwo größe \udcff \x1b[2J')
    log('three')
    output, errors = capfd.readouterr()
    first, second = errors.splitlines()
    stamp, text = first[:23], first[23:]
    assert time.strptime(stamp[:19], '%Y-%m-%d %H:%M:%S') and stamp[19] == ',' and stamp[20:].isdigit()
    assert text == ' memmon: one | two größe \\udcff \\x1b[2J'
    assert second.endswith(' memmon: three') and output == ''


def make_broken_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize('open_log', [make_broken_pipe, lambda: os.open('/dev/full', os.O_WRONLY)])
def test_log_that_cannot_be_written_is_ignored(open_log: Callable[[], int]) -> None:
    saved = os.dup(2)
    broken = open_log()
    try:
        os.dup2(broken, 2)
        make_log('memmon')('lost')
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(broken)


# The protocol.

@pytest.mark.parametrize(('line', 'expected'), [
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
    """A stream whose bytes arrive in pieces of the given sizes, the last of them repeated."""

    def __init__(self, data: bytes, sizes: Sequence[int]) -> None:
        self._data = data
        self._sizes = list(sizes)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = min(self._sizes[0], len(buffer))
        if len(self._sizes) > 1:
            del self._sizes[0]
        piece, self._data = self._data[:size], self._data[size:]
        buffer[:len(piece)] = piece
        return len(piece)


def make_stream(data: bytes, *sizes: int) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedReader(InPieces(data, sizes or [4096])), encoding='utf-8',
                            errors='surrogateescape', newline='\n')


def make_tick(payload: str, header: str = 'ver:3.0 server:sup eventname:TICK_5') -> bytes:
    return f'{header} len:{len(payload)}\n{payload}'.encode('utf-8', 'surrogateescape')


def read_all(data: bytes, *sizes: int) -> list[Event]:
    events = make_stream(data, *sizes)
    return list(iter(lambda: read_event(events), None))


PAYLOADS = ['when:1', '', 'größe 日本 \U0001f600', 'one\ntwo\r\nthree\rfour\n', '\udcff\udcfe', '\0']


@pytest.mark.parametrize('size', [1, 2, 3, 4096])
def test_len_of_event_counts_characters(size: int) -> None:
    before = time.time()
    found = read_all(b''.join(map(make_tick, PAYLOADS)), size)
    assert [event[:3] for event in found] == [('TICK_5', payload, 'sup') for payload in PAYLOADS]
    assert all(before <= event.received <= time.time() for event in found)


@given(payloads=st.lists(st.text(CHARACTERS, max_size=50), max_size=5),
       sizes=st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_events_in_pieces_of_any_size_are_read_whole(payloads: list[str], sizes: list[int]) -> None:
    data = b''.join(map(make_tick, payloads))
    assert [event.payload for event in read_all(data, *sizes)] == payloads


@given(data=st.data(), size=st.integers(1, 100))
def test_damaged_input_is_events_then_end_or_protocol_error(data: st.DataObject, size: int) -> None:
    damaged = bytearray(b''.join(map(make_tick, PAYLOADS)))
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(damaged)))
        damaged[place:place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        read_all(bytes(damaged[:data.draw(st.integers(0, len(damaged)))]), size)
    except ProtocolError as why:
        message = str(why)
    else:
        message = ''
    assert len(message.splitlines()) <= 1


@pytest.mark.parametrize(('header', 'name', 'server'), [
    ('ver:3.0 server:a:b:c serial:21 pool:x poolserial:10 eventname:TICK_60 new:1:2 flag', 'TICK_60', 'a:b:c'),
    ('eventname:TICK_60', 'TICK_60', ''),
    ('server:größe', '', 'größe'),
])
def test_header_may_have_unknown_and_missing_tokens(header: str, name: str, server: str) -> None:
    event, = read_all(make_tick('when:1', header))
    assert (event.name, event.server) == (name, server)


def test_header_may_end_with_carriage_return() -> None:
    assert [event.payload for event in read_all(b'eventname:TICK_5 len:3\r\nabc')] == ['abc']


def test_end_of_input_within_an_event_is_not_an_event() -> None:
    data = make_tick('when:größe')
    for length in range(len(data)):
        assert read_all(data[:length]) == [], data[:length]
    assert len(read_all(data)) == 1


BROKEN_HEADERS = [
    b'\n', b'garbage\n', b'eventname:TICK_5\n', b'len:\n', b'len:x\n', b'len:-1\n', b'len:1.5\n', b'len:0x10\n',
    b'len: 5\n', 'len:\u0663\n'.encode(), '\u00b2 len:\u00b2\n'.encode(), b'\xff\xfe\n', b'\0\n',
    b'len:99999999999999999999\n', b'len:' + b'9' * 5000 + b'\n', b'READY\nRESULT 2\nOK',
]


@pytest.mark.parametrize('data', BROKEN_HEADERS, ids=lambda data: repr(data[:20]))
def test_invalid_header_is_an_error_of_one_short_line(data: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"^invalid event header: missing or invalid len: '") as error:
        read_all(data)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 1500


# The request to exit.

@pytest.fixture
def request_to_exit() -> Iterator[ExitRequest]:
    """An installed ExitRequest; the handlers are those of before at the end."""
    handlers = {signum: signal.getsignal(signum) for signum in listener.SIGNALS}
    request = ExitRequest()
    request.install()
    yield request
    signal.set_wakeup_fd(-1)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    for fd in request._open_pipe():
        os.close(fd)


@pytest.mark.parametrize(('signum', 'status'), [
    (signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGHUP, 129), (signal.SIGQUIT, 131), (signal.SIGUSR1, 138),
    (signal.SIGUSR2, 140)])
@pytest.mark.skipif(not hasattr(signal, 'SIGPWR'), reason='numbers of signals differ')
def test_signal_requests_exit_and_raises_nothing(request_to_exit: ExitRequest, signum: int, status: int) -> None:
    assert not request_to_exit.requested
    os.kill(os.getpid(), signum)
    assert (request_to_exit.requested, request_to_exit.exit_status) == (True, status)


def test_second_signal_changes_nothing_but_the_status(request_to_exit: ExitRequest) -> None:
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
        os.kill(os.getpid(), signum)
    assert (request_to_exit.requested, request_to_exit.exit_status) == (True, 128 + signal.SIGHUP)


def test_signal_just_before_a_read_ends_the_input(request_to_exit: ExitRequest) -> None:
    """The handler has run, and nothing will interrupt the read."""
    reader, writer = os.pipe()
    os.kill(os.getpid(), signal.SIGTERM)
    assert io.BufferedReader(listener.Input(reader, request_to_exit)).readline() == b''
    os.write(writer, b'event\n')
    assert io.BufferedReader(listener.Input(reader, request_to_exit)).readline() == b'', 'not even if there is an event'
    os.close(reader)
    os.close(writer)


# The loop.

TERMINATE = 'terminate'


def serve(*payloads: str, data: bytes = b'', at_start: Callable[[], None] = lambda: None,
          finish: Callable[[], None] = lambda: None, **options: Any) -> tuple[Run, list[str]]:
    """Run listen with these payloads and return its Run and what it called, in order."""
    called: list[str] = []

    def handle(event: Event) -> None:
        called.append(event.payload)
        if event.payload == TERMINATE:
            os.kill(os.getpid(), signal.SIGTERM)
            assert exit_request.requested

    def start_noted() -> None:
        called.append('start')
        at_start()

    def finish_noted() -> None:
        called.append('finish')
        finish()

    data = b''.join(make_event('TICK_5', text) for text in payloads) + data
    return run_in_process(lambda: listen('test', handle, finish_noted, start_noted), data, **options), called


@pytest.mark.parametrize(('payloads', 'output', 'expected'), [
    ([], READY, []),
    (['1', '2'], acknowledge(2), ['1', '2']),
    # `len` counts each character, so line ends are not translated.
    (['one\r\ntwo\rthree', '2'], acknowledge(2), ['one\r\ntwo\rthree', '2']),
    # What has begun is acknowledged, and there is no READY after it: supervisord would send another event.
    ([TERMINATE, '2'], READY + RESULT, [TERMINATE]),
    (['1', TERMINATE, '2'], (READY + RESULT) * 2, ['1', TERMINATE]),
])
def test_loop_serves_events_until_the_end_or_a_signal(payloads: list[str], output: bytes, expected: list[str]) -> None:
    run, called = serve(*payloads)
    assert (run.status, run.output, run.log) == (0, output, '')
    assert called == ['start', *expected, 'finish']


def test_event_is_handled_before_it_is_acknowledged() -> None:
    """supervisord sends an event again if the listener exits before that."""
    reader, writer = os.pipe()
    seen = []
    run_in_process(lambda: listen('test', lambda event: seen.append(os.read(reader, 100)), lambda: None, lambda: None),
                   make_event('TICK_5', '1') * 2, stdout=writer)
    os.close(reader)
    os.close(writer)
    assert seen == [READY, RESULT + READY]


def test_signal_during_the_start_ends_the_loop_before_the_first_event() -> None:
    run, called = serve('1', at_start=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert (run.status, run.output, called) == (0, READY, ['start', 'finish'])


def test_signal_during_the_finish_does_not_interrupt_it() -> None:
    run, called = serve(finish=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert (run.status, run.output, run.log, called) == (0, READY, '', ['start', 'finish'])


def test_signal_that_is_not_meant_for_a_listener_is_an_unexpected_exit() -> None:
    run, _ = serve(at_start=lambda: os.kill(os.getpid(), signal.SIGHUP))
    assert run.status == 128 + signal.SIGHUP


def test_signal_as_soon_as_it_is_handled_ends_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    real = signal.signal

    def handle_and_send(signum: int, handler: Any) -> None:
        real(signum, handler)
        if signum == signal.SIGTERM and getattr(handler, '__self__', None) is exit_request:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(signal, 'signal', handle_and_send)
    run, called = serve('1')
    assert (run.status, run.output, called) == (0, READY, ['start', 'finish'])


def test_error_of_the_program_is_not_hidden() -> None:
    """supervisord restarts the listener, and the traceback is in its log."""
    def fail() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        serve('1', at_start=fail)


def test_invalid_header_ends_the_loop_with_one_line_and_status_1() -> None:
    run, called = serve('1', data=b'nonsense\n')
    assert (run.status, run.output, called) == (1, acknowledge(1), ['start', '1', 'finish'])
    assert run.log.endswith(" test: invalid event header: missing or invalid len: 'nonsense\\n'\n")
    assert run.log.count('\n') == 1


def test_loop_runs_under_supervisord_only() -> None:
    status, output, log = run_in_process(lambda: listen('test', lambda event: None, lambda: None, lambda: None),
                                         environment={'SUPERVISOR_SERVER_URL': ''})
    assert (status, output, log.count('\n')) == (1, b'', 1)
    assert log.startswith('test must be started by supervisord') and '--once' in log


def test_listener_exits_when_supervisord_has_exited() -> None:
    """Nobody reads stdout any more."""
    broken = make_broken_pipe()
    run, called = serve('1', stdout=broken)
    os.close(broken)
    assert (run.status, run.log, called) == (0, '', ['finish'])
