"""Who a VM is and whether it lives, from a /proc and a debugfs made of files."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Callable, Optional, Union

import pytest

from tests.pure.test_owner import NOVA, status
from tscwatch.clock import now_ns
from tscwatch.host import inventory as inventory_module
from tscwatch.host.inventory import Inventory
from tscwatch.model import Event, Line, Owner

STAT = "({comm}) S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 {start} 0 0\n"


class Host:
    """A /proc with processes in it, and KVM's debugfs."""

    def __init__(self, root: Path) -> None:
        self.proc = root / "proc"
        self.debugfs = root / "kvm"
        self.debugfs.mkdir(parents=True)
        self.passed_ns = 0

    def process(self, pid: int, cmdline: bytes, comm: str = "x", start: int = 5) -> Path:
        directory = self.proc / str(pid)
        (directory / "fd").mkdir(parents=True)
        (directory / "cmdline").write_bytes(cmdline)
        (directory / "comm").write_text(comm + "\n")
        (directory / "stat").write_text(f"{pid} " + STAT.format(comm=comm, start=start))
        return directory

    def vm(self, pid: int, fd: int, *vcpus: int) -> None:
        files = self.proc / str(pid) / "fd"
        (files / str(fd)).symlink_to("anon_inode:kvm-vm")
        for number, vcpu in enumerate(vcpus, fd + 1):
            (files / str(number)).symlink_to(f"anon_inode:kvm-vcpu:{vcpu}")

    def runs(self, pid: int, fd: int, thread: int, vcpu: int = 0) -> None:
        directory = self.debugfs / f"{pid}-{fd}" / f"vcpu{vcpu}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "pid").write_text(f"{thread}\n")

    def scales(self, pid: int, fd: int, vcpu: int, **files: int) -> None:
        directory = self.debugfs / f"{pid}-{fd}" / f"vcpu{vcpu}"
        directory.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (directory / name.replace("_", "-").replace("guest-", "guest_")).write_text(
                f"{value}\n"
            )

    def inventory(self) -> Inventory:
        return Inventory(self.proc, self.debugfs)

    def later(self) -> None:
        """Let ten seconds pass."""
        self.passed_ns += 10_000_000_001


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host(tmp_path)
    monkeypatch.setattr(inventory_module, "now_ns", lambda: now_ns() + host.passed_ns)
    host.process(100, b"qemu-system-x86_64\0-name\0guest=web\0")
    host.vm(100, 8, 0, 2)
    return host


def enrich(inventory: Inventory, event: Event) -> list[Event]:
    return inventory.enrich([event], list)


def vm_create(pid: int = 100, vm: str = "kvm:1", fd: int = 8) -> Event:
    return Event(1, "vm_create", vm, pid, pid, "comm", fd=fd)


def test_vms_that_are_there_are_found(host: Host) -> None:
    host.runs(100, 8, 101)
    vm, *vcpus = host.inventory().existing()
    assert (vm.op, vm.pid, vm.fd, vm.ran) == ("vm_found", 100, 8, True)
    assert vm.guest is not None
    assert vm.guest.name == "web"
    assert [(event.op, event.vcpu) for event in vcpus] == [("vcpu_found", 0), ("vcpu_found", 2)]


def test_the_vcpus_of_a_process_with_two_vms_are_left_out(host: Host) -> None:
    host.vm(100, 20, 0, 1)
    found = {(event.op, event.fd) for event in host.inventory().existing()}
    assert found == {("vm_found", 8), ("vm_found", 20)}


def test_a_vm_ends_with_its_descriptor_its_process_or_the_reuse_of_its_pid(host: Host) -> None:
    inventory = host.inventory()
    for serial, pid in enumerate((100, 200, 300)):
        if pid != 100:
            host.process(pid, b"qemu-system-x86_64\0")
            host.vm(pid, 8)
        enrich(inventory, vm_create(pid, f"kvm:{serial}"))
    assert inventory.sweep() == []
    (host.proc / "100/fd/8").unlink()
    (host.proc / "200/stat").unlink()
    (host.proc / "300/stat").write_text("300 " + STAT.format(comm="x", start=6))
    assert inventory.sweep() == []  # its last events may not have been read yet
    assert {event.vm for event in inventory.sweep()} == {"kvm:0", "kvm:1", "kvm:2"}
    assert inventory.sweep() == []


