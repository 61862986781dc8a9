//! Services, EndpointSlices and Nodes from Kubernetes manifests: YAML or JSON, several documents,
//! `List`s, exactly as `kubectl get service,endpointslice,node -A -o yaml` prints them.
//!
//! A document that cannot be read is reported and costs only itself.

use std::{collections::BTreeMap, fmt};

use ipnet::IpNet;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::model::{EndpointSlice, Problem, Read, Service, api, parse_net};

/// What some manifests say.
#[derive(Clone, Debug, Default)]
pub struct Manifest {
    /// Objects by kind, namespace and name.
    objects: BTreeMap<Identity, Entry>,
    /// Everything that was skipped or refused.
    pub problems: Vec<ManifestProblem>,
}

/// Something wrong with a manifest, and where.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct ManifestProblem {
    /// Where it is.
    pub place: Place,
    /// What is wrong, naming object and field where they are known.
    pub message: String,
    /// The document could not be read at all: what it held before is not known to be gone.
    pub unreadable: bool,
}

/// A document in a file, or an item of a list in it.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Place {
    /// The file's name as it was given.
    pub file: String,
    /// Counts from 1.
    pub document: usize,
    /// Counts from 1; `None` outside lists.
    pub item: Option<usize>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, document {}", self.file, self.document)?;
        self.item.map_or(Ok(()), |item| write!(f, ", item {item}"))
    }
}

impl fmt::Display for ManifestProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.message)
    }
}

#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Identity {
    kind: &'static str,
    namespace: String,
    name: String,
}

#[derive(Clone, Debug)]
struct Entry {
    place: Place,
    content: Content,
}

#[derive(Clone, Debug)]
enum Content {
    EndpointSlice(Option<EndpointSlice>),
    Node(Box<api::Node>),
    Service(Option<Service>),
    ServiceCidr(Vec<IpNet>),
}

impl Manifest {
    /// Reads one file's text. `file` is only for messages.
    #[must_use]
    pub fn parse(file: &str, text: &str) -> Self {
        let mut manifest = Self::default();
        let start = text.trim_start_matches('\u{feff}').trim_start();
        let place = |document| Place { file: file.to_owned(), document, item: None };
        if start.starts_with('{') {
            manifest.document(&place(1), serde_json::from_str(text).map_err(|it| it.to_string()));
            return manifest;
        }
        for (index, (line, document)) in documents(text).enumerate() {
            let value = yaml_serde::from_str(document).map_err(|error| in_file(&error, line));
            manifest.document(&place(index + 1), value);
        }
        manifest
    }

    /// A file that could not be read at all.
    #[must_use]
    pub fn unreadable_file(file: &str, message: &str) -> Self {
        let mut manifest = Self::default();
        let place = Place { file: file.to_owned(), document: 1, item: None };
        manifest.unreadable(&place, message);
        manifest
    }

    /// Adds what another manifest says. An object that is already here stays as it is, and the second
    /// one is reported.
    pub fn merge(&mut self, other: Self) {
        self.problems.extend(other.problems);
        for (identity, entry) in other.objects {
            self.insert(identity, entry);
        }
    }

    /// Adds objects of `earlier` that are not here: what a file said before a document of it became
    /// unreadable.
    pub fn fall_back(&mut self, earlier: &Self) {
        for (identity, entry) in &earlier.objects {
            self.objects.entry(identity.clone()).or_insert_with(|| entry.clone());
        }
    }

    /// Some document could not be read.
    #[must_use]
    pub fn is_damaged(&self) -> bool {
        self.problems.iter().any(|problem| problem.unreadable)
    }

    /// The Services.
    pub fn services(&self) -> impl Iterator<Item = &Service> {
        self.objects.values().filter_map(|entry| match &entry.content {
            Content::Service(service) => service.as_ref(),
            Content::EndpointSlice(_) | Content::Node(_) | Content::ServiceCidr(_) => None,
        })
    }

