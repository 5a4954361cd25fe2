"""The prefix cache: keys and values of prompts that ran before, for new prompts with the same beginning.

A radix tree over chunks of CHUNK_TOKENS token ids. A node holds one `KvChunk`, which shares its memory with the states
that hold the same tokens (native engine) or is a copy (ONNX Runtime). A prompt that leaves the tree inside a chunk
takes the first tokens of the chunk with the longest common beginning.

The same tokens at the same positions have the same keys and values, bit for bit on the native engine, so answers do not
depend on what is cached.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock

from edgeformer.decoding.prefix_folder import PrefixFolder
from edgeformer.engines.base import CHUNK_TOKENS, KvChunk, State
from edgeformer.errors import InputError

Ids = tuple[int, ...]


class _Branch:
    """The chunks that may follow a beginning; the root of the tree follows the empty one."""

    __slots__ = ("children", "key", "order")

    def __init__(self, key: str = "") -> None:
        self.key = key  # of its file in the folder
        self.children: dict[Ids, _Node] = {}
        self.order: list[Ids] = []  # keys of `children`, sorted: neighbours have the longest common beginnings

    def longest(self, ids: Ids) -> tuple[_Node | None, int]:
        """The child whose ids have the longest common beginning with `ids`, and its length; (None, 0) if there is none.

        It is next to where `ids` would be in sorted order: what is between `ids` and a key begins like both.
        """
        at = bisect_left(self.order, ids)
        found = [(_common(ids, key), key) for key in self.order[max(0, at - 1) : at + 1]]
        length, key = max(found, default=(0, ()))
        return (self.children[key], length) if length else (None, 0)


class _Node(_Branch):
    """A chunk of the tree."""

    __slots__ = ("chunk", "ids", "parent")

    def __init__(self, parent: _Branch, ids: Ids, chunk: KvChunk, key: str) -> None:
        super().__init__(key)
        self.parent = parent
        self.ids = ids
        self.chunk = chunk


class PrefixCache:
    """Prompt beginnings of one engine, least recently used first out. Threads may share it.

    The keys are token ids alone: do not use it for states with static inputs.

    Attributes:
        limit_bytes: most bytes of all chunks. Chunks that running states share are counted too; dropping one here frees
            its memory when the last of them ends.
        queries: tokens that `match` was asked for.
        hits: those of them that it found.
    """

    def __init__(self, limit_bytes: int, folder: PrefixFolder | None = None) -> None:
        if limit_bytes < 0:
            raise InputError(f"limit_bytes is {limit_bytes}, expected at least 0.")
        self.limit_bytes = limit_bytes
        self.queries = 0
        self.hits = 0
        self._folder = folder
        self._root = _Branch(folder.root if folder else "")
        # Least recently used first. A node is used after its children: the first one is always a leaf.
        self._nodes: OrderedDict[_Node, None] = OrderedDict()
        self._bytes = 0
        self._largest = 0  # bytes of a chunk with all layers; one with less was outside a sliding window when it came
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of all chunks."""
        return self._bytes

    def __len__(self) -> int:
        """The number of chunks."""
        return len(self._nodes)

    def match(self, ids: Sequence[int], new_state: Callable[[], State]) -> tuple[State, int]:
        """A new state with the longest beginning of `ids` that is cached, and the number of its tokens.

        At most len(ids) - 1 tokens: the last one has to run for its logits.
        """
        with self._lock:
            path, length = self._find(tuple(ids))
            self._use(path)
            self._evict(self.limit_bytes)  # for what came from the folder
        state = new_state()
        length = min(length, len(ids) - 1)
        found = state.restore([node.chunk for node in path], length) if length > 0 else 0
        with self._lock:
            self.queries += len(ids)
            self.hits += found
        return state, found

    def insert(self, ids: Sequence[int], state: State) -> None:
        """Keep the full chunks of `state`, which holds the tokens `ids`, or more after them.

        Call it when the prompt has run, and with the answer when that has ended. With sliding windows also whenever a
        part of the prompt has run that ends at a multiple of CHUNK_TOKENS: a later call finds keys dropped.

        Raises:
            InputError: the state has fewer tokens than `ids`.
        """
        if state.length < len(ids):
            raise InputError(f"{len(ids)} ids were given for a state of {state.length} tokens.")
        full = len(ids) // CHUNK_TOKENS
        if not full:
            return
        parts = [tuple(ids[i * CHUNK_TOKENS : (i + 1) * CHUNK_TOKENS]) for i in range(full)]
        new = []
        with self._lock:
            path = self._known(parts)
            first = next((i for i, node in enumerate(path) if node.chunk.nbytes < self._largest), len(path))
            chunks = state.chunks(first)[: full - first] if first < full else []
            for i, chunk in enumerate(chunks, first):
                if i < len(path):
                    self._exchange(path[i], chunk)
                else:
                    path.append(self._add(path[-1] if path else self._root, parts[i], chunk))
                    new.append((path[-1].key, chunk))
            self._use(path)
            self._evict(self.limit_bytes)
        if self._folder and new:
            self._folder.write(new)

    def evict(self, nbytes: int) -> None:
        """Drop least recently used chunks until at most `nbytes` bytes are left."""
        with self._lock:
            self._evict(nbytes)

    def _known(self, parts: Sequence[Ids]) -> list[_Node]:
        """The chunks of the tree with these ids, from the first on."""
        branch: _Branch = self._root
        path: list[_Node] = []
        for part in parts:
            if part not in branch.children:
                break
            branch = branch.children[part]
            path.append(branch)
        return path

    def _find(self, ids: Ids) -> tuple[list[_Node], int]:
        """(nodes, length): the chunks that begin like `ids`, and the tokens of them that do."""
        branch: _Branch = self._root
        path: list[_Node] = []
        for start in range(0, len(ids), CHUNK_TOKENS):
            part = ids[start : start + CHUNK_TOKENS]
            child = branch.children.get(part) or self._from_folder(branch, part)
            if child is None:
                child, common = branch.longest(part)
                return (path, start) if child is None else ([*path, child], start + common)
            path.append(child)
            branch = child
        return path, len(path) * CHUNK_TOKENS

    def _from_folder(self, parent: _Branch, part: Ids) -> _Node | None:
        if self._folder is None or len(part) < CHUNK_TOKENS:
            return None
        chunk = self._folder.read(self._folder.key(parent.key, part))
        return self._add(parent, part, chunk) if chunk else None

    def _add(self, parent: _Branch, ids: Ids, chunk: KvChunk) -> _Node:
        node = _Node(parent, ids, chunk, self._folder.key(parent.key, ids) if self._folder else "")
        parent.children[ids] = node
        insort(parent.order, ids)
        self._nodes[node] = None
        self._bytes += chunk.nbytes
        self._largest = max(self._largest, chunk.nbytes)
        return node

    def _exchange(self, node: _Node, chunk: KvChunk) -> None:
        """Take `chunk` in place of the node's own, if it has more layers."""
        if chunk.nbytes > node.chunk.nbytes:
            self._bytes += chunk.nbytes - node.chunk.nbytes
            self._largest = max(self._largest, chunk.nbytes)
            node.chunk = chunk

    def _use(self, path: Sequence[_Node]) -> None:
        for node in reversed(path):
            self._nodes.move_to_end(node)

    def _evict(self, nbytes: int) -> None:
        while self._bytes > nbytes:
            node, _ = self._nodes.popitem(last=False)
            del node.parent.children[node.ids]
            del node.parent.order[bisect_left(node.parent.order, node.ids)]
            self._bytes -= node.chunk.nbytes


def _common(a: Ids, b: Ids) -> int:
    """The length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
