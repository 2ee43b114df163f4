"""The loop of one rank: receive, schedule, agree, run, sample, reply.

The first rank of each data-parallel group schedules and samples; its tensor-parallel peers run what it chose. A
step's plan is derived by all ranks from the same exchanged states, so they always do the same.
"""

from __future__ import annotations

import gc
import os
import time
from typing import Any

import msgspec
import torch
from torch import Tensor

from nonet.comm.world import World
from nonet.config.checkpoint import ModelSpec, read_spec
from nonet.config.place import Place
from nonet.config.schema import EngineConfig
from nonet.engine import messages as m
from nonet.engine.batch import prompt_positions, step_batch
from nonet.engine.lockstep import Lockstep, own_cpu_seconds
from nonet.engine.mail import STARTER, RankMail
from nonet.engine.sampler import Sampler, logprobs
from nonet.engine.worker import Worker
from nonet.errors import CapacityError, NonetError, RequestError
from nonet.models.base import family_of
from nonet.schedule.blocks import Blocks
from nonet.schedule.scheduler import Scheduled, Scheduler
from nonet.schedule.sequence import Sequence

LEARN_EVERY = 4  # steps between exchanges of the load, for rules that follow it
_BURST_GAP_S, _BURST_S = 4e-4, 3e-3  # a burst is over after such a gap, and never longer


def main(place: Place, payload: dict[str, Any]) -> None:
    """A rank's life: join, load, serve, leave. What goes wrong is told to the front end before it is raised."""
    mail = RankMail(payload["name"], place.rank)
    try:
        config = EngineConfig.model_validate(payload["config"])
        spec = read_spec(config.model.model)
        family_of(spec)  # what it refuses it refuses before the ranks meet
        torch.set_num_threads(config.runtime.threads_per_rank or 1)
        world = World(
            place,
            tensor_parallel_size=config.parallel.tensor_parallel_size,
            device=config.parallel.device or "cpu",
            timeout_s=config.runtime.comm_timeout_s,
        )
        core = Core(config, spec, world, mail)
        gc.collect()
        gc.freeze()  # what lives as long as the rank is never looked through again
        core.announce()
        try:
            while core.step():
                pass
        finally:
            core.worker.recorder.close()  # also what a run recorded that fails
        core.close()
        world.close()
    except BaseException as error:
        mail.send(STARTER, failure(place.rank, error))
        raise
    finally:
        mail.close()


def failure(rank: int, error: BaseException) -> m.Failed:
    """What the front end needs to raise the same error."""
    arguments = [str(getattr(error, name)) for name in ("field", "value", "remedy") if hasattr(error, name)]
    kind = type(error).__name__ if isinstance(error, NonetError) else "EngineDeadError"
    text = str(error) if isinstance(error, NonetError) else f"{type(error).__name__}: {error}"
    return m.Failed(rank, kind, text, arguments)


