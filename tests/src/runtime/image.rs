//! A scratch image of the lab's own: the helper and the libraries that it asks for, as an OCI
//! archive. It is every container's image, and the sandbox's too.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::process::worker_binary;

/// What it is called in the runtime.
pub const NAME: &str = "localhost/signet-lab:v0";
/// Where the helper is in it.
pub const WORKER: &str = "/signet-lab-worker";

/// Writes the archive.
pub fn write(archive: &Path) -> Result<()> {
    let layer = layer(&worker_binary()?)?;
    let config = json!({
        "architecture": architecture(), "os": "linux",
        // A sandbox is started by this alone; containers say what they run.
        "config": {"Entrypoint": [WORKER, "pause"], "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [digest(&layer)]},
    })
    .to_string()
    .into_bytes();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", &layer)],
    })
    .to_string()
    .into_bytes();
    let mut listed = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
    listed["annotations"] = json!({"io.containerd.image.name": NAME});
    let index = json!({"schemaVersion": 2, "manifests": [listed]}).to_string().into_bytes();

    let file = fs::File::create(archive).with_context(|| archive.display().to_string())?;
    let mut tar = tar::Builder::new(std::io::BufWriter::new(file));
    append(&mut tar, "oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    append(&mut tar, "index.json", 0o644, &index)?;
    for blob in [&config, &manifest, &layer] {
        let name = digest(blob).replace(':', "/");
        append(&mut tar, &format!("blobs/{name}"), 0o644, blob)?;
    }
    tar.into_inner().context("the archive")?;
    Ok(())
}

/// The image's one layer: the helper at its root, its libraries where the linker looks for them.
fn layer(worker: &Path) -> Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut files = vec![(PathBuf::from(WORKER), worker.to_owned())];
    files.extend(libraries(worker)?.into_iter().map(|path| (path.clone(), path)));
    let directories: BTreeSet<PathBuf> = files
        .iter()
        .flat_map(|(inside, _)| inside.ancestors().skip(1))
        .filter(|directory| *directory != Path::new("/"))
        .map(Path::to_owned)
        .collect();
    for directory in directories {
        let mut header = header(tar::EntryType::Directory, 0o755, 0);
        tar.append_data(&mut header, below_root(&directory)?, std::io::empty())?;
    }
    for (inside, source) in files {
        // Through symbolic links: the name that is asked for is the one that counts.
        let bytes = fs::read(&source).with_context(|| source.display().to_string())?;
        append(&mut tar, &below_root(&inside)?.display().to_string(), 0o755, &bytes)?;
    }
    tar.into_inner().context("the layer")
}

/// The dynamic linker and the shared libraries, as the host's own linker finds them.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("cannot run `ldd`")?;
    ensure!(output.status.success(), "ldd {}: {output:?}", program.display());
    // `name => /path (0x…)`, or `/path (0x…)` for the linker itself.
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect())
}

fn append(
    tar: &mut tar::Builder<impl std::io::Write>,
    name: &str,
    mode: u32,
    bytes: &[u8],
) -> Result<()> {
    let mut header = header(tar::EntryType::Regular, mode, bytes.len() as u64);
    tar.append_data(&mut header, name, bytes).with_context(|| name.to_owned())
}

fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}

fn below_root(path: &Path) -> Result<&Path> {
    path.strip_prefix("/").with_context(|| format!("{} is not absolute", path.display()))
}

fn descriptor(kind: &str, bytes: &[u8]) -> Value {
    json!({"mediaType": kind, "digest": digest(bytes), "size": bytes.len()})
}

fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// As Go calls it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
