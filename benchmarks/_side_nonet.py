"""nonet's side of `cpu_engine.py`: one offline engine, driven by JSON lines (see _side_protocol.py).

    python _side_nonet.py '{"model": FOLDER, "ranks": 2}'

One rank is the plain engine; several are data-parallel ranks with expert parallelism over shared memory.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from _side_protocol import Engine, serve


def nonet_version() -> str:
    import nonet

    try:
        return version("nonet")
    except PackageNotFoundError:  # a source tree that is not installed
        return str(getattr(nonet, "__version__", "source tree"))


def start(options: dict[str, Any]) -> Engine:
    from nonet import LLM, SamplingParams

    parallel: dict[str, Any] = {}
    if options["ranks"] > 1:
        parallel = {
            "data_parallel_size": options["ranks"],
            "enable_expert_parallel": True,
            "all2all_backend": "shm",
        }
    llm = LLM(model=options["model"], dtype="bfloat16", **parallel)

    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        requests: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
        outs = llm.generate(requests, params, use_tqdm=False)
        return [list(out.outputs[0].token_ids) for out in outs]

    return Engine(generate, llm.close, {"nonet": nonet_version(), "torch": version("torch"), **parallel})


if __name__ == "__main__":
    serve(start)
