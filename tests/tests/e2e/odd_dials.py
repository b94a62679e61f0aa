"""Dials as applications rarely do, and says hello to the lab's TCP server.

The one argument is JSON: kind, to ([address, port]), text, and what the kind needs: `cgroup` (a
directory to move to first), `socket` (a unix socket to hand over or take a socket by). Prints
{"outcome": "answered" | "<step>:<errno's name>" | "read:EOF", "seen": …}.
"""

import array
import errno
import json
import os
import socket
import sys
import time

MPTCP = 262
SO_BINDTODEVICE = 25
MSG_FASTOPEN = 0x20000000
TCP_FASTOPEN_CONNECT = 30


class Failed(Exception):
    pass


def step(name, call, *args):
    try:
        return call(*args)
    except TimeoutError:
        raise Failed(f"{name}:ETIMEDOUT")
    except OSError as error:
        raise Failed(f"{name}:{errno.errorcode.get(error.errno, error.errno)}")


def family(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def stream(address, protocol=0):
    made = step("socket", socket.socket, family(address), socket.SOCK_STREAM, protocol)
    made.settimeout(3)
    return made


def hand_over(path, made):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(1)
    listener.settimeout(20)
    print(json.dumps({"event": "listening"}), flush=True)
    taker, _ = listener.accept()
    taker.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [made.fileno()]))])
    taker.recv(1)


def take(path, address):
    giver = socket.socket(socket.AF_UNIX)
    for _ in range(200):
        try:
            giver.connect(path)
            break
        except OSError:
            time.sleep(0.05)
    _, rights, _, _ = giver.recvmsg(1, socket.CMSG_LEN(4))
    descriptor = array.array("i", rights[0][2])[0]
    made = socket.socket(family(address), socket.SOCK_STREAM, 0, descriptor)
    made.settimeout(3)
    return made


def dial(role):
    kind, (address, port), text = role["kind"], role["to"], role["text"]
    hello = f"hello {text}\n".encode()
    if kind == "mapped":
        made = stream("::")
        step("option", made.setsockopt, socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        step("connect", made.connect, (f"::ffff:{address}", port))
    elif kind == "mptcp":
        made = stream(address, MPTCP)
        step("connect", made.connect, (address, port))
    elif kind == "device":
        made = stream(address)
        step("option", made.setsockopt, socket.SOL_SOCKET, SO_BINDTODEVICE, b"eth0\0")
        step("connect", made.connect, (address, port))
    elif kind == "fast-open":
        made = stream(address)
        # A time-out makes the socket non-blocking, and the call would not wait.
        made.settimeout(None)
        step("connect", made.sendto, hello, MSG_FASTOPEN, (address, port))
        made.settimeout(3)
        hello = b""
    elif kind == "fast-open-connect":
        made = stream(address)
        step("option", made.setsockopt, socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
        step("connect", made.connect, (address, port))
    elif kind == "given":
        made = take(role["socket"], address)
        step("connect", made.connect, (address, port))
    elif kind == "cgroup":
        os.makedirs(role["cgroup"], exist_ok=True)
        with open(os.path.join(role["cgroup"], "cgroup.procs"), "w") as procs:
            procs.write(str(os.getpid()))
        made = stream(address)
        step("connect", made.connect, (address, port))
    else:
        made = stream(address)
        step("connect", made.connect, (address, port))
    if hello:
        step("write", made.sendall, hello)
    line = b""
    while not line.endswith(b"\n"):
        read = step("read", made.recv, 4096)
        if not read:
            raise Failed("read:EOF")
        line += read
    return json.loads(line)


def main():
    role = json.loads(sys.argv[1])
    if role["kind"] == "hand-over":
        hand_over(role["socket"], stream(role["to"][0]))
        return
    try:
        print(json.dumps({"outcome": "answered", "seen": dial(role)}))
    except Failed as failed:
        print(json.dumps({"outcome": str(failed), "seen": None}))


main()
