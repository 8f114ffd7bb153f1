"""Every error that crosses a module border: fields first, the sentence made from them.

An error says what was wrong, where, and what to do. HTTP knows nothing here: `server/app.py` maps
`Fault` and class to a status in one table.
"""

import math
from enum import Enum
from typing import ClassVar, Final

from sllm_node.core.units import KIB, format_size


class Fault(Enum):
    """Who can do something about an error."""

    CALLER = "caller"
    """The request is wrong; sending it again can't help."""
    BUSY = "busy"
    """The node is full or draining; the same request can succeed later."""
    NODE = "node"
    """The node or its hardware failed; trying again may help."""


class SllmError(Exception):
    """Base of all our errors."""

    fault: ClassVar[Fault] = Fault.NODE
    code: ClassVar[str] = "error"


def _in_bytes(size: int) -> str:
    """Return a size as people read it, and to the byte."""
    return f"{size} bytes" if size < KIB else f"{format_size(size)} ({size} bytes)"


# --- requests -----------------------------------------------------------------------------------


class InvalidRequestError(SllmError):
    """A field of a request is missing, malformed, unknown or unsupported."""

    fault = Fault.CALLER
    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


PROMPT_LIMIT: Final = "this node (the model's context, or what engine.kv_cache_bytes holds)"


class PromptTooLongError(InvalidRequestError):
    """Prompt and wanted tokens can never fit: the model's context or the node's KV memory."""

    code = "context_length_exceeded"

    def __init__(
        self,
        tokens: int,
        limit: int,
        reason: str,
        *,
        param: str = "max_tokens",
        is_least: bool = False,
    ) -> None:
        needed = f"at least {tokens}" if is_least else str(tokens)
        remedy = "shorten the prompt" + (f" or lower {param}" if param.startswith("max_") else "")
        if limit <= 0:
            remedy = "the model can't be served here until engine.kv_cache_bytes is raised"
        super().__init__(
            f"the request needs {needed} tokens but {reason} allows {limit}; {remedy}", param=param
        )
        self.tokens = tokens
        self.limit = limit


class ModelNotFoundError(SllmError):
    """No checkpoint of that name lies in the store."""

    fault = Fault.CALLER
    code = "model_not_found"
    param = "model"

    def __init__(self, model: str, known: tuple[str, ...] = ()) -> None:
        listing = f"; there are: {', '.join(known[:20])}" if known else ""
        super().__init__(f"there is no model named {model!r} here{listing}")
        self.model = model


class ModelElsewhereError(SllmError):
    """This node has nothing of a model that other nodes have."""

    fault = Fault.CALLER
    code = "model_elsewhere"
    param = "model"

    def __init__(self, model: str, holders: tuple[str, ...], *, is_wanted: bool) -> None:
        """`is_wanted`: it was to come here."""
        there = ", ".join(holders)
        how = (
            f"it can't be had from {there} now" if is_wanted else f"ask a node that has it: {there}"
        )
        super().__init__(f"model {model!r} is not on this node; {how} (see 'status --cluster')")
        self.model = model
        self.holders = holders


class NodeFullError(SllmError):
    """The queue is full; `retry_after_s` is when a place is expected."""

    fault = Fault.BUSY
    code = "node_full"

    def __init__(self, queued: int, limit: int, retry_after_s: float, choices: int = 1) -> None:
        """`choices`: so many the refused request asks for at once."""
        asked = "" if choices == 1 else f", this one asks for {choices} choices,"
        super().__init__(
            f"{queued} requests wait already{asked} and the limit is {limit}; "
            f"try again in {math.ceil(retry_after_s)} s"
        )
        self.retry_after_s = retry_after_s


class QueueTimeoutError(SllmError):
    """A request waited longer than the limit for its model."""

    fault = Fault.BUSY
    code = "queue_timeout"

    def __init__(self, model: str, waited_s: float, retry_after_s: float) -> None:
        super().__init__(
            f"no place for model {model!r} within {waited_s:.0f} s (schedule.queue_timeout_s)"
        )
        self.retry_after_s = retry_after_s