    /// The EndpointSlices.
    pub fn slices(&self) -> impl Iterator<Item = &EndpointSlice> {
        self.objects.values().filter_map(|entry| match &entry.content {
            Content::EndpointSlice(slice) => slice.as_ref(),
            Content::Node(_) | Content::Service(_) | Content::ServiceCidr(_) => None,
        })
    }

    /// The Nodes, by name.
    pub fn nodes(&self) -> impl Iterator<Item = &api::Node> {
        self.objects.values().filter_map(|entry| match &entry.content {
            Content::Node(node) => Some(&**node),
            Content::EndpointSlice(_) | Content::Service(_) | Content::ServiceCidr(_) => None,
        })
    }

    /// The ranges of all ServiceCIDRs.
    pub fn service_cidrs(&self) -> impl Iterator<Item = IpNet> {
        let lists = self.objects.values().filter_map(|entry| match &entry.content {
            Content::ServiceCidr(nets) => Some(nets),
            Content::EndpointSlice(_) | Content::Node(_) | Content::Service(_) => None,
        });
        lists.flatten().copied()
    }

    fn document(&mut self, place: &Place, value: Result<Value, String>) {
        match value {
            Ok(Value::Null) => {}
            Ok(Value::Object(mut object)) => {
                let kind = object.get("kind").and_then(Value::as_str).map(str::to_owned);
                let Some(item_kind) = kind.as_deref().and_then(|kind| kind.strip_suffix("List"))
                else {
                    return self.object(place, kind.as_deref(), Value::Object(object));
                };
                let Some(Value::Array(items)) = object.remove("items") else {
                    return self.unreadable(place, "items: a list without items");
                };
                for (index, item) in items.into_iter().enumerate() {
                    let place = Place { item: Some(index + 1), ..place.clone() };
                    // Items of a typed list do not repeat their kind.
                    let own = item.get("kind").and_then(Value::as_str).map(str::to_owned);
                    let kind =
                        own.as_deref().or_else(|| Some(item_kind).filter(|kind| !kind.is_empty()));
                    self.object(&place, kind, item);
                }
            }
            Ok(_) => self.unreadable(place, "not a Kubernetes object"),
            Err(message) => self.unreadable(place, message),
        }
    }

    fn object(&mut self, place: &Place, kind: Option<&str>, value: Value) {
        match kind {
            None => self.unreadable(place, "kind: missing"),
            Some("Service") => {
                if let Some(mut service) = self.typed::<api::Service>(place, "Service", value) {
                    default_namespace(&mut service.metadata);
                    let mut read = Service::read(&service);
                    if lacks_cluster_ip(&service) {
                        read.problems.push(Problem {
                            object: format!(
                                "Service {}/{}",
                                service.metadata.namespace, service.metadata.name
                            ),
                            field: "spec.clusterIP".to_owned(),
                            message: "not set, and only an API server assigns one: the Service is ignored"
                                .to_owned(),
                        });
                    }
                    self.add(place, "Service", &service.metadata, read, Content::Service);
                }
            }
            Some("EndpointSlice") => {
                let kind = "EndpointSlice";
                if let Some(mut slice) = self.typed::<api::EndpointSlice>(place, kind, value) {
                    default_namespace(&mut slice.metadata);
                    let read = EndpointSlice::read(&slice);
                    self.add(place, kind, &slice.metadata, read, Content::EndpointSlice);
                }
            }
            Some("Node") => {
                if let Some(node) = self.typed::<api::Node>(place, "Node", value) {
                    let metadata = node.metadata.clone();
                    let read = Read { value: Some(Box::new(node)), problems: Vec::new() };
                    let content = |node: Option<_>| Content::Node(node.unwrap_or_default());
                    self.add(place, "Node", &metadata, read, content);
                }
            }
            Some("ServiceCIDR") => {
                if let Some(range) = self.typed::<api::ServiceCidr>(place, "ServiceCIDR", value) {
                    let read = read_service_cidr(&range);
                    let content = |nets: Option<_>| Content::ServiceCidr(nets.unwrap_or_default());
                    self.add(place, "ServiceCIDR", &range.metadata, read, content);
                }
            }
            // A manifest may well hold Deployments and the like.
            Some(_) => {}
        }
    }

