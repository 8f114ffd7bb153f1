"""The sessions that wait or run on this node, by ticket."""

import asyncio

from sllm_node.core.errors import CancelledByOperatorError, SllmError
from sllm_node.core.types import ModelId, SessionId, SessionStatus
from sllm_node.schedule.actions import TicketId
from sllm_node.schedule.stream import Outcome, Stream, sessions_of


class Sessions:
    """Streams that have not ended, in order of arrival."""

    def __init__(self) -> None:
        self._streams: dict[TicketId, Stream] = {}
        self._quiet = asyncio.Event()
        self._quiet.set()

    def add(self, stream: Stream) -> None:
        """Keep a new stream."""
        self._streams[stream.ticket] = stream
        self._quiet.clear()

    def get(self, ticket: TicketId) -> Stream:
        """Return the stream of `ticket`, which must be here."""
        return self._streams[ticket]

    def find(self, ticket: TicketId) -> Stream | None:
        """Return the stream of `ticket` if it is here; one that waits for a load only has none."""
        return self._streams.get(ticket)

    def take(self, ticket: TicketId) -> Stream | None:
        """Remove a stream and return it, if it is still here."""
        stream = self._streams.pop(ticket, None)
        if not self._streams:
            self._quiet.set()
        return stream

    def waiting_for(self, model: ModelId) -> list[Stream]:
        """Return the streams of `model` without a grant, the most important first."""
        found = [
            stream
            for stream in self._streams.values()
            if stream.request.model == model and not stream.is_granted
        ]
        return sorted(found, key=lambda stream: -stream.request.priority)

    def waiting(self) -> list[Stream]:
        """Return who waits here and could as well elsewhere: not sessions that move here, and run meanwhile."""
        return [
            stream
            for stream in self._streams.values()
            if not (stream.is_granted or stream.request.held)
        ]

    def statuses(self) -> list[SessionStatus]:
        """Return what `status` shows."""
        return [stream.session_status() for stream in self._streams.values()]

    def stop_request(self, request_id: str) -> int:
        """End the sessions of a request for an operator; return how many there were.

        An id that no request has by itself may be one that clients gave: it ends all of theirs. One that
        moves here runs elsewhere still, where it can be ended.
        """
        streams = [stream for stream in self._streams.values() if not stream.is_held]
        return self._stop(
            sessions_of(streams, request_id), CancelledByOperatorError("an operator ended it")
        )

    def give_back(self, session: SessionId, error: SllmError) -> bool:
        """End a session that still waits, and does not move here; tell whether it did."""
        found = [s for s in self._streams.values() if s.request.session == session]
        return self._stop([s for s in found if not (s.is_granted or s.request.held)], error) > 0

    def give_back_all(self, model: ModelId, error: SllmError) -> None:
        """End all sessions that wait for `model`, in order of arrival."""
        found = (s for s in self._streams.values() if s.request.model == model)
        self._stop([s for s in found if not s.is_granted], error, Outcome.REFUSED)

    def stop_all(self, error: SllmError) -> int:
        """End all sessions with `error`; return how many there were."""
        return self._stop(list(self._streams.values()), error)

    async def quiet(self) -> None:
        """Wait until there is none."""
        await self._quiet.wait()

    def _stop(
        self, streams: list[Stream], error: SllmError, outcome: Outcome = Outcome.STOPPED
    ) -> int:
        """End those that wait first, so that none is granted in between."""
        stopped = 0
        for stream in sorted(streams, key=lambda stream: stream.is_granted):
            if stream.ticket in self._streams:  # the end of one may have refused another
                stream.fail(error, outcome)
                stopped += 1
        return stopped
