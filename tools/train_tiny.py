"""Trains nonet-tiny, a small real Mixture-of-Experts model, from the text that tools/tiny_corpus.py builds.

Steps, each re-runnable: `tokenizer` (byte-level BPE), `tokens` (uint16 files), `train` (one GPU for some
minutes; a trial: `--device cpu --steps 20 --seq 128 --valid-windows 2`), `save` (Hugging Face folder in
bf16). All randomness comes from --seed. tokenizer and tokens need `tokenizers`, save needs `safetensors`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_model import TinyConfig, TinyModel
from torch import Tensor

KINDS = ["english", "code", "german", "russian", "chinese", "math", "manual"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
           r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CHAT = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def documents(corpus: Path, kind: str, split: str) -> list[str]:
    with open(corpus / f"{kind}.{split}.jsonl", encoding="utf-8") as fh:
        return [json.loads(line)["text"] for line in fh]


def make_tokenizer(corpus: Path, out: Path, vocab: int, seed: int, sample_mb: float = 2.5) -> None:
    """Byte-level BPE over an equal share of every kind of text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    texts: list[str] = []
    for kind in KINDS:
        docs = documents(corpus, kind, "train")
        random.Random(seed).shuffle(docs)
        n = 0
        for d in docs:
            if n < sample_mb * 1e6:
                texts.append(d)
                n += len(d.encode())
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False, max_token_length=24))
    out.mkdir(parents=True, exist_ok=True)
    tok.save(str(out / "tokenizer.json"), pretty=False)
    (out / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048,
        "bos_token": None, "eos_token": SPECIAL[0], "pad_token": SPECIAL[0], "unk_token": None,
        "add_prefix_space": False, "clean_up_tokenization_spaces": False,
        "additional_special_tokens": SPECIAL[1:], "chat_template": CHAT}, indent=2) + "\n")
    print("tokenizer:", tok.get_vocab_size(), "entries")


def make_tokens(corpus: Path, tok_dir: Path, out: Path) -> None:
    """<|endoftext|> before every document and after the last; one file a kind and split."""
    from tokenizers import Tokenizer

    tok = Tokenizer.from_file(str(tok_dir / "tokenizer.json"))
    out.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, dict[str, int]] = {}
    for kind in KINDS:
        for split in ("train", "valid"):
            docs = documents(corpus, kind, split)
            ids: list[int] = [0]
            for enc in tok.encode_batch(docs, add_special_tokens=False):
                ids += enc.ids
                ids.append(0)
            np.save(out / f"{kind}.{split}.npy", np.array(ids, np.uint16))
            sizes[f"{kind}.{split}"] = {"tokens": len(ids), "bytes": sum(len(d.encode()) for d in docs)}
        print(kind, sizes[f"{kind}.train"], sizes[f"{kind}.valid"], flush=True)
    (out / "sizes.json").write_text(json.dumps(sizes, indent=1))


class Sampler:
    """Windows at random places; a window holds one kind of text, kinds in proportion to size ** power."""

    def __init__(self, data: Path, seq: int, device: str, seed: int, power: float) -> None:
        self.seq, self.device = seq, device
        parts = [np.load(data / f"{k}.train.npy") for k in KINDS]
        self.start = torch.tensor(np.cumsum([0] + [len(p) for p in parts[:-1]]), device=device)
        self.room = torch.tensor([len(p) - seq - 1 for p in parts], device=device)
        self.total = sum(len(p) for p in parts)
        self.tokens = torch.from_numpy(np.concatenate(parts).astype(np.int32)).to(device)
        self.share = torch.tensor([float(len(p)) ** power for p in parts], device=device)
        self.gen = torch.Generator(device).manual_seed(seed)
        self.span = torch.arange(seq + 1, device=device)

    def __call__(self, batch: int) -> tuple[Tensor, Tensor]:
        kind = torch.multinomial(self.share, batch, True, generator=self.gen)
        u = torch.rand(batch, generator=self.gen, device=self.device, dtype=torch.float64)
        at = self.start[kind] + (u * self.room[kind]).long()
        w = self.tokens[at[:, None] + self.span].long()
        return w[:, :-1], w[:, 1:]


