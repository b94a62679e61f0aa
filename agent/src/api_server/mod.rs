//! A small client of the Kubernetes API server: tokens, pods, nodes, and objects that are
//! replaced only when nobody else has changed them.

pub mod nodes;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::Path,
    time::Duration,
};

use k8s_openapi::{
    ByteString,
    api::{
        authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus},
        authorization::v1::{
            ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
            SubjectAccessReview, SubjectAccessReviewSpec, SubjectAccessReviewStatus,
        },
        core::v1::{ConfigMap, Node, Pod, Secret},
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, Client, Config,
    api::{ListParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};

/// A call that takes longer has failed.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Objects asked for at a time.
const PAGE: u32 = 500;
/// The most objects that a list may have.
const MAX_OBJECTS: usize = 50_000;

/// Why the API server did not answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApiError {
    /// There is no usable configuration.
    #[error(
        "no access to an API server: {0}; run inside a pod with a service account, or give a kubeconfig"
    )]
    Config(String),
    /// It cannot be reached, or answers nonsense.
    #[error("the API server does not answer {what}: {cause}")]
    Unreachable {
        /// What was asked.
        what: String,
        /// Why not.
        cause: String,
    },
    /// It refuses.
    #[error("the API server refuses {what}: {cause}; look at the role of this service account")]
    Refused {
        /// What was asked.
        what: String,
        /// What it says.
        cause: String,
    },
    /// The answer is longer than anything that is expected.
    #[error("the API server lists more than {MAX_OBJECTS} objects for {0}")]
    TooMany(String),
}

/// How the API server is reached: by a kubeconfig, or by the pod's own service account, whose
/// token is read again as it is renewed.
///
/// # Errors
/// When neither can be read. Nothing is asked yet.
pub async fn access(kubeconfig: Option<&Path>) -> Result<Config, ApiError> {
    match kubeconfig {
        Some(path) => {
            let wrong = |error: &dyn fmt::Display| {
                ApiError::Config(format!("kubeconfig {}: {error}", path.display()))
            };
            let file = Kubeconfig::read_from(path).map_err(|e| wrong(&e))?;
            let options = KubeConfigOptions::default();
            Config::from_custom_kubeconfig(file, &options).await.map_err(|e| wrong(&e))
        }
        None => Config::incluster().map_err(|error| ApiError::Config(error.to_string())),
    }
}

/// How a person reaches the API server: by this kubeconfig, or the one that kubectl would take.
///
/// # Errors
/// When there is none, or it cannot be read, or has no such context. Nothing is asked yet.
pub async fn persons_access(
    kubeconfig: Option<&Path>,
    context: Option<&str>,
) -> Result<Config, ApiError> {
    let wrong = |error: &dyn fmt::Display| match kubeconfig {
        Some(path) => ApiError::Config(format!("kubeconfig {}: {error}", path.display())),
        None => ApiError::Config(format!("kubeconfig: {error}")),
    };
    let file = match kubeconfig {
        Some(path) => Kubeconfig::read_from(path),
        None => Kubeconfig::read(),
    };
    let options =
        KubeConfigOptions { context: context.map(Into::into), ..KubeConfigOptions::default() };
    let file = file.map_err(|e| wrong(&e))?;
    Config::from_custom_kubeconfig(file, &options).await.map_err(|e| wrong(&e))
}

/// Who a token belongs to, as the API server says.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TokenUser {
    /// `system:serviceaccount:<namespace>:<name>`.
    pub username: String,
    /// Tells users of one name apart.
    pub uid: String,
    /// Groups of the user.
    pub groups: Vec<String>,
    /// Further claims, by name.
    pub extra: BTreeMap<String, Vec<String>>,
}

impl TokenUser {
    /// A claim that has exactly one value.
    pub fn claim(&self, name: &str) -> Option<&str> {
        match self.extra.get(name).map(Vec::as_slice) {
            Some([value]) if !value.is_empty() => Some(value),
            _ => None,
        }
    }

