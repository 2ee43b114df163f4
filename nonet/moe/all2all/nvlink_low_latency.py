"""One-sided all-to-all over NVLink for few tokens a rank: results are pulled in small pieces, all at once.

See `_nvlink`.
"""

from __future__ import annotations

from nonet.moe.all2all._nvlink import Launch, Nvlink
from nonet.moe.base import All2All, All2AllSpec


def create(spec: All2AllSpec) -> All2All:
    return Nvlink(spec, "nvlink_low_latency", pull=Launch(1024, 4, 512))
