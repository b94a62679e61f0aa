//! Who asks, what a request is about, and whether RBAC allows it.

use axum::http::Method;
use serde_json::{Value, json};

use super::{Asked, Refusal, State, objects::Objects, select};

/// The group that no rule holds.
const MASTERS: &str = "system:masters";

/// Who makes a request.
#[derive(Clone, Debug, Default)]
pub(super) struct User {
    pub(super) name: String,
    pub(super) uid: String,
    pub(super) groups: Vec<String>,
    /// Further claims, by name: lists of texts.
    pub(super) extra: Value,
}

impl User {
    /// The one who made the server.
    pub(super) fn admin() -> Self {
        Self {
            name: "lab-admin".into(),
            uid: String::new(),
            groups: vec![MASTERS.into(), "system:authenticated".into()],
            extra: json!({}),
        }
    }

    /// As a TokenReview tells of it.
    pub(super) fn of_review(user: &Value) -> Self {
        let text = |field: &str| user[field].as_str().unwrap_or_default().to_owned();
        Self {
            name: text("username"),
            uid: text("uid"),
            groups: texts(&user["groups"]),
            extra: user["extra"].clone(),
        }
    }

    /// As objects have it (`userInfo`).
    pub(super) fn info(&self) -> Value {
        json!({
            "username": self.name, "uid": self.uid, "groups": self.groups, "extra": self.extra,
        })
    }
}

fn texts(list: &Value) -> Vec<String> {
    let items = list.as_array().into_iter().flatten();
    items.filter_map(|item| Some(item.as_str()?.to_owned())).collect()
}

/// What a request is about: what RBAC rules speak of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) verb: String,
    pub(super) group: String,
    /// Empty: the path is none of resources.
    pub(super) resource: String,
    pub(super) subresource: String,
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) path: String,
}

impl Attributes {
    /// Of a request; `fields` is its field selector.
    pub(super) fn of(method: &Method, path: &[&str], is_watch: bool, fields: &str) -> Self {
        let whole = format!("/{}", path.join("/"));
        let nothing =
            Self { verb: method.as_str().to_lowercase(), path: whole.clone(), ..Self::default() };
        let (group, rest) = match path {
            ["api", _, rest @ ..] => ("", rest),
            ["apis", group, _, rest @ ..] => (*group, rest),
            _ => return nothing,
        };
        let (namespace, rest) = match rest {
            [] => return nothing,
            ["namespaces", namespace] => (*namespace, rest),
            ["namespaces", namespace, "status" | "finalize"] => (*namespace, rest),
            ["namespaces", namespace, rest @ ..] => (*namespace, rest),
            rest => ("", rest),
        };
        let resource = rest[0];
        let mut name = rest.get(1).copied().unwrap_or_default().to_owned();
        let subresource = rest.get(2..).unwrap_or_default().join("/");
        let is_one = !name.is_empty();
        let verb = match *method {
            Method::POST => "create",
            Method::PUT => "update",
            Method::PATCH => "patch",
            Method::DELETE if is_one => "delete",
            Method::DELETE => "deletecollection",
            _ if is_watch => "watch",
            _ if is_one => "get",
            _ => "list",
        };
        // A selector for one name is a request for that object.
        if !is_one && matches!(verb, "list" | "watch" | "deletecollection") {
            name = select::exact(fields, "metadata.name").unwrap_or_default();
        }
        Self {
            verb: verb.into(),
            group: group.into(),
            resource: resource.into(),
            subresource,
            namespace: namespace.into(),
            name,
            path: whole,
        }
    }

