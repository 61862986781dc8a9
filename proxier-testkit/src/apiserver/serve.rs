//! HTTP in front of the state.

use std::{collections::BTreeMap, convert::Infallible, io, sync::Arc, time::Duration};

use futures_util::{StreamExt, stream};
use http_body_util::{BodyExt, StreamBody, combinators::BoxBody};
use hyper::{
    Method, Request, Response,
    body::{Bytes, Frame, Incoming},
    header::AUTHORIZATION,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::mpsc,
};
use tokio_rustls::TlsAcceptor;

use super::{
    Shared,
    state::{Entry, Fault, Seen, Selector, key},
};

type Body = BoxBody<Bytes, io::Error>;

pub(super) async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((stream, _)) = listener.accept().await {
        let shared = Arc::clone(&shared);
        let mut epoch = shared.epoch.subscribe();
        tokio::spawn(async move {
            stream.set_nodelay(true).ok();
            let connection = async {
                let Some(tls) = shared.tls.clone() else {
                    return connection(stream, &shared, true).await;
                };
                if let Ok(stream) = TlsAcceptor::from(tls).accept(stream).await {
                    let (_, session) = stream.get_ref();
                    let is_known = session.peer_certificates().is_some();
                    connection(stream, &shared, is_known).await;
                }
            };
            tokio::select! {
                () = connection => {}
                _ = epoch.changed() => {}
            }
        });
    }
}

/// Serves one connection; who is not known needs a token.
async fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    shared: &Arc<Shared>,
    is_known: bool,
) {
    let service = service_fn(|request| async move {
        let response = if is_known || has_token(shared, &request) {
            answer(shared, request).await
        } else {
            refuse(401, "Unauthorized", "Unauthorized", None)
        };
        Ok::<_, Infallible>(response)
    });
    let builder = hyper::server::conn::http1::Builder::new();
    builder.serve_connection(TokioIo::new(stream), service).await.ok();
}

fn has_token(shared: &Shared, request: &Request<Incoming>) -> bool {
    let header = request.headers().get(AUTHORIZATION).and_then(|it| it.to_str().ok());
    let token = header.and_then(|it| it.strip_prefix("Bearer "));
    token.is_some_and(|token| shared.state().tokens.iter().any(|it| it == token))
}

/// What a request asks for.
struct Asked {
    verb: &'static str,
    resource: String,
    /// Namespace and, after a slash, name; as far as the path has them.
    place: String,
    query: BTreeMap<String, String>,
}

impl Asked {
    fn of(request: &Request<Incoming>) -> Self {
        let query: BTreeMap<_, _> = request.uri().query().map(decode).unwrap_or_default();
        let watches = query.get("watch").is_some_and(|it| it == "true");
        let verb = match (request.method(), watches) {
            (&Method::POST, _) => "create",
            (&Method::PATCH, _) => "patch",
            (_, true) => "watch",
            (_, false) => "list",
        };
        let mut parts = request.uri().path().trim_matches('/').split('/');
        // `api/v1/…` or `apis/group/version/…`
        let skip = if parts.next() == Some("api") { 1 } else { 2 };
        let mut parts = parts.skip(skip).peekable();
        let mut place = String::new();
        if parts.next_if_eq(&"namespaces").is_some() {
            place.push_str(parts.next().unwrap_or_default());
        }
        let resource = parts.next().unwrap_or_default().to_owned();
        if let Some(name) = parts.next() {
            place = format!("{place}/{name}");
        }
        Self { verb, resource, place, query }
    }

    fn text(&self, key: &str) -> &str {
        self.query.get(key).map_or("", String::as_str)
    }

    fn selector(&self) -> Selector {
        Selector {
            labels: self.text("labelSelector").to_owned(),
            fields: self.text("fieldSelector").to_owned(),
        }
    }

    fn kind(&self) -> (&'static str, &'static str) {
        match self.resource.as_str() {
            "endpointslices" => ("discovery.k8s.io/v1", "EndpointSlice"),
            "servicecidrs" => ("networking.k8s.io/v1", "ServiceCIDR"),
            "nodes" => ("v1", "Node"),
            "events" => ("events.k8s.io/v1", "Event"),
            _ => ("v1", "Service"),
        }
    }
}

