"""A front end in a process of its own, on ranks that another process started.

Made from what the starter's `Client.attachment(i)` returned. It ends with the engine: the line to the starter says
when and why. Knows no text and no tensors.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

import msgspec

from nonet.config.checkpoint import read_spec
from nonet.config.schema import EngineConfig
from nonet.engine import messages as m
from nonet.engine.front_end import _STOP_S, FrontEnd
from nonet.engine.line import Line
from nonet.engine.tally import Tally
from nonet.errors import EngineDeadError


class Attached(FrontEnd):
    """`close()`, or the end of this process, drops what it had open; the engine goes on for the others.

    Raises EngineDeadError if the engine is gone, ConfigError if the attachment is used already.
    """

    def __init__(self, attachment: Mapping[str, Any]) -> None:
        config = EngineConfig.model_validate(attachment["config"])
        spec = read_spec(config.model.model)
        name, number = attachment["name"], attachment["number"]
        self._line = Line(name, number)
        tally = Tally(self._line.page, number, attachment["front_ends"], config.parallel.data_parallel_size)
        os.close(self._line.page)
        super().__init__(spec, config, name, number, tally)
        self._ready = {ready.rank: ready for ready in msgspec.convert(attachment["ready"], list[m.Ready])}
        self._mail.connect(config.world_size)
        self._closed = False
        self._listener = threading.Thread(target=self._listen, daemon=True, name="nonet-line")
        self._receiver.start()
        self._listener.start()

    def _listen(self) -> None:
        """Thread: until the engine is dead."""
        self.fail(self._line.news())

    def close(self) -> None:
        """Leave the engine; open sequences get an error."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self.fail(EngineDeadError("this front end is closed"))
        self._line.hang_up()  # the starter notices, and has the ranks drop what was open
        self._listener.join(_STOP_S)
        self._line.close()
        self._end_mail()
