"""The Image API v2: routes, policy and handlers over `LocalImages`. Called by the program through `image_api`.

Who may do what has two halves: the role, which the table below says, and whose image it is, which the service says.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlencode

from instar.errors import BadRequest, ImageGone, InstarError, NotFound, TooLarge, UnsupportedMedia
from instar.http.answer import Answer, empty_answer, json_answer, stream_answer
from instar.http.app import Service
from instar.http.faults import RouteNotFound, image_fault
from instar.http.paging import read_page
from instar.http.policy import MEMBER, OPEN, READER, Policy
from instar.http.request import ClientGone, Request
from instar.http.routing import Route
from instar.images.byte_range import ByteRange, requested_range
from instar.images.fields import Caller
from instar.images.listing import image_query
from instar.images.local import Download, LocalImages
from instar.images.patch import MEDIA_TYPES, changes_from
from instar.images.schemas import SCHEMAS
from instar.images.view import image_view, member_view
from instar.store.images import ImageRecord

PREFIX = "/image"
VERSIONS = ("v2.9", "v2.7", "v2.6", "v2.5", "v2.4", "v2.3", "v2.2", "v2.1", "v2.0")  # newest first
DATA_TYPE = "application/octet-stream"
_SYSTEM = Caller("", is_admin=True)
# An upload that is refused at once is still read so far: most clients see an answer only after they have sent it all.
DRAIN_MAX_BYTES = 64 << 20

POLICY = Policy({
    "image:versions:list": OPEN,
    "image:images:list": READER,
    "image:images:show": READER,
    "image:images:create": MEMBER,
    "image:images:update": MEMBER,
    "image:images:delete": MEMBER,
    "image:data:download": READER,
    "image:data:upload": MEMBER,
    "image:data:host": OPEN,  # the URL itself is signed
    "image:images:deactivate": MEMBER,
    "image:images:reactivate": MEMBER,
    "image:tags:add": MEMBER,
    "image:tags:remove": MEMBER,
    "image:members:list": READER,
    "image:members:show": READER,
    "image:members:add": MEMBER,
    "image:members:update": MEMBER,
    "image:members:remove": MEMBER,
    "image:schemas:show": READER,
    "image:info:show": READER,
})


def image_api(images: LocalImages, *, list_limit_max: int) -> Service:
    """The service to hand to `build_app`."""
    api = _ImageApi(images, list_limit_max)
    return Service("image", "image", PREFIX, api.routes(), POLICY, image_fault)


def _caller(request: Request) -> Caller:
    return Caller(request.context.project_id, request.context.is_admin)


class _ImageApi:
    def __init__(self, images: LocalImages, list_limit_max: int) -> None:
        self._images = images
        self._list_limit_max = list_limit_max

    def routes(self) -> list[Route]:
        one = "/v2/images/{image_id}"
        return [
            Route("GET", "/", "image:versions:list", self.versions_root),
            Route("GET", "/versions", "image:versions:list", self.versions),
            Route("GET", "/v2/images", "image:images:list", self.image_list),
            Route("POST", "/v2/images", "image:images:create", self.image_create),
            Route("GET", one, "image:images:show", self.image_show),
            Route("PATCH", one, "image:images:update", self.image_update),
            Route("DELETE", one, "image:images:delete", self.image_delete),
            Route("GET", f"{one}/file", "image:data:download", self.data_download),
            Route("PUT", f"{one}/file", "image:data:upload", self.data_upload),
            Route("POST", f"{one}/actions/deactivate", "image:images:deactivate", self.image_deactivate),
            Route("POST", f"{one}/actions/reactivate", "image:images:reactivate", self.image_reactivate),
            Route("PUT", f"{one}/tags/{{tag}}", "image:tags:add", self.tag_add),
            Route("DELETE", f"{one}/tags/{{tag}}", "image:tags:remove", self.tag_remove),
            Route("GET", f"{one}/members", "image:members:list", self.member_list),
            Route("POST", f"{one}/members", "image:members:add", self.member_add),
            Route("GET", f"{one}/members/{{project_id}}", "image:members:show", self.member_show),
            Route("PUT", f"{one}/members/{{project_id}}", "image:members:update", self.member_update),
            Route("DELETE", f"{one}/members/{{project_id}}", "image:members:remove", self.member_remove),
            Route("GET", "/hosts/images/{image_id}", "image:data:host", self.host_download),
            Route("PUT", "/hosts/images/{image_id}", "image:data:host", self.host_upload),
            Route("GET", "/v2/schemas/{name}", "image:schemas:show", self.schema_show),
            Route("GET", "/v2/info/import", "image:info:show", self.info_import),
            Route("GET", "/v2/info/stores", "image:info:show", self.info_stores),
        ]

    # --- versions, schemas, facts -------------------------------------------------------------------------------------

    async def versions_root(self, request: Request) -> Answer:
        return _versions(request, 300)

    async def versions(self, request: Request) -> Answer:
        return _versions(request, 200)

    async def schema_show(self, request: Request) -> Answer:
        name = request.params["name"]
        if name not in SCHEMAS:
            raise NotFound(kind="Schema", id=name)
        return json_answer(SCHEMAS[name])

    async def info_import(self, request: Request) -> Answer:
        value: list[str] = []
        return json_answer(
            {"import-methods": {"description": "Import methods available.", "type": "array", "value": value}}
        )

    async def info_stores(self, request: Request) -> Answer:
        store = {"id": "local", "description": "Files of this machine, one for each content", "default": "true"}
        return json_answer({"stores": [store]})

    # --- images -------------------------------------------------------------------------------------------------------

    async def image_list(self, request: Request) -> Answer:
        caller = _caller(request)
        page = read_page(request, self._list_limit_max)
        marker = await self._marker(page.marker, caller)
        # One more than asked: only a page that has a next one says so.
        found = await self._images.list(image_query(request, caller, limit=page.limit + 1, marker=marker))
        images = found[: page.limit]
        rest = [(key, value) for key, value in request.query if key != "marker"]
        body: dict[str, Any] = {
            "images": [image_view(image) for image in images],
            "schema": "/v2/schemas/images",
            "first": "/v2/images" + ("?" + urlencode(rest) if rest else ""),
        }
        if len(found) > page.limit:
            body["next"] = "/v2/images?" + urlencode([*rest, ("marker", images[-1].id)])
        return json_answer(body)

    async def _marker(self, image_id: str | None, caller: Caller) -> ImageRecord | None:
        if image_id is None:
            return None
        try:
            return await self._images.fetch(image_id, caller)
        except NotFound as error:
            raise BadRequest("The marker could not be found.") from error

    async def image_create(self, request: Request) -> Answer:
        image = await self._images.create(await request.json(dict[str, Any]), _caller(request))
        location = f"{request.base_url}/v2/images/{image.id}".encode()
        return json_answer(image_view(image), 201, [(b"location", location)])

    async def image_show(self, request: Request) -> Answer:
        return json_answer(image_view(await self._images.fetch(request.params["image_id"], _caller(request))))

    async def image_update(self, request: Request) -> Answer:
        media_type = _media_type(request)
        if media_type not in MEDIA_TYPES:
            raise UnsupportedMedia(f"The body must be one of {', '.join(MEDIA_TYPES)}.")
        changes = changes_from(await request.json(list[Any]), media_type)
        return json_answer(image_view(await self._images.update(request.params["image_id"], changes, _caller(request))))

    async def image_delete(self, request: Request) -> Answer:
        await self._images.delete(request.params["image_id"], _caller(request))
        return empty_answer()

    async def image_deactivate(self, request: Request) -> Answer:
        await self._images.deactivate(request.params["image_id"], _caller(request))
        return empty_answer()

    async def image_reactivate(self, request: Request) -> Answer:
        await self._images.reactivate(request.params["image_id"], _caller(request))
        return empty_answer()

    async def tag_add(self, request: Request) -> Answer:
        await self._images.add_tag(request.params["image_id"], request.params["tag"], _caller(request))
        return empty_answer()

    async def tag_remove(self, request: Request) -> Answer:
        await self._images.remove_tag(request.params["image_id"], request.params["tag"], _caller(request))
        return empty_answer()

    # --- data ---------------------------------------------------------------------------------------------------------

    async def data_upload(self, request: Request) -> Answer:
        announced = _announced_size(request)
        data = _UploadedData(request, self._images.size_max_bytes)
        try:
            if _media_type(request) != DATA_TYPE:
                raise UnsupportedMedia(f"The data of an image must be sent as {DATA_TYPE}.")
            await self._images.upload(request.params["image_id"], data.chunks(), _caller(request), size_bytes=announced)
        except (ClientGone, TooLarge):
            raise
        except InstarError:
            await data.drain()
            raise
        return empty_answer()

    async def data_download(self, request: Request) -> Answer:
        image_id = request.params["image_id"]
        download = await self._images.open_data(image_id, _caller(request))
        if download is None:
            return empty_answer()
        return self._part_of(download, request)

    def _part_of(self, download: Download, request: Request) -> Answer:
        """The data, or the part of it that is asked for."""
        headers = [(b"accept-ranges", b"bytes")]
        try:
            part = requested_range(request.header(b"range"), download.size_bytes)
        except InstarError:
            download.file.close()
            raise
        status = 200 if part is None else 206
        if part is None:
            part = ByteRange(0, download.size_bytes)
            if download.image.md5 is not None:
                headers.append((b"content-md5", download.image.md5.encode()))
        else:
            last = part.start + part.length - 1
            headers.append((b"content-range", f"bytes {part.start}-{last}/{download.size_bytes}".encode()))
        chunks = self._images.blobs.stream(download.file, part.start, part.length)
        return stream_answer(chunks, length_bytes=part.length, status=status, headers=headers)

    # --- for hosts that do not see the directory ----------------------------------------------------------------------

    async def host_download(self, request: Request) -> Answer:
        image_id = self._checked(request)
        download = await self._images.open_data(image_id, _SYSTEM)
        if download is None or download.image.status != "active":
            if download is not None:
                download.file.close()
            raise NotFound(kind="Data of image", id=image_id)
        return self._part_of(download, request)

    async def host_upload(self, request: Request) -> Answer:
        image_id, size_bytes = self._checked(request), _announced_size(request)
        if size_bytes is None:
            raise BadRequest("The size of the data must be announced.")
        if size_bytes > self._images.size_max_bytes:
            raise TooLarge(f"The image is larger than the {self._images.size_max_bytes} bytes allowed.")
        data = _UploadedData(request, self._images.size_max_bytes)
        try:
            await self._images.receive_from_host(image_id, data.chunks(), size_bytes)
        except ImageGone as error:
            await data.drain()
            raise NotFound(kind="Image", id=image_id) from error
        return empty_answer()

    def _checked(self, request: Request) -> str:
        """The image that the URL opens. Raises RouteNotFound where hosts need no URLs, Forbidden."""
        if self._images.urls is None:
            raise RouteNotFound()
        image_id = request.params["image_id"]
        expires, signature = (request.query_one(name) or "" for name in ("expires", "signature"))
        self._images.urls.check(request.method, image_id, expires, signature)
        return image_id

    # --- members ------------------------------------------------------------------------------------------------------

    async def member_list(self, request: Request) -> Answer:
        caller = _caller(request)
        image = await self._images.fetch(request.params["image_id"], caller)
        members = await self._images.members.list(image, caller)
        return json_answer({"members": [member_view(member) for member in members], "schema": "/v2/schemas/members"})

    async def member_add(self, request: Request) -> Answer:
        caller = _caller(request)
        image = await self._images.fetch(request.params["image_id"], caller)
        project_id = _text_of(await request.json(dict[str, Any]), "member")
        return json_answer(member_view(await self._images.members.add(image, project_id, caller)))

    async def member_show(self, request: Request) -> Answer:
        caller = _caller(request)
        image = await self._images.fetch(request.params["image_id"], caller)
        return json_answer(member_view(await self._images.members.fetch(image, request.params["project_id"], caller)))

    async def member_update(self, request: Request) -> Answer:
        caller = _caller(request)
        image = await self._images.fetch(request.params["image_id"], caller)
        status = _text_of(await request.json(dict[str, Any]), "status")
        member = await self._images.members.set_status(image, request.params["project_id"], status, caller)
        return json_answer(member_view(member))

    async def member_remove(self, request: Request) -> Answer:
        caller = _caller(request)
        image = await self._images.fetch(request.params["image_id"], caller)
        await self._images.members.remove(image, request.params["project_id"], caller)
        return empty_answer()


def _versions(request: Request, status: int) -> Answer:
    links = [{"rel": "self", "href": f"{request.base_url}/v2/"}]
    newest = VERSIONS[0]
    versions = [
        {"id": one, "status": "CURRENT" if one == newest else "SUPPORTED", "links": links} for one in VERSIONS
    ]
    return json_answer({"versions": versions}, status)


def _media_type(request: Request) -> str:
    return request.header(b"content-type").partition(";")[0].strip().lower()


def _announced_size(request: Request) -> int | None:
    """The size that the client says the data has. Raises BadRequest for one that is no number."""
    text = request.header(b"x-openstack-image-size") or request.header(b"content-length")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise BadRequest("The size of the image must be a whole number of bytes.")
    return int(text)


class _UploadedData:
    """The body of an upload, and what is left of it when it is refused."""

    def __init__(self, request: Request, limit_bytes: int) -> None:
        self._request = request
        self._stream = request.stream(limit_bytes)
        self._complete = False

    async def chunks(self) -> AsyncIterator[bytes]:
        async for chunk in self._stream:
            yield chunk
        self._complete = True

    async def drain(self) -> None:
        """Read what the client still sends, so that it can read why it was refused; then the connection ends."""
        if self._complete:
            return
        self._request.answer_headers.append((b"connection", b"close"))
        drained = 0
        with contextlib.suppress(ClientGone, TooLarge):
            async for chunk in self._stream:
                drained += len(chunk)
                if drained > DRAIN_MAX_BYTES:
                    return


def _text_of(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str):
        raise BadRequest(f"Invalid value for {name}: it must be a string.")
    return value
