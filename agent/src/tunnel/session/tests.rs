//! Sessions over byte streams in memory, against one another and against rustls' own buffered
//! interface.

use std::{sync::Arc, time::Duration};

use rustls::{client::UnbufferedClientConnection, server::UnbufferedServerConnection};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    time::timeout,
};
use tokio_rustls::TlsConnector;

use super::*;
use crate::{
    spiffe::forge::Forger,
    tunnel::tls::tests::{WEB, raw_client, raw_server},
};

fn side(root: &Forger) -> (Side, Side) {
    let name = "server.example".try_into().unwrap();
    let config = Arc::new(raw_client(root.leaf(WEB)));
    let client = UnbufferedClientConnection::new(config, name).unwrap();
    let mut config = raw_server(root.leaf(WEB));
    // As in a tunnel: nobody reads them before the handshake ends on both sides.
    config.send_tls13_tickets = 0;
    let server = UnbufferedServerConnection::new(Arc::new(config)).unwrap();
    (Side::Client(Box::new(client)), Side::Server(Box::new(server)))
}

/// Two ends, over pipes that hold so many bytes.
async fn pair(pipe: usize) -> (Session<DuplexStream>, Session<DuplexStream>) {
    let (client, server) = side(&Forger::root("root"));
    let (here, there) = duplex(pipe);
    let (mut here, mut there) = (Session::new(here, client), Session::new(there, server));
    let (shaken, taken) = tokio::join!(here.handshake(), there.handshake());
    shaken.unwrap();
    taken.unwrap();
    (here, there)
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn holds_nothing<T>(session: &Session<T>) -> bool {
    session.incoming.buffer.is_none()
        && session.outgoing.buffer.is_none()
        && session.plain.bytes.capacity() == 0
}

#[tokio::test]
async fn buffers_grow_with_bulk_shrink_with_trickle_and_nothing_is_lost() {
    let (mut here, mut there) = pair(2 * LARGEST).await;
    let bulk = pattern(6 << 20);
    let expected = bulk.clone();
    let writing = tokio::spawn(async move {
        here.write_all(&bulk).await.unwrap();
        here.flush().await.unwrap();
        here
    });
    let mut got = vec![0; expected.len()];
    there.read_exact(&mut got).await.unwrap();
    assert!(got == expected);
    assert_eq!(there.incoming.size, LARGEST);

    let mut here = writing.await.unwrap();
    for i in 0..200u8 {
        here.write_all(&[i]).await.unwrap();
        here.flush().await.unwrap();
        assert_eq!(there.read_u8().await.unwrap(), i);
    }
    assert_eq!(there.incoming.size, SMALLEST);
    assert!(timeout(Duration::from_millis(10), there.read_u8()).await.is_err());
    assert!(holds_nothing(&here) && holds_nothing(&there), "{here:?} {there:?}");

    here.shutdown().await.unwrap();
    assert_eq!(there.read(&mut [0; 8]).await.unwrap(), 0);
    assert_eq!(there.read(&mut [0; 8]).await.unwrap(), 0, "an end stays one");
    there.write_all(b"its own direction is open").await.unwrap();
    there.shutdown().await.unwrap();
    let mut rest = Vec::new();
    here.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"its own direction is open");
}

/// Pipes narrower than a record, and reads and writes of every size, both ways at once.
#[tokio::test]
async fn sizes_that_fit_nothing_lose_nothing() {
    for pipe in [1, 777, 5000, 40_000] {
        let (here, there) = pair(pipe).await;
        let total = if pipe == 1 { 3_000 } else { 700_000 };
        let play = async |session: Session<DuplexStream>, first: usize| {
            let (mut reader, mut writer) = tokio::io::split(session);
            let data = pattern(total);
            let write = async {
                let (mut at, mut size) = (0, first);
                while at < data.len() {
                    let part = &data[at..(at + size).min(data.len())];
                    writer.write_all(part).await.unwrap();
                    at += part.len();
                    size = size * 7 % 60_013 + 1;
                }
                writer.shutdown().await.unwrap();
            };
            let read = async {
                let (mut got, mut size) = (Vec::new(), first);
                loop {
                    let mut part = vec![0; size];
                    let n = reader.read(&mut part).await.unwrap();
                    if n == 0 {
                        return got;
                    }
                    got.extend_from_slice(&part[..n]);
                    size = size * 5 % 40_009 + 1;
                }
            };
            let ((), got) = tokio::join!(write, read);
            assert!(got == data, "pipe of {pipe}");
        };
        tokio::join!(play(here, 1), play(there, 8));
    }
}