class DrainingError(SllmError):
    """The node is stopping: it takes no new requests, and ends what runs after its limit."""

    fault = Fault.BUSY
    code = "draining"

    def __init__(self, retry_after_s: float, *, was_running: bool = False) -> None:
        what = "ended what still ran" if was_running else "takes no new requests"
        super().__init__(f"this node is draining and {what}; send the request to another one")
        self.retry_after_s = retry_after_s


class StoppingError(SllmError):
    """A drain that can't be taken back, as the process ends after it."""

    fault = Fault.CALLER
    code = "stopping"

    def __init__(self) -> None:
        super().__init__(
            "the node was told to stop (SIGTERM) and ends after its drain; start it again"
        )


class CancelledByOperatorError(SllmError):
    """A session was ended through the admin interface, or its model was."""

    fault = Fault.NODE
    code = "cancelled"

    def __init__(self, reason: str) -> None:
        super().__init__(f"the request was cancelled: {reason}")
        self.reason = reason


class ModelBusyError(SllmError):
    """An operator's act on a model that is in use or pinned."""

    fault = Fault.CALLER
    code = "model_busy"

    def __init__(self, model: str, reason: str) -> None:
        super().__init__(f"model {model!r} {reason}")
        self.model = model


class UnauthorizedError(SllmError):
    """The API key is missing or wrong, or one for clients where an operator's is asked for."""

    fault = Fault.CALLER
    code = "invalid_api_key"

    def __init__(self, *, needs_admin: bool = False) -> None:
        kind = "an admin key (server.admin_keys)" if needs_admin else "one of the node's keys"
        super().__init__(f"no or a wrong API key; send {kind} as 'Authorization: Bearer KEY'")


class ForbiddenOriginError(SllmError):
    """A web page of another site tries to drive a node that asks for no key."""

    fault = Fault.CALLER
    code = "forbidden_origin"

    def __init__(self, header: str, value: str) -> None:
        super().__init__(
            f"{header} {value!r} is not this machine: a node without server.api_keys answers "
            "only requests made to and from loopback"
        )


class BodyTooLargeError(SllmError):
    """A request body beyond the limit."""

    fault = Fault.CALLER
    code = "body_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"the request body is larger than {limit} bytes (server.max_body_bytes)")


class MalformedRequestError(SllmError):
    """Bytes that are no HTTP request, or a body that is not what its headers say."""

    fault = Fault.CALLER
    code = "malformed_request"

    def __init__(self, problem: str) -> None:
        super().__init__(f"the request can't be read: {problem}")


class UnsupportedEncodingError(SllmError):
    """A request body in an encoding that the node can't undo."""

    fault = Fault.CALLER
    code = "unsupported_encoding"

    def __init__(self, encoding: str, supported: tuple[str, ...]) -> None:
        super().__init__(
            f"Content-Encoding {encoding!r} is not known here; send {', '.join(supported)}, or none"
        )
        self.supported = supported


class SlowRequestError(SllmError):
    """A request whose body did not come in time."""

    fault = Fault.BUSY
    code = "request_timeout"

    def __init__(self, limit_s: float) -> None:
        super().__init__(
            f"the request body was not whole after {limit_s:g} s (server.read_timeout_s)"
        )


class RouteError(SllmError):
    """No such path, or not with this method."""

    fault = Fault.CALLER
    code = "no_such_route"

    def __init__(self, method: str, path: str, status: int, allowed: str | None = None) -> None:
        hint = "README lists the endpoints" if allowed is None else f"it takes {allowed}"
        super().__init__(f"there is no {method} {path} here; {hint}")
        self.status = status
        self.allowed = allowed
        """What the path takes, as the header Allow lists it."""


class InternalError(SllmError):
    """A mistake of ours; the log has the trace under the request's id."""

    code = "internal_error"

    def __init__(self, request_id: str) -> None:
        super().__init__(
            f"the node failed on this request; its log has the reason under {request_id}"
        )


# --- checkpoints --------------------------------------------------------------------------------


class CheckpointError(SllmError):
    """A checkpoint can't be used: something about its files."""

    code = "checkpoint_error"


