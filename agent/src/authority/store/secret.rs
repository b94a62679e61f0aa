//! The document in a Kubernetes Secret, replaced by its `resourceVersion`.

use super::{Answer, RootStore, Stored, Version};
use crate::{
    api_server::{ApiServer, Written},
    config::authority::ObjectPath,
};

/// The Secret's key.
pub const KEY: &str = "authority.json";

/// A Secret.
#[derive(Clone, Debug)]
pub struct SecretStore {
    api: ApiServer,
    name: ObjectPath,
}

impl SecretStore {
    /// The Secret of this name.
    pub fn new(api: ApiServer, name: ObjectPath) -> Self {
        Self { api, name }
    }
}

impl RootStore for SecretStore {
    fn read(&self) -> Answer<'_, Stored> {
        Box::pin(async move {
            let found = self.api.secret(&self.name.namespace, &self.name.name, KEY).await?;
            Ok(Stored { document: found.value, version: found.version.map(Version) })
        })
    }

    fn replace<'a>(
        &'a self,
        document: &'a [u8],
        version: Option<&'a Version>,
    ) -> Answer<'a, Option<Version>> {
        Box::pin(async move {
            let version = version.map(|v| v.0.as_str());
            let (namespace, name) = (&self.name.namespace, &self.name.name);
            match self.api.write_secret(namespace, name, KEY, document, version).await? {
                Written::Done(version) => Ok(Some(Version(version))),
                Written::Conflict => Ok(None),
            }
        })
    }

    fn place(&self) -> String {
        format!("secret {}", self.name)
    }
}
