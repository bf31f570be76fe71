#!/usr/bin/python3
"""A QEMU that emulates nothing: the machine that it switches on is one of namespaces.

As CLUSTER/bin/qemu-system-…, first on the PATH, it takes the arguments of the project's scripts.
What it is asked without a machine, such as --version, the real QEMU answers. A machine that is
installed gets the live system of the tests on this terminal; one that is started is a connection
to the cluster's supervisor, and off when that ends."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

CLUSTER = Path(sys.argv[0]).absolute().parent.parent
HERE = Path(__file__).resolve().parent
# What the live system has in place of programs that need a disk, or NixOS.
LIVE_PROGRAMS = (
    "sudo dmesg nixos-version nixos-install parted udevadm mkfs.fat mkfs.ext4 mount umount findmnt poweroff"
)


def main() -> int:
    words = sys.argv[1:]
    if "-pidfile" not in words:
        own = Path(sys.argv[0]).absolute()
        found = [Path(folder, own.name) for folder in os.environ["PATH"].split(":")]
        real = next(path for path in found if path.exists() and not path.samefile(own))
        os.execv(real, [str(real), *words])
    name = words[words.index("-name") + 1]
    if any(word.startswith("stdio,id=console") for word in words):
        return install(name, words)
    return asyncio.run(boot(name, words))


def install(name: str, words: list[str]) -> int:
    state = CLUSTER / "installing" / name
    shutil.rmtree(state, ignore_errors=True)
    (state / "bin").mkdir(parents=True)
    live = HERE.parent / "live-system.sh"
    shutil.copy(live, state / "bin/live-system.sh")
    for program in LIVE_PROGRAMS.split():
        (state / "bin" / program).symlink_to("live-system.sh")
    machine = state / Path(sys.argv[0]).name
    shutil.copy(live, machine)
    # No machine boots at once: an INSTALL_TIMEOUT of one second is too short for this one as well.
    time.sleep(1)
    env = {**os.environ, "LIVE_SYSTEM": str(state)}
    status = subprocess.run([str(machine), *words], env=env).returncode
    installed = state / "installed" / name
    if status == 0 and installed.exists():
        lay_out = ["sh", str(HERE / "lay-out.sh"), str(CLUSTER), name, str(installed)]
        status = subprocess.run(lay_out).returncode
    shutil.rmtree(state, ignore_errors=True)
    return status


async def boot(name: str, words: list[str]) -> int:
    line = " ".join(words)
    forwards = [[int(host), int(port)] for host, port in re.findall(r":(\d+)-:(\d+)", line)]
    machine = {
        "name": name,
        "mac": re.search(r"netdev=outside,mac=([^,]+)", line)[1],
        "lanMac": re.search(r"netdev=lan,mac=([^,]+)", line)[1],
        "forwards": forwards,
        "console": re.search(r",logfile=([^,]+)", line)[1],
    }
    # The path of a unix socket is limited to some 100 bytes.
    run = os.getcwd()
    os.chdir(CLUSTER)
    reader, writer = await asyncio.open_unix_connection("supervisor")
    os.chdir(run)

    off = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, off.set)
    writer.write(json.dumps(machine).encode() + b"\n")
    started = await reader.readline()
    if started != b"started\n":
        print(started.decode() or "the cluster's supervisor ended", file=sys.stderr)
        return 1
    pid_file, socket = Path(words[words.index("-pidfile") + 1]), Path(f"{name}.qmp")
    socket.unlink(missing_ok=True)
    await asyncio.start_unix_server(lambda *streams: serve(*streams, writer, off), socket)
    pid_file.write_text(f"{os.getpid()}\n")

    gone = asyncio.create_task(reader.read())
    switched_off = asyncio.create_task(off.wait())
    await asyncio.wait({gone, switched_off}, return_when=asyncio.FIRST_COMPLETED)
    if not gone.done():
        # Its ports are free when the supervisor hangs up as well.
        writer.write_eof()
        await gone
    for path in (pid_file, socket):
        path.unlink(missing_ok=True)
    return 0


async def serve(reader, writer, supervisor, off: asyncio.Event) -> None:
    """What the scripts ask by the QEMU Machine Protocol."""

    async def send(message: dict) -> None:
        writer.write(json.dumps(message).encode() + b"\r\n")
        await writer.drain()

    with contextlib.suppress(OSError):
        await send({"QMP": {"version": {}, "capabilities": []}})
        while line := await reader.readline():
            request = json.loads(line)
            command = request["execute"]
            if command == "system_powerdown":
                supervisor.write(b"powerdown\n")
            status = {"status": "running", "running": True}
            await send({"return": status if command == "query-status" else {}, "id": request.get("id")})
            if command == "quit":
                off.set()
    writer.close()


sys.exit(main())