class Core:
    """One rank's scheduler (if it leads), worker, and place in the lockstep."""

    def __init__(self, config: EngineConfig, spec: ModelSpec, world: World, mail: RankMail) -> None:
        self.config, self.spec, self.world, self.mail = config, spec, world, mail
        self.leads = world.tp_rank == 0
        self.lockstep = Lockstep(world.ep, self._page_bytes(), config.runtime.comm_timeout_s)
        self.worker = Worker(config, spec, world)
        self.sampler = Sampler(spec.eos_token_ids, config.model.tokenizer or str(spec.folder))
        schedule, cache = config.schedule, config.cache
        self.scheduler = Scheduler(
            Blocks(self.worker.num_blocks, cache.block_size, cache.enable_prefix_caching),
            max_num_seqs=schedule.max_num_seqs,
            max_num_batched_tokens=schedule.max_num_batched_tokens,
            max_model_len=config.model.max_model_len or spec.max_position,
        )
        self.stopping = False
        self.num_tokens = self.max_step_tokens = 0

    def _page_bytes(self) -> int:
        """Most that a step state can take: with tensor parallelism it carries the batch, 5 to 9 bytes a number."""
        numbers = len(self.spec.moe_layers) * self.spec.num_experts
        load = 8 * numbers if self.config.moe.load_balancer.replica_dispatch == "waterfill-average" else 0
        if self.world.tp.size == 1:
            return 256 + load
        schedule = self.config.schedule
        blocks = -(-(self.config.model.max_model_len or self.spec.max_position) // self.config.cache.block_size) + 1
        return 1024 + load + 18 * schedule.max_num_batched_tokens + schedule.max_num_seqs * (32 + 9 * blocks)

    def announce(self) -> None:
        ready = m.Ready(self.world.rank, os.getpid(), self.worker.num_blocks, self.worker.bytes_read)
        self.mail.send(STARTER, ready)

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
        load = self.worker.news_of_load() if self.lockstep.steps % LEARN_EVERY == 0 else b""
        state = m.StepState(len(batch.tokens), self.stopping, msgspec.msgpack.encode(batch) if share else b"", load)
        received = self.lockstep.exchange(msgspec.msgpack.encode(state))
        states = [msgspec.msgpack.decode(part, type=m.StepState) for part in received]
        if load:
            self.worker.learn([state.load for state in states])
        return states

    def run(self, batch: m.StepBatch, tokens: list[int]) -> Tensor | None:
        """Run this rank's part; a rank without tokens still passes through every layer."""
        self.worker.all2all.check()  # also on ranks that send nothing
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

    def receive(self) -> int:
        """Take in all that has arrived; how many messages that was."""
        count = 0
        for message in self.mail.arrived():
            self.handle(message)
            count += 1
        return count

    def gather(self) -> None:
        """After sleep: requests that end it often come as a burst. Taken in whole it needs one step, not several."""
        end = time.monotonic() + _BURST_S
        while time.monotonic() < end:
            time.sleep(_BURST_GAP_S)
            if not self.receive():
                return

    def handle(self, message: m.ToRank) -> None:
        match message:
            case m.Add():
                self.add(message)
            case m.Abort():
                for request_id in message.request_ids:
                    self.scheduler.abort(request_id)
            case m.Forget():
                self.forget(message.front_end)
            case m.GetStats():
                self.mail.send(message.front_end, self.stats(message.number))
                if message.reset_load:
                    self.worker.reset_load()
            case m.Stop():
                self.stopping = True

    def forget(self, front_end: int) -> None:
        """Drop what a front end that is gone had open."""
        self.mail.forget(front_end)
        names = [sequence.request_id for sequence in (*self.scheduler.running, *self.scheduler.waiting)]
        for name in names:
            if m.front_end_of(name) == front_end:
                self.scheduler.abort(name)

    def add(self, message: m.Add) -> None:
        front_end = m.front_end_of(message.request_id)
        if self.mail.is_forgotten(front_end):
            return  # sent before its front end ended
        sequence = Sequence(message.request_id, message.tokens, message.params, message.max_tokens, message.seed)
        try:
            self.scheduler.add(sequence)
        except RequestError as error:
            arguments = [error.field, str(error.value), error.remedy]
            self.mail.send(front_end, m.Refused(message.request_id, "RequestError", arguments))
        except CapacityError as error:
            self.mail.send(front_end, m.Refused(message.request_id, "CapacityError", [str(error)]))

    def sleep(self) -> None:
        """Block until there is work here or elsewhere; whoever finds work first wakes the others."""
        self.lockstep.fall_asleep()
        while True:
            self.receive()
            if self.scheduler.has_work or self.stopping:
                self.lockstep.wake_others()
                break
            if self.lockstep.doze(self.mail.inbox):
                break
        self.gather()

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
        self.worker.all2all.check()  # nothing is sent that was computed without a late rank
        by_front_end: dict[int, list[m.Chunk]] = {}
        for name, chunk in chunks.items():
            by_front_end.setdefault(m.front_end_of(name), []).append(chunk)
        for front_end, its_chunks in by_front_end.items():
            self.mail.send(front_end, m.Chunks(self.world.rank, its_chunks))

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
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
        )

    def close(self) -> None:
        self.worker.close()
        self.lockstep.close()
