"""Holds a namespace cluster: its networks, and its machines while they are on.

    supervisor.py WORK/cluster.json [--with-parent]
    supervisor.py --clear ID     what a killed one has left

Each connection to the socket WORK/supervisor is a machine: qemu.py sends what the machine is, and it
is on until one of the two ends. All that is started here dies with it, whatever ends it: the kernel
then removes namespaces, mounts, network devices and processes. What it removes itself are the
machines' cgroup folders. With --with-parent it ends when its standard input does.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CGROUPS = Path("/sys/fs/cgroup")
CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, CAP_SYS_TIME = 1, 24, 25
SO_ORIGINAL_DST = 80
# As QEMU's user network has them, on every machine.
GATEWAY, MACHINE = "10.0.2.2", "10.0.2.15"
# systemd's signal for power-off.
POWER_OFF = signal.SIGRTMIN + 4

libc = ctypes.CDLL(None, use_errno=True)
host_network = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    work = Path(sys.argv[1]).resolve().parent
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        call(libc.unshare(CLONE_NEWNS | CLONE_NEWNET), "unshare")
        run("mount", "--make-rprivate", "/")
        mount_layers(spec["layers"], work)
        build_switch()
        asyncio.run(serve(spec["id"], work, "--with-parent" in sys.argv))
    finally:
        remove_cgroups(f"khw-{spec['id']}-*")
        (work / "ready").unlink(missing_ok=True)


async def serve(cluster: str, work: Path, with_parent: bool) -> None:
    end = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, end.set)
    if with_parent:
        loop.add_reader(0, lambda: None if os.read(0, 4096) else end.set())
    machines = set()

    async def plug(reader, writer):
        machines.add(asyncio.current_task())
        await hold_machine(reader, writer, cluster, work)

    # A relative path, as that of a unix socket is limited to some 100 bytes.
    os.chdir(work)
    await asyncio.start_unix_server(plug, "supervisor")
    (work / "ready").write_text("")
    await end.wait()
    for machine in machines:
        machine.cancel()
    await asyncio.gather(*machines, return_exceptions=True)


def call(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), what)


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def on_host(make):
    """What a function returns that runs in this computer's own network."""
    ours = os.open("/proc/self/ns/net", os.O_RDONLY)
    call(libc.setns(host_network, CLONE_NEWNET), "setns")
    try:
        return make()
    finally:
        call(libc.setns(ours, CLONE_NEWNET), "setns")
        os.close(ours)


# ── Networks: one namespace is the switch of the LAN, and QEMU's gateway of each machine ──


def mount_layers(layers: dict[str, str], work: Path) -> None:
    """Once for all machines, in a mount namespace that ends with this process."""
    for name, image in layers.items():
        target = work / "layers" / name
        target.mkdir(parents=True, exist_ok=True)
        run("mount", "-t", "squashfs", "-o", "ro,loop", image, str(target))


def build_switch() -> None:
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", "lan", "type", "bridge", "stp_state", "0", "forward_delay", "0")
    run("ip", "link", "set", "lan", "up")
    # Every port of the gateway is one of this computer's loopback, as with QEMU.
    nat = ("iptables", "-t", "nat", "-A", "PREROUTING", "-d", GATEWAY, "-p", "tcp")
    run(*nat, "-j", "REDIRECT", "--to-ports", "1")


def plug_in(machine: dict, pid: int) -> None:
    """The machine's two network cards, with the names that udev would give them."""
    for card, mac in (("lan", machine["lanMac"]), ("outside", machine["mac"])):
        ours = port_of(card, machine)
        run(*f"ip link add {ours} type veth peer name {card} address {mac} netns {pid}".split())
        if card == "lan":
            run(*f"ip link set {ours} master lan".split())
        else:
            run(*f"ip address add {GATEWAY}/24 dev {ours}".split())
        run(*f"ip link set {ours} up".split())


def pull_out(machine: dict) -> None:
    """The kernel does so too, but a while after the machine has ended."""
    for card in ("lan", "outside"):
        command = ["ip", "link", "delete", port_of(card, machine)]
        subprocess.run(command, stderr=subprocess.DEVNULL)


def port_of(card: str, machine: dict) -> str:
    return f"{card[0]}-{machine['name'][:10]}"


# ── Machines ──


# What is left of a machine is removed before another one of the same name starts.
taken: dict[str, asyncio.Lock] = {}


async def hold_machine(reader, writer, cluster: str, work: Path) -> None:
    machine = json.loads(await reader.readline())
    lock = taken.setdefault(machine["name"], asyncio.Lock())
    try:
        await asyncio.wait_for(lock.acquire(), 60)
    except (TimeoutError, asyncio.TimeoutError):
        writer.write(f"{machine['name']} is running already\n".encode())
        writer.close()
        return
    try:
        await hold(machine, reader, writer, f"khw-{cluster}-{machine['name']}", work)
    finally:
        lock.release()


async def hold(machine: dict, reader, writer, group: str, work: Path) -> None:
    """Starts a machine, and starts it again when it reboots; ends it when its QEMU is gone."""
    child, way_out, servers = None, None, []
    open(machine["console"], "wb").close()
    try:
        listeners = on_host(lambda: [(listen(host), port) for host, port in machine["forwards"]])
        for listener, port in listeners:
            servers.append(await asyncio.start_server(inward(machine, port), sock=listener))
        orders = None
        while True:
            child = start(machine, group, work)
            way_out = await asyncio.start_server(outward, sock=gateway(machine))
            if not orders:
                writer.write(b"started\n")
                orders = asyncio.create_task(obey(reader, lambda: child))
            ended = asyncio.create_task(end_of(child))
            await asyncio.wait({orders, ended}, return_when=asyncio.FIRST_COMPLETED)
            way_out.close()
            # A reboot ends the first process of namespaces by this signal (reboot(2)).
            if orders.done() or child.poll() != -signal.SIGHUP:
                break
            await clear(machine, group)
    except OSError as error:
        writer.write(f"{machine['name']} cannot be started: {error}\n".encode())
    finally:
        if child:
            child.kill()
            child.wait()
        for server in [*servers, way_out]:
            if server:
                server.close()
        await clear(machine, group)
        writer.close()


