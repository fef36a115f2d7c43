"""Every error that a caller can act on, each with the one HTTP status it has.

This is the only file that knows HTTP statuses. `fault` is the key of the Compute API's error body:
``{"itemNotFound": {"code": 404, "message": "…"}}``. Facts are attributes, never words to be parsed. The classes are also
what the journal records: an error is stored by its `code` and its facts, and `revive` makes it again on replay.
"""

from __future__ import annotations

from typing import Any, ClassVar


class InstarError(Exception):
    """Base of all errors with a defined answer. Facts given by keyword become attributes and fill `template`."""

    status: ClassVar[int] = 500
    fault: ClassVar[str] = "computeFault"
    template: ClassVar[str] = "The cloud could not do this."
    registry: ClassVar[dict[str, type[InstarError]]] = {}

    def __init__(self, message: str | None = None, **facts: Any) -> None:
        self.facts = facts
        self.message = message if message is not None else self.template.format(**facts)
        super().__init__(self.message)

    @property
    def user_message(self) -> str:
        """The message without the name of the host that it is about: which host it was is for admins."""
        host = self.facts.get("host")
        if not host:
            return self.message
        return self.message.replace(f"Host {host} ", "The host ").replace(f"host {host}", "the host")

    def __init_subclass__(cls) -> None:
        InstarError.registry[cls.__name__] = cls

    def __getattr__(self, name: str) -> Any:
        facts = self.__dict__.get("facts", {})
        if name in facts:
            return facts[name]
        raise AttributeError(name)


def revive(code: str, message: str, facts: dict[str, Any]) -> InstarError:
    """The error that was recorded in the journal as (code, message, facts). Unknown codes become `StepFailed`."""
    error_type = InstarError.registry.get(code, StepFailed)
    return error_type(message, **facts)


# --- the request is wrong -------------------------------------------------------------------------------------------


class BadRequest(InstarError):
    """The request is malformed; the message names the field and the value."""

    status, fault = 400, "badRequest"


class UnknownReference(BadRequest):
    """A flavor, image, network or key that the body names does not exist."""

    template = "{kind} {name} could not be found."


class ImageUnusable(BadRequest):
    """The image is not active, too big for the flavor's disk, or not what its format says."""


class Unauthorized(InstarError):
    status, fault = 401, "unauthorized"
    template = "The request you have made requires authentication."


class Forbidden(InstarError):
    status, fault = 403, "forbidden"
    template = "Policy doesn't allow {action} to be performed."


class QuotaExceeded(InstarError):
    """`resource`, `requested`, `used`, `limit` say what ran out."""

    status, fault = 403, "forbidden"
    template = "Quota exceeded for {resource}: Requested {requested}, but already used {used} of {limit} {resource}"


class NotFound(InstarError):
    status, fault = 404, "itemNotFound"
    template = "{kind} {id} could not be found."


class NotAcceptable(InstarError):
    """An unknown microversion; names the supported range."""

    status, fault = 406, "notAcceptable"
    template = "Version {version} is not supported by the API. Minimum is {minimum} and maximum is {maximum}."


class Conflict(InstarError):
    status, fault = 409, "conflictingRequest"


class ConsoleUnavailable(BadRequest):
    """The host offers no console of this kind."""

    template = "Unavailable console type {kind}."


class NoRunningGuest(Conflict):
    """There is nothing to connect to."""

    template = "Instance {id} is not ready: it has no running guest."


class WrongState(Conflict):
    """The instance's vm_state, task_state or lock forbids the action. `attribute` is vm_state or task_state."""

    template = "Cannot '{action}' instance {id} while it is in {attribute} {state}"


class WhereaboutsUnknown(Conflict):
    """A live migration broke off, and which of two hosts has the guest is not known until they answer. `details`: lines for
    admins."""

    template = (
        "It is not known yet where instance {id} runs since its live migration broke off. "
        "It can be used again as soon as its host answers."
    )


class Locked(Conflict):
    template = "Instance {id} is locked"


class VolumeUnusable(Conflict):
    """The volume's status, or who has it, forbids what was asked: `reason` says what it would have to be."""

    template = "Volume {volume_id} cannot be used: {reason}"


class Gone(InstarError):
    """What the API has offered once, and offers no more."""

    status = 410


class TooLarge(InstarError):
    status, fault = 413, "overLimit"


class UnsupportedMedia(InstarError):
    status, fault = 415, "badMediaType"


