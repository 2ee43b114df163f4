"""The world of ranks: joined once at start, left once at the end. Made by a rank's entry point.

World rank = dp_rank x TP + tp_rank. The expert-parallel group is the whole world.
"""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist

from nonet.comm.group import Group, comm_error
from nonet.comm.peer import Windows
from nonet.comm.wait import nap_precisely
from nonet.config.place import Place


class World:
    """This rank's groups: `tp` (one attention replica) and `ep` (all ranks)."""

    def __init__(self, place: Place, *, tensor_parallel_size: int, device: str, timeout_s: float) -> None:
        self.rank, self.size = place.rank, place.size
        self.device = torch.device(device, place.local_rank) if device == "cuda" else torch.device("cpu")
        if device == "cuda":
            torch.cuda.set_device(self.device)
        elif place.one_host:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        timeout = datetime.timedelta(seconds=timeout_s)
        try:
            self._store = dist.TCPStore(
                place.host,
                place.port,
                place.size,
                is_master=place.listen_fd is not None,
                timeout=timeout,
                master_listen_fd=place.listen_fd,
            )
            dist.init_process_group(
                "nccl" if device == "cuda" else "gloo",
                store=dist.PrefixStore("nonet", self._store),
                rank=self.rank,
                world_size=self.size,
                timeout=timeout,
                device_id=self.device if device == "cuda" else None,
            )
        except RuntimeError as error:
            raise comm_error(f"meeting the other ranks at {place.host}:{place.port}", error, timeout_s) from error
        self.ep = Group(range(self.size), self.rank, timeout_s, self.device)
        self.tp_size = tensor_parallel_size
        self.dp_rank, self.tp_rank = divmod(self.rank, self.tp_size)
        first = self.rank - self.tp_rank
        self.tp = Group(range(first, first + self.tp_size), self.rank, timeout_s, self.device)
        if place.one_host:
            nap_precisely()
            self._keep_roll()

    def _keep_roll(self) -> None:
        """Let time-outs name the missing: each rank's counts of collectives lie in shared memory."""
        self._roll = Windows(self.ep, 128)
        self.ep.keep_roll([self._roll.words(r, 0, 1) for r in self.ep.ranks])
        self.tp.keep_roll([self._roll.words(r, 64, 1) for r in self.tp.ranks])

    @property
    def dp_size(self) -> int:
        return self.size // self.tp_size

    def close(self) -> None:
        """Leave. Without it gloo can abort the process at exit."""
        if dist.is_initialized():
            dist.destroy_process_group()
