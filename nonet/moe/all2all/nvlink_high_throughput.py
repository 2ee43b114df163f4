"""One-sided all-to-all over NVLink for many tokens a rank: results are pulled in larger pieces.

See `_nvlink`.
"""

from __future__ import annotations

from nonet.moe.all2all._nvlink import Launch, Nvlink
from nonet.moe.base import All2All, All2AllSpec


def create(spec: All2AllSpec) -> All2All:
    return Nvlink(spec, "nvlink_high_throughput", pull=Launch(2048, 8, 528))
