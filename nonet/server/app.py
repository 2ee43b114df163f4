"""The FastAPI application: OpenAI's routes and vLLM's over one engine.

Made by `run` (and by tests) with `create_app(llm)`. Routes check and hand over; the work is in `job`, the forms in
`completions` and `chat_completions`.
"""

from __future__ import annotations

import time

import msgspec
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from nonet import __version__
from nonet.config.schema import EngineConfig
from nonet.engine import structured
from nonet.engine.llm import AsyncLLM
from nonet.errors import NonetError, RequestError
from nonet.openai.fields import Shown
from nonet.openai.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampling,
    TokenizeRequest,
)
from nonet.openai.responses import Detokenized, Health, ModelCard, ModelList, Tokenized, Version
from nonet.server import errors
from nonet.server.answers import Answer, respond
from nonet.server.chat import ChatTemplates
from nonet.server.chat_completions import ChatAnswer
from nonet.server.completions import CompletionAnswer
from nonet.server.http import REQUEST_ID, BodyTooLarge, ClientGone, Gate, TooLargeResponse, checked_id, read_body
from nonet.server.job import Job, Jobs
from nonet.server.logprobs import LogprobForms
from nonet.server.metrics import Metrics
from nonet.server.metrics_page import MetricsPage
from nonet.server.openapi import document
from nonet.server.peers import Peers
from nonet.server.pieces import Pieces
from nonet.server.prompts import (
    Encoder,
    Limits,
    PromptTokens,
    check_count,
    checkpoint_defaults,
    sampling_params,
    settle_length,
    truncated,
)
from nonet.types import SamplingParams

_RANK = "x-data-parallel-rank"


def served_names(config: EngineConfig) -> list[str]:
    """The names clients may ask for."""
    return config.server.served_model_name or [config.model.model]


