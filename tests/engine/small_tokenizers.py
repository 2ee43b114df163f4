"""Real tokenizers made in a moment: byte-level BPE as Qwen's, bare bytes, and SentencePiece's with byte fallback."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from nonet.engine.tokenizer import Tokenizer

TEXT = """
The expert sees only the tokens that the router sends to it. Thirty-two experts stand in a row, and four of them answer.
When nobody speaks, everyone sleeps; the first who hears something wakes the others. It was the best of times.
Der Löwe fraß zwölf süße Äpfel, während über dem Fluß die Störche kreisten. Größe ist nicht alles, sagte die Ärztin.
Où est passé l'été? Les élèves naïfs mangent des crêpes à Nîmes; ça coûte déjà très cher, garçon!
Быстрая бурая лиса прыгает через ленивую собаку. Учитель сказал: сегодня мы будем читать вслух.
今天天气很好，我们去公园散步吧。专家只看到路由器发给它的词。你好，世界！早上好。
日本語の文章もここにあります。ありがとうございます。
🙂🙃😀 👍🏽 👨‍👩‍👧‍👦 🇩🇪🇫🇷 ❤️ zwei Emoji: 🚀🚀 naïve café — “quotes” … ½ ∑ ∞
def forward(self, x):\n    return self.experts(x) + x  # residual\n\nfor i in range(10):\n\tprint(i, i ** 2)
"""
END, START = "<|end|>", "<|start|>"


def _save(backend: Backend) -> Tokenizer:
    with tempfile.TemporaryDirectory(prefix="nonet-test-") as folder:
        backend.save(str(Path(folder) / "tokenizer.json"))
        return Tokenizer(folder)


def _byte_level(model: models.BPE) -> Backend:
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


@functools.cache
def trained() -> Tokenizer:
    """Byte-level BPE of 600 tokens; its merges cross the bytes of characters. Token 0 is END, 1 is START."""
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END, START],
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    return _save(backend)


@functools.cache
def single_bytes() -> Tokenizer:
    """Every byte is a token, behind END (0) and START (1)."""
    words = [END, START, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = _byte_level(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    backend.add_special_tokens([END, START])
    return _save(backend)


@functools.cache
def byte_fallback() -> Tokenizer:
    """As Llama's and Mixtral's: words begin with a mark for a space, unknown characters are spelled in bytes."""
    words = ["<unk>", END, *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", *"abcdefghijklmnopqrstuvwxyz.", "▁t", "▁th", "▁the", "▁a"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "a")]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([END])
    return _save(backend)
