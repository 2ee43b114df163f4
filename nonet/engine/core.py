"""The loop of one rank: receive, schedule, agree, run, sample, reply.

The first rank of each data-parallel group schedules and samples; its tensor-parallel peers run what it chose. A
step's plan is derived by all ranks from the same exchanged states, so they always do the same.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec
import torch
import zmq
from torch import Tensor

from nonet.comm.world import World
from nonet.config.checkpoint import ModelSpec, read_spec
from nonet.config.place import Place
from nonet.config.schema import EngineConfig
from nonet.engine import messages as m
from nonet.engine.batch import prompt_positions, step_batch
from nonet.engine.lockstep import Lockstep, own_cpu_seconds
from nonet.engine.sampler import Sampler, logprobs
from nonet.engine.worker import Worker
from nonet.errors import CapacityError, NonetError, RequestError
from nonet.schedule.blocks import Blocks
from nonet.schedule.scheduler import Scheduled, Scheduler
from nonet.schedule.sequence import Sequence


def main(place: Place, payload: dict[str, Any]) -> None:
    """A rank's life: join, load, serve, leave. What goes wrong is told to the front end before it is raised."""
    context = zmq.Context()
    outbox: zmq.Socket[bytes] = context.socket(zmq.PUSH)
    outbox.setsockopt(zmq.SNDHWM, 0)
    outbox.connect(payload["outputs"])
    try:
        config = EngineConfig.model_validate(payload["config"])
        torch.set_num_threads(config.runtime.threads_per_rank or 1)
        inbox: zmq.Socket[bytes] = context.socket(zmq.PULL)
        inbox.setsockopt(zmq.RCVHWM, 0)
        inbox.connect(f"{payload['inputs']}-{place.rank}")
        world = World(
            place,
            tensor_parallel_size=config.parallel.tensor_parallel_size,
            device=config.parallel.device or "cpu",
            timeout_s=config.runtime.comm_timeout_s,
        )
        core = Core(config, read_spec(config.model.model), world, inbox, outbox)
        core.announce()
        while core.step():
            pass
        core.close()
        world.close()
    except BaseException as error:
        outbox.send(msgspec.msgpack.encode(failure(place.rank, error)))
        raise
    finally:
        context.destroy(linger=1000)


def failure(rank: int, error: BaseException) -> m.Failed:
    """What the front end needs to raise the same error."""
    arguments = [str(getattr(error, name)) for name in ("field", "value", "remedy") if hasattr(error, name)]
    kind = type(error).__name__ if isinstance(error, NonetError) else "EngineDeadError"
    text = str(error) if isinstance(error, NonetError) else f"{type(error).__name__}: {error}"
    return m.Failed(rank, kind, text, arguments)


