"""`nonet bench`: options, mistakes, help, and each benchmark once on the shipped model."""

from __future__ import annotations

import json

import pytest

from nonet.bench import arguments, latency, report, throughput, trtllm
from nonet.bench.metrics import Outcome
from nonet.bench.options import LatencyOptions, ServeOptions, ThroughputOptions
from nonet.bench.trtllm import TrtllmOptions
from nonet.cli.bench import engine_config, main
from nonet.config import build_config
from nonet.config.checkpoint import SHIPPED
from nonet.errors import ConfigError, NonetError
from tests.bench.pretend_server import Elsewhere

SMALL = ["--dtype", "float32", "--num-blocks", "64"]


# ---------------------------------------------------------------- options


def test_flags_become_values_and_the_rest_stays_in_order():
    options, rest = arguments.read(
        ServeOptions,
        ["--request-rate", "inf", "--goodput", "ttft:200", "tpot:50", "--ignore_eos", "-tp", "2", "--max_concurrency=8",
         "--extra-body", '{"a": 1}', "--eplb-config.window_size", "5", "--percentile-metrics=ttft,e2el"],
    )  # fmt: skip
    assert (options.request_rate, options.max_concurrency, options.ignore_eos) == (float("inf"), 8, True)
    assert (options.goodput, options.extra_body) == (["ttft:200", "tpot:50"], {"a": 1})
    assert rest == ["-tp", "2", "--eplb-config.window_size", "5"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-prompts", "x"], "--num-prompts = 'x': input should be a valid integer, unable to parse string as an"),
        (["--num-prompts", "0"], "--num-prompts = '0': input should be greater than or equal to 1"),
        (["--num_prompts", "--seed", "1"], "--num_prompts = None: needs a value"),
        (["--goodput"], "--goodput = None: needs one value or more"),
        (["--seed", "1", "--seed", "2"], "--seed = None: is given twice; give it once"),
        (["--dataset-name", "imagenet"], "--dataset-name = 'imagenet': input should be 'random', 'sharegpt', 'sonnet'"),
        (["--random-range-ratio", "1"], "--random-range-ratio = '1': input should be less than 1"),
        (["--extra-body", "{"], "--extra-body = '{': invalid JSON: EOF while parsing an object"),
        (["--port", "70000"], "--port = '70000': input should be less than or equal to 65535"),
    ],
)
def test_bad_values_name_the_flag(words, message):
    with pytest.raises(ConfigError) as caught:
        arguments.read(ServeOptions, words)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("kind", [ServeOptions, ThroughputOptions, LatencyOptions, TrtllmOptions])
def test_help_names_every_option_once(kind):
    text = arguments.help_text(kind, "nonet bench x", "About.")
    flags = [word for line in text.splitlines() for word in line.split()[:1] if word.startswith("--")]
    assert sorted(flags) == sorted(arguments.flag_of(kind, name) for name in kind.model_fields)
    assert max(map(len, text.splitlines())) <= arguments.WIDTH


@pytest.mark.parametrize(
    "words",
    [[], ["--help"], ["serve", "--help"], ["throughput", "-h"], ["latency", "--help"],
     ["--model", "x", "throughput", "--help"]],
)  # fmt: skip
def test_help(words, capsys):
    assert main(words) == 0
    out = capsys.readouterr()
    assert out.out.startswith("Usage: nonet bench ")
    assert out.err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serv"], "bench = 'serv': no such benchmark; did you mean 'serve'?"),
        (["serve", "--max-concurency", "3"],
         "--max-concurency = None: no option of bench serve; did you mean '--max-concurrency'?"),
        (["serve", "--use-beam-search"], "--use-beam-search = None: is not supported: there is no beam search"),
        (["throughput", "--model", "nonet-tiny", "--num-promts", "3"],
         "--num-promts = '3': unknown flag; did you mean --num-prompts?"),
        (["throughput", "--model", "nowhere"],
         "model = 'nowhere': no such folder; give a checkpoint's folder or one of: nonet-tiny"),
        (["throughput", "--model", "nonet-tiny", "--input-len", "2000", "--output-len", "100"],
         "request 0 = '2000 + 100 tokens': exceeds max_model_len (2048); ask for shorter ones"),
        (["throughput", "--backend", "hf"], "--backend = 'hf': input should be 'nonet' or 'vllm'"),
        (["throughput", "--output-json", "/no/where.json"],
         "--output-json = '/no/where.json': there is no folder /no; make it first"),
        (["latency", "--output-json", "/tmp"], "--output-json = '/tmp': is a folder; give a file"),
        (["latency", "--model", "nonet-tiny", "--input-len", "3000"],
         "request 0 = '3000 + 128 tokens': exceeds max_model_len (2048); ask for shorter ones"),
        (["--model", "x", "latency"], "bench = 'latency': with --model before it there is only throughput"),
        (["--model", "x"], "bench = '--model x': names no benchmark; use " + "nonet bench --model NAME"),
        (["--model", "x", "throughput", "--tp", "2"], "--dataset = None: is required"),
        *((["--model", "x", "throughput", f"--{word}", "1"], f"--{word} = None: is not supported: {why}")
          for word, why in trtllm.REFUSED.items()),
        (["--model", "nonet-tiny", "throughput", "--dataset", "/no.jsonl"],
         "--dataset = '/no.jsonl': cannot be read: No such file or directory"),
        (["--model", "nonet-tiny", "throughput", "--dataset", "x", "--backend", "tensorrt"],
         "--backend = 'tensorrt': "),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NonetError) as caught:
        main(words)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


