//! TLS configurations, one per identity and SVID, made once and shared.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::{
    config::values::TunnelWire,
    spiffe::{SpiffeId, Svid},
    trust::Trust,
    tunnel::tls::{ClientTls, ServerTls, TlsError},
};

/// The configurations by identity.
pub struct Certificates {
    /// A handshake must be through by then.
    timeout: Duration,
    /// What tunnels may carry.
    wires: TunnelWire,
    clients: Mutex<HashMap<SpiffeId, (Arc<Svid>, Arc<ClientTls>)>>,
    servers: Mutex<HashMap<SpiffeId, (Arc<Svid>, Arc<ServerTls>)>>,
}

impl Certificates {
    /// Nothing made yet.
    pub fn new(timeout: Duration, wires: TunnelWire) -> Self {
        Self { timeout, wires, clients: Mutex::default(), servers: Mutex::default() }
    }

    /// The configuration to dial with.
    pub fn client(&self, svid: &Arc<Svid>, trust: &Arc<Trust>) -> Result<Arc<ClientTls>, TlsError> {
        cached(&self.clients, svid, || {
            Ok(ClientTls::new(svid, trust.clone())?
                .with_timeout(self.timeout)
                .with_wires(self.wires))
        })
    }

    /// The configuration to accept with.
    pub fn server(&self, svid: &Arc<Svid>, trust: &Arc<Trust>) -> Result<Arc<ServerTls>, TlsError> {
        cached(&self.servers, svid, || {
            Ok(ServerTls::new(svid, trust.clone())?
                .with_timeout(self.timeout)
                .with_wires(self.wires))
        })
    }

    /// Forgets configurations whose SVID is not the current one: keys of identities that
    /// have left the node do not stay in memory.
    pub fn sweep(&self, current: impl Fn(&SpiffeId) -> Option<Arc<Svid>>) {
        let is_current = |id: &SpiffeId, svid: &Arc<Svid>| {
            current(id).is_some_and(|now| Arc::ptr_eq(&now, svid))
        };
        lock(&self.clients).retain(|id, (svid, _)| is_current(id, svid));
        lock(&self.servers).retain(|id, (svid, _)| is_current(id, svid));
    }
}

fn cached<T>(
    map: &Mutex<HashMap<SpiffeId, (Arc<Svid>, Arc<T>)>>,
    svid: &Arc<Svid>,
    make: impl FnOnce() -> Result<T, TlsError>,
) -> Result<Arc<T>, TlsError> {
    let mut map = lock(map);
    if let Some((of, tls)) = map.get(&svid.id)
        && Arc::ptr_eq(of, svid)
    {
        return Ok(tls.clone());
    }
    let tls = Arc::new(make()?);
    map.insert(svid.id.clone(), (svid.clone(), tls.clone()));
    Ok(tls)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A row is replaced whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
