"""The bus on RabbitMQ: what is lost, and what not, when brokers, connections and consumers come and go."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aio_pika
import aiormq.exceptions
import msgspec
import pytest
import structlog

from instar.bus import rabbitmq_wire as wire
from instar.bus.amqp_confirms import LinkLost
from instar.bus.contract import BusAway, ConsumerFailed, Message, MessageTooLarge, NobodyListens, Reply
from instar.bus.permissions import agent_user, host_permissions, may_speak_for_all, user_of
from instar.bus.rabbitmq import RabbitMqBus
from instar.bus.rabbitmq_link import Link
from instar.cli.servers.bus_users import ensure_user
from instar.config import RabbitMqSettings
from instar.errors import StartupError
from instar.model.commands import HOSTS_HEARD
from instar.model.host import HOST_REPORTS
from instar.model.operation import Notification
from tests.bus.blackhole import Blackhole
from tests.bus.conftest import Rabbit
from tests.patience import PATIENCE_S, patience

pytestmark = pytest.mark.host

QUICK = RabbitMqSettings(heartbeat_s=1, reconnect_min_s=0.05, reconnect_max_s=0.3)
Make = Callable[..., Awaitable[RabbitMqBus]]


@pytest.fixture
async def make(empty_broker: str) -> AsyncIterator[Make]:
    """Opens buses, and closes them."""
    made: list[RabbitMqBus] = []

    async def open_one(url: str = empty_broker, settings: RabbitMqSettings = QUICK, **options: Any) -> RabbitMqBus:
        bus = RabbitMqBus(url, settings, **options)
        made.append(bus)
        await bus.open()
        return bus

    yield open_one
    for bus in made:
        await bus.close()


def message(text: str = "hello", deadline_s: float = PATIENCE_S, **fields: Any) -> Message:
    return Message("Test", text.encode(), deadline_s, **fields)


async def echo(received: Message) -> Reply:
    return Reply(received.body.upper())


async def test_connecting_goes_on_whatever_ended_the_last_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that stops while a connection is set up makes the library cancel what it has in its hands; and a file with
    the password may be away for the moment in which it is replaced. Either ended the loop for ever."""
    trouble: list[BaseException] = [ConnectionError(), asyncio.CancelledError(), StartupError("no file"), ConnectionError()]
    tried = 0
    again = asyncio.Event()

    async def fails(*_: Any, **__: Any) -> None:
        nonlocal tried
        tried += 1
        if tried < len(trouble):
            raise trouble[tried - 1]
        again.set()
        raise trouble[-1]

    monkeypatch.setattr("instar.bus.rabbitmq.Link.open", fails)
    bus = RabbitMqBus("amqp://instar@127.0.0.1:1/", QUICK)
    await bus.open()
    try:
        async with asyncio.timeout(PATIENCE_S):
            await again.wait()
    finally:
        await bus.close()


@pytest.mark.parametrize("number", [errno.EHOSTUNREACH, errno.ETIMEDOUT])
async def test_connection_that_ends_for_want_of_a_way_is_lost_to_who_waits_to_send(number: int) -> None:
    """Who told an event failed with it, as if the event were wrong."""

    class Lane:
        is_full = True

        async def drained(self) -> None:
            raise OSError(number, "as the system says it")

    link = Link("instar", QUICK)
    link._lane = Lane()  # type: ignore[assignment]
    link._closing = True
    with pytest.raises(LinkLost):
        await link.tell(wire.EVENTS, "key", b"", wire.answer_properties(wire.PING, "ping", "instar"))
    assert link.gone.done()


async def test_settings_that_cannot_be_used_end_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*_: Any, **__: Any) -> None:
        raise StartupError("no file")

    monkeypatch.setattr("instar.bus.rabbitmq.Link.open", fails)
    bus = RabbitMqBus("amqp://instar@127.0.0.1:1/", QUICK)
    with pytest.raises(StartupError):
        await bus.open()
    await bus.close()


async def until(what: Callable[[], bool], limit_s: float = PATIENCE_S) -> None:
    async with asyncio.timeout(limit_s):
        while not what():
            await asyncio.sleep(0.02)


