//! What stands between a write and the store: the schema of a custom kind, and
//! ValidatingAdmissionPolicies with their bindings.

use serde_json::{Value, json};

use super::{
    Refusal, State,
    access::{Attributes, User},
    cel::{self, Expression, Failure, Variables},
    http::cannot,
    kinds::Kind,
    schema::{self, Schema},
    select,
};

/// What becomes of fields that a schema does not know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Unknown {
    /// They go.
    Pruned,
    /// The request is refused.
    Refused,
}

/// Everything that a write to one resource has to pass.
pub(super) struct Gate {
    kind: &'static Kind,
    name: String,
    unknown: Unknown,
    schema: Option<Schema>,
    policies: Vec<Bound>,
    /// What does not change with the object.
    request: Value,
    namespace: Option<Value>,
}

/// A policy with one of its bindings.
struct Bound {
    policy: Value,
    binding: Value,
}

impl State {
    /// The gate for a request.
    pub(super) fn gate(
        &self,
        kind: &'static Kind,
        version: &str,
        user: &User,
        wanted: &Attributes,
        unknown: Unknown,
    ) -> Result<Gate, Refusal> {
        let definition = format!("{}.{}", kind.plural, kind.group);
        let definition = self.objects.get("customresourcedefinitions", "", &definition).ok();
        let schema = match &definition {
            Some(definition) => Schema::of(definition, version)?,
            None => None,
        };
        let mut policies = Vec::new();
        // What decides about writes is not decided about by itself.
        let is_own = kind.group == "admissionregistration.k8s.io";
        for binding in self.objects.all("validatingadmissionpolicybindings", "") {
            let name = binding["spec"]["policyName"].as_str().unwrap_or_default();
            // A binding without a policy does nothing, as in a real server.
            if let Ok(policy) = self.objects.get("validatingadmissionpolicies", "", name)
                && !is_own
            {
                policies.push(Bound { policy, binding: binding.clone() });
            }
        }
        let in_namespace = if kind.plural == "namespaces" { "" } else { wanted.namespace.as_str() };
        let gvk = json!({"group": kind.group, "version": version, "kind": kind.kind});
        let gvr = json!({"group": kind.group, "version": version, "resource": kind.plural});
        let request = json!({
            "uid": uuid::Uuid::new_v4().to_string(),
            "kind": gvk, "requestKind": gvk, "resource": gvr, "requestResource": gvr,
            "subResource": wanted.subresource, "requestSubResource": wanted.subresource,
            "name": wanted.name, "namespace": in_namespace,
            "userInfo": user.info(), "dryRun": false,
        });
        Ok(Gate {
            kind,
            name: wanted.name.clone(),
            unknown,
            schema,
            policies,
            request,
            namespace: self.objects.get("namespaces", "", in_namespace).ok(),
        })
    }
}

impl Gate {
    /// Makes an object as it would be stored, or refuses it.
    pub(super) fn enter(&self, object: &mut Value, old: Option<&Value>) -> Result<(), Refusal> {
        if let Some(schema) = &self.schema {
            let unknown = schema.prune(object);
            if let ([first, ..], Unknown::Refused) = (unknown.as_slice(), self.unknown) {
                let message = format!(
                    "{} in version {:?} cannot be handled as a {}: strict decoding error: unknown \
                     field {first:?}",
                    self.kind.kind,
                    self.request["kind"]["version"].as_str().unwrap_or_default(),
                    self.kind.kind
                );
                return Err(Refusal::new(400, "BadRequest", message));
            }
            schema.default(object);
            let faults = schema.faults(object, old);
            if !faults.is_empty() {
                let name = object["metadata"]["name"].as_str().unwrap_or(&self.name);
                return Err(schema::refusal(self.kind.kind, self.kind.group, name, &faults));
            }
        }
        if self.kind.plural == "customresourcedefinitions" {
            self.define(object)?;
        }
        if self.kind.plural == "validatingadmissionpolicies" {
            usable(object)?;
        }
        if self.kind.plural.ends_with("webhookconfigurations") {
            let hooks = object["webhooks"].as_array().is_some_and(|hooks| !hooks.is_empty());
            if hooks && object["metadata"]["labels"]["lab/never-called"] != "true" {
                return Err(cannot("webhooks (label lab/never-called: \"true\" to store one)"));
            }
        }
        let operation = if old.is_some() { "UPDATE" } else { "CREATE" };
        self.ask_policies(operation, Some(object), old)
    }

    /// The same for an object that goes.
    pub(super) fn leave(&self, old: &Value) -> Result<(), Refusal> {
        self.ask_policies("DELETE", None, Some(old))
    }