def test_a_new_vm_on_the_same_descriptor_ends_the_old_one(host: Host) -> None:
    host.process(200, b"crosvm\0")
    inventory = host.inventory()
    enrich(inventory, vm_create(200, "kvm:1"))
    events = enrich(inventory, vm_create(200, "kvm:2"))
    assert [(event.op, event.vm) for event in events] == [
        ("vm_end", "kvm:1"),
        ("vm_create", "kvm:2"),
    ]


@pytest.mark.parametrize("fd", [None, 8])
def test_the_debugfs_of_a_replaced_vm_is_not_that_of_the_new_one(
    host: Host, fd: Optional[int]
) -> None:
    """KVM creates no second directory of the same name, so every other VM has one."""
    inventory = host.inventory()
    enrich(inventory, vm_create(vm="kvm:1")._replace(fd=fd))
    host.scales(100, 8, 0, guest_mode=0, tsc_offset=-1)
    host.runs(100, 8, 101)
    assert lines_of(inventory) == [(Line(0, -1),)]
    enrich(inventory, vm_create(vm="kvm:2")._replace(fd=fd))
    enrich(inventory, Event(2, "vm_started", "kvm:2", 100, 100, "comm"))  # a part of the reset
    call = Event(3, "get", "kvm:2", 100, 100, "comm", vcpu=0)
    assert [event.ran for event in enrich(inventory, call)] == [None]
    assert lines_of(inventory) == [()]
    shutil.move(host.debugfs / "100-8", host.debugfs / "removed")
    host.scales(100, 8, 0, guest_mode=0, tsc_offset=-3)
    enrich(inventory, vm_create(vm="kvm:3")._replace(fd=fd))
    assert lines_of(inventory) == [(Line(0, -3),)]


def test_whether_a_vm_has_run_is_set_only_if_it_is_proven(host: Host) -> None:
    inventory = host.inventory()
    host.runs(100, 8, 0)
    enrich(inventory, vm_create())
    call = Event(2, "get", "kvm:1", 100, 101, "comm", vcpu=0)
    assert [event.ran for event in enrich(inventory, call)] == [False]
    between = call._replace(ts=now_ns())
    host.runs(100, 8, 101)
    inventory.sweep()
    late = call._replace(ts=1 << 62)
    assert [event.ran for event in enrich(inventory, late)] == [True]
    assert [event.ran for event in enrich(inventory, between)] == [None]


def test_events_before_the_start_happened_before_the_vm_ran(host: Host) -> None:
    """Also if the VM has been running for long when its first events are read."""
    inventory = host.inventory()
    host.runs(100, 8, 101)
    call = Event(2, "get", "kvm:1", 100, 101, "comm", vcpu=0)
    start = Event(3, "vm_started", "kvm:1", 100, 100, "comm")
    events = inventory.enrich([vm_create(), call], lambda: [start, call._replace(ts=4)])
    calls = [event for event in events if event.op == "get"]
    assert [event.ran for event in calls] == [False, True]


def test_a_vm_created_and_started_before_its_events_are_read(host: Host) -> None:
    inventory = host.inventory()
    host.runs(100, 8, 101)
    call = Event(2, "get", "kvm:1", 100, 101, "comm", vcpu=0)
    drains = iter([[Event(3, "vm_started", "kvm:1", 100, 100, "comm")]])
    events = inventory.enrich([vm_create(), call], lambda: next(drains, []))
    calls = [event for event in events if event.op == "get"]
    assert [event.ran for event in calls] == [False]


