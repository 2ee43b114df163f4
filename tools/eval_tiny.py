"""Evaluates nonet-tiny on the shipped held-out text, on the CPU, and writes the tables into its card.

Parts: bits per byte against a 5-gram of the same tokens (needs --data, the training tokens), expert load
over expert-parallel ranks by kind of text, and unpicked samples with fixed seeds. The model runs in
transformers in float32, so this also shows that the folder loads unchanged.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ngram import KneserNey
from numpy.typing import NDArray
from train_tiny import KINDS
from transformers import AutoModelForCausalLM, AutoTokenizer

Table = list[list[str]]
Ids = NDArray[np.uint16]


def heldout(folder: Path, kind: str) -> list[str]:
    """The documents of one file; a line with a form feed divides them."""
    return (folder / f"{kind}.txt").read_text("utf-8").rstrip("\n").split("\n\f\n")


def stream(tok: Any, docs: list[str]) -> tuple[Ids, int]:
    """Token ids with <|endoftext|> before, between and after the documents, and the bytes of the text."""
    ids = [0]
    for d in docs:
        ids += [*tok.encode(d, add_special_tokens=False), 0]
    return np.array(ids, np.uint16), sum(len(d.encode()) for d in docs)


@torch.no_grad()
def run_model(model: Any, ids: Ids, window: int, stride: int) -> tuple[float, NDArray[np.int64]]:
    """Bits of all text tokens, and how often each expert of each layer was chosen.

    Windows overlap, so every token has at least window - stride tokens before it once there are so many;
    each token is scored and counted in one window only.
    """
    cfg = model.config
    t = torch.from_numpy(ids.astype(np.int64))
    counts = np.zeros((cfg.num_hidden_layers, cfg.num_experts), np.int64)
    bits, done = 0.0, 0
    for begin in range(0, len(t) - 1, stride):
        x = t[begin: begin + window + 1]
        new = len(x) - 1 - max(0, done - begin)
        out = model(x[None, :-1], output_router_logits=True)
        lp = torch.log_softmax(out.logits[0, -new:].float(), -1)
        y = x[-new:]
        nll = -lp.gather(-1, y[:, None])[:, 0] / np.log(2)
        bits += float(nll[y != 0].sum())
        for layer, r in enumerate(out.router_logits):
            top = r[-new:].float().topk(cfg.num_experts_per_tok, -1).indices
            counts[layer] += np.bincount(top.flatten().numpy(), minlength=cfg.num_experts)
        done = begin + len(x) - 1
        if done >= len(t) - 1:
            break
    return bits, counts


def five_gram(data: Path, streams: dict[str, tuple[Ids, int]], vocab: int) -> dict[str, list[float]]:
    """Bits per byte by kind: [trained on all kinds, trained on this kind]."""
    train = {k: np.load(data / f"{k}.train.npy") for k in KINDS}

    def bpb(m: KneserNey, kind: str) -> float:
        ids, n = streams[kind]
        return float(-m.logprobs(ids)[ids[1:] != 0].sum() / n)

    both = KneserNey(np.concatenate([train[k] for k in KINDS]), vocab)
    res = {k: [bpb(both, k)] for k in KINDS}
    del both
    for k in KINDS:
        res[k].append(bpb(KneserNey(train[k], vocab), k))
        print("5-gram", k, [round(v, 4) for v in res[k]], flush=True)
    return res


def imbalance(counts: NDArray[np.int64], ranks: int) -> NDArray[np.float64]:
    """(max - mean) / mean of the tokens a rank gets, by layer, with contiguous placement."""
    per_rank = counts.reshape(len(counts), ranks, -1).sum(-1).astype(float)
    return (per_rank.max(-1) - per_rank.mean(-1)) / per_rank.mean(-1)


@torch.no_grad()
def samples(model: Any, tok: Any, docs: list[str], seeds: int, new: int) -> list[tuple[str, str]]:
    """Sample i continues the first words of held-out document i with seed i at temperature 0.8."""
    out = []
    for seed in range(seeds):
        start = tok.encode(docs[seed % len(docs)], add_special_tokens=False)[:12]
        torch.manual_seed(seed)
        x = torch.tensor([[0, *start]])
        y = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=new, do_sample=True,
                           temperature=0.8, top_k=0, top_p=1.0)
        text = tok.decode(y[0, 1 + len(start):], skip_special_tokens=False)
        out.append((tok.decode(start), text))
    return out


def render(head: list[str], rows: Table) -> str:
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return "\n".join(lines + ["| " + " | ".join(r) + " |" for r in rows])


def put(card: Path, name: str, text: str) -> None:
    """Replaces what stands between the card's markers of this name."""
    s = card.read_text("utf-8")
    pat = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    if not pat.search(s):
        raise SystemExit(f"the card has no markers for {name}")
    card.write_text(pat.sub(lambda m: m[1] + text + "\n" + m[2], s), "utf-8")


