"""The outbox: notices that wait for mail and webhook, and when they are retried.

Mail and the webhook each have a queue with a thread of its own, so that no event waits for either, and a mail server
that is down does not hold up the webhook.
"""
from __future__ import annotations

import math
import threading
import time
from collections import deque
from functools import partial
from typing import Callable

from superlance.command import SecondsLeft
from superlance.listener import Log
from superlance.mail import Settings, find_transports
from superlance.notice import Notice, SendFailed
from superlance.options import format_duration

FIRST_RETRY_SECONDS = 10
LAST_RETRY_SECONDS = 600
REJECTED_RETRY_SECONDS = 3600
KEEP_SECONDS = 24 * 3600
KEEP_NOTICES = 1000
CLOSE_SECONDS = 5
KILL_SECONDS = 0.5      # to kill a command at the end of that, and log its output

Clock = Callable[[], float]
Send = Callable[[Notice, SecondsLeft], str]     # returns the answer, raises SendFailed


class Entry:
    """A notice in a queue."""

    def __init__(self, notice: Notice, now: float) -> None:
        self.notice = notice
        self.queued = now


class Failed:
    """Notices to be retried, one at a time: after a delay that doubles, and at once after a success."""

    def __init__(self, first_seconds: float, last_seconds: float) -> None:
        self.entries: deque[Entry] = deque()
        self._first_seconds = first_seconds
        self._last_seconds = last_seconds
        self._delay_seconds = first_seconds
        self._retry_at = math.inf

    @property
    def retry_at(self) -> float:
        return self._retry_at if self.entries else math.inf

    def add(self, entry: Entry, now: float, delay_seconds: float = 0) -> None:
        self._retry_at = min(self.retry_at, now + (delay_seconds or self._delay_seconds))
        self.entries.append(entry)

    def back_off(self, now: float) -> None:
        """Double the delay, after a retry that failed."""
        self._delay_seconds = min(2 * self._delay_seconds, self._last_seconds)
        self._retry_at = now + self._delay_seconds

    def retry_now(self, now: float) -> None:
        """Retry at once, after a notice was accepted."""
        self._delay_seconds = self._first_seconds
        self._retry_at = now


class Schedule:
    """Which notice is sent next, and when. It has no thread and no clock: `now` is in seconds, by any clock.

    A new notice is due at once. One that failed is retried after the next success, otherwise after 10 s, and then after
    delays that double to 10 minutes. Of those that were rejected permanently, one is retried each hour; if it is
    accepted, the others follow.
    """

    def __init__(self) -> None:
        self._new: deque[Entry] = deque()
        self._failed = Failed(FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS)
        self._rejected = Failed(REJECTED_RETRY_SECONDS, REJECTED_RETRY_SECONDS)
        self._current: Entry | None = None
        self._origin: Failed | None = None  # where the current entry waited; None: it is new
        self.paused_until = -math.inf
        self.is_closing = False

    def put(self, notice: Notice, now: float) -> Notice | None:
        """Add a notice; return the oldest one, which is discarded, if there are too many."""
        self._new.append(Entry(notice, now))
        waiting = self._waiting()
        if len(waiting) <= KEEP_NOTICES:
            return None
        oldest = min(waiting, key=lambda entry: entry.queued)
        self._remove(oldest)
        return oldest.notice

    def discard_old(self, now: float) -> list[Notice]:
        """Discard what has waited for more than a day, and return it."""
        old = [entry for entry in self._waiting() if now - entry.queued > KEEP_SECONDS]
        for entry in old:
            self._remove(entry)
        return [entry.notice for entry in old]

    def _waiting(self) -> list[Entry]:
        return [*self._failed.entries, *self._rejected.entries, *self._new]

    def _remove(self, entry: Entry) -> None:
        for entries in (self._new, self._failed.entries, self._rejected.entries):
            if entry in entries:
                entries.remove(entry)

    def seconds_to_next(self, now: float) -> float:
        """Return in how many seconds a notice is due; inf: not before another is put."""
        if self._new:
            due = -math.inf
        else:
            due = math.inf if self.is_closing else min(self._failed.retry_at, self._rejected.retry_at)
        return max(0.0, max(due, self.paused_until) - now)

    def take(self, now: float) -> Notice | None:
        """Return the notice that is due, None if there is none. Report its outcome before you take the next."""
        if self.seconds_to_next(now) > 0:
            return None
        if self._new:
            self._origin = None
            self._current = self._new.popleft()
        else:
            self._origin = self._failed if self._failed.retry_at <= now else self._rejected
            self._current = self._origin.entries.popleft()
        return self._current.notice

    def succeed(self, now: float) -> None:
        """Report that the notice was accepted."""
        self._current = None
        self._failed.retry_now(now)
        if self._origin is self._rejected:
            self._rejected.retry_now(now)

    def fail(self, why: SendFailed, now: float) -> None:
        """Report that the notice could not be sent. It is retried later, and if necessary all others wait as well."""
        assert self._current
        entry, self._current = self._current, None
        if why.pause_seconds:
            self.paused_until = now + why.pause_seconds
        elif self._origin:
            self._origin.back_off(now)
        if why.permanent:
            self._rejected.add(entry, now)
        else:
            self._failed.add(entry, now, why.pause_seconds)

    def close(self) -> None:
        """Let each queued notice be taken once more, now; after a failed login or status 429, no further one is."""
        self.is_closing = True
        self.paused_until = -math.inf
        for failed in (self._failed, self._rejected):
            self._new.extend(failed.entries)
            failed.entries.clear()

    def remaining(self) -> list[Notice]:
        """Return the notices that have not been sent, the current one first."""
        return [entry.notice for entry in (self._current, *self._waiting()) if entry]


