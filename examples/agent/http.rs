//! The two servers: health for load balancers and the kubelet, insight for people and Prometheus.

use std::{net::SocketAddr, sync::Arc};

use axum::{
    Router,
    extract::{Query, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use proxier::health::Answer;
use serde::Deserialize;
use tokio::net::TcpListener;

use crate::{Outcome, in_full, metrics::scrape, shared::Shared, show};

type At = State<Arc<Shared>>;

/// Opens a server's port.
pub(crate) async fn bind(flag: &str, at: SocketAddr) -> Outcome<TcpListener> {
    TcpListener::bind(at).await.map_err(|error| {
        format!("{flag} {at}: cannot listen there: {error}; stop what uses the port (kube-proxy?) or choose another one").into()
    })
}

/// `/healthz` and `/livez`.
pub(crate) fn health(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/healthz", get(async |State(shared): At| respond(shared.healthz())))
        .route("/livez", get(async |State(shared): At| respond(shared.livez())))
        .with_state(shared)
}

/// `/metrics`, `/debug` and kube-proxy's other pages.
pub(crate) fn insight(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        // K8S: results of registered health checks, of which kube-proxy has none either
        // (cmd/kube-proxy/app/server.go, v1.36).
        .route("/metrics/slis", get(async || ""))
        .route("/proxyMode", get(async |State(shared): At| shared.mode().to_string()))
        .route("/healthz", get(async || "ok"))
        .route("/configz", get(configz))
        .route("/flagz", get(flagz))
        .route("/statusz", get(statusz))
        .route("/debug/ir", get(ir))
        .route("/debug/plan", get(plan))
        .route("/debug/explain", get(explain))
        .with_state(shared)
}

/// A health check's answer.
pub(crate) fn respond(answer: Answer) -> Response {
    let mut response = Response::builder().status(answer.status);
    for (name, value) in answer.headers {
        response = response.header(name, value);
    }
    response
        .body(answer.body.into())
        .unwrap_or_else(|_| StatusCode::INTERNAL_SERVER_ERROR.into_response())
}

/// The text is the same in both formats; scrapers parse it by what the header says.
async fn metrics(State(shared): At, headers: HeaderMap) -> Response {
    let accepted = headers.get(header::ACCEPT).and_then(|it| it.to_str().ok()).unwrap_or_default();
    let kind = if accepted.contains("application/openmetrics-text") {
        "application/openmetrics-text; version=1.0.0; charset=utf-8"
    } else {
        "text/plain; version=0.0.4; charset=utf-8"
    };
    match scrape(&shared).await {
        Ok(text) => ([(header::CONTENT_TYPE, kind)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn configz(State(shared): At) -> Response {
    axum::Json(shared.configz.borrow().clone()).into_response()
}

async fn flagz() -> String {
    let flags: Vec<_> = std::env::args().skip(1).collect();
    format!("agent flags\n\n{}\n", flags.join("\n"))
}

async fn statusz(State(shared): At) -> Response {
    let standing = shared.handle.standing().borrow().clone();
    axum::Json(serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "mode": shared.mode(),
        "status": standing.proxier,
        "conflicts": standing.conflicts.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "failure": standing.failure,
        "last": standing.last,
    }))
    .into_response()
}

async fn ir(State(shared): At) -> Response {
    let fragments = shared.handle.inspect(|store, _| {
        let fragments: Vec<_> = store.fragments().map(Arc::clone).collect();
        (store.env().clone(), fragments)
    });
    match fragments.await {
        Ok((env, fragments)) => {
            axum::Json(serde_json::json!({"node": env, "fragments": fragments})).into_response()
        }
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, error.to_string()).into_response(),
    }
}

async fn plan(State(shared): At) -> Response {
    match shared.handle.inspect(|store, proxier| proxier.plan(&store.reset())).await {
        Ok(plan) => axum::Json(plan).into_response(),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, error.to_string()).into_response(),
    }
}

#[derive(Deserialize)]
struct Asked {
    from: std::net::IpAddr,
    to: String,
    #[serde(rename = "in")]
    input: Option<String>,
}

async fn explain(State(shared): At, Query(Asked { from, to, input }): Query<Asked>) -> Response {
    let question = show::Question { from, input, to };
    let mode = shared.mode();
    let explained = shared.handle.inspect(move |store, proxier| {
        let packet = question.packet(store).map_err(|error| in_full(&*error))?;
        let traits = proxier::sim::Traits::of(mode);
        Ok::<_, String>(proxier::explain::explain(store, &traits, &packet, Some(proxier)))
    });
    match explained.await {
        Ok(Ok(explanation)) => axum::Json(explanation).into_response(),
        Ok(Err(error)) => (StatusCode::BAD_REQUEST, error).into_response(),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, error.to_string()).into_response(),
    }
}
