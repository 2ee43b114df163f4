"""All compiled loops of the dispatch rules. Importing this compiles what no earlier process has: once, before ranks are
forked, which then have them."""

from nonet.eplb.dispatch import precompile

precompile()
