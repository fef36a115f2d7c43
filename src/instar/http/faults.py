"""How an error looks in each API. Handlers only raise errors of `instar.errors`; the HTTP room gives them a shape."""

from __future__ import annotations

import html
from collections.abc import Callable
from http import HTTPStatus
from typing import NamedTuple

from instar.errors import InstarError
from instar.http.answer import JSON, Answer
from instar.http.body import encode

UNEXPECTED = "An unexpected error prevented the server from fulfilling your request. Tell its operator the request id."


class RouteNotFound(InstarError):
    """No such path."""

    status, fault = 404, "itemNotFound"
    template = "The resource could not be found."


class MethodNotAllowed(InstarError):
    """The path is there, the method is not. `allowed` lists those that are, for the Allow header."""

    status, fault = 405, "badMethod"
    template = "The method {method} is not allowed for this resource."


class UriTooLong(InstarError):
    status, fault = 414, "badRequest"
    template = "The URL is longer than {limit} bytes."


class TooManyHeaders(InstarError):
    status, fault = 431, "badRequest"
    template = "The request has more headers, or longer ones, than are accepted ({limit})."


class TooManyRequests(InstarError):
    """The caller must wait `retry_after_s` before it tries again."""

    status, fault = 429, "overLimit"
    template = "Too many requests, try again in {retry_after_s} seconds."


class Fault(NamedTuple):
    """What there is to tell: `key` is the Compute API's word, `kind` the name of the error's class."""

    status: int
    key: str
    kind: str
    message: str

    @property
    def title(self) -> str:
        return HTTPStatus(self.status).phrase


FaultShape = Callable[[Fault], Answer]


def describe(error: InstarError) -> Fault:
    """The fault of a known error. A 5xx that no class of ours describes has the fixed sentence: see `unexpected`."""
    return Fault(error.status, error.fault, type(error).__name__, error.message)


def unexpected() -> Fault:
    """The fault of an exception that nobody foresaw: says nothing about the inside."""
    return Fault(500, "computeFault", "InternalServerError", UNEXPECTED)


def compute_fault(fault: Fault) -> Answer:
    """`{"itemNotFound": {"code": 404, "message": "…"}}`"""
    return Answer(fault.status, encode({fault.key: {"code": fault.status, "message": fault.message}}), JSON)


def identity_fault(fault: Fault) -> Answer:
    """`{"error": {"code": 404, "title": "Not Found", "message": "…"}}`"""
    body = {"error": {"code": fault.status, "title": fault.title, "message": fault.message}}
    return Answer(fault.status, encode(body), JSON)


def network_fault(fault: Fault) -> Answer:
    """`{"NeutronError": {"type": "NotFound", "message": "…", "detail": ""}}`"""
    return Answer(
        fault.status, encode({"NeutronError": {"type": fault.kind, "message": fault.message, "detail": ""}}), JSON
    )


def image_fault(fault: Fault) -> Answer:
    """The small page that clients of the Image API read: title as heading, message as text."""
    head = f"{fault.status} {fault.title}"
    page = (
        f"<html>\n <head>\n  <title>{head}</title>\n </head>\n <body>\n  <h1>{head}</h1>\n"
        f"  {html.escape(fault.message)}<br /><br />\n </body>\n</html>\n"
    )
    return Answer(fault.status, page.encode(), b"text/html; charset=UTF-8")
