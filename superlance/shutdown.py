"""A request to supervisord to shut down, for crashmail --shutdown."""
from __future__ import annotations

import threading

from superlance.listener import Log, start_timer
from superlance.rpc import Refused, Supervisor, Unknown, is_shutting_down

FIRST_RETRY_SECONDS = 1.0
LAST_RETRY_SECONDS = 60.0


class Shutdown:
    """Asks supervisord to shut down, until it accepts that: there may be no further event to retry at."""

    def __init__(self, supervisor: Supervisor, log: Log) -> None:
        self._supervisor = supervisor
        self._log = log
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._retry_seconds = FIRST_RETRY_SECONDS
        self._failure = ''
        self._is_closed = False
        self.accepted = False

    def request(self) -> None:
        """Ask now, unless this is already being retried."""
        with self._lock:
            if not (self.accepted or self._timer):
                self._ask()

    def close(self) -> None:
        """Give up: the listener exits."""
        with self._lock:
            self._is_closed = True
            if self._timer:
                self._timer.cancel()

    def _retry(self) -> None:
        with self._lock:
            self._timer = None
            if not self._is_closed:
                self._ask()

    def _ask(self) -> None:
        try:
            self._supervisor.call('shutdown')
        except (Unknown, Refused) as why:
            if is_shutting_down(why):
                self.accepted = True
                self._log('supervisord is already shutting down')
                return
            if str(why) != self._failure:
                self._failure = str(why)
                self._log(f'unable to shut down supervisord, will retry: {why}')
            # If no thread can be started, the next crash asks again.
            self._timer = start_timer(self._retry_seconds, self._retry)
            self._retry_seconds = min(2 * self._retry_seconds, LAST_RETRY_SECONDS)
        else:
            self.accepted = True
            self._log('asked supervisord to shut down')
