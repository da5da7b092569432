"""Each command as a listener, in this process: what it does with any command line and any input."""
from __future__ import annotations

import re
from importlib import import_module

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import READY, Run, acknowledge, make_event, run_in_process
from table import for_each

from superlance import __version__

URL = 'http://127.0.0.1:1/'     # refuses connections
# Each with options with which it does its work.
ARGUMENTS = {
    'memmon': ['-a', '100TB'],
    'httpok': ['-t', '0.01', URL],
    'crashmail': [],
}
STAMP = r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}'
TICK = ('TICK_5', 'when:1')
CRASH = ('PROCESS_STATE_EXITED', 'processname:web groupname:web from_state:RUNNING expected:0 pid:123')
SERVED = {'memmon': TICK, 'httpok': TICK, 'crashmail': CRASH}
# What the log has for each event that is served.
LOGGED = {'memmon': '', 'httpok': f'{URL}: ', 'crashmail': ' exited unexpectedly'}

every_command = pytest.mark.parametrize('name', ARGUMENTS)


def run(name: str, *arguments: str, data: bytes = b'', environment: dict[str, str] | None = None) -> Run:
    return run_in_process(lambda: import_module(f'superlance.{name}').main(arguments), data, environment)


def serve(name: str, data: bytes) -> Run:
    """Run a command as a listener; its log is without the line of the start and the warnings."""
    found = run(name, *ARGUMENTS[name], data=data)
    lines = found.log.splitlines(keepends=True)
    assert all(re.match(f'{STAMP} {name}: ', line) for line in lines), found.log
    start = re.compile(rf'{STAMP} {name}: (warning: |{name} {re.escape(__version__)}: )')
    return found._replace(log=''.join(line for line in lines if not start.match(line)))


def count_served(name: str, log: str) -> int | None:
    return log.count(LOGGED[name]) if LOGGED[name] else None


# The command line.

@every_command
@pytest.mark.parametrize('flag', ['-h', '--help', '--version'])
def test_help_and_version_are_printed_on_stdout(name: str, flag: str) -> None:
    status, output, log = run(name, flag)
    assert (status, log) == (0, '')
    if flag == '--version':
        assert output.decode() == f'{name} {__version__}\n'
    else:
        assert output.decode() == import_module(f'superlance.{name}').__doc__
        assert output.startswith(b'Usage: %s ' % name.encode()) and b'\n  -h, --help' in output