    /// As a SubjectAccessReview asks.
    pub(super) fn of_review(spec: &Value) -> Self {
        let resource = &spec["resourceAttributes"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        if resource.is_object() {
            return Self {
                verb: text(&resource["verb"]),
                group: text(&resource["group"]),
                resource: text(&resource["resource"]),
                subresource: text(&resource["subresource"]),
                namespace: text(&resource["namespace"]),
                name: text(&resource["name"]),
                path: String::new(),
            };
        }
        let other = &spec["nonResourceAttributes"];
        Self { verb: text(&other["verb"]), path: text(&other["path"]), ..Self::default() }
    }

    fn full_resource(&self) -> String {
        match self.subresource.as_str() {
            "" => self.resource.clone(),
            subresource => format!("{}/{subresource}", self.resource),
        }
    }

    /// The refusal, in the words of a real server.
    pub(super) fn forbidden(&self, user: &User) -> Refusal {
        let name = &user.name;
        if self.resource.is_empty() {
            let Self { verb, path, .. } = self;
            let message = format!("forbidden: User {name:?} cannot {verb} path {path:?}");
            return Refusal::new(403, "Forbidden", message);
        }
        let group = match self.group.as_str() {
            "" => self.resource.clone(),
            group => format!("{}.{group}", self.resource),
        };
        let object = match self.name.as_str() {
            "" => format!("{group} is forbidden"),
            name => format!("{group} {name:?} is forbidden"),
        };
        let place = match self.namespace.as_str() {
            "" => "at the cluster scope".to_owned(),
            namespace => format!("in the namespace {namespace:?}"),
        };
        let message = format!(
            "{object}: User {name:?} cannot {} resource {:?} in API group {:?} {place}",
            self.verb,
            self.full_resource(),
            self.group
        );
        Refusal::new(403, "Forbidden", message)
    }
}

impl State {
    /// Asks RBAC, and notes what it said.
    pub(super) fn authorize(&mut self, user: &User, wanted: &Attributes) -> Result<(), Refusal> {
        let allowed = allows(&self.objects, user, wanted);
        self.asked.insert(Asked {
            user: user.name.clone(),
            resource: wanted.full_resource(),
            verb: wanted.verb.clone(),
            allowed,
        });
        if allowed { Ok(()) } else { Err(wanted.forbidden(user)) }
    }
}

/// Whether RBAC lets a user do something: some rule of some role that is bound to the user
/// allows it, in the whole cluster or in the request's namespace.
pub(super) fn allows(objects: &Objects, user: &User, wanted: &Attributes) -> bool {
    if user.groups.iter().any(|group| group == MASTERS) {
        return true;
    }
    let binds = |binding: &Value, own: &str| {
        let subjects = binding["subjects"].as_array().into_iter().flatten();
        subjects.into_iter().any(|subject| is_subject(subject, own, user))
    };
    let role = |binding: &Value, namespace: &str| {
        let name = binding["roleRef"]["name"].as_str().unwrap_or_default();
        match binding["roleRef"]["kind"].as_str() {
            Some("ClusterRole") => objects.get("clusterroles", "", name).ok(),
            Some("Role") => objects.get("roles", namespace, name).ok(),
            _ => None,
        }
    };
    let permits = |role: Option<Value>| {
        let rules = role.as_ref().and_then(|role| role["rules"].as_array());
        rules.is_some_and(|rules| rules.iter().any(|rule| is_allowed(rule, wanted)))
    };
    let in_cluster = objects
        .all("clusterrolebindings", "")
        .any(|binding| binds(binding, "") && permits(role(binding, "")));
    // The rules of a namespace are about objects in it only, and about the Namespace itself.
    in_cluster
        || (!wanted.namespace.is_empty()
            && objects.all("rolebindings", &wanted.namespace).any(|binding| {
                let own = wanted.namespace.as_str();
                binds(binding, own) && permits(role(binding, own))
            }))
}

fn is_subject(subject: &Value, own: &str, user: &User) -> bool {
    let name = subject["name"].as_str().unwrap_or_default();
    match subject["kind"].as_str() {
        Some("User") => user.name == name,
        Some("Group") => user.groups.iter().any(|group| group == name),
        Some("ServiceAccount") => {
            let namespace = subject["namespace"].as_str().unwrap_or(own);
            user.name == format!("system:serviceaccount:{namespace}:{name}")
        }
        _ => false,
    }
}

fn is_allowed(rule: &Value, wanted: &Attributes) -> bool {
    let has = |field: &str, value: &str| {
        texts(&rule[field]).iter().any(|allowed| allowed == "*" || allowed == value)
    };
    if !has("verbs", &wanted.verb) {
        return false;
    }
    if wanted.resource.is_empty() {
        return texts(&rule["nonResourceURLs"]).iter().any(|url| match url.strip_suffix('*') {
            Some(begin) => wanted.path.starts_with(begin),
            None => *url == wanted.path,
        });
    }
    let names = texts(&rule["resourceNames"]);
    let any_resource = wanted.subresource.as_str();
    has("apiGroups", &wanted.group)
        && (has("resources", &wanted.full_resource())
            || (!any_resource.is_empty() && has("resources", &format!("*/{any_resource}"))))
        && (names.is_empty() || names.contains(&wanted.name))
}

/// Answers a SubjectAccessReview, or one of the caller about itself.
pub(super) fn review(objects: &Objects, caller: &User, is_own: bool, mut review: Value) -> Value {
    let spec = &review["spec"];
    let user = if is_own {
        caller.clone()
    } else {
        User {
            name: spec["user"].as_str().unwrap_or_default().to_owned(),
            uid: String::new(),
            groups: texts(&spec["groups"]),
            extra: spec["extra"].clone(),
        }
    };
    let allowed = allows(objects, &user, &Attributes::of_review(spec));
    review["status"] = json!({"allowed": allowed});
    review
}

/// The roles and bindings that every API server begins with, as far as anybody here needs them.
pub(super) fn built_in() -> Vec<Value> {
    const GROUP: &str = "rbac.authorization.k8s.io";
    let role = |name: &str, rules: Value| {
        json!({
            "apiVersion": format!("{GROUP}/v1"), "kind": "ClusterRole",
            "metadata": {"name": name}, "rules": rules,
        })
    };
    let binding = |name: &str, group: &str| {
        json!({
            "apiVersion": format!("{GROUP}/v1"), "kind": "ClusterRoleBinding",
            "metadata": {"name": name},
            "roleRef": {"apiGroup": GROUP, "kind": "ClusterRole", "name": name},
            "subjects": [{"apiGroup": GROUP, "kind": "Group", "name": group}],
        })
    };
    let everyone = "system:authenticated";
    vec![
        role(
            "cluster-admin",
            json!([
                {"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]},
                {"nonResourceURLs": ["*"], "verbs": ["*"]},
            ]),
        ),
        role(
            "system:discovery",
            json!([{
                "nonResourceURLs": [
                    "/api", "/api/*", "/apis", "/apis/*", "/healthz", "/livez", "/openapi",
                    "/openapi/*", "/readyz", "/version", "/version/",
                ],
                "verbs": ["get"],
            }]),
        ),
        role(
            "system:basic-user",
            json!([
                {
                    "apiGroups": ["authorization.k8s.io"],
                    "resources": ["selfsubjectaccessreviews", "selfsubjectrulesreviews"],
                    "verbs": ["create"],
                },
                {
                    "apiGroups": ["authentication.k8s.io"],
                    "resources": ["selfsubjectreviews"],
                    "verbs": ["create"],
                },
            ]),
        ),
        binding("cluster-admin", MASTERS),
        binding("system:discovery", everyone),
        binding("system:basic-user", everyone),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(method: Method, path: &str, fields: &str) -> Attributes {
        let path: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        Attributes::of(&method, &path, false, fields)
    }

    #[test]
    fn paths_are_read_as_a_real_server_reads_them() {
        for (method, path, fields, wanted) in [
            (Method::GET, "/api/v1/pods", "", ["list", "", "pods", "", "", ""]),
            (Method::GET, "/api/v1/namespaces/a", "", ["get", "", "namespaces", "", "a", "a"]),
            (
                Method::PUT,
                "/api/v1/namespaces/a/status",
                "",
                ["update", "", "namespaces", "status", "a", "a"],
            ),
            (
                Method::POST,
                "/api/v1/namespaces/a/serviceaccounts/b/token",
                "",
                ["create", "", "serviceaccounts", "token", "a", "b"],
            ),
            (
                Method::GET,
                "/api/v1/namespaces/a/configmaps",
                "metadata.name=c",
                ["list", "", "configmaps", "", "a", "c"],
            ),
            (
                Method::DELETE,
                "/apis/apps/v1/namespaces/a/daemonsets",
                "",
                ["deletecollection", "apps", "daemonsets", "", "a", ""],
            ),
            (Method::GET, "/apis/apps/v1", "", ["get", "", "", "", "", ""]),
        ] {
            let found = of(method, path, fields);
            let parts = [
                &found.verb,
                &found.group,
                &found.resource,
                &found.subresource,
                &found.namespace,
                &found.name,
            ];
            assert_eq!(parts, wanted, "{path}");
        }
    }

    #[test]
    fn rules_allow_what_they_say_and_nothing_else() {
        let mut objects = Objects::default();
        for object in built_in() {
            objects.apply(object).unwrap();
        }
        let role = |kind: &str, namespace: &str, rules: Value| {
            json!({
                "kind": kind, "metadata": {"name": "r", "namespace": namespace}, "rules": rules,
            })
        };
        let mut cluster = role(
            "ClusterRole",
            "",
            json!([{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}]),
        );
        cluster["metadata"].as_object_mut().unwrap().remove("namespace");
        objects.apply(cluster).unwrap();
        objects
            .apply(role(
                "Role",
                "own",
                json!([{
                    "apiGroups": [""], "resources": ["configmaps", "pods/log"],
                    "resourceNames": ["one"], "verbs": ["get", "list"],
                }]),
            ))
            .unwrap();
        for (kind, namespace) in [("ClusterRole", ""), ("Role", "own")] {
            let mut binding = json!({
                "kind": format!("{kind}Binding"), "metadata": {"name": "b"},
                "roleRef": {"kind": kind, "name": "r"},
                "subjects": [{"kind": "ServiceAccount", "name": "a", "namespace": "own"}],
            });
            if !namespace.is_empty() {
                binding["metadata"]["namespace"] = namespace.into();
            }
            objects.apply(binding).unwrap();
        }
        let user = User {
            name: "system:serviceaccount:own:a".into(),
            groups: vec!["system:authenticated".into()],
            ..User::default()
        };
        let other = User { name: "system:serviceaccount:own:b".into(), ..user.clone() };
        for (path, fields, may) in [
            ("/api/v1/pods", "", true),
            ("/api/v1/namespaces/x/pods", "", true),
            ("/api/v1/namespaces/own/pods/p", "", false),
            ("/api/v1/namespaces/own/configmaps/one", "", true),
            ("/api/v1/namespaces/own/configmaps/two", "", false),
            ("/api/v1/namespaces/own/configmaps", "", false),
            ("/api/v1/namespaces/own/configmaps", "metadata.name=one", true),
            ("/api/v1/namespaces/x/configmaps/one", "", false),
            ("/api/v1/namespaces/own/pods/one/log", "", true),
            ("/apis/apps/v1/pods", "", false),
            ("/apis/apps", "", true),
            ("/metrics", "", false),
        ] {
            let wanted = of(Method::GET, path, fields);
            assert_eq!(allows(&objects, &user, &wanted), may, "{path} {fields}");
            assert!(allows(&objects, &User::admin(), &wanted), "{path}");
            assert_eq!(allows(&objects, &other, &wanted), path == "/apis/apps", "{path}");
        }
        let refusal = of(Method::GET, "/api/v1/namespaces/own/configmaps/two", "").forbidden(&user);
        assert_eq!(
            (refusal.code, refusal.message.as_str()),
            (
                403,
                "configmaps \"two\" is forbidden: User \"system:serviceaccount:own:a\" cannot get \
                 resource \"configmaps\" in API group \"\" in the namespace \"own\""
            )
        );
        let refusal = of(Method::GET, "/apis/apps/v1/daemonsets", "").forbidden(&user);
        assert_eq!(
            refusal.message,
            "daemonsets.apps is forbidden: User \"system:serviceaccount:own:a\" cannot list \
             resource \"daemonsets\" in API group \"apps\" at the cluster scope"
        );
    }
}