class CheckpointFormatError(CheckpointError):
    """An index that we can't read or that contradicts itself."""

    code = "checkpoint_format"

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


class CodecError(CheckpointError):
    """An encoded chunk whose bytes its codec can't have written."""

    code = "codec_error"

    def __init__(self, codec: str, problem: str) -> None:
        super().__init__(
            f"a chunk encoded by {codec} is damaged: {problem}; convert the checkpoint again"
        )
        self.codec = codec
        self.problem = problem


class ChecksumError(CheckpointError):
    """Bytes read are not the bytes written."""

    code = "checksum_mismatch"

    def __init__(
        self, model: str, shard: str, offset: int, size: int, tensors: tuple[str, ...] = ()
    ) -> None:
        more = f" and {len(tensors) - 3} more" if len(tensors) > 3 else ""
        inside = f" (tensors: {', '.join(tensors[:3])}{more})" if tensors else ""
        super().__init__(
            f"model {model!r}: shard {shard} is damaged in bytes {offset} to {offset + size}"
            f"{inside}; convert it again, then 'sllm-node verify {model}'"
        )
        self.model = model
        self.shard = shard
        self.offset = offset
        self.size = size
        self.tensors = tensors


class CheckpointChangedError(CheckpointError):
    """A shard was replaced or truncated after the checkpoint was opened."""

    code = "checkpoint_changed"

    def __init__(self, model: str, shard: str, problem: str) -> None:
        super().__init__(
            f"model {model!r}: shard {shard} {problem} since the node opened it; "
            "what was cached of it is dropped, the next request reads it anew"
        )
        self.model = model
        self.shard = shard


class CheckpointReplacedError(CheckpointError):
    """A checkpoint took the place of the one that a command was reading, or it was removed."""

    code = "checkpoint_replaced"

    def __init__(self, model: str) -> None:
        super().__init__(
            f"model {model!r}: was replaced or removed while it was read, so nothing is known of "
            "what is there now; start again"
        )
        self.model = model


class StorageReadError(CheckpointError):
    """The file system failed to deliver bytes: EIO, short read, vanished file."""

    code = "storage_read_error"

    def __init__(self, model: str, shard: str, offset: int, problem: str) -> None:
        super().__init__(f"model {model!r}: reading shard {shard} at byte {offset}: {problem}")
        self.model = model
        self.shard = shard
        self.offset = offset


class StoreFullError(CheckpointError):
    """The file system of the store has no room for a checkpoint."""

    code = "store_full"

    def __init__(self, path: str, needed: int, free: int, *, is_least: bool = False) -> None:
        """Of `needed`, 0: nobody knows yet; `is_least`: it may be more."""
        needs = f"needs {'at least ' if is_least else ''}{needed} bytes and"
        super().__init__(
            f"{path}: the checkpoint {needs if needed else 'does not fit:'} {free} "
            f"{'' if needed else 'bytes '}are free; "
            "remove one ('sllm-node rm NAME') or name a store on a larger disk"
        )
        self.path = path
        self.needed = needed
        self.free = free


class StorageWriteError(CheckpointError):
    """The file system failed to take bytes."""

    code = "storage_write_error"

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: can't be written: {problem}")
        self.path = path
        self.problem = problem


class RemoteError(SllmError):
    """A remote does not give what it is asked for."""

    code = "remote_error"

    def __init__(self, remote: str, what: str, problem: str) -> None:
        super().__init__(f"remote {remote!r}: {what}: {problem}")
        self.remote = remote
        self.what = what
        self.problem = problem


class RemoteUnreachableError(RemoteError):
    """It is down, too slow, cut the connection, or failed itself; all retries are used up."""

    fault = Fault.BUSY
    code = "remote_unreachable"
    retry_after_s = 10.0

    def __init__(self, remote: str, what: str, problem: str, *, is_silent: bool = False) -> None:
        super().__init__(remote, what, problem)
        self.is_silent = is_silent
        """It took no connection, or did not answer in time: others would wait for it in vain as well."""


class RemoteNotFoundError(RemoteError):
    """It has no such file."""

    code = "remote_not_found"


class RemoteDeniedError(RemoteError):
    """It asks for credentials, or refuses those that it got."""

    code = "remote_denied"


