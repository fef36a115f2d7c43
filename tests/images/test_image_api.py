"""The life of an image over HTTP: fields, patches, data, tags."""

from __future__ import annotations

import asyncio
import hashlib
import uuid

import pytest

from instar.config import ImageSettings
from instar.errors import ImageGone, NotFound


async def test_versions_are_there_without_a_token(as_role):
    nobody = as_role("")
    root = (await nobody.call("GET", "/", 300)).json()
    assert root == (await nobody.call("GET", "/versions", 200)).json()
    assert [one["status"] for one in root["versions"]].count("CURRENT") == 1
    assert root["versions"][0]["links"][0]["href"].endswith("/image/v2/")


async def test_created_image_is_queued_and_has_what_was_given(member):
    answer = await member.call(
        "POST", "/v2/images", 201,
        json={"name": "Büro", "disk_format": "qcow2", "container_format": "bare", "min_disk": 2, "min_ram": 64,
              "tags": ["a", "b", "a"], "protected": True, "os_distro": "debian", "hw_cpu_cores": 2},
    )  # fmt: skip
    image = answer.json()
    assert answer.headers["location"].endswith(f"/image/v2/images/{image['id']}")
    assert image == await member.show(image["id"])
    assert (image["status"], image["visibility"], image["owner"]) == ("queued", "shared", "p1")
    assert (image["size"], image["checksum"], image["os_hash_value"], image["virtual_size"]) == (None,) * 4
    assert (image["os_distro"], image["hw_cpu_cores"], image["tags"]) == ("debian", "2", ["a", "b"])
    assert image["file"] == f"/v2/images/{image['id']}/file"
    assert not {"locations", "direct_url", "sha256"} & set(image)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"name": "x" * 256}, 400),
        ({"name": 5}, 400),
        ({"name": "nul\0"}, 400),
        ({"disk_format": "vmdk"}, 400),
        ({"container_format": "ova"}, 400),
        ({"visibility": "everyone"}, 400),
        ({"visibility": "public"}, 403),
        ({"min_disk": -1}, 400),
        ({"min_ram": True}, 400),
        ({"min_ram": 1 << 40}, 400),
        ({"protected": "yes"}, 400),
        ({"tags": ["x" * 256]}, 400),
        ({"tags": [""]}, 400),
        ({"tags": [str(number) for number in range(129)]}, 400),
        ({f"p{number}": "v" for number in range(129)}, 400),
        ({"key": {"nested": 1}}, 400),
        ({"key": None}, 400),
        ({"k" * 256: "v"}, 400),
        ({"id": "not-a-uuid"}, 400),
        ({"owner": "p2"}, 403),
        ({"status": "active"}, 403),
        ({"checksum": "0"}, 403),
        ({"locations": []}, 403),
        ({"os_glance_stage": "x"}, 403),
    ],
)
async def test_wrong_fields_are_refused(body, status, member):
    await member.call("POST", "/v2/images", status, json=body)
    assert await member.names() == []


async def test_own_id_is_taken_and_never_given_out_again(member):
    image_id = str(uuid.uuid4())
    await member.create(id=image_id)
    await member.create(id=image_id, expect=409)
    await member.call("DELETE", f"/v2/images/{image_id}", 204)
    await member.call("GET", f"/v2/images/{image_id}", 404)
    await member.call("DELETE", f"/v2/images/{image_id}", 404)
    await member.create(id=image_id, expect=409)