@torch.no_grad()
def validate(model: Any, data: Path, seq: int, device: str, batch: int, limit: int = 0) -> dict[str, float]:
    """Bits per byte of each kind's validation text, in whole windows."""
    sizes = json.loads((data / "sizes.json").read_text())
    model.eval()
    out = {}
    for kind in KINDS:
        t = torch.from_numpy(np.load(data / f"{kind}.valid.npy").astype(np.int64))
        n = max(1, (len(t) - 1) // seq)
        n = min(n, limit) if limit else n
        x = t[: n * seq].view(n, seq).to(device)
        y = t[1: n * seq + 1].view(n, seq).to(device)
        nats = 0.0
        for i in range(0, n, batch):
            xi, yi = x[i: i + batch], y[i: i + batch]
            pad = batch - len(xi)  # one shape only, so that nothing is compiled twice
            xi, yi = (torch.cat([v, v.new_zeros(pad, seq)]) for v in (xi, yi))
            with torch.autocast(device, torch.bfloat16):
                loss, _ = model(xi, yi)
            nats += loss[: batch - pad].sum().item()
        per_byte = sizes[f"{kind}.valid"]["tokens"] / sizes[f"{kind}.valid"]["bytes"]
        out[kind] = nats / (n * seq) / math.log(2) * per_byte
    model.train()
    return out


def rate(progress: float, lr: float, warm: float = 0.02) -> float:
    """Linear warm-up, then cosine to 2 % of the peak."""
    if progress < warm:
        return lr * (progress + 1e-3) / warm
    p = min(1.0, (progress - warm) / (1 - warm))
    return lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * p)))


def optimizer(model: TinyModel, decay: float, fused: bool) -> torch.optim.AdamW:
    mats = [p for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.dim() <= 1 or "embed" in n]
    return torch.optim.AdamW([{"params": mats, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}],
                             lr=1e-3, betas=(0.9, 0.95), eps=1e-10, fused=fused)


def keep_best(net: Any, model: TinyModel, a: argparse.Namespace, step: int, best: float) -> dict[str, Any]:
    """Validates; saves best.pt when the mean over the kinds is better than `best`."""
    bpb = validate(net, a.data, a.seq, a.device, a.valid_batch, a.valid_windows)
    mean = sum(bpb.values()) / len(bpb)
    print("valid", round(mean, 4), {k: round(v, 4) for k, v in bpb.items()}, flush=True)
    if mean < best:
        torch.save({"model": model.state_dict(), "step": step, "valid": bpb}, a.out / "best.pt")
    return {"valid": {k: round(v, 4) for k, v in bpb.items()}, "valid_mean": round(mean, 4)}


