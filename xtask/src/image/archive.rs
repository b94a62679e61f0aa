//! The OCI image layout (image-spec 1.1) in a tar, written and read back.

use std::{
    collections::{BTreeMap, HashMap},
    io::{Read as _, Write as _},
    str::FromStr as _,
};

use anyhow::{Context as _, bail, ensure};
use flate2::{Compression, GzBuilder, read::GzDecoder};
use oci_spec::image::{
    Arch, ConfigBuilder, Descriptor, DescriptorBuilder, Digest, ImageConfiguration,
    ImageConfigurationBuilder, ImageIndex, ImageIndexBuilder, ImageManifest, ImageManifestBuilder,
    MediaType, OciLayoutBuilder, Os, RootFsBuilder, SCHEMA_VERSION,
};
use serde::Serialize;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::root::{Entry, Root};

/// Where blobs are.
const BLOBS: &str = "blobs/sha256/";

/// An image: the files of its layout.
pub struct Image {
    files: BTreeMap<String, Vec<u8>>,
    time: u64,
}

/// An image that was read back and found in order.
pub struct Validated {
    /// The manifest's digest.
    pub digest: String,
    /// The layer, not compressed.
    pub layer: Vec<u8>,
}

impl Image {
    /// The image over a root directory; every file has the given time.
    pub fn new(root: &Root, name: &str, time: u64) -> anyhow::Result<Self> {
        let mut image = Self { files: BTreeMap::new(), time };
        let layer = layer(root, time)?;
        let diff_id = digest(&layer);
        // No name and no time in the header; one level, so that the same bytes come out.
        let mut gzip = GzBuilder::new().mtime(0).write(Vec::new(), Compression::new(6));
        gzip.write_all(&layer)?;
        let layer = image.blob(MediaType::ImageLayerGzip, gzip.finish()?)?;
        let config = ImageConfigurationBuilder::default()
            .architecture(Arch::Amd64)
            .os(Os::Linux)
            .config(
                ConfigBuilder::default()
                    .entrypoint(vec!["/usr/bin/signet".to_owned()])
                    .env(vec!["PATH=/usr/bin".to_owned()])
                    .build()?,
            )
            .rootfs(RootFsBuilder::default().typ("layers").diff_ids(vec![diff_id]).build()?)
            .build()?;
        let config = image.blob(MediaType::ImageConfig, json(&config)?)?;
        let manifest = ImageManifestBuilder::default()
            .schema_version(SCHEMA_VERSION)
            .media_type(MediaType::ImageManifest)
            .config(config)
            .layers(vec![layer])
            .build()?;
        let mut manifest = image.blob(MediaType::ImageManifest, json(&manifest)?)?;
        // What containerd and others call it once it is imported.
        let tag = name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
        manifest.set_annotations(Some(HashMap::from([
            ("io.containerd.image.name".to_owned(), name.to_owned()),
            ("org.opencontainers.image.ref.name".to_owned(), tag.to_owned()),
        ])));
        let index = ImageIndexBuilder::default()
            .schema_version(SCHEMA_VERSION)
            .media_type(MediaType::ImageIndex)
            .manifests(vec![manifest])
            .build()?;
        image.files.insert("index.json".into(), json(&index)?);
        let layout = OciLayoutBuilder::default().image_layout_version("1.0.0").build()?;
        image.files.insert("oci-layout".into(), json(&layout)?);
        Ok(image)
    }

    fn blob(&mut self, kind: MediaType, bytes: Vec<u8>) -> anyhow::Result<Descriptor> {
        let digest = digest(&bytes);
        let descriptor = DescriptorBuilder::default()
            .media_type(kind)
            .size(bytes.len() as u64)
            .digest(Digest::from_str(&digest)?)
            .build()?;
        self.files.insert(format!("{BLOBS}{}", digest.trim_start_matches("sha256:")), bytes);
        Ok(descriptor)
    }