async def clear(machine: dict, group: str) -> None:
    pull_out(machine)
    await asyncio.to_thread(remove_cgroups, group)


async def obey(reader, child) -> None:
    """Until the machine's QEMU hangs up."""
    while line := await reader.readline():
        if line == b"powerdown\n":
            first = Path(f"/proc/{child().pid}/task/{child().pid}/children").read_text().split()
            for pid in first:
                os.kill(int(pid), POWER_OFF)


async def end_of(child: subprocess.Popen) -> None:
    pid = os.pidfd_open(child.pid)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(pid, ended.set)
    try:
        await ended.wait()
    finally:
        asyncio.get_running_loop().remove_reader(pid)
        os.close(pid)


def start(machine: dict, group: str, work: Path) -> subprocess.Popen:
    groups = make_cgroups(group)

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # Nothing in a machine can set this computer's clock.
        libc.prctl(PR_CAPBSET_DROP, CAP_SYS_TIME)
        for folder in groups:
            (folder / "cgroup.procs").write_text("0")

    namespaces = ["--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup"]
    command = ["unshare", *namespaces, "--fork", "--kill-child=SIGKILL", "sh"]
    root, layers = work / "machines" / machine["name"], work / "layers"
    with open(machine["console"], "ab") as console:
        child = subprocess.Popen(
            [*command, str(HERE / "machine.sh"), str(root), str(layers)],
            stdin=subprocess.PIPE, stdout=console, stderr=console, preexec_fn=prepare,
        )
    ours = os.readlink("/proc/self/ns/net")
    while os.readlink(f"/proc/{child.pid}/ns/net") == ours:
        time.sleep(0.01)
    plug_in(machine, child.pid)
    child.stdin.write(b"\n")
    child.stdin.close()
    return child


def hierarchies() -> list[Path]:
    """The cgroup file systems: one of version 2, or with version 1 each controller's."""
    lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [Path(path) for _, path, kind, *_ in lines if kind in ("cgroup", "cgroup2") and CGROUPS in [Path(path), *Path(path).parents]]


def make_cgroups(name: str) -> list[Path]:
    groups = []
    for hierarchy in hierarchies():
        group = hierarchy / name
        group.mkdir(exist_ok=True)
        for file in ("cpuset.cpus", "cpuset.mems"):
            # Version 1 takes no process before these are set.
            if hierarchy.name == "cpuset":
                (group / file).write_text((hierarchy / file).read_text())
        if hierarchy == CGROUPS:
            for controller in (hierarchy / "cgroup.controllers").read_text().split():
                with contextlib.suppress(OSError):
                    (hierarchy / "cgroup.subtree_control").write_text(f"+{controller}")
        groups.append(group)
    return groups


def remove_cgroups(names: str) -> None:
    """Those of machines, after ending what is still in them. @names: a pattern"""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        left = [g for h in hierarchies() for g in h.glob(names)]
        if not left:
            return
        for group in left:
            for folder, _, _ in os.walk(group, topdown=False):
                with contextlib.suppress(OSError):
                    for pid in (Path(folder) / "cgroup.procs").read_text().split():
                        os.kill(int(pid), signal.SIGKILL)
                with contextlib.suppress(OSError):
                    os.rmdir(folder)
        time.sleep(0.05)


# ── Ports: in from this computer's loopback, and out to it ──


def listen(port: int) -> socket.socket:
    listener = socket.create_server(("127.0.0.1", port), backlog=64)
    listener.setblocking(False)
    return listener


def inward(machine: dict, port: int):
    async def forward(reader, writer):
        other = socket.socket()
        with contextlib.suppress(OSError):
            bind_to(other, machine)
        await join(reader, writer, other, (MACHINE, port))

    return forward


def gateway(machine: dict) -> socket.socket:
    """All of a machine's connections to its gateway arrive here (build_switch)."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bind_to(listener, machine)
    listener.bind(("0.0.0.0", 1))
    listener.setblocking(False)
    return listener


async def outward(reader, writer) -> None:
    found = writer.get_extra_info("socket").getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)
    await join(reader, writer, on_host(socket.socket), ("127.0.0.1", int.from_bytes(found[2:4], "big")))


def bind_to(end: socket.socket, machine: dict) -> None:
    """All machines have the same address: the network card decides which one it is."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, port_of("outside", machine).encode())


async def join(reader, writer, other: socket.socket, address: tuple[str, int]) -> None:
    other.setblocking(False)
    try:
        await asyncio.wait_for(asyncio.get_running_loop().sock_connect(other, address), 10)
        back, forth = await asyncio.open_connection(sock=other)
    except (OSError, TimeoutError, asyncio.TimeoutError):
        other.close()
        writer.transport.abort()
        return
    for side in (writer, forth):
        side.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    await asyncio.gather(pump(reader, forth), pump(back, writer))
    for side in (writer, forth):
        side.close()


async def pump(source, target) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(1 << 16):
            target.write(data)
            await target.drain()
        target.write_eof()
        return
    target.transport.abort()


if __name__ == "__main__":
    if sys.argv[1] == "--clear":
        remove_cgroups(f"khw-{sys.argv[2]}-*")
    else:
        main()