    /// Namespace and name of the service account.
    pub fn service_account(&self) -> Option<(&str, &str)> {
        self.username.strip_prefix("system:serviceaccount:")?.split_once(':')
    }
}

/// Something that RBAC grants.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Right {
    /// `list`.
    pub verb: &'static str,
    /// The API group; empty: the core's.
    pub group: &'static str,
    /// The plural.
    pub resource: &'static str,
    /// `token` of `serviceaccounts/token`; empty: the object itself.
    pub subresource: &'static str,
    /// Empty: of the whole cluster.
    pub namespace: String,
    /// Empty: of any name.
    pub name: String,
}

impl Right {
    /// Of the whole cluster.
    pub fn of(verb: &'static str, group: &'static str, resource: &'static str) -> Self {
        let (namespace, name) = (String::new(), String::new());
        Self { verb, group, resource, subresource: "", namespace, name }
    }

    /// In a namespace.
    pub fn within(self, namespace: &str) -> Self {
        Self { namespace: namespace.into(), ..self }
    }

    /// Of one name.
    pub fn named(self, name: &str) -> Self {
        Self { name: name.into(), ..self }
    }

    fn attributes(&self) -> ResourceAttributes {
        let given = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        ResourceAttributes {
            verb: given(self.verb),
            group: Some(self.group.into()),
            resource: given(self.resource),
            subresource: given(self.subresource),
            namespace: given(&self.namespace),
            name: given(&self.name),
            ..ResourceAttributes::default()
        }
    }
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.verb, self.resource)?;
        if !self.subresource.is_empty() {
            write!(f, "/{}", self.subresource)?;
        }
        if !self.group.is_empty() {
            write!(f, ".{}", self.group)?;
        }
        match (&*self.namespace, &*self.name) {
            ("", "") => Ok(()),
            ("", name) => write!(f, " {name}"),
            (namespace, "") => write!(f, " in {namespace}"),
            (namespace, name) => write!(f, " {namespace}/{name}"),
        }
    }
}

/// A denial outweighs whatever else is said.
fn allows(status: Option<SubjectAccessReviewStatus>) -> bool {
    status.is_some_and(|status| status.allowed && status.denied != Some(true))
}

/// What became of a conditional write.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Written {
    /// It is there, with this version.
    Done(String),
    /// Somebody else was first.
    Conflict,
}

/// A client; cheap to clone.
#[derive(Clone)]
pub struct ApiServer {
    client: Client,
}

impl ApiServer {
    /// A client by a kubeconfig, or by the pod's own service account.
    ///
    /// # Errors
    /// When neither can be read. Nothing is asked yet.
    pub async fn connect(kubeconfig: Option<&Path>) -> Result<Self, ApiError> {
        Self::of(access(kubeconfig).await?)
    }

    /// A client of a server that is known already.
    ///
    /// # Errors
    /// When the configuration cannot be used.
    pub fn of(mut config: Config) -> Result<Self, ApiError> {
        config.connect_timeout = Some(TIMEOUT);
        config.read_timeout = Some(TIMEOUT);
        config.write_timeout = Some(TIMEOUT);
        let client =
            Client::try_from(config).map_err(|error| ApiError::Config(error.to_string()))?;
        Ok(Self { client })
    }

