"""What all that was said comes to: one configuration, and where each of its values came from.

Precedence: command line > files > environment > default. Words that contradict each other in one place are refused,
as are words whose feature is not built. Used by the command line. Knows no model and no machine.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nonet.config import env
from nonet.config.dialects.arguments import split_arguments
from nonet.config.dialects.files import BALANCER, balancer_file, read_file
from nonet.config.dialects.words import FILES, GRAPHS, NODES, Said, Word, lookup
from nonet.config.load import build_config, leaves
from nonet.config.schema import EngineConfig
from nonet.errors import ConfigError

TP, DP, EP = "parallel.tensor_parallel_size", "parallel.data_parallel_size", "parallel.enable_expert_parallel"
MODEL, NAMES = "model.model", "server.served_model_name"
EP_SIZE = ("ep", "ep_size", "moe_expert_parallel_size")
MOE_BACKENDS = ("AUTO", "CUTEDSL", "CUTLASS", "TRTLLM", "WIDEEP")


@dataclass(frozen=True)
class Given:
    """A configuration as it was asked for: nothing is resolved yet."""

    config: EngineConfig
    origin: dict[str, str]  # dotted setting -> "--dtype", "wide_ep.yaml: moe_config.backend", a variable, "default"
    notes: list[str]  # for the user to read: what a word came to that was not its plain meaning


def read_arguments(arguments: Sequence[str], *, known: Collection[str] = ()) -> Given:
    """The configuration that a command line asks for: flags of ours and of both dialects, and one MODEL.

    `known` are flags that the caller reads itself and has taken out; an unknown flag may be near one of them.
    Raises ConfigError: one line with field, value and remedy.
    """
    said, rest = split_arguments(arguments, near=known)
    if len(rest) > 1:
        raise ConfigError("MODEL", " ".join(rest), "give one model; quote values that hold spaces")
    return read_said([*(Said("model", model, "MODEL") for model in rest), *said])


def read_said(said: Sequence[Said]) -> Given:
    """The same from what was taken out of a command line."""
    from_files = [one for file in said if file.word in FILES for one in read_file(str(file.value), file.origin)]
    from_flags: list[Said] = []
    for one in said:
        if one.word == BALANCER:
            from_flags += balancer_file(one, Path())
        elif one.word not in FILES:
            from_flags.append(one)
    meant = {**_one_level(from_files), **_one_level(from_flags)}
    _refuse_missing(meant)
    sums = _Sums(meant)
    sums.add_up()
    return _build(sums.values, sums.notes)


def _one_level(said: Sequence[Said]) -> dict[str, Said]:
    """What is said for each setting, or word without one, in one place. Raises ConfigError for contradictions."""
    meant: dict[str, Said] = {}
    for one in said:
        found = lookup(one.word)
        key = one.word
        if isinstance(found, Word) and one.value is None:
            continue  # null in their files: nothing is asked for
        if isinstance(found, str):
            key = found
        elif found is not None and found.setting:
            target = lookup(found.setting)
            assert isinstance(target, str)
            key = target
        elif one.word in EP_SIZE:
            key = EP_SIZE[0]
        elif one.word == "moe_backend":
            key = "moe_config.backend"
        before = meant.get(key)
        if before is None:
            meant[key] = one
        elif not _same(before.value, one.value):
            remedy = f"is given twice, also with {before.value!r}; give it once"
            if before.origin != one.origin:
                remedy = f"says the same as {before.origin}, which is {before.value!r}; give one of the two"
            raise ConfigError(one.origin, one.value, remedy)
    return meant


def _same(a: object, b: object) -> bool:
    return a.lower() == b.lower() if isinstance(a, str) and isinstance(b, str) else a == b


def _refuse_missing(meant: Mapping[str, Said]) -> None:
    for one in meant.values():
        word = lookup(one.word)
        if isinstance(word, Word) and word.feature and not word.accepts(one.value):
            remedy = "leave it out"
            if word.unless and word.unless[0] is not False:
                first = word.unless[0]
                remedy = f"use {str(first).lower() if isinstance(first, bool) else first}, or leave it out"
            raise ConfigError(one.origin, one.value, f"not built yet: {word.feature}; {remedy}")


@dataclass
class _Sums:
    """Words that have a meaning only together, turned into settings."""

    meant: dict[str, Said]
    values: dict[str, tuple[object, str]] = field(default_factory=dict)  # dotted setting -> value, where it came from
    notes: list[str] = field(default_factory=list)

    def add_up(self) -> None:
        for key, one in self.meant.items():
            if isinstance(lookup(key), str):
                self.values[key] = (one.value, one.origin)
        if "max_num_tokens" in self.meant:
            one = self.meant["max_num_tokens"]
            remedy = "means two things: tokens of a step are max_num_batched_tokens, of a MoE pass moe.max_num_tokens"
            raise ConfigError(one.origin, one.value, remedy)
        self._model()
        self._ranks()
        self._experts()
        self._graphs()

    def _model(self) -> None:
        """TensorRT-LLM's benchmark names the folder beside the model's name."""
        path = self.meant.get("model_path")
        if path is None:
            return
        if MODEL in self.values and NAMES not in self.values:
            name, origin = self.values[MODEL]
            self.values[NAMES] = ([name], origin)
        self.values[MODEL] = (path.value, path.origin)

    def _ranks(self) -> None:
        """Attention data parallelism turns TensorRT-LLM's tensor-parallel ranks into data-parallel ones."""
        attention = self.meant.get("enable_attention_dp")
        if attention is not None and _truth(attention):
            ranks, origin = self.values.get(TP, (1, attention.origin))
            if DP not in self.values:
                both = origin if origin == attention.origin else f"{origin} with {attention.origin}"
                self.values[DP], self.values[TP] = (ranks, both), (1, both)
            elif self._count(TP) > 1:
                remedy = f"{self.values[DP][1]} is given too; give {origin} alone, which then counts those ranks"
                raise ConfigError(attention.origin, True, remedy)
        local = self.meant.get("data_parallel_size_local")
        if local is not None and local.value != self._count(DP):
            remedy = f"not built yet: {NODES}; use {self._count(DP)}, the data-parallel size, or leave it out"
            raise ConfigError(local.origin, local.value, remedy)

    def _experts(self) -> None:
        """Expert parallelism is over all ranks or none; WIDEEP asks for it."""
        size, backend = self.meant.get("ep"), self.meant.get("moe_config.backend")
        world = self._count(TP) * self._count(DP)
        wide: tuple[bool, Said] | None = None
        if size is not None and size.value != -1:  # -1: TensorRT-LLM's for "not given"
            if size.value not in (1, world):
                remedy = f"experts are spread over all {world} ranks or over none; use {world} or 1"
                raise ConfigError(size.origin, size.value, remedy if world > 1 else "there is one rank; use 1")
            wide = world > 1 and size.value == world, size
        if backend is not None:
            name = str(backend.value).upper()
            if name not in MOE_BACKENDS:
                raise ConfigError(backend.origin, backend.value, f"use one of: {', '.join(MOE_BACKENDS)}")
            if name == "WIDEEP":
                if world > 1 and wide is not None and not wide[0]:
                    raise ConfigError(backend.origin, backend.value, f"needs expert parallelism; {wide[1].origin} is 1")
                wide = wide if wide is not None and wide[0] else (True, backend)
            elif name != "AUTO":
                self._instead(backend, "names a kernel library that nonet does not use; expert_backend decides")
        if wide is not None:
            value, said = wide
            if world > 1 and EP in self.values and self.values[EP][0] is not value:
                raise ConfigError(said.origin, said.value, f"contradicts {self.values[EP][1]}; give one of the two")
            self.values.setdefault(EP, (value, said.origin))

    def _graphs(self) -> None:
        """An empty mapping only says that graphs are welcome."""
        graphs = self.meant.get("cuda_graph_config")
        if graphs is not None:
            if graphs.value != {}:
                raise ConfigError(graphs.origin, graphs.value, f"not built yet: {GRAPHS}; use {{}}, or leave it out")
            self._instead(graphs, f"not built yet: {GRAPHS}; steps run eagerly")

    def _instead(self, said: Said, what: str) -> None:
        """Say what happens instead, or refuse it where replacements are not wanted."""
        if self.values.get("runtime.strict", (False, ""))[0] is True:
            raise ConfigError(said.origin, said.value, f"{what}; leave it out, or start without --strict")
        self.notes.append(f"{said.origin} = {said.value!r}: {what}")

    def _count(self, setting: str) -> int:
        value, origin = self.values.get(setting, (1, ""))
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(origin, value, "use a positive count")
        return value


def _truth(said: Said) -> bool:
    if not isinstance(said.value, bool):
        raise ConfigError(said.origin, said.value, "use true or false")
    return said.value


def _build(values: Mapping[str, tuple[object, str]], notes: list[str]) -> Given:
    """Validate; a bad value is told with the word it came by."""
    if MODEL not in values:
        raise ConfigError("MODEL", None, "give the folder of a checkpoint, or nonet-tiny, which is shipped")
    said_in = {leaves()[leaf]: env.variable_of(leaf) for leaf in env.settings()}
    origin = {dotted: said_in.get(dotted, "default") for dotted in leaves().values()}
    origin |= {dotted: where for dotted, (_, where) in values.items()}
    try:
        config = build_config(**{dotted: value for dotted, (value, _) in values.items()})
    except ConfigError as error:
        place = next((d for d in values if error.field == d or error.field.startswith(f"{d}.")), None)
        if place is None:
            raise
        raise ConfigError(origin[place], error.value, error.remedy) from error
    return Given(config, origin, notes)
