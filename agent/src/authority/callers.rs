//! Who calls: a node's agent, known by a token.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use aws_lc_rs::digest::{SHA256, digest};
use tokio::sync::Semaphore;

use crate::{api_server::ApiServer, config::authority::ObjectPath};

/// The longest token that is looked at, in bytes.
const MAX_TOKEN: usize = 16 * 1024;
/// The shortest token of a file, in characters.
const MIN_TOKEN: usize = 32;
/// How long an answer of the API server holds.
const REMEMBER: Duration = Duration::from_secs(10);
/// The most answers that are remembered.
const MAX_REMEMBERED: usize = 20_000;
/// Questions to the API server at the same time: callers who are nobody must not flood it.
const MAX_REVIEWS: usize = 32;
/// The most token files.
const MAX_FILES: usize = 10_000;
/// How often the token files are looked at again.
const RELOAD: Duration = Duration::from_secs(1);

const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

/// An authenticated agent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Caller {
    /// Its node.
    pub node: Arc<str>,
    /// By what it is known, for the audit log.
    pub by: Arc<str>,
}

/// Why a caller is not known.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum AuthError {
    /// The token is nobody's; the text says no more than the caller may know.
    #[error("{0}")]
    Unknown(&'static str),
    /// Whoever would know does not answer.
    #[error("callers cannot be authenticated now: {0}")]
    Unavailable(String),
}

/// What [`CallerAuth::authenticate`] answers.
pub type Authenticated<'a> = Pin<Box<dyn Future<Output = Result<Caller, AuthError>> + Send + 'a>>;

/// Knows callers by their bearer token.
pub trait CallerAuth: Send + Sync + 'static {
    /// Whose token this is.
    fn authenticate<'a>(&'a self, token: &'a str) -> Authenticated<'a>;
}

type Digest = [u8; 32];

/// A token by its digest: nothing compares secrets byte by byte.
fn digest_of(token: &str) -> Digest {
    let mut out = [0; 32];
    out.copy_from_slice(digest(&SHA256, token.as_bytes()).as_ref());
    out
}

/// A token that is worth a question: not empty, not too long, printable.
fn plausible(token: &str) -> bool {
    (1..=MAX_TOKEN).contains(&token.len()) && token.bytes().all(|b| b.is_ascii_graphic())
}

/// Service-account tokens of agents, by TokenReview.
#[derive(Debug)]
pub struct TokenReviews {
    api: ApiServer,
    audience: String,
    accounts: Vec<ObjectPath>,
    known: Mutex<HashMap<Digest, (Instant, Caller)>>,
    reviews: Semaphore,
}

impl TokenReviews {
    /// Accepts tokens of these accounts that are bound to `audience`.
    pub fn new(api: ApiServer, audience: String, accounts: Vec<ObjectPath>) -> Self {
        let reviews = Semaphore::new(MAX_REVIEWS);
        Self { api, audience, accounts, known: Mutex::default(), reviews }
    }

    async fn review(&self, token: &str) -> Result<Caller, AuthError> {
        let down = |e: &dyn std::fmt::Display| AuthError::Unavailable(e.to_string());
        let _turn = self.reviews.acquire().await.map_err(|e| down(&e))?;
        let user =
            self.api.review_token(token, &self.audience).await.map_err(|e| down(&e))?.ok_or(
                AuthError::Unknown("the token is not valid for this authority's audience"),
            )?;
        let is_agent = user.service_account().is_some_and(|(namespace, name)| {
            self.accounts.iter().any(|a| a.namespace == namespace && a.name == name)
        });
        let (Some((namespace, _)), true) = (user.service_account(), is_agent) else {
            return Err(AuthError::Unknown("the token is not a node agent's"));
        };
        let (Some(name), Some(uid)) = (user.claim(POD_NAME), user.claim(POD_UID)) else {
            return Err(AuthError::Unknown("the token is not bound to a pod"));
        };
        // The pod itself says on which node it is: the claim of the node is younger than some
        // API servers, and a token outlives its pod until it expires.
        let pod = self.api.pod(namespace, name).await.map_err(|e| down(&e))?;
        let node = pod
            .filter(|pod| pod.metadata.uid.as_deref() == Some(uid))
            .and_then(|pod| pod.spec?.node_name)
            .ok_or(AuthError::Unknown("the token's pod is gone or not bound to a node"))?;
        Ok(Caller { node: node.into(), by: format!("pod {namespace}/{name} {uid}").into() })
    }
}

impl CallerAuth for TokenReviews {
    fn authenticate<'a>(&'a self, token: &'a str) -> Authenticated<'a> {
        Box::pin(async move {
            if !plausible(token) {
                return Err(AuthError::Unknown("the token is malformed"));
            }
            let key = digest_of(token);
            {
                let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some((at, caller)) = known.get(&key)
                    && at.elapsed() < REMEMBER
                {
                    return Ok(caller.clone());
                }
            }
            let asked = Instant::now();
            let caller = self.review(token).await?;
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            if known.len() >= MAX_REMEMBERED {
                known.retain(|_, (at, _)| at.elapsed() < REMEMBER);
            }
            if known.len() < MAX_REMEMBERED {
                known.insert(key, (asked, caller.clone()));
            }
            Ok(caller)
        })
    }
}

