//! Service-account tokens: issued for audiences, bound to pods, reviewed.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{Refusal, access::User, objects::Objects};

/// The audience of a token that names none.
const OWN_AUDIENCE: &str = "https://kubernetes.default.svc";

/// Every token that was issued.
#[derive(Default)]
pub(super) struct Tokens(BTreeMap<String, Token>);

struct Token {
    namespace: String,
    account: String,
    account_uid: String,
    audiences: Vec<String>,
    /// Name and uid.
    pod: Option<(String, String)>,
    ends: Instant,
}

impl Tokens {
    pub(super) fn issue(
        &mut self,
        objects: &Objects,
        namespace: &str,
        account: &str,
        audiences: &[String],
        pod: Option<&str>,
        lifetime: Duration,
    ) -> Result<String, Refusal> {
        let found = objects.get("serviceaccounts", namespace, account)?;
        let pod = match pod {
            None => None,
            Some(name) => {
                let pod = objects.get("pods", namespace, name)?;
                if pod["spec"]["serviceAccountName"] != account {
                    let message = "the pod does not use this service account";
                    return Err(Refusal::new(403, "Forbidden", message));
                }
                Some((name.to_owned(), text(&pod["metadata"]["uid"])))
            }
        };
        let audiences = match audiences {
            [] => vec![OWN_AUDIENCE.to_owned()],
            some => some.to_vec(),
        };
        let token = format!("sat.{}.{}", uuid::Uuid::new_v4(), uuid::Uuid::new_v4());
        self.0.insert(
            token.clone(),
            Token {
                namespace: namespace.into(),
                account: account.into(),
                account_uid: text(&found["metadata"]["uid"]),
                audiences,
                pod,
                ends: Instant::now() + lifetime,
            },
        );
        Ok(token)
    }

    /// `TokenRequest`: the object with its status.
    pub(super) fn request(
        &mut self,
        objects: &Objects,
        namespace: &str,
        account: &str,
        mut request: Value,
    ) -> Result<Value, Refusal> {
        let spec = &request["spec"];
        let audiences: Vec<String> =
            spec["audiences"].as_array().into_iter().flatten().map(text).collect();
        let seconds = spec["expirationSeconds"].as_u64().unwrap_or(3600);
        if seconds < 600 {
            let message = "spec.expirationSeconds: may not specify a duration less than 10 minutes";
            return Err(Refusal::new(422, "Invalid", message));
        }
        let pod = spec["boundObjectRef"]["name"].as_str().map(str::to_owned);
        let life = Duration::from_secs(seconds);
        let token = self.issue(objects, namespace, account, &audiences, pod.as_deref(), life)?;
        let ends = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(seconds as i64);
        request["status"] = json!({"token": token, "expirationTimestamp": format!("{ends:.0}")});
        Ok(request)
    }

    /// Whose token this is, for requests to this server.
    pub(super) fn user(&self, objects: &Objects, token: &str) -> Option<User> {
        let status = self.judge(objects, token, &[OWN_AUDIENCE.to_owned()]).ok()?;
        Some(User::of_review(&status["user"]))
    }

    /// `TokenReview`: the object with its status.
    pub(super) fn review(&self, objects: &Objects, mut review: Value) -> Value {
        let wanted: Vec<String> =
            review["spec"]["audiences"].as_array().into_iter().flatten().map(text).collect();
        let wanted = if wanted.is_empty() { vec![OWN_AUDIENCE.to_owned()] } else { wanted };
        let token = text(&review["spec"]["token"]);
        review["status"] = match self.judge(objects, &token, &wanted) {
            Ok(status) => status,
            Err(error) => json!({"authenticated": false, "error": error}),
        };
        review
    }

    fn judge(
        &self,
        objects: &Objects,
        token: &str,
        wanted: &[String],
    ) -> Result<Value, &'static str> {
        let known = self.0.get(token).ok_or("the token is not one of this server")?;
        if Instant::now() >= known.ends {
            return Err("the token has expired");
        }
        let common: Vec<&String> = wanted.iter().filter(|a| known.audiences.contains(a)).collect();
        if common.is_empty() {
            return Err("the token's audiences are none of those asked for");
        }
        let account = objects
            .get("serviceaccounts", &known.namespace, &known.account)
            .map_err(|_| "the service account is gone")?;
        if account["metadata"]["uid"] != *known.account_uid {
            return Err("the service account is another one of that name");
        }
        let mut extra = json!({});
        if let Some((name, uid)) = &known.pod {
            let pod = objects
                .get("pods", &known.namespace, name)
                .map_err(|_| "the token's pod is gone")?;
            if pod["metadata"]["uid"] != **uid {
                return Err("the token's pod is another one of that name");
            }
            extra = json!({
                "authentication.kubernetes.io/pod-name": [name],
                "authentication.kubernetes.io/pod-uid": [uid],
            });
            if let Some(node) = pod["spec"]["nodeName"].as_str() {
                extra["authentication.kubernetes.io/node-name"] = json!([node]);
            }
        }
        Ok(json!({
            "authenticated": true,
            "audiences": common,
            "user": {
                "username": format!("system:serviceaccount:{}:{}", known.namespace, known.account),
                "uid": known.account_uid,
                "groups": [
                    "system:serviceaccounts",
                    format!("system:serviceaccounts:{}", known.namespace),
                    "system:authenticated",
                ],
                "extra": extra,
            },
        }))
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