    fn define(&self, definition: &Value) -> Result<(), Refusal> {
        if definition["spec"]["conversion"]["strategy"] == "Webhook"
            && definition["metadata"]["labels"]["lab/never-called"] != "true"
        {
            return Err(cannot("conversion webhooks"));
        }
        for version in definition["spec"]["versions"].as_array().into_iter().flatten() {
            Schema::of(definition, version["name"].as_str().unwrap_or_default())?;
        }
        Ok(())
    }

    fn ask_policies(
        &self,
        operation: &str,
        object: Option<&Value>,
        old: Option<&Value>,
    ) -> Result<(), Refusal> {
        for bound in &self.policies {
            let Bound { policy, binding } = bound;
            let wanted = [&policy["spec"]["matchConstraints"], &binding["spec"]["matchResources"]];
            let mut is_meant = true;
            for constraints in wanted {
                is_meant &= self.fits(constraints, operation, object, old)?;
            }
            if is_meant && let Some(denial) = self.denial(bound, operation, object, old)? {
                return Err(denial);
            }
        }
        Ok(())
    }

    fn fits(
        &self,
        constraints: &Value,
        operation: &str,
        object: Option<&Value>,
        old: Option<&Value>,
    ) -> Result<bool, Refusal> {
        if constraints.is_null() {
            return Ok(true);
        }
        let rules = |field: &str| constraints[field].as_array().cloned().unwrap_or_default();
        let is_in = |rule: &Value| self.is_in(rule, operation);
        let resources = rules("resourceRules");
        if (!resources.is_empty() && !resources.iter().any(is_in))
            || rules("excludeResourceRules").iter().any(is_in)
        {
            return Ok(false);
        }
        let of_objects = &constraints["objectSelector"];
        let labels = |object: Option<&Value>| {
            object.map(|object| object["metadata"]["labels"].clone()).unwrap_or_default()
        };
        let one = select::labels_fit(of_objects, &labels(object))?
            || select::labels_fit(of_objects, &labels(old))?;
        let of_namespaces = &constraints["namespaceSelector"];
        // For a Namespace its own labels count; what has none is always meant.
        let namespace = if self.kind.plural == "namespaces" {
            select::labels_fit(of_namespaces, &labels(object.or(old)))?
        } else {
            match &self.namespace {
                Some(namespace) => select::labels_fit(of_namespaces, &labels(Some(namespace)))?,
                None => true,
            }
        };
        Ok(one && namespace)
    }

    fn is_in(&self, rule: &Value, operation: &str) -> bool {
        let has = |field: &str, value: &str| {
            let mut items = rule[field].as_array().into_iter().flatten();
            items.any(|item| item == "*" || item == value)
        };
        let subresource = self.request["subResource"].as_str().unwrap_or_default();
        let plural = self.kind.plural;
        let resource = match subresource {
            "" => has("resources", plural),
            sub => [format!("{plural}/{sub}"), format!("{plural}/*"), format!("*/{sub}")]
                .iter()
                .chain(&["*/*".to_owned()])
                .any(|name| {
                    let mut items = rule["resources"].as_array().into_iter().flatten();
                    items.any(|item| item == name)
                }),
        };
        let scope = match rule["scope"].as_str() {
            Some("Cluster") => !self.kind.is_namespaced,
            Some("Namespaced") => self.kind.is_namespaced,
            _ => true,
        };
        let named = rule["resourceNames"].as_array().is_none_or(|names| {
            names.is_empty() || names.iter().any(|name| *name == self.request["name"])
        });
        let version = self.request["kind"]["version"].as_str().unwrap_or_default();
        resource
            && scope
            && named
            && has("operations", operation)
            && has("apiGroups", self.kind.group)
            && has("apiVersions", version)
    }

