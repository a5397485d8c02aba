"""Copies between the host and a device that run beside the work.

They have a CUDA stream, and a thread because weights lie in pageable memory, a copy of which holds
up whoever starts it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

Arrival = Callable[[], Tensor]
Visit = Callable[[int], AbstractContextManager[None]]  # has block i on the device inside


class Copies:
    """Runs copies in the order they were asked for. Leaving it as a context waits for all."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._worker = ThreadPoolExecutor(1, "wanda_ext copies")
        self._sent: list[Future[None]] = []

    def at_home(self, tensor: Tensor) -> Tensor:
        """A copy for repeated journeys: in page-locked memory, where the device can fetch it."""
        pinned = self.device.type == "cuda" and tensor.device.type == "cpu"
        return torch.empty_like(tensor, pin_memory=pinned).copy_(tensor)

    def bring(self, tensor: Tensor) -> Arrival:
        """Starts a copy to the device; calling what is returned waits for it and gives it."""
        future = self._worker.submit(self._bring, tensor)

        def arrive() -> Tensor:
            copy, ready = future.result()
            if ready is not None:
                stream = torch.cuda.current_stream(self.device)
                stream.wait_event(ready)
                copy.record_stream(stream)  # or its memory could be reused while it is read
            return copy

        return arrive

    def send(self, *pairs: tuple[Tensor, Tensor]) -> None:
        """Starts copying each first tensor into its second, once the work asked for so far is done.

        All of them or, where an interrupt comes, none.
        """
        done = None
        if self._stream is not None:
            done = torch.cuda.current_stream(self.device).record_event()
        self._sent = [future for future in self._sent if not future.done() or future.exception()]
        self._sent.append(self._worker.submit(self._send, pairs, done))

    def finish(self) -> None:
        """Waits for everything sent. Raises what went wrong."""
        sent, self._sent = self._sent, []
        for future in sent:
            future.result()
        if self._stream is not None:
            self._stream.synchronize()

    def __enter__(self) -> Copies:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.finish()
        finally:
            self._worker.shutdown(cancel_futures=True)

    @torch.no_grad()
    def _bring(self, tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        with self._on_stream():
            copy = torch.empty_like(tensor, device=self.device).copy_(tensor, non_blocking=True)
            return copy, None if self._stream is None else self._stream.record_event()

    @torch.no_grad()
    def _send(self, pairs: Sequence[tuple[Tensor, Tensor]], done: torch.cuda.Event | None) -> None:
        with self._on_stream():
            if self._stream is not None and done is not None:
                self._stream.wait_event(done)
            for tensor, to in pairs:
                to.copy_(tensor, non_blocking=True)
                if self._stream is not None and tensor.device == self.device:
                    tensor.record_stream(self._stream)

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


class Visits:
    """Blocks that visit the device one after the other, the next one already on its way.

    At most two are there at a time, beside what is going home. A block that leaves by an exception
    leaves no trace: its tensors at home were never written.
    """

    def __init__(self, blocks: Sequence[nn.Module], copies: Copies) -> None:
        self._tensors = [[*block.parameters(), *block.buffers()] for block in blocks]
        self._copies = copies
        self._under_way: dict[int, list[Arrival]] = {}

    @contextmanager
    def visit(self, index: int) -> Iterator[None]:
        """Block `index` on the device inside; what it became goes home afterwards."""
        tensors = self._tensors[index]
        arrivals = self._under_way.pop(index, None) or self._start(index)
        if index + 1 < len(self._tensors) and not self._share(index, index + 1):
            self._under_way[index + 1] = self._start(index + 1)
        homes = [tensor.data for tensor in tensors]
        try:
            for tensor, arrive in zip(tensors, arrivals, strict=True):
                tensor.data = arrive()
            yield
            changed = [tensor.data for tensor in tensors]
            self._copies.send(*zip(changed, homes, strict=True))
        finally:
            for tensor, home in zip(tensors, homes, strict=True):
                tensor.data = home

    def _start(self, index: int) -> list[Arrival]:
        return [self._copies.bring(tensor.data) for tensor in self._tensors[index]]

    def _share(self, one: int, other: int) -> bool:
        """Whether a copy made now would miss what the first of them becomes."""
        mine = {id(tensor) for tensor in self._tensors[one]}
        return any(id(tensor) in mine for tensor in self._tensors[other])


def copies_to(
    blocks: Sequence[nn.Module], device: torch.device | None
) -> AbstractContextManager[Copies | None]:
    """What takes the blocks to the device; None where all are there, or no device is asked for."""
    return Copies(device) if device is not None and is_away(blocks, device) else nullcontext()


def is_away(blocks: Sequence[nn.Module], device: torch.device) -> bool:
    return any(parameter.device != device for block in blocks for parameter in block.parameters())


def visits(blocks: Sequence[nn.Module], copies: Copies | None) -> Visit:
    """What has block i on the device inside: nothing where copies is None."""
    return (lambda index: nullcontext()) if copies is None else Visits(blocks, copies).visit


def usable_device(device: torch.device | str) -> torch.device:
    """The device, with its index. Raises ValueError where it cannot be used here."""
    try:
        at = torch.device(device)
        at = torch.empty(0, device=at).device  # "cuda" is one of them
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise ValueError(
            f"device={str(device)!r} cannot be used here ({str(error).splitlines()[0]}): name "
            "another, or leave device out to prune where the model is"
        ) from error
    if at.type == "meta":
        raise ValueError("device='meta' holds no values to prune: leave device out")
    return at
