"""The leak audit: what should be, held against what is. A finding is a thing without an owner, or a record without a thing.

`instar admin audit` prints it; the reconciler repairs what it finds. Instances with an operation in flight are left out:
the operation sees to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum

import msgspec

from instar.engine.hosts import HostClient
from instar.errors import InstarError
from instar.lifecycle.cloud import Cloud
from instar.model.guest import HostCensus
from instar.model.network import TAP_NAME_LENGTH
from instar.store.audit import audit_claims, audit_host_totals, audit_instances, audit_usage
from instar.store.contract import Row
from instar.volumes.contract import VolumeAttachment

CENSUS_DEADLINE_S = 20.0


class Kind(StrEnum):
    GUEST = "guest without instance"
    DISKS = "disks without instance"
    ASIDE = "disks set aside for a move that nobody waits for"
    TAP = "tap without port"
    PLUGS = "ports set up without instance"
    CLAIM = "claim without instance"
    PORT = "port without instance"
    ATTACHMENT = "volume attachment without instance"
    RESERVATION = "volume attachment that its instance does not know"
    NEW_PORT = "port that its instance does not know"
    EXPORT = "volume served without attachment"
    STUCK = "task_state without operation"
    HOST_TOTALS = "claims of host add up wrongly"
    USAGE = "usage of project adds up wrongly"
    WHEREABOUTS = "guest that is on one of two hosts, since a live migration broke off"
    UPLOAD = "unfinished image without operation"
    IMAGE = "cached image is damaged, and disks stand on it"
    UNREACHABLE = "host could not be asked"


class Finding(msgspec.Struct, frozen=True):
    """`subject` is the id of the thing; `epoch` that of the instance it once belonged to, where that is known."""

    kind: Kind
    subject: str
    host: str | None = None
    epoch: int = 0


async def audit(cloud: Cloud, hosts: list[str]) -> list[Finding]:
    """All findings, of the database and of these hosts."""
    # What is comes before what should be: something that a new operation makes meanwhile has its record by then.
    censuses: dict[str, HostCensus] = {}
    findings: list[Finding] = []
    client = HostClient(cloud.bus, deadline_s=CENSUS_DEADLINE_S)
    for host in hosts:
        try:
            censuses[host] = await client.census(host)
        except InstarError:
            findings.append(Finding(Kind.UNREACHABLE, host, host))
    owners = await cloud.networks.port_owners()
    claims = await audit_claims(cloud.store)
    attachments = await cloud.volumes.attachments()
    uploads = await cloud.images.unfinished()
    served = await cloud.volumes.served_in_vain()
    instances = await audit_instances(cloud.store)
    for host, census in censuses.items():
        findings += leftovers(host, census, instances)
        findings += _left_by_nobody(host, census, owners)
    findings += [Finding(Kind.CLAIM, c["id"], c["host"]) for c in claims if _is_stray(c, instances)]
    findings += [Finding(Kind.PORT, port) for port, owner in owners.items() if owner not in instances]
    findings += [Finding(Kind.ATTACHMENT, one.id) for one in attachments if one.instance_id not in instances]
    findings += _taken_in_vain(attachments, owners, instances)
    findings += [Finding(Kind.EXPORT, volume_id) for volume_id in served]
    findings += [Finding(Kind.UPLOAD, image) for image, owner in uploads.items() if not _is_busy(instances.get(owner))]
    findings += [Finding(Kind.STUCK, i["id"], i["host"]) for i in instances.values() if i["task_state"] and not i["busy"]]
    lost = [row for row in instances.values() if row["maybe_on"] and not row["busy"]]
    findings += [Finding(Kind.WHEREABOUTS, row["id"], row["host"]) for row in lost]
    findings += [Finding(Kind.HOST_TOTALS, row["name"], row["name"]) for row in await audit_host_totals(cloud.store)]
    findings += [Finding(Kind.USAGE, row["project_id"]) for row in await audit_usage(cloud.store)]
    return findings


def _taken_in_vain(
    attachments: Sequence[VolumeAttachment], port_owners: dict[str, str], instances: dict[str, Row]
) -> Iterator[Finding]:
    """What was taken for an instance whose record does not have it: the operation that it was taken for never began."""
    known: dict[str, set[str]] = {}

    def has(instance_id: str, thing: str) -> bool:
        row = instances.get(instance_id)
        if row is None or row["busy"]:
            return True  # a finding of another kind; or an operation sees to it
        if instance_id not in known:
            devices = _decode_devices(row["facts"])
            known[instance_id] = {one.attachment_id for one in devices.volumes} | {
                one.definition.id for one in devices.ports
            }
        return thing in known[instance_id]

    for attachment in attachments:
        if not has(attachment.instance_id, attachment.id):
            yield Finding(Kind.RESERVATION, attachment.id)
    for port_id, instance_id in port_owners.items():
        if not has(instance_id, port_id):
            yield Finding(Kind.NEW_PORT, port_id)


def mentioned(census: HostCensus) -> set[str]:
    """The instances of which something stands on the host."""
    return {*census.guests, *census.instance_dirs, *census.set_aside, *census.with_ports}


def leftovers(host: str, census: HostCensus, instances: dict[str, Row]) -> Iterator[Finding]:
    """What stands on the host and belongs to no instance that is there. `instances` has all that are `mentioned`."""

    def strange(instance_id: str) -> bool:
        row = instances.get(instance_id)
        return row is None or (not row["busy"] and host not in (row["host"], row["maybe_on"]) and not _is_moving(row))

    for instance_id in census.guests:
        if strange(instance_id):
            yield Finding(Kind.GUEST, instance_id, host, _epoch(instances.get(instance_id)))
    for instance_id in census.instance_dirs:
        if strange(instance_id) and instance_id not in census.guests:
            yield Finding(Kind.DISKS, instance_id, host, _epoch(instances.get(instance_id)))
    for instance_id in census.set_aside:
        row = instances.get(instance_id)
        if row is None or (not row["busy"] and not _is_moving(row)):
            yield Finding(Kind.ASIDE, instance_id, host, _epoch(row))
    for instance_id in census.with_ports:
        if strange(instance_id) and instance_id not in census.guests and instance_id not in census.instance_dirs:
            yield Finding(Kind.PLUGS, instance_id, host, _epoch(instances.get(instance_id)))


def _left_by_nobody(host: str, census: HostCensus, port_owners: dict[str, str]) -> Iterator[Finding]:
    """What of the host names no instance: devices of ports that are gone, images that are not what they were."""
    known = {("tap" + port_id)[:TAP_NAME_LENGTH] for port_id in port_owners}
    for tap in census.taps:
        if tap not in known:
            yield Finding(Kind.TAP, tap, host)
    for sha256 in census.damaged_images:
        yield Finding(Kind.IMAGE, sha256, host)


def _is_stray(claim: Row, instances: dict[str, Row]) -> bool:
    """A claim on a host that its instance is not on, and that no operation answers for: neither one in flight nor a move
    that waits to be confirmed."""
    row = instances.get(claim["instance_id"])
    if row is None:
        return True
    return not row["busy"] and claim["host"] not in (row["host"], row["maybe_on"]) and not _is_moving(row)


class _Moving(msgspec.Struct):
    move: object = None


class _Identified(msgspec.Struct, frozen=True):
    id: str = ""


class _Device(msgspec.Struct):
    """Of a volume or a port of an instance, what it is known by."""

    attachment_id: str = ""
    definition: _Identified = _Identified()


class _Devices(msgspec.Struct):
    volumes: tuple[_Device, ...] = ()
    ports: tuple[_Device, ...] = ()


_decode_devices = msgspec.msgpack.Decoder(_Devices).decode
_decode_moving = msgspec.msgpack.Decoder(_Moving).decode


def _is_moving(row: Row) -> bool:
    """A move of the instance was neither confirmed nor reverted: it may have something on two hosts."""
    return _decode_moving(row["facts"]).move is not None


def _is_busy(row: Row | None) -> bool:
    return row is not None and bool(row["busy"])


def _epoch(row: Row | None) -> int:
    return int(row["epoch"]) if row is not None else 0