    fn typed<T: DeserializeOwned>(&mut self, place: &Place, kind: &str, value: Value) -> Option<T> {
        let name =
            value.pointer("/metadata/name").and_then(Value::as_str).unwrap_or("?").to_owned();
        match serde_path_to_error::deserialize(value) {
            Ok(object) => Some(object),
            Err(error) => {
                let path = error.path().to_string();
                let message = format!("{kind} {name}: {path}: {}", error.into_inner());
                self.unreadable(place, message);
                None
            }
        }
    }

    fn add<T>(
        &mut self,
        place: &Place,
        kind: &'static str,
        metadata: &api::Metadata,
        read: Read<T>,
        content: impl FnOnce(Option<T>) -> Content,
    ) {
        for problem in read.problems {
            self.problem(place, problem.to_string(), false);
        }
        let (namespace, name) = (metadata.namespace.clone(), metadata.name.clone());
        let entry = Entry { place: place.clone(), content: content(read.value) };
        self.insert(Identity { kind, namespace, name }, entry);
    }

    fn insert(&mut self, identity: Identity, entry: Entry) {
        if let Some(known) = self.objects.get(&identity) {
            let Identity { kind, namespace, name } = &identity;
            let slash = if namespace.is_empty() { "" } else { "/" };
            let message = format!(
                "{kind} {namespace}{slash}{name}: already in {}: this one is ignored",
                known.place
            );
            self.problem(&entry.place, message, false);
        } else {
            self.objects.insert(identity, entry);
        }
    }

    fn unreadable(&mut self, place: &Place, message: impl Into<String>) {
        self.problem(place, message.into(), true);
    }

    fn problem(&mut self, place: &Place, message: String, unreadable: bool) {
        self.problems.push(ManifestProblem { place: place.clone(), message, unreadable });
    }
}

/// The documents of a YAML stream with the number of lines before each. Cut before parsing, so that
/// a broken document does not take the following ones along.
fn documents(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let is_marker = |line: &str| {
        line.strip_prefix("---")
            .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
    };
    let mut cuts = vec![(0, 0)];
    let mut offset = 0;
    for (number, line) in text.split_inclusive('\n').enumerate() {
        if is_marker(line) {
            cuts.push((number, offset));
        }
        offset += line.len();
    }
    let ends =
        cuts.iter().skip(1).map(|(_, offset)| *offset).chain([text.len()]).collect::<Vec<_>>();
    let pieces = cuts
        .into_iter()
        .zip(ends)
        .map(|((line, start), end)| (line, text.get(start..end).unwrap_or_default()));
    pieces.filter(|(_, piece)| {
        piece.lines().any(|line| {
            let line = line.trim_start_matches("---").trim();
            !line.is_empty() && !line.starts_with('#')
        })
    })
}

/// An error with the line counted from the start of the file.
fn in_file(error: &yaml_serde::Error, lines_before: usize) -> String {
    let text = error.to_string();
    let Some(location) = error.location() else { return text };
    let (line, column) = (location.line(), location.column());
    let what = text.replace(&format!(" at line {line} column {column}"), "");
    format!("line {} column {column}: {what}", line + lines_before)
}

// K8S: kubectl puts objects without a namespace into `default`.
fn default_namespace(metadata: &mut api::Metadata) {
    if metadata.namespace.is_empty() {
        "default".clone_into(&mut metadata.namespace);
    }
}

fn lacks_cluster_ip(service: &api::Service) -> bool {
    service.spec.service_type.as_deref() != Some("ExternalName")
        && service.spec.cluster_ip.is_empty()
        && service.spec.cluster_ips.iter().all(String::is_empty)
}