class RemoteChangedError(CheckpointChangedError):
    """It has another checkpoint under the name than the one whose index was fetched."""

    code = "remote_changed"

    def __init__(self, remote: str, model: str, shard: str) -> None:
        super().__init__(model, shard, f"was replaced at remote {remote!r}")
        self.remote = remote


class RemoteChecksumError(ChecksumError):
    """It sends, again and again, bytes that are not the index's."""

    code = "remote_checksum_mismatch"

    def __init__(self, remote: str, model: str, shard: str, offset: int, size: int) -> None:
        super().__init__(model, shard, offset, size)
        message = (
            f"model {model!r}: remote {remote!r} sends wrong bytes {offset} to {offset + size} of "
            f"{shard}; run 'sllm-node verify {model}' there, and convert it again there"
        )
        self.args = (message,)
        self.remote = remote


class CheckpointNotFoundError(CheckpointError):
    """No checkpoint lies where one was looked for."""

    fault = Fault.CALLER
    code = "checkpoint_not_found"

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


class NotServableError(CheckpointError):
    """A checkpoint that is no model: a plain dict of tensors."""

    fault = Fault.CALLER
    code = "not_servable"
    param = "model"

    def __init__(self, model: str) -> None:
        super().__init__(
            f"{model!r} is a plain dict of tensors and no model, so it can't be served or "
            "generate; sllm_node.torch.load_dict loads it"
        )
        self.model = model


class ConversionError(SllmError):
    """A source can't be converted."""

    fault = Fault.CALLER
    code = "conversion_failed"

    def __init__(self, source: str, problem: str) -> None:
        super().__init__(f"{source}: {problem}")
        self.source = source
        self.problem = problem


class UnsupportedArchitectureError(ConversionError):
    """The step loop can't serve models of this architecture."""

    code = "unsupported_architecture"

    def __init__(self, source: str, architecture: str, supported: tuple[str, ...]) -> None:
        super().__init__(
            source,
            f"architecture {architecture} is not served here; served: {', '.join(supported)}",
        )
        self.architecture = architecture


# --- memory -------------------------------------------------------------------------------------


class PoolExhaustedError(SllmError):
    """No chunk of the pinned pool can be freed for a load: everything in it is pinned or lent."""

    fault = Fault.BUSY
    code = "pool_exhausted"
    retry_after_s = 10.0

    def __init__(self, model: str, chunks: int, lent: int = 0) -> None:
        loans = f" ({lent} lent to KV blocks)" if lent else ""
        lower = ", lower engine.kv_offload_bytes" if lent else ""
        super().__init__(
            f"model {model!r}: all {chunks} chunks of the pinned pool are pinned or in use{loans}; "
            f"unpin a model{lower} or raise store.pool_bytes"
        )
        self.model = model


class DeviceMemoryError(SllmError):
    """The device has no room for an allocation."""

    fault = Fault.BUSY
    code = "device_memory_exhausted"
    retry_after_s = 10.0

    def __init__(self, device: str, wanted: int, free: int, total: int) -> None:
        super().__init__(f"device {device}: {wanted} bytes wanted, {free} of {total} free")
        self.device = device
        self.wanted = wanted
        self.free = free
        self.total = total


class KvMemoryError(SllmError):
    """KV memory that the config allows is less than one block of a model's."""

    code = "kv_memory_too_small"

    def __init__(self, model: str, block: int, limit: int) -> None:
        super().__init__(
            f"one block of model {model!r}'s KV memory is {_in_bytes(block)}, more than "
            f"engine.kv_cache_bytes = {limit}; raise that in the node's config"
        )
        self.model = model


class PinnedMemoryError(SllmError):
    """A model that can't be served beside the pinned ones."""

    fault = Fault.BUSY
    code = "device_memory_pinned"
    retry_after_s = 30.0

    def __init__(self, model: str, needed: int, left: int, pinned: tuple[str, ...]) -> None:
        super().__init__(
            f"model {model!r} needs {_in_bytes(needed)} of device memory but the pinned models "
            f"({', '.join(pinned)}) leave {_in_bytes(left)}; unpin one of them"
        )
        self.model = model
        self.needed = needed
        self.left = left
        self.pinned = pinned