def are_written_down(rabbit: Rabbit, *queues: str) -> bool:
    """RabbitMQ 3.10 forgets a new queue when it is killed before it wrote down its name, a second or two later."""
    (names,) = (rabbit.broker.directory / "mnesia").glob("*/quorum/*/names.dets")
    written = names.read_bytes()
    return all(queue.encode() in written for queue in queues)


async def clock_goes_on(bus: RabbitMqBus) -> bool:
    before = bus.listening_s()
    await asyncio.sleep(0.3)
    return bus.listening_s() > before + 0.1


class Held:
    """A handler that works until it is let go, and counts."""

    def __init__(self) -> None:
        self.begun, self.let_go = asyncio.Event(), asyncio.Event()
        self.seen: list[Message] = []

    async def __call__(self, received: Message) -> Reply:
        self.seen.append(received)
        self.begun.set()
        await self.let_go.wait()
        return Reply(received.body.upper())


# --- the broker goes, and the network ----------------------------------------------------------------------------------


async def test_nothing_is_lost_when_the_broker_is_killed_and_comes_back(rabbit: Rabbit, make: Make) -> None:
    """Work at hand goes on, its caller has the answer; what nobody took yet is done later; all hear and serve again."""
    caller, consumer, held, heard = await make(), await make(), Held(), asyncio.Event()
    later: list[bytes] = []

    async def hear(_: Message) -> None:
        heard.set()

    async def do_later(received: Message) -> Reply:
        later.append(received.body)
        return Reply()

    await consumer.serve("held", held, concurrency_max=1)
    absent = await consumer.serve("later", do_later, concurrency_max=1)
    await absent.cancel()
    await caller.send("later", message("kept", deadline_s=300))
    await caller.subscribe("t.*", hear)
    call = asyncio.create_task(caller.call("held", message()))
    await asyncio.wait_for(held.begun.wait(), PATIENCE_S)
    while not await asyncio.to_thread(are_written_down, rabbit, "held", "later"):
        await asyncio.sleep(0.1)
    await asyncio.to_thread(rabbit.broker.kill)
    with pytest.raises(NobodyListens):
        await caller.send("held", message())
    with pytest.raises(BusAway):
        await caller.notify("notifications.x", Message("Notification", msgspec.msgpack.encode(STOPPED)))
    await caller.publish("t.one", message())
    waiting = asyncio.create_task(caller.call("held", message("second")))
    held.let_go.set()
    async with asyncio.timeout(PATIENCE_S):
        while await clock_goes_on(caller):  # until it is cut off for longer than what is usual
            pass
    await asyncio.to_thread(rabbit.broker.start)
    async with asyncio.timeout(PATIENCE_S):
        assert (await call).body == b"HELLO"
        assert (await waiting).body == b"SECOND"
        await consumer.serve("later", do_later, concurrency_max=1)
        await until(lambda: later == [b"kept"])
        while not heard.is_set():
            await consumer.publish("t.one", message())
            await asyncio.sleep(0.05)
    assert [one.body for one in held.seen] == [b"hello", b"second"], "a command that came twice was done once"


async def test_a_partition_is_noticed_and_survived(rabbit: Rabbit, make: Make, empty_broker: str) -> None:
    async with Blackhole(rabbit.broker.port) as hole:
        url = empty_broker.replace(f":{rabbit.broker.port}/", f":{hole.port}/")
        cut_off, consumer, held = await make(url), await make(), Held()
        await consumer.serve("q", held, concurrency_max=2)
        call = asyncio.create_task(cut_off.call("q", message()))
        await asyncio.wait_for(held.begun.wait(), PATIENCE_S)
        hole.swallow = True
        held.let_go.set()
        began = time.monotonic()
        await asyncio.sleep(0.5)
        assert not call.done(), "its reply was swallowed"
        await until(lambda: hole.connections > 1)
        assert time.monotonic() - began < 15 * patience()
        hole.swallow = False
        async with asyncio.timeout(PATIENCE_S):
            assert (await call).body == b"HELLO"


