"""Bodies of the Identity API. Unknown fields are refused, except in `auth`, where clients send more than we read."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

Name = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"\S")]
ShortName = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"\S")]
Text = Annotated[str, Meta(max_length=4096)]
Id = Annotated[str, Meta(min_length=1, max_length=64)]
Email = Annotated[str, Meta(max_length=320)]
Tag = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^[^,/]+$")]
Tags = Annotated[list[Tag], Meta(max_length=80)]
NoOptions = Annotated[dict[str, Any], Meta(max_length=0)]


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of what users send: what is not known is refused."""


class Reference(msgspec.Struct, frozen=True):
    """A domain, by id or by name."""

    id: Id | None = None
    name: Name | None = None


class ProjectReference(msgspec.Struct, frozen=True):
    id: Id | None = None
    name: Name | None = None
    domain: Reference | None = None


class UserReference(msgspec.Struct, frozen=True):
    id: Id | None = None
    name: Name | None = None
    domain: Reference | None = None
    password: str | None = None


class PasswordMethod(msgspec.Struct, frozen=True):
    user: UserReference


class TokenMethod(msgspec.Struct, frozen=True):
    id: str


class ApplicationCredentialMethod(msgspec.Struct, frozen=True):
    secret: str
    id: Id | None = None
    name: Name | None = None
    user: UserReference | None = None


class Methods(msgspec.Struct, frozen=True):
    methods: Annotated[list[str], Meta(min_length=1, max_length=8)]
    password: PasswordMethod | None = None
    token: TokenMethod | None = None
    application_credential: ApplicationCredentialMethod | None = None


class SystemScope(msgspec.Struct, frozen=True):
    all: bool


class Scope(msgspec.Struct, frozen=True):
    project: ProjectReference | None = None
    domain: Reference | None = None
    system: SystemScope | None = None
    unscoped: dict[str, Any] | None = None


class Auth(msgspec.Struct, frozen=True):
    identity: Methods
    scope: Scope | str | None = None


class AuthBody(msgspec.Struct, frozen=True):
    auth: Auth


class NewUser(Body, frozen=True):
    name: Name
    password: str | None = None
    domain_id: Id | None = None
    default_project_id: Id | None = None
    description: Text | None = None
    email: Email | None = None
    enabled: bool = True
    options: NoOptions = {}


class NewUserBody(Body, frozen=True):
    user: NewUser


class ChangedUser(Body, frozen=True):
    name: Name | UnsetType = UNSET
    password: str | UnsetType = UNSET
    domain_id: Id | UnsetType = UNSET
    default_project_id: Id | UnsetType | None = UNSET
    description: Text | UnsetType | None = UNSET
    email: Email | UnsetType | None = UNSET
    enabled: bool | UnsetType = UNSET
    options: NoOptions | UnsetType = UNSET


class ChangedUserBody(Body, frozen=True):
    user: ChangedUser


class PasswordChange(Body, frozen=True):
    password: str
    original_password: str


class PasswordChangeBody(Body, frozen=True):
    user: PasswordChange


class NewProject(Body, frozen=True):
    """`parent_id` may only be the domain itself: projects do not nest here."""

    name: ShortName
    domain_id: Id | None = None
    parent_id: Id | None = None
    description: Text | None = None
    enabled: bool = True
    is_domain: bool = False
    tags: Tags = []
    options: NoOptions = {}


class NewProjectBody(Body, frozen=True):
    project: NewProject


class ChangedProject(Body, frozen=True):
    name: ShortName | UnsetType = UNSET
    domain_id: Id | UnsetType = UNSET
    description: Text | UnsetType | None = UNSET
    enabled: bool | UnsetType = UNSET
    is_domain: bool | UnsetType = UNSET
    tags: Tags | UnsetType = UNSET
    options: NoOptions | UnsetType = UNSET


class ChangedProjectBody(Body, frozen=True):
    project: ChangedProject


class TagsBody(Body, frozen=True):
    tags: Tags


class NewDomain(Body, frozen=True):
    name: ShortName
    description: Text | None = None
    enabled: bool = True
    options: NoOptions = {}


class NewDomainBody(Body, frozen=True):
    domain: NewDomain


class ChangedDomain(Body, frozen=True):
    name: ShortName | UnsetType = UNSET
    description: Text | UnsetType | None = UNSET
    enabled: bool | UnsetType = UNSET
    options: NoOptions | UnsetType = UNSET


class ChangedDomainBody(Body, frozen=True):
    domain: ChangedDomain


class NewGroup(Body, frozen=True):
    name: ShortName
    domain_id: Id | None = None
    description: Text | None = None


class NewGroupBody(Body, frozen=True):
    group: NewGroup


class ChangedGroup(Body, frozen=True):
    name: ShortName | UnsetType = UNSET
    domain_id: Id | UnsetType = UNSET
    description: Text | UnsetType | None = UNSET


class ChangedGroupBody(Body, frozen=True):
    group: ChangedGroup


class NewRole(Body, frozen=True):
    """`domain_id` must be null: roles of one domain alone do not exist here."""

    name: Name
    description: Text | None = None
    domain_id: None = None
    options: NoOptions = {}


class NewRoleBody(Body, frozen=True):
    role: NewRole


class ChangedRole(Body, frozen=True):
    name: Name | UnsetType = UNSET
    description: Text | UnsetType | None = UNSET
    options: NoOptions | UnsetType = UNSET


class ChangedRoleBody(Body, frozen=True):
    role: ChangedRole


class RoleReference(Body, frozen=True):
    id: Id | None = None
    name: Name | None = None
    domain_id: None = None


class NewApplicationCredential(Body, frozen=True):
    """`expires_at` is ISO 8601 in UTC. Without `roles`: all that the caller has in his token. Without `secret`: one
    is made. Access rules are not known here, so a body that has any is refused."""

    name: Name
    description: Text | None = None
    secret: str | None = None
    expires_at: str | None = None
    roles: Annotated[list[RoleReference], Meta(max_length=64)] | None = None
    unrestricted: bool = False
    project_id: Id | None = None
    access_rules: Annotated[list[Any], Meta(max_length=0)] | None = None


class NewApplicationCredentialBody(Body, frozen=True):
    application_credential: NewApplicationCredential
