"""The command `instar demo`: make a cloud, walk a guest through its life, show what it took, leave nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType

import click

from instar.cli.client import CloudClient, read_login
from instar.cli.clouds_yaml import ADMIN_CLOUD, DEMO_CLOUD
from instar.cli.demo.cloud import DemoCloud
from instar.cli.demo.report import Story, summary, table_of
from instar.cli.guest_image import ensure_built
from instar.cli.log_format import configure_log
from instar.cli.show import print_table
from instar.errors import InstarError, StartupError


@click.command()
@click.option("--one-host", is_flag=True, help="The short walk: create, reboots, stop, start, delete, on one host.")
@click.option("--distributed", is_flag=True, help="In a cloud of many processes, on PostgreSQL and RabbitMQ.")
def demo(one_host: bool, distributed: bool) -> None:
    """Walk a real guest through its whole life on two hosts, and leave nothing behind.

    Starts a cloud of its own in a temporary directory and uses it as any OpenStack user and operator would: reboot, pause,
    suspend, snapshot, volumes, resize, migration, live migration, shelve, rescue, rebuild, the loss of a host. After each
    operation it looks into the guest: whether its data are there, and whether its programs go on. Then it shows what
    each took and whose time it was, and the sequence diagram of one of them. Needs root. Exit status 1 when anything
    failed, or was left behind.
    """
    if os.geteuid() != 0:
        raise StartupError("The demo runs a real guest, which needs root: sudo make demo.")
    try:
        import openstack  # noqa: F401 - the program does without it, the demo does not
    except ImportError as error:
        raise StartupError("The demo needs openstacksdk: pip install 'instar[demo]', or make demo.") from error
    configure_log("console", "error")
    began = time.monotonic()

    def say(text: str) -> None:
        click.echo(f"[{time.monotonic() - began:6.1f} s] {text}")

    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(_demo(DemoCloud(1 if one_host else 2, distributed=distributed), say))


Say = Callable[[str], None]
INTERRUPTED = "interrupted"


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _go_on(_number: int, _frame: FrameType | None) -> None:
    return


def _demo(cloud: DemoCloud, say: Say) -> int:
    failure, story = "", Story()
    try:
        asyncio.run(ensure_built(say))
        _walk(cloud, story, say)
    except KeyboardInterrupt:
        failure = INTERRUPTED
    except InstarError as error:
        failure = error.message
    except Exception as error:  # the edge: whatever it was, what is there must go, and the reader is told
        failure = f"{type(error).__name__}: {error}"
        click.echo(traceback.format_exc(), err=True)
    finally:
        # From here on nothing may stop us: half a removal would leave things behind. A handler, and not SIG_IGN: that
        # would be inherited by what we start, and a shell that was started so can never be told to end.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _go_on)
        if failure != INTERRUPTED and (failure or not all(row.ok for row in story.rows)):
            say(f"the end of the cloud's log:\n{cloud.log_end()}")
        say("removing the cloud")
        left = cloud.remove(say)
    click.echo()
    if story.rows:
        print_table(table_of(story.rows))
    if story.diagram:
        click.echo(f"\nThe {story.operation} as it really happened, from the journal:\n\n{story.diagram}")
    for thing in left:
        click.echo(f"left behind: {thing}")
    if failure:
        click.echo(f"demo: {failure}")
    click.echo(summary(story.rows))
    return 0 if story.rows and all(row.ok for row in story.rows) and not failure and not left else 1


def _walk(cloud: DemoCloud, story: Story, say: Say) -> None:
    import openstack

    from instar.cli.demo.stage import Stage
    from instar.cli.demo.walk import walk

    say(f"starting a cloud in {cloud.directory}")
    cloud.start()
    say(f"ready: {cloud.url}")

    os.environ["OS_CLIENT_CONFIG_FILE"] = str(cloud.state.clouds_yaml)
    operators = CloudClient(read_login(cloud.directory, cloud.directory, ADMIN_CLOUD))
    with (
        openstack.connect(cloud=DEMO_CLOUD, app_name="instar-demo") as user,
        openstack.connect(cloud=ADMIN_CLOUD, app_name="instar-demo") as admin,
    ):
        walk(Stage(cloud, user, admin, operators, story, say))
