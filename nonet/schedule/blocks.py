"""The paged KV cache's books: free blocks, reference counts, and a prefix cache by chained block hashes.

Used by the scheduler only. A full block is known by the hash of its tokens and of the block before it, so equal
prefixes share blocks. A block nobody refers to stays findable until it is taken for something else, oldest first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Seq

from nonet.schedule.sequence import Sequence


def block_hash(before: bytes, tokens: Seq[int]) -> bytes:
    """The name of a full block: its tokens and everything before them."""
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()


class Blocks:
    """Hands out `num_blocks` blocks of `block_size` tokens. Block ids are 0 .. num_blocks - 1."""

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool) -> None:
        self.num_blocks, self.block_size, self.prefix_caching = num_blocks, block_size, prefix_caching
        self._free: OrderedDict[int, None] = OrderedDict((b, None) for b in range(num_blocks))  # oldest first
        self._refs = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def needed(self, sequence: Sequence, num_tokens: int) -> int:
        """New blocks that `num_tokens` tokens in all would take beyond those held."""
        return max(0, -(-num_tokens // self.block_size) - len(sequence.blocks))

    def cached_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks that hold the longest known prefix; the last token is always left to compute."""
        if not self.prefix_caching or sequence.wants_prompt_logprobs:
            return []
        found: list[int] = []
        self._extend_hashes(sequence, (len(sequence.tokens) - 1) // self.block_size)
        for name in sequence.block_hashes[: (len(sequence.tokens) - 1) // self.block_size]:
            block = self._block_of.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def admit(self, sequence: Sequence, prefix: list[int]) -> None:
        """Let a sequence without blocks hold a cached prefix; those tokens count as computed."""
        assert not sequence.blocks, "a sequence is admitted once"
        for block in prefix:
            self._refs[block] += 1
            self._free.pop(block, None)
        sequence.blocks = list(prefix)
        sequence.num_computed = len(prefix) * self.block_size
        sequence.num_committed = len(prefix)

    def num_takeable(self, prefix: list[int]) -> int:
        """Free blocks left once a cached prefix is held."""
        return len(self._free) - sum(block in self._free for block in prefix)

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give the sequence blocks for `num_tokens` tokens in all; False, and nothing done, if there are too few."""
        count = self.needed(sequence, num_tokens)
        if count > len(self._free):
            return False
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._refs[block] = 1
            sequence.blocks.append(block)
        return True

    def commit(self, sequence: Sequence) -> None:
        """Make the blocks that are now full and computed findable."""
        if not self.prefix_caching:
            return
        full = sequence.num_computed // self.block_size
        self._extend_hashes(sequence, full)
        for index in range(sequence.num_committed, full):
            self._name(sequence.blocks[index], sequence.block_hashes[index])
        sequence.num_committed = full

    def release(self, sequence: Sequence) -> None:
        """Take all blocks back, the last first, so that long prefixes outlive their tails."""
        for block in reversed(sequence.blocks):
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)
        sequence.blocks = []
        sequence.num_computed = sequence.num_committed = 0

    def _extend_hashes(self, sequence: Sequence, full: int) -> None:
        size, names = self.block_size, sequence.block_hashes
        for index in range(len(names), full):
            before = names[-1] if names else b""
            names.append(block_hash(before, sequence.tokens[index * size : (index + 1) * size]))

    def _name(self, block: int, name: bytes) -> None:
        if name not in self._block_of:
            self._block_of[name] = block
            self._hash_of[block] = name

    def _forget(self, block: int) -> None:
        name = self._hash_of[block]
        if name is not None:
            del self._block_of[name]
            self._hash_of[block] = None
