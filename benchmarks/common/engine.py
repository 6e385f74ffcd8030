"""What a DMA engine does, by two threads and a socket: for overlap_links.py alone.

The ends are two processes in namespaces of their own, and nothing listens outside.
"""

import itertools
import queue
import socket
import threading
import time

import numpy as np

from common.namespaces import ANSWER_SECONDS, START_SECONDS, address

PORT = 7701


class Engine:
    """Sends and receives while the caller does something else.

    What arrives is the bytes of numbers and nothing else: both ends start the same
    transfers in the same order, so there is nothing more to tell.
    """

    def __init__(self, link: socket.socket) -> None:
        self.link, self.tickets = link, itertools.count(1)
        self.boxes: dict[int, queue.SimpleQueue] = {}
        self.sending, self.receiving = queue.SimpleQueue(), queue.SimpleQueue()
        for loop in (self._send, self._receive):
            threading.Thread(target=loop, daemon=True).start()

    def start(self, block: np.ndarray) -> int:
        """Begins to send a block and to receive one like it; its ticket."""
        ticket, box = next(self.tickets), queue.SimpleQueue()
        self.boxes[ticket] = box
        self.receiving.put((box, np.empty(block.shape, block.dtype)))
        self.sending.put(block.copy())  # the caller has its own back on return
        return ticket

    def wait(self, ticket: int) -> np.ndarray:
        """The block that arrives; `queue.Empty` if none does for long."""
        return self.boxes.pop(ticket).get(timeout=ANSWER_SECONDS / 2)

    def _send(self) -> None:
        while True:
            self.link.sendall(memoryview(self.sending.get()).cast("B"))

    def _receive(self) -> None:
        while True:
            box, block = self.receiving.get()
            left = memoryview(block).cast("B")
            while left:
                got = self.link.recv_into(left)
                if not got:
                    return  # the other is gone; who waits for it will say so
                left = left[got:]
            box.put(block)


def join(index: int) -> socket.socket:
    """The connection between process 0, which listens at its address, and 1."""
    end = (address(0), PORT)
    if index == 0:
        with socket.create_server(end) as server:
            server.settimeout(START_SECONDS)
            link, _ = server.accept()
    else:
        link = connect(end, time.monotonic() + START_SECONDS)
    link.settimeout(None)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return link


def connect(end: tuple[str, int], until: float) -> socket.socket:
    """Connects as soon as somebody listens."""
    while True:
        try:
            return socket.create_connection(end, timeout=5)
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