async def test_patch_adds_replaces_removes_and_moves(member):
    image = await member.create(a="1", b="2", tags=["x", "y"])
    answer = await member.patch(
        image["id"],
        {"op": "replace", "path": "/name", "value": "new"},
        {"op": "add", "path": "/c~1d", "value": "3"},
        {"op": "replace", "path": "/a", "value": "9"},
        {"op": "move", "from": "/b", "path": "/e"},
        {"op": "add", "path": "/tags/1", "value": "between"},
        {"op": "remove", "path": "/tags/0"},
        {"op": "add", "path": "/tags/-", "value": "z"},
        {"op": "replace", "path": "/min_disk", "value": 3},
        {"op": "replace", "path": "/disk_format", "value": "qcow2"},
    )
    changed = answer.json()
    assert changed == await member.show(image["id"])
    assert (changed["name"], changed["c/d"], changed["a"], changed["e"]) == ("new", "3", "9", "2")
    assert (changed["tags"], changed["min_disk"], changed["disk_format"]) == (["between", "y", "z"], 3, "qcow2")
    assert "b" not in changed
    await member.patch(image["id"], {"op": "remove", "path": "/e"})
    assert "e" not in await member.show(image["id"])
    assert await member.names("?a=9") == ["new"]
    assert await member.names("?a=1") == []


@pytest.mark.parametrize(
    ("operation", "status"),
    [
        ({"op": "replace", "path": "/id", "value": "x"}, 403),
        ({"op": "replace", "path": "/status", "value": "active"}, 403),
        ({"op": "remove", "path": "/checksum"}, 403),
        ({"op": "replace", "path": "/size", "value": 1}, 403),
        ({"op": "replace", "path": "/os_hash_value", "value": "x"}, 403),
        ({"op": "add", "path": "/locations/-", "value": {"url": "file:///etc/passwd"}}, 403),
        ({"op": "replace", "path": "/locations", "value": []}, 403),
        ({"op": "replace", "path": "/owner", "value": "p2"}, 403),
        ({"op": "replace", "path": "/visibility", "value": "public"}, 403),
        ({"op": "remove", "path": "/name"}, 403),
        ({"op": "remove", "path": "/visibility"}, 403),
        ({"op": "move", "from": "/name", "path": "/x"}, 403),
        ({"op": "remove", "path": "/absent"}, 409),
        ({"op": "replace", "path": "/absent", "value": "x"}, 409),
        ({"op": "test", "path": "/name", "value": "x"}, 400),
        ({"op": "add", "path": "/name"}, 400),
        ({"op": "add", "path": "name", "value": "x"}, 400),
        ({"op": "add", "path": "/a/b", "value": "x"}, 400),
        ({"op": "add", "path": "/", "value": "x"}, 400),
        ({"op": "add", "path": "/tags/7", "value": "x"}, 400),
        ({"op": "replace", "path": "/tags", "value": "x"}, 400),
        ({"op": "replace", "path": "/min_ram", "value": "64"}, 400),
        ("text", 400),
    ],
)
async def test_wrong_patches_change_nothing(operation, status, member):
    image = await member.create(keep="me")
    await member.patch(image["id"], {"op": "replace", "path": "/keep", "value": "not"}, operation, expect=status)
    assert await member.show(image["id"]) == image


async def test_patch_needs_its_media_type(member):
    image = await member.create()
    await member.call("PATCH", f"/v2/images/{image['id']}", 415, json=[])
    old = {"content-type": "application/openstack-images-v2.0-json-patch"}
    change = [{"replace": "/name", "value": "old way"}, {"add": "/a", "value": "1"}]
    answer = await member.call("PATCH", f"/v2/images/{image['id']}", 200, json=change, headers=old)
    assert (answer.json()["name"], answer.json()["a"]) == ("old way", "1")


async def test_formats_are_fixed_once_there_is_data(member):
    image = await member.add()
    await member.patch(image["id"], {"op": "replace", "path": "/disk_format", "value": "qcow2"}, expect=403)
    await member.patch(image["id"], {"op": "replace", "path": "/disk_format", "value": "raw"})


async def test_edits_at_the_same_moment_are_all_kept(member):
    image = await member.create()
    await asyncio.gather(*(member.call("PUT", f"/v2/images/{image['id']}/tags/t{number}", 204) for number in range(4)))
    assert sorted((await member.show(image["id"]))["tags"]) == ["t0", "t1", "t2", "t3"]