async fn answer(shared: &Arc<Shared>, request: Request<Incoming>) -> Response<Body> {
    let asked = Asked::of(&request);
    let faults = {
        let mut state = shared.state();
        let (verb, resource, query) = (asked.verb, asked.resource.clone(), asked.query.clone());
        state.seen.push(Seen { verb, resource, query });
        state.faults.clone()
    };
    for fault in &faults {
        if let Fault::Refuse { verb, resource, code, retry_after } = fault
            && *verb == asked.verb
            && *resource == asked.resource
        {
            return refuse(*code, "", &format!("{verb} {resource} is refused"), *retry_after);
        }
    }
    let streams = asked.text("sendInitialEvents") == "true";
    for fault in &faults {
        if let Fault::Verbatim { verb, resource, body } = fault
            && *verb == if streams { "stream" } else { asked.verb }
            && *resource == asked.resource
        {
            return verbatim(body, asked.verb == "watch");
        }
    }
    match asked.verb {
        "create" | "patch" => write(shared, &asked, request).await,
        "watch" => watch(shared, asked, faults),
        _ => list(shared, &asked, &faults),
    }
}

async fn write(shared: &Shared, asked: &Asked, request: Request<Incoming>) -> Response<Body> {
    let Ok(body) = request.into_body().collect().await else {
        return refuse(400, "BadRequest", "the body broke off", None);
    };
    let Ok(body) = serde_json::from_slice::<Value>(&body.to_bytes()) else {
        return refuse(400, "BadRequest", "the body is not JSON", None);
    };
    let mut state = shared.state();
    let object = if asked.verb == "create" {
        if state.get(&asked.resource, &key(&body)).is_some() {
            return refuse(409, "AlreadyExists", "there is one of this name", None);
        }
        body
    } else {
        let Some(known) = state.get(&asked.resource, &asked.place) else {
            return refuse(404, "NotFound", "not found", None);
        };
        let mut merged = (*known).clone();
        merge(&mut merged, body);
        merged
    };
    let version = state.apply(object.clone());
    drop(state);
    shared.changed.send_replace(version);
    respond(201, &[], object.to_string())
}

fn merge(into: &mut Value, patch: Value) {
    match (into, patch) {
        (Value::Object(into), Value::Object(patch)) => {
            for (key, value) in patch {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, patch) => *into = patch,
    }
}

fn list(shared: &Shared, asked: &Asked, faults: &[Fault]) -> Response<Body> {
    let mut state = shared.state();
    let token = asked.text("continue");
    let (snapshot, start) = match token.split_once('/') {
        Some((snapshot, start)) => (snapshot.to_owned(), start.parse().unwrap_or(0)),
        None => {
            let mut items = state.select(&asked.resource, &asked.selector());
            if !asked.place.is_empty() {
                items.retain(|it| key(it).starts_with(&format!("{}/", asked.place)));
            }
            let snapshot = format!("{}-{}", state.version, state.snapshots.len());
            state.snapshots.insert(snapshot.clone(), items);
            (snapshot, 0_usize)
        }
    };
    let items = state
        .snapshots
        .get(&snapshot)
        .filter(|_| start == 0 || !faults.contains(&Fault::ExpiredPages));
    let Some(items) = items else {
        let message =
            "The provided continue parameter is too old to display a consistent list result.";
        return refuse(410, "Expired", message, None);
    };
    let limit = asked.text("limit").parse().unwrap_or(usize::MAX);
    let page: Vec<_> = items.iter().skip(start).take(limit).cloned().collect();
    let end = start + page.len();
    let more = items.len() - end;
    let version = snapshot.split('-').next().unwrap_or_default().to_owned();
    let mut metadata = json!({"resourceVersion": version});
    if more > 0 {
        metadata["continue"] = json!(format!("{snapshot}/{end}"));
        metadata["remainingItemCount"] = json!(more);
    }
    drop(state);
    let (group, kind) = asked.kind();
    // K8S: items of a typed list do not repeat their kind.
    let page: Vec<_> = page.iter().map(|it| bare(it)).collect();
    let body = json!({"kind": format!("{kind}List"), "apiVersion": group, "metadata": metadata, "items": page});
    let mut text = body.to_string();
    for fault in faults {
        match fault {
            Fault::Broken(bytes) => return broken(&text, *bytes),
            Fault::Slow(bytes) => return slow(text, *bytes),
            Fault::Truncated(bytes) => text.truncate(*bytes),
            Fault::ExpiredPages
            | Fault::NoStreamingLists
            | Fault::Refuse { .. }
            | Fault::Silent
            | Fault::Verbatim { .. } => {}
        }
    }
    respond(200, &[], text)
}

fn bare(object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(map) = object.as_object_mut() {
        map.remove("kind");
        map.remove("apiVersion");
    }
    object
}

fn watch(shared: &Arc<Shared>, asked: Asked, faults: Vec<Fault>) -> Response<Body> {
    let (sender, receiver) = mpsc::channel::<Result<String, io::Error>>(64);
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        // The client may leave at any time.
        feed(&shared, &asked, &faults, &sender).await.ok();
    });
    let lines = stream::unfold(receiver, |mut receiver| async move {
        let line = receiver.recv().await?;
        Some((line.map(|text| Frame::data(Bytes::from(text))), receiver))
    });
    reply(200, &[], BodyExt::boxed(StreamBody::new(lines)))
}

