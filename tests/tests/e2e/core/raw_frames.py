"""Writes frames past the sockets' hooks, as an attacker with CAP_NET_RAW in a pod would.

The one argument is JSON: interface, bypass (PACKET_QDISC_BYPASS), frames. A frame has kind
(udp, syn, arp, later-fragment, advertisement), from, to, source_port, port, text, mac.
Prints how many bytes the kernel took for each.
"""

import ipaddress
import json
import socket
import struct
import sys

SOL_PACKET = 263
PACKET_QDISC_BYPASS = 20
IPV4, ARP, IPV6 = 0x0800, 0x0806, 0x86DD


def checksum(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ip(frame, protocol, segment, at):
    """The IP packet of a segment whose checksum field is at `at` (None: it has none)."""
    source = ipaddress.ip_address(frame["from"])
    to = ipaddress.ip_address(frame["to"])
    if at is not None:
        pseudo = source.packed + to.packed + struct.pack("!IHBB", len(segment), 0, 0, protocol)
        total = checksum(pseudo + segment)
        segment = segment[:at] + struct.pack("!H", total) + segment[at + 2 :]
    if source.version == 6:
        return IPV6, struct.pack("!IHBB", 6 << 28, len(segment), protocol, 255) + source.packed + to.packed + segment
    fragment = 100 if frame["kind"] == "later-fragment" else 0
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), 77, fragment, 64, protocol, 0)
    header += source.packed + to.packed
    return IPV4, header[:10] + struct.pack("!H", checksum(header)) + header[12:] + segment


def payload(frame, own_mac):
    kind = frame["kind"]
    ports = struct.pack("!HH", frame.get("source_port", 0), frame.get("port", 0))
    text = frame.get("text", "").encode()
    if kind == "udp":
        return ip(frame, 17, ports + struct.pack("!HH", 8 + len(text), 0) + text, 6)
    if kind == "syn":
        segment = ports + struct.pack("!IIBBHHH", 1, 0, 0x50, 0x02, 65535, 0, 0)
        return ip(frame, 6, segment, 16)
    if kind == "later-fragment":
        return ip(frame, 17, text.ljust(64, b"."), None)
    if kind == "advertisement":
        # An unsolicited one with the override flag, telling `target`.
        target = ipaddress.ip_address(frame["target"]).packed
        message = struct.pack("!BBHI", 136, 0, 0, 0x20000000) + target + b"\2\1" + own_mac
        return ip(frame, 58, message, 2)
    if kind == "arp":
        source = ipaddress.ip_address(frame["from"]).packed
        to = ipaddress.ip_address(frame["to"]).packed
        reply = struct.pack("!HHBBH", 1, IPV4, 6, 4, 2)
        return ARP, reply + own_mac + source + bytes.fromhex(frame["mac"].replace(":", "")) + to
    raise ValueError(kind)


def main():
    role = json.loads(sys.argv[1])
    sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    sender.bind((role["interface"], 0))
    if role["bypass"]:
        sender.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, 1)
    own_mac = sender.getsockname()[4]
    taken = []
    for frame in role["frames"]:
        kind, packet = payload(frame, own_mac)
        mac = bytes.fromhex(frame["mac"].replace(":", ""))
        taken.append(sender.send(mac + own_mac + struct.pack("!H", kind) + packet))
    print(json.dumps({"taken": taken}))


main()