async def test_tags_are_added_once_and_removed(member):
    image = await member.create()
    path = f"/v2/images/{image['id']}/tags"
    await member.call("PUT", f"{path}/a%20b%2Fc", 204)
    await member.call("PUT", f"{path}/a%20b%2Fc", 204)
    assert (await member.show(image["id"]))["tags"] == ["a b/c"]
    await member.call("PUT", f"{path}/{'x' * 256}", 400)
    await member.call("DELETE", f"{path}/a%20b%2Fc", 204)
    await member.call("DELETE", f"{path}/a%20b%2Fc", 404)


async def test_uploaded_data_comes_back_with_its_hashes(member, cloud):
    data = bytes(range(256)) * 12_000 + bytes(3 << 20) + b"end"  # with a hole, and no whole number of blocks
    image = await member.add(data=data)
    assert (image["status"], image["size"], image["virtual_size"]) == ("active", len(data), len(data))
    assert image["checksum"] == hashlib.md5(data).hexdigest()
    assert (image["os_hash_algo"], image["os_hash_value"]) == ("sha512", hashlib.sha512(data).hexdigest())
    answer = await member.call("GET", f"/v2/images/{image['id']}/file", 200)
    assert answer.content == data
    assert answer.headers["content-md5"] == image["checksum"]
    assert answer.headers["content-length"] == str(len(data))
    stored = cloud.directory / "images" / hashlib.sha256(data).hexdigest()
    assert stored.stat().st_mode & 0o777 == 0o444
    assert stored.stat().st_blocks * 512 < len(data)


async def test_upload_in_chunks_needs_no_length(member):
    async def pieces():
        for _ in range(5):
            yield b"y" * 300_000

    image = await member.create()
    await member.upload(image["id"], pieces())
    assert (await member.show(image["id"]))["size"] == 1_500_000


@pytest.mark.parametrize(
    ("asked", "status", "first", "last"),
    [("bytes=0-9", 206, 0, 9), ("bytes=90-", 206, 90, 99), ("bytes=-5", 206, 95, 99), ("bytes=50-500", 206, 50, 99),
     ("bytes=100-", 416, 0, 0), ("bytes=-0", 416, 0, 0), ("bytes=9-3", 200, 0, 99), ("lines=1-2", 200, 0, 99),
     ("bytes=0-1,5-6", 200, 0, 99)],
)  # fmt: skip
async def test_parts_of_the_data(asked, status, first, last, member):
    data = bytes(range(100))
    image = await member.add(data=data)
    answer = await member.call("GET", f"/v2/images/{image['id']}/file", status, headers={"range": asked})
    if status != 416:
        assert answer.content == data[first : last + 1]
    if status == 206:
        assert answer.headers["content-range"] == f"bytes {first}-{last}/100"


async def test_image_without_data_has_nothing_to_download(member):
    image = await member.create()
    await member.call("GET", f"/v2/images/{image['id']}/file", 204)


async def test_upload_that_cannot_be_leaves_the_image_queued(member, cloud, qemu_img):
    image = await member.create()
    await member.upload(image["id"], qemu_img("a.qcow2", "1M", "-f", "qcow2").read_bytes(), expect=415)
    await member.upload(image["id"], b"", expect=400)
    path = f"/v2/images/{image['id']}/file"
    await member.call("PUT", path, 415, content=b"x", headers={"content-type": "application/json"})
    await member.upload(image["id"], b"abc", expect=400, **{"x-openstack-image-size": "4"})
    await member.upload(image["id"], b"abc", expect=400, **{"x-openstack-image-size": "four"})
    assert (await member.show(image["id"]))["status"] == "queued"
    assert cloud.files() == []
    await member.upload(image["id"], b"abc")
    await member.upload(image["id"], b"abc", expect=409)


async def test_upload_needs_the_formats(member):
    image = (await member.call("POST", "/v2/images", 201, json={})).json()
    await member.upload(image["id"], b"abc", expect=400)