    /// Asks one policy.
    fn denial(
        &self,
        bound: &Bound,
        operation: &str,
        object: Option<&Value>,
        old: Option<&Value>,
    ) -> Result<Option<Refusal>, Refusal> {
        let Bound { policy, binding } = bound;
        usable(policy)?;
        let spec = &policy["spec"];
        let mut request = self.request.clone();
        request["operation"] = operation.into();
        if request["name"] == ""
            && let Some(name) = object.and_then(|object| object["metadata"]["name"].as_str())
        {
            request["name"] = name.into();
        }
        let nothing = Value::Null;
        let mut variables = Variables::default()
            .with("object", cel::value(object.unwrap_or(&nothing)))
            .with("oldObject", cel::value(old.unwrap_or(&nothing)))
            .with("request", cel::value(&request))
            .with("namespaceObject", cel::value(self.namespace.as_ref().unwrap_or(&nothing)))
            .with("params", ::cel::Value::Null);
        let is_open = spec["failurePolicy"] == "Ignore";
        let names = (text(&policy["metadata"]["name"]), text(&binding["metadata"]["name"]));
        let deny = |message: &str, reason: &str| self.denied(&names, message, reason, binding);
        let failed = |source: &str, error: &Failure| {
            let message = format!("expression '{source}' resulted in error: {error}");
            if is_open { Ok(None) } else { deny(&message, "Invalid") }
        };

        let each = |field: &str| spec[field].as_array().cloned().unwrap_or_default();
        for condition in each("matchConditions") {
            let condition = Expression::parse(condition["expression"].as_str().unwrap_or(""))?;
            match condition.holds(&variables) {
                Ok(true) => {}
                Ok(false) => return Ok(None),
                Err(error) => return failed(condition.source(), &error),
            }
        }
        // Variables are made when they are asked for: one that has no value is an error only then.
        let mut made: Vec<(String, ::cel::Value)> = Vec::new();
        let mut broken: Vec<(String, String)> = Vec::new();
        for variable in each("variables") {
            let expression = Expression::parse(variable["expression"].as_str().unwrap_or(""))?;
            let name = text(&variable["name"]);
            match expression.evaluate(&variables) {
                Ok(value) => made.push((name, value)),
                Err(error) => broken.push((name, error.to_string())),
            }
            variables.set("variables", cel::map(made.iter().cloned()));
        }
        for validation in each("validations") {
            let expression = Expression::parse(validation["expression"].as_str().unwrap_or(""))?;
            match expression.holds(&variables) {
                Ok(true) => {}
                Ok(false) => {
                    let expressed = match validation["messageExpression"].as_str() {
                        Some(source) => Expression::parse(source)?.text(&variables).ok(),
                        None => None,
                    };
                    let message = expressed
                        .or_else(|| validation["message"].as_str().map(str::to_owned))
                        .unwrap_or_else(|| format!("failed expression: {}", expression.source()));
                    let reason = validation["reason"].as_str().unwrap_or("Invalid");
                    if let Some(denial) = deny(&message, reason)? {
                        return Ok(Some(denial));
                    }
                }
                Err(error) => {
                    let of = error.missing_key().and_then(|key| {
                        let (_, error) = broken.iter().find(|(name, _)| name == key)?;
                        Some(format!("variable {key}: {error}"))
                    });
                    let message = of.unwrap_or_else(|| error.to_string());
                    let message = format!(
                        "expression '{}' resulted in error: {message}",
                        expression.source()
                    );
                    if !is_open {
                        return deny(&message, "Invalid");
                    }
                }
            }
        }
        Ok(None)
    }

    fn denied(
        &self,
        (policy, binding): &(String, String),
        message: &str,
        reason: &str,
        bound: &Value,
    ) -> Result<Option<Refusal>, Refusal> {
        let actions = bound["spec"]["validationActions"].as_array().cloned().unwrap_or_default();
        if let Some(other) = actions.iter().find(|action| **action != "Deny" && **action != "Audit")
        {
            return Err(cannot(&format!("the validation action {other}")));
        }
        if !actions.iter().any(|action| action == "Deny") {
            return Ok(None);
        }
        let (code, reason) = match reason {
            "Unauthorized" => (401, "Unauthorized"),
            "Forbidden" => (403, "Forbidden"),
            "RequestEntityTooLarge" => (413, "RequestEntityTooLarge"),
            _ => (422, "Invalid"),
        };
        let plural = match self.kind.group {
            "" => self.kind.plural.to_owned(),
            group => format!("{}.{group}", self.kind.plural),
        };
        let message = format!(
            "{plural} {:?} is forbidden: ValidatingAdmissionPolicy '{policy}' with binding \
             '{binding}' denied request: {message}",
            self.request["name"].as_str().unwrap_or_default(),
        );
        Ok(Some(Refusal::new(code, reason, message)))
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// Says by name what of a policy cannot be evaluated here, and what is wrong with it.
fn usable(policy: &Value) -> Result<(), Refusal> {
    let spec = &policy["spec"];
    if !spec["paramKind"].is_null() {
        return Err(cannot("parameters of admission policies"));
    }
    let each = |field: &str| spec[field].as_array().cloned().unwrap_or_default();
    let mut sources = Vec::new();
    for field in ["matchConditions", "variables", "validations", "auditAnnotations"] {
        for item in each(field) {
            for word in ["expression", "messageExpression", "valueExpression"] {
                sources.extend(item[word].as_str().map(str::to_owned));
            }
        }
    }
    for source in sources {
        if Expression::parse(&source)?.speaks_of("authorizer") {
            return Err(cannot(&format!("the authorizer of CEL: {source}")));
        }
    }
    Ok(())
}