class ModelTooLargeError(SllmError):
    """A model that can never be served: weights and KV memory exceed the device."""

    fault = Fault.CALLER
    code = "model_too_large"

    def __init__(self, model: str, needed: int, total: int) -> None:
        super().__init__(
            f"model {model!r} needs {_in_bytes(needed)} of device memory (weights and KV cache); "
            f"the device has {_in_bytes(total)} (device.memory_bytes, engine.kv_cache_bytes)"
        )
        self.model = model


class DeviceError(SllmError):
    """The device failed or is not there."""

    code = "device_error"

    def __init__(self, device: str, problem: str) -> None:
        super().__init__(f"device {device}: {problem}")
        self.device = device
        self.problem = problem


class DeviceLostError(DeviceError):
    """The device's context is poisoned: nothing on it works in this process any more."""

    code = "device_lost"


class KernelError(SllmError):
    """A kernel that can't be compiled or launched."""

    code = "kernel_error"

    def __init__(self, kernel: str, problem: str) -> None:
        super().__init__(f"kernel {kernel}: {problem}")
        self.kernel = kernel
        self.problem = problem


class LoadFailedError(SllmError):
    """A load ended in something that has no better name; the cause is chained."""

    code = "load_failed"

    def __init__(self, model: str, problem: str) -> None:
        super().__init__(f"model {model!r} could not be loaded: {problem}")
        self.model = model


class EngineError(SllmError):
    """A step failed; its sessions end with this."""

    code = "engine_error"

    def __init__(self, model: str, problem: str) -> None:
        super().__init__(f"model {model!r}: the engine failed: {problem}")
        self.model = model


# --- library ------------------------------------------------------------------------------------


class ArgumentError(SllmError):
    """An argument of a library call that can't be taken as it is."""

    fault = Fault.CALLER
    code = "invalid_argument"

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(f"{argument}: {problem}")
        self.argument = argument
        self.problem = problem


class DeviceMapError(ArgumentError):
    """A device_map that can't be carried out; `entry` is the first that can't."""

    code = "invalid_device_map"

    def __init__(self, entry: str, problem: str) -> None:
        super().__init__("device_map", f"{entry!r} {problem}")
        self.entry = entry


# --- cluster ------------------------------------------------------------------------------------


class MessageError(SllmError):
    """A message between nodes that is not taken."""

    code = "message_error"


class MessageFormatError(MessageError):
    """Bytes that are no message of ours: cut off, damaged, or somebody else's."""

    code = "message_format"

    def __init__(self, problem: str) -> None:
        super().__init__(f"a message that can't be read: {problem}; is the sender a sllm-node?")
        self.problem = problem


class MessageTooLargeError(MessageError):
    """A message above the limit; it is neither sent nor read."""

    code = "message_too_large"

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(
            f"a message of {size} bytes is above the limit of {limit}; see "
            "limits.document_bytes in the cluster file, which must be the same on all nodes"
        )
        self.size = size
        self.limit = limit


class ClusterKeyError(SllmError):
    """A shared key that can't be used."""

    fault = Fault.CALLER
    code = "cluster_key"

    def __init__(self, origin: str, problem: str) -> None:
        super().__init__(f"{origin}: {problem}; 'sllm-node cluster init' writes a good one")
        self.origin = origin
        self.problem = problem


class ClusterFolderError(SllmError):
    """A cluster's folder in which a command can't do what it was asked for."""

    fault = Fault.CALLER
    code = "cluster_folder"

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


class WrongKeyError(MessageError):
    """A message that was not signed with this cluster's key, or was changed on its way."""

    code = "wrong_key"

    def __init__(self, sender: str) -> None:
        super().__init__(
            f"a message in the name of {sender!r} is not signed with this cluster's key; "
            "compare trust.key_file of both nodes ('sllm-node cluster check')"
        )
        self.sender = sender


