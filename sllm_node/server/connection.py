"""A client's connection: errors outside of a request look like all others."""

import logging
import secrets

from aiohttp import web
from typing_extensions import override

from sllm_node.core import log as logs
from sllm_node.core.errors import InternalError, MalformedRequestError, SllmError
from sllm_node.server.faults import body_of, headers_of, status_of
from sllm_node.server.models import json_response

log = logging.getLogger(__name__)


class Connection(web.RequestHandler):
    """aiohttp's connection, with our error object where it would answer in plain text."""

    __slots__ = ()

    @override
    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        request_id = logs.request_id.get() or secrets.token_hex(8)
        fields = {"request_id": request_id, "remote": request.remote}
        found: SllmError
        if status < 500:
            problem = (message or "it is no HTTP").splitlines()[0]
            log.info("no request", extra={**fields, "problem": problem})
            found = MalformedRequestError(problem)
        else:
            log.error("request failed", exc_info=exc, extra=fields)
            found = InternalError(request_id)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer had begun")
        answer = error_response(found)
        answer.headers["x-request-id"] = request_id  # the app's own, if there is one, replaces it
        answer.force_close()
        return answer


def error_response(error: SllmError) -> web.Response:
    """Return an error as a client gets it."""
    answer = json_response(body_of(error), status_of(error))
    answer.headers.update(headers_of(error))
    return answer