/// The connection is gone.
struct Left;

type Lines = mpsc::Sender<Result<String, io::Error>>;

async fn send(lines: &Lines, event: &str, object: &Value) -> Result<(), Left> {
    let text = format!("{}\n", json!({"type": event, "object": object}));
    lines.send(Ok(text)).await.map_err(|_gone| Left)
}

async fn feed(shared: &Shared, asked: &Asked, faults: &[Fault], lines: &Lines) -> Result<(), Left> {
    let selector = asked.selector();
    let (group, kind) = asked.kind();
    let mut changed = shared.changed.subscribe();
    let initial = asked.text("sendInitialEvents") == "true";
    if initial && faults.contains(&Fault::NoStreamingLists) {
        let message = "a watch stream was requested by the client but the required storage feature \
                       RequestWatchProgress is disabled";
        return send(lines, "ERROR", &status(500, "InternalError", message)).await;
    }
    let mut version: u64 = asked.text("resourceVersion").parse().unwrap_or(0);
    if initial || version == 0 {
        let (objects, now) = {
            let state = shared.state();
            (state.select(&asked.resource, &selector), state.version)
        };
        for object in objects {
            send(lines, "ADDED", &object).await?;
        }
        version = now;
        if initial {
            let mark = json!({"k8s.io/initial-events-end": "true"});
            let metadata = json!({"resourceVersion": version.to_string(), "annotations": mark});
            let end = json!({"kind": kind, "apiVersion": group, "metadata": metadata});
            send(lines, "BOOKMARK", &end).await?;
        }
    }
    let since = version;
    let silent = || shared.state().faults.contains(&Fault::Silent);
    let seconds = asked.text("timeoutSeconds").parse().unwrap_or(1800);
    let end = tokio::time::Instant::now() + Duration::from_secs(seconds);
    let mut broken: Option<usize> = faults
        .iter()
        .find_map(|it| if let Fault::Broken(bytes) = it { Some(*bytes) } else { None });
    loop {
        let (oldest, entries): (u64, Vec<Entry>) = {
            let state = shared.state();
            let new = state.history.iter().filter(|it| it.version > version);
            (state.oldest, new.filter(|it| it.resource == asked.resource).cloned().collect())
        };
        if version < oldest {
            let message = format!("too old resource version: {version} ({oldest})");
            return send(lines, "ERROR", &status(410, "Expired", &message)).await;
        }
        for entry in entries {
            version = entry.version;
            let Some(event) = transition(&entry, &selector) else { continue };
            if silent() {
                continue;
            }
            if let Some(bytes) = broken.take() {
                let text = json!({"type": event, "object": *entry.after}).to_string();
                let half: String = text.chars().take(bytes).collect();
                lines.send(Ok(half)).await.map_err(|_gone| Left)?;
                let reset = io::Error::from(io::ErrorKind::ConnectionReset);
                return lines.send(Err(reset)).await.map_err(|_gone| Left);
            }
            send(lines, event, &entry.after).await?;
        }
        tokio::select! {
            _ = changed.changed() => {}
            () = lines.closed() => return Err(Left),
            () = tokio::time::sleep_until(end) => return Ok(()),
            // K8S: bookmarks carry the version of the resource's latest event, and only those newer
            // than the start of the watch are sent (cacheWatcher.process, v1.36).
            () = tokio::time::sleep(shared.bookmarks), if version > since && !silent() => {
                let metadata = json!({"resourceVersion": version.to_string()});
                let mark = json!({"kind": kind, "apiVersion": group, "metadata": metadata});
                send(lines, "BOOKMARK", &mark).await?;
            }
        }
    }
}