class StrangerError(MessageError):
    """A message in the name of a node that the cluster file does not have."""

    code = "unknown_sender"

    def __init__(self, sender: str) -> None:
        super().__init__(
            f"a message in the name of {sender!r}, which the cluster file here does not have; "
            "all nodes need the same file"
        )
        self.sender = sender


class MisdirectedError(MessageError):
    """A message for another node."""

    code = "misdirected"

    def __init__(self, sender: str, receiver: str, me: str) -> None:
        super().__init__(
            f"a message from {sender!r} is for {receiver!r} and came to {me!r}; "
            "compare the addresses in the cluster file"
        )
        self.sender = sender
        self.receiver = receiver


class ReplayError(MessageError):
    """A message that came before, or too late to tell."""

    code = "replayed"

    def __init__(self, sender: str, boot: int, counter: int) -> None:
        super().__init__(
            f"message {counter} of boot {boot} from {sender!r} came before, or too late to tell; "
            "limits.replay_window_messages is how late one may be"
        )
        self.sender = sender
        self.boot = boot
        self.counter = counter


class HopLimitError(MessageError):
    """A request that was passed on once too often."""

    code = "hop_limit"

    def __init__(self, hops: int, limit: int) -> None:
        super().__init__(
            f"a request that was passed on {hops} times, and the limit is {limit}; "
            "run the same release on all nodes"
        )
        self.hops = hops
        self.limit = limit


class PeerUnreachableError(SllmError):
    """A node that can't be asked, or whose answer ended in the middle."""

    fault = Fault.BUSY
    code = "peer_unreachable"

    def __init__(self, node: str, problem: str, retry_after_s: float = 1.0) -> None:
        super().__init__(f"node {node!r} can't be reached: {problem}; see 'status --cluster'")
        self.node = node
        self.problem = problem
        self.retry_after_s = retry_after_s


class PeerDeniedError(SllmError):
    """A node that refused a message of ours: keys, files or releases differ."""

    code = "peer_denied"

    def __init__(self, node: str, reason: str) -> None:
        super().__init__(f"node {node!r} took no message of this one: {reason}")
        self.node = node
        self.reason = reason


class NoPlaceError(SllmError):
    """No node of the cluster can take a request now."""

    fault = Fault.BUSY
    code = "no_place"

    def __init__(self, model: str, reason: str, retry_after_s: float) -> None:
        super().__init__(f"no node takes a request for model {model!r} now: {reason}")
        self.model = model
        self.reason = reason
        self.retry_after_s = retry_after_s


class DocumentTooLargeError(SllmError):
    """A node's state document above the limit; peers keep the one before."""

    code = "document_too_large"

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(
            f"this node's state document has {size} bytes and the limit is {limit}; raise "
            "limits.document_bytes in the cluster file of all nodes"
        )
        self.size = size
        self.limit = limit


class ProtocolVersionError(MessageError):
    """A message of another release's protocol."""

    code = "protocol_version"

    def __init__(self, found: int | None, known: int) -> None:
        super().__init__(
            f"a message of protocol {found}, and this node speaks {known}; "
            "run the same release on all nodes"
        )
        self.found = found
        self.known = known


class EtcdError(SllmError):
    """The directory in etcd does not do what it was asked for; the node goes on without it."""

    code = "etcd"

    def __init__(self, endpoint: str, problem: str) -> None:
        super().__init__(f"etcd at {endpoint}: {problem}")
        self.endpoint = endpoint
        self.problem = problem


class EtcdUnreachableError(EtcdError):
    """No endpoint of etcd answers in time."""

    code = "etcd_unreachable"


class EtcdDeniedError(EtcdError):
    """Etcd does not let this node do that."""

    code = "etcd_denied"

    def __init__(self, endpoint: str, problem: str) -> None:
        super().__init__(
            endpoint, f"{problem}; the user needs to read and write all keys below the prefix"
        )


class EtcdLeaseError(EtcdError):
    """The lease is no more."""

    code = "etcd_lease"


class EtcdCompactedError(EtcdError):
    """The changes asked for are compacted away: read everything again."""

    code = "etcd_compacted"

    def __init__(self, endpoint: str, revision: int) -> None:
        super().__init__(endpoint, f"changes up to revision {revision} can't be had any more")
        self.revision = revision


