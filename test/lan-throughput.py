"""How fast frames pass a switch: `lan-throughput.py udp SWITCH FROM TO` (ports of our LAN switch) or
`lan-throughput.py vde FOLDER` (of vde_switch). Two cards; at most 64 frames are on their way, so
that none is lost. Prints megabytes per second."""

import ctypes
import multiprocessing
import socket
import sys
import time

FRAMES, WINDOW = 60_000, 64
A, B = b'\x52\x54\x00\x00\x00\x0a', b'\x52\x54\x00\x00\x00\x0b'


def udp_card(switch, port):
    card = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    card.bind(('127.0.0.1', port))
    card.connect(('127.0.0.1', switch))
    return card


def vde_card(folder):
    vde = ctypes.CDLL('libvdeplug.so.2')
    vde.vde_open_real.restype = ctypes.c_void_p
    # The interface's version; no options.
    plug = vde.vde_open_real(folder.encode(), b'bench', 1, None)
    if not plug:
        sys.exit('vde_switch does not answer')
    # QEMU sends and reads on these sockets as well.
    return vde, ctypes.c_void_p(plug)


class Vde:
    def __init__(self, folder):
        self.vde, self.plug = vde_card(folder)
        self.buffer = ctypes.create_string_buffer(2048)

    def send(self, frame):
        self.vde.vde_send(self.plug, frame, len(frame), 0)

    def recv(self, size):
        length = self.vde.vde_recv(self.plug, self.buffer, size, 0)
        return self.buffer.raw[:length]


def card_of(index):
    if sys.argv[1] == 'udp':
        switch, *ports = (int(port) for port in sys.argv[2:5])
        return udp_card(switch, ports[index])
    return Vde(sys.argv[2])


def receive(received, ready):
    card = card_of(1)
    # The switch learns where this card is.
    card.send(A + B + b'\x88\xb5' + bytes(50))
    ready.set()
    while received.value < FRAMES:
        if card.recv(2048)[:6] == B:
            received.value += 1


received, ready = multiprocessing.Value('i', 0, lock=False), multiprocessing.Event()
sender = card_of(0)
process = multiprocessing.Process(target=receive, args=(received, ready), daemon=True)
process.start()
ready.wait(10)
time.sleep(0.2)
frame = B + A + b'\x88\xb5' + bytes(1500)
began = time.monotonic()
for sent in range(FRAMES):
    limit = time.monotonic() + 5
    while sent - received.value >= WINDOW:
        if time.monotonic() > limit:
            sys.exit(f'frames were lost: {sent} sent, {received.value} received')
        time.sleep(0)
    sender.send(frame)
process.join(10)
print(FRAMES * len(frame) / 1e6 / (time.monotonic() - began))
