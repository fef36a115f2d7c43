"""Every record that outlives the process that made it, or that goes to one of another version."""

from __future__ import annotations

from typing import Any

from msgspec import inspect as mi

from instar.bus.contract import Message, Reply
from instar.lifecycle.attach_interface import InterfaceArguments
from instar.lifecycle.attach_volume import SwapArguments, VolumeArguments
from instar.lifecycle.evacuate import EvacuateArguments
from instar.lifecycle.live_migration import LiveArguments
from instar.lifecycle.move import MoveArguments
from instar.lifecycle.password import PasswordArguments
from instar.lifecycle.reboot import RebootArguments
from instar.lifecycle.rebuild import RebuildArguments
from instar.lifecycle.rescue import RescueArguments
from instar.lifecycle.shelve import UnshelveArguments
from instar.lifecycle.snapshot import SnapshotArguments
from instar.model.commands import AnyCommand, HostProgress
from instar.model.console import ConsoleOffer
from instar.model.guest import (
    DiskOffer,
    GuestDiagnostics,
    GuestState,
    HostCensus,
    HostInventory,
    ImageSource,
    LiveTarget,
    MigrationProgress,
    SnapshotTaken,
    SoftRebootOutcome,
)
from instar.model.host import HostEvent, HostReport
from instar.model.instance import InstanceFacts, InstancePort, InstanceSpec, InstanceVolume
from instar.model.operation import Notification, OperationAccepted, RecordedError
from instar.model.stream import StreamAddress
from instar.model.volume import VolumeConnection
from instar.scheduling.request import Selection
from instar.volumes.contract import VolumeInfo
from tests.upgrade.shapes import Shape, encode, sample_of, shape_of

COMMANDS: tuple[type, ...] = AnyCommand.__args__
ANSWERS = (
    GuestState, SoftRebootOutcome, HostCensus, SnapshotTaken, DiskOffer, LiveTarget, StreamAddress, ConsoleOffer,
    GuestDiagnostics,
)  # fmt: skip
REPORTS = (HostReport, HostEvent, HostProgress)
ON_THE_BUS = (Message, Reply, OperationAccepted, Notification)
ARGUMENTS = (
    EvacuateArguments, InterfaceArguments, LiveArguments, MoveArguments, PasswordArguments, RebootArguments,
    RebuildArguments, RescueArguments, SnapshotArguments, SwapArguments, UnshelveArguments, VolumeArguments,
)  # fmt: skip
JOURNAL = (Selection, InstancePort, InstanceVolume, VolumeConnection, VolumeInfo, ImageSource, RecordedError)
IN_ROWS = (InstanceSpec, InstanceFacts, HostInventory, MigrationProgress)
RECORDS: dict[str, type] = {
    kind.__name__: kind for kind in (*COMMANDS, *ANSWERS, *REPORTS, *ON_THE_BUS, *ARGUMENTS, *JOURNAL, *IN_ROWS)
}


def shapes_now() -> dict[str, Shape]:
    """Every struct that the records of this version have in them, by name."""
    structs: dict[str, Shape] = {}
    for kind in RECORDS.values():
        shape_of(mi.type_info(kind), structs)
    return structs


def samples_now() -> dict[str, dict[str, str]]:
    """Each record in msgpack, in hexadecimal digits: with all its fields, and with those alone that have no default."""
    return {
        name: {how: encode(_sample(kind, full=how == "full")).hex() for how in ("full", "bare")}
        for name, kind in RECORDS.items()
    }


def _sample(kind: type, *, full: bool) -> Any:
    return sample_of(mi.type_info(kind), full=full)
