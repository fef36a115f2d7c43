"""The field's own clients, unmodified, as users run them: openstackclient, keystoneauth and the SDK."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import openstack
import pytest
from keystoneauth1 import session
from keystoneauth1.identity import v3

from tests.fixtures.openstack_client import Said, run_apart, run_openstack
from tests.identity.identity_cloud import Cloud

pytestmark = pytest.mark.slow


def environ(cloud: Cloud, **more: str) -> dict[str, str]:
    variables = {
        "PATH": os.environ["PATH"],
        "HOME": "/nonexistent",
        "OS_AUTH_URL": f"{cloud.url}/identity",
        "OS_USERNAME": "admin",
        "OS_PASSWORD": cloud.first.admin_password,
        "OS_PROJECT_NAME": "admin",
        "OS_USER_DOMAIN_NAME": "Default",
        "OS_PROJECT_DOMAIN_NAME": "Default",
        "OS_IDENTITY_API_VERSION": "3",
        **more,
    }
    return {name: value for name, value in variables.items() if value}


async def run(cloud: Cloud, *command: str, **more: str) -> Said:
    return await run_openstack(environ(cloud, **more), *command)


async def script(cloud: Cloud, *commands: str, **more: str) -> str:
    """Several commands, one after the other. All must succeed."""
    outputs = []
    for command in commands:
        said = await run(cloud, *command.split(), **more)
        assert said.status == 0, f"{command}: {said.err}"
        outputs.append(said.out)
    return "\n".join(outputs)


async def shown(cloud: Cloud, command: str, **more: str) -> Any:
    return json.loads(await script(cloud, f"{command} -f json", **more))


async def test_openstack_token_issue_and_catalog(cloud: Cloud) -> None:
    apart = await run_apart(environ(cloud), "token", "issue", "-f", "json")
    assert apart.status == 0, apart.err
    token = apart.json()
    assert token["project_id"] == cloud.first.admin_project_id
    catalog = await shown(cloud, "catalog list")
    types = {"identity", "compute", "image", "network", "block-storage", "volumev3"}
    assert {row["Type"] for row in catalog} == types
    assert {row["Service Type"] for row in await shown(cloud, "endpoint list")} == types
    await script(cloud, f"token revoke {token['id']}")


async def test_openstack_manages_domains_projects_users_groups_and_roles(cloud: Cloud) -> None:
    await script(
        cloud,
        "domain create --description Moths moths",
        "project create --domain moths --description nocturnal hawk",
        "user create --domain moths --password s3cret --email a@b.example anna",
        "group create --domain moths flyers",
        "group add user --group-domain moths --user-domain moths flyers anna",
        "role create keeper",
        "role add --user anna --user-domain moths --project hawk --project-domain moths member",
        "role add --group flyers --group-domain moths --project hawk --project-domain moths keeper",
    )
    rows = await shown(cloud, "role assignment list --names --effective --project hawk --project-domain moths")
    assert {(row["Role"], row["User"]) for row in rows} == {
        ("member", "anna@moths"), ("reader", "anna@moths"), ("keeper", "anna@moths"),
    }  # fmt: skip
    anna = {
        "OS_USERNAME": "anna", "OS_PASSWORD": "s3cret", "OS_PROJECT_NAME": "hawk",
        "OS_USER_DOMAIN_NAME": "moths", "OS_PROJECT_DOMAIN_NAME": "moths",
    }  # fmt: skip
    assert (await shown(cloud, "token issue", **anna))["project_id"]
    assert [row["Name"] for row in await shown(cloud, "project list", **anna)] == ["hawk"]
    await script(cloud, "user password set --password n3w --original-password s3cret", **anna)
    await script(
        cloud,
        "project set --domain moths --tag dusk --name hawkmoth hawk",
        "user set --domain moths --disable anna",
        "role remove --user anna --user-domain moths --project hawkmoth --project-domain moths member",
        "group remove user --group-domain moths --user-domain moths flyers anna",
        "group delete --domain moths flyers",
        "user delete --domain moths anna",
        "project delete --domain moths hawkmoth",
        "role delete keeper",
        "domain set --disable moths",
        "domain delete moths",
    )
    assert {row["Name"] for row in await shown(cloud, "domain list")} == {"Default"}
    assert {row["Name"] for row in await shown(cloud, "user list")} == {"admin", "demo"}


async def test_openstack_logs_in_with_an_application_credential_that_it_made(cloud: Cloud) -> None:
    demo = {"OS_USERNAME": "demo", "OS_PASSWORD": cloud.first.demo_password, "OS_PROJECT_NAME": "demo"}
    made = await shown(cloud, "application credential create --role reader robot", **demo)
    robot = {
        "OS_AUTH_TYPE": "v3applicationcredential", "OS_APPLICATION_CREDENTIAL_ID": made.get("ID", made.get("id")),
        "OS_APPLICATION_CREDENTIAL_SECRET": made.get("Secret", made.get("secret")),
        "OS_USERNAME": "", "OS_PASSWORD": "", "OS_PROJECT_NAME": "",
        "OS_USER_DOMAIN_NAME": "", "OS_PROJECT_DOMAIN_NAME": "",
    }  # fmt: skip
    assert (await shown(cloud, "token issue", **robot))["project_id"] == cloud.first.demo_project_id
    refused = await run(cloud, "application", "credential", "create", "another", **robot)
    assert refused.status == 1 and "403" in refused.err
    await script(cloud, "application credential delete robot", **demo)
    assert (await run(cloud, "token", "issue", **robot)).status == 1


async def test_keystoneauth_discovers_and_the_sdk_lists(cloud: Cloud) -> None:
    def work() -> tuple[str, set[str], set[str]]:
        auth = v3.Password(
            auth_url=f"{cloud.url}/identity", username="admin", password=cloud.first.admin_password,
            project_name="admin", user_domain_id="default", project_domain_id="default",
        )  # fmt: skip
        with openstack.connection.Connection(session=session.Session(auth), region_name="RegionOne") as connection:
            names = {user.name for user in connection.identity.users()}
            project = connection.identity.create_project(name="sdk", description="made by the SDK")
            found = connection.identity.find_project("sdk")
            assert found is not None and found.id == project.id
            connection.identity.delete_project(project)
            endpoint = connection.session.get_endpoint(service_type="identity")
            return endpoint, names, {one.name for one in connection.identity.projects()}

    endpoint, users, projects = await asyncio.to_thread(work)
    assert endpoint.startswith(f"{cloud.url}/identity")
    assert users == {"admin", "demo"} and projects == {"admin", "demo", "service"}
