"""What the network service refuses, under the names that clients of the Network API know."""

from __future__ import annotations

from instar.errors import BadRequest, Conflict, NotFound, QuotaExceeded


class NetworkNotFound(NotFound):
    template = "Network {id} could not be found."


class SubnetNotFound(NotFound):
    template = "Subnet {id} could not be found."


class PortNotFound(NotFound):
    template = "Port {id} could not be found."


class SecurityGroupNotFound(NotFound):
    template = "Security group {id} does not exist"


class SecurityGroupRuleNotFound(NotFound):
    template = "Security group rule {id} does not exist"


class TagNotFound(NotFound):
    template = "Tag {id} could not be found."


class NetworkInUse(Conflict):
    template = "Unable to complete operation on network {id}. There are one or more ports still in use on the network."


class SubnetInUse(Conflict):
    template = "Unable to complete operation on subnet {id}: One or more ports have an IP allocation from this subnet."


class SubnetsOverlap(BadRequest):
    template = (
        "Invalid input for operation: Requested subnet with cidr: {cidr} for network: {network_id} overlaps with "
        "another subnet."
    )


class PortBoundToServer(Conflict):
    """A port that a server has is not changed behind the server's back."""

    template = "Port {id} is used by server {instance_id}: detach it from the server, or delete the server, first."


class IpAddressInUse(Conflict):
    template = "IP address {ip_address} is in use on network {network_id}."


class IpAddressGenerationFailure(Conflict):
    template = "No more IP addresses available on network {network_id}."


class MacAddressInUse(Conflict):
    template = "Unable to complete operation for network {network_id}. The mac address {mac_address} is in use."


class SecurityGroupInUse(Conflict):
    template = "Security Group {id} in use."


class SecurityGroupCannotRemoveDefault(Conflict):
    template = "Insufficient rights for removing default security group."


class SecurityGroupCannotUpdateDefault(Conflict):
    template = "Updating default security group's name is not allowed."


class SecurityGroupDefaultAlreadyExists(Conflict):
    template = "Default security group already exists."


class SecurityGroupRuleExists(Conflict):
    template = "Security group rule already exists."


class RevisionConflict(Conflict):
    template = "{kind} {id} is being changed by others again and again: try once more."


class OverQuota(QuotaExceeded):
    """Raised as 409 by the Network API: its clients expect that."""

    status, fault = 409, "conflictingRequest"
    template = "Quota exceeded for resources: ['{resource}']."


class ChangedMeanwhile(Conflict):
    """What a decision was made on is not so any more: read again and decide again. Never leaves this room."""

    template = "The network was changed by someone else in the meantime."


class InvalidInput(BadRequest):
    """A value that cannot be; `path` says where in the body it stands."""

    template = "Invalid input for operation: {reason} - at `{path}`."


class InvalidSharedSetting(Conflict):
    template = "Unable to reconfigure sharing settings for network {id}. Other projects have ports on it."


class GatewayConflictWithAllocationPools(Conflict):
    template = "Gateway ip {ip_address} conflicts with allocation pool {pool}."


class PortSecurityPortHasSecurityGroup(Conflict):
    template = "Port has security group associated. Cannot disable port security until security group is removed."


class AddressPairAndPortSecurityRequired(Conflict):
    template = "Port Security must be enabled in order to have allowed address pairs on a port."
