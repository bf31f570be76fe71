"""Prints the command line of every program that is started on this computer, a line each, from the
kernel's process events (drivers/connector/cn_proc.c; needs root). The first line is "ready"."""

import os
import signal
import socket
import struct
import sys

NETLINK_CONNECTOR, CN_IDX_PROC, CN_VAL_PROC, PROC_CN_MCAST_LISTEN, PROC_EVENT_EXEC = 11, 1, 1, 1, 2
HEADERS = 16 + 20  # nlmsghdr, cn_msg

signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the scripts that it observes.
events = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_CONNECTOR)
events.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
events.bind((os.getpid(), CN_IDX_PROC))
listen = struct.pack("=IIIIHHI", CN_IDX_PROC, CN_VAL_PROC, 0, 0, 4, 0, PROC_CN_MCAST_LISTEN)
events.send(struct.pack("=IHHII", 16 + len(listen), 3, 0, 0, os.getpid()) + listen)
print("ready", flush=True)
while True:
    try:
        message = events.recv(4096)
    except OSError:  # So many at once that some were lost.
        continue
    what, _, _, pid = struct.unpack_from("=IIQi", message, HEADERS)
    if what != PROC_EVENT_EXEC:
        continue
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            line = file.read()
    except OSError:
        continue  # It has ended already.
    # Fails, and so ends this program, when nobody reads any more.
    sys.stdout.buffer.write(line.replace(b"\n", b" ").replace(b"\0", b" ") + b"\n")
    sys.stdout.buffer.flush()
