"""The front end that starts the ranks, watches them, and tells the other front ends when they die.

Used by LLM, AsyncLLM and the server. Beside the front end's own thread one listens to the supervisor. Knows no text
and no tensors.
"""

from __future__ import annotations

import glob
import os
import threading
import uuid
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import msgspec

from nonet import errors
from nonet.config.checkpoint import read_spec
from nonet.config.env import rank_environment
from nonet.config.resolve import resolve
from nonet.config.schema import EngineConfig
from nonet.engine import messages as m
from nonet.engine.attached import Attached
from nonet.engine.front_end import _STOP_S, FrontEnd
from nonet.engine.line import Switchboard
from nonet.engine.mail import STARTER
from nonet.engine.tally import Tally, new_page
from nonet.errors import ConfigError, EngineDeadError, NonetError
from nonet.launch.local import Node

_ECHOES = ("CommError", "CommTimeout")  # a rank's words when another does not answer, mostly as that one has ended
_ECHO_GRACE_S = 1.0  # they may arrive before the news of that end
_FAILED_GRACE_S = 2.0  # a failing rank's own words may arrive after the news of its end


class Client(FrontEnd):
    """A running engine. `close()` (or leaving a `with` block) ends every process; so does the end of this one.

    `front_ends` counts this one and those that may attach, each once: `Client.attach(client.attachment(1))` in
    another process. Raises ConfigError, ModelError, or CommTimeout naming the ranks that did not start.
    """

    def __init__(self, config: EngineConfig, front_ends: int = 1) -> None:
        spec = read_spec(config.model.model)
        config = resolve(config, spec, num_gpus=_num_gpus(config))
        if config.moe.routing_simulation:
            strategy = config.moe.routing_simulation
            warnings.warn(f"routing is simulated ({strategy}): outputs are meaningless", stacklevel=3)
        self._name = f"nonet-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._front_ends, dp_size = front_ends, config.parallel.data_parallel_size
        page = new_page(front_ends, dp_size)
        super().__init__(spec, config, self._name, STARTER, Tally(page, STARTER, front_ends, dp_size))
        self._closed = False
        self._switchboard: Switchboard | None = None
        payload = {"config": config.model_dump(), "name": self._name}
        compiled = ["nonet.kernels.cpu.every"] if config.parallel.device == "cpu" else []
        if config.moe.load_balancer.replica_dispatch != "even":
            compiled.append("nonet.eplb.every")
        self._node = Node("nonet.engine.core:main", config.world_size, payload, rank_environment(config), compiled)
        self._leash = weakref.finalize(self, self._node.close)
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="nonet-watch")
        self._receiver.start()
        self._watcher.start()
        try:
            if front_ends > 1:
                self._switchboard = Switchboard(self._name, front_ends, page, self.forget_front_end)
                self.on_death(self._tell_attached)
            with self._lock:
                self._wait(lambda: set(self._ready), config.runtime.startup_timeout_s, "start of the ranks")
            self._mail.connect(config.world_size)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(page)

    def attachment(self, number: int) -> dict[str, Any]:
        """What front end `number` (1 to front_ends - 1) needs to attach; JSON-safe."""
        if not 1 <= number < self._front_ends:
            raise ConfigError("front_end", number, f"attached front ends are 1 to {self._front_ends - 1}")
        return {
            "name": self._name,
            "number": number,
            "front_ends": self._front_ends,
            "config": self.config.model_dump(mode="json"),
            "ready": [msgspec.to_builtins(ready) for ready in self.ready],
        }

    @staticmethod
    def attach(attachment: Mapping[str, Any]) -> Attached:
        """A front end in this process, on the engine that another process started."""
        return Attached(attachment)

    def forget_front_end(self, number: int) -> None:
        """Front end `number` is gone: its sequences are dropped. Happens by itself when its process ends."""
        with self._lock:
            if self._error is None:
                self._send_all(m.Forget(number))
            self._tally.clear(number)

    @property
    def supervisor_pid(self) -> int:
        """Process id of what started the ranks and watches them."""
        return self._node.pid

    def _tell_attached(self, error: NonetError) -> None:
        if self._switchboard is not None:
            self._switchboard.tell(str(error))

    def _handle(self, message: m.FromRank) -> None:
        match message:
            case m.Failed() if message.kind in _ECHOES:
                later = threading.Timer(_ECHO_GRACE_S, self.fail, [_rebuild(message)])
                later.daemon = True
                later.start()
            case m.Failed():
                self.fail(_rebuild(message))
            case m.Ready():
                with self._lock:
                    self._ready[message.rank] = message
                    self._changed.notify_all()
            case _:
                super()._handle(message)

    def _watch(self) -> None:
        """Thread: hear from the supervisor until it ends."""
        news = EngineDeadError("the supervisor of the ranks ended")
        while (event := self._node.next_event()) is not None:
            if event["event"] == "died":
                news = EngineDeadError(f"rank {event['rank']} died ({event['how']})")
                if event["how"].startswith("exit"):
                    with self._lock:
                        self._changed.wait_for(lambda: self._error is not None, _FAILED_GRACE_S)
                self.fail(news)
        self.fail(news)

    def close(self) -> None:
        """End all ranks; open sequences, here and of attached front ends, get an error. Returns when all are gone."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            alive = self._error is None and self._mail.connected
            if alive:
                self._send_all(m.Stop())
        self.fail(EngineDeadError("the engine is closed"))
        if alive:
            self._watcher.join(_STOP_S)
        self._leash()
        self._watcher.join(_STOP_S)
        if self._switchboard is not None:
            self._switchboard.close()
        self._end_mail()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _rebuild(failed: m.Failed) -> NonetError:
    """The error a rank raised, or EngineDeadError with its words, naming the rank."""
    kind = getattr(errors, failed.kind, EngineDeadError)
    if failed.kind in ("ConfigError", "RequestError") and len(failed.arguments) == 3:
        return kind(*failed.arguments)
    if failed.kind == "ModelError":
        return errors.ModelError(failed.text)
    return EngineDeadError(f"rank {failed.rank}: {failed.text}")


def _num_gpus(config: EngineConfig) -> int:
    """GPUs this process may use; asks torch only where there is a driver."""
    if config.parallel.device == "cpu" or not glob.glob("/dev/nvidia[0-9]*"):
        return 0
    import torch

    return torch.cuda.device_count()
