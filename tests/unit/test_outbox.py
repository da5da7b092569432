"""The outbox: when notices are retried, by a virtual clock; and its threads, log lines and end."""
from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Callable, Iterator, List, Sequence, Tuple

import hypothesis.strategies as st
import pytest
from chat import Chat
from hypothesis import given
from support import TIMEOUT, read, wait_for, write_script
from web import hang

from superlance import mail, outbox
from superlance.command import SecondsLeft
from superlance.listener import ExitRequest
from superlance.notice import Notice, SendFailed
from superlance.outbox import Outbox, Queue, Schedule

TO = ('bob@example.com',)
DOWN = SendFailed('relay is down')
REJECTED = SendFailed('550 no such user', permanent=True)
BAD_LOGIN = SendFailed('535 wrong password', permanent=True, pause_seconds=3600)

# Returns why a notice fails, or None if it is accepted.
Server = Callable[[str, float], 'SendFailed | None']


# When notices are retried.

def simulate(server: Server, puts: Sequence[tuple[float, str]], until: float,
             close_at: float = math.inf) -> list[tuple[float, str]]:
    """Return the attempts, as (time, subject), that a schedule makes with a server until a time."""
    schedule = Schedule()
    waiting = [*puts]
    attempts = []
    now = 0.0
    while True:
        while waiting and waiting[0][0] <= now:
            assert schedule.put(Notice(waiting.pop(0)[1], '', '', 0.0), now) is None
        if now >= close_at and not schedule.is_closing:
            schedule.close()
        schedule.discard_old(now)
        notice = schedule.take(now)
        if notice:
            attempts.append((now, notice.subject))
            failure = server(notice.subject, now)
            if failure:
                schedule.fail(failure, now)
            else:
                schedule.succeed(now)
            continue
        now = min([now + schedule.seconds_to_next(now), *(when for when, _ in waiting[:1]),
                   *([close_at] if now < close_at else [])])
        if now > until:
            return attempts


def test_first_attempt_is_at_once() -> None:
    assert simulate(lambda subject, now: None, [(0, 'a'), (0, 'b'), (7, 'c')], 99999) == [(0, 'a'), (0, 'b'), (7, 'c')]


def test_delay_doubles_to_ten_minutes_for_a_day() -> None:
    attempts = simulate(lambda subject, now: DOWN, [(0, 'a'), (0, 'b')], 10 * 86400)
    times = [when for when, _ in attempts]
    assert times[:11] == [0, 0, 10, 30, 70, 150, 310, 630, 1230, 1830, 2430]
    assert {later - sooner for sooner, later in zip(times[8:], times[9:])} == {600}
    assert 86400 - 600 <= times[-1] <= 86400
    assert [subject for _, subject in attempts[:6]] == ['a', 'b', 'a', 'b', 'a', 'b']     # in turn


def test_failed_notices_are_retried_after_a_success() -> None:
    attempts = simulate(lambda subject, now: DOWN if now < 5 or subject == 'bad' else None,
                        [(0, 'a'), (1, 'b'), (2, 'bad'), (3, 'c'), (5, 'new')], 10)
    # c is behind the one that failed again, and waits for its delay.
    assert attempts == [(0, 'a'), (1, 'b'), (2, 'bad'), (3, 'c'), (5, 'new'), (5, 'a'), (5, 'b'), (5, 'bad')]


def test_delay_starts_over_after_a_success() -> None:
    attempts = simulate(lambda subject, now: DOWN if now < 30 or now == 100 else None, [(0, 'a'), (100, 'b')], 999)
    assert attempts == [(0, 'a'), (10, 'a'), (30, 'a'), (100, 'b'), (110, 'b')]


def test_a_new_notice_that_fails_does_not_delay_the_retry() -> None:
    attempts = simulate(lambda subject, now: DOWN, [(0, 'a'), (9, 'b')], 10)
    assert attempts == [(0, 'a'), (9, 'b'), (10, 'a')]