async def test_evil_qcow2_never_becomes_active(member, cloud, qemu_img):
    base = qemu_img("base.qcow2", "1M", "-f", "qcow2")
    top = qemu_img("top.qcow2", "1M", "-f", "qcow2", "-b", str(base), "-F", "qcow2")
    image = await member.create(disk_format="qcow2")
    answer = await member.upload(image["id"], top.read_bytes(), expect=400)
    assert "backing file" in answer.text
    assert str(cloud.directory) not in answer.text
    await member.upload(image["id"], base.read_bytes()[:200], expect=400)
    await member.upload(image["id"], qemu_img("huge.qcow2", "32T", "-f", "qcow2").read_bytes(), expect=400)
    assert cloud.files() == []


class TestSmallCloud:
    @pytest.fixture
    def settings(self):
        return ImageSettings(size_max_bytes=100_000)

    async def test_too_much_data_is_refused(self, member, cloud):
        image = await member.create()
        await member.upload(image["id"], b"x" * 100_001, expect=413)

        async def pieces():
            for _ in range(3):
                yield b"y" * 50_000

        await member.upload(image["id"], pieces(), expect=413)
        assert (await member.show(image["id"]))["status"] == "queued"
        assert cloud.files() == []
        await member.upload(image["id"], b"x" * 100_000)


async def test_of_two_uploads_at_once_one_is_refused(member, cloud):
    image = await member.create()
    go_on = asyncio.Event()

    async def slow():
        yield b"first" * 1000
        await go_on.wait()
        yield b"last"

    first = asyncio.create_task(member.upload(image["id"], slow()))
    await member.wait_for_status(image["id"], "saving")
    await member.upload(image["id"], b"second" * 100_000, expect=409)
    go_on.set()
    await first
    assert (await member.show(image["id"]))["size"] == 5004
    assert len(cloud.files()) == 1


async def test_image_deleted_during_its_upload_stays_deleted(member, cloud):
    image = await member.create()
    go_on = asyncio.Event()

    async def slow():
        yield b"first"
        await go_on.wait()
        yield b"last"

    upload = asyncio.create_task(member.upload(image["id"], slow(), expect=404))
    await member.wait_for_status(image["id"], "saving")
    await member.call("DELETE", f"/v2/images/{image['id']}", 204)
    go_on.set()
    await upload
    await member.call("GET", f"/v2/images/{image['id']}", 404)
    assert cloud.files() == []


async def test_same_content_is_stored_once_until_its_last_image_is_gone(member, other, cloud):
    one, two = await member.add("one"), await other.add("two")
    assert cloud.files() == [hashlib.sha256(b"x" * 1024).hexdigest()]
    await member.call("DELETE", f"/v2/images/{one['id']}", 204)
    assert (await other.call("GET", f"/v2/images/{two['id']}/file", 200)).content == b"x" * 1024
    await other.call("DELETE", f"/v2/images/{two['id']}", 204)
    assert cloud.files() == []


async def test_same_content_uploaded_and_deleted_at_once_is_never_lost(member, cloud):
    for _ in range(5):
        old, new = await member.add("old"), await member.create("new")
        await asyncio.gather(
            member.call("DELETE", f"/v2/images/{old['id']}", 204), member.upload(new["id"], b"x" * 1024)
        )
        assert (await member.call("GET", f"/v2/images/{new['id']}/file", 200)).content == b"x" * 1024
        await member.call("DELETE", f"/v2/images/{new['id']}", 204)
        assert cloud.files() == []


async def test_protected_image_is_not_deleted(member):
    image = await member.create(protected=True)
    await member.call("DELETE", f"/v2/images/{image['id']}", 403)
    await member.patch(image["id"], {"op": "replace", "path": "/protected", "value": False})
    await member.call("DELETE", f"/v2/images/{image['id']}", 204)


async def test_of_two_deletes_one_finds_nothing(member):
    image = await member.add()
    answers = await asyncio.gather(*(member._http.delete(f"/v2/images/{image['id']}") for _ in range(2)))
    assert sorted(answer.status_code for answer in answers) == [204, 404]


