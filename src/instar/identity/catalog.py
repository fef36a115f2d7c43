"""The service catalog: fixed, because every API of this cloud is behind one port."""

from __future__ import annotations

from typing import Any, NamedTuple
from uuid import NAMESPACE_DNS, uuid5

INTERFACES = ("public", "internal", "admin")


class CatalogService(NamedTuple):
    """`path` comes after the address of the cloud."""

    name: str
    type: str
    path: str

    @property
    def id(self) -> str:
        return uuid5(NAMESPACE_DNS, f"{self.name}.instar").hex


SERVICES = (
    CatalogService("identity", "identity", "/identity"),
    CatalogService("compute", "compute", "/compute/v2.1"),
    CatalogService("image", "image", "/image"),
    CatalogService("network", "network", "/network"),
    CatalogService("cinder", "block-storage", "/volume/v3"),
    CatalogService("cinderv3", "volumev3", "/volume/v3"),  # what clients call it that were made before its type was settled
)


def endpoint_id(service: CatalogService, interface: str) -> str:
    return uuid5(NAMESPACE_DNS, f"{interface}.{service.name}.instar").hex


def catalog_view(base_url: str, region: str) -> list[dict[str, Any]]:
    """The catalog as it stands in a token. `base_url` without a slash at its end."""
    return [
        {
            "id": service.id,
            "name": service.name,
            "type": service.type,
            "endpoints": [
                {
                    "id": endpoint_id(service, interface),
                    "interface": interface,
                    "region": region,
                    "region_id": region,
                    "url": base_url + service.path,
                }
                for interface in INTERFACES
            ],
        }
        for service in SERVICES
    ]