def test_permanent_rejection_is_retried_hourly_whatever_else_is_accepted() -> None:
    attempts = simulate(lambda subject, now: REJECTED if subject == 'a' else None, [(0, 'a'), (60, 'b')], 2 * 86400)
    assert attempts == [(0, 'a'), (60, 'b'), *((hour * 3600, 'a') for hour in range(1, 25))]


def test_when_a_rejected_notice_is_accepted_the_others_follow() -> None:
    attempts = simulate(lambda subject, now: REJECTED if now < 7000 else None, [(0, 'a'), (60, 'b'), (70, 'c')], 99999)
    assert attempts == [(0, 'a'), (60, 'b'), (70, 'c'), (3600, 'a'), (7200, 'b'), (7200, 'c'), (7200, 'a')]


def test_failed_login_pauses_everything_for_an_hour() -> None:
    attempts = simulate(lambda subject, now: BAD_LOGIN if now < 7000 else None, [(0, 'a'), (60, 'b')], 99999)
    assert attempts == [(0, 'a'), (3600, 'b'), (7200, 'a'), (7200, 'b')]


@pytest.mark.parametrize('seconds', [1, 5, 10, 45, 3600])
def test_status_429_pauses_everything_for_as_long_as_the_server_says(seconds: int) -> None:
    busy = SendFailed('429', pause_seconds=seconds)
    attempts = simulate(lambda subject, now: busy if now < 2 * seconds else None, [(0, 'a'), (seconds / 2, 'b')], 99999)
    assert attempts == [(0, 'a'), (seconds, 'b'), (2 * seconds, 'a'), (2 * seconds, 'b')]


def test_a_rejection_after_a_failure_and_the_reverse() -> None:
    outcomes = iter([DOWN, REJECTED, DOWN, None])
    attempts = simulate(lambda subject, now: next(outcomes), [(0, 'a')], 99999)
    assert attempts == [(0, 'a'), (10, 'a'), (3610, 'a'), (3630, 'a')]


def test_last_attempt_at_exit_for_each() -> None:
    def server(subject: str, now: float) -> SendFailed | None:
        return {'a': DOWN, 'b': REJECTED, 'c': BAD_LOGIN}.get(subject) if now < 30 or subject == 'b' else None

    attempts = simulate(server, [(0, 'a'), (1, 'b'), (2, 'c'), (3, 'd')], 99999, close_at=9)
    assert attempts[3:] == [(9, 'd'), (9, 'a'), (9, 'b'), (9, 'c')]


def test_exit_does_not_make_one_failed_login_for_each() -> None:
    attempts = simulate(lambda subject, now: BAD_LOGIN, [(0, 'a'), (1, 'b'), (2, 'c')], 14, close_at=9)
    assert attempts == [(0, 'a'), (9, 'b')]


def test_the_oldest_is_discarded_beyond_a_thousand() -> None:
    schedule = Schedule()
    for number in range(1001):
        assert schedule.put(Notice(str(number), '', '', 0.0), number) is None
        if number < 2:
            assert schedule.take(number)
            schedule.fail(REJECTED, number) if number else schedule.succeed(number)
    discarded = [schedule.put(Notice('new', '', '', 0.0), 2000) for _ in range(2)]
    assert [notice and notice.subject for notice in discarded] == ['1', '2']
    assert len(schedule.remaining()) == 1000


@given(st.lists(st.tuples(st.integers(0, 90000), st.sampled_from([None, DOWN, REJECTED, BAD_LOGIN])), max_size=30))
def test_nothing_is_lost_or_sent_twice(arrivals: list[tuple[int, SendFailed | None]]) -> None:
    """Whatever fails, and with what: each notice is accepted once or discarded after a day."""
    accepted: Counter[str] = Counter()

    def server(subject: str, now: float) -> SendFailed | None:
        failure = arrivals[int(subject)][1]
        # Every notice is accepted some hours after it was put.
        if failure and now < arrivals[int(subject)][0] + 20000:
            return failure
        accepted[subject] += 1
        return None

    puts = sorted((float(when), str(number)) for number, (when, _) in enumerate(arrivals))
    attempts = simulate(server, puts, 10 * 86400)
    assert set(accepted.values()) <= {1}
    assert all(accepted[subject] or failure for subject, (_, failure) in zip(map(str, range(99)), arrivals))
    for subject, number in Counter(subject for _, subject in attempts).items():
        assert number <= 200, (subject, number)