/// What a change looks like through a selector.
fn transition(entry: &Entry, selector: &Selector) -> Option<&'static str> {
    let before = entry.before.as_ref().is_some_and(|it| selector.takes(it));
    let after = !entry.deleted && selector.takes(&entry.after);
    match (before, after) {
        (false, false) => None,
        (false, true) => Some("ADDED"),
        (true, false) => Some("DELETED"),
        (true, true) => Some("MODIFIED"),
    }
}

fn status(code: u16, reason: &str, message: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code,
    })
}

fn refuse(code: u16, reason: &str, message: &str, retry_after: Option<u32>) -> Response<Body> {
    let headers: Vec<_> = retry_after.iter().map(|it| ("retry-after", it.to_string())).collect();
    respond(code, &headers, status(code, reason, message).to_string())
}

fn respond(code: u16, headers: &[(&str, String)], text: String) -> Response<Body> {
    reply(code, headers, http_body_util::Full::from(text).map_err(|never| match never {}).boxed())
}

fn reply(code: u16, headers: &[(&str, String)], body: Body) -> Response<Body> {
    let mut response = Response::builder().status(code).header("content-type", "application/json");
    for (name, value) in headers {
        response = response.header(*name, value);
    }
    response.body(body).expect("status and headers are well-formed")
}

/// The beginning of a body, then the connection breaks.
fn broken(text: &str, bytes: usize) -> Response<Body> {
    let half: String = text.chars().take(bytes).collect();
    let parts =
        [Ok(Frame::data(Bytes::from(half))), Err(io::Error::from(io::ErrorKind::ConnectionReset))];
    reply(200, &[], BodyExt::boxed(StreamBody::new(stream::iter(parts))))
}

fn slow(text: String, bytes: usize) -> Response<Body> {
    let pieces = stream::unfold(Bytes::from(text), move |mut rest| async move {
        if rest.is_empty() {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
        let piece = rest.split_to(bytes.min(rest.len()));
        Some((Ok(Frame::data(piece)), rest))
    });
    reply(200, &[], BodyExt::boxed(StreamBody::new(pieces)))
}

fn verbatim(body: &'static str, open: bool) -> Response<Body> {
    if !open {
        return respond(200, &[], body.to_owned());
    }
    let first = stream::once(std::future::ready(Ok(Frame::data(Bytes::from(body)))));
    reply(200, &[], BodyExt::boxed(StreamBody::new(first.chain(stream::pending()))))
}

fn decode(query: &str) -> BTreeMap<String, String> {
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(key, value)| (unescape(key), unescape(value))).collect()
}

fn unescape(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let hex = |it: Option<u8>| it.and_then(|it| char::from(it).to_digit(16));
        match byte {
            b'+' => bytes.push(b' '),
            b'%' => {
                let (high, low) = (hex(rest.next()), hex(rest.next()));
                let value = high.zip(low).map(|(high, low)| high * 16 + low);
                bytes.push(value.and_then(|it| u8::try_from(it).ok()).unwrap_or(b'?'));
            }
            other => bytes.push(other),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