async def test_a_consumer_that_dies_leaves_its_command_to_the_next(make: Make) -> None:
    caller, dying, held = await make(), await make(), Held()
    await dying.serve("q", held, concurrency_max=1)
    call = asyncio.create_task(caller.call("q", message()))
    await asyncio.wait_for(held.begun.wait(), PATIENCE_S)
    await dying.close()
    next_one = await make()
    await next_one.serve("q", echo, concurrency_max=1)
    async with asyncio.timeout(PATIENCE_S):
        assert (await call).body == b"HELLO"


async def test_a_broker_that_is_away_at_the_start_is_waited_for(make: Make, rabbit: Rabbit, empty_broker: str) -> None:
    async with Blackhole(rabbit.broker.port) as hole:
        hole.refuse = True
        bus = await make(empty_broker.replace(f":{rabbit.broker.port}/", f":{hole.port}/"))
        await bus.serve("q", echo, concurrency_max=1)
        call = asyncio.create_task(bus.call("q", message()))
        with pytest.raises(TimeoutError):
            await bus.call("q", message(deadline_s=0.2))
        hole.refuse = False
        async with asyncio.timeout(PATIENCE_S):
            assert (await call).body == b"HELLO"


# --- consumers ---------------------------------------------------------------------------------------------------------


async def test_a_slow_consumer_does_not_hold_up_the_others(make: Make) -> None:
    caller, slow, fast, held = await make(), await make(), await make(), Held()
    await slow.serve("q", held, concurrency_max=1)
    await fast.serve("q", echo, concurrency_max=4)
    calls = [asyncio.create_task(caller.call("q", message(str(number)))) for number in range(20)]
    await until(lambda: sum(call.done() for call in calls) == 19)
    held.let_go.set()
    await asyncio.gather(*calls)
    assert len(held.seen) == 1


async def test_many_hosts_of_one_agent_have_one_queue_each_with_its_own_limit_and_order(rabbit: Rabbit, make: Make) -> None:
    caller, agent = await make(), await make(shared_queue="agent.simulated")
    now: dict[str, int] = {}
    most: dict[str, int] = {}
    order: dict[str, list[bytes]] = {}
    two_at_once: dict[str, asyncio.Event] = {}
    names = [f"sim-{number}" for number in range(30)]

    def handler(name: str) -> Callable[[Message], Awaitable[Reply]]:
        async def handle(received: Message) -> Reply:
            order.setdefault(name, []).append(received.body)
            now[name] = now.get(name, 0) + 1
            most[name] = max(most.get(name, 0), now[name])
            together = two_at_once.setdefault(name, asyncio.Event())
            if now[name] == 2:
                together.set()
            await together.wait()
            await asyncio.sleep(0.02)  # a third one would come now
            now[name] -= 1
            return Reply(name.encode())

        return handle

    for name in names:
        await agent.serve(f"host.{name}", handler(name), concurrency_max=2)
    calls = [caller.call(f"host.{name}", message(str(number))) for number in range(6) for name in names]
    replies = await asyncio.gather(*calls)
    assert [reply.body.decode() for reply in replies] == names * 6
    assert set(most.values()) == {2}
    assert all(bodies == [str(number).encode() for number in range(6)] for bodies in order.values())
    with pytest.raises(NobodyListens):
        await caller.call("host.sim-30", message())
    queues = await asyncio.to_thread(rabbit.broker.control, "list_queues", "--no-table-headers", "name")
    assert [name for name in queues.split() if name.startswith(("host.", "agent."))] == ["agent.simulated"]


async def test_a_queue_that_is_forgotten_is_gone_until_it_is_served_again(make: Make) -> None:
    caller, agent = await make(), await make()
    await agent.serve("host.a", echo, concurrency_max=1)
    await agent.close()
    await caller.forget("host.a")
    with pytest.raises(NobodyListens):
        await caller.call("host.a", message())
    again = await make()
    await again.serve("host.a", echo, concurrency_max=1)
    assert (await caller.call("host.a", message())).body == b"HELLO"
    await caller.forget("host.a")  # while it is served: its agent makes it anew
    await until(lambda: again._lost_before)
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(NobodyListens):
                await caller.call("host.a", message())
                return


