"""Log probabilities in the three forms that clients know: completions', chat completions', and vLLM's of prompts.

Used by `completions` and `chat_completions`.
"""

from __future__ import annotations

from collections.abc import Sequence

from nonet.engine.tokenizer import Tokenizer
from nonet.openai.responses import ChatLogprob, ChatLogprobs, CompletionLogprobs, PromptLogprobs, TopLogprob
from nonet.server.pieces import Pieces
from nonet.types import TokenLogprobs

_LOWEST = -9999.0  # JSON has no infinity


class LogprobForms:
    """For one request. `as_ids`: tokens show as "token_id:42". `top`: how many of the most likely a chat shows."""

    def __init__(self, tokenizer: Tokenizer, pieces: Pieces, *, as_ids: bool = False, top: int = 0) -> None:
        self._tokenizer, self._pieces, self._as_ids, self._top = tokenizer, pieces, as_ids, top

    def _shown(self, token: int, text: str) -> str:
        return f"token_id:{token}" if self._as_ids else text

    def completion(
        self, tokens: Sequence[int], entries: Sequence[TokenLogprobs | None], offset: int
    ) -> tuple[CompletionLogprobs, int]:
        """For these tokens, and where the next one's text begins. An entry is None for a prompt's first token."""
        out = CompletionLogprobs()
        for token, entry in zip(tokens, entries, strict=True):
            own = entry[token] if entry is not None else None
            text = self._shown(token, own.decoded_token if own else self._tokenizer.decode([token], False))
            out.tokens.append(text)
            out.token_logprobs.append(max(own.logprob, _LOWEST) if own else None)
            out.text_offset.append(offset)
            offset += len(text)
            if entry is None:
                out.top_logprobs.append(None)
                continue
            top: dict[str, float] = {}
            for one, value in entry.items():
                top.setdefault(self._shown(one, value.decoded_token), max(value.logprob, _LOWEST))
            out.top_logprobs.append(top)
        return out, offset

    def chat(self, tokens: Sequence[int], entries: Sequence[TokenLogprobs]) -> ChatLogprobs:
        content = []
        for token, entry in zip(tokens, entries, strict=True):
            best = sorted(entry, key=lambda one: entry[one].rank)[: self._top]
            top = [self._top_entry(one, entry) for one in best]
            own = self._top_entry(token, entry)
            content.append(ChatLogprob(own.token, own.logprob, own.bytes, top))
        return ChatLogprobs(content)

    def _top_entry(self, token: int, entry: TokenLogprobs) -> TopLogprob:
        text = entry[token].decoded_token
        value = max(entry[token].logprob, _LOWEST)
        return TopLogprob(self._shown(token, text), value, self._pieces.bytes_of(token, text))

    @staticmethod
    def prompt(entries: Sequence[TokenLogprobs | None] | None) -> PromptLogprobs | None:
        """By token id, as vLLM shows them."""
        if entries is None:
            return None
        return [
            None
            if entry is None
            else {
                str(token): {"logprob": max(one.logprob, _LOWEST), "rank": one.rank, "decoded_token": one.decoded_token}
                for token, one in entry.items()
            }
            for entry in entries
        ]