#[tokio::test]
async fn parts_that_are_written_together_share_a_record() {
    let (mut here, mut there) = pair(LARGEST).await;
    let parts = [io::IoSlice::new(b"head"), io::IoSlice::new(&[]), io::IoSlice::new(b"body")];
    let n = here.write_vectored(&parts).await.unwrap();
    here.flush().await.unwrap();
    let mut got = [0; 16];
    assert_eq!((n, there.read(&mut got).await.unwrap()), (8, 8));
    assert_eq!(&got[..8], b"headbody");
    let one = [io::IoSlice::new(&[]), io::IoSlice::new(b"alone")];
    assert_eq!(here.write_vectored(&one).await.unwrap(), 5);
    assert_eq!(here.write_vectored(&[]).await.unwrap(), 0);
    here.flush().await.unwrap();
    assert_eq!(there.read(&mut got).await.unwrap(), 5);
}

/// What nobody has read yet does not stand in the way of a write, and is read later.
#[tokio::test]
async fn a_write_keeps_what_nobody_has_read() {
    let (mut here, mut there) = pair(LARGEST).await;
    for part in [b"one", b"two", b"six"] {
        here.write_all(part).await.unwrap();
    }
    here.flush().await.unwrap();
    assert_eq!(there.read_u8().await.unwrap(), b'o', "the rest waits, sealed or not");
    there.write_all(b"answer").await.unwrap();
    there.flush().await.unwrap();
    let mut got = [0; 8];
    there.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"netwosix");
    let mut answer = [0; 6];
    here.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"answer");
    assert!(holds_nothing(&there));
}

/// What came before the break is delivered, then the break, and nothing behind it.
#[tokio::test]
async fn a_record_that_was_touched_ends_the_session() {
    let (client, server) = side(&Forger::root("root"));
    let ((near, mut far), (mut other, there)) = (duplex(LARGEST), duplex(LARGEST));
    let (mut here, mut there) = (Session::new(near, client), Session::new(there, server));
    let between = tokio::spawn(async move {
        let (mut block, mut back) = (vec![0; LARGEST], vec![0; LARGEST]);
        let mut seen = 0;
        loop {
            tokio::select! {
                n = far.read(&mut block) => {
                    let n = n.unwrap();
                    if n == 0 { return }
                    seen += 1;
                    // The hello, the Finished, a good record, then this.
                    if seen == 4 {
                        block[n - 1] ^= 1;
                    }
                    other.write_all(&block[..n]).await.unwrap();
                }
                n = other.read(&mut back) => {
                    let n = n.unwrap();
                    if n == 0 { return }
                    far.write_all(&back[..n]).await.unwrap();
                }
            }
        }
    });
    let (shaken, taken) = tokio::join!(here.handshake(), there.handshake());
    shaken.unwrap();
    taken.unwrap();
    here.write_all(b"good").await.unwrap();
    here.flush().await.unwrap();
    let mut got = [0; 64];
    assert_eq!(there.read(&mut got).await.unwrap(), 4);
    here.write_all(b"touched").await.unwrap();
    here.flush().await.unwrap();
    let error = there.read(&mut got).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
    let cause = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    assert_eq!(cause, Some(&rustls::Error::DecryptError));
    assert!(there.read(&mut got).await.is_err() && there.write_all(b"more").await.is_err());
    // The peer is told why.
    let error = here.read(&mut got).await.unwrap_err();
    let cause = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    let alert = rustls::AlertDescription::BadRecordMac;
    assert_eq!(cause, Some(&rustls::Error::AlertReceived(alert)));
    between.abort();
}

/// New keys that the peer asks for in the middle of its bytes, which TLS itself answers.
#[tokio::test]
async fn keys_are_renewed_when_the_peer_asks() {
    let root = Forger::root("root");
    let (_, server) = side(&root);
    let (near, far) = duplex(LARGEST);
    let mut there = Session::new(far, server);
    let name = "server.example".try_into().unwrap();
    let connector = TlsConnector::from(Arc::new(raw_client(root.leaf(WEB))));
    let (here, taken) = tokio::join!(connector.connect(name, near), there.handshake());
    taken.unwrap();
    let mut here = here.unwrap();
    for round in 0..5u8 {
        here.write_all(&[round; 1000]).await.unwrap();
        here.get_mut().1.refresh_traffic_keys().unwrap();
        here.write_all(&[round; 500]).await.unwrap();
        here.flush().await.unwrap();
        let mut got = [0; 1500];
        there.read_exact(&mut got).await.unwrap();
        assert_eq!(got, [round; 1500]);
        there.write_all(&got).await.unwrap();
        there.flush().await.unwrap();
        here.read_exact(&mut got).await.unwrap();
        assert_eq!(got, [round; 1500]);
    }
    assert!(holds_nothing(&there));
}