async def test_names_that_would_take_others_commands_are_refused(make: Make) -> None:
    bus = await make()
    for name in ("host.*", "host.#", "#", ""):
        with pytest.raises(ValueError, match="cannot be the name"):
            await bus.serve(name, echo, concurrency_max=1)


# --- messages ----------------------------------------------------------------------------------------------------------


async def test_what_a_message_carries_arrives(make: Make) -> None:
    bus, held = await make(), Held()
    held.let_go.set()
    await bus.serve("q", held, concurrency_max=1)
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await bus.call("q", message(trace=trace, epoch=7))
    assert (held.seen[0].kind, held.seen[0].trace, held.seen[0].epoch) == ("Test", trace, 7)
    assert PATIENCE_S / 2 < held.seen[0].deadline_s <= PATIENCE_S


async def test_what_is_too_large_is_refused(make: Make) -> None:
    small = msgspec.structs.replace(QUICK, message_max_bytes=65_536)
    bus = await make(settings=small)

    async def talkative(_: Message) -> Reply:
        return Reply(b"x" * 70_000)

    await bus.serve("q", talkative, concurrency_max=1)
    with pytest.raises(MessageTooLarge):
        await bus.call("q", message("x" * 70_000))
    with pytest.raises(ConsumerFailed, match="too large"):
        await bus.call("q", message())


async def test_a_handler_that_raises_is_told_to_who_waits(make: Make) -> None:
    bus = await make()

    async def fail(_: Message) -> Reply:
        raise RuntimeError

    await bus.serve("q", fail, concurrency_max=1)
    with pytest.raises(ConsumerFailed, match="RuntimeError"):
        await bus.call("q", message())


async def test_messages_of_other_versions(make: Make, empty_broker: str) -> None:
    """Headers that are not known do no harm; a version above ours is refused, and kept among the dead letters."""
    bus, held = await make(), Held()
    held.let_go.set()
    await bus.serve("q", held, concurrency_max=1)
    connection = await aio_pika.connect(empty_broker)
    async with connection:
        channel = await connection.channel()
        commands = await channel.get_exchange(wire.COMMANDS)
        for id_, headers in (("new", {"v": 1, "later": "x", "deadline_s": "?"}), ("newer", {"v": 2}), ("alien", {})):
            await commands.publish(aio_pika.Message(b"body", headers=headers, message_id=id_, type="Test"), "q")
    await until(lambda: bool(held.seen))
    letters = []
    async with asyncio.timeout(PATIENCE_S):
        while len(letters) < 2:
            letters = await bus.dead_letters(10)
            await asyncio.sleep(0.02)
    assert {(one.id, one.reason, one.queue) for one in letters} == {("newer", "rejected", "q"), ("alien", "rejected", "q")}
    assert len(held.seen) == 1


async def test_commands_that_nobody_does_become_dead_letters_without_their_secrets(make: Make) -> None:
    limited = msgspec.structs.replace(QUICK, delivery_limit=1)
    bus = await make(settings=limited)
    absent = await bus.serve("late", echo, concurrency_max=1)
    await absent.cancel()

    async def fail(_: Message) -> Reply:
        raise RuntimeError

    await bus.serve("poison", fail, concurrency_max=1)
    await bus.send("poison", message("secret"))
    with pytest.raises(TimeoutError):
        await bus.call("late", message("secret", deadline_s=0.1, epoch=3))
    letters = []
    async with asyncio.timeout(PATIENCE_S):
        while len(letters) < 2:
            letters = await bus.dead_letters(10)
            await asyncio.sleep(0.05)
    told = {one.queue: one for one in letters}
    assert (told["late"].reason, told["late"].kind, told["late"].epoch) == ("expired", "Test", 3)
    assert told["poison"].reason == "delivery_limit"
    assert told["poison"].sender == "instar"
    assert abs(told["late"].died_at / 1e6 - time.time()) < 60
    assert "secret" not in repr(letters)
    assert await bus.purge_dead_letters() == 2
    assert await bus.dead_letters(10) == []


