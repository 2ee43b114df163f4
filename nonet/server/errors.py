"""Errors as OpenAI's clients expect them: one body for all, a status from the error's class.

Used by the routes, the gate in front of them, and streams that fail half-way. The table of classes is nonet.errors'.
"""

from __future__ import annotations

import logging

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from nonet.errors import NonetError
from nonet.openai.responses import Error, ErrorDetail

log = logging.getLogger("nonet")
_LONGEST = 1000  # characters of a message

_CODES = {401: "invalid_api_key", 413: "body_too_large", 415: "unsupported_media_type", 503: "unavailable"}
_MESSAGES = {
    404: "{method} {path}: there is no such route; see /openapi.json",
    405: "{method} {path}: this route does not take {method}; see /openapi.json",
}


class HttpError(NonetError):
    """What only exists in HTTP: a status of its own, and OpenAI's code for it."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.http_status, self.code, self.field = status, code or _CODES.get(status), param


def error_body(error: NonetError) -> Error:
    """The JSON of an error: one line, the field it names, OpenAI's words for its kind."""
    status = error.http_status
    kind = "invalid_request_error" if status < 500 else "service_unavailable" if status == 503 else "server_error"
    if status == 401:
        kind = "authentication_error"
    message = " ".join(str(error).split())[:_LONGEST]
    param = getattr(error, "field", None)
    code = getattr(error, "code", None) or _CODES.get(status)
    return Error(ErrorDetail(message.encode(errors="replace").decode(), kind, param, code))


def error_response(error: NonetError) -> Response:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 408: {"Connection": "close"}}.get(error.http_status, {})
    return Response(
        msgspec.json.encode(error_body(error)), error.http_status, headers, media_type="application/json"
    )  # fmt: skip


async def on_nonet_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, NonetError)
    return error_response(error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own: no such route, wrong method."""
    assert isinstance(error, HTTPException)
    text = _MESSAGES.get(error.status_code, "{method} {path}: " + str(error.detail).replace("{", "").replace("}", ""))
    words = text.format(method=request.method, path=request.url.path[:200])
    response = error_response(HttpError(error.status_code, words))
    response.headers.update(error.headers or {})
    return response


async def on_defect(request: Request, error: Exception) -> Response:
    """A mistake of ours: the traceback goes to the log, not to the client."""
    return error_response(HttpError(500, "internal error; the server's log has the details"))
