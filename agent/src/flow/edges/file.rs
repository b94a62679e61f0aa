//! The history on disk: one JSON object a line, the first says what it is.
//!
//! Written whole beside its place and renamed. A file that is damaged is set aside, told about,
//! and a new history begins: nobody's traffic depends on it.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, Read, Write},
    net::IpAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::{Edge, Edges, End, MOST_IN_ALL, Seen, network_of};
use crate::{
    flow::{Reporter, Via},
    spiffe::SpiffeId,
    telemetry::{names, reason},
};

/// The file's name in the state directory.
const FILE: &str = "edges.ndjson";
/// Beside it, what was damaged; an earlier one is replaced.
const DAMAGED: &str = "edges.ndjson.damaged";
/// What the first line says.
const SCHEMA: &str = "signet.dev/edges/v1";
/// The largest file that is read, in bytes.
const MAX_LEN: u64 = 32 * 1024 * 1024;
/// The longest line, in bytes: two SPIFFE IDs fit.
const MAX_LINE: usize = 8 * 1024;
/// The longest name of a namespace or an account (RFC 1123).
const MAX_NAME: usize = 253;
/// How often the file is written when something has changed.
const EVERY: Duration = Duration::from_secs(60);

/// Why the history is not on disk.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EdgesFileError {
    /// The file system refused.
    #[error("{}: cannot {action} ({source}); the history of flows is kept in memory only", path.display())]
    Io {
        /// File or directory.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// It is no history.
    #[error("line {line}: {problem}")]
    Malformed {
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
}

/// The file of a state directory.
#[derive(Clone, Debug)]
pub struct EdgesFile {
    directory: PathBuf,
}

impl EdgesFile {
    /// That of this directory, which is made when it is written first.
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// What it holds; nothing when there is none. What is damaged is set aside, with a warning.
    ///
    /// # Errors
    /// When it cannot be read, or not be set aside.
    pub fn load(&self, now: Timestamp) -> Result<Edges, EdgesFileError> {
        let path = self.directory.join(FILE);
        let failed = |action, source| EdgesFileError::Io { path: path.clone(), action, source };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Edges::default()),
            Err(e) => return Err(failed("open", e)),
        };
        let mut content = Vec::new();
        file.take(MAX_LEN + 1).read_to_end(&mut content).map_err(|e| failed("read", e))?;
        match parse(&content) {
            Ok(edges) => Ok(Edges::new(edges, now)),
            Err(error) => {
                let aside = self.directory.join(DAMAGED);
                fs::rename(&path, &aside).map_err(|e| failed("set aside", e))?;
                tracing::warn!(path = %path.display(), aside = %aside.display(), %error, "the history of flows is damaged: a new one begins");
                Ok(Edges::default())
            }
        }
    }

    /// Replaces it.
    ///
    /// # Errors
    /// When the file system refuses; the old one is whole then.
    pub fn save(&self, edges: &Edges) -> Result<(), EdgesFileError> {
        let all = edges.select(|_, _| true);
        let path = self.directory.join(FILE);
        let replace = || -> io::Result<()> {
            fs::create_dir_all(&self.directory)?;
            let mut beside = tempfile::Builder::new()
                .prefix(".edges.ndjson.")
                .permissions(fs::Permissions::from_mode(0o600))
                .tempfile_in(&self.directory)?;
            beside.write_all(&write(&all)?)?;
            beside.as_file().sync_all()?;
            beside.persist(&path).map_err(|e| e.error)?;
            File::open(&self.directory)?.sync_all()
        };
        replace().map_err(|source| EdgesFileError::Io {
            path: path.clone(),
            action: "write",
            source,
        })
    }
}

