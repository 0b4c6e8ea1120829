"""Which small files are about to be read: those that follow in a directory whose files are opened one after the other.

Pure and synchronous. Programs go through a directory in the order of its listing (grep -r, tar, cp -r) or of its names
(diff -r, a shell's ``*``); whichever two opened files are close to each other in is taken for the order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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


class _Scan:
    """How one directory is gone through."""

    def __init__(self, first: Node) -> None:
        self._first = first.name
        self._entries = 0
        self._orders: list[_Order] = []

    def next(self, directory: Node, node: Node) -> Iterator[Node]:
        children = directory.children or {}
        if not self._orders or len(children) != self._entries:
            self._look(children)
        for order in self._orders:
            place = order.places.get(node.name)
            if place is None:
                continue
            if not 0 < place - order.last <= SKIPS:
                order.window = 0
            elif place + order.window // 2 >= order.ahead:
                order.window = min(max(order.window * 2, FIRST_WINDOW), LAST_WINDOW)
                start = max(order.ahead, place + 1)
                order.ahead = min(place + 1 + order.window, len(order.nodes))
                yield from order.nodes[start : order.ahead]
            order.last = place
            if not order.window:
                order.ahead = place + 1
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
            self._orders.append(_Order(nodes, places, last, 0, last + 1))


class Ahead:
    def __init__(self) -> None:
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
        return list(dict.fromkeys(scan.next(directory, node)))