class RangeNotSatisfiable(InstarError):
    """The part of the data that a download asks for does not exist; names how many bytes there are."""

    status, fault = 416, "badRequest"
    template = "The range {range} is not within the {size_bytes} bytes of the image."


class Unavailable(InstarError):
    """The database or the bus is away for a moment: try again after `retry_after_s`."""

    status, fault = 503, "serviceUnavailable"
    template = "The service is not available at this moment, try again in {retry_after_s} seconds."


class StorageAway(Unavailable):
    """The process that has the volumes' data does not answer: nothing is lost, what was asked is done when it is back."""

    template = "The volumes cannot be reached at this moment, try again in {retry_after_s} seconds."


# --- an operation fails ---------------------------------------------------------------------------------------------


class OperationError(InstarError):
    """Base of what makes an operation fail; it becomes the instance's fault."""

    status, fault = 500, "computeFault"


class StepFailed(OperationError):
    """A step raised something that nobody expected."""

    template = "{step} failed."


class StepTimeout(OperationError):
    """Names what was waited for, and how long."""

    template = "Waited {waited_s:g} seconds for {what}."


class HostUnreachable(OperationError):
    """The host stopped reporting, or gave no answer in time."""

    template = "Host {host} cannot be reached."


class HostNotReady(OperationError):
    """The host was cut off, and does not know yet what it lost meanwhile; or it was told this before. Nothing was done."""

    template = "Host {host} is coming back, and takes no commands yet."


class HostInUse(Conflict):
    """Its guests may still run: nothing of it may be given to another host."""

    template = "Compute service of {host} is still in use."


class CommandUnknown(OperationError):
    """The agent of the host is older or newer than whoever told it this: nothing was done."""

    template = "The agent of host {host} (version {version}) does not understand {command}."


class HypervisorUnavailable(OperationError):
    """The agent is there but its hypervisor is not (libvirtd down)."""

    template = "The hypervisor of host {host} is not available."


# What says that a host does not answer now: whatever is left to do there is done when it does again.
HOST_AWAY = (HostUnreachable, HypervisorUnavailable, StepTimeout)


class HypervisorError(OperationError):
    """The hypervisor refused: `reason` is safe to show to users (no paths)."""

    template = "The hypervisor failed: {reason}"


class DiskFull(OperationError):
    """No room on a file system of the host. `filesystem` is its mount point, never the file's path."""

    template = "No space left on file system {filesystem} of host {host}."


class NoValidHost(OperationError):
    """`refusals` maps a filter's name to the number of hosts it refused; `details` has a line for each host."""

    template = "No valid host was found. {reason}"


class ImageGone(OperationError):
    template = "Image {image_id} could not be found."


class GuestAgentMissing(Conflict):
    """The guest would have to help, and runs no agent that can."""

    template = "Instance {id} runs no guest agent that can {what}."


class MigrationAborted(OperationError):
    template = "The live migration of instance {id} was aborted."


class VolumeFailed(OperationError):
    """A volume or snapshot could not be made, or its data cannot be served. `reason` is safe to show to users."""

    template = "Volume {volume_id} failed: {reason}"


class StreamBroken(OperationError):
    """Data from another host stopped coming, and did not come again in time; or it is not what it was. `what` is the
    stream's name, `host` the peer."""

    template = "The transfer from host {host} broke off: {reason}."


class StreamRefused(StreamBroken):
    """The peer does not give it (not granted, or no longer), or it is not the peer that we were told of: only a new grant
    helps."""

    template = "The transfer from host {host} was refused: {reason}."


class InterfaceAttachFailed(OperationError):
    template = "Failed to attach network adapter device to {id}"


class NoFreeAddress(OperationError):
    template = "No more addresses are available on network {network_id}."


class PortInUse(Conflict):
    template = "Port {port_id} is still in use."


class Cancelled(OperationError):
    """Another operation (a delete, a reset of the state) took over the instance."""

    template = "The operation was taken over by {by}."


class TaskStateConflict(OperationError):
    """A write expected another task_state and changed nothing."""

    template = "Instance {id} is no longer in task_state {expected}."


class StaleEpoch(OperationError):
    """A command of a conductor that no longer owns the operation."""

    template = "A newer operation owns instance {id}."


class LeaseLost(OperationError):
    """This conductor no longer owns the operation: it must stop without touching anything."""

    template = "The operation {id} belongs to another conductor now."


# --- the process cannot start ---------------------------------------------------------------------------------------


class StartupError(InstarError):
    """The program must not start; the message says why and what to do."""