/// Keeps the file in step with the history until `stop`, and once more then.
pub async fn keep(edges: Edges, file: EdgesFile, stop: CancellationToken) {
    let (mut saved, mut said) = (edges.generation(), None);
    loop {
        let ending = tokio::select! {
            () = stop.cancelled() => true,
            () = tokio::time::sleep(EVERY) => false,
        };
        edges.expire(Timestamp::now());
        let generation = edges.generation();
        if generation != saved {
            let (edges, file) = (edges.clone(), file.clone());
            let written = tokio::task::spawn_blocking(move || file.save(&edges)).await;
            let error = match written {
                Ok(Ok(())) => {
                    saved = generation;
                    None
                }
                Ok(Err(error)) => Some(error.to_string()),
                Err(error) => Some(error.to_string()),
            };
            if error != said {
                if let Some(error) = &error {
                    tracing::error!(error, "the history of flows is not written");
                }
                said = error;
            }
        }
        if ending {
            return;
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    schema: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    reporter: String,
    source: LineEnd,
    destination: LineEnd,
    port: u16,
    protocol: u8,
    via: String,
    verdict: String,
    reason: String,
    count: u64,
    first: Timestamp,
    last: Timestamp,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
enum LineEnd {
    Workload { namespace: String, account: String },
    Identity(String),
    Network(IpNet),
    Others,
}

/// The document; the lines are in no order.
///
/// # Errors
/// None that input could cause: JSON of text and numbers.
pub fn write(edges: &[(Edge, Seen)]) -> Result<Vec<u8>, serde_json::Error> {
    let mut out = serde_json::to_vec(&Head { schema: SCHEMA.into() })?;
    out.push(b'\n');
    for (edge, seen) in edges {
        let line = Line {
            reporter: edge.reporter.name().into(),
            source: write_end(&edge.source),
            destination: write_end(&edge.destination),
            port: edge.port,
            protocol: edge.protocol,
            via: edge.via.name().into(),
            verdict: names::verdict(edge.verdict).into(),
            reason: reason::name(edge.reason).into(),
            count: seen.count,
            first: seen.first,
            last: seen.last,
        };
        serde_json::to_writer(&mut out, &line)?;
        out.push(b'\n');
    }
    Ok(out)
}

fn write_end(end: &End) -> LineEnd {
    match end {
        End::Workload { namespace, account } => {
            LineEnd::Workload { namespace: (**namespace).into(), account: (**account).into() }
        }
        End::Identity(id) => LineEnd::Identity(id.to_string()),
        End::Network(network) => LineEnd::Network(*network),
        End::Others => LineEnd::Others,
    }
}

/// Reads a document, strictly.
///
/// # Errors
/// The first line that is not what [`write`] writes.
pub fn parse(document: &[u8]) -> Result<Vec<(Edge, Seen)>, EdgesFileError> {
    let malformed = |line, problem: String| EdgesFileError::Malformed { line, problem };
    if document.len() as u64 > MAX_LEN {
        return Err(malformed(1, format!("more than {MAX_LEN} bytes")));
    }
    let text = std::str::from_utf8(document).map_err(|e| malformed(1, e.to_string()))?;
    let Some(text) = text.strip_suffix('\n') else {
        return Err(malformed(text.lines().count().max(1), "the end is missing".into()));
    };
    let mut lines = text.split('\n').zip(1..);
    let head = lines.next().map(|(line, _)| line).unwrap_or_default();
    let head: Head = serde_json::from_str(head).map_err(|e| malformed(1, e.to_string()))?;
    if head.schema != SCHEMA {
        return Err(malformed(1, "another schema than signet.dev/edges/v1".into()));
    }
    let (mut edges, mut keys) = (Vec::new(), HashSet::new());
    for (line, number) in lines {
        if line.len() > MAX_LINE || edges.len() >= MOST_IN_ALL {
            return Err(malformed(number, "too long a line, or too many".into()));
        }
        let line: Line =
            serde_json::from_str(line).map_err(|e| malformed(number, e.to_string()))?;
        let (edge, seen) = read_line(line)
            .map_err(|what| malformed(number, format!("{what} is not what it should be")))?;
        if !keys.insert(edge.clone()) {
            return Err(malformed(number, "an edge that was there before".into()));
        }
        edges.push((edge, seen));
    }
    Ok(edges)
}

/// The edge of a line; the error is the field that is wrong.
fn read_line(line: Line) -> Result<(Edge, Seen), &'static str> {
    let edge = Edge {
        reporter: Reporter::parse(&line.reporter).ok_or("reporter")?,
        source: read_end(line.source).ok_or("source")?,
        destination: read_end(line.destination).ok_or("destination")?,
        port: line.port,
        protocol: line.protocol,
        via: Via::parse(&line.via).ok_or("via")?,
        verdict: names::parse_verdict(&line.verdict)
            .filter(|verdict| names::verdict(*verdict) == line.verdict)
            .ok_or("verdict")?,
        reason: reason::parse(&line.reason).ok_or("reason")?,
    };
    if line.count == 0 {
        return Err("count");
    }
    if line.first > line.last {
        return Err("first");
    }
    Ok((edge, Seen { count: line.count, first: line.first, last: line.last }))
}

fn read_end(end: LineEnd) -> Option<End> {
    let name = |text: String| -> Option<Arc<str>> {
        let fine = (1..=MAX_NAME).contains(&text.len())
            && text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.'));
        fine.then(|| text.into())
    };
    Some(match end {
        LineEnd::Workload { namespace, account } => {
            End::Workload { namespace: name(namespace)?, account: name(account)? }
        }
        LineEnd::Identity(text) => {
            End::Identity(SpiffeId::parse(&text).ok().filter(|id| id.as_str() == text)?)
        }
        LineEnd::Network(network) => {
            let ip: IpAddr = network.addr();
            End::Network(Some(network).filter(|network| *network == network_of(ip))?)
        }
        LineEnd::Others => End::Others,
    })
}
