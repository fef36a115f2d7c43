"""Images shared with other projects: the owner adds members, each member accepts or rejects for itself.

Called by `api.py` with images that the caller may see; a member's own row is all that a member sees.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from instar.errors import BadRequest, Forbidden, NotFound, QuotaExceeded
from instar.images.fields import Caller
from instar.store.contract import Store
from instar.store.images import (
    MEMBERS_MAX,
    ImageRecord,
    MemberRecord,
    image_member_delete,
    image_member_fetch,
    image_member_insert,
    image_member_list,
    image_member_update,
)

MEMBER_STATUSES = ("pending", "accepted", "rejected")
PROJECT_ID_MAX_LENGTH = 255


def _owns(image: ImageRecord, caller: Caller) -> bool:
    return caller.is_admin or image.owner == caller.project_id


class ImageMembers:
    """`clock` gives microseconds since the epoch."""

    def __init__(self, store: Store, clock: Callable[[], int]) -> None:
        self._store = store
        self._clock = clock

    async def add(self, image: ImageRecord, project_id: str, caller: Caller) -> MemberRecord:
        """Share with a project; pending until it accepts. Raises Forbidden, Conflict (is one), QuotaExceeded."""
        self._check_owner(image, caller)
        if image.visibility != "shared":
            raise Forbidden("Only shared images have members.")
        if not project_id or len(project_id) > PROJECT_ID_MAX_LENGTH or not project_id.isprintable():
            raise BadRequest("Invalid value for member: it must be the id of a project.")
        now = self._clock()
        member = MemberRecord(image.id, project_id, "pending", now, now)
        if not await image_member_insert(self._store, member):
            raise QuotaExceeded(resource="image members", requested=1, used=MEMBERS_MAX, limit=MEMBERS_MAX)
        return member

    async def list(self, image: ImageRecord, caller: Caller) -> list[MemberRecord]:
        """All members for the owner; for a member, itself."""
        if image.visibility != "shared":
            return []
        members = await image_member_list(self._store, image.id)
        if _owns(image, caller):
            return members
        return [member for member in members if member.project_id == caller.project_id]

    async def fetch(self, image: ImageRecord, project_id: str, caller: Caller) -> MemberRecord:
        """Raises NotFound; also for a member that is somebody else."""
        member = None
        if _owns(image, caller) or project_id == caller.project_id:
            member = await image_member_fetch(self._store, image.id, project_id)
        if member is None:
            raise NotFound(kind="Member", id=project_id)
        return member

    async def set_status(self, image: ImageRecord, project_id: str, status: str, caller: Caller) -> MemberRecord:
        """What the member itself says. Raises Forbidden for anybody else (the owner, too), BadRequest, NotFound."""
        if status not in MEMBER_STATUSES:
            raise BadRequest(f"Invalid value for status: it must be one of {', '.join(MEMBER_STATUSES)}.")
        member = await self.fetch(image, project_id, caller)
        if not caller.is_admin and project_id != caller.project_id:
            raise Forbidden("Only the member itself may accept or reject an image.")
        member = msgspec.structs.replace(member, status=status, updated_at=self._clock())
        await image_member_update(self._store, member)
        return member

    async def remove(self, image: ImageRecord, project_id: str, caller: Caller) -> None:
        """Raises Forbidden for who does not own the image, NotFound for a project that is no member."""
        self._check_owner(image, caller)
        await image_member_delete(self._store, image.id, project_id)

    def _check_owner(self, image: ImageRecord, caller: Caller) -> None:
        if not _owns(image, caller):
            raise Forbidden(f"You are not permitted to share image {image.id}.")