def bpb_table(model_bpb: dict[str, float], grams: dict[str, list[float]],
              streams: dict[str, tuple[Ids, int]]) -> str:
    rows = []
    for k in KINDS:
        best = min(grams[k])
        rows.append([k, str(streams[k][1]), str(len(streams[k][0])), f"{model_bpb[k]:.3f}",
                     f"{grams[k][0]:.3f}", f"{grams[k][1]:.3f}", f"{model_bpb[k] / best:.3f}"])
    return render(["kind", "bytes", "tokens", "nonet-tiny", "5-gram, all kinds", "5-gram, this kind",
                   "nonet-tiny / stronger 5-gram"], rows)


def load_table(counts: dict[str, NDArray[np.int64]], ranks: int) -> str:
    layers = len(next(iter(counts.values())))
    rows = []
    for k, c in [*counts.items(), ("all kinds together", sum(counts.values()))]:
        v = imbalance(np.asarray(c), ranks)
        rows.append([k, *(f"{x:.2f}" for x in v), f"**{v.mean():.2f}**"])
    return render(["kind", *(f"layer {i}" for i in range(layers)), "mean"], rows)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", type=Path, default=Path("nonet/assets/nonet-tiny"))
    ap.add_argument("--heldout", type=Path, default=Path("nonet/assets/heldout"))
    ap.add_argument("--data", type=Path, help="training tokens; without them no 5-gram table")
    ap.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    ap.add_argument("--samples", type=int, default=3)
    ap.add_argument("--new-tokens", type=int, default=80)
    ap.add_argument("--json", type=Path, help="also write the numbers here")
    ap.add_argument("--no-card", action="store_true", help="print only")
    a = ap.parse_args()
    tok = AutoTokenizer.from_pretrained(a.model)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval()
    docs = {k: heldout(a.heldout, k) for k in KINDS}
    streams = {k: stream(tok, docs[k]) for k in KINDS}
    parts: dict[str, str] = {}
    bpb, counts = {}, {}
    for k in KINDS:
        bits, counts[k] = run_model(model, streams[k][0], 2048, 1024)
        bpb[k] = bits / streams[k][1]
        print("model", k, round(bpb[k], 4), flush=True)
    for r in a.ranks:
        parts[f"load{r}"] = load_table(counts, r)
    text = []
    for k in KINDS if a.samples else []:
        for i, (start, rest) in enumerate(samples(model, tok, docs[k], a.samples, a.new_tokens)):
            text.append(f"**{k}, seed {i}**\n\n````text\n{start}⟫{rest}\n````")
    if text:
        parts["samples"] = "\n\n".join(text)
    grams = five_gram(a.data, streams, model.config.vocab_size) if a.data else None
    if grams:
        parts["bpb"] = bpb_table(bpb, grams, streams)
    for name, body in parts.items():
        print(f"\n[{name}]\n{body}")
        if not a.no_card:
            put(a.model / "README.md", name, body)
    if a.json:
        a.json.write_text(json.dumps({"bpb": bpb, "five_gram": grams,
                                      "counts": {k: v.tolist() for k, v in counts.items()}}))


if __name__ == "__main__":
    main()