def test_events_that_arrive_during_a_check_are_checked_too(host: Host) -> None:
    """The VM has not run at the first check, then makes a call, and runs before that is read."""
    inventory = host.inventory()
    host.runs(100, 8, 0)
    enrich(inventory, vm_create())
    call = Event(2, "get", "kvm:1", 100, 101, "comm", vcpu=0)

    def called_and_started() -> Iterator[list[Event]]:
        late = call._replace(ts=now_ns())
        host.runs(100, 8, 101)
        yield [late]
        yield [Event(now_ns(), "vm_started", "kvm:1", 100, 100, "comm")]

    drains = called_and_started()
    events = inventory.enrich([call], lambda: next(drains, []))
    calls = [event for event in events if event.op == "get"]
    assert [event.ran for event in calls] == [False, False]


def lines_of(
    inventory: Inventory, later: Sequence[Event] = (), behind: bool = False
) -> list[tuple[Line, ...]]:
    drains = iter([list(later)])
    time.sleep(0.002)  # a VM's lines are not read all the time
    events = inventory.read_lines(lambda: next(drains, []), lambda: behind, lambda: 7)
    return [event.lines for event in events if event.op == "tsc_lines"]


def test_the_line_of_a_nested_guest_is_left_out(host: Host) -> None:
    inventory = host.inventory()
    enrich(inventory, vm_create())
    ratio = {"tsc_offset": -9, "tsc_scaling_ratio": 5 << 30, "tsc_scaling_ratio_frac_bits": 32}
    host.scales(100, 8, 0, guest_mode=0, **ratio)
    host.scales(100, 8, 2, guest_mode=1, **ratio)
    assert lines_of(inventory) == [(Line(0, -9, 1.25),)]


def test_lines_are_read_after_a_write_and_confirmed_once(host: Host) -> None:
    inventory = host.inventory()
    enrich(inventory, vm_create())
    host.scales(100, 8, 0, guest_mode=0, tsc_offset=-9)
    assert lines_of(inventory) == [(Line(0, -9),)]
    assert lines_of(inventory) == []  # they are due in 10 s
    host.later()
    assert lines_of(inventory) == [(Line(0, -9),)]  # nothing was written since
    host.later()
    assert lines_of(inventory) == []  # no news
    host.scales(100, 8, 0, guest_mode=0, tsc_offset=-8)  # the guest wrote its own TSC
    host.later()
    assert lines_of(inventory) == [(Line(0, -8),)]
    enrich(inventory, Event(5, "tsc_tracked", "", 100, 101, "CPU", 0))
    assert inventory.has_lines_due
    assert lines_of(inventory) == [(Line(0, -8),)]


def test_lines_are_reported_again_without_a_vcpu_that_was_unplugged(host: Host) -> None:
    inventory = host.inventory()
    threads = host.proc / "100/task"
    for thread in 101, 102:
        (threads / str(thread)).mkdir(parents=True)
    enrich(inventory, vm_create())
    for vcpu, thread in ((0, 101), (2, 102)):
        host.scales(100, 8, vcpu, guest_mode=0, tsc_offset=vcpu)
        enrich(inventory, Event(2, "get", "kvm:1", 100, thread, "CPU", vcpu, ran=True))
    for _ in range(3):
        lines_of(inventory)
        host.later()
    (threads / "102").rmdir()
    time.sleep(0.002)
    events = inventory.read_lines(list, lambda: False, lambda: 7)
    assert [event.op for event in events] == ["vcpu_unplugged", "tsc_lines"]


def test_lines_of_a_vm_that_did_something_meanwhile_are_read_again(host: Host) -> None:
    inventory = host.inventory()
    enrich(inventory, vm_create())
    host.scales(100, 8, 0, guest_mode=0, tsc_offset=-9)
    call = Event(2, "set", "kvm:1", 100, 101, "comm", vcpu=0, ran=True)
    assert lines_of(inventory, [call]) == []
    assert inventory.has_lines_due
    assert lines_of(inventory, [call._replace(pid=7, vm="kvm:7")]) == [(Line(0, -9),)]


def test_lines_are_not_believed_while_the_source_is_behind(host: Host) -> None:
    """A SET that happened before the reading may still be unread."""
    inventory = host.inventory()
    enrich(inventory, vm_create())
    host.scales(100, 8, 0, guest_mode=0, tsc_offset=-9)
    assert lines_of(inventory, behind=True) == []
    assert inventory.has_lines_due
    assert lines_of(inventory) == [(Line(0, -9),)]


