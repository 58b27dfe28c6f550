"""Stop strings, found as the text comes, without giving away any part of them.

One automaton for all strings (Aho and Corasick, "Efficient string matching", CACM 18(6), 1975) reads each character
once. Its depth at any point is the length of the longest suffix that may still become a stop string: exactly that much
is held back, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class _Node:
    __slots__ = ("children", "depth", "fail", "held", "match")

    def __init__(self, depth: int) -> None:
        self.children: dict[str, _Node] = {}
        self.fail: _Node = self
        self.depth = depth
        self.held = depth
        self.match: str | None = None


@dataclass(frozen=True)
class StopAutomaton:
    """The compiled form of some stop strings; shared freely."""

    root: _Node

    @classmethod
    def of(cls, stops: Sequence[str]) -> StopAutomaton:
        """Time and space are proportional to the total length. Empty strings are ignored."""
        root = _Node(0)
        for stop in stops:
            node = root
            for char in stop:
                if char not in node.children:
                    node.children[char] = _Node(node.depth + 1)
                node = node.children[char]
            if node is not root:
                node.match = stop
        level = list(root.children.values())
        for node in level:
            node.fail = root
        while level:
            deeper = []
            for node in level:
                # Of several strings that end here the longest begins first: a node's own match beats its suffix's.
                if node.match is None:
                    node.match = node.fail.match
                # A complete string that nothing extends needs no holding; only a proper prefix does.
                if not node.children:
                    node.held = node.fail.held
                for char, child in node.children.items():
                    fail = node.fail
                    while fail is not root and char not in fail.children:
                        fail = fail.fail
                    child.fail = fail.children.get(char, root)
                    deeper.append(child)
            level = deeper
        return cls(root)


class Stopper:
    """Passes one text through, up to the first stop string in it.

    The first is the one that is complete first; of several that end at the same character, the one that begins first.
    So the result depends on the text alone and not on how it is cut into pieces, and no text beyond a complete stop
    string is waited for. `matched` is that string, or None. With `include` it is part of the output.
    """

    def __init__(self, stops: StopAutomaton, *, include: bool = False) -> None:
        self._node = self._root = stops.root
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, *, armed: bool = True) -> str:
        """What may be shown after `text` has come. Unless `armed`, strings that are completed by `text` do not count.
        After a match everything is dropped."""
        if self.matched is not None:
            return ""
        root, node = self._root, self._node
        for at, char in enumerate(text):
            while node is not root and char not in node.children:
                node = node.fail
            node = node.children.get(char, root)
            if armed and node.match is not None:
                self.matched = node.match
                shown = self._held + text[: at + 1]
                self._held = ""
                return shown if self._include else shown[: len(shown) - len(node.match)]
        self._node = node
        shown = self._held + text
        cut = len(shown) - node.held
        self._held = shown[cut:]
        return shown[:cut]

    def flush(self) -> str:
        """What is held, when no more text will come."""
        shown, self._held = self._held, ""
        self._node = self._root
        return shown