fn read_service_cidr(range: &api::ServiceCidr) -> Read<Vec<IpNet>> {
    let mut problems = Vec::new();
    let mut nets = Vec::new();
    for (index, text) in range.spec.cidrs.iter().enumerate() {
        match parse_net(text) {
            Some((net, _)) => nets.push(net),
            None => problems.push(Problem {
                object: format!("ServiceCIDR {}", range.metadata.name),
                field: format!("spec.cidrs[{index}]"),
                message: format!("{text:?} is not a CIDR: skipped"),
            }),
        }
    }
    Read { value: Some(nets), problems }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(manifest: &Manifest) -> Vec<String> {
        manifest.problems.iter().map(ToString::to_string).collect()
    }

    const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: cart, namespace: shop}\n\
        spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}\n";

    #[test]
    fn a_broken_document_costs_only_itself() {
        let text = format!(
            "{SERVICE}---\nkind: Service\nspec: [oops\n---\n# only a comment\n--- \n{}",
            SERVICE.replace("cart", "dns")
        );
        let manifest = Manifest::parse("a.yaml", &text);
        let names: Vec<_> = manifest.services().map(|it| it.name().to_string()).collect();
        assert_eq!(names, ["shop/cart", "shop/dns"]);
        assert!(manifest.is_damaged());
        let [problem] = &*problems(&manifest) else { panic!("{:?}", manifest.problems) };
        assert!(problem.starts_with("a.yaml, document 2: line "), "{problem}");
    }

    #[test]
    fn a_field_of_the_wrong_type_is_named() {
        let text = SERVICE.replace("port: 80", "port: eighty");
        let manifest = Manifest::parse("a.yaml", &text);
        assert_eq!(
            problems(&manifest),
            [
                "a.yaml, document 1: Service cart: spec.ports[0].port: invalid type: string \"eighty\", \
              expected i64"
            ]
        );
    }

    #[test]
    fn lists_are_read_as_kubectl_prints_them() {
        let list = r#"{"kind": "List", "apiVersion": "v1", "items": [
                {"kind": "Service", "metadata": {"name": "a", "creationTimestamp": null},
                  "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 65536}]}},
                {"kind": "Deployment"}, {"metadata": {}},
                {"kind": "EndpointSlice", "addressType": "IPv4", "endpoints": null, "ports": null,
                  "metadata": {"name": "a-1", "labels": {"kubernetes.io/service-name": "a"}}},
                {"kind": "Node", "metadata": {"name": "n"}}]}"#;
        let manifest = Manifest::parse("-", list);
        assert_eq!(manifest.services().count(), 1);
        assert_eq!(manifest.slices().next().unwrap().service().as_str(), "default/a");
        assert_eq!(manifest.nodes().count(), 1);
        assert_eq!(
            problems(&manifest),
            [
                "-, document 1, item 1: Service default/a: spec.ports[0].port: 65536 is not a port \
                 number (1-65535): the port is skipped",
                "-, document 1, item 3: kind: missing",
            ]
        );
    }

    #[test]
    fn the_first_of_two_objects_with_one_name_counts() {
        let mut manifest = Manifest::parse("a.yaml", SERVICE);
        manifest.merge(Manifest::parse("b.yaml", &SERVICE.replace("10.96.0.1", "10.96.0.2")));
        let ip = manifest.services().next().unwrap().cluster_ip(crate::Family::V4);
        assert_eq!(ip.unwrap().to_string(), "10.96.0.1");
        assert_eq!(
            problems(&manifest),
            [
                "b.yaml, document 1: Service shop/cart: already in a.yaml, document 1: this one is ignored"
            ]
        );
    }

    #[test]
    fn a_service_without_cluster_ip_is_explained() {
        let text = SERVICE.replace("clusterIP: 10.96.0.1, ", "");
        let manifest = Manifest::parse("a.yaml", &text);
        assert_eq!(manifest.services().count(), 0);
        assert!(problems(&manifest)[0].contains("only an API server assigns one"));
    }

    #[test]
    fn what_a_damaged_file_said_before_stays() {
        let good =
            Manifest::parse("a.yaml", &format!("{SERVICE}---\n{}", SERVICE.replace("cart", "dns")));
        let mut bad = Manifest::parse("a.yaml", &format!("{SERVICE}---\nkind: [\n"));
        assert_eq!(bad.services().count(), 1);
        bad.fall_back(&good);
        assert_eq!(bad.services().count(), 2);
    }
}
