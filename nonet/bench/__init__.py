"""Benchmarks: how fast the engine is in this process, and how fast a server answers. See docs/bench.md."""
