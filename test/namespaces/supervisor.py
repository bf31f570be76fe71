"""Holds a namespace cluster: its networks, the forwarded ports, and a process for each machine.

    supervisor.py WORK/cluster.json [--with-parent]

All that it starts dies with it, whatever ends it: the kernel then removes namespaces, mounts,
network devices and processes. What it removes itself at its end are the machines' cgroup folders.
With --with-parent it ends when its standard input does.
"""

import asyncio
import contextlib
import ctypes
import fcntl
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

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    work = Path(sys.argv[1]).resolve().parent
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    listeners = [
        (machine, listen(host), port)
        for machine in spec["machines"]
        for host, port in machine["forwards"]
    ]
    children = [start_beside(command, spec["root"]) for command in spec["beside"]]
    host_network = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        call(libc.unshare(CLONE_NEWNS | CLONE_NEWNET), "unshare")
        run("mount", "--make-rprivate", "/")
        mount_layers(spec["layers"], work)
        build_switch()
        for machine in spec["machines"]:
            children.append(start(machine, spec["id"], work))
        (work / "ready").write_text("")
        asyncio.run(serve(listeners, children, host_network, "--with-parent" in sys.argv))
    finally:
        for child in children:
            child.kill()
            child.wait()
        remove_cgroups(spec["id"])
        (work / "ready").unlink(missing_ok=True)


def call(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), what)


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def listen(port: int) -> socket.socket:
    listener = socket.create_server(("127.0.0.1", port), backlog=64)
    listener.setblocking(False)
    return listener


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
    short = machine["name"][:10]
    for card, mac in (("lan", machine["lanMac"]), ("outside", machine["mac"])):
        ours = f"{card[0]}-{short}"
        run(*f"ip link add {ours} type veth peer name {card} address {mac} netns {pid}".split())
        if card == "lan":
            run(*f"ip link set {ours} master lan".split())
        else:
            run(*f"ip address add {GATEWAY}/24 dev {ours}".split())
        run(*f"ip link set {ours} up".split())


# ── Machines ──


def start(machine: dict, cluster: str, work: Path) -> subprocess.Popen:
    groups = make_cgroups(f"khw-{cluster}-{machine['name']}")

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # Nothing in a machine can set this computer's clock.
        libc.prctl(PR_CAPBSET_DROP, CAP_SYS_TIME)
        for group in groups:
            (group / "cgroup.procs").write_text("0")

    namespaces = ["--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup"]
    command = ["unshare", *namespaces, "--fork", "--kill-child=SIGKILL"]
    with open(machine["console"], "ab") as console:
        child = subprocess.Popen(
            [*command, "sh", str(HERE / "machine.sh"), machine["root"], str(work / "layers")],
            stdin=subprocess.PIPE, stdout=console, stderr=console, preexec_fn=prepare,
        )
    ours = os.readlink("/proc/self/ns/net")
    while os.readlink(f"/proc/{child.pid}/ns/net") == ours:
        time.sleep(0.01)
    plug_in(machine, child.pid)
    child.stdin.write(b"\n")
    child.stdin.close()
    return child


def start_beside(command: list[str], root: str) -> subprocess.Popen:
    """A process of this computer that scripts expect where machines run."""
    return subprocess.Popen(
        command, cwd=root, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
    )


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


def remove_cgroups(cluster: str) -> None:
    """Those of all machines of the cluster, after ending what is still in them."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        left = [g for h in hierarchies() for g in h.glob(f"khw-{cluster}-*")]
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


async def serve(listeners, children, host_network: int, with_parent: bool) -> None:
    loop = asyncio.get_running_loop()
    end = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, end.set)
    if with_parent:
        loop.add_reader(0, lambda: None if os.read(0, 4096) else end.set())
    for machine, listener, port in listeners:
        async def inward(reader, writer, machine=machine, port=port):
            other = socket.socket()
            bind_to(other, machine)
            await join(reader, writer, other, (MACHINE, port))
        await asyncio.start_server(inward, sock=listener)

    async def outward(reader, writer):
        found = writer.get_extra_info("socket").getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)
        ours = os.open("/proc/self/ns/net", os.O_RDONLY)
        call(libc.setns(host_network, CLONE_NEWNET), "setns")
        other = socket.socket()
        call(libc.setns(ours, CLONE_NEWNET), "setns")
        os.close(ours)
        await join(reader, writer, other, ("127.0.0.1", int.from_bytes(found[2:4], "big")))

    for machine in {machine["name"]: machine for machine, _, _ in listeners}.values():
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bind_to(listener, machine)
        listener.bind(("0.0.0.0", 1))
        listener.setblocking(False)
        await asyncio.start_server(outward, sock=listener)
    await end.wait()


def bind_to(end: socket.socket, machine: dict) -> None:
    """All machines have the same address: the network card decides which one it is."""
    card = f"o-{machine['name'][:10]}".encode()
    end.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, card)


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
        remove_cgroups(sys.argv[2])
    else:
        main()
