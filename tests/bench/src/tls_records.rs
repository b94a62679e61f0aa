//! rustls alone: its buffered and its unbuffered interface over the same bytes, in memory.
//!
//! One thread seals a batch and opens it again; no socket, no task. Both subjects are given the
//! same advantage: large buffers that are used again.

use std::{
    io::{Cursor, Read as _, Write as _},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rcgen::{CertificateParams, KeyPair};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection,
    client::UnbufferedClientConnection,
    pki_types::{PrivateKeyDer, ServerName},
    server::UnbufferedServerConnection,
    unbuffered::{ConnectionState, UnbufferedStatus},
};

use crate::results::Results;

/// Bytes of a batch, as the tunnel seals them: fifteen records.
const BULK: usize = 15 * (16 << 10);
/// Bytes of a small message.
const SMALL: usize = 100;
/// Room for a batch once it is sealed.
const SEALED: usize = 256 << 10;

/// Carries bytes from one end to the other.
type Carry<'a> = &'a mut dyn FnMut(&[u8]) -> Result<()>;

/// Measures both interfaces, in turns.
pub fn run(quick: bool, results: &mut Results) -> Result<()> {
    let (rounds, time) =
        if quick { (1, Duration::from_millis(50)) } else { (3, Duration::from_secs(1)) };
    let (client, server) = configs()?;
    for round in 1..=rounds {
        for (size, case) in [(BULK, "tls-bulk"), (SMALL, "tls-small")] {
            let mut buffered = Buffered::new(&client, &server)?;
            let mut unbuffered = Unbuffered::new(&client, &server)?;
            let data = vec![0x5a; size];
            let subjects: [(&'static str, Carry<'_>); 2] = [
                ("buffered", &mut |data| buffered.carry(data)),
                ("unbuffered", &mut |data| unbuffered.carry(data)),
            ];
            for (subject, carry) in subjects {
                let (begin, mut batches) = (Instant::now(), 0u64);
                while begin.elapsed() < time {
                    carry(&data)?;
                    batches += 1;
                }
                let seconds = begin.elapsed().as_secs_f64();
                let (value, unit) = if size == BULK {
                    (batches as f64 * size as f64 / 1e9 / seconds, "GB/s")
                } else {
                    (batches as f64 / seconds, "1/s")
                };
                results.add(case, subject, round, value, unit);
            }
        }
    }
    Ok(())
}

fn configs() -> Result<(Arc<ClientConfig>, Arc<ServerConfig>)> {
    let key = KeyPair::generate()?;
    let certificate = CertificateParams::new(vec!["server.example".into()])?.self_signed(&key)?;
    let mut roots = RootCertStore::empty();
    roots.add(certificate.der().clone())?;
    let versions = &[&rustls::version::TLS13];
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let client = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(versions)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)?;
    server.send_tls13_tickets = 0;
    Ok((Arc::new(client), Arc::new(server)))
}

fn name() -> Result<ServerName<'static>> {
    "server.example".try_into().context("a name")
}

/// As an application uses it: `write_all`, `write_tls`, `read_tls`, `read`.
struct Buffered {
    client: ClientConnection,
    server: ServerConnection,
    wire: Vec<u8>,
    out: Vec<u8>,
}

impl Buffered {
    fn new(client: &Arc<ClientConfig>, server: &Arc<ServerConfig>) -> Result<Self> {
        let mut client = ClientConnection::new(client.clone(), name()?)?;
        let mut server = ServerConnection::new(server.clone())?;
        client.set_buffer_limit(Some(SEALED));
        while client.is_handshaking() || server.is_handshaking() {
            let mut wire = Vec::new();
            client.write_tls(&mut wire)?;
            take(&mut Cursor::new(&wire), |from| {
                server.read_tls(from)?;
                Ok(server.process_new_packets().map(drop)?)
            })?;
            wire.clear();
            while server.wants_write() {
                server.write_tls(&mut wire)?;
            }
            take(&mut Cursor::new(&wire), |from| {
                client.read_tls(from)?;
                Ok(client.process_new_packets().map(drop)?)
            })?;
        }
        Ok(Self { client, server, wire: Vec::with_capacity(SEALED), out: vec![0; SEALED] })
    }

