"""Routes as data, and the lookup of one: a tree by path segments, literal segments before parameters."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple
from urllib.parse import unquote

from instar.errors import BadRequest
from instar.http.answer import Answer
from instar.http.faults import MethodNotAllowed, RouteNotFound
from instar.http.request import Request

Handler = Callable[[Request], Awaitable[Answer]]


class Route(NamedTuple):
    """`path` is below the service's prefix and has `{parameters}`; `policy` names a rule of the service's table."""

    method: str
    path: str
    policy: str
    handler: Handler


class _Node:
    __slots__ = ("literals", "parameter", "routes")

    def __init__(self) -> None:
        self.literals: dict[str, _Node] = {}
        self.parameter: _Node | None = None
        self.routes: dict[str, tuple[Route, tuple[tuple[int, str], ...]]] = {}


class Router:
    """Finds the route of a method and a raw path. Raises ValueError when two routes are the same."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._root = _Node()
        for route in routes:
            self._add(route)

    def _add(self, route: Route) -> None:
        node = self._root
        names: list[tuple[int, str]] = []
        for index, segment in enumerate(_split(route.path)):
            if segment.startswith("{") and segment.endswith("}"):
                names.append((index, segment[1:-1]))
                node.parameter = node.parameter or _Node()
                node = node.parameter
            else:
                node = node.literals.setdefault(segment, _Node())
        if route.method in node.routes:
            raise ValueError(f"two routes for {route.method} {route.path}")
        node.routes[route.method] = (route, tuple(names))

    def find(self, method: str, raw_path: str) -> tuple[Route, dict[str, str]]:
        """The route and its parameters, decoded: a `%2F` stays inside its segment, one slash at the end is forgiven.

        Raises RouteNotFound, MethodNotAllowed, and BadRequest for a path that is not UTF-8."""
        segments = _split(raw_path)
        if "%" in raw_path:
            try:
                segments = [unquote(segment, errors="strict") for segment in segments]
            except UnicodeDecodeError as error:
                raise BadRequest("The path is not valid UTF-8.") from error
        node = _walk(self._root, segments, 0, method)
        if node is None:
            raise RouteNotFound()
        found = node.routes.get(method) or (node.routes.get("GET") if method == "HEAD" else None)
        if found is None:
            raise MethodNotAllowed(method=method, allowed=sorted(node.routes))
        route, names = found
        return route, {name: segments[index] for index, name in names}


def _split(path: str) -> list[str]:
    path = path.removesuffix("/")
    return path.split("/")[1:] if path else []


def _walk(node: _Node, segments: list[str], index: int, method: str) -> _Node | None:
    """The node of a path; one that knows the method is preferred to one that does not."""
    if index == len(segments):
        return node if node.routes else None
    segment = segments[index]
    literal = node.literals.get(segment)
    other: _Node | None = None
    if literal is not None:
        other = _walk(literal, segments, index + 1, method)
        if other is not None and (method in other.routes or (method == "HEAD" and "GET" in other.routes)):
            return other
    if node.parameter is not None and segment:
        found = _walk(node.parameter, segments, index + 1, method)
        if found is not None and (other is None or method in found.routes):
            return found
    return other
