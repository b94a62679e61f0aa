"""A workload of the lab that uses Python's `spiffe` and `spiffe-tls`: mutual TLS with a peer.

Every event is a JSON line. It ends when its standard input closes.
"""

import json
import os
import socket
import sys
import threading
import time

from OpenSSL import SSL
from spiffe import JwtSource, SpiffeId, WorkloadApiClient, X509Source
from spiffetls import ListenOptions, dial, listen
from spiffetls.mode import ClientTlsMode, ServerTlsMode
from spiffetls.tlsconfig.authorize import authorize_id

TOLD = threading.Event()


def say(**event):
    print(json.dumps(event), flush=True)


def wait_to_be_told():
    sys.stdin.read()
    TOLD.set()


def serve(address, peer):
    source = X509Source(timeout_in_seconds=30)
    options = ListenOptions(
        tls_mode=ServerTlsMode.MTLS, authorize_fn=authorize_id(SpiffeId(peer)), backlog=64
    )
    listener = listen(address, source, options)
    say(event="listening")
    while True:
        connection, _ = listener.accept()
        try:
            connection.do_handshake()
            if connection.recv(4) == b"ping":
                connection.sendall(b"pong")
            connection.shutdown()
        except Exception as error:
            say(event="failed", why=repr(error))
        finally:
            connection.close()


def call(address, peer):
    source = X509Source(timeout_in_seconds=30)
    exchanges, failures, certificates = 0, [], set()
    while not TOLD.is_set():
        try:
            connection = dial(
                address, source, ClientTlsMode.TLS, authorize_fn=authorize_id(SpiffeId(peer))
            )
            connection.sendall(b"ping")
            answer = connection.recv(4)
            if answer != b"pong":
                raise RuntimeError(f"answered {answer!r}")
            certificates.add(connection.get_peer_certificate().get_serial_number())
            connection.close()
            exchanges += 1
        except Exception as error:
            failures.append(repr(error))
        if exchanges + len(failures) == 1:
            say(event="first", failures=failures)
        TOLD.wait(0.1)
    say(
        event="report",
        exchanges=exchanges,
        peerCertificates=len(certificates),
        failures=failures,
    )


def fetch(audience):
    with WorkloadApiClient(default_timeout=15.0) as client:
        svid = client.fetch_x509_svid()
        bundles = client.fetch_x509_bundles()
        event = dict(event="fetched", id=str(svid.spiffe_id), bundles=len(bundles.bundles))
        if audience:
            token = client.fetch_jwt_svid(audience={audience})
            valid = client.validate_jwt_svid(token.token, audience)
            event["jwt"] = str(valid.spiffe_id)
            with JwtSource(timeout_in_seconds=30) as source:
                event["jwtSource"] = str(source.fetch_svid(audience={audience}).spiffe_id)
        say(**event)


def main():
    role = sys.argv[1]
    if role == "fetch":
        return fetch(sys.argv[2] if len(sys.argv) > 2 else None)
    threading.Thread(target=wait_to_be_told, daemon=True).start()
    if role == "client":
        call(sys.argv[2], sys.argv[3])
    else:
        threading.Thread(target=serve, args=(sys.argv[2], sys.argv[3]), daemon=True).start()
        TOLD.wait()
    # The sources' threads do not end by themselves.
    sys.stdout.flush()
    os._exit(0)


main()