# ---------------------------------------------------------------- in this process


def test_throughput(tmp_path, capsys):
    path = tmp_path / "out.json"
    words = ["--input-len", "6", "--output-len", "4", "--num-prompts", "5", "--num-warmups", "1", "--n", "2"]
    assert main(["throughput", "--model", "nonet-tiny", *words, *SMALL, "--output-json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert (found["num_requests"], found["total_num_tokens"]) == (5, 5 * 6 + 2 * 5 * 4)
    assert found["tokens_per_second"] == pytest.approx(70 / found["elapsed_time"])
    assert found["requests_per_second"] == pytest.approx(5 / found["elapsed_time"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"Throughput: {found['requests_per_second']:.2f} requests/s, {found['tokens_per_second']:.2f} total tokens/s, "
        f"{40 / found['elapsed_time']:.2f} output tokens/s"
    )
    assert lines[1:] == ["Total num prompt tokens:  30", "Total num output tokens:  40"]


def test_throughput_through_the_async_engine(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(throughput, "drive", _watched(throughput.drive, seen))
    words = ["--input-len", "6", "--output-len", "4", "--num-prompts", "3", "--num-warmups", "2", "--async-engine"]
    assert main(["throughput", "nonet-tiny", *words, *SMALL]) == 0
    warm, run = seen
    assert [len(warm[0]), len(run[0])] == [2, 3]
    for outcome in run[0]:
        assert (outcome.error, outcome.prompt_len, outcome.output_len) == ("", 6, 4)
        assert 0 < outcome.ttft <= outcome.latency
        assert outcome.latency == pytest.approx(outcome.ttft + sum(outcome.itls), abs=0.05)
    assert "Total num output tokens:  12" in capsys.readouterr().out


def _watched(drive, seen):
    async def call(*args, **more):
        seen.append(await drive(*args, **more))
        return seen[-1]

    return call


def test_latency(tmp_path, capsys):
    path = tmp_path / "out.json"
    words = ["--input-len", "4", "--output-len", "3", "--batch-size", "2"]
    words += ["--num-iters", "3", "--num-iters-warmup", "1"]
    assert main(["latency", "--model", "nonet-tiny", *words, *SMALL, "--output-json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert len(found["latencies"]) == 3
    assert found["avg_latency"] == pytest.approx(sum(found["latencies"]) / 3)
    assert list(found["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert found["percentiles"]["50"] == sorted(found["latencies"])[1]
    out = capsys.readouterr().out
    assert out.startswith(f"Avg latency: {found['avg_latency']} seconds\n10% percentile latency: ")


def test_latency_arithmetic():
    run = latency.LatencyRun([1.0, 2.0, 3.0, 4.0, 5.0])
    assert run.result["avg_latency"] == 3
    assert run.percentiles == {10: 1.4, 25: 2, 50: 3, 75: 4, 90: 4.6, 99: 4.96}


# ---------------------------------------------------------------- TensorRT-LLM's form

OPTIONS = """
enable_attention_dp: true
cuda_graph_config: {}
moe_config:
    backend: WideEP
    max_num_tokens: 8192
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "extra_llm_api_options.yaml").write_text(OPTIONS)
    lines = [
        {"task_id": 0, "prompt": "In the beginning", "output_tokens": 3},
        {"task_id": 1, "input_ids": [5, 6, 7, 8], "output_tokens": 5},
        {"task_id": 2, "input_ids": [9, 10], "output_tokens": 2},
    ]
    (tmp_path / "dataset.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def spec_command(ranks: int) -> list[str]:
    """The command of TensorRT-LLM's guide to its expert-parallel load balancer."""
    return (
        f"--model NAME --model_path {SHIPPED / 'nonet-tiny'} throughput --tp {ranks} --ep {ranks} "
        "--extra_llm_api_options ./extra_llm_api_options.yaml --kv_cache_free_gpu_mem_fraction 0.75 "
        "--dataset ./dataset.json --warmup 0 --eos_id -1"
    ).split()


@pytest.mark.parametrize("ranks", [32, 36])
def test_the_guides_command_means_what_it_says(folder, ranks):
    words = spec_command(ranks)
    words.remove("throughput")
    options, rest = arguments.read(TrtllmOptions, words, refused=trtllm.REFUSED)
    assert (options.warmup, options.eos_id, str(options.dataset)) == (0, -1, "dataset.json")
    more = ["--max_num_tokens", "256", "--max_batch_size=16"]
    config = engine_config(trtllm.engine_arguments([*rest, *more]), TrtllmOptions)
    assert (config.parallel.tensor_parallel_size, config.parallel.data_parallel_size) == (1, ranks)
    assert config.parallel.enable_expert_parallel
    assert (config.moe.max_num_tokens, config.cache.kv_cache_free_gpu_memory_fraction) == (8192, 0.75)
    assert (config.schedule.max_num_batched_tokens, config.schedule.max_num_seqs) == (256, 16)


def test_the_guides_command_runs_on_two_ranks(folder, capsys):
    words = ["--streaming", "--concurrency", "2", "--report_json", "report.json", "--backend", "pytorch"]
    assert main([*spec_command(2), *words, *SMALL]) == 0
    found = json.loads((folder / "report.json").read_text())
    assert found["world_info"] | {"max_batch_size": 0, "max_num_tokens": 0} == {
        "tp_size": 1, "dp_size": 2, "pp_size": 1, "ep_size": 2, "world_size": 2, "max_batch_size": 0,
        "max_num_tokens": 0,
    }  # fmt: skip
    assert (found["request_info"]["num_requests"], found["request_info"]["num_failed_requests"]) == (3, 0)
    assert found["request_info"]["avg_output_length"] == pytest.approx(10 / 3)
    speed, streaming = found["performance"], found["streaming_metrics"]
    assert speed["system_output_throughput_tok_s"] == pytest.approx(10 / speed["total_latency_ms"] * 1000)
    assert speed["output_throughput_per_gpu_tok_s"] == pytest.approx(speed["system_output_throughput_tok_s"] / 2)
    assert 0 < streaming["avg_ttft_ms"] <= speed["avg_request_latency_ms"]
    out = capsys.readouterr().out
    for label in ("= PERFORMANCE OVERVIEW", "Request Throughput (req/sec):", "[TTFT] P99    :", "[Latency] AVERAGE:"):
        assert label in out


def test_its_figures_by_hand():
    options = TrtllmOptions(dataset="x", streaming=True)
    config = build_config("nonet-tiny", data_parallel_size=2, enable_expert_parallel=True)
    done = [
        Outcome(prompt_len=10, output_len=5, ttft=0.2, latency=1.0), Outcome(prompt_len=20, output_len=1, ttft=0.4,
        latency=0.4), Outcome(error="no", prompt_len=7, output_len=7, latency=7.0),
    ]  # fmt: skip
    found = trtllm.report(options, config, done, 2.0)
    speed, streaming = found["performance"], found["streaming_metrics"]
    assert found["request_info"] == {
        "num_requests": 2, "num_failed_requests": 1, "avg_num_concurrent_requests": 0.7, "avg_input_length": 15,
        "avg_output_length": 3,
    }  # fmt: skip
    assert speed["request_throughput_req_s"] == 1
    assert speed["system_output_throughput_tok_s"] == 3
    assert speed["system_total_throughput_tok_s"] == 18
    assert speed["output_throughput_per_user_tok_s"] == pytest.approx((5 + 2.5) / 2)
    assert speed["output_throughput_per_gpu_tok_s"] == 1.5
    assert speed["request_latency_percentiles_ms"]["maximum"] == pytest.approx(1000)
    assert streaming["avg_ttft_ms"] == pytest.approx(300)
    assert streaming["avg_tpot_ms"] == pytest.approx(200)
    assert streaming["token_output_speed_tok_s"] == pytest.approx(5)
    assert "streaming_metrics" not in trtllm.report(TrtllmOptions(dataset="x"), config, done, 2.0)


def test_another_eos_ends_outputs():
    params = trtllm.params_for(TrtllmOptions(dataset="x", eos_id=7), trtllm.Sample([1], 1, 9))
    assert (params.ignore_eos, params.stop_token_ids, params.max_tokens) == (True, [7], 9)
    assert trtllm.params_for(TrtllmOptions(dataset="x"), trtllm.Sample([1], 1, 9)).stop_token_ids == []


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ('{"task_id": 1, "output_tokens": 3}', {}, 'needs a "prompt" that is text, or "input_ids"'),
        ('{"input_ids": ["a"], "output_tokens": 3}', {}, 'needs a "prompt" that is text, or "input_ids"'),
        ('{"prompt": "a", "output_tokens": 0}', {}, 'needs "output_tokens", a count of 1 or more'),
        ('{"input_ids": [1], "output_tokens": 3}', {"num_requests": 2}, "holds 1 requests; give one with more"),
        ("", {}, "holds 0 requests; give one with more"),
    ],
)
def test_broken_data_sets(tmp_path, text, more, message):
    path = tmp_path / "dataset.json"
    path.write_text(text)
    words = throughput.words_of(build_config("nonet-tiny"))[0]
    with pytest.raises(ConfigError, match=message) as caught:
        trtllm.dataset(TrtllmOptions(dataset=path, **more), words, 100)
    assert caught.value.field == "--dataset"


# ---------------------------------------------------------------- a server


def test_serve_prints_the_table_and_writes_the_file(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    words = ["--num-prompts", "3", "--input-len", "5", "--output-len", "4", "--goodput", "e2el:60000", "--save-result"]
    words += ["--result-dir", str(tmp_path), "--result-filename", "r.json", "--metadata", "tp=1", "--max-concurrency=2"]
    words += ["--percentile-metrics", "ttft,e2el", "--metric-percentiles", "50,99.9"]
    with Elsewhere() as port:
        assert main(["serve", "--port", str(port), *words]) == 0
        assert main(["serve", "--port", str(port), *words, "--append-result"]) == 0
    first, second = (tmp_path / "r.json").read_text().replace("}\n{", "}\n\f{").split("\f")
    found = json.loads(first)
    assert (found["completed"], found["tp"], json.loads(second)["completed"]) == (3, "1", 3)
    assert "p99.9_e2el_ms" in found
    assert "ttfts" not in found
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert lines[1] == "Successful requests:                     3         "
    assert lines[3] == "Maximum request concurrency:             2         "
    assert "---------------Time to First Token----------------" in lines
    assert f"{'P99.9 E2EL (ms):':<40} {found['p99.9_e2el_ms']:<10.2f}" in lines
    assert f"{'Request goodput (req/s):':<40} {found['request_goodput']:<10.2f}" in lines
    assert not any("TPOT" in line for line in lines)


def test_serve_fails_only_if_all_failed(tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "refused"}\n{"prompt": "fine"}\n')
    words = ["--model", "nonet-tiny", "--dataset-name", "custom", "--dataset-path", str(path), "--disable-shuffle"]
    with Elsewhere() as port:
        assert main(["serve", "--port", str(port), *words, "--num-prompts", "2"]) == 0
        err = capsys.readouterr().err
        assert main(["serve", "--port", str(port), *words, "--num-prompts", "1"]) == 1
    last = err.splitlines()[-1]
    assert last == "error: 1 of 2 requests failed; the first: HTTP 400 Whatever: temperature = -1: use 0 or more"
    out = capsys.readouterr()
    assert "error: 1 of 1 requests failed" in out.err
    assert "TTFT" not in out.out


def test_files_are_refused_before_the_run(tmp_path):
    report.check_writable("--x", None)
    report.check_writable("--x", tmp_path / "new.json")
    with pytest.raises(ConfigError, match="is a folder"):
        report.check_writable("--x", tmp_path)
    with pytest.raises(ConfigError, match="cannot be written: Is a directory"):
        report.write_json("--x", tmp_path, {})