class JournalError(SllmError):
    """The journal of what survives a restart can't be opened or written."""

    code = "journal"

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"the journal {path}: {problem}")
        self.path = path
        self.problem = problem


class JournalDamagedError(JournalError):
    """A journal that can't be read was set aside, and an empty one begun; told, never raised."""

    code = "journal_damaged"

    def __init__(self, path: str, problem: str, aside: str) -> None:
        super().__init__(
            path,
            f"{problem}; it was set aside as {aside} and an empty one begun: pins, aliases, "
            "registered models and desired replicas of this node are to be set again",
        )
        self.aside = aside


class JournalVersionError(JournalError):
    """A journal that a newer release wrote."""

    code = "journal_version"

    def __init__(self, path: str, found: int, known: int) -> None:
        super().__init__(
            path,
            f"has version {found} and this release knows {known}; run the release that wrote it, "
            "or move it away to begin an empty one",
        )
        self.found = found
        self.known = known


class JournalFullError(JournalError):
    """Too many records of one kind."""

    fault = Fault.CALLER
    code = "journal_full"

    def __init__(self, path: str, kind: str, limit: int) -> None:
        super().__init__(path, f"has {limit} {kind} already, which is the limit; drop some")
        self.kind = kind
        self.limit = limit


class SessionLostError(SllmError):
    """A session whose owner was lost, and no other node goes on with it."""

    fault = Fault.BUSY
    code = "session_lost"
    retry_after_s = 5.0

    def __init__(self, session: str, recoveries: int, problem: str) -> None:
        super().__init__(
            f"session {session!r} lost its node and can't go on elsewhere "
            f"(nodes tried: {recoveries}): {problem}; send the request again"
        )
        self.session = session
        self.recoveries = recoveries
        self.problem = problem


class WishConflictError(SllmError):
    """An operator's wish that something else speaks against."""

    fault = Fault.CALLER
    code = "wish_conflict"


class MoveRefusedError(SllmError):
    """A session that can't be moved as it was asked for."""

    fault = Fault.CALLER
    code = "move_refused"

    def __init__(self, session: str, reason: str) -> None:
        super().__init__(f"session {session!r} is not moved: {reason.replace('_', ' ')}")
        self.session = session
        self.reason = reason


class OtherWeightsError(SllmError):
    """A session that began elsewhere, with another checkpoint of its model than this node has."""

    code = "other_weights"

    def __init__(self, session: str, model: str) -> None:
        super().__init__(
            f"session {session!r} can't go on here: it began with another checkpoint of {model!r} than this "
            "node has; give all nodes the same one (see 'status --cluster')"
        )
        self.session = session
        self.model = model


class GivenBackError(SllmError):
    """A request that its node gives back to its entry before it began, to be placed anew."""

    fault = Fault.BUSY
    code = "given_back"

    def __init__(self, model: str, reason: str) -> None:
        super().__init__(f"a request for model {model!r} is placed anew: {reason}")
        self.model = model
        self.reason = reason


# --- operators ----------------------------------------------------------------------------------


class BenchError(SllmError):
    """A measurement that can't be made as it was asked for."""

    fault = Fault.CALLER
    code = "bench"


class ConfigError(SllmError):
    """A configuration with every problem that was found in it."""

    fault = Fault.CALLER
    code = "invalid_config"

    def __init__(self, path: str, problems: tuple[str, ...]) -> None:
        lines = "\n".join(f"  {problem}" for problem in problems)
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        super().__init__(f"{path}: {count}\n{lines}")
        self.path = path
        self.problems = problems


class ListenError(SllmError):
    """The node can't listen where the config says."""

    fault = Fault.CALLER
    code = "listen_failed"

    def __init__(self, host: str, port: int, problem: str) -> None:
        super().__init__(f"can't listen on {host}:{port}: {problem}; see server.host, server.port")
        self.host = host
        self.port = port


class StoreFolderError(SllmError):
    """The store folder can't be read or made."""

    fault = Fault.CALLER
    code = "store_folder"

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"the store folder {path}: {problem}; see store.path, or --store")
        self.path = path