# Threads and log lines.

class Lines(List[str]):
    """A log."""

    def __call__(self, line: str) -> None:
        self.append(line)

    def wait(self, text: str, number: int = 1) -> str:
        """Wait until number lines contain text; return the last of them."""
        found: str = wait_for(lambda: [line for line in self if text in line][number - 1:],
                              lambda: f'{number} lines with {text!r}: {self}')[0]
        return found


class Clock:
    now = 5000.0

    def __call__(self) -> float:
        return self.now


def find_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == 'outbox']


Make = Callable[..., Tuple[Queue, Lines]]


@pytest.fixture
def make_queue() -> Iterator[Make]:
    """Return a function that makes a queue with a transport, which is closed after the test."""
    queues: list[Queue] = []

    def make(send: Callable[[str], str], clock: Callable[[], float] = time.monotonic) -> tuple[Queue, Lines]:
        lines = Lines()
        queues.append(Queue('mail', ' to bob', lambda notice, left: send(notice.subject), 'memmon', lines, clock))
        return queues[-1], lines

    yield make
    for queue in queues:
        close(queue, 0)
    wait_for(lambda: not find_threads(), 'the end of all threads')


def put(queue: Queue, *subjects: str) -> None:
    for subject in subjects:
        queue.put(Notice(subject, '', '', 0.0))


def close(queue: Queue, seconds: float = TIMEOUT) -> None:
    queue.begin_close(queue._clock() + seconds)
    queue.finish_close()


def fail(why: Exception) -> str:
    raise why


def test_sent(make_queue: Make) -> None:
    queue, lines = make_queue({'first': '', 'second': '250 queued'}.__getitem__)
    put(queue, 'first', 'second')
    lines.wait('second')
    assert lines == ['sent mail "first" to bob', 'sent mail "second" to bob: 250 queued']
    close(queue)
    assert len(lines) == 2 and not find_threads()


def test_failure_is_logged_and_retried(make_queue: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, 'FIRST_RETRY_SECONDS', 0.05)
    answers = iter([DOWN, DOWN])
    queue, lines = make_queue(lambda subject: fail(why) if (why := next(answers, None)) else '')
    put(queue, 'a "subject"')
    lines.wait('sent')
    assert lines == ['unable to send mail "a "subject"", queued for retry: relay is down'] * 2 + [
        'sent mail "a "subject"" to bob']


def test_time_of_the_retry_is_logged_if_it_is_known(make_queue: Make) -> None:
    queue, lines = make_queue(lambda subject: fail({
        'a': REJECTED, 'b': SendFailed('429 Too Many Requests', pause_seconds=90)}[subject]), Clock())
    put(queue, 'a', 'b')
    lines.wait('"b"')
    put(queue, 'c')
    assert lines == ['unable to send mail "a", queued for retry in 1h: 550 no such user',
                     'unable to send mail "b", queued for retry in 1m 30s: 429 Too Many Requests',
                     'queued mail "c": next attempt in 1m 30s']


def test_put_never_waits_and_there_is_one_thread(make_queue: Make) -> None:
    go = threading.Event()
    queue, lines = make_queue(lambda subject: str(go.wait(TIMEOUT)))
    subjects = [f'mail {number}' for number in range(5)]
    put(queue, *subjects)
    assert lines == []
    assert len(find_threads()) == 1 and find_threads()[0].daemon
    go.set()
    lines.wait('mail 4')
    assert lines == [f'sent mail "{subject}" to bob: True' for subject in subjects]