/// Tokens in files, one a node, for a cluster without an API server.
#[derive(Debug)]
pub struct NodeTokens {
    dir: PathBuf,
    table: Mutex<(Instant, HashMap<Digest, Caller>)>,
}

/// Why the token files cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenFileError {
    /// Directory or file cannot be read.
    #[error("nodeTokenDir: {}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("nodeTokenDir: {}: {problem}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong, and the remedy.
        problem: String,
    },
}

impl NodeTokens {
    /// Reads the directory; it is followed from then on.
    ///
    /// # Errors
    /// The first file that is wrong.
    pub fn open(dir: &Path) -> Result<Self, TokenFileError> {
        let table = Mutex::new((Instant::now(), read_tokens(dir)?));
        Ok(Self { dir: dir.to_owned(), table })
    }

    fn find(&self, token: &str) -> Result<Caller, AuthError> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        if table.0.elapsed() >= RELOAD {
            match read_tokens(&self.dir) {
                Ok(tokens) => *table = (Instant::now(), tokens),
                Err(error) => {
                    tracing::error!(%error, "node tokens not reloaded; those in force stay");
                    table.0 = Instant::now();
                }
            }
        }
        let known = table.1.get(&digest_of(token));
        known.cloned().ok_or(AuthError::Unknown("the token is no node's"))
    }
}

impl CallerAuth for NodeTokens {
    fn authenticate<'a>(&'a self, token: &'a str) -> Authenticated<'a> {
        Box::pin(async move {
            if !plausible(token) {
                return Err(AuthError::Unknown("the token is malformed"));
            }
            self.find(token)
        })
    }
}

fn read_tokens(dir: &Path) -> Result<HashMap<Digest, Caller>, TokenFileError> {
    let io = |path: &Path, source| TokenFileError::Io { path: path.to_owned(), source };
    let mut tokens: HashMap<Digest, Caller> = HashMap::new();
    for entry in fs::read_dir(dir).map_err(|e| io(dir, e))? {
        let path = entry.map_err(|e| io(dir, e))?.path();
        let wrong = |problem: String| TokenFileError::File { path: path.clone(), problem };
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_owned();
        if name.is_empty() || name.starts_with('.') {
            continue;
        }
        let metadata = fs::metadata(&path).map_err(|e| io(&path, e))?;
        if metadata.mode() & 0o077 != 0 {
            let mode = metadata.mode() & 0o7777;
            return Err(wrong(format!("mode {mode:04o} lets others read it; run: chmod 0600")));
        }
        if !metadata.is_file() || metadata.len() > MAX_TOKEN as u64 {
            return Err(wrong("is not a file of one token; remove it".into()));
        }
        let text = fs::read_to_string(&path).map_err(|e| io(&path, e))?;
        let token = text.trim();
        if token.len() < MIN_TOKEN || !plausible(token) {
            return Err(wrong(format!(
                "holds {} characters; a token has at least {MIN_TOKEN}, printable and in one line",
                token.len()
            )));
        }
        let by = format!("node token {name}").into();
        let caller = Caller { node: name.as_str().into(), by };
        if let Some(other) = tokens.insert(digest_of(token), caller) {
            return Err(wrong(format!("holds the token of node {} too", other.node)));
        }
        if tokens.len() > MAX_FILES {
            return Err(wrong(format!("is one of more than {MAX_FILES} files")));
        }
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn write(dir: &Path, name: &str, text: &str, mode: u32) {
        let path = dir.join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[tokio::test]
    async fn a_nodes_token_is_that_nodes_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = ("a".repeat(40), "b".repeat(40));
        write(dir.path(), "node-a", &format!("{a}\n"), 0o600);
        write(dir.path(), "node-b", &b, 0o400);
        let tokens = NodeTokens::open(dir.path()).unwrap();
        assert_eq!(&*tokens.authenticate(&a).await.unwrap().node, "node-a");
        assert_eq!(&*tokens.authenticate(&b).await.unwrap().node, "node-b");
        let long = "a".repeat(MAX_TOKEN + 1);
        for wrong in ["", "node-a", &a[1..], "ä", &long] {
            let error = tokens.authenticate(wrong).await.unwrap_err();
            assert!(matches!(error, AuthError::Unknown(_)), "{wrong}");
        }
        // A token that is taken away is worth nothing a moment later.
        fs::remove_file(dir.path().join("node-a")).unwrap();
        tokio::time::sleep(RELOAD).await;
        assert!(tokens.authenticate(&a).await.is_err());
        assert!(tokens.authenticate(&b).await.is_ok());
    }

    #[test]
    fn files_that_are_no_tokens() {
        let token = "t".repeat(40);
        for (text, mode, says) in [
            (token.as_str(), 0o644, "chmod 0600"),
            ("short", 0o600, "at least 32"),
            (&format!("{token} {token}"), 0o600, "printable"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            write(dir.path(), "node", text, mode);
            let error = NodeTokens::open(dir.path()).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains("node"), "{error}");
            write(dir.path(), "node", &token, 0o600);
            assert!(NodeTokens::open(dir.path()).is_ok());
            write(dir.path(), "other", &token, 0o600);
            let error = NodeTokens::open(dir.path()).unwrap_err().to_string();
            assert!(error.contains("the token of node"), "{error}");
        }
    }
}