class Routes:
    """One method a route, and what they share."""

    def __init__(self, llm: AsyncLLM) -> None:
        config = llm.config
        self.llm, self.config, self.names = llm, config, served_names(config)
        self.created = int(time.time())
        self.metrics = Metrics()
        self.jobs = Jobs(llm, self.metrics)
        self.peers: Peers | None = None  # where several processes serve; set by `run`
        spec = llm.client.spec
        self._page = MetricsPage(self.names[0], config, spec)
        server = config.server
        trusted = server.trust_request_chat_template
        self._templates = ChatTemplates(llm.tokenizer.folder, server.chat_template, trusted)
        self._encoder = Encoder(llm.tokenizer)
        self._pieces = Pieces(llm.tokenizer.backend)
        self._limits = Limits(config.model.max_model_len or spec.max_position, llm.client.cache_tokens + 1)
        self._defaults = checkpoint_defaults(str(spec.folder))

    # -- generating ----------------------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        body = await read_body(request, CompletionRequest, self.config.server.max_request_bytes)
        model, params = self._model(body.model), await self._params(body)
        check_count(len(body.prompt), params.n)
        prompts = await self._encoder.prompts(body.prompt, body.add_special_tokens is not False)
        job = self._job(request, body, prompts, params)
        forms = self._forms(body, 0)
        return await respond(request, CompletionAnswer(body, job, self.llm.tokenizer, forms, model))

    async def chat_completions(self, request: Request) -> Response:
        body = await read_body(request, ChatCompletionRequest, self.config.server.max_request_bytes)
        model, params = self._model(body.model), await self._params(body)
        check_count(1, params.n)
        if body.tools and body.tool_choice != "none":
            remedy = "the text is not searched for calls; send tool_choice 'none' and read them in the text"
            raise RequestError("tools", f"{len(body.tools)} given", remedy)
        text = self._render(body)
        tokens = await self._encoder.encode(text, bool(body.add_special_tokens))
        job = self._job(request, body, [PromptTokens(tokens, text)], params)
        answer: Answer = ChatAnswer(body, job, self.llm.tokenizer, self._forms(body, body.top_logprobs or 0), model)
        return await respond(request, answer)

    def _render(self, body: ChatCompletionRequest | TokenizeRequest) -> str:
        variables = dict(body.chat_template_kwargs or {})
        if isinstance(body, ChatCompletionRequest) and body.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", body.reasoning_effort)
        return self._templates.render(
            body.messages or [],
            template=body.chat_template,
            variables=variables,
            tools=body.tools,
            documents=body.documents,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
        )

    def _model(self, asked: str | None) -> str:
        """The name to answer with. Raises HttpError (404)."""
        if asked is None or asked in self.names:
            return asked or self.names[0]
        served = ", ".join(self.names)
        message = f"model = {Shown(asked)}: is not served here; served: {served}"
        raise errors.HttpError(404, message, code="model_not_found", param="model")

    async def _params(self, body: Sampling) -> SamplingParams:
        params = sampling_params(body, self._defaults)
        size = self.llm.client.spec.vocab_size
        bad = next((token for token in params.logit_bias or () if token >= size), None)
        if bad is not None:
            raise RequestError("logit_bias", bad, f"token ids are 0 to {size - 1}")
        if params.structured_outputs is not None:
            self.llm.tokenizer.check_structured()
            await structured.check(params.structured_outputs)
        return params

    def _forms(self, body: Sampling, top: int) -> LogprobForms:
        as_ids = bool(body.return_tokens_as_token_ids)
        return LogprobForms(self.llm.tokenizer, self._pieces, as_ids=as_ids, top=top)

    def _job(self, request: Request, body: Sampling, prompts: list[PromptTokens], params: SamplingParams) -> Job:
        if self.llm.dead is not None:
            raise self.llm.dead
        cut = truncated(prompts, body.truncate_prompt_tokens, params.max_tokens, self._limits)
        each = [settle_length(params, one, self._limits) for one in cut]
        if body.request_id is not None and "x-request-id" not in request.headers:
            request.scope[REQUEST_ID] = checked_id(body.request_id, "request_id")
        return Job(self.jobs, request.scope[REQUEST_ID], cut, each, self._pinned(request))

    def _pinned(self, request: Request) -> int | None:
        """The data-parallel rank that the client wants."""
        given, size = request.headers.get(_RANK), self.config.parallel.data_parallel_size
        if given is None:
            return None
        if not (given.isascii() and given.isdigit() and len(given) < 10 and int(given) < size):
            raise RequestError("X-data-parallel-rank", Shown(given), f"ranks are 0 to {size - 1}")
        return int(given)

    # -- tokens ----------------------------------------------------------------------------------------------------

    async def tokenize(self, request: Request) -> Response:
        body = await read_body(request, TokenizeRequest, self.config.server.max_request_bytes)
        self._model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("prompt", Shown(body.prompt), "give a prompt, or messages, and not both")
        text = body.prompt if body.prompt is not None else self._render(body)
        default = body.messages is None
        special = default if body.add_special_tokens is None else body.add_special_tokens
        tokens = await self._encoder.encode(text, special)
        backend = self.llm.tokenizer.backend
        strings = [str(backend.id_to_token(t)) for t in tokens] if body.return_token_strs and backend else None
        return _json(Tokenized(len(tokens), self._limits.max_model_len, tokens, strings))

    async def detokenize(self, request: Request) -> Response:
        body = await read_body(request, DetokenizeRequest, self.config.server.max_request_bytes)
        self._model(body.model)
        size = self.llm.client.spec.vocab_size
        bad = next((token for token in body.tokens if not 0 <= token < size), None)
        if bad is not None:
            raise RequestError("tokens", Shown(bad), f"token ids are 0 to {size - 1}")
        return _json(Detokenized(self.llm.tokenizer.decode(body.tokens, False)))

    # -- about the server ------------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        return _json(ModelList([self._card(name) for name in self.names]))

    async def model(self, request: Request) -> Response:
        return _json(self._card(self._model(request.path_params["model"])))

    def _card(self, name: str) -> ModelCard:
        return ModelCard(name, self.created, self.config.model.model, self._limits.max_model_len)

    async def health(self, request: Request) -> Response:
        if self.llm.dead is not None:
            raise self.llm.dead
        return _json(Health())

    async def version(self, request: Request) -> Response:
        return _json(Version(__version__))

    async def show_metrics(self, request: Request) -> Response:
        others = await self.peers.rows() if self.peers is not None else []
        stats = [] if self.llm.dead is not None else await self.llm.stats()
        page = self._page.render(self.metrics.summed(others), stats, self.llm.pending)
        return Response(page, media_type=CONTENT_TYPE_LATEST)


def _json(data: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(data), media_type="application/json")


def create_app(llm: AsyncLLM) -> FastAPI:
    """The application over a running engine; `app.state.routes` is its `Routes`. Raises ConfigError or ModelError."""
    routes = Routes(llm)
    app = FastAPI(title="nonet", version=__version__, redirect_slashes=False)
    app.state.routes = routes
    for path, method, endpoint in (
        ("/v1/completions", "POST", routes.completions),
        ("/v1/chat/completions", "POST", routes.chat_completions),
        ("/v1/models", "GET", routes.models),
        ("/v1/models/{model:path}", "GET", routes.model),
        ("/tokenize", "POST", routes.tokenize),
        ("/detokenize", "POST", routes.detokenize),
        ("/health", "GET", routes.health),
        ("/version", "GET", routes.version),
        ("/metrics", "GET", routes.show_metrics),
    ):
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    secured = bool(llm.config.server.api_key)
    app.openapi = lambda: document(__version__, routes.names, secured)  # type: ignore[method-assign]
    app.add_middleware(Gate, api_keys=llm.config.server.api_key or [])
    app.add_exception_handler(BodyTooLarge, _on_too_large)
    app.add_exception_handler(NonetError, errors.on_nonet_error)
    app.add_exception_handler(HTTPException, errors.on_http_exception)
    app.add_exception_handler(ClientGone, _on_gone)
    app.add_exception_handler(Exception, errors.on_defect)
    return app


async def _on_too_large(request: Request, error: Exception) -> Response:
    assert isinstance(error, BodyTooLarge)
    return TooLargeResponse(error)


async def _on_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it