def test_lines_that_cannot_be_read_are_reported_as_none(host: Host) -> None:
    inventory = host.inventory()
    enrich(inventory, vm_create())
    assert lines_of(inventory) == [()]


def test_only_vcpus_of_different_ratios_need_the_hosts_tsc(host: Host) -> None:
    inventory = host.inventory()
    enrich(inventory, vm_create())
    for vcpu, ratio in ((0, 1 << 32), (2, 5 << 30)):
        files = {"tsc_scaling_ratio": ratio, "tsc_scaling_ratio_frac_bits": 32}
        host.scales(100, 8, vcpu, guest_mode=0, tsc_offset=0, **files)
    for _ in range(3):  # they drift, so each reading is news
        (event,) = inventory.read_lines(list, lambda: False, lambda: 7)
        assert event.host_tsc == 7
        host.later()


def test_the_lines_of_many_vms_are_read_in_turns(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One reading takes at most about 20 ms, and no VM is left out for ever."""
    monkeypatch.setattr(inventory_module, "_LINES_AT_ONCE", 6)
    inventory = host.inventory()
    vcpus = {200: 3, 201: 3, 202: 3, 203: 9, 204: 1}
    for pid, count in vcpus.items():
        host.process(pid, b"crosvm\0")
        host.vm(pid, 8)
        for vcpu in range(count):
            host.scales(pid, 8, vcpu, guest_mode=0, tsc_offset=0)
        enrich(inventory, vm_create(pid, f"kvm:{pid}"))

    def read() -> list[int]:
        time.sleep(0.01)  # a VM's lines are not read all the time
        events = inventory.read_lines(list, lambda: False, lambda: 7)
        for event in events:
            assert len(event.lines) == vcpus[event.pid]
        return [event.pid for event in events]

    assert read() == [200, 201, 202, 203, 204]  # how many vCPUs they have is not known yet
    host.later()
    assert [read() for _ in range(4)] == [[200, 201], [202, 203], [204], []]
    host.later()
    enrich(inventory, Event(2, "set", "kvm:203", 203, 203, "comm", vcpu=0, ran=True))
    assert read() == [203]  # what was written comes first, and a VM of any size is read


def test_without_debugfs_it_is_not_known_whether_a_vm_has_run(host: Host) -> None:
    inventory = host.inventory()
    enrich(inventory, vm_create())
    call = Event(2, "get", "kvm:1", 100, 101, "comm", vcpu=0)
    assert [event.ran for event in enrich(inventory, call)] == [None]


@pytest.mark.parametrize(
    "cmdline",
    [
        b"",
        b"\0\0\0",
        b"qemu-system-x86_64\0-name\0\xff\n\x1b\0",
        b"qemu-system-x86_64\0-name\0" + b"x" * (2 << 20),
    ],
)
def test_hostile_command_lines(host: Host, cmdline: bytes) -> None:
    host.process(7, cmdline, comm=") R 1 2")
    guest = host.inventory().identify(7, "comm")
    assert len(guest.name or "") <= 200


@pytest.mark.parametrize("target", ["/opt/kvm", "/opt/kvm (deleted)", "/opt/.qemu-kvm-wrapped"])
def test_a_process_is_known_by_its_executable(host: Host, target: str) -> None:
    (host.process(7, b"x\0-name\0a\0") / "exe").symlink_to(target)
    assert host.inventory().identify(7, "comm")[:3] == (7, "qemu", "a")


def test_a_name_of_an_executable_that_is_no_text(host: Host) -> None:
    (host.process(7, b"x\0") / "exe").symlink_to(os.fsdecode(b"/opt/\xff"))
    assert host.inventory().identify(7, "comm").vmm == "\\xff"


@pytest.fixture
def container(host: Host, tmp_path: Path) -> Path:
    """Make the root directory of process 7, which is also its working directory."""
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    process = host.process(7, b"")
    (process / "root").symlink_to(root)
    (process / "cwd").symlink_to(root / "etc")
    return root


def named_by_config(host: Host, path: str) -> Optional[str]:
    command = f"qemu-system-x86_64\0-readconfig\0{path}\0"
    (host.proc / "7/cmdline").write_bytes(command.encode())
    return host.inventory().identify(7, "comm").name


CONFIG = '[name]\nguest = "a"\n'


def test_a_configuration_file_is_read_in_the_processs_own_directories(
    host: Host, container: Path
) -> None:
    (container / "etc/a.conf").write_text(CONFIG)
    assert named_by_config(host, "/etc//./a.conf") == "a"
    assert named_by_config(host, "a.conf") == "a"
    assert named_by_config(host, "/a.conf") is None


def test_no_path_leads_out_of_the_processs_root(host: Host, container: Path) -> None:
    secret = container.parent / "secret"
    secret.write_text(CONFIG)
    (container / "link").symlink_to(secret)
    (container / "dir").symlink_to(container.parent)
    for path in ("/link", "/dir/secret", "/../secret", "../../secret", "/etc", "", "/"):
        assert named_by_config(host, path) is None


def test_a_configuration_file_that_is_none(host: Host, container: Path) -> None:
    os.mkfifo(container / "fifo")
    (container / "null").symlink_to("/dev/null")
    (container / "large").write_bytes(CONFIG.encode() + b"#" * (1 << 16))
    for path in ("/fifo", "/null", "/large"):
        assert named_by_config(host, path) is None


def test_a_process_that_vanishes_while_it_is_read(host: Host) -> None:
    assert host.inventory().identify(999, "qemu-system-x86").vmm == "qemu"
    (event,) = enrich(host.inventory(), vm_create(999))
    assert event.guest is not None
    assert event.guest.name is None


@pytest.mark.parametrize("name", ["fd", "task", "kvm", "100-8", "vcpu0"])
def test_a_directory_that_vanishes_while_it_is_read(
    host: Host, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It is there when it is looked for, and gone when it is listed."""

    def without(list_directory: Callable[..., Any], path: Union[str, Path] = ".") -> Any:
        if Path(path).name == name:
            raise FileNotFoundError(path)
        return list_directory(path)

    (host.proc / "100/task/101").mkdir(parents=True)
    host.runs(100, 8, 101)
    if name == "task":  # it is read only if the directory in debugfs has the name of a thread
        (host.debugfs / "100-8").rename(host.debugfs / "101-8")
    for function in ("listdir", "scandir"):
        monkeypatch.setattr(os, function, partial(without, getattr(os, function)))
    inventory = host.inventory()
    list(inventory.existing())
    enrich(inventory, vm_create())
    enrich(inventory, Event(2, "get", "kvm:1", 100, 101, "comm", 0, 1))
    inventory.read_lines(list, lambda: False, lambda: 1)
    host.later()
    assert [event.op for event in inventory.sweep()] == []


STATUS = status(NOVA, pid=100)
OWNER = Owner("openstack", name="web & shop", project="sales", flavor="m1.small")


def owner(host: Host) -> Optional[Owner]:
    """Identify the guest "web" of process 100."""
    (host.proc / "100/status").write_text("Name:\tqemu\nNSpid:\t100\t1\n")
    (event,) = enrich(host.inventory(), vm_create())
    assert event.guest is not None
    return event.guest.owner


def libvirt_file(host: Host, directory: str = "run/libvirt/qemu") -> Path:
    """Return where the status file of the guest "web" is, in the root of process 100."""
    path = host.proc / "100/root" / directory / "web.xml"
    path.parent.mkdir(parents=True)
    return path


@pytest.mark.parametrize("directory", ["run/libvirt/qemu", "run/libvirt/qemu/run"])
def test_libvirts_file_names_the_owner(host: Host, directory: str) -> None:
    libvirt_file(host, directory).write_bytes(STATUS)
    assert owner(host) == OWNER


def test_without_libvirts_file_there_is_no_owner(host: Host) -> None:
    assert owner(host) is None
    libvirt_file(host).write_bytes(status(NOVA, pid=101))
    assert owner(host) is None


def test_no_link_leads_out_of_a_guests_root(host: Host, tmp_path: Path) -> None:
    """Each component of the path is replaced by a link to where the file really is."""
    real = tmp_path / "real"
    (real / "libvirt/qemu").mkdir(parents=True)
    (real / "libvirt/qemu/web.xml").write_bytes(STATUS)
    root = host.proc / "100/root"
    for parts in (), ("libvirt",), ("libvirt", "qemu"), ("libvirt", "qemu", "web.xml"):
        link = root.joinpath("run", *parts)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(real.joinpath(*parts))
        assert owner(host) is None
        link.unlink()
    shutil.copytree(real, root / "run", dirs_exist_ok=True)
    assert owner(host) == OWNER


def test_no_name_leads_out_of_libvirts_directory(host: Host) -> None:
    path = libvirt_file(host)
    path.with_name("b.xml").write_bytes(STATUS)
    (path.parent / "a").mkdir()
    for name in "a/../b", "../qemu/b", "b\n", "x" * 300, "\udcff":
        (host.proc / "100/cmdline").write_bytes(b"qemu\0-name\0" + name.encode(errors="replace"))
        assert owner(host) is None
    (host.proc / "100/cmdline").write_bytes(b"qemu\0-name\0b")
    assert owner(host) == OWNER


def test_only_a_regular_file_is_read(host: Host) -> None:
    path = libvirt_file(host)
    path.mkdir()
    assert owner(host) is None
    path.rmdir()
    os.mkfifo(path)
    threads = threading.active_count()
    assert owner(host) is None
    assert threading.active_count() == threads  # none waits for a writer


def test_of_a_large_file_the_beginning_is_read(host: Host) -> None:
    path = libvirt_file(host)
    path.write_bytes(STATUS[: STATUS.index(b"<devices>")] + b" " * (1 << 18))
    os.truncate(path, 1 << 40)
    assert owner(host) == OWNER


def test_a_guest_that_starts_again_comes_after_its_end(host: Host) -> None:
    inventory = host.inventory()
    list(inventory.existing())
    shutil.rmtree(host.proc / "100")
    for pid in 200, 300:
        host.process(pid, b"qemu-system-x86_64\0-name\0guest=web\0")
        host.vm(pid, 8)
    again = Event(now_ns(), "vm_create", "200:8", 200, 200, "qemu", fd=8)
    assert [(e.op, e.vm) for e in enrich(inventory, again)] == [
        ("vm_end", "100:8"),
        ("vm_create", "200:8"),
    ]
    namesake = again._replace(vm="300:8", pid=300)
    assert [(e.op, e.vm) for e in enrich(inventory, namesake)] == [("vm_create", "300:8")]


def test_a_process_with_the_id_of_an_earlier_one_has_none_of_its_vms(host: Host) -> None:
    inventory = host.inventory()
    list(inventory.existing())
    shutil.rmtree(host.proc / "100")
    host.process(100, b"cloud-hypervisor\0", start=6)
    host.vm(100, 9)
    assert [(e.op, e.vm) for e in enrich(inventory, vm_create(vm="100:9", fd=9))] == [
        ("vm_end", "100:8"),
        ("vm_create", "100:9"),
    ]


def test_a_vcpu_whose_thread_has_ended_was_unplugged(host: Host) -> None:
    inventory = host.inventory()
    threads = host.proc / "100/task"
    for thread in 100, 101, 102:
        (threads / str(thread)).mkdir(parents=True)
    list(inventory.existing())
    for vcpu, thread in ((0, 101), (2, 102)):
        call = Event(now_ns(), "get", "100:8", 100, thread, "CPU", vcpu)
        enrich(inventory, call)
    (threads / "102").rmdir()
    assert [(e.op, e.vm, e.vcpu) for e in inventory.sweep()] == [("vcpu_unplugged", "100:8", 2)]
    (threads / "101").rmdir()
    assert inventory.sweep() == []  # it is checked every 10 s


def test_a_process_that_creates_vms_without_end_is_not_identified_again(host: Host) -> None:
    inventory = host.inventory()
    host.process(150, b"some-vmm\0")
    for number in range(20, 90):
        host.vm(150, number)
        made = [event.guest for event in enrich(inventory, vm_create(150, f"kvm:{number}", number))]
    assert made == [None]
    host.process(200, b"qemu-system-x86_64\0-name\0guest=other\0")
    (other,) = enrich(inventory, vm_create(200, "kvm:99"))
    assert other.guest is not None
    assert other.guest.name == "other"
    for number in range(1000):
        enrich(inventory, Event(2, "vm_started", f"kvm:{number + 1000}", 150, 150, "comm"))
    assert len(inventory._starts) <= len(inventory._vms)
    enrich(inventory, vm_create(150, "kvm:20")._replace(op="vm_end"))
    (room,) = enrich(inventory, vm_create(150, "kvm:89", 89))
    assert room.guest is not None


def test_a_vcpu_plugged_again_soon_was_not_unplugged_later(host: Host) -> None:
    """The VM is known twice, as found in /proc and as the source sees it."""
    inventory = host.inventory()
    threads = host.proc / "100/task"
    for thread in 100, 101, 102:
        (threads / str(thread)).mkdir(parents=True)
    host.runs(100, 8, 101)
    list(inventory.existing())
    call = Event(now_ns(), "get", "kvm:1", 100, 102, "CPU", 2)
    for vcpu, thread in ((0, 101), (2, 102)):
        enrich(inventory, call._replace(tid=thread, vcpu=vcpu))
        enrich(inventory, call._replace(tid=thread, vcpu=vcpu, vm="100:8"))
    assert inventory.sweep() == []
    (threads / "102").rmdir()
    (threads / "202").mkdir()
    enrich(inventory, call._replace(tid=202))
    host.later()
    assert inventory.sweep() == []


def test_the_lines_of_a_vm_that_another_thread_created(host: Host) -> None:
    """Cloud Hypervisor's; a kprobe does not show the VM's file descriptor."""
    host.process(150, b"cloud-hypervisor\0")
    host.vm(150, 12)
    (host.proc / "150/task/155").mkdir(parents=True)
    files = host.debugfs / "155-12/vcpu0"
    files.mkdir(parents=True)
    (files / "tsc-offset").write_text("-7\n")
    inventory = host.inventory()
    enrich(inventory, vm_create(150, "kvm:7")._replace(fd=None))
    (event,) = inventory.read_lines(list, lambda: False, lambda: None)
    assert event.lines == (Line(0, -7),)


def test_a_vcpu_that_cloud_hypervisor_unplugs(host: Host) -> None:
    """Its main thread makes the calls, so KVM shows on which thread each vCPU runs."""
    host.process(150, b"cloud-hypervisor\0")
    host.vm(150, 12)
    threads = host.proc / "150/task"
    for vcpu in range(2):
        (threads / str(160 + vcpu)).mkdir(parents=True)
        host.runs(150, 12, 160 + vcpu, vcpu)
    inventory = host.inventory()
    enrich(inventory, vm_create(150, "kvm:7", 12))
    assert inventory.sweep() == []
    (threads / "161").rmdir()  # KVM keeps the vCPU, and the id of its last thread
    host.later()
    assert [(e.op, e.vm, e.vcpu) for e in inventory.sweep()] == [("vcpu_unplugged", "kvm:7", 1)]
    host.later()
    assert inventory.sweep() == []
    (threads / "171").mkdir()  # it is plugged again, without a TSC call
    host.runs(150, 12, 171, 1)
    host.later()
    assert [(e.op, e.vm, e.vcpu) for e in inventory.sweep()] == [("vcpu_found", "kvm:7", 1)]
    host.later()
    assert inventory.sweep() == []


def test_a_vcpu_that_cloud_hypervisor_parked_before(host: Host) -> None:
    host.process(150, b"cloud-hypervisor\0")
    host.vm(150, 12, 0, 1)
    (host.proc / "150/task/160").mkdir(parents=True)
    for vcpu in range(2):
        host.runs(150, 12, 160 + vcpu, vcpu)
    inventory = host.inventory()
    list(inventory.existing())
    assert [(e.op, e.vcpu) for e in inventory.sweep()] == [("vcpu_unplugged", 1)]
