"""Errors as HTTP: one table from type to status, one shape of body."""

import math
from typing import Any, Final

from sllm_node.core import errors
from sllm_node.core.errors import Fault, SllmError

_STATUS: Final[dict[type[SllmError], int]] = {
    errors.BodyTooLargeError: 413,
    errors.ForbiddenOriginError: 403,
    errors.ModelBusyError: 409,
    errors.ModelElsewhereError: 409,
    errors.ModelNotFoundError: 404,
    errors.MoveRefusedError: 409,
    errors.StoppingError: 409,
    errors.WishConflictError: 409,
    errors.PeerDeniedError: 502,
    errors.PeerUnreachableError: 503,
    errors.RemoteDeniedError: 502,
    errors.RemoteNotFoundError: 502,
    errors.RouteError: 404,
    errors.SlowRequestError: 408,
    errors.UnauthorizedError: 401,
    errors.UnsupportedEncodingError: 415,
}
_STATUS_BY_FAULT: Final = {Fault.CALLER: 400, Fault.BUSY: 503, Fault.NODE: 500}
_FINAL: Final = (errors.CancelledByOperatorError, errors.PinnedMemoryError)
"""Only an operator can make these succeed: asking again would undo what one did, or be in vain."""
_TYPE: Final = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}


def status_of(error: SllmError) -> int:
    """Return the HTTP status of an error."""
    if isinstance(error, errors.RouteError):
        return error.status
    return _STATUS.get(type(error), _STATUS_BY_FAULT[error.fault])


def body_of(error: SllmError) -> dict[str, Any]:
    """Return OpenAI's error object."""
    status = status_of(error)
    kind = "server_error" if status >= 500 else _TYPE.get(status, "invalid_request_error")
    described = {
        "message": str(error),
        "type": kind,
        "param": getattr(error, "param", None),
        "code": error.code,
    }
    return {"error": described}


def headers_of(error: SllmError) -> dict[str, str]:
    """Return what tells a client whether and when to try again."""
    headers: dict[str, str] = {}
    if error.fault is Fault.CALLER or isinstance(error, _FINAL):
        headers["x-should-retry"] = "false"
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        milliseconds = max(1, round(1000 * retry_after_s))
        headers["Retry-After"] = str(math.ceil(milliseconds / 1000))
        headers["retry-after-ms"] = str(milliseconds)
    if isinstance(error, errors.UnauthorizedError):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, errors.UnsupportedEncodingError):
        headers["Accept-Encoding"] = ", ".join(error.supported)
    if isinstance(error, errors.RouteError) and error.allowed is not None:
        headers["Allow"] = error.allowed
    return headers
