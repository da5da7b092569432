"""What the three command lines share: values, addresses, usage errors, and what reaches stdout."""
from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from contextlib import suppress
from typing import Any, Callable, Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import given
from support import C_LOCALE, PYTHON, TIMEOUT, run_in_process
from table import CHARACTERS, for_each

from superlance import __version__
from superlance.options import (
    COMMON_OPTIONS,
    EVERY,
    Given,
    Name,
    Option,
    Rate,
    UsageError,
    count,
    format_duration,
    format_size,
    join_names,
    parse_address,
    parse_addresses,
    parse_count,
    parse_name,
    parse_rate,
    parse_size,
    parse_text,
    parse_time,
    parse_timeout,
    read_argv,
    run_script,
    without_password,
)

Parse = Callable[[str], Any]

KB, MB, GB, TB = 1024, 1024 ** 2, 1024 ** 3, 1024 ** 4

# Each is tried by itself, and as the value of an option.
VALUES: Sequence[tuple[Parse, str, Any]] = (
    (parse_size, '4096', 4096),
    (parse_size, '0', 0),
    (parse_size, '1b', 1),
    (parse_size, '200MB', 200 * MB),
    (parse_size, '200mb', 200 * MB),
    (parse_size, '200Mb', 200 * MB),
    (parse_size, '200 MB', 200 * MB),
    (parse_size, '1.5GB', 3 * GB // 2),
    (parse_size, '.5k', 512),
    (parse_size, '5.K', 5 * KB),
    (parse_size, '1g', GB),
    (parse_size, '  10kb', 10 * KB),
    (parse_size, '10kb\t', 10 * KB),
    (parse_size, '2TB', 2 * TB),
    (parse_size, '64KiB', 64 * KB),
    (parse_size, '200 mib', 200 * MB),
    (parse_size, '1.5GIB', 3 * GB // 2),
    (parse_size, '2TiB', 2 * TB),
    (parse_size, '7B', 7),
    (parse_size, '3t', 3 * TB),
    (parse_size, '999999999999999TB', 999999999999999 * TB),
    (parse_size, '1.1', 1),
    (parse_size, '1' * 20, int(float('1' * 20))),
    (parse_size, '9' * 5000 + 'GB', 10 ** 30),
    (parse_time, '90', 90),
    (parse_time, '0', 0),
    (parse_time, '90s', 90),
    (parse_time, '1.5m', 90),
    (parse_time, ' 2 H ', 7200),
    (parse_time, '1D', 86400),
    (parse_time, '10000d', 864000000),
    (parse_time, '10001d', 864000000),
    (parse_time, '9' * 5000, 864000000),
    (parse_timeout, '0.25', 0.25),
    (parse_timeout, '10m', 600),
    (parse_count, '1', 1),
    (parse_count, '007', 7),
    (parse_count, '999999999', 999999999),
    (parse_rate, '3/1h', Rate(3, 3600)),
    (parse_rate, '1/90', Rate(1, 90)),
    (parse_text, ' ', ' '),
    (parse_text, 'caf\xe9', 'caf\xe9'),
    (parse_address, 'bob@example.com', 'bob@example.com'),
    (parse_address, '"Doe, J" <j@example.com>', '"Doe, J" <j@example.com>'),
)

# Invalid values, and what the error message contains besides the value.
WRONG: Sequence[tuple[Parse, str, str]] = tuple(
    [(parse_size, text, 'write bytes, or a number with KB, MB, GB or TB') for text in (
        'banana', '', ' ', 'MB', 'B', 'k', '.', '-1', '+1', '1e3', '1.2.3', '1,5GB', '0x10', '1_000', 'inf', 'nan',
        '10PB', '10BB', '10MBB', '10 M B', '\u0661\u0660', '10\xb2', '\uff11\uff10', '10\u212a', '10\x00', 'MB10',
        '10ib', '10kbi', '10KiBB')]
    + [(parse_time, text, 'write seconds, or a number with s, m, h or d') for text in (
        'banana', '', 's', '-1', '1e3', '1.2.3', '10ms', '10w', '1h30m', '\u0661', '10\u017f', 'inf')]
    + [(parse_timeout, text, 'must be greater than 0') for text in ('0', '0.0', '0d')]
    + [(parse_timeout, 'soon', 'write seconds')]
    + [(parse_count, text, 'write a whole number, at least 1') for text in (
        '0', '', '-1', '1.5', ' 1', 'x', '\u0663', '\xb2', '1' * 10, '1' * 5000)]
    + [(parse_rate, text, 'N/TIME') for text in ('3', '', '1h')]
    + [(parse_rate, text, 'write a whole number, at least 1') for text in ('0/1h', 'x/1h')]
    + [(parse_rate, '3/', 'write seconds'), (parse_rate, '3/1/2', 'write seconds'),
       (parse_rate, '3/0', 'must be greater than 0'), (parse_text, '', 'must not be empty'),
       (parse_address, '', 'must not be empty'),
       (parse_address, 'a@example.com, b@example.com', 'is more than one mail address')])


@for_each('parse, text, value', VALUES)
def test_value(parse: Parse, text: str, value: object) -> None:
    assert parse(text) == value
    given, _ = read_argv(['--value', text], [Option('', 'value', parse)])
    assert given.last('value') == value


def test_size_is_whole() -> None:
    assert isinstance(parse_size('1.0000001KB'), int)


@for_each('parse, text, expected', WRONG)
def test_wrong_value(parse: Parse, text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)) as why:
        parse(text)
    with pytest.raises(UsageError) as usage:
        read_argv(['-x', text], [Option('x', 'value', parse)])
    assert str(usage.value) == f'option -x: {why.value}'


@pytest.mark.parametrize('parse', [parse_size, parse_time, parse_timeout, parse_count, parse_rate, parse_address])
def test_complaint_shows_the_value(parse: Parse) -> None:
    with pytest.raises(ValueError, match=r"'ban\\x1bana\\n\\udc80'"):
        parse('ban\x1bana\n\udc80')


@for_each('size_bytes, text', [
    (0, '0B'), (1023, '1023B'), (KB, '1.0KB'), (1536, '1.5KB'), (MB, '1.0MB'), (200 * MB, '200.0MB'),
    (3 * GB // 2, '1.5GB'), (2 * TB, '2048.0GB'),
])
def test_size_for_people(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@for_each('seconds, text', [
    (-1, '0s'), (0, '0s'), (0.04, '0s'), (0.25, '0.2s'), (5, '5s'), (9.94, '9.9s'), (9.96, '10s'), (59.4, '59s'),
    (59.6, '1m'), (90, '1m 30s'), (180, '3m'), (185, '3m 5s'), (599, '9m 59s'), (601, '10m'), (3592, '59m'),
    (3600, '1h'), (3900, '1h 5m'), (86399, '23h 59m'), (86400, '1d'), (90000, '1d 1h'), (86400 + 120, '1d'),
])
def test_duration_for_people(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.integers(0, 10 ** 12))
def test_size_for_people_is_read_back(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == pytest.approx(size_bytes, rel=0.06)


@given(st.floats(0, 10000 * 86400))
def test_duration_for_people_has_at_most_two_units_and_is_close(seconds: float) -> None:
    parts = format_duration(seconds).split()
    assert len(parts) <= 2
    assert sum(map(parse_time, parts)) == pytest.approx(seconds, abs=0.51 if seconds < 600 else 3600, rel=0.1)


@given(st.text(CHARACTERS))
def test_any_text_is_a_value_or_a_value_error(text: str) -> None:
    for parse in (parse_size, parse_time, parse_timeout, parse_count, parse_rate, parse_name, parse_addresses):
        with suppress(ValueError):
            parse(text)


def test_count() -> None:
    assert [count(n, 'restart') for n in (0, 1, 2)] == ['0 restarts', '1 restart', '2 restarts']
    assert [count(n, 'process', 'processes') for n in (1, 2)] == ['1 process', '2 processes']


@pytest.mark.parametrize(('names', 'text'), [
    (['a'], 'a'), (['a', 'b', 'c'], 'a, b, c'), (['a', 'b', 'c', 'd', 'e'], 'a, b, c and 2 more')])
def test_names_in_a_sentence(names: list[str], text: str) -> None:
    assert join_names(names) == text


# Names.

@for_each('text, name, shown', [
    ('web', Name(None, 'web'), 'web'),
    (' web ', Name(None, 'web'), 'web'),
    ('shop:web', Name('shop', 'web'), 'shop:web'),
    ('shop:*', Name('shop', None), 'shop:*'),
    ('shop:', Name('shop', None), 'shop:*'),
    ('größe', Name(None, 'größe'), 'größe'),
    ('web\nx', Name(None, 'web\nx'), r'web\nx'),
])
def test_parse_name(text: str, name: Name, shown: str) -> None:
    assert parse_name(text) == name
    assert str(name) == shown


@for_each('text', ['', ' ', '*', ':', ':web', '*:'[1:], 'a:b:c', 'a::'])
def test_text_that_is_not_a_name(text: str) -> None:
    with pytest.raises(ValueError, match='is not a process name; write program, group:program or group:\\*'):
        parse_name(text)


@pytest.mark.parametrize(('name', 'matching'), [
    ('web', ['web:web', 'shop:web']),
    ('shop:web', ['shop:web']),
    ('shop:*', ['shop:web', 'shop:db']),
    ('we', []),
    ('Web', []),
])
def test_name_matches(name: str, matching: list[str]) -> None:
    names = ['web:web', 'shop:web', 'shop:db', 'db:x']
    assert [text for text in names if parse_name(name).matches(*text.split(':'))] == matching
    assert all(EVERY.matches(*text.split(':')) for text in names)


# Mail addresses.

@for_each('text, addresses', [
    ('bob@example.com', ['bob@example.com']),
    ('root', ['root']),
    ('  bob@example.com\n', ['bob@example.com']),
    ('a@example.com,b@example.com', ['a@example.com', 'b@example.com']),
    ('a@example.com , b@example.com, root', ['a@example.com', 'b@example.com', 'root']),
    ('Bob <bob@example.com>', ['Bob <bob@example.com>']),
    ('<bob@example.com>', ['<bob@example.com>']),
    ('bob@example.com (Bob B.), root', ['bob@example.com (Bob B.)', 'root']),
    ("J. O'Hara Jr. <j@example.com>, root", ["J. O'Hara Jr. <j@example.com>", 'root']),
    ('"Doe, J" <j@example.com>', ['"Doe, J" <j@example.com>']),
    ('"Doe, J" <j@example.com>, "x, y, z"<x@example.com>, a@b',
     ['"Doe, J" <j@example.com>', '"x, y, z"<x@example.com>', 'a@b']),
    ('a+tag=x/{y}..z@mail-1.example.co.uk', ['a+tag=x/{y}..z@mail-1.example.co.uk']),
    # An empty part is ignored.
    ('', []),
    (' ', []),
    (',', []),
    ('a@example.com,', ['a@example.com']),
    (',a@example.com', ['a@example.com']),
    ('a@example.com, ,b@example.com', ['a@example.com', 'b@example.com']),
    # Beyond ASCII: names, but not addresses.
    ('J\xfcrgen M. M\xfcller <b@example.com>, root', ['J\xfcrgen M. M\xfcller <b@example.com>', 'root']),
    ('\u65e5\u672c <b@example.com>', ['\u65e5\u672c <b@example.com>']),
    ('b@example.com (B\xf6b)', ['b@example.com (B\xf6b)']),
    ('"B\xf6b" <b@example.com>', ['B\xf6b <b@example.com>']),
    ('"M\xfcller, Bob; [x]: a@b.c. <(Jr)>"<b@example.com>', ['M\xfcller Bob x a b c Jr <b@example.com>']),
    ('B\xf6b, <bob@example.com>', None),
    ('B\x85b <bob@example.com>', None),
    ('B\u202eb <bob@example.com>', None),
    ('a@[ops', None),
    ('bob@', None),
    ('@example.com', None),
    ('<bob@>', None),
    ('<>', None),
    ('<', None),
    ('bob@example.com>', None),
    ('<bob@example.com', None),
    ('bob@example.com.', None),
    ('bob@.example.com', None),
    ('bob@exam ple.com', None),
    ('bob@example@com', None),
    ('bob smith@example.com', None),
    ('Bob bob@example.com', None),
    ('bob@example.com (a, b)', None),
    ('bob@example.com (Bob', None),
    ('a@example.com;b@example.com', None),
    ('team: a@example.com;', None),
    ('.<bob@example.com>', None),
    ('B.<bob@example.com>', None),
    ('"', None),
    ('"Doe, a@example.com', None),
    ('a@example.com, "Doe', None),
    ('"a\\", b" <a@example.com>', None),
    ('b\xf6b@example.com', None),
    ('bob@ex\xe4mple.com', None),
    ('bob\udcff@example.com', None),
    ('bob@example.com\nBcc: eve@example.com', None),
    ('bob@example.com\r\n\r\nbody', None),
    ('"a\nBcc: eve@example.com" <bob@example.com>', None),
    ('bob@example.com\x00', None),
    ('bob\x7f@example.com', None),
    ('=?utf-8?q?a=0aBcc:_eve@example.com?= <bob@example.com>', None),
    ('"=?utf-8?q?a=0aBcc:_eve@example.com?=" <bob@example.com>', None),
])
def test_addresses(text: str, addresses: list[str] | None) -> None:
    if addresses is not None:
        assert parse_addresses(text) == tuple(addresses)
        return
    complaint = f'{text!r} is not a mail address; write one, as in bob@example.com, or several, separated by commas'
    for parse in (parse_addresses, parse_address):
        with pytest.raises(ValueError, match=f'^{re.escape(complaint)}$'):
            parse(text)


# URLs.

@for_each('url, shown', [
    ('http://localhost:8080/health', None),
    ('http://bob@localhost/', None),
    ('http://localhost/a:b@c?d:e@f#g:h@i', None),
    ('http://localhost:8080/a:b@c', None),
    ('http://[::1]/a:b@c', None),
    ('http://[::1]:8080/a:b@c', None),
    ('/a:b@c', '/a:***@c'),
    ('http://bob:s3cret@localhost:8080/health?x=y', 'http://bob:***@localhost:8080/health?x=y'),
    ('http://bob:s3cret@[::1]:8080/', 'http://bob:***@[::1]:8080/'),
    ('http://bob:s3:cr@et@localhost', 'http://bob:***@localhost'),
    ('http://:s3cret@localhost', 'http://:***@localhost'),
    ('http://bob:@localhost', 'http://bob:***@localhost'),
    ('http://bob:s3cret@localhost?a@b', 'http://bob:***@localhost?a@b'),
    ('http://bob:s3cret@localhost#a@b', 'http://bob:***@localhost#a@b'),
    # Hardly one of these is valid, and they are shown in a complaint.
    ('http://localhost:/a@c', 'http://localhost:***@c'),
    ('http://bob:s3/cret@localhost', 'http://bob:***@localhost'),
    ('http://bob:s3?cret@localhost/', 'http://bob:***@localhost/'),
    ('http://bob:#s3cret@localhost/', 'http://bob:***@localhost/'),
    ('http://bob:s3#cret@localhost/', 'http://bob:***@localhost/'),
    ('http:///bob:s3cret@localhost/', 'http:///bob:***@localhost/'),
    ('http:/bob:s3cret@localhost', 'http:***@localhost'),
    ('bob:s3cret@localhost', 'bob:***@localhost'),
    ('bob:s3/cret@localhost', 'bob:***@localhost'),
    ('localhost:8080', None),
    ('', None),
])
def test_without_password(url: str, shown: str) -> None:
    assert without_password(url) == (url if shown is None else shown)


# Command lines.

TABLE = (
    Option('p', 'program', parse_text),
    Option('g', 'groupname', str),
    Option('a', 'any', parse_size),
    Option('c', 'cumulative'),
    Option('', 'samples', parse_count),
    Option('', 'count', parse_count),
    Option('s', 'sendmail_program', parse_text),
    *COMMON_OPTIONS,
)


def test_given() -> None:
    options = Given()
    options.add('any', 1)
    options.add('any', 2)
    assert 'any' in options
    assert 'all' not in options
    assert (options.all('any'), options.last('any'), options.last('any', 9)) == ([1, 2], 2, 2)
    assert (options.all('all'), options.last('all'), options.last('all', 9)) == ([], None, 9)


def test_latest_option() -> None:
    options = Given()
    assert options.latest('sendmail_program', 'smtp') is None
    for name in ('sendmail_program', 'any', 'smtp', 'sendmail_program', 'any'):
        options.add(name, 1)
    assert options.latest('sendmail_program', 'smtp') == 'sendmail_program'


def test_ignored_arguments_become_warnings() -> None:
    options = Given()
    options.ignore_arguments('memmon', [])
    assert options.warnings == []
    options.ignore_arguments('memmon', ['b@example.com', 'smtp://bob:secret@host'])
    options.ignore_empty('-n')
    assert options.warnings == [
        "ignored argument 'b@example.com': memmon takes options only; a value that contains spaces needs quotes",
        "ignored argument 'smtp://bob:***@host': memmon takes options only; a value that contains spaces needs quotes",
        'ignored option -n: its value is empty']


@for_each('argv, name, values, arguments', [
    ([], 'any', [], []),
    (['-a', '1k'], 'any', [1024], []),
    (['-a1k', '--any=2k', '--any', '3k'], 'any', [1024, 2048, 3072], []),
    (['--group=web'], 'groupname', ['web'], []),
    (['--g', 'web'], 'groupname', ['web'], []),
    (['--send', '/bin/true -x'], 'sendmail_program', ['/bin/true -x'], []),
    (['--cum'], 'cumulative', [True], []),
    # A single letter that superlance 2.0.0 accepted; now other options begin with it, too.
    (['--s', 'x'], 'sendmail_program', ['x'], []),
    (['--s=x'], 'sendmail_program', ['x'], []),
    (['--c'], 'cumulative', [True], []),
    (['-ca', '1'], 'cumulative', [True], []),
    (['-ca', '1'], 'any', [1], []),
    (['-p', '-a'], 'program', ['-a'], []),
    (['-g', ''], 'groupname', [''], []),
    (['-g', 'a=b'], 'groupname', ['a=b'], []),
    (['x', '-a', '1', 'y'], 'any', [1], ['x', 'y']),
    (['--', '-a', '1'], 'any', [], ['-a', '1']),
])
def test_read_argv(argv: list[str], name: str, values: list[object], arguments: list[str]) -> None:
    given, rest = read_argv(argv, TABLE)
    assert (given.all(name), rest) == (values, arguments)


@pytest.mark.parametrize('argv', [['x', '-z'], ['x', '-a', 'y'], ['x', '--any'], ['-', '-z'], ['--', '-z']])
def test_script_that_ignores_arguments_ignores_errors_after_the_first(argv: list[str]) -> None:
    """As superlance 2.0.0 did."""
    options, arguments = read_argv(['-a', '1k', *argv], TABLE, ignores_arguments=True)
    assert (options.all('any'), arguments) == ([1024], [word for word in argv if word != '--'])


@pytest.mark.parametrize('argv', [['-z', 'x'], ['-a', 'y', 'x'], ['--any']])
def test_script_that_ignores_arguments_reports_errors_before_the_first(argv: list[str]) -> None:
    with pytest.raises(UsageError):
        read_argv(argv, TABLE, ignores_arguments=True)


def build(given: Given, arguments: list[str]) -> list[str]:
    if arguments:
        raise UsageError(f'unexpected argument {arguments[0]!r}')
    return list(map(str, given.all('any')))


def run(sizes: list[str]) -> int:
    print('ran with', *sizes)
    return 7


def call(*argv: str) -> int:
    return run_script('tester', 'Usage: tester\n', TABLE, build, run, argv)


@pytest.mark.parametrize(('argv', 'expected'), [
    (['-z'], ['-z', 'not recognized']),
    (['--zebra=1'], ['--zebra', 'not recognized']),
    (['--co', '1'], ['--co', 'not a unique prefix']),
    (['-a'], ['-a', 'requires argument']),
    (['--any'], ['--any', 'requires argument']),
    (['--once=1'], ['--once', 'must not have an argument']),
    (['-a', 'banana'], ['option -a', "'banana'", 'KB, MB, GB or TB']),
    (['--any=banana'], ['option --any', "'banana'", 'KB, MB, GB or TB']),
    (['--an', 'banana'], ['option --any', "'banana'", 'KB, MB, GB or TB']),
    (['--samples', '0'], ['option --samples', "'0'", 'a whole number, at least 1']),
    (['-p', ''], ['option -p', 'must not be empty']),
    (['-a', 'http://bob:secret@host/'], ['option -a', "'http://bob:***@host/' is not a size"]),
    (['-a', 'ban\nana\x1b[1m'], ['option -a', "'ban\\nana\\x1b[1m'"]),
    (['-\n'], ['not recognized']),
    (['--zebra\n\r=1'], ['--zebra', 'not recognized']),
    (['stray\nargument'], ["unexpected argument 'stray\\nargument'"]),
    (['--help', '-a', 'banana'], ["'banana'"]),
])
def test_usage_error(argv: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ''
    assert err.startswith('tester: ')
    assert err.endswith("; try 'tester --help'\n")
    assert len(err.splitlines()) == 1
    assert err[:-1].isprintable()
    for text in expected:
        assert text in err


@pytest.mark.parametrize(('argv', 'status', 'output'), [
    (['--help'], 0, 'Usage: tester\n'),
    (['-h', '--version', 'stray'], 0, 'Usage: tester\n'),
    (['--hel', '-a', '1'], 0, 'Usage: tester\n'),
    (['--version'], 0, f'tester {__version__}\n'),
    (['--version', 'stray'], 0, f'tester {__version__}\n'),
    (['-a', '1k', '-a', '2'], 7, 'ran with 1024 2\n'),
])
def test_command(argv: list[str], status: int, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*argv) == status
    assert capsys.readouterr() == (output, '')


def test_usage_error_of_run(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: object) -> int:
        raise UsageError('no such\nfile')
    assert run_script('tester', '', TABLE, build, fail, []) == 2
    assert capsys.readouterr() == ('', "tester: no such | file; try 'tester --help'\n")


def test_command_reads_its_own_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, 'argv', ['tester', '-a', '1k'])
    assert run_script('tester', '', TABLE, build, run, None) == 7
    assert capsys.readouterr() == ('ran with 1024\n', '')


def test_stdout_that_is_not_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    monkeypatch.setattr(sys, 'stdout', output)
    assert call('--version') == 0
    assert output.getvalue() == f'tester {__version__}\n'


# The same as a process of its own.

SCRIPT = '''
from superlance.options import Option, run_script
def show(given):
    print(ascii(given.all('name')))
    print(*given.all('name'))
    return 0
raise SystemExit(run_script('tester', 'usage', [Option('n', 'name', str), Option('', 'size', int)],
                            lambda given, arguments: given, show, None))
'''


def run_process(*arguments: str | bytes) -> tuple[int, bytes, bytes]:
    process = subprocess.run([PYTHON, *arguments], stdin=subprocess.DEVNULL, capture_output=True,
                             timeout=TIMEOUT, env={**os.environ, **C_LOCALE})
    return process.returncode, process.stdout, process.stderr


def test_arguments_are_utf8_whatever_the_locale() -> None:
    arguments: list[bytes] = [b'-n', 'caf\xe9'.encode(), '--name=\u65e5\u672c'.encode(), b'-n', b'\xff']
    status, out, err = run_process('-c', SCRIPT, *arguments)
    assert (status, err) == (0, b'')
    names, words = out.decode('ascii').splitlines()
    assert names == r"['caf\xe9', '\u65e5\u672c', '\udcff']"
    assert words == r'caf\xe9 \u65e5\u672c \udcff'


def test_usage_error_whatever_the_locale() -> None:
    status, out, err = run_process('-c', SCRIPT, b'--size', 'ban\xe4na\xff'.encode('latin-1') + '\xe4'.encode())
    assert (status, out) == (2, b'')
    assert err.startswith(b'tester: option --size: ')
    assert err.endswith(b"; try 'tester --help'\n")
    assert err.count(b'\n') == 1
    assert err.isascii()
    assert rb"ban\udce4na\udcff\xe4'" in err


@pytest.mark.usefixtures('measured')
@pytest.mark.parametrize(('arguments', 'redirection', 'status'), [
    ('--bad', '>&- 2>&-', 2),
    ('--help', '>/dev/full 2>/dev/full', 1),
])
def test_exit_status_without_stdout_and_stderr(arguments: str, redirection: str, status: int) -> None:
    done = subprocess.run(f'exec 3>&2; "{PYTHON}" -m superlance.memmon {arguments} {redirection}', shell=True)
    assert done.returncode == status


def test_output_without_a_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'stdout', None)
    assert call('--help') == 0


def open_broken_pipe() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize(('open_stdout', 'reason'), [
    (lambda: os.open('/dev/full', os.O_WRONLY), 'No space left on device'),
    (lambda: os.open(os.devnull, os.O_RDONLY), 'Bad file descriptor'),
    (open_broken_pipe, ''),     # as with `| head -1`
])
@pytest.mark.parametrize('option', ['--help', '--version'])
def test_output_that_cannot_be_written(open_stdout: Callable[[], int], reason: str, option: str) -> None:
    stdout = open_stdout()
    try:
        found = run_in_process(lambda: call(option), stdout=stdout)
    finally:
        os.close(stdout)
    assert found.status == 1
    assert found.log == (f'tester: unable to write to stdout: {reason}\n' if reason else '')


def test_interrupt_from_the_keyboard(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(options: object) -> int:
        raise KeyboardInterrupt

    assert run_script('memmon', 'usage', (), lambda given, arguments: None, interrupted, []) == 130
    assert capsys.readouterr().err == ''


def test_other_faults_are_not_hidden() -> None:
    def fail(options: object) -> int:
        raise PermissionError('a bug')

    with pytest.raises(PermissionError):
        run_script('memmon', 'usage', (), lambda given, arguments: None, fail, [])
