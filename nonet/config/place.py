"""Where a rank stands among the others. Made by whoever starts ranks, read when a rank joins the world."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where a rank stands: its number, how many there are, and where they meet."""

    rank: int
    size: int
    local_rank: int = 0
    host: str = "127.0.0.1"
    port: int = 0
    listen_fd: int | None = None  # the meeting point's listening socket, held by rank 0
    one_host: bool = True