LONG = '9' * 30
USAGE_ERRORS = {
    'memmon': [
        (['--frobnicate'], '--frobnicate'),
        (['--ver'], '--ver'),   # --verbose or --version
        (['-x'], '-x'),
        ([], '-p, -g or -a'),
        (['-c', '-m', 'bob@example.com'], '-p, -g or -a'),
        (['-a'], '-a'),
        (['-a', 'banana'], "-a: 'banana'"),
        (['-a', '-5'], "-a: '-5'"),
        (['-a', ''], "-a: ''"),
        (['-a', '1.5.5GB'], "-a: '1.5.5GB'"),
        (['-a', '1\n2'], "-a: '1\\n2'"),
        (['-a', '\u0663MB'], '-a'),
        (['-p', 'web'], "-p: 'web'"),
        (['-p', '=1MB'], "-p: '=1MB'"),
        (['-p', 'web=lots'], "-p: 'lots'"),
        (['-p', 'a:b:c=1'], "-p: 'a:b:c'"),
        (['-p', 'a=200MB,b=100MB'], 'twice'),
        (['-g', 'all'], "-g: 'all'"),
        (['--groupname', 'all=x'], "--groupname: 'x'"),
        (['-a', '1MB', '--samples=0'], "--samples: '0'"),
        (['-a', '1MB', '--samples', LONG], LONG),
        (['-a', '1MB', '--max-restarts=3'], "--max-restarts: '3'"),
        (['-a', '1MB', '--max-restarts=0/1h'], "--max-restarts: '0'"),
        (['-a', '1MB', '--max-restarts=3/x'], "--max-restarts: 'x'"),
        (['-a', '1MB', '-u', 'soon'], "-u: 'soon'"),
        (['-a', '1MB', '--smtp=http://host'], "--smtp: 'http://host'"),
        (['-a', '1MB', '--verbose=1'], '--verbose'),
    ],
    'httpok': [
        (['--frobnicate', URL], '--frobnicate'),
        ([], 'URL'),
        ([URL, 'http://other/'], '2 URLs'),
        (['ftp://localhost/'], "'ftp://localhost/'"),
        (['localhost:8080'], "'localhost:8080'"),
        (['http://'], "'http://'"),
        (['http:///path'], 'host'),
        (['http://localhost:99999/'], '65535'),
        (['http://localhost:0/'], '65535'),
        (['http://localhost:x/'], '65535'),
        (['http://localhost/\x01'], '\\x01'),
        (['http://localhost/\r\nX: y'], '\\r\\nX: y'),
        (['http://local host/'], 'space'),
        (['http://[::1/'], "'http://[::1/'"),
        (['http://bob:secret@localhost:0/'], 'bob:***@localhost'),
        (['-c', 'x', URL], "-c: 'x'"),
        (['-c', '99', URL], "-c: '99'"),
        (['-c', LONG, URL], LONG),
        (['-t', '0', URL], "-t: '0'"),
        (['-t', 'x', URL], "-t: 'x'"),
        (['-E', URL], '-E'),
        (['-p', '', URL], "-p: ''"),
        (['-g', '"', URL], '-g'),
        (['--failures=0', URL], "--failures: '0'"),
        (['--grace=x', URL], "--grace: 'x'"),
        (['--header=x', URL], "--header: 'x'"),
        (['--header=X: a\r\nY: b', URL], '--header'),
        (['--cafile=/nonexistent', 'https://localhost/'], '/nonexistent'),
    ],
    'crashmail': [
        (['--frobnicate'], '--frobnicate'),
        (['-p'], '-p'),
        (['-p', 'a:b:c'], "-p: 'a:b:c'"),
        (['--tail=0'], "--tail: '0'"),
        (['--tail=some'], "--tail: 'some'"),
        (['--interval=0'], "--interval: '0'"),
        (['--interval=x'], "--interval: 'x'"),
        (['--from=a@example.com,b@example.com'], '--from'),
        (['--once'], '-m'),
        (['--once', '-m', 'bob@example.com', '--configuration=/nonexistent'], '/nonexistent'),
    ],
}


@for_each('name, arguments, expected', [
    (name, arguments, expected) for name, table in USAGE_ERRORS.items() for arguments, expected in table])
def test_usage_error_is_one_line_that_shows_the_value(name: str, arguments: list[str], expected: str) -> None:
    status, output, log = run(name, *arguments)
    assert (status, output) == (2, b''), log
    assert log.startswith(f'{name}: ') and log.endswith(f"; try '{name} --help'\n") and log.count('\n') == 1
    assert expected in log and 'secret' not in log


@pytest.mark.parametrize(('name', 'more'), [
    *((name, more) for name in ARGUMENTS for more in ([], ['-m', 'bob@example.com'])), ('crashmail', ['--tail=5'])])
def test_listener_runs_under_supervisord_only(name: str, more: list[str]) -> None:
    status, output, log = run(name, *more, *ARGUMENTS[name], environment={'SUPERVISOR_SERVER_URL': ''})
    assert (status, output) == (1, b'')
    assert log.startswith(f'{name} must be started by supervisord') and log.count('\n') == 1 and '--once' in log


# The protocol.

OTHER_EVENTS = [
    ('SUPERVISOR_STATE_CHANGE_RUNNING', ''),
    ('PROCESS_STATE_STARTING', 'processname:web groupname:web from_state:STOPPED tries:0'),
    ('PROCESS_STATE_STOPPED', 'processname:web groupname:web from_state:STOPPING pid:1'),
    ('PROCESS_STATE_UNKNOWN', 'processname:web groupname:web from_state:RUNNING'),
    ('PROCESS_LOG_STDOUT', 'processname:web groupname:web pid:1 channel:stdout\nREADY\n'
                           'ver:3.0 eventname:TICK_5 len:99\nRESULT 2\nOK größe\r\n\n'),
    ('PROCESS_COMMUNICATION_STDERR', 'processname:web groupname:web pid:1\nexpected:0'),
    ('REMOTE_COMMUNICATION', 'type:PROCESS_STATE_EXITED\nprocessname:web groupname:web expected:0 pid:1\n'),
    ('PROCESS_GROUP_ADDED', 'groupname:web\n'),
    ('', 'nameless'),
    ('EVENT_OF_THE_FUTURE', '{"with": "json"}'),
]


