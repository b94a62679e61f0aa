//! `signet policy validate FILE…`.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{OfflineArgs, unreadable};
use crate::{
    cli::{
        exit::{Exit, Failure, print},
        status::Output,
        table::printable,
    },
    cluster::{
        manifest::{self, Object},
        offline,
    },
    policy::model::Remark,
};

/// Arguments of `signet policy validate`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  signet policy validate policies.yaml
  signet policy validate manifests/ -o json

Directories are read with every manifest in them. Exits with 1 when it finds faults, with 3 when a
file cannot be read.")]
pub struct ValidateArgs {
    /// Files or directories of manifests
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    offline: OfflineArgs,
    /// How they are shown
    #[arg(short, long, value_name = "form", default_value = "text")]
    output: Output,
}

/// Something found.
#[derive(Serialize, PartialEq, Eq, Debug)]
#[serde(rename_all = "camelCase")]
pub(super) struct Found {
    file: String,
    line: u64,
    message: String,
    pub(super) is_fault: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    schema: &'static str,
    policies: usize,
    faults: Vec<&'a Found>,
    notes: Vec<&'a Found>,
}

/// Reads and prints.
pub fn run(args: &ValidateArgs) -> Result<Exit, Failure> {
    let mut found = Vec::new();
    let mut policies = 0;
    for path in offline::files_of(&args.files).map_err(unreadable)? {
        let text = offline::text_of(&path).map_err(unreadable)?;
        policies += validate(&path, &text, &args.offline.root_namespace, &mut found);
    }
    let (faults, notes): (Vec<&Found>, Vec<&Found>) = found.iter().partition(|f| f.is_fault);
    let exit = if faults.is_empty() { Exit::Done } else { Exit::No };
    match args.output {
        Output::Text => {
            let mut text = String::new();
            for one in &found {
                let kind = if one.is_fault { "" } else { "note: " };
                let at = if one.line > 0 { format!(":{}", one.line) } else { String::new() };
                text += &printable(&format!("{}{at}: {kind}{}", one.file, one.message));
                text.push('\n');
            }
            text += &format!("{policies} policies, {} faults\n", faults.len());
            print(&text)?;
        }
        Output::Json => {
            let schema = "signet.dev/policy-validate/v1";
            let report = Report { schema, policies, faults, notes };
            let text = serde_json::to_string(&report).map_err(|e| Failure::caused(Exit::Bug, e))?;
            print(&(text + "\n"))?;
        }
    }
    Ok(exit)
}

/// Reads one file; the number of policies in it.
pub(super) fn validate(path: &Path, text: &str, root: &str, found: &mut Vec<Found>) -> usize {
    let file = path.display().to_string();
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("manifest");
    let mut policies = 0;
    let mut say = |line: u64, message: String, is_fault: bool| {
        found.push(Found { file: file.clone(), line, message, is_fault });
    };
    let documents = match manifest::read_policies(name, text, root) {
        Ok(documents) => documents,
        Err(fault) => {
            say(fault.line, fault.to_string(), true);
            return 0;
        }
    };
    for document in documents {
        let document = match document {
            Ok(document) => document,
            Err(fault) => {
                say(fault.line, fault.to_string(), true);
                continue;
            }
        };
        for fault in &document.label_faults {
            say(fault.line, fault.to_string(), true);
        }
        for (line, object) in &document.objects {
            let (name, remarks): (_, &[Remark]) = match object {
                Object::Policy(policy) => (&policy.name, &policy.remarks),
                Object::PeerAuthentication(object) => (&object.name, &object.remarks),
                Object::RequestAuthentication(object) => (&object.name, &object.remarks),
                _ => continue,
            };
            policies += 1;
            for remark in remarks {
                let line = if remark.line > 0 { remark.line } else { *line };
                say(line, format!("{name}: {remark}"), remark.is_fault);
            }
        }
    }
    policies
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_of_a_file_is_found() {
        let text = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: a, namespace: shop}
spec:
  rules:
  - to: [{operation: {paths: [\"/a/{*}b\"]}}]
  - from: [{source: {principals: [spiffe://a/b]}}]
---
apiVersion: signet.dev/v1alpha1
kind: IdentityPolicy
metadata: {name: b, namespace: shop}
spec: {action: Block}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: c, namespace: shop}
";
        let mut found = Vec::new();
        assert_eq!(validate(Path::new("dir/p.yaml"), text, "istio-system", &mut found), 2);
        let said: Vec<_> = found.iter().map(|f| (f.line, f.is_fault, f.message.as_str())).collect();
        assert_eq!(
            said,
            [
                (
                    6,
                    true,
                    "AuthorizationPolicy/shop/a: spec.rules[0].to[0].operation.paths[0]: \
                     \"/a/{*}b\" is not a path template: {*} and {**} stand for whole segments, \
                     between two slashes"
                ),
                (
                    6,
                    true,
                    "AuthorizationPolicy/shop/a: spec.rules[0].to[0].operation.paths: cannot be \
                     evaluated: its rule lets nobody in"
                ),
                (
                    7,
                    true,
                    "AuthorizationPolicy/shop/a: spec.rules[1].from[0].source.principals[0]: \
                     \"spiffe://a/b\" can never match: principals stand without spiffe://; write \
                     \"a/b\""
                ),
                (
                    12,
                    true,
                    "IdentityPolicy b: spec.action: \"Block\" is not an action; write Allow, Deny \
                     or Audit"
                ),
                (
                    14,
                    false,
                    "AuthorizationPolicy/shop/c: spec: an ALLOW without rules: nobody reaches what \
                     it selects"
                ),
            ]
        );
        assert!(found.iter().all(|f| f.file == "dir/p.yaml"));
    }

    #[test]
    fn our_own_examples_are_without_fault() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/examples");
        let files = offline::files_of(&[root.clone(), root.join("policies")]).unwrap();
        let mut found = Vec::new();
        let mut policies = 0;
        for path in &files {
            policies +=
                validate(path, &offline::text_of(path).unwrap(), "istio-system", &mut found);
        }
        let faults: Vec<_> = found.iter().filter(|f| f.is_fault).collect();
        assert!(policies >= 11 && faults.is_empty(), "{policies} {faults:?}");
    }

    #[test]
    fn what_is_no_yaml_is_one_fault() {
        let mut found = Vec::new();
        assert_eq!(validate(Path::new("p.yaml"), "a: [", "istio-system", &mut found), 0);
        assert_eq!(found.len(), 1);
        assert!(found[0].is_fault && found[0].message.starts_with("not valid YAML"));
    }
}
