//! Where the trust bundle is published for agents to pin: a file, a ConfigMap.

use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Mutex,
};

use crate::{
    api_server::{ApiServer, Written},
    config::authority::ObjectPath,
    spiffe::Bundle,
};

/// The ConfigMap's key, as Istio names it too.
pub const KEY: &str = "root-cert.pem";

/// The places.
#[derive(Debug)]
pub struct BundleOutput {
    file: Option<PathBuf>,
    config_map: Option<(ApiServer, ObjectPath)>,
    /// What was written last, to both.
    written: Mutex<String>,
}

impl BundleOutput {
    /// Writes to these.
    pub fn new(file: Option<PathBuf>, config_map: Option<(ApiServer, ObjectPath)>) -> Self {
        Self { file, config_map, written: Mutex::default() }
    }

    /// Writes the bundle where it is not yet. A failure is logged; the next turn tries again.
    pub async fn write(&self, bundle: &Bundle) {
        let pem = to_pem(bundle);
        let is_there = |written: &Mutex<String>| {
            *written.lock().unwrap_or_else(std::sync::PoisonError::into_inner) == pem
        };
        if is_there(&self.written) {
            return;
        }
        let mut done = true;
        if let Some(path) = &self.file
            && let Err(error) = write_file(path, &pem)
        {
            tracing::error!(path = %path.display(), %error, "bundleFile cannot be written");
            done = false;
        }
        if let Some((api, name)) = &self.config_map {
            match api.write_config_map(&name.namespace, &name.name, KEY, &pem).await {
                Ok(Written::Done(_)) => {}
                Ok(Written::Conflict) => done = false,
                Err(error) => {
                    tracing::error!(config_map = %name, %error, "bundleConfigMap cannot be written");
                    done = false;
                }
            }
        }
        if done {
            *self.written.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = pem;
        }
    }
}

/// The roots as PEM, one block each.
pub fn to_pem(bundle: &Bundle) -> String {
    bundle
        .certificates()
        .map(|der| pem::encode(&pem::Pem::new("CERTIFICATE", der.to_vec())))
        .collect()
}

/// A file that appears whole, for everybody to read.
fn write_file(path: &Path, text: &str) -> std::io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let mut beside = tempfile::Builder::new()
        .prefix(".bundle.")
        .permissions(fs::Permissions::from_mode(0o644))
        .tempfile_in(dir)?;
    beside.write_all(text.as_bytes())?;
    beside.as_file().sync_all()?;
    beside.persist(path).map_err(|e| e.error)?;
    Ok(())
}
