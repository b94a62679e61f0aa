"""Tries many flows at once: the one argument is JSON, a list of [protocol, address, port].

Prints a JSON list of what became of each, in order: "answered" or how it failed.
"""

import concurrent.futures
import errno
import json
import socket
import sys


def attempt(flow):
    protocol, address, port = flow
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
    try:
        with socket.socket(family, kind) as made:
            # A refused datagram is only noticed by its silence.
            made.settimeout(0.7 if protocol == "udp" else 5)
            made.connect((address, port))
            made.sendall(b"hello many\n")
            return "answered" if made.recv(4096) else "EOF"
    except TimeoutError:
        return "ETIMEDOUT"
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error.errno))


with concurrent.futures.ThreadPoolExecutor(8) as pool:
    print(json.dumps(list(pool.map(attempt, json.loads(sys.argv[1])))))
