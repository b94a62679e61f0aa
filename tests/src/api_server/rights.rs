//! What an account may do, right by right: to take one away, and to see what was asked for.

use std::collections::BTreeSet;

use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};

use super::ApiServer;

/// A right that a role gives: one verb on one resource.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Right {
    /// `clusterroles` or `roles`.
    role_plural: &'static str,
    /// The role's namespace; empty for a ClusterRole.
    namespace: String,
    role: String,
    /// Its place among the role's rules.
    rule: usize,
    /// `pods`, `pods/status`, …
    pub resource: String,
    /// `get`, `list`, …
    pub verb: String,
}

/// A question that RBAC has decided.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Asked {
    /// Who asked.
    pub user: String,
    /// For what: `pods`, `pods/status`, …
    pub resource: String,
    /// `get`, `list`, …
    pub verb: String,
    /// Whether it was allowed.
    pub allowed: bool,
}

impl ApiServer {
    /// Every right that roles bound to a service account give.
    pub fn rights_of(&self, namespace: &str, account: &str) -> Vec<Right> {
        let is_bound = |binding: &Value| {
            let mut subjects = binding["subjects"].as_array().into_iter().flatten();
            subjects.any(|subject| {
                subject["kind"] == "ServiceAccount"
                    && subject["name"] == account
                    && subject["namespace"] == namespace
            })
        };
        let mut rights = Vec::new();
        for (bindings, role_plural) in
            [("clusterrolebindings", "clusterroles"), ("rolebindings", "roles")]
        {
            for binding in self.list(bindings).iter().filter(|binding| is_bound(binding)) {
                let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                let own = text(&binding["metadata"]["namespace"]);
                let role = text(&binding["roleRef"]["name"]);
                let found = self.get(role_plural, &own, &role).unwrap_or_default();
                for (rule, text) in found["rules"].as_array().into_iter().flatten().enumerate() {
                    let all = |field: &str| -> Vec<String> {
                        let items = text[field].as_array().into_iter().flatten();
                        items.filter_map(|item| Some(item.as_str()?.to_owned())).collect()
                    };
                    for resource in all("resources") {
                        for verb in all("verbs") {
                            rights.push(Right {
                                role_plural,
                                namespace: own.clone(),
                                role: role.clone(),
                                rule,
                                resource: resource.clone(),
                                verb,
                            });
                        }
                    }
                }
            }
        }
        rights
    }

    /// Takes one right away from its role; the others stay.
    pub fn take_right(&self, right: &Right) -> Result<()> {
        let Right { role_plural, namespace, role, rule, resource, verb } = right;
        let mut object = self.get(role_plural, namespace, role).context("no such role")?;
        let rules = object["rules"].as_array_mut().context("a role without rules")?;
        let with = rules.get(*rule).cloned().context("no such rule")?;
        let without = |list: &Value, gone: &str| -> Value {
            let items = list.as_array().into_iter().flatten();
            items.filter(|item| **item != *gone).cloned().collect()
        };
        // The resource gets a rule of its own, with the other verbs.
        let mut own = with.clone();
        own["resources"] = json!([resource]);
        own["verbs"] = without(&with["verbs"], verb);
        rules[*rule]["resources"] = without(&with["resources"], resource);
        rules.push(own);
        self.apply(object).map(drop)
    }

    /// What RBAC was asked, each question once.
    pub fn asked(&self) -> BTreeSet<Asked> {
        self.shared.state().asked.clone()
    }

    /// Changes an object of the server, past every check.
    pub fn change(
        &self,
        plural: &str,
        namespace: &str,
        name: &str,
        change: impl FnOnce(&mut Value),
    ) -> Result<Value> {
        let object = self.get(plural, namespace, name);
        let mut object = object.ok_or_else(|| anyhow!("no {plural} {namespace}/{name}"))?;
        change(&mut object);
        self.apply(object)
    }
}