    fn carry(&mut self, data: &[u8]) -> Result<()> {
        self.client.writer().write_all(data)?;
        self.wire.clear();
        while self.client.wants_write() {
            self.client.write_tls(&mut self.wire)?;
        }
        let mut got = 0;
        let (server, out) = (&mut self.server, &mut self.out);
        take(&mut Cursor::new(&self.wire), |from| {
            server.read_tls(from)?;
            let state = server.process_new_packets()?;
            if state.plaintext_bytes_to_read() > 0 {
                got += server.reader().read(&mut out[got..])?;
            }
            Ok(())
        })?;
        ensure!(got == data.len(), "{got} of {} bytes", data.len());
        Ok(())
    }
}

/// Reads until nothing is left.
fn take(
    from: &mut Cursor<&Vec<u8>>,
    mut step: impl FnMut(&mut Cursor<&Vec<u8>>) -> Result<()>,
) -> Result<()> {
    while (from.position() as usize) < from.get_ref().len() {
        step(from)?;
    }
    Ok(())
}

/// One side's turn of a handshake, until it waits for the other.
macro_rules! shake {
    ($side:expr, $from:expr, $to:expr) => {
        loop {
            let UnbufferedStatus { discard, state } = $side.process_tls_records(&mut $from);
            let waits = match state? {
                ConnectionState::EncodeTlsData(mut data) => {
                    let mut room = vec![0; SEALED];
                    let n = data.encode(&mut room).map_err(|e| anyhow::anyhow!("{e}"))?;
                    $to.extend_from_slice(&room[..n]);
                    false
                }
                ConnectionState::TransmitTlsData(data) => {
                    data.done();
                    false
                }
                ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_) => true,
                state => bail!("{state:?}"),
            };
            $from.drain(..discard);
            if waits {
                break;
            }
        }
    };
}

/// As `tunnel/session.rs` uses it: records are sealed into one buffer and opened in place.
struct Unbuffered {
    client: UnbufferedClientConnection,
    server: UnbufferedServerConnection,
    wire: Vec<u8>,
    out: Vec<u8>,
}

impl Unbuffered {
    fn new(client: &Arc<ClientConfig>, server: &Arc<ServerConfig>) -> Result<Self> {
        let mut this = Self {
            client: UnbufferedClientConnection::new(client.clone(), name()?)?,
            server: UnbufferedServerConnection::new(server.clone())?,
            wire: vec![0; SEALED],
            out: vec![0; SEALED],
        };
        let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
        while this.client.is_handshaking() || this.server.is_handshaking() {
            shake!(this.client, to_client, to_server);
            shake!(this.server, to_server, to_client);
        }
        Ok(this)
    }

    fn carry(&mut self, data: &[u8]) -> Result<()> {
        let sealed = match self.client.process_tls_records(&mut []).state? {
            ConnectionState::WriteTraffic(mut traffic) => {
                traffic.encrypt(data, &mut self.wire).map_err(|e| anyhow::anyhow!("{e}"))?
            }
            state => bail!("{state:?}"),
        };
        let (mut at, mut got) = (0, 0);
        while at < sealed {
            let UnbufferedStatus { discard, state } =
                self.server.process_tls_records(&mut self.wire[at..sealed]);
            match state? {
                ConnectionState::ReadTraffic(mut records) => {
                    while let Some(record) = records.next_record() {
                        let payload = record?.payload;
                        self.out[got..got + payload.len()].copy_from_slice(payload);
                        got += payload.len();
                    }
                }
                ConnectionState::WriteTraffic(_) => {}
                state => bail!("{state:?}"),
            }
            at += discard;
        }
        ensure!(got == data.len(), "{got} of {} bytes", data.len());
        Ok(())
    }
}