    /// The archive.
    pub fn archive(&self) -> anyhow::Result<Vec<u8>> {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, bytes) in &self.files {
            let mut header = header(tar::EntryType::Regular, 0o644, self.time);
            header.set_size(bytes.len() as u64);
            tar.append_data(&mut header, name, bytes.as_slice())?;
        }
        Ok(tar.into_inner()?)
    }
}

/// Reads an archive and holds every digest and size in it against its content.
pub fn validate(archive: &[u8]) -> anyhow::Result<Validated> {
    let mut files = BTreeMap::new();
    for entry in tar::Archive::new(archive).entries()? {
        let mut entry = entry?;
        let name = entry.path()?.display().to_string();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes)?;
        files.insert(name, bytes);
    }
    let file = |name: &str| files.get(name).with_context(|| format!("{name} is missing"));
    let layout: Value = serde_json::from_slice(file("oci-layout")?)?;
    ensure!(layout["imageLayoutVersion"] == "1.0.0", "oci-layout: {layout}");
    let blob = |descriptor: &Descriptor| -> anyhow::Result<&Vec<u8>> {
        let wanted = descriptor.digest().to_string();
        let bytes = file(&format!("{BLOBS}{}", wanted.trim_start_matches("sha256:")))?;
        ensure!(digest(bytes) == wanted, "{wanted}: its content is {}", digest(bytes));
        ensure!(bytes.len() as u64 == descriptor.size(), "{wanted}: not of its size");
        Ok(bytes)
    };
    let index: ImageIndex = serde_json::from_slice(file("index.json")?)?;
    let [manifest] = index.manifests().as_slice() else { bail!("index.json: not one manifest") };
    let digest_of_manifest = manifest.digest().to_string();
    let manifest: ImageManifest = serde_json::from_slice(blob(manifest)?)?;
    let config: ImageConfiguration = serde_json::from_slice(blob(manifest.config())?)?;
    let [layer] = manifest.layers().as_slice() else { bail!("not one layer") };
    let mut content = Vec::new();
    GzDecoder::new(blob(layer)?.as_slice()).read_to_end(&mut content)?;
    let wanted = config.rootfs().diff_ids();
    ensure!(
        *wanted == [digest(&content)],
        "diff_ids {wanted:?}, the layer is {}",
        digest(&content)
    );
    Ok(Validated { digest: digest_of_manifest, layer: content })
}

fn layer(root: &Root, time: u64) -> anyhow::Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, entry) in root {
        match entry {
            Entry::Directory => {
                let mut header = header(tar::EntryType::Directory, 0o755, time);
                tar.append_data(&mut header, format!("{path}/"), std::io::empty())?;
            }
            Entry::Program(bytes) => {
                let mut header = header(tar::EntryType::Regular, 0o755, time);
                header.set_size(bytes.len() as u64);
                tar.append_data(&mut header, path, bytes.as_slice())?;
            }
            Entry::Link(target) => {
                let mut header = header(tar::EntryType::Symlink, 0o777, time);
                tar.append_link(&mut header, path, target)?;
            }
        }
    }
    Ok(tar.into_inner()?)
}

/// Root's, of the given time, whatever machine and umask it is made with.
fn header(kind: tar::EntryType, mode: u32, time: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_mtime(time);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(0);
    header
}

/// JSON with sorted keys: the specification's types keep annotations in no order.
fn json(value: &impl Serialize) -> anyhow::Result<Vec<u8>> {
    fn sorted(value: Value) -> Value {
        match value {
            Value::Object(fields) => {
                let fields: BTreeMap<String, Value> =
                    fields.into_iter().map(|(name, value)| (name, sorted(value))).collect();
                Value::Object(fields.into_iter().collect())
            }
            Value::Array(values) => Value::Array(values.into_iter().map(sorted).collect()),
            other => other,
        }
    }
    Ok(serde_json::to_vec(&sorted(serde_json::to_value(value)?))?)
}

fn digest(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}
