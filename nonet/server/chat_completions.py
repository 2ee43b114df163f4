"""POST /v1/chat/completions: a job's news in OpenAI's form. Used by `app`."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET

from nonet.openai.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    Delta,
)
from nonet.server.answers import Answer
from nonet.server.job import News
from nonet.types import TokenLogprobs


class ChatAnswer(Answer):
    prefix = "chatcmpl"

    def chunks(self, news: News) -> list[ChatChunk]:  # type: ignore[override]
        """The first of a choice names the role and has no text."""
        delta = Delta(content=news.text)
        entries = self._entries(news.token_ids, news.logprobs)
        tokens = self.token_ids(news.token_ids)
        choice = ChatChunkChoice(news.index, delta, entries, news.finish_reason, news.stop_reason, tokens)
        if not news.first:
            return [self._chunk([choice])]
        head = self._chunk([ChatChunkChoice(news.index, Delta(role="assistant", content=""))])
        if news.index == 0:
            head.prompt_token_ids = self.prompt_token_ids(0)
            if self.body.prompt_logprobs is not None:
                head.prompt_logprobs = self.forms.prompt(self.job.latest[0].prompt_logprobs)
        return [head, self._chunk([choice])]

    def last_chunk(self) -> ChatChunk:
        return self._chunk([])

    def complete(self) -> ChatCompletion:
        result = self.job.latest[0]
        choices = [
            ChatChoice(
                out.index,
                ChatMessage(out.text),
                self._entries(out.token_ids, out.logprobs),
                out.finish_reason,
                out.stop_reason,
                self.token_ids(out.token_ids),
            )
            for out in result.outputs
        ]
        whole = ChatCompletion(self.id, self.created, self.model, choices, self.usage())
        whole.prompt_token_ids = self.prompt_token_ids(0)
        whole.prompt_logprobs = UNSET
        if self.body.prompt_logprobs is not None:
            whole.prompt_logprobs = self.forms.prompt(result.prompt_logprobs)
        return whole

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(self.id, self.created, self.model, choices, self.usage_of_chunk())

    def _entries(self, tokens: Sequence[int], entries: Sequence[TokenLogprobs] | None) -> ChatLogprobs | None:
        return self.forms.chat(tokens, entries) if entries is not None else None
