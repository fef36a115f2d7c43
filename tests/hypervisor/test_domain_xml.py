"""The XML of a domain: one golden file, and what users' values may not do to it."""

from __future__ import annotations

import os
from pathlib import Path
from xml.etree import ElementTree as ET

import libvirt
import msgspec
import pytest

from instar.errors import HypervisorError
from instar.hypervisor.libvirt.domain_xml import DomainFiles, HostFacts, domain_name, domain_xml
from instar.hypervisor.libvirt.private_daemon import PrivateDaemon
from instar.hypervisor.libvirt.settings import LibvirtSettings
from instar.model.guest import ConfigDrive, DiskDefinition, GuestDefinition
from instar.model.network import FixedIp, NetworkDefinition, PortDefinition, SubnetDefinition

GOLDEN = Path(__file__).parent / "golden" / "domain.xml"
HOME = Path("/var/lib/instar/instances/6ba7b810-9dad-11d1-80b4-00c04fd430c8")
FACTS = HostFacts(cloud_id="0123456789ab", virt_type="qemu", direct_io=True)
FILES = DomainFiles(
    disks=(HOME / "root.qcow2", HOME / "ephemeral0.qcow2"),
    console_log=HOME / "console.log",
    console_socket=HOME / "console.sock",
    vnc_socket=HOME / "vnc.sock",
    config_drive=HOME / "config.iso",
)
NETWORK = NetworkDefinition(
    id="7d444840-9dc0-11d1-b245-5ffdce74fad2",
    mtu=1450,
    subnets=(SubnetDefinition("e902893a-9d22-3c7e-a7b8-d6e313b71d9f", "10.0.0.0/24", "10.0.0.1"),),
)
PORT = PortDefinition(
    id="a8098c1a-f86e-11da-bd1a-00112444be1e",
    network=NETWORK,
    mac_address="fa:16:3e:12:34:56",
    fixed_ips=(FixedIp(NETWORK.subnets[0].id, "10.0.0.5", 24),),
)
GUEST = GuestDefinition(
    instance_id="6ba7b810-9dad-11d1-80b4-00c04fd430c8",
    name="instance-0000002a",
    vcpus=2,
    memory_mib=256,
    disks=(DiskDefinition("root", 1 << 30), DiskDefinition("ephemeral0", 1 << 30)),
    ports=(PORT,),
    config_drive=ConfigDrive("{}", "{}"),
    project_id="5f705771-5c6e-4d4f-8f5a-000000000001",
    display_name='a <name> & "more" \x00\x1b é',
)


def xml_of(guest: GuestDefinition, facts: HostFacts = FACTS) -> str:
    return domain_xml(guest, FILES, facts, settings=LibvirtSettings(), bridge_name=lambda network_id: "br" + network_id[:8])


def with_properties(**properties: str) -> GuestDefinition:
    return msgspec.structs.replace(GUEST, properties=properties)


def test_the_domain_is_as_in_the_golden_file() -> None:
    """INSTAR_WRITE_GOLDEN=1 writes the file anew: look at the difference before it is committed."""
    xml = xml_of(GUEST)
    if os.environ.get("INSTAR_WRITE_GOLDEN"):
        GOLDEN.write_text(xml)
    assert xml == GOLDEN.read_text()


@pytest.mark.host
async def test_libvirt_accepts_the_golden_file(private_daemon: PrivateDaemon) -> None:
    connection = libvirt.open(private_daemon.uri)
    try:
        domain = connection.defineXMLFlags(GOLDEN.read_text(), libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
        domain.undefine()
    finally:
        connection.close()


def test_eight_root_ports_stay_free_for_devices_plugged_in_later() -> None:
    domain = ET.fromstring(xml_of(GUEST))
    root_ports = len(domain.findall("devices/controller[@model='pcie-root-port']"))
    # two disks, one port, virtio-scsi, virtio-serial, balloon, rng
    assert root_ports - 7 == LibvirtSettings().pcie_root_ports


def test_under_kvm_the_guest_sees_the_hosts_cpu_and_no_translation_cache() -> None:
    domain = ET.fromstring(xml_of(GUEST, msgspec.structs.replace(FACTS, virt_type="kvm")))
    assert domain.get("type") == "kvm"
    assert domain.find("features/tcg") is None
    cpu = domain.find("cpu")
    assert cpu is not None
    assert cpu.get("mode") == "host-model"


def test_a_file_system_without_direct_io_gets_a_write_back_cache() -> None:
    domain = ET.fromstring(xml_of(GUEST, msgspec.structs.replace(FACTS, direct_io=False)))
    assert {driver.get("cache") for driver in domain.findall("devices/disk[@device='disk']/driver")} == {"writeback"}


def test_hints_choose_the_devices() -> None:
    hints = {"hw_disk_bus": "scsi", "hw_vif_model": "e1000", "hw_cdrom_bus": "virtio", "hw_pointer_model": "usbtablet"}
    domain = ET.fromstring(xml_of(with_properties(**hints)))
    targets = [(target.get("dev"), target.get("bus")) for target in domain.findall("devices/disk/target")]
    assert targets == [("sda", "scsi"), ("sdb", "scsi"), ("vda", "virtio")]
    assert [model.get("type") for model in domain.findall("devices/interface/model")] == ["e1000"]
    assert domain.find("devices/input[@type='tablet']") is not None


@pytest.mark.parametrize("name", ["hw_disk_bus", "hw_vif_model", "hw_cdrom_bus"])
def test_an_unknown_hint_is_refused_by_name(name: str) -> None:
    with pytest.raises(HypervisorError, match=name):
        xml_of(with_properties(**{name: "<evil/>"}))


def test_the_domain_name_holds_only_harmless_characters_and_the_cloud() -> None:
    guest = msgspec.structs.replace(GUEST, name="../a/b c\n")
    assert domain_name(guest, "0123456789ab") == "..-a-b-c--0123456789ab"