@every_command
def test_event_that_is_not_served_is_acknowledged(name: str) -> None:
    other = [*OTHER_EVENTS, TICK if name == 'crashmail' else CRASH]
    status, output, log = serve(name, b''.join(make_event(*event) + make_event(*SERVED[name]) for event in other))
    assert (status, output) == (0, acknowledge(2 * len(other))), log
    # Those between them are served.
    assert count_served(name, log) in (len(other), None), log


BAD_PAYLOADS = ['', '\n', ' ', ':', ':::', 'garbage', 'when:', 'when:x', 'when:-1', 'when:\u0663', 'when:' + '9' * 400,
                'processname', 'processname:web', 'processname:web expected:', 'expected:0', 'processname: expected:2',
                '\0\x1b[2J', '\udcff\udcfe']


@every_command
def test_bad_payload_is_acknowledged(name: str) -> None:
    status, output, log = serve(name, b''.join(
        make_event(SERVED[name][0], payload) + make_event(*SERVED[name]) for payload in BAD_PAYLOADS))
    assert (status, output) == (0, acknowledge(2 * len(BAD_PAYLOADS))), log
    if name == 'crashmail':
        lines = [('PROCESS_STATE_EXITED' in line, LOGGED[name] in line) for line in log.splitlines()
                 if 'unable to determine' not in line]
        assert lines == [(True, False), (False, True)] * len(BAD_PAYLOADS), log


@every_command
def test_unknown_tokens_of_a_header_are_ignored(name: str) -> None:
    header = 'ver:9 server:a:b:c serial:1 pool:x:y flag new: http://example.com:80/ poolserial:10 größe:ß'
    status, output, log = serve(name, make_event(*SERVED[name], header=header) * 2)
    assert (status, output) == (0, acknowledge(2)), log


@for_each('part', [b'', b'v', b'ver:3.0 len:5', b'ver:3.0 eventname:TICK_5 len:5\n',
                   b'ver:3.0 eventname:TICK_5 len:5\nwhen', b'ver:3.0 len:3\nx\xc3',
                   b'eventname:PROCESS_STATE_EXITED len:999999999\nprocessname:web expected:0'])
def test_listener_exits_at_the_end_of_input(part: bytes) -> None:
    assert serve('memmon', make_event(*OTHER_EVENTS[0]) + part) == (0, acknowledge(1), '')


def test_invalid_header_ends_the_listener_with_one_line() -> None:
    status, output, log = serve('memmon', make_event(*OTHER_EVENTS[0]) + b'garbage\n')
    assert (status, output) == (1, acknowledge(1))
    assert re.fullmatch(rf"{STAMP} memmon: invalid event header: .*'garbage\\n'\n", log), log


@every_command
@given(data=st.data())
@settings(max_examples=10)
def test_damaged_input_ends_the_listener_cleanly(name: str, data: st.DataObject) -> None:
    events = [*OTHER_EVENTS[:5], SERVED[name], *OTHER_EVENTS[5:]]
    damaged = bytearray(b''.join(make_event(*event) for event in events))
    for _ in range(data.draw(st.integers(0, 5))):
        place = data.draw(st.integers(0, len(damaged)))
        damaged[place:place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    status, output, log = serve(name, bytes(damaged[:data.draw(st.integers(0, len(damaged)))]))
    assert acknowledge(len(events) + 9).startswith(output) and output.endswith(READY), output
    assert status in (0, 1) and ('invalid event header' in log) == (status == 1), log


def test_payload_may_have_windows_line_ends() -> None:
    name, payload = CRASH
    status, output, log = serve('crashmail', make_event(name, payload + '\r\nexpected:1\r\n') + make_event(*CRASH))
    assert (status, output, count_served('crashmail', log)) == (0, acknowledge(2), 2)


def test_payload_that_is_not_utf_8_is_logged_with_escapes() -> None:
    payload = CRASH[1].replace('web', '\udcff\udcfe')
    status, output, log = serve('crashmail', make_event(CRASH[0], payload) + make_event(*CRASH))
    assert (status, output, count_served('crashmail', log)) == (0, acknowledge(2), 2)
    assert '\\udcff\\udcfe (pid 123)' in log
