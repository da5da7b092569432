"""The demo's output and verdict, from logs that the test writes."""
from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from superlance import crashmail, demo, httpok, memmon
from superlance.options import read_argv

STAMP = '2026-11-24 05:02:11,123 '
SUPERVISORD_LOG = f"""\
{STAMP}INFO supervisord started with pid 9
{STAMP}INFO spawned: 'leaky' with pid 11
{STAMP}INFO spawned: 'hanging' with pid 12
{STAMP}INFO spawned: 'crashing' with pid 13
{STAMP}INFO spawned: 'leaky' with pid {os.getpid()}
{STAMP}INFO spawned: 'hanging' with pid 22
{STAMP}INFO spawned: 'crashing' with pid 23
"""
MEMMON_LOG = f'{STAMP}memmon: restarted leaky (pid 11: 60.7MB, over its limit of 55.0MB)\n'
MAILS = """\
To: you@example.com
Subject: memmon: process leaky:leaky restarted
Date: Tue, 24 Nov 2026 05:02:11 +0000

Subject: httpok: http://127.0.0.1:80/: bad status returned (restarted hanging)
Subject: httpok: http://127.0.0.1:80/: recovered after 2s
Subject: crashing crashed at 2026-11-24 05:02:11,123
"""


class FakeProcess:
    """A supervisord that has the given exit status, or is running."""

    def __init__(self, status: int | None = None) -> None:
        self._status = status

    def poll(self) -> int | None:
        return self._status


def make_transcript(folder: Path, supervisord: str = SUPERVISORD_LOG, memmon: str = MEMMON_LOG,
               mails: str = MAILS) -> demo.Transcript:
    for name, text in (('supervisord', supervisord), ('memmon', memmon), ('mail', mails)):
        (folder / f'{name}.log').write_text(text, 'utf-8')
    return demo.Transcript(folder)


def watch(transcript: demo.Transcript, status: int | None = None) -> str:
    process: subprocess.Popen[bytes] = FakeProcess(status)  # type: ignore[assignment]
    return demo.watch(process, transcript)


def test_everything_done_is_summarised_with_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transcript = make_transcript(tmp_path)
    assert watch(transcript) == ''
    capsys.readouterr()
    transcript.print_summary()
    memmon, httpok, crashmail = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        rf'memmon     done: restarted leaky, sent mail \(pid 11 -> {os.getpid()}; 60\.7MB -> \d+\.\dMB\)', memmon)
    assert httpok == 'httpok     done: restarted hanging, sent mail, saw it recover (pid 12 -> 22; hung for 2s)'
    assert crashmail == 'crashmail  done: reported that crashing crashed (pid 13 -> 23; exit status 1)'


def test_new_lines_are_printed_once_without_what_is_only_for_machines(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transcript = make_transcript(tmp_path)
    transcript.print_news()
    printed = capsys.readouterr().out
    assert "  0s  supervisord  spawned: 'leaky' with pid 11\n" in printed
    assert '  0s  memmon       restarted leaky (pid 11: 60.7MB, over its limit of 55.0MB)\n' in printed
    assert '  0s  mail         Subject: memmon: process leaky:leaky restarted\n' in printed
    assert 'Date:' not in printed
    assert 'supervisord started' not in printed
    with open(tmp_path / 'memmon.log', 'a') as log:
        log.write(f'{STAMP}memmon: a new line\n{STAMP}memmon: half a l')
    transcript.print_news()
    assert capsys.readouterr().out == '  0s  memmon       a new line\n'


def test_what_is_not_done_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, 'DEADLINE_SECONDS', 0)
    transcript = make_transcript(tmp_path, mails='')
    assert watch(transcript) == 'not everything was done within 0s'
    transcript.print_summary()
    assert 'memmon     NOT done: never sent mail\n' in capsys.readouterr().out


@pytest.mark.parametrize(('log', 'status', 'signals', 'expected'), [
    ('', 2, [], 'supervisord has exited (status 2)'),
    (f'{STAMP}INFO gave up: memmon entered FATAL state, too many start retries too quickly\n', None, [],
     'supervisord gave up starting a process'),
    ('', None, [signal.SIGTERM], 'stopped by SIGTERM'),
])
def test_it_ends_early_when_it_cannot_succeed(tmp_path: Path, log: str, status: int | None, signals: list[int],
                                              expected: str) -> None:
    transcript = make_transcript(tmp_path, log, '', '')
    transcript.signals += signals
    assert watch(transcript, status) == expected


def test_memory_is_left_out_without_ps(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('PATH', str(tmp_path))
    transcript = make_transcript(tmp_path)
    transcript.print_news()
    transcript.print_summary()
    assert f'(pid 11 -> {os.getpid()}; no ps)' in capsys.readouterr().out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(('environment', 'is_bold'), [
    ({'TERM': 'xterm'}, True),
    ({'TERM': 'xterm', 'NO_COLOR': ''}, True),
    ({'TERM': 'xterm', 'NO_COLOR': '1'}, False),
    ({'TERM': 'dumb'}, False),
])
def test_lines_of_listeners_are_bold_on_a_terminal_that_can_show_it(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], is_bold: bool) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, 'stdout', terminal)
    monkeypatch.delenv('NO_COLOR', raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    make_transcript(tmp_path).print_news()
    lines = terminal.getvalue().splitlines()
    bold = [line for line in lines if line.startswith('\033[1m') and line.endswith('\033[0m')]
    assert len(bold) == (1 if is_bold else 0)
    assert all('  memmon  ' in line for line in bold)


def test_output_is_plain_if_it_is_not_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_transcript(tmp_path).print_news()
    assert '\033' not in capsys.readouterr().out


@pytest.mark.parametrize('module', [memmon, httpok, crashmail], ids=lambda module: str(module.__name__))
def test_sections_of_the_listeners_are_valid(tmp_path: Path, module: Any) -> None:
    name = module.__name__.rpartition('.')[2]
    command = re.search(rf'\[eventlistener:{name}\]\ncommand={name} (.*)\nevents=', demo.write_files(tmp_path))
    assert command
    assert module.build_options(*read_argv(command[1].split(), module.OPTIONS)).warnings == ()


@pytest.mark.parametrize(('arguments', 'status', 'stream', 'text'), [
    (['--help'], 0, 'out', 'Usage: python -m superlance.demo'),
    (['fast'], 2, 'err', "superlance.demo: unexpected argument 'fast'; the only option is --keep"),
    (['--fast'], 2, 'err', 'superlance.demo: option --fast not recognized'),
])
def test_arguments(arguments: list[str], status: int, stream: str, text: str,
                   capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(arguments) == status
    assert getattr(capsys.readouterr(), stream).startswith(text)
