"""gRPC and websockets for the lab, as others' libraries speak them, without generated code.

`server ADDRESS` serves gRPC on port 8081 and websockets on port 8082 of that address;
`grpc TARGET` and `websocket URL` are the clients. Every event is a JSON line.
"""

import asyncio
import json
import sys
from concurrent import futures

import grpc
import websockets

LARGE = bytes(range(256)) * 4096


def say(**event):
    print(json.dumps(event), flush=True)


def each(requests):
    for request in requests:
        yield request[::-1]


class Echo(grpc.GenericRpcHandler):
    """All four kinds; what is answered is what was asked, reversed."""

    def service(self, call):
        kinds = {
            "/lab.Echo/Unary": grpc.unary_unary_rpc_method_handler(lambda one, _: one[::-1]),
            "/lab.Echo/Down": grpc.unary_stream_rpc_method_handler(
                lambda one, _: (one[::-1] for _ in range(5))
            ),
            "/lab.Echo/Up": grpc.stream_unary_rpc_method_handler(
                lambda many, _: b"".join(each(many))
            ),
            "/lab.Echo/Both": grpc.stream_stream_rpc_method_handler(lambda many, _: each(many)),
            "/lab.Admin/Drop": grpc.unary_unary_rpc_method_handler(lambda one, _: b"dropped"),
        }
        return kinds.get(call.method)


async def echo(socket):
    async for message in socket:
        await socket.send(message)


async def serve(address):
    options = [("grpc.max_receive_message_length", 16 << 20)]
    server = grpc.server(futures.ThreadPoolExecutor(8), handlers=[Echo()], options=options)
    shown = f"[{address}]" if ":" in address else address
    if server.add_insecure_port(f"{shown}:8081") == 0:
        raise SystemExit("no port for gRPC")
    server.start()
    async with websockets.serve(echo, address, 8082, max_size=None):
        say(event="listening")
        await asyncio.Future()


def call_grpc(target):
    channel = grpc.insecure_channel(target)
    asked = [b"a1", b"b2", b"c3"]

    def stream():
        yield from asked

    unary = channel.unary_unary("/lab.Echo/Unary")(LARGE, timeout=20)
    down = list(channel.unary_stream("/lab.Echo/Down")(b"xyz", timeout=20))
    up = channel.stream_unary("/lab.Echo/Up")(stream(), timeout=20)
    both = list(channel.stream_stream("/lab.Echo/Both")(stream(), timeout=20))
    try:
        channel.unary_unary("/lab.Admin/Drop")(b"x", timeout=20)
        denied = "answered"
    except grpc.RpcError as error:
        denied = error.code().name + ": " + error.details()
    again = channel.unary_unary("/lab.Echo/Unary")(b"again", timeout=20)
    say(
        event="grpc",
        unary=unary == LARGE[::-1],
        down=down == [b"zyx"] * 5,
        up=up == b"1a2b3c",
        both=both == [b"1a", b"2b", b"3c"],
        denied=denied,
        again=again == b"niaga",
    )


async def call_websocket(url):
    messages = ["hello", LARGE, "GET /api/v1/admin HTTP/1.1\r\nHost: x\r\n\r\n"]
    async with websockets.connect(url + "/ws", max_size=None) as socket:
        echoed = True
        for message in messages:
            await socket.send(message)
            echoed = echoed and await socket.recv() == message
    try:
        async with websockets.connect(url + "/admin"):
            denied = 101
    except websockets.exceptions.InvalidStatusCode as error:
        denied = error.status_code
    say(event="websocket", echoed=echoed, denied=denied)


ROLE, WHERE = sys.argv[1:]
if ROLE == "server":
    asyncio.run(serve(WHERE))
elif ROLE == "grpc":
    call_grpc(WHERE)
else:
    asyncio.run(call_websocket(WHERE))