async def test_deactivated_data_is_for_admins_alone(member, admin, cloud):
    image = await member.add()
    action = f"/v2/images/{image['id']}/actions"
    await member.call("POST", f"{action}/deactivate", 204)
    await member.call("POST", f"{action}/deactivate", 204)
    assert (await member.show(image["id"]))["status"] == "deactivated"
    await member.call("GET", f"/v2/images/{image['id']}/file", 403)
    await admin.call("GET", f"/v2/images/{image['id']}/file", 200)
    with pytest.raises(ImageGone):
        await cloud.images.image_source(image["id"])
    await member.call("POST", f"{action}/reactivate", 204)
    await member.call("GET", f"/v2/images/{image['id']}/file", 200)
    queued = await member.create()
    await member.call("POST", f"/v2/images/{queued['id']}/actions/deactivate", 403)


async def test_lifecycle_gets_the_image_and_where_its_data_is(member, cloud, qemu_img):
    data = qemu_img("a.qcow2", "1M", "-f", "qcow2").read_bytes()
    image = await member.add(data=data, disk_format="qcow2", visibility="private", min_disk=1, os_type="linux")
    seen = await cloud.images.image_fetch(image["id"], project_id="p1", is_admin=False)
    assert (seen.status, seen.min_disk_gib, seen.virtual_size_bytes) == ("active", 1, 1 << 20)
    assert seen.properties == {"os_type": "linux"}
    with pytest.raises(NotFound):
        await cloud.images.image_fetch(image["id"], project_id="p2", is_admin=False)
    source = await cloud.images.image_source(image["id"])
    assert (source.format, source.size_bytes, source.virtual_size_bytes) == ("qcow2", len(data), 1 << 20)
    assert source.sha256 == hashlib.sha256(data).hexdigest()
    assert source.location == f"file://{cloud.directory}/images/{source.sha256}"


async def test_image_whose_data_disappears_is_gone(member, cloud):
    image, queued = await member.add(), await member.create()
    with pytest.raises(ImageGone):
        await cloud.images.image_source(queued["id"])
    (cloud.directory / "images" / cloud.files()[0]).unlink()
    with pytest.raises(ImageGone):
        await cloud.images.image_source(image["id"])
    await member.call("GET", f"/v2/images/{image['id']}/file", 404)
    await member.call("DELETE", f"/v2/images/{image['id']}", 204)
    with pytest.raises(ImageGone):
        await cloud.images.image_source(image["id"])


async def test_registered_image_is_public_and_registered_once(other, cloud, tmp_path):
    path = tmp_path / "guest.img"
    path.write_bytes(b"guest" * 1000)
    first, second = [
        await cloud.images.register("tiny", path, disk_format="raw", properties={"os_type": "linux"}, visibility="public")
        for _ in range(2)
    ]
    assert first.id == second.id
    image = await other.show(first.id)
    assert (image["name"], image["status"], image["visibility"], image["os_type"]) == (
        "tiny", "active", "public", "linux",
    )  # fmt: skip
    assert cloud.files() == [first.sha256]
    await other.call("DELETE", f"/v2/images/{first.id}", 403)
    path.write_bytes(b"newer" * 1000)
    third = await cloud.images.register("tiny", path, disk_format="raw", properties={}, visibility="public")
    assert third.id != first.id


async def test_register_that_is_refused_leaves_nothing(cloud, other, tmp_path):
    path = tmp_path / "guest.img"
    path.write_bytes(b"no qcow2")
    with pytest.raises(Exception, match="declared as qcow2"):
        await cloud.images.register("tiny", path, disk_format="qcow2", properties={}, visibility="public")
    assert await other.names() == []
    assert cloud.files() == []


async def test_schemas_and_facts(member):
    for name in ("image", "images", "member", "members"):
        assert (await member.call("GET", f"/v2/schemas/{name}", 200)).json()["name"] == name
    image = await member.add()
    described = (await member.call("GET", "/v2/schemas/image", 200)).json()["properties"]
    assert set(image) == set(described)
    await member.call("GET", "/v2/schemas/absent", 404)
    assert (await member.call("GET", "/v2/info/import", 200)).json()["import-methods"]["value"] == []
    assert (await member.call("GET", "/v2/info/stores", 200)).json()["stores"][0]["default"] == "true"
