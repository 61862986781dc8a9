//! A client for programs that do not bring their own.

use std::path::PathBuf;

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};

use crate::trouble::in_full;

/// Where the API server is and who asks.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Connection {
    /// A kubeconfig file. Without one: the service account of the pod this runs in, and outside of
    /// pods `$KUBECONFIG` or `~/.kube/config`.
    pub kubeconfig: Option<PathBuf>,
    /// A context of the kubeconfig other than the current one.
    pub context: Option<String>,
    /// A server other than the one of the kubeconfig, as kube-proxy's `--master`.
    pub server: Option<String>,
}

impl Connection {
    /// The settings of a kubeconfig file, or of the surroundings.
    #[must_use]
    pub fn new(kubeconfig: Option<PathBuf>) -> Self {
        Self { kubeconfig, ..Self::default() }
    }

    /// Makes a client. Asks the server nothing; an unreachable server shows in
    /// [`SourceStatus`](crate::SourceStatus).
    ///
    /// Certificates, tokens, token files and exec plugins are understood. Must be called within a
    /// tokio runtime.
    ///
    /// # Errors
    /// The kubeconfig cannot be read or used, or there is neither kubeconfig nor service account.
    pub async fn client(&self) -> Result<Client, ConnectError> {
        let mut config = self.config().await?;
        if let Some(server) = &self.server {
            config.cluster_url = server.parse().map_err(|error: http::uri::InvalidUri| {
                ConnectError::new(format!("server {server:?} is not a URL"), &error)
            })?;
        }
        // Bookmarks come more often than this, and the watches have time-outs of their own.
        config.read_timeout = None;
        // The source waits by itself, and says meanwhile what for.
        config.default_retry = false;
        Client::try_from(config)
            .map_err(|error| ConnectError::new("the credentials cannot be used", &error))
    }

    async fn config(&self) -> Result<Config, ConnectError> {
        let options =
            KubeConfigOptions { context: self.context.clone(), ..KubeConfigOptions::default() };
        if let Some(path) = &self.kubeconfig {
            let at = |error: &dyn std::error::Error| {
                ConnectError::new(format!("kubeconfig {} cannot be used", path.display()), error)
            };
            let kubeconfig = Kubeconfig::read_from(path).map_err(|error| at(&error))?;
            return Config::from_custom_kubeconfig(kubeconfig, &options)
                .await
                .map_err(|error| at(&error));
        }
        if self.context.is_some() {
            return Config::from_kubeconfig(&options)
                .await
                .map_err(|error| ConnectError::new("the kubeconfig cannot be used", &error));
        }
        Config::infer().await.map_err(|error| {
            ConnectError::new("neither a service account nor a kubeconfig: give one", &error)
        })
    }
}

/// There is no way to ask the API server.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{doing}: {cause}")]
pub struct ConnectError {
    doing: String,
    cause: String,
}

impl ConnectError {
    fn new(doing: impl Into<String>, cause: &dyn std::error::Error) -> Self {
        Self { doing: doing.into(), cause: in_full(cause) }
    }
}
