"""A small HTTP client for a running cloud: reads its clouds.yaml, gets a token, asks the APIs.

Used by `instar server …`, `instar admin …` and the demo. For everything else there are OpenStack's own clients.
"""

from __future__ import annotations

import http.client
import json
import os
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit

import yaml

from instar.cli.clouds_yaml import ADMIN_CLOUD
from instar.errors import InstarError

TIMEOUT_S = 60.0
COMPUTE_VERSION = "2.96"
ANSWER_MAX_BYTES = 64 << 20


class CloudUnreachable(InstarError):
    """No running cloud answers, or it refuses."""


class Login(NamedTuple):
    auth_url: str
    username: str
    password: str
    project_name: str
    user_domain_name: str
    project_domain_name: str


def read_login(directory: Path | None, default_dir: Path, cloud: str | None) -> Login:
    """From DIR/clouds.yaml, else the file that OS_CLIENT_CONFIG_FILE names, else the default directory's.

    `cloud`: its name in there; None: OS_CLOUD, else `instar`. Raises CloudUnreachable that says where it looked."""
    named = os.environ.get("OS_CLIENT_CONFIG_FILE")
    path = Path(named) if named and directory is None else (directory or default_dir) / "clouds.yaml"
    name = cloud or os.environ.get("OS_CLOUD") or ADMIN_CLOUD
    try:
        auth = yaml.safe_load(path.read_text(encoding="utf-8"))["clouds"][name]["auth"]
        return Login(*(str(auth[field]) for field in Login._fields))
    except OSError as error:
        raise CloudUnreachable(f"{path}: {error.strerror}. Give the cloud's --dir.") from error
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise CloudUnreachable(f"{path} has no usable cloud {name!r}.") from error


class CloudClient:
    """Requests to one cloud, as one user. Blocking."""

    def __init__(self, login: Login) -> None:
        parts = urlsplit(login.auth_url)
        if parts.scheme != "http" or parts.hostname is None:
            raise CloudUnreachable(f"{login.auth_url}: only http:// addresses of an Instar are understood.")
        self._host, self._port, self._identity = parts.hostname, parts.port or 80, parts.path
        self._login = login
        self._token = ""
        self._operator_path = ""
        self._compute_path = ""

    def get(self, path: str, **query: str | None) -> bytes:
        """The body of GET `path` of the operators' API (`/v1/hosts`). Raises CloudUnreachable with what was said."""
        if not self._token:
            self._log_in()
        given = {name: value for name, value in query.items() if value is not None}
        target = self._operator_path + path + (f"?{urlencode(given)}" if given else "")
        body, _ = self._ask("GET", target, {"X-Auth-Token": self._token})
        return body

    def get_json(self, path: str, **query: str | None) -> Any:
        return json.loads(self.get(path, **query))

    def post_json(self, path: str, body: object) -> Any:
        """The answer of POST `path` of the operators' API. Raises CloudUnreachable with what was said."""
        if not self._token:
            self._log_in()
        headers = {"X-Auth-Token": self._token, "Content-Type": "application/json"}
        return json.loads(self._ask("POST", self._operator_path + path, headers, body)[0])

    def delete_json(self, path: str) -> Any:
        """The answer of DELETE `path` of the operators' API. Raises CloudUnreachable with what was said."""
        if not self._token:
            self._log_in()
        return json.loads(self._ask("DELETE", self._operator_path + path, {"X-Auth-Token": self._token})[0])

    def compute(self, method: str, path: str, body: object = None, **query: str) -> Any:
        """The JSON answer of a request of the Compute API (`/servers`). Raises CloudUnreachable with what was said."""
        if not self._token:
            self._log_in()
        target = f"{self._compute_path}/v2.1{path}" + (f"?{urlencode(query)}" if query else "")
        headers = {
            "X-Auth-Token": self._token, "OpenStack-API-Version": f"compute {COMPUTE_VERSION}",
            "Content-Type": "application/json",
        }  # fmt: skip
        return json.loads(self._ask(method, target, headers, body)[0])

    def _log_in(self) -> None:
        login = self._login
        user = {"name": login.username, "password": login.password, "domain": {"name": login.user_domain_name}}
        project = {"name": login.project_name, "domain": {"name": login.project_domain_name}}
        body = {
            "auth": {
                "identity": {"methods": ["password"], "password": {"user": user}},
                "scope": {"project": project},
            }
        }
        _, headers = self._ask("POST", f"{self._identity}/auth/tokens", {"Content-Type": "application/json"}, body)
        self._token = headers.get("x-subject-token", "")
        services = json.loads(self._ask("GET", "/", {})[0])["services"]
        found = {one["type"]: urlsplit(one["href"]).path.rstrip("/") for one in services}
        if "instar" not in found:
            raise CloudUnreachable("The cloud that answers has no operators' API.")
        self._operator_path, self._compute_path = found["instar"], found.get("compute", "")

    def _ask(
        self, method: str, target: str, headers: dict[str, str], body: object = None
    ) -> tuple[bytes, dict[str, str]]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT_S)
        try:
            connection.request(method, target, json.dumps(body) if body is not None else None, headers)
            answer = connection.getresponse()
            content = answer.read(ANSWER_MAX_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise CloudUnreachable(f"No cloud answers at {self._host}:{self._port}: {error}.") from error
        finally:
            connection.close()
        if answer.status >= 400:
            raise CloudUnreachable(_complaint(answer.status, content))
        return content, {name.lower(): value for name, value in answer.getheaders()}


def _complaint(status: int, content: bytes) -> str:
    """The message of a fault, whatever its key."""
    try:
        fault = next(iter(json.loads(content).values()))
        return str(fault["message"])
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return f"The cloud answered {status}."
