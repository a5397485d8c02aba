"""A forward pass in a thread of its own, which waits where it is told to until it may go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import torch

from wanda_ext.runner.capture import Stop

NAME = "wanda_ext batch"  # of the threads


class HeldPass(threading.Thread):
    """Runs `body` without gradients. Only one thread works at a time: it, or whoever holds it."""

    def __init__(self, body: Callable[[], Any]) -> None:
        super().__init__(name=NAME, daemon=True)
        self.out: Any = None  # of the body, at its end
        self._body = body
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._answers: SimpleQueue[Any] = SimpleQueue()  # Stop ends the pass
        self._arrivals: SimpleQueue[Any] = SimpleQueue()

    def begin(self) -> Any:
        """Runs to the first place where it waits, and gives what it arrives with; None: its end."""
        self.start()
        return self._arrival()

    def go_on(self, answer: Any = None) -> Any:
        """Where it waits it gets `answer`, and runs on as in `begin`."""
        self._answers.put(answer)
        return self._arrival()

    def end(self) -> None:
        """Leaves the body where it is."""
        self._answers.put(Stop)
        if self.is_alive():
            self.join()

    def wait(self, arrival: Any) -> Any:
        """Called inside the pass: hands out `arrival`, waits, and gives the answer."""
        self._arrivals.put(arrival)
        answer = self._answers.get()
        if answer is Stop:
            raise Stop
        return answer

    def run(self) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)  # it is a thread's own, as is the grad mode
            with torch.no_grad():
                self.out = self._body()
        except Stop:
            pass
        except BaseException as error:
            self._arrivals.put(error)
            return
        self._arrivals.put(None)

    def _arrival(self) -> Any:
        arrival = self._arrivals.get()
        if isinstance(arrival, BaseException):
            raise arrival
        return arrival