    /// The client itself, for kinds that are read once.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Whose token this is, for one audience; `None`: nobody's.
    pub async fn review_token(
        &self,
        token: &str,
        audience: &str,
    ) -> Result<Option<TokenUser>, ApiError> {
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: Some(token.into()),
                audiences: Some(vec![audience.into()]),
            },
            ..TokenReview::default()
        };
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let what = "a TokenReview";
        let review = within(what, api.create(&PostParams::default(), &review)).await?;
        let status = review.status.unwrap_or_default();
        // An API server that knows no audiences answers without them: its yes is for any.
        let ours = |status: &TokenReviewStatus| {
            status.audiences.as_ref().is_some_and(|list| list.iter().any(|a| a == audience))
        };
        if status.authenticated != Some(true) || !ours(&status) {
            return Ok(None);
        }
        let user = status.user.unwrap_or_default();
        Ok(Some(TokenUser {
            username: user.username.unwrap_or_default(),
            uid: user.uid.unwrap_or_default(),
            groups: user.groups.unwrap_or_default(),
            extra: user.extra.unwrap_or_default().into_iter().collect(),
        }))
    }

    /// Whether a user has a right.
    pub async fn may(&self, user: &TokenUser, right: &Right) -> Result<bool, ApiError> {
        let given = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: given(&user.username),
                uid: given(&user.uid),
                groups: Some(user.groups.clone()),
                extra: Some(user.extra.clone()),
                resource_attributes: Some(right.attributes()),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        let api: Api<SubjectAccessReview> = Api::all(self.client.clone());
        let what = "a SubjectAccessReview";
        let review = within(what, api.create(&PostParams::default(), &review)).await?;
        Ok(allows(review.status))
    }

    /// Whether this client has a right.
    pub async fn may_i(&self, right: &Right) -> Result<bool, ApiError> {
        let review = SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(right.attributes()),
                ..SelfSubjectAccessReviewSpec::default()
            },
            ..SelfSubjectAccessReview::default()
        };
        let api: Api<SelfSubjectAccessReview> = Api::all(self.client.clone());
        let what = "a SelfSubjectAccessReview";
        let review = within(what, api.create(&PostParams::default(), &review)).await?;
        Ok(allows(review.status))
    }

    /// The server's version: `v1.33.0`.
    pub async fn version(&self) -> Result<String, ApiError> {
        Ok(within("its version", self.client.apiserver_version()).await?.git_version)
    }

    /// Plurals of the kinds that the server has of a group's version; `None`: it has no such.
    pub async fn kinds_of(&self, api_version: &str) -> Result<Option<BTreeSet<String>>, ApiError> {
        let asked = async {
            match self.client.list_api_group_resources(api_version).await {
                Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
                answer => answer.map(Some),
            }
        };
        let found = within(&format!("the kinds of {api_version}"), asked).await?;
        Ok(found.map(|list| list.resources.into_iter().map(|kind| kind.name).collect()))
    }

    /// A pod, as it is now.
    pub async fn pod(&self, namespace: &str, name: &str) -> Result<Option<Pod>, ApiError> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        Ok(within(&format!("pod {namespace}/{name}"), api.get_opt(name)).await?)
    }

    /// The pods that are bound to a node.
    pub async fn pods_on(&self, node: &str) -> Result<Vec<Pod>, ApiError> {
        let params = ListParams::default().fields(&format!("spec.nodeName={node}"));
        self.list(Api::all(self.client.clone()), &format!("the pods of node {node}"), params).await
    }

    /// All nodes.
    pub async fn nodes(&self) -> Result<Vec<Node>, ApiError> {
        self.list(Api::all(self.client.clone()), "the nodes", ListParams::default()).await
    }

    async fn list<K>(&self, api: Api<K>, what: &str, params: ListParams) -> Result<Vec<K>, ApiError>
    where
        K: Clone + fmt::Debug + serde::de::DeserializeOwned,
    {
        let mut params = params.limit(PAGE);
        let mut all = Vec::new();
        loop {
            let page = within(what, api.list(&params)).await?;
            all.extend(page.items);
            if all.len() > MAX_OBJECTS {
                return Err(ApiError::TooMany(what.into()));
            }
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => return Ok(all),
            }
        }
    }

    /// One key of a Secret with the object's version; `None`: there is no such Secret or key.
    pub async fn secret(
        &self,
        namespace: &str,
        name: &str,
        key: &str,
    ) -> Result<SecretValue, ApiError> {
        let api: Api<Secret> = Api::namespaced(self.client.clone(), namespace);
        let what = format!("secret {namespace}/{name}");
        let secret = within(&what, api.get_opt(name)).await?;
        Ok(secret.map_or_else(SecretValue::default, |secret| SecretValue {
            version: secret.metadata.resource_version,
            value: secret.data.and_then(|mut data| data.remove(key)).map(|v| v.0),
        }))
    }

    /// Writes one key of a Secret if the object still has `version` (`None`: is not there).
    /// Other keys go.
    pub async fn write_secret(
        &self,
        namespace: &str,
        name: &str,
        key: &str,
        value: &[u8],
        version: Option<&str>,
    ) -> Result<Written, ApiError> {
        let api: Api<Secret> = Api::namespaced(self.client.clone(), namespace);
        let what = format!("writing secret {namespace}/{name}");
        let secret = Secret {
            metadata: metadata(namespace, name, version),
            data: Some([(key.to_owned(), ByteString(value.to_vec()))].into()),
            type_: Some("signet.dev/authority".into()),
            ..Secret::default()
        };
        let params = PostParams::default();
        let result = match version {
            None => within(&what, api.create(&params, &secret)).await,
            Some(_) => within(&what, api.replace(name, &params, &secret)).await,
        };
        written(result.map(|secret| secret.metadata.resource_version))
    }

    /// Makes a ConfigMap hold one key; nothing is written when it does already.
    pub async fn write_config_map(
        &self,
        namespace: &str,
        name: &str,
        key: &str,
        value: &str,
    ) -> Result<Written, ApiError> {
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), namespace);
        let what = format!("configmap {namespace}/{name}");
        let present = within(&what, api.get_opt(name)).await?;
        let params = PostParams::default();
        let data = Some(BTreeMap::from([(key.to_owned(), value.to_owned())]));
        let result = match present {
            Some(present) if present.data == data => {
                return Ok(Written::Done(present.metadata.resource_version.unwrap_or_default()));
            }
            Some(present) => {
                let new = ConfigMap { data, ..present };
                within(&what, api.replace(name, &params, &new)).await
            }
            None => {
                let metadata = metadata(namespace, name, None);
                let new = ConfigMap { metadata, data, ..ConfigMap::default() };
                within(&what, api.create(&params, &new)).await
            }
        };
        written(result.map(|map| map.metadata.resource_version))
    }
}

