"""KVM is used only when it really works."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from instar.hypervisor.libvirt import acceleration
from tests.patience import PATIENCE_S, patience


def test_the_flags_of_the_cpu_decide_first() -> None:
    assert acceleration.cpu_can_virtualise("processor\t: 0\nflags\t\t: fpu vme vmx sse\n")
    assert acceleration.cpu_can_virtualise("flags\t: svm\n")
    assert not acceleration.cpu_can_virtualise("flags\t\t: fpu avmx svml\nmodel name : vmx\n")


def test_a_file_that_is_no_kvm_device_does_not_answer(tmp_path: Path) -> None:
    (tmp_path / "kvm").write_bytes(b"")
    assert not acceleration.device_answers(tmp_path / "kvm")
    assert not acceleration.device_answers(tmp_path / "nothing")
    assert not acceleration.device_answers(Path("/dev/null"))


@pytest.mark.host
async def test_the_test_guest_runs_and_ends_under_an_accelerator_that_works() -> None:
    assert await acceleration.test_guest_runs("tcg", timeout_s=PATIENCE_S)


@pytest.mark.host
async def test_the_test_guest_is_ended_at_its_deadline() -> None:
    started = time.monotonic()
    assert not await acceleration.test_guest_runs("tcg,thread=nonsense", timeout_s=PATIENCE_S)
    assert not await acceleration.test_guest_runs("tcg", timeout_s=0)
    assert time.monotonic() - started < 10 * patience()


async def test_the_answer_is_one_that_libvirt_knows() -> None:
    found = await acceleration.virt_type()
    assert found in ("kvm", "qemu")
    if not acceleration.cpu_can_virtualise(Path("/proc/cpuinfo").read_text()):  # noqa: ASYNC240 - a few bytes of /proc
        assert found == "qemu"
