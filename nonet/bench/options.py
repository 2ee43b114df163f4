"""The options of each benchmark: name, default, range and help text, once. The names and defaults are vLLM's.

Read from a command line by `bench.arguments`, used by the runners. What describes the engine is no option here: it is
the configuration's (`nonet config`) and stays with `config`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, Json

from nonet.config.schema import Section

DatasetName = Literal["random", "sharegpt", "sonnet", "custom"]


class Options(Section):
    """A group of options; `title` stands above them in the help text."""

    title: ClassVar[str] = ""


class DatasetOptions(Options):
    title: ClassVar[str] = "Requests"

    dataset_name: DatasetName = Field(
        "random",
        description="random: made-up prompts. sharegpt: JSON of conversations. sonnet: lines of a text file. custom: "
        'JSON lines with "prompt" and perhaps "output_tokens".',
    )
    dataset_path: Path | None = Field(None, description="File of the data set; all but random need one.")
    num_prompts: int = Field(1000, ge=1, description="Requests to make.")
    seed: int = Field(0, description="Seed of the requests and of their arrival times.")
    input_len: int | None = Field(None, ge=1, description="Prompt tokens, whatever the data set's own option says.")
    output_len: int | None = Field(None, ge=1, description="Output tokens, whatever the data set's own option says.")
    random_input_len: int = Field(1024, ge=1, description="random: tokens of a prompt.")
    random_output_len: int = Field(128, ge=1, description="random: tokens to generate.")
    random_range_ratio: float = Field(
        0.0, ge=0, lt=1, description="random: both lengths are drawn from [len x (1 - r), len x (1 + r)]."
    )
    random_prefix_len: int = Field(0, ge=0, description="random: tokens that all prompts begin with, beside their own.")
    sharegpt_output_len: int | None = Field(
        None, ge=1, description="sharegpt: tokens to generate. Default: as many as the answer in the file has."
    )
    sonnet_input_len: int = Field(550, ge=1, description="sonnet: tokens of a prompt, roughly.")
    sonnet_output_len: int = Field(150, ge=1, description="sonnet: tokens to generate.")
    sonnet_prefix_len: int = Field(200, ge=0, description="sonnet: tokens that all prompts begin with, of those.")
    custom_output_len: int = Field(256, ge=-1, description="custom: tokens to generate; -1: each line's output_tokens.")
    skip_chat_template: bool = Field(False, description="Accepted: prompts are always sent as the file has them.")
    disable_shuffle: bool = Field(False, description="Take the data set's requests in the order of the file.")
    no_oversample: bool = Field(False, description="Make no request twice if the data set has too few.")


class RunOptions(Options):
    title: ClassVar[str] = "Run"

    num_warmups: int = Field(0, ge=0, description="Requests made first and not counted.")
    disable_tqdm: bool = Field(False, description="No progress bar. It is drawn on a terminal only.")


class ThroughputOptions(RunOptions, DatasetOptions):
    n: int = Field(1, ge=1, description="Continuations of each prompt.")
    backend: Literal["nonet", "vllm"] = Field("nonet", description="vllm is accepted and means this engine.")
    async_engine: bool = Field(False, description="Through AsyncLLM, the face that servers use, instead of LLM.")
    output_json: Path | None = Field(None, description="Write the result to this file.")


class LatencyOptions(Options):
    title: ClassVar[str] = "Run"

    input_len: int = Field(32, ge=1, description="Tokens of each prompt.")
    output_len: int = Field(128, ge=1, description="Tokens generated for each prompt.")
    batch_size: int = Field(8, ge=1, description="Prompts in a batch.")
    n: int = Field(1, ge=1, description="Continuations of each prompt.")
    num_iters_warmup: int = Field(10, ge=0, description="Batches run first and not counted.")
    num_iters: int = Field(30, ge=1, description="Batches that are timed.")
    seed: int = Field(0, description="Seed of the prompts.")
    disable_tqdm: bool = Field(False, description="No progress bar. It is drawn on a terminal only.")
    output_json: Path | None = Field(None, description="Write the result to this file.")


class ServerOptions(Options):
    title: ClassVar[str] = "Server"

    backend: Literal["openai", "vllm", "openai-chat"] = Field(
        "openai", description="openai and vllm: completions. openai-chat: chat completions."
    )
    base_url: str | None = Field(None, description="Where the server is, as http://host:port. Default: from the next.")
    host: str = Field("127.0.0.1", description="Host of the server.")
    port: int = Field(8000, ge=1, le=65535, description="Port of the server.")
    endpoint: str | None = Field(
        None, description="Path of the requests. Default: /v1/completions or /v1/chat/completions, by backend."
    )
    model: str | None = Field(None, description="Name of the model. Default: the first one of the server's list.")
    served_model_name: str | None = Field(None, description="Name to send, if --model is a folder.")
    tokenizer: str | None = Field(None, description="Folder with tokenizer.json. Default: --model, if it is a folder.")
    tokenizer_mode: Literal["auto", "hf"] = Field("auto", description="Accepted: it is always tokenizer.json.")
    trust_remote_code: bool = Field(False, description="Run a tokenizer that is Python code. Only if you trust it.")
    skip_tokenizer_init: bool = Field(False, description="Load no tokenizer; random prompts need one.")
    request_id_prefix: str | None = Field(
        None, description="Each request's X-Request-Id is this and its number. Default: bench- and a random word."
    )
    header: list[str] | None = Field(None, description="KEY=VALUE pairs sent as headers.")
    insecure: bool = Field(False, description="Do not check the server's certificate.")
    ready_check_timeout_sec: float = Field(
        0, ge=0, description="Repeat a first request until it succeeds, at most so long. 0: no such request."
    )
    request_timeout_sec: float = Field(21600.0, gt=0, description="A request that takes longer has failed.")


class TrafficOptions(Options):
    title: ClassVar[str] = "Traffic"

    request_rate: float = Field(float("inf"), gt=0, description="Requests a second; inf: all at once.")
    burstiness: float = Field(
        1.0, gt=0, description="Shape of the gamma distribution of gaps: 1 is Poisson, less comes in bursts."
    )
    max_concurrency: int | None = Field(None, ge=1, description="Requests under way at once; more wait here.")
    ramp_up_strategy: Literal["linear", "exponential"] | None = Field(
        None, description="Let the rate grow during the run, instead of --request-rate."
    )
    ramp_up_start_rps: float | None = Field(None, ge=0, description="Rate at the start.")
    ramp_up_end_rps: float | None = Field(None, gt=0, description="Rate at the end.")


class SamplingOptions(Options):
    title: ClassVar[str] = "Sampling (sent only if given; else the server's defaults hold)"

    ignore_eos: bool = Field(False, description="Generate to the length asked for. Always so for random.")
    temperature: float | None = Field(None, ge=0, description="0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1, description="Share of the probability that may be drawn.")
    top_k: int | None = Field(None, ge=-1, description="How many tokens may be drawn.")
    min_p: float | None = Field(None, ge=0, le=1, description="Least probability, relative to the greatest.")
    frequency_penalty: float | None = Field(None, description="-2 to 2.")
    presence_penalty: float | None = Field(None, description="-2 to 2.")
    repetition_penalty: float | None = Field(None, gt=0, description="1 is none.")
    logprobs: int | None = Field(None, ge=0, description="Log probabilities a token.")
    extra_body: Json[dict[str, Any]] | None = Field(None, description="JSON object merged into each request.")


class ReportOptions(Options):
    title: ClassVar[str] = "Report"

    percentile_metrics: str = Field("ttft,tpot,itl", description="What is reported, of ttft, tpot, itl, e2el.")
    metric_percentiles: str = Field("99", description="Which percentiles, as 50,90,99.")
    goodput: list[str] | None = Field(
        None, description="Objectives in ms, as ttft:200 tpot:50 e2el:5000; requests that meet all are counted."
    )
    save_result: bool = Field(False, description="Write the result to a JSON file.")
    append_result: bool = Field(False, description="Append the result to the file, as one more line.")
    save_detailed: bool = Field(False, description="With the times, lengths, texts and errors of each request.")
    result_dir: Path | None = Field(None, description="Folder of that file. Default: here.")
    result_filename: str | None = Field(None, description="Name of that file. Default: label, rate, model and date.")
    label: str | None = Field(None, description="Beginning of the file's name. Default: the backend.")
    metadata: list[str] | None = Field(None, description="KEY=VALUE pairs that the file will hold too.")


class ServeOptions(ReportOptions, SamplingOptions, RunOptions, DatasetOptions, TrafficOptions, ServerOptions):
    """All groups of `nonet bench serve`."""