/// A key of a Secret, with the object's version.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct SecretValue {
    /// `metadata.resourceVersion`; `None`: there is no object.
    pub version: Option<String>,
    /// The key's value; `None`: there is no such key.
    pub value: Option<Vec<u8>>,
}

impl fmt::Debug for SecretValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretValue").field("version", &self.version).finish_non_exhaustive()
    }
}

impl fmt::Debug for ApiServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiServer").finish_non_exhaustive()
    }
}

fn metadata(namespace: &str, name: &str, version: Option<&str>) -> ObjectMeta {
    ObjectMeta {
        namespace: Some(namespace.into()),
        name: Some(name.into()),
        resource_version: version.map(Into::into),
        ..ObjectMeta::default()
    }
}

/// A conflict, or an object that appeared or went meanwhile, is no error.
fn written(result: Result<Option<String>, Failure>) -> Result<Written, ApiError> {
    match result {
        Ok(version) => Ok(Written::Done(version.unwrap_or_default())),
        Err(Failure { conflict: true, .. }) => Ok(Written::Conflict),
        Err(failure) => Err(failure.error),
    }
}

/// A call's failure, and whether it is only that somebody else was first.
struct Failure {
    conflict: bool,
    error: ApiError,
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        failure.error
    }
}

async fn within<T>(
    what: &str,
    call: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, Failure> {
    let unreachable = |cause: String| ApiError::Unreachable { what: what.to_owned(), cause };
    match tokio::time::timeout(TIMEOUT, call).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(kube::Error::Api(status))) => {
            let conflict = status.is_conflict() || status.is_already_exists();
            let cause = status.message.clone();
            let error = match status.code {
                401 | 403 => ApiError::Refused { what: what.into(), cause },
                _ => unreachable(format!("{} {cause}", status.code)),
            };
            // Replacing what was deleted meanwhile: read again.
            Err(Failure { conflict: conflict || status.is_not_found(), error })
        }
        Ok(Err(error)) => Err(Failure { conflict: false, error: unreachable(error.to_string()) }),
        Err(_) => Err(Failure {
            conflict: false,
            error: unreachable(format!("no answer within {TIMEOUT:?}")),
        }),
    }
}
