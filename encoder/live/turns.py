"""One worker for many who ask: what is asked is done one after the other, each in its turn.

    turns = Turns()
    drawing = turns.ask(draw, frame).result()       # a concurrent.futures.Future
    turns.ask(refine, still, brief=False)           # long: in it, between two steps:
    turns.give_way()                                # whoever waits with something brief comes first
    turns.close()

Who has at most one request at a time gets every n-th turn of n who ask, however often they do.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple


class Request(NamedTuple):
    future: Future
    act: Callable[[], Any]
    brief: bool


class Turns:
    """A queue and the one thread that works it off."""

    def __init__(self) -> None:
        self.waiting: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="turns", daemon=True)
        self.thread.start()

    def ask(self, act: Callable[..., Any], *arguments: Any, brief: bool = True) -> Future:
        """The result of act(*arguments), once its turn has come. Cancelled, it is passed over."""
        future: Future = Future()
        self.waiting.put(Request(future, lambda: act(*arguments), brief))
        return future

    def give_way(self) -> None:
        """In the worker's thread: does what is brief of all that waits now; the rest waits on."""
        for _ in range(self.waiting.qsize()):
            request = self.waiting.get()
            if request is not None and request.brief:
                _do(request)
            else:
                self.waiting.put(request)

    def close(self, patience: float = 10.0) -> None:
        """No further turns: what waits is done, and `patience` seconds are given for it."""
        self.waiting.put(None)
        self.thread.join(patience)

    def _work(self) -> None:
        while (request := self.waiting.get()) is not None:
            _do(request)


def _do(request: Request) -> None:
    """What fails, fails for who asked."""
    if not request.future.set_running_or_notify_cancel():
        return
    try:
        request.future.set_result(request.act())
    except BaseException as error:
        request.future.set_exception(error)