async def test_nobody_is_heard_who_speaks_of_another_host(make: Make, empty_broker: str) -> None:
    bus = await make()
    heard: list[str] = []

    async def hear(received: Message) -> None:
        heard.append(received.host)

    await bus.subscribe(HOST_REPORTS, hear)

    def told(host: str, body_host: str) -> Message:
        return Message("HostReport", msgspec.msgpack.encode({"host": body_host}), host=host)

    await bus.publish(HOST_REPORTS, told("a.example", "other"))
    connection = await aio_pika.connect(empty_broker)
    async with connection:
        channel = await connection.channel()
        events = await channel.get_exchange(wire.EVENTS)
        body = msgspec.msgpack.encode({"host": "b"})
        nameless = aio_pika.Message(body, headers={"v": 1, "host": "b"}, message_id="1", type="HostReport")
        await events.publish(nameless, "hosts.report.b")
        await events.publish(
            aio_pika.Message(body, headers={"v": 1, "host": "b"}, message_id="2", type="HostReport", user_id="instar"),
            "hosts.report.c",
        )
    await bus.publish(HOST_REPORTS, told("a.example", "a.example"))
    await until(lambda: bool(heard))
    assert heard == ["a.example"]


def test_no_hosts_user_speaks_for_all_hosts() -> None:
    users = {user: may_speak_for_all(f"amqp://{user}@broker/%2F") for user in ("instar", user_of("a"), agent_user("b"))}
    assert users == {"instar": True, user_of("a"): False, agent_user("b"): False}


async def test_no_password_is_logged(make: Make, empty_broker: str) -> None:
    url = empty_broker.replace(empty_broker.split(":")[2].split("@")[0], "wrong-secret")
    with structlog.testing.capture_logs() as logs:
        await make(url)
    assert [line["event"] for line in logs] == ["bus.not_connected"]
    assert "wrong-secret" not in repr(logs)


# --- who may do what ---------------------------------------------------------------------------------------------------


async def test_a_hosts_credentials_are_good_for_that_host_alone(rabbit: Rabbit, make: Make, empty_broker: str) -> None:
    await asyncio.to_thread(
        ensure_user, rabbit.broker.control, "/", user_of("a"), host_permissions(["a"]), "password-of-a"
    )
    url = rabbit.broker.url(user=user_of("a"), password="password-of-a")
    cloud, agent, other = await make(), await make(url), await make()
    heard: list[str] = []

    async def hear(received: Message) -> None:
        heard.append(received.host)

    await cloud.subscribe(HOST_REPORTS, hear)
    await other.serve("host.b", echo, concurrency_max=1)
    await agent.serve("host.a", echo, concurrency_max=1)
    assert (await cloud.call("host.a", message())).body == b"HELLO"
    await agent.publish(HOST_REPORTS, Message("HostReport", msgspec.msgpack.encode({"host": "a"}), host="a"))
    await until(lambda: heard == ["a"])
    answered = asyncio.Event()

    async def note(_: Message) -> None:
        answered.set()

    await agent.subscribe(HOSTS_HEARD + "a", note)
    await cloud.publish(HOSTS_HEARD + "a", message())
    await asyncio.wait_for(answered.wait(), PATIENCE_S)

    async def refused(work: Callable[[aio_pika.abc.AbstractChannel], Awaitable[object]]) -> None:
        async with await aio_pika.connect(url) as connection:
            with pytest.raises(aiormq.exceptions.ChannelAccessRefused):
                await work(await connection.channel())

    def publish(exchange: str, key: str, user: str = user_of("a")) -> Callable[[aio_pika.abc.AbstractChannel], Any]:
        async def work(channel: aio_pika.abc.AbstractChannel) -> None:
            told = aio_pika.Message(b"", user_id=user)
            found = await channel.get_exchange(exchange, ensure=False) if exchange else channel.default_exchange
            await found.publish(told, key)

        return work

    def consume(queue: str) -> Callable[[aio_pika.abc.AbstractChannel], Any]:
        async def work(channel: aio_pika.abc.AbstractChannel) -> None:
            await (await channel.get_queue(queue, ensure=False)).consume(lambda _: asyncio.sleep(0))

        return work

    def bind(exchange: str, key: str) -> Callable[[aio_pika.abc.AbstractChannel], Any]:
        async def work(channel: aio_pika.abc.AbstractChannel) -> None:
            queue = await channel.declare_queue(exclusive=True)
            await queue.bind(exchange, key)

        return work

    await refused(publish(wire.COMMANDS, "host.b"))
    await refused(publish(wire.COMMANDS, "conductor"))
    await refused(publish("", "host.b"))
    await refused(publish(wire.EVENTS, f"{HOST_REPORTS}.b"))
    await refused(publish(wire.EVENTS, "operations.cancel"))
    await refused(publish(wire.DEAD, "host.a"))
    await refused(publish(wire.NOTIFICATIONS, "versioned_notifications.info"))
    await refused(consume("host.b"))
    await refused(consume(wire.DEAD_LETTERS))
    await refused(bind(wire.COMMANDS, "host.b"))
    await refused(bind(wire.COMMANDS, "host.*"))
    await refused(bind(wire.EVENTS, "#"))
    await refused(bind(wire.EVENTS, f"{HOSTS_HEARD}b.#"))
    await refused(bind(wire.EVENTS, f"{HOSTS_HEARD}#"))
    await refused(bind(wire.REPLIES, "#"))
    await refused(bind(wire.REPLIES, cloud._replies_key))
    await refused(lambda channel: channel.declare_queue("host.c", durable=True))
    await refused(lambda channel: channel.queue_delete("host.b"))
    async with await aio_pika.connect(url) as connection:
        with pytest.raises(aiormq.exceptions.ChannelPreconditionFailed):  # in another's name
            await publish(wire.EVENTS, f"{HOST_REPORTS}.a", user=user_of("b"))(await connection.channel())
    assert heard == ["a"]


