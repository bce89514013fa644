"""A lane's thread, which reads ahead of the consumer as far as there is room.

A lane holds at most 2 * shuffle_buffer + prefetch pairs, decoded and cropped: what is left of the block that is given
out, the next block, and `prefetch` pairs of the one after.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any

from scripts.biomedica.blocks import START, Block, Blocks
from scripts.biomedica.reading import Ready
from scripts.biomedica.reports import Report

GRACE_SECONDS = 5.0  # that the consumer waits for a thread's end


class _StoppedError(Exception):
    """The consumer wants no more."""


class Lane:
    """Pairs of a lane; its thread starts with it, and ends with `close`, at the shards' end or at an error.

    Args:
        room: pairs that may be held, read and not yet given.
        make: (before_each, before_pair) -> the lane's `Blocks`.
        state: that they start from; None: the lane's begin.
    """

    def __init__(self, room: int, make: Callable[..., Blocks], state: dict[str, Any] | None = None):
        self.state: dict[str, Any] = dict(state or START)
        self._left: list[Ready] = []  # of the block that is given out, the last one first
        self._block: Block | None = None
        self._skip = self.state["taken"]
        self._room, self._stopped = threading.Semaphore(room), threading.Event()
        self._queue: queue.SimpleQueue[Block | BaseException] = queue.SimpleQueue()
        self._blocks = make(self._go_on, self._wait_for_room)
        # a daemon, since a process that is told to end must not wait for a slow connection
        self._thread = threading.Thread(target=self._run, name="lane", daemon=True)
        self._thread.start()

    def take(self, pairs: int, report: Report) -> list[Ready]:
        """The next pairs; fewer only if the lane's shards hold no more. What their reading told is added to `report`.

        Raises:
            Exception: that ended the thread, once all whole blocks before it were given.
        """
        found: list[Ready] = []
        while len(found) < pairs:
            if not self._left:
                if self._block is not None and self._block.short:
                    break
                self._next_block(report)
                continue
            found.append(self._left.pop())
            self._room.release()
        if self._block is not None:
            self.state = self._block.state(len(self._block.pairs) - len(self._left))
        return found

    def _next_block(self, report: Report) -> None:
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)
            raise item
        self._block, self._left = item, item.pairs[::-1]
        report.add(item.report)
        for _ in range(self._skip):
            self._left.pop()
            self._room.release()
        self._skip = 0

    def close(self) -> None:
        """Stop reading and close the connection, at the latest when a read that waits for the server times out."""
        self._stopped.set()
        self._room.release()
        self._thread.join(GRACE_SECONDS)

    def _run(self) -> None:
        try:
            for block in self._blocks:
                self._queue.put(block)
        except _StoppedError:
            return
        except BaseException as error:  # raised again by the consumer
            self._queue.put(error)
        finally:
            self._blocks.close()

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise _StoppedError

    def _wait_for_room(self) -> None:
        self._room.acquire()
        self._go_on()
