"""A pretend engine for tests of the server without ranks: it says what a test scripts, token by token.

It has nonet-tiny's tokenizer and shape, so text and token ids are real.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace

from nonet.config import build_config
from nonet.config.checkpoint import find_folder, read_spec
from nonet.engine.messages import Stats
from nonet.engine.tokenizer import Tokenizer
from nonet.errors import NonetError
from nonet.types import CompletionOutput, Logprob, RequestOutput, SamplingParams


class PretendLLM:
    """Every sequence brings `tokens`, one a turn of the event loop, then ends; `error` is raised after `error_at`."""

    def __init__(self, tokens: list[int] | None = None, **settings) -> None:
        folder = str(find_folder("nonet-tiny"))
        self.config = build_config("nonet-tiny", **{"max_model_len": 2048, "data_parallel_size": 2, **settings})
        self.tokenizer = Tokenizer(folder)
        self.client = SimpleNamespace(spec=read_spec("nonet-tiny"), cache_tokens=4096, number=0)
        self.tokens = [67, 302, 370] if tokens is None else tokens
        self.error: NonetError | None = None
        self.error_at = 0
        self.dead: NonetError | None = None
        self.hold = asyncio.Event()
        self.hold.set()
        self.seen: list[tuple[list[int], SamplingParams, str, int | None]] = []
        self.open: set[str] = set()
        self.aborted: list[str] = []
        self.pending = [0, 0]

    async def stream(
        self, prompt, sampling_params, *, request_id=None, data_parallel_rank=None, grown=None
    ) -> AsyncIterator[RequestOutput]:
        p, ids = sampling_params, prompt["prompt_token_ids"]
        self.seen.append((ids, p, request_id, data_parallel_rank))
        self.open.add(request_id)
        outputs = [CompletionOutput(i, logprobs=None if p.logprobs is None else []) for i in range(p.n)]
        result = RequestOutput(request_id, None, ids, outputs)
        if p.prompt_logprobs is not None:
            result.prompt_logprobs = [None, *(self._entry(token, p.prompt_logprobs) for token in ids[1:])]
        try:
            for i in range(min(len(self.tokens), p.max_tokens or 1)):
                await self.hold.wait()
                await asyncio.sleep(0)
                if self.error is not None and i == self.error_at:
                    raise self.error
                for out in outputs:
                    if request_id not in self.open:
                        out.finish_reason = "abort"
                        continue
                    out.token_ids.append(self.tokens[i])
                    out.text = self.tokenizer.decode(out.token_ids, p.skip_special_tokens)
                    if out.logprobs is not None:
                        out.logprobs.append(self._entry(self.tokens[i], p.logprobs))
                    if i + 1 == min(len(self.tokens), p.max_tokens or 1):
                        out.finish_reason = "length" if i + 1 == p.max_tokens else "stop"
                alone = len(outputs) == 1 and outputs[0].finish_reason is None
                if not (alone and grown is not None and grown(outputs[0])):
                    yield result
        finally:
            if any(out.finish_reason is None for out in outputs):
                self.aborted.append(request_id)
            self.open.discard(request_id)

    def _entry(self, token: int, count: int | None) -> dict[int, Logprob]:
        """The token, then the likeliest: 0, 1, 2 and so on."""
        found = {token: Logprob(-2.5, count + 1, self.tokenizer.decode([token], False))}
        for rank in range(1, count + 1):
            found[rank - 1] = Logprob(-0.5 * rank, rank, self.tokenizer.decode([rank - 1], False))
        return found

    async def abort(self, request_id: str, n: int = 1) -> None:
        self.open.discard(request_id)
        self.hold.set()

    async def stats(self) -> list[Stats]:
        """Both ranks sent one token to every expert of every layer; rank 1 has a quarter of its blocks in use."""
        load = [[1] * 32 for _ in range(5)]
        return [
            Stats(0, rank, rank, 7, 40 + rank, 9, 0, 3, 80 - 20 * rank, 80, rank, load, 0.5, 1 + rank, 2 * rank)
            for rank in range(2)
        ]

    async def wait_dead(self) -> NonetError:
        return await asyncio.get_running_loop().create_future()
