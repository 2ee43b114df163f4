"""Another rank's memory: windows of shared memory among the ranks of one host.

Used by the one-sided all-to-all and the step exchange. A window is an anonymous memory file; peers map it through
/proc, so it never has a name and vanishes with the last process that maps it, however that process ends.
"""

from __future__ import annotations

import mmap
import os
import socket

import torch
from torch import Tensor

from nonet.comm.group import Group
from nonet.errors import CommError


class Windows:
    """`nbytes` of memory on every rank of a group, each mapped by all of them; `memory[r]` is rank r's.

    Collective. Raises CommError if the ranks do not share a host.
    """

    def __init__(self, group: Group, nbytes: int) -> None:
        fd = os.memfd_create("nonet", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, max(1, nbytes))
            places = group.all_gather_object((socket.gethostname(), os.getpid(), fd))
            if len({host for host, _, _ in places}) > 1:
                hosts = sorted({host for host, _, _ in places})
                raise CommError(f"shared memory needs all ranks on one host, these are on {hosts}")
            self.memory: list[mmap.mmap] = [_map(pid, number, nbytes) for _, pid, number in places]
            group.barrier()  # everyone has mapped it: the descriptor may go
        finally:
            os.close(fd)
        self._bytes: list[Tensor] = [torch.frombuffer(m, dtype=torch.uint8) for m in self.memory]

    def tensor(self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor over rank `rank`'s window from byte `offset` (a multiple of 64)."""
        assert offset % 64 == 0, "tensors in a window start on a cache line"
        count = dtype.itemsize
        for size in shape:
            count *= size
        return self._bytes[rank][offset : offset + count].view(dtype).view(shape)

    def words(self, rank: int, offset: int, count: int) -> memoryview:
        """`count` int64 flags over rank `rank`'s window from byte `offset`."""
        return memoryview(self.memory[rank])[offset : offset + 8 * count].cast("q")


def _map(pid: int, fd: int, nbytes: int) -> mmap.mmap:
    """Map a peer's memory file. The mapping lives as long as this object."""
    try:
        own = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise CommError(f"cannot map the memory of process {pid}: {error.strerror}") from error
    try:
        return mmap.mmap(own, max(1, nbytes), mmap.MAP_SHARED)
    finally:
        os.close(own)


def align(nbytes: int) -> int:
    """Round up to a cache line."""
    return -(-nbytes // 64) * 64
