//! What the manifests say.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use proxier::{
    Manifests, Snapshot, in_full,
    model::{EndpointSlice, Event, NodeEnv, Service, Store, api},
};

use crate::args::Options;

/// The manifests, read as an embedder reads them.
#[derive(Debug)]
pub(crate) struct Cluster {
    /// The node that is shown.
    pub(crate) env: NodeEnv,
    /// The other nodes with endpoints, by name; without addresses when there is no Node object.
    pub(crate) others: BTreeMap<String, NodeEnv>,
    pub(crate) services: Vec<Service>,
    pub(crate) slices: Vec<EndpointSlice>,
    /// Services that no proxier has anything to do with, and why.
    pub(crate) ignored: Vec<(String, &'static str)>,
    pub(crate) problems: Vec<String>,
}

impl Cluster {
    /// Reads the manifests. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// One line: a path that cannot be read, nothing to proxy, an unknown node.
    pub(crate) fn read(options: &Options) -> Result<Self, String> {
        let failed = |error: proxier::ManifestError| in_full(&error);
        let snapshot = Manifests::open(&options.manifests).map_err(failed)?;
        let snapshot = { snapshot }.read().map_err(failed)?;
        let (mut services, mut slices) = (Vec::new(), Vec::new());
        for event in snapshot.events() {
            match event {
                Event::EndpointSlices(all) => slices = all,
                Event::Services(all) => services = all,
                Event::Addresses(_) | Event::Apply(_) | Event::Delete(_) | Event::Node(_) => {}
            }
        }
        let problems: Vec<_> = snapshot.problems().iter().map(ToString::to_string).collect();
        if services.is_empty() {
            let paths: Vec<_> =
                options.manifests.iter().map(|it| it.display().to_string()).collect();
            let first = problems.first().map(|it| format!("; {it}")).unwrap_or_default();
            return Err(format!("{}: no Service to proxy{first}", paths.join(", ")));
        }
        let endpoints = slices.iter().flat_map(EndpointSlice::endpoints);
        let nodes: BTreeSet<_> =
            endpoints.filter_map(|it| it.node.as_deref()).map(str::to_owned).collect();
        let env = choose(&snapshot, &options.node, &nodes)?;
        let others = nodes.into_iter().filter(|name| *name != env.name);
        let others = others.map(|name| (name.clone(), observed(&snapshot, &name))).collect();
        let ignored = options.manifests.iter().flat_map(|path| ignored(path)).collect();
        Ok(Self { env, others, services, slices, ignored, problems })
    }

    /// A store that holds all of it, for a node.
    pub(crate) fn store(&self, env: NodeEnv) -> Store {
        let mut store = Store::new(env);
        store.apply(Event::EndpointSlices(self.slices.clone()));
        store.apply(Event::Services(self.services.clone()));
        store
    }
}

/// The node that was asked for, the only one, or the first with endpoints.
fn choose(
    snapshot: &Snapshot,
    wanted: &str,
    with_endpoints: &BTreeSet<String>,
) -> Result<NodeEnv, String> {
    let env = observed(snapshot, wanted);
    if !env.ips.is_empty() {
        return Ok(env);
    }
    if !wanted.is_empty() && !with_endpoints.contains(wanted) {
        return Err(format!(
            "--node {wanted}: the manifests have neither such a Node nor endpoints on it"
        ));
    }
    if !wanted.is_empty() {
        return Ok(env);
    }
    let all = with_endpoints.iter().map(|name| observed(snapshot, name));
    let mut known = all.filter(|env| !env.ips.is_empty());
    let first = with_endpoints.first().map_or("node-1", String::as_str);
    Ok(known.next().unwrap_or_else(|| NodeEnv { name: first.to_owned(), ..NodeEnv::default() }))
}

/// The node of that name as its object describes it; without addresses when there is none.
fn observed(snapshot: &Snapshot, name: &str) -> NodeEnv {
    let mut env = NodeEnv { name: name.to_owned(), ..NodeEnv::default() };
    // Problems of the Node are among those of the snapshot or of no consequence here.
    drop(snapshot.observe_node(&mut env));
    env
}

/// The Services below `path` that are none of a proxier's business. Whatever cannot be read has been
/// reported already.
fn ignored(path: &Path) -> Vec<(String, &'static str)> {
    let files: Vec<PathBuf> = match path.read_dir() {
        Ok(entries) => entries.filter_map(Result::ok).map(|entry| entry.path()).collect(),
        Err(_not_a_directory) => vec![path.to_owned()],
    };
    let manifests = |file: &&PathBuf| {
        let extension = file.extension().and_then(|it| it.to_str());
        **file == path || matches!(extension, Some("json" | "yaml" | "yml"))
    };
    let texts =
        files.iter().filter(manifests).filter_map(|file| std::fs::read_to_string(file).ok());
    let mut found: Vec<_> = texts.flat_map(|text| ignored_in(&text)).collect();
    found.sort();
    found
}

fn ignored_in(text: &str) -> Vec<(String, &'static str)> {
    let mut found = Vec::new();
    for document in text.split("\n---") {
        let Ok(value) = yaml_serde::from_str::<serde_json::Value>(document) else { continue };
        let items = value.get("items").and_then(|items| items.as_array()).cloned();
        for item in items.unwrap_or_else(|| vec![value]) {
            if item.get("kind").and_then(|kind| kind.as_str()) != Some("Service") {
                continue;
            }
            let Ok(service) = serde_json::from_value::<api::Service>(item) else { continue };
            let name = format!("{}/{}", service.metadata.namespace, service.metadata.name);
            if service.spec.service_type.as_deref() == Some("ExternalName") {
                found.push((name, "ExternalName"));
            } else if service.spec.cluster_ip == "None" {
                found.push((name, "headless"));
            }
        }
    }
    found
}