async def test_over_tls_with_the_right_authority_alone(rabbit: Rabbit, make: Make) -> None:
    url = rabbit.broker.url(tls=True)
    ours = msgspec.structs.replace(
        QUICK, ca_file=str(rabbit.tls.authority), certificate_file=str(rabbit.tls.certificate), key_file=str(rabbit.tls.key)
    )
    bus = await make(url, ours)
    await bus.serve("q", echo, concurrency_max=1)
    assert (await bus.call("q", message())).body == b"HELLO"
    stranger = await make(url)
    with pytest.raises(NobodyListens, match="away"):
        await stranger.send("q", message())


async def test_settings_that_cannot_be_used_are_said_at_the_start(rabbit: Rabbit, make: Make) -> None:
    with pytest.raises(StartupError, match="password"):
        await make(settings=msgspec.structs.replace(QUICK, password_file="/nowhere"))
    with pytest.raises(StartupError, match="certificates"):
        await make(rabbit.broker.url(tls=True), msgspec.structs.replace(QUICK, ca_file="/nowhere"))


# --- notifications -----------------------------------------------------------------------------------------------------


async def test_notifications_have_the_form_that_consumers_of_openstack_read(make: Make, empty_broker: str) -> None:
    """As a consumer with oslo.messaging has it: its own queue, bound to the exchange `nova`, format 2.0."""
    bus = await make()
    async with await aio_pika.connect(empty_broker) as connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange("nova", "topic", durable=True)
        queue = await channel.declare_queue("versioned_notifications.info", durable=True)
        await queue.bind(exchange, "versioned_notifications.info")
        try:
            await bus.notify("notifications.instance.stop.end", Message("Notification", msgspec.msgpack.encode(STOPPED)))
            got = await queue.get(timeout=PATIENCE_S)
        finally:
            await queue.delete(if_unused=False, if_empty=False)
    assert got is not None
    assert (got.content_type, got.content_encoding) == ("application/json", "utf-8")
    assert got.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
    envelope = json.loads(got.body)
    assert envelope.keys() == {"oslo.version", "oslo.message"}
    assert envelope["oslo.version"] == "2.0"
    told = json.loads(envelope["oslo.message"])
    assert told["event_type"] == "instance.power_off.end"
    assert (told["priority"], told["publisher_id"], told["message_id"]) == ("INFO", "conductor:c1", "m1")
    assert told["timestamp"] == "2023-11-14 22:13:20.000000"
    payload = told["payload"]
    assert payload["nova_object.name"] == "InstanceActionPayload"
    assert (payload["nova_object.namespace"], payload["nova_object.version"]) == ("nova", "1.8")
    data = payload["nova_object.data"]
    assert data.keys() == ACTION_FIELDS
    assert (data["uuid"], data["host"], data["state"], data["power_state"]) == ("u1", "h1", "stopped", "shutdown")
    assert data["flavor"]["nova_object.name"] == "FlavorPayload"
    assert data["flavor"]["nova_object.data"].keys() == FLAVOR_FIELDS
    address = data["ip_addresses"][0]
    assert address["nova_object.name"] == "IpPayload"
    assert address["nova_object.data"] == {
        "label": "", "mac": "fa:16:3e:00:00:01", "meta": {}, "port_uuid": "p1", "version": 4, "address": "10.0.0.5",
        "device_name": None,
    }  # fmt: skip
    assert data["block_devices"][0]["nova_object.name"] == "BlockDevicePayload"
    assert data["fault"]["nova_object.data"]["exception"] == "StepFailed"


