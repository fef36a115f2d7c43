"""Notifications in the form that consumers of OpenStack's versioned notifications read. Used by `rabbitmq.py`.

The envelope is oslo.messaging's format 2.0; the payload is a Nova versioned object, InstanceActionPayload, as documented
with Nova's notification samples. What Nova has and Instar has not is null there.
"""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime
from typing import Any

import msgspec
from pamqp.commands import Basic

from instar.bus.amqp_frames import PERSISTENT
from instar.bus.contract import Message
from instar.model.operation import Notification

PAYLOAD_VERSIONS = {
    "InstanceActionPayload": "1.8", "FlavorPayload": "1.4", "IpPayload": "1.0", "BlockDevicePayload": "1.0",
    "ExceptionPayload": "1.1",
}  # fmt: skip

# Where the field has another word for it.
_ACTIONS = {
    "start": "power_on", "stop": "power_off", "confirmResize": "resize_confirm", "revertResize": "resize_revert",
    "live-migration": "live_migration", "migrate": "resize", "attach_volume": "volume_attach",
    "detach_volume": "volume_detach", "swap_volume": "volume_swap", "attach_interface": "interface_attach",
    "detach_interface": "interface_detach", "createImage": "snapshot", "createBackup": "snapshot",
    "shelveOffload": "shelve_offload", "softDelete": "soft_delete", "changePassword": "change_password",
}  # fmt: skip
_AS_OURS = (
    "uuid", "display_name", "tenant_id", "user_id", "request_id", "state", "task_state", "host", "image_uuid", "created_at",
    "launched_at", "terminated_at",
)  # fmt: skip
_NOT_KNOWN = (
    "architecture", "availability_zone", "display_description", "host_name", "key_name", "deleted_at", "updated_at",
    "reservation_id", "os_type", "locked_reason",
)  # fmt: skip


def notification_form(message: Message, user: str) -> tuple[str, bytes, Basic.Properties]:
    """Routing key, body and properties of a message whose body is a Notification. Raises msgspec.MsgspecError."""
    told = msgspec.msgpack.decode(message.body, type=Notification)
    kind, _, phase = told.event_type.removeprefix("instance.").rpartition(".")
    inner = {
        "message_id": told.message_id,
        "publisher_id": told.publisher_id,
        "event_type": f"instance.{_ACTIONS.get(kind, kind)}.{phase}",
        "priority": told.priority.upper(),
        "payload": _action_payload(told.payload),
        "timestamp": datetime.fromtimestamp(told.timestamp / 1_000_000, UTC).strftime("%Y-%m-%d %H:%M:%S.%f"),
    }
    body = msgspec.json.encode({"oslo.version": "2.0", "oslo.message": msgspec.json.encode(inner).decode()})
    properties = Basic.Properties(
        content_type="application/json", content_encoding="utf-8", delivery_mode=PERSISTENT, message_id=told.message_id,
        user_id=user, priority=0, headers={},
    )  # fmt: skip
    return f"versioned_notifications.{told.priority.lower()}", body, properties


def _action_payload(ours: dict[str, Any]) -> dict[str, Any]:
    data = dict.fromkeys(_NOT_KNOWN) | {name: ours.get(name) for name in _AS_OURS}
    power = str(ours.get("power_state") or "")
    data |= {
        "host_name": ours.get("display_name"),
        "node": ours.get("host"),
        "power_state": {"nostate": "pending", "": None}.get(power, power),
        "kernel_id": "", "ramdisk_id": "", "progress": 0, "metadata": {}, "locked": False, "auto_disk_config": "MANUAL",
        "action_initiator_user": ours.get("user_id"),
        "action_initiator_project": ours.get("tenant_id"),
        "flavor": _flavor(ours.get("flavor") or {}),
        "ip_addresses": [_address(one) for one in ours.get("ip_addresses") or []],
        "block_devices": [_object("BlockDevicePayload", dict(one)) for one in ours.get("block_devices") or []],
        "fault": _fault(ours.get("fault")),
    }  # fmt: skip
    return _object("InstanceActionPayload", data)


def _object(name: str, data: dict[str, Any]) -> dict[str, Any]:
    return {
        "nova_object.name": name,
        "nova_object.namespace": "nova",
        "nova_object.version": PAYLOAD_VERSIONS[name],
        "nova_object.data": data,
    }


def _flavor(ours: dict[str, Any]) -> dict[str, Any]:
    data: dict[str, Any] = {
        "root_gb": 0, "ephemeral_gb": 0, "swap": 0, "rxtx_factor": 1.0, "vcpu_weight": 0, "disabled": False,
        "is_public": True, "extra_specs": {}, "projects": None, "description": None,
    }  # fmt: skip
    return _object("FlavorPayload", data | ours)


def _address(ours: dict[str, Any]) -> dict[str, Any]:
    version = ipaddress.ip_address(ours["address"]).version
    return _object("IpPayload", {"label": "", "meta": {}, "device_name": None, "version": version} | ours)


def _fault(ours: dict[str, Any] | None) -> dict[str, Any] | None:
    if ours is None:
        return None
    where = {"module_name": "instar", "function_name": "", "traceback": ""}
    return _object("ExceptionPayload", where | ours)
