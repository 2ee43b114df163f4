"""POST /v1/completions: a job's news in OpenAI's form. Used by `app`."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from nonet.engine.tokenizer import Tokenizer
from nonet.openai.requests import CompletionRequest
from nonet.openai.responses import Completion, CompletionChoice, CompletionLogprobs, PromptLogprobs
from nonet.server.answers import Answer
from nonet.server.job import Job, News
from nonet.server.logprobs import LogprobForms
from nonet.types import TokenLogprobs


class CompletionAnswer(Answer):
    prefix = "cmpl"

    def __init__(
        self, body: CompletionRequest, job: Job, tokenizer: Tokenizer, forms: LogprobForms, model: str
    ) -> None:
        super().__init__(body, job, tokenizer, forms, model)
        self.hides_output = body.max_tokens == 0
        self._echo, self._logprobs = bool(body.echo), body.logprobs is not None
        self._offset: dict[int, int] = {}  # where the next token's text begins, by choice

    def chunks(self, news: News) -> list[Completion]:  # type: ignore[override]
        return [self._completion([self._choice(news)])]

    def last_chunk(self) -> Completion:
        return self._completion([])

    def complete(self) -> Completion:
        choices = []
        for prompt, result in sorted(self.job.latest.items()):
            for out in result.outputs:
                index = prompt * self.job.n + out.index
                news = News(
                    prompt, index, out.text, out.token_ids, out.logprobs, out.finish_reason, out.stop_reason, True
                )
                choices.append(self._choice(news))
        whole = self._completion(choices)
        whole.usage = self.usage()
        return whole

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(self.id, self.created, self.model, choices, self.usage_of_chunk())

    def _choice(self, news: News) -> CompletionChoice:
        text = "" if self.hides_output else news.text
        tokens: Sequence[int] = [] if self.hides_output else news.token_ids
        shown = tokens
        entries: list[TokenLogprobs | None] = [] if self.hides_output else list(news.logprobs or ())
        reason = "length" if self.hides_output else news.finish_reason
        if news.first and self._echo:
            text = self._prompt_text(news.prompt) + text
            shown = [*self.job.prompts[news.prompt].tokens, *tokens]
            entries = [*(self.job.latest[news.prompt].prompt_logprobs or ()), *entries]
        return CompletionChoice(
            news.index,
            text,
            self._entries(news.index, shown, entries) if self._logprobs else None,
            reason,
            None if self.hides_output else news.stop_reason,
            self._prompt_logprobs(news) if news.first else UNSET,
            self.token_ids(tokens),
            self.prompt_token_ids(news.prompt) if news.first else UNSET,
        )

    def _entries(self, index: int, tokens: Sequence[int], entries: list[TokenLogprobs | None]) -> CompletionLogprobs:
        found, self._offset[index] = self.forms.completion(tokens, entries, self._offset.get(index, 0))
        return found

    def _prompt_logprobs(self, news: News) -> PromptLogprobs | None | UnsetType:
        if self.body.prompt_logprobs is None:
            return UNSET
        return self.forms.prompt(self.job.latest[news.prompt].prompt_logprobs)

    def _prompt_text(self, prompt: int) -> str:
        given = self.job.prompts[prompt]
        if given.text is not None:
            return given.text
        return self.tokenizer.decode(given.tokens, self.job.params[prompt].skip_special_tokens)
