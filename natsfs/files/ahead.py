"""Which small files are about to be read: those that follow in a directory whose files are opened one after the other.

Pure and synchronous. Programs go through a directory in the order of its listing (grep -r, tar, cp -r) or of its names
(diff -r, a shell's ``*``); whichever two opened files are close to each other in is taken for the order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from cachetools import LRUCache

from natsfs.catalog.inodes import Node

DIRECTORIES = 8  # that are watched at a time
MOST_ENTRIES = 50_000  # of a directory; beyond, the orders cost more than they save
SKIPS = (
    8  # entries between two files that are opened one after the other: directories, or files of no interest
)
FIRST_WINDOW, LAST_WINDOW = 8, 64  # entries


@dataclass(slots=True)
class _Order:
    """The entries of a directory in one order, and how far it was followed."""

    nodes: list[Node]
    places: dict[bytes, int]
    last: int
    window: int = 0
    ahead: int = 0  # everything before this place was named already
    sizes: deque[int] = field(default_factory=deque)  # in bytes, from behind `last` up to `ahead`


class _Scan:
    """How one directory is gone through."""

    def __init__(self, first: Node) -> None:
        self._first = first.name
        self._entries = 0
        self._orders: list[_Order] = []

    def next(self, directory: Node, node: Node, small: int, most: int) -> Iterator[Node]:
        children = directory.children or {}
        if not self._orders or len(children) != self._entries:
            self._look(children)
        for order in self._orders:
            place = order.places.get(node.name)
            if place is None:
                continue
            passed = place - order.last
            for _ in range(min(passed, len(order.sizes)) if passed > 0 else 0):
                order.sizes.popleft()
            if not 0 < passed <= SKIPS:
                order.window = 0
            elif place + order.window // 2 >= order.ahead:
                order.window = min(max(order.window * 2, FIRST_WINDOW), LAST_WINDOW)
                stop = min(place + 1 + order.window, len(order.nodes))
                order.ahead = max(order.ahead, place + 1)
                while order.ahead < stop and sum(order.sizes) < most:
                    one = order.nodes[order.ahead]
                    order.ahead += 1
                    order.sizes.append(_size(one, small))
                    yield one
            order.last = place
            if not order.window:
                order.ahead = place + 1
                order.sizes.clear()
        self._first = node.name

    def _look(self, children: dict[bytes, Node]) -> None:
        self._entries = len(children)
        self._orders = []
        if len(children) > MOST_ENTRIES:
            return
        listed = list(children.values())
        for nodes in (listed, sorted(listed, key=lambda node: node.name)):
            places = {node.name: place for place, node in enumerate(nodes)}
            last = places.get(self._first, len(nodes))
            self._orders.append(_Order(nodes, places, last, ahead=last + 1))


def _size(node: Node, small: int) -> int:
    """Bytes that are fetched ahead; of a large file, or what is none, there are none."""
    size = node.meta.size if node.meta is not None and not node.is_dir else 0
    return size if size <= small else 0


class Ahead:
    """Files of up to `small` bytes are fetched ahead, and about `most` bytes of those that are not opened yet."""

    def __init__(self, small: int, most: int) -> None:
        self._small = small
        self._most = most
        self._scans: LRUCache[Node, _Scan] = LRUCache(DIRECTORIES)

    def opened(self, node: Node) -> list[Node]:
        """`node` is opened for reading; the nodes that are likely to be next, each of them named once."""
        directory = node.parent
        if directory is None:
            return []
        scan = self._scans.get(directory)
        if scan is None:
            self._scans[directory] = _Scan(node)
            return []
        return list(dict.fromkeys(scan.next(directory, node, self._small, self._most)))