def test_bug_in_one_notice_does_not_stop_the_others(make_queue: Make) -> None:
    queue, lines = make_queue(lambda subject: {'good': ''}[subject])
    put(queue, 's3cret', 'good')
    lines.wait('sent mail "good"')
    expected = 'unable to send mail "s3cret", queued for retry: unexpected KeyError at '
    assert lines[0].startswith(expected + __file__)     # but not with its text, which may contain a password


def test_notices_are_discarded_after_a_day_and_beyond_a_thousand(
        make_queue: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    queue, lines = make_queue(lambda subject: fail(DOWN), clock)
    put(queue, 'old')
    lines.wait('unable')
    clock.now += 86401
    put(queue, 'new')
    assert lines.wait('dropped') == 'dropped mail "old": could not be sent within 1d'
    lines.wait('"new", queued')
    monkeypatch.setattr(outbox, 'KEEP_NOTICES', 1)
    put(queue, 'newer')
    assert lines.wait('dropped', 2) == 'dropped mail "new": more than 1 are queued'


# Exit.

def test_last_attempt_at_exit(make_queue: Make) -> None:
    up = threading.Event()
    queue, lines = make_queue(lambda subject: '' if up.is_set() and 'bad' not in subject else fail(
        REJECTED if 'rejected' in subject else DOWN), Clock())
    put(queue, 'a', 'bad', 'rejected', 'bad too')
    lines.wait('unable', 4)
    up.set()
    del lines[:]
    close(queue)
    assert lines == [    # the last attempt does not say that there will be another
        'sent mail "a" to bob', 'unable to send mail "bad": relay is down',
        'unable to send mail "bad too": relay is down', 'sent mail "rejected" to bob',
        'dropped mail "bad": memmon is shutting down', 'dropped mail "bad too": memmon is shutting down']
    assert not find_threads()


def test_exit_waits_for_new_notices(make_queue: Make) -> None:
    def send(subject: str) -> str:
        time.sleep(0.05)
        return ''

    queue, lines = make_queue(send)
    put(queue, 'a', 'b', 'c')
    close(queue)
    assert lines == [f'sent mail "{subject}" to bob' for subject in 'abc']


def test_exit_does_not_wait_for_a_transport_that_hangs(make_queue: Make) -> None:
    assert outbox.CLOSE_SECONDS == 5
    go = threading.Event()
    queue, lines = make_queue(lambda subject: str(go.wait(TIMEOUT)))
    put(queue, 'hung', 'b')
    close(queue, 0.2)
    assert lines == ['dropped mail "hung": memmon is shutting down', 'dropped mail "b": memmon is shutting down']
    go.set()


def test_transport_gets_the_time_that_the_listener_has_left(make_queue: Make) -> None:
    clock, seconds = Clock(), []

    def send(notice: Notice, left: SecondsLeft) -> str:
        seconds.append(left())
        return ''

    lines = Lines()
    queue = Queue('mail', '', send, 'memmon', lines, clock)
    put(queue, 'a')
    lines.wait('sent')
    close(queue)
    queue = Queue('mail', '', send, 'memmon', lines, clock)
    queue.begin_close(clock.now + 5)
    put(queue, 'b')
    lines.wait('sent', 2)
    assert seconds == [math.inf, 5]


def test_notice_waits_until_a_thread_can_be_started(make_queue: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    queue, lines = make_queue(lambda subject: '')
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, 'start', lambda thread: fail(RuntimeError("can't start new thread")))
        put(queue, 'first')
    assert lines == ['queued mail "first" until another notice or exit: can\'t start new thread']
    put(queue, 'second')
    lines.wait('sent mail "second"')
    assert 'sent mail "first" to bob' in lines


@pytest.mark.usefixtures('_no_threads')
def test_notices_are_sent_at_exit_without_a_thread(make_queue: Make) -> None:
    queue, lines = make_queue(lambda subject: '' if subject == 'good' else fail(DOWN))
    put(queue, 'good', 'bad')
    close(queue)
    assert lines[2:] == ['sent mail "good" to bob', 'unable to send mail "bad": relay is down',
                         'dropped mail "bad": memmon is shutting down']


# Signals.

def test_signal_at_any_moment_loses_no_notice(make_queue: Make) -> None:
    """A signal sets a flag: no exception lands in the queue's lock, so each notice is sent or logged."""
    request = ExitRequest()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    done = threading.Event()

    def shoot() -> None:
        while not done.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    queue, lines = make_queue(lambda subject: '')
    for number in handlers:
        signal.signal(number, request._request)
    shooter = threading.Thread(target=shoot, daemon=True)
    shooter.start()
    try:
        subjects = [f'mail {number}' for number in range(500)]
        put(queue, *subjects)
        close(queue)
    finally:
        done.set()
        shooter.join()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert request.requested
    assert Counter(lines) == Counter(f'sent mail "{subject}" to bob' for subject in subjects)


# Mail and webhook together.

@pytest.fixture
def inbox(tmp_path: Path) -> str:
    """Return a mail command that waits for a file `up`, and then appends the subject to a file `mails`."""
    return str(write_script(tmp_path / 'mta', f'until [ -e {tmp_path}/up ]; do sleep 0.02; done\n'
                            f'grep ^Subject: >> {tmp_path}/mails\n'))


def make_settings(command: str, chat: Chat | None, to: Sequence[str] = TO) -> mail.Settings:
    return mail.Settings(tuple(to), command, webhook=mail.parse_webhook(chat.url()) if chat else None)


def test_webhook_does_not_wait_for_a_dead_mail_command(inbox: str, tmp_path: Path) -> None:
    with Chat() as chat:
        lines = Lines()
        both = Outbox(make_settings(inbox, chat), 'memmon', lines)
        both.put('first', 'body', 'sup')
        both.put('second', '')
        chat.wait(2)
        lines.wait('sent', 2)
        assert chat.subjects == ['first', 'second']
        assert chat.messages[0]['text'].startswith('first\n\nbody\n\nmemmon on ')
        assert chat.messages[0]['text'].endswith(', supervisor sup')
        (tmp_path / 'up').touch()
        both.close()
    assert read(tmp_path / 'mails').split() == ['Subject:', 'first', 'Subject:', 'second']
    assert lines == [*(f'sent webhook message "{subject}": 200 OK' for subject in ('first', 'second')),
                     *(f'sent mail "{subject}" to bob@example.com' for subject in ('first', 'second'))]


def test_mail_does_not_wait_for_a_dead_webhook(inbox: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, 'CLOSE_SECONDS', 0.3)
    (tmp_path / 'up').touch()
    with Chat(hang) as chat:
        lines = Lines()
        both = Outbox(make_settings(inbox, chat), 'memmon', lines)
        both.put('first', '')
        both.put('second', '')
        lines.wait('sent mail "second"')
        both.close()
    assert [line for line in lines if line.startswith('dropped')] == [
        f'dropped webhook message "{subject}": memmon is shutting down' for subject in ('first', 'second')]


@pytest.mark.parametrize('with_chat', [True, False])
def test_outbox_without_recipients(with_chat: bool, inbox: str, tmp_path: Path) -> None:
    (tmp_path / 'up').touch()
    with Chat() as chat:
        lines, before = Lines(), set(find_threads())
        no_mail = Outbox(make_settings(inbox, chat if with_chat else None, to=()), 'memmon', lines)
        no_mail.put('a subject', '')
        assert len(set(find_threads()) - before) == with_chat
        no_mail.close()
        assert chat.subjects == ['a subject'] * with_chat
    assert not read(tmp_path / 'mails')


def test_outbox_with_a_command_and_no_recipients(inbox: str, tmp_path: Path) -> None:
    (tmp_path / 'up').touch()
    lines = Lines()
    box = Outbox(mail.Settings((), inbox, without_recipients=True), 'crashmail', lines)
    box.put('a subject', '')
    box.close()
    assert lines == ['sent mail "a subject"']
    assert read(tmp_path / 'mails') == 'Subject: a subject\n'
