"""Records, on one rank, which slots its tokens went to in the iterations that were asked for.

An iteration is a step in which any rank had tokens; the first after the start is number 0, and every rank counts the
same ones. Owned by the worker. What the files look like is `eplb.recording`'s business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from nonet.comm.world import World
from nonet.config.checkpoint import ModelSpec
from nonet.config.schema import EngineConfig
from nonet.eplb.placement import Placement
from nonet.eplb.recording import Recording, check_folder, meta_info
from nonet.errors import ConfigError
from nonet.moe.load import LoadCounter

log = logging.getLogger("nonet")


class Recorder:
    """Switches the counting of slots on and off, and hands each iteration's counts to a file.

    Raises ConfigError if the folder cannot be written to: at the start, not when the first iteration has come.
    """

    def __init__(self, config: EngineConfig, spec: ModelSpec, world: World, placement: Placement, load: LoadCounter):
        self._wanted, self._folder = config.moe.recorded_iterations, Path(config.moe.expert_statistic_path)
        self._world, self._placement, self._load = world, placement, load
        self._iteration = 0  # the next one
        self._recording: Recording | None = None
        if self._wanted:
            check_folder(self._folder)
            self._meta = meta_info(
                placement,
                spec.moe_layers,
                spec.top_k,
                first_iteration=self._wanted.start,
                tp=config.parallel.tensor_parallel_size,
                dp=config.parallel.data_parallel_size,
                ep=config.parallel.enable_expert_parallel,
            )
            self._switch()

    def end_iteration(self) -> None:
        """All layers of a step are done. A step that fails midway is not counted."""
        self._iteration += 1
        if self._wanted:
            self._guard(self._add)

    def close(self) -> None:
        """Write what there is, if anything; a run that ended before it was complete says so."""
        self._guard(self._finish)

    def _guard(self, action: Callable[[], None]) -> None:
        """A full disk, or a folder that is gone, ends the recording and not the service."""
        try:
            action()
        except (OSError, ConfigError) as error:
            log.error("expert statistics: rank %d cannot write, recording ends: %s", self._world.rank, error)
            self._wanted, self._recording, self._load.slot_LG = range(0), None, None

    def _add(self) -> None:
        counted = self._load.slot_LG
        if counted is not None:
            if self._recording is None:  # not before: files of an earlier run are kept until there are new ones
                self._recording = Recording(self._folder, self._world.rank, self._world.size, self._meta)
            self._recording.add(counted.cpu().numpy().astype(np.int32))
            counted.zero_()
        self._switch()

    def _switch(self) -> None:
        """Count in the iterations that were asked for, from the first to the last."""
        if self._iteration == self._wanted.start:
            self._load.slot_LG = torch.zeros(
                self._placement.expert_LG.shape, dtype=torch.int64, device=self._load.count_LE.device
            )
        if self._iteration == self._wanted.stop:
            self._finish()

    def _finish(self) -> None:
        if not self._wanted:
            return
        if self._recording is not None:
            self._recording.close()
        if self._world.rank == 0:
            self._say(self._recording.length if self._recording is not None else 0)
        self._wanted, self._recording, self._load.slot_LG = range(0), None, None

    def _say(self, length: int) -> None:
        asked = f"{self._wanted.start}-{self._wanted.stop}"
        if length == len(self._wanted):
            log.info("expert statistics of iterations %s are in %s", asked, self._folder)
        else:
            ended = f"the run ended after iteration {self._iteration - 1}" if self._iteration else "no step was made"
            log.warning(
                "expert_statistic_iter_range = %r: %s: %d of %d iterations are recorded in %s",
                asked, ended, length, len(self._wanted), self._folder,
            )  # fmt: skip