class Queue:
    """Sends notices one at a time, on a thread of its own, until each is accepted or discarded."""

    def __init__(self, what: str, to: str, send: Send, program: str, log: Log, clock: Clock) -> None:
        self._what = what       # see mail.Transport
        self._to = to
        self._send = send
        self._program = program
        self._log = log
        self._clock = clock
        self._changed = threading.Condition()
        # What follows is guarded by it.
        self._schedule = Schedule()
        self._thread: threading.Thread | None = None
        self._end_at = math.inf

    def put(self, notice: Notice) -> None:
        """Send a notice as soon as possible, in the background."""
        with self._changed:
            now = self._clock()
            discarded = self._schedule.put(notice, now)
            if discarded:
                self._drop(discarded, f'more than {KEEP_NOTICES} are queued')
            pause_seconds = self._schedule.paused_until - now
            if pause_seconds > 0:
                self._log(f'queued {self._what} "{notice.subject}": next attempt in {format_duration(pause_seconds)}')
            self._changed.notify()
            if self._thread is None:
                self._start_thread(notice)

    def _start_thread(self, notice: Notice) -> None:
        thread = threading.Thread(target=self._work, name='outbox', daemon=True)
        try:
            thread.start()
        except RuntimeError as why:
            self._log(f'queued {self._what} "{notice.subject}" until another notice or exit: {why}')
        else:
            self._thread = thread

    def begin_close(self, end_at: float) -> None:
        """Give everything that waits one last attempt, until end_at by the clock."""
        with self._changed:
            self._end_at = end_at
            self._schedule.close()
            self._changed.notify()

    def finish_close(self) -> None:
        """Wait for the last attempts, and log what remains."""
        if self._thread:
            self._thread.join(max(0.0, self._seconds_left() + KILL_SECONDS))
        else:
            self._work()    # no thread could be started
        with self._changed:
            for notice in self._schedule.remaining():
                self._drop(notice, f'{self._program} is shutting down')

    def _seconds_left(self) -> float:
        return self._end_at - self._clock()

    def _work(self) -> None:
        while True:
            notice = self._wait_for_next()
            if notice is None:
                return
            try:
                answer = self._send(notice, self._seconds_left)
            except SendFailed as why:
                self._retry(notice, why)
            except Exception as why:    # a bug must not keep the other notices from being sent
                self._retry(notice, SendFailed(_locate(why)))
            else:
                with self._changed:
                    self._schedule.succeed(self._clock())
                    self._log(f'sent {self._what} "{notice.subject}"{self._to}{": " if answer else ""}{answer}')

    def _wait_for_next(self) -> Notice | None:
        """Return the next notice when it is due; at the end, None."""
        with self._changed:
            while True:
                now = self._clock()
                for notice in self._schedule.discard_old(now):
                    self._drop(notice, f'could not be sent within {format_duration(KEEP_SECONDS)}')
                due = self._schedule.take(now) if now < self._end_at else None
                if due or self._schedule.is_closing:
                    return due
                seconds = self._schedule.seconds_to_next(now)
                self._changed.wait(None if seconds == math.inf else seconds)

    def _retry(self, notice: Notice, why: SendFailed) -> None:
        with self._changed:
            self._schedule.fail(why, self._clock())
            retry = '' if self._schedule.is_closing else ', queued for retry'
            seconds = why.pause_seconds or (REJECTED_RETRY_SECONDS if why.permanent else 0)
            if retry and seconds:
                retry += f' in {format_duration(seconds)}'
            self._log(f'unable to send {self._what} "{notice.subject}"{retry}: {why}')

    def _drop(self, notice: Notice, reason: str) -> None:
        self._log(f'dropped {self._what} "{notice.subject}": {reason}')


def _locate(why: Exception) -> str:
    """Return where an unexpected exception was raised; its text may contain a secret."""
    traceback = why.__traceback__
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    place = f'{traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}' if traceback else 'an unknown place'
    return f'unexpected {type(why).__name__} at {place}'


class Outbox:
    """Sends each notice by mail, to the webhook, or both."""

    def __init__(self, settings: Settings, program: str, log: Log) -> None:
        self._queues = [Queue(what, to, partial(send, settings, program), program, log, time.monotonic)
                        for what, to, send in find_transports(settings)]

    def put(self, subject: str, body: str, server: str = '') -> None:
        """Send a notice as soon as possible, in the background; server is supervisord's identifier."""
        notice = Notice(subject, body, server, time.time())
        for queue in self._queues:
            queue.put(notice)

    def close(self) -> None:
        """Give everything that waits one last attempt, all within 5 s, and log what remains."""
        end_at = time.monotonic() + CLOSE_SECONDS
        for queue in self._queues:
            queue.begin_close(end_at)
        for queue in self._queues:
            queue.finish_close()