async def test_notifications_without_a_consumer_are_kept_as_many_as_told(make: Make, empty_broker: str) -> None:
    bus = await make(settings=msgspec.structs.replace(QUICK, notifications_kept=3))
    for number in range(5):
        told = msgspec.structs.replace(STOPPED, message_id=str(number))
        await bus.notify("notifications.instance.stop.end", Message("Notification", msgspec.msgpack.encode(told)))
    async with await aio_pika.connect(empty_broker) as connection:
        channel = await connection.channel()
        queue = await channel.get_queue("versioned_notifications.info")
        try:
            kept = [await queue.get(timeout=PATIENCE_S) for _ in range(3)]
            assert [one.message_id for one in kept if one] == ["2", "3", "4"]
        finally:
            await channel.queue_delete("versioned_notifications.info")
            await channel.queue_delete("versioned_notifications.error")


STOPPED = Notification(
    message_id="m1",
    event_type="instance.stop.end",
    timestamp=1_700_000_000_000_000,
    publisher_id="conductor:c1",
    payload={
        "uuid": "u1", "display_name": "first", "tenant_id": "t1", "user_id": "me", "request_id": "req-1",
        "state": "stopped", "power_state": "shutdown", "task_state": None, "host": "h1", "image_uuid": None,
        "flavor": {"flavorid": "1", "name": "m1.nano", "vcpus": 1, "memory_mb": 64},
        "ip_addresses": [{"mac": "fa:16:3e:00:00:01", "address": "10.0.0.5", "port_uuid": "p1"}],
        "block_devices": [
            {"volume_id": "v1", "device_name": "/dev/vdb", "tag": None, "boot_index": None, "delete_on_termination": False}
        ],
        "created_at": "2023-11-14T22:13:20Z", "launched_at": None, "terminated_at": None,
        "fault": {"exception": "StepFailed", "exception_message": "no"},
    },
)  # fmt: skip
# Of Nova's documented samples of these versions.
ACTION_FIELDS = {
    "action_initiator_project", "action_initiator_user", "architecture", "auto_disk_config", "availability_zone",
    "block_devices", "created_at", "deleted_at", "display_description", "display_name", "fault", "flavor", "host",
    "host_name", "image_uuid", "ip_addresses", "kernel_id", "key_name", "launched_at", "locked", "locked_reason",
    "metadata", "node", "os_type", "power_state", "progress", "ramdisk_id", "request_id", "reservation_id", "state",
    "task_state", "tenant_id", "terminated_at", "updated_at", "user_id", "uuid",
}  # fmt: skip
FLAVOR_FIELDS = {
    "description", "disabled", "ephemeral_gb", "extra_specs", "flavorid", "is_public", "memory_mb", "name", "projects",
    "root_gb", "rxtx_factor", "swap", "vcpu_weight", "vcpus",
}  # fmt: skip