def train(a: argparse.Namespace) -> None:
    torch.manual_seed(a.seed)
    torch.set_float32_matmul_precision("high")
    cfg = TinyConfig(dropout=a.dropout)
    model = TinyModel(cfg).to(a.device)
    step_model: Any = torch.compile(model, dynamic=False) if a.compile else model
    opt = optimizer(model, a.decay, a.device == "cuda")
    sample = Sampler(a.data, a.seq, a.device, a.seed, a.power)
    n_par = sum(p.numel() for p in model.parameters())
    info = {"options": {k: str(v) for k, v in vars(a).items()}, "parameters": n_par,
            "torch": torch.__version__, "train_tokens": sample.total,
            "device": torch.cuda.get_device_name() if a.device == "cuda" else "cpu"}
    print(json.dumps(info), flush=True)
    a.out.mkdir(parents=True, exist_ok=True)
    log: list[dict[str, Any]] = []
    best, t0, first = 9e9, time.time(), 0.0
    step = 0
    while True:
        if step == 3:
            first = time.time()  # after compilation
        used = (time.time() - first) / 60 if step >= 3 else 0.0
        progress = max(step / a.steps, used / a.minutes)
        done = progress >= 1
        if (step % a.every == 0 and step) or done:
            log = log or [{"step": step}]
            log[-1] |= keep_best(step_model, model, a, step, best)
            best = min(best, log[-1]["valid_mean"])
        if done:
            break
        for g in opt.param_groups:
            g["lr"] = rate(progress, a.lr)
        x, y = sample(a.batch)
        with torch.autocast(a.device, torch.bfloat16):
            loss, aux = step_model(x, y)
            total = loss.mean() + a.aux * aux
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        step += 1
        if step % a.log_every == 0:
            log.append({"step": step, "seconds": round(time.time() - t0, 1),
                        "loss": round(loss.mean().item(), 4), "aux": round(aux.item(), 3),
                        "norm": round(norm.item(), 2), "lr": opt.param_groups[0]["lr"]})
            speed = (step - 3) * a.batch * a.seq / max(1e-3, time.time() - first) if step > 3 else 0
            print(*(f"{k} {v:.5g}" for k, v in log[-1].items()), f"tokens/s {speed:.4g}", flush=True)
    info |= {"steps": step, "epochs": round(step * a.batch * a.seq / sample.total, 2),
             "seconds": round(time.time() - t0, 1), "log": log}
    (a.out / "train.json").write_text(json.dumps(info))


def save(checkpoint: Path, out: Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors of the best state."""
    from safetensors.torch import save_file

    cfg = TinyConfig()
    model = TinyModel(cfg)
    model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["model"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(cfg.hf(), indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": 0, "pad_token_id": 0}, indent=2) + "\n")
    save_file(model.export(), str(out / "model.safetensors"), metadata={"format": "pt"})
    print("saved", (out / "model.safetensors").stat().st_size, "bytes")


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("step", choices=["tokenizer", "tokens", "train", "save"])
    ap.add_argument("--corpus", type=Path, default=Path("build/tiny/corpus"), help="from tiny_corpus.py")
    ap.add_argument("--data", type=Path, default=Path("build/tiny/tokens"), help="folder of the token files")
    ap.add_argument("--model", type=Path, default=Path("nonet/assets/nonet-tiny"), help="folder that ships")
    ap.add_argument("--out", type=Path, default=Path("build/tiny/run"), help="best.pt and train.json go here")
    ap.add_argument("--vocab", type=int, default=8192)
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    ap.add_argument("--steps", type=int, default=8000, help="length of the schedule")
    ap.add_argument("--minutes", type=float, default=8.0, help="the schedule never takes longer than this")
    ap.add_argument("--batch", type=int, default=32, help="windows a step")
    ap.add_argument("--valid-batch", type=int, default=8)
    ap.add_argument("--valid-windows", type=int, default=0, help="validate on so many windows only (trials)")
    ap.add_argument("--seq", type=int, default=2048)
    ap.add_argument("--lr", type=float, default=3e-3)
    ap.add_argument("--decay", type=float, default=0.1)
    ap.add_argument("--dropout", type=float, default=0.1)
    ap.add_argument("--aux", type=float, default=0.001, help="weight of the load-balance loss")
    ap.add_argument("--power", type=float, default=0.8, help="kinds are drawn by size to this power")
    ap.add_argument("--every", type=int, default=500, help="steps between validations")
    ap.add_argument("--log-every", type=int, default=100)
    ap.add_argument("--compile", action="store_true")
    a = ap.parse_args()
    if a.step == "tokenizer":
        make_tokenizer(a.corpus, a.model, a.vocab, a.seed)
    elif a.step == "tokens":
        make_tokens(a.corpus, a.model, a.data)
    elif a.step == "train":
        train(a)
    else:
        save(a.out / "best.pt", a.model)


if __name__ == "__main__":
    main()
