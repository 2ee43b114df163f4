"""An attached front end in a process of its own, for `test_front_ends`: orders come in as JSON lines, so do answers."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time

from nonet import AsyncLLM, EngineDeadError, SamplingParams


class Process:
    """The test's side."""

    def __init__(self, attachment: dict) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.say(attachment)
        assert self.hear() == "attached"

    def say(self, what: object) -> None:
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def hear(self):
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def tell(what: object) -> None:
    print(json.dumps(what), flush=True)


async def tokens(llm: AsyncLLM, prompt: list[int], max_tokens: int) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return [out async for out in llm.stream(prompt, params)][-1].outputs[0].token_ids


async def hold(llm: AsyncLLM, prompt: list[int], all_run: asyncio.Barrier) -> str:
    """Stream until the engine is dead; what was said then."""
    seen = False
    try:
        params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        async for _ in llm.stream(prompt, params):
            if not seen:
                await all_run.wait()
            seen = True
    except EngineDeadError as error:
        return str(error)
    return "finished"


async def main() -> None:
    llm = AsyncLLM.attach(json.loads(sys.stdin.readline()))
    tell("attached")
    order = json.loads(sys.stdin.readline())
    if order["do"] == "generate":
        tell(await asyncio.gather(*(tokens(llm, prompt, order["max_tokens"]) for prompt in order["prompts"])))
        tell([len(await llm.stats()), llm.pending])
    else:
        all_run = asyncio.Barrier(len(order["prompts"]) + 1)
        streams = [asyncio.create_task(hold(llm, prompt, all_run)) for prompt in order["prompts"]]
        await all_run.wait()
        tell("all run")
        said = await asyncio.gather(*streams)
        tell([sorted(set(said)), time.time()])
    llm.close()


if __name__ == "__main__":
    asyncio.run(main())