class Core:
    """One rank's scheduler (if it leads), worker, and place in the lockstep."""

    def __init__(
        self, config: EngineConfig, spec: ModelSpec, world: World, inbox: zmq.Socket[bytes], outbox: zmq.Socket[bytes]
    ) -> None:
        self.config, self.spec, self.world = config, spec, world
        self.inbox, self.outbox = inbox, outbox
        self.leads = world.tp_rank == 0
        self.lockstep = Lockstep(world.ep, self._page_bytes(), config.runtime.comm_timeout_s)
        self.worker = Worker(config, spec, world)
        self.sampler = Sampler(spec.eos_token_ids)
        schedule, cache = config.schedule, config.cache
        self.scheduler = Scheduler(
            Blocks(self.worker.num_blocks, cache.block_size, cache.enable_prefix_caching),
            max_num_seqs=schedule.max_num_seqs,
            max_num_batched_tokens=schedule.max_num_batched_tokens,
            max_model_len=config.model.max_model_len or spec.max_position,
        )
        self.stopping = False
        self.num_tokens = self.max_step_tokens = 0
        self._decoder = msgspec.msgpack.Decoder(m.ToRank)

    def _page_bytes(self) -> int:
        """Most that a step state can take: with tensor parallelism it carries the batch, 5 to 9 bytes a number."""
        if self.world.tp.size == 1:
            return 256
        schedule = self.config.schedule
        blocks = -(-(self.config.model.max_model_len or self.spec.max_position) // self.config.cache.block_size) + 1
        return 1024 + 18 * schedule.max_num_batched_tokens + schedule.max_num_seqs * (32 + 9 * blocks)

    def announce(self) -> None:
        self.send(m.Ready(self.world.rank, os.getpid(), self.worker.num_blocks, self.worker.bytes_read))

    def send(self, message: m.FromRank) -> None:
        self.outbox.send(msgspec.msgpack.encode(message))

    def step(self) -> bool:
        """One step with all ranks; False when they leave. Sleeps if nobody has work."""
        self.receive()
        items = self.scheduler.schedule() if self.leads else []
        batch = step_batch(items)
        states = self.agree(batch)
        if any(state.stop for state in states):
            return False
        tp = self.world.tp.size
        leaders = states[::tp]
        tokens = [state.tokens for state in leaders]
        if not any(tokens):
            self.sleep()
            return True
        if not self.leads:
            batch = msgspec.msgpack.decode(leaders[self.world.dp_rank].batch, type=m.StepBatch)
        logits = self.run(batch, tokens)
        if items:
            self.reply(items, logits)
        return True

    def agree(self, batch: m.StepBatch) -> list[m.StepState]:
        """Exchange what each rank has to do."""
        share = self.leads and self.world.tp.size > 1
        state = m.StepState(len(batch.tokens), self.stopping, msgspec.msgpack.encode(batch) if share else b"")
        received = self.lockstep.exchange(msgspec.msgpack.encode(state))
        return [msgspec.msgpack.decode(part, type=m.StepState) for part in received]

    def run(self, batch: m.StepBatch, tokens: list[int]) -> Tensor | None:
        """Run this rank's part; a rank without tokens still passes through every layer."""
        own = tokens[self.world.dp_rank]
        self.num_tokens += own
        self.max_step_tokens = max(self.max_step_tokens, own)
        if self.config.moe.randomize_dp_dummy_inputs and not all(tokens):
            busiest = max(tokens)
            tokens = [count or busiest for count in tokens]
            if not own:
                self.worker.run_dummy(busiest, tokens)
                return None
        return self.worker.run(batch, tokens)

    def receive(self) -> None:
        """Take in all that has arrived."""
        while self.inbox.poll(0):
            self.handle(self._decoder.decode(self.inbox.recv()))

    def handle(self, message: m.ToRank) -> None:
        match message:
            case m.Add():
                self.add(message)
            case m.Abort():
                for request_id in message.request_ids:
                    self.scheduler.abort(request_id)
            case m.GetStats():
                self.send(self.stats(message.number))
                if message.reset_load:
                    self.worker.load.count_LE.zero_()
            case m.Stop():
                self.stopping = True

    def add(self, message: m.Add) -> None:
        sequence = Sequence(message.request_id, message.tokens, message.params, message.max_tokens, message.seed)
        try:
            self.scheduler.add(sequence)
        except RequestError as error:
            arguments = [error.field, str(error.value), error.remedy]
            self.send(m.Refused(message.request_id, "RequestError", arguments))
        except CapacityError as error:
            self.send(m.Refused(message.request_id, "CapacityError", [str(error)]))

    def sleep(self) -> None:
        """Block until there is work here or elsewhere; whoever finds work first wakes the others."""
        self.lockstep.fall_asleep()
        while True:
            self.receive()
            if self.scheduler.has_work or self.stopping:
                self.lockstep.wake_others()
                return
            if self.lockstep.doze(self.inbox):
                return

    def reply(self, items: list[Scheduled], logits: Tensor | None) -> None:
        """Sample, advance the sequences, and send what is new."""
        self.scheduler.computed(items)
        chunks: dict[str, m.Chunk] = {}
        sampling: list[tuple[Sequence, int]] = []
        row = 0
        for item in items:
            positions = prompt_positions(item)
            if positions:
                assert logits is not None
                chunks[item.sequence.request_id] = self.prompt_chunk(item.sequence, positions, logits[row:])
                row += len(positions)
            if item.samples:
                sampling.append((item.sequence, row))
                row += 1
        if sampling:
            assert logits is not None
            self.sample(sampling, logits if len(sampling) == row else logits[[r for _, r in sampling]], chunks)
        if chunks:
            self.send(m.Chunks(self.world.rank, list(chunks.values())))

    def prompt_chunk(self, sequence: Sequence, positions: range, logits: Tensor) -> m.Chunk:
        """Log probabilities of the prompt tokens that follow these positions."""
        count = sequence.params.prompt_logprobs or 0
        tokens = [sequence.tokens[p + 1] for p in positions]
        entries = logprobs(logits[: len(tokens)], tokens, [count] * len(tokens))
        sequence.prompt_logprobs_done = positions.stop
        return m.Chunk(sequence.request_id, [], prompt_logprobs=entries, num_cached=sequence.num_cached)

    def sample(self, sampling: list[tuple[Sequence, int]], logits: Tensor, chunks: dict[str, m.Chunk]) -> None:
        """Draw a token for each sequence, append it, and finish those that end with it."""
        sequences = [sequence for sequence, _ in sampling]
        tokens = self.sampler.sample(logits, sequences)
        wanting = [b for b, sequence in enumerate(sequences) if sequence.params.logprobs is not None]
        entries: dict[int, list[m.TokenLogprob]] = {}
        if wanting:
            counts = [sequences[b].params.logprobs or 0 for b in wanting]
            found = logprobs(logits[wanting], [tokens[b] for b in wanting], counts)
            entries = dict(zip(wanting, found, strict=True))
        for b, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            sequence.tokens.append(token)
            chunk = chunks.setdefault(
                sequence.request_id, m.Chunk(sequence.request_id, [], num_cached=sequence.num_cached)
            )
            chunk.tokens.append(token)
            if b in entries:
                chunk.logprobs = [entries[b]]
            chunk.finish_reason, chunk.stop_token = self.ending(sequence, token)
            if chunk.finish_reason:
                self.scheduler.finish(sequence)

    def ending(self, sequence: Sequence, token: int) -> tuple[str | None, int | None]:
        """(finish reason, the stop token given by the user that caused it)."""
        p = sequence.params
        if sequence.num_output >= p.min_tokens:
            if not p.ignore_eos and token in self.sampler.eos_token_ids:
                return "stop", None
            if token in p.stop_token_ids:
                return "stop", token
        if sequence.num_output >= sequence.max_tokens:
            return "length", None
        return None, None

    def stats(self, number: int) -> m.Stats:
        blocks = self.scheduler.blocks
        return m.Stats(
            number=number,
            rank=self.world.rank,
            dp_rank=self.world.dp_rank,
            steps=self.worker.steps,
            tokens=self.num_tokens,
            max_step_tokens=self.max_step_tokens,
            sleeps=self.lockstep.sleeps,
            collectives=self.world.ep.calls,
            free_blocks=blocks.num_free,
            num_blocks=blocks.num_blocks,
            preemptions=self.scheduler.num_preemptions,
            load=self.worker.load.count_LE.tolist(),
            cpu_seconds=own_cpu_seconds(),
        )

    def close(self) -> None:
        self.worker.close()
        self.lockstep.close()
