//! Generators of random clusters, for property tests of backends.
//!
//! Everything comes from a small universe, so that changes hit the same objects again and again and
//! Services collide.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
};

use proptest::{
    collection::vec,
    option, prop_oneof,
    sample::{select, subsequence},
    strategy::{BoxedStrategy, Just, Strategy},
};

use super::Fault;
use crate::{
    model::{
        DetectLocal, EndpointSlice, Event, NodeEnv, NodePortAddresses, Object, ObjectKey, Service,
        api,
    },
    name::ObjectName,
};

/// The node that random clusters are proxied on.
pub const NODE: &str = "tern";

fn service_names() -> impl Strategy<Value = String> {
    select(&["cart", "dns", "edge", "feed", "gate"][..]).prop_map(str::to_owned)
}

fn protocols() -> impl Strategy<Value = String> {
    prop_oneof![4 => Just("TCP"), 3 => Just("UDP"), 1 => Just("SCTP")].prop_map(str::to_owned)
}

fn policy() -> impl Strategy<Value = Option<String>> {
    option::of(select(&["Cluster", "Local"][..]).prop_map(str::to_owned))
}

/// Annotations that say how connections are spread.
fn service_annotations() -> impl Strategy<Value = BTreeMap<String, String>> {
    (
        option::weighted(0.3, select(&["random", "round-robin", "source-hash"][..])),
        option::weighted(
            0.2,
            select(&["10.61.3.1=2,10.61.3.2=6", "10.61.0.0/16=3,fd41::/16=0"][..]),
        ),
    )
        .prop_map(|(balance, weights)| {
            let named = [("balance", balance), ("endpoint-weights", weights)];
            let given = named.into_iter().filter_map(|(name, value)| {
                Some((format!("proxier.dev/{name}"), value?.to_owned()))
            });
            given.collect()
        })
}

/// A Service in namespace `shop`, with one of five names and addresses that others may want too.
pub fn service() -> BoxedStrategy<api::Service> {
    tuned_service()
        .prop_map(|mut service| {
            service.metadata.annotations.clear();
            service
        })
        .boxed()
}

/// The same with annotations that say how connections are spread, which not every mode can follow.
pub fn tuned_service() -> BoxedStrategy<api::Service> {
    let ports = subsequence(vec!["web", "dns", "alt"], 1..=3).prop_flat_map(|names| {
        let port = |name: &'static str| {
            (
                protocols(),
                select(&[53_i64, 80, 443][..]),
                option::of(select(&[30_080_i64, 30_081][..])),
            )
                .prop_map(move |(protocol, port, node_port)| api::ServicePort {
                    name: name.to_owned(),
                    protocol,
                    port,
                    node_port: node_port.unwrap_or(0),
                })
        };
        names.into_iter().map(port).collect::<Vec<_>>()
    });
    let kinds = select(&["ClusterIP", "NodePort", "LoadBalancer"][..]).prop_map(str::to_owned);
    let identity = (service_names(), 0_u8..3, kinds);
    let addresses = (
        select(&[1_u8, 2, 3][..]),
        option::of(Just("198.51.100.7".to_owned())),
        option::of(Just("203.0.113.7".to_owned())),
    );
    let policies = (policy(), policy(), option::weighted(0.2, 1_i64..7200), option::of(0_u8..3));
    (identity, ports, addresses, policies, service_annotations())
        .prop_map(|((name, age, kind), ports, (ip, external, vip), policies, annotations)| {
            let (external_policy, internal_policy, affinity, ranges) = policies;
            let index = name.len();
            api::Service {
                metadata: api::Metadata {
                    creation_timestamp: Some(format!("2026-01-0{}T00:00:00Z", age + 1)),
                    annotations,
                    ..metadata(&name)
                },
                spec: api::ServiceSpec {
                    service_type: Some(kind),
                    cluster_ip: format!("10.96.{index}.{ip}"),
                    cluster_ips: vec![
                        format!("10.96.{index}.{ip}"),
                        format!("fd41:97::{index}:{ip}"),
                    ],
                    ip_families: vec!["IPv4".to_owned(), "IPv6".to_owned()],
                    ports,
                    external_ips: external.into_iter().collect(),
                    load_balancer_source_ranges: match ranges {
                        Some(0) => vec!["192.0.2.48/28".to_owned()],
                        Some(1) => vec!["192.0.2.0/24".to_owned(), "172.20.7.0/24".to_owned()],
                        _ => Vec::new(),
                    },
                    session_affinity: affinity.map(|_| "ClientIP".to_owned()),
                    session_affinity_config: affinity.map(|seconds| api::SessionAffinityConfig {
                        client_ip: Some(api::ClientIpConfig { timeout_seconds: Some(seconds) }),
                    }),
                    external_traffic_policy: external_policy,
                    internal_traffic_policy: internal_policy,
                    health_check_node_port: 32_000,
                },
                status: api::ServiceStatus {
                    load_balancer: api::LoadBalancerStatus {
                        ingress: vip
                            .into_iter()
                            .map(|ip| api::LoadBalancerIngress { ip, ip_mode: None })
                            .collect(),
                    },
                },
            }
        })
        .boxed()
}

/// An EndpointSlice of one of the Services of [`service`].
pub fn slice() -> BoxedStrategy<api::EndpointSlice> {
    tuned_slice()
        .prop_map(|mut slice| {
            slice.metadata.annotations.clear();
            slice
        })
        .boxed()
}

/// The same, sometimes with a weight, which not every mode can follow.
pub fn tuned_slice() -> BoxedStrategy<api::EndpointSlice> {
    let endpoint =
        (1_u8..6, option::of(select(&[NODE, "heron"][..])), 0_u8..6, option::of(0_u8..3));
    let weight = option::weighted(0.2, select(&["0", "1", "3", "4"][..]));
    (service_names(), 0_u8..2, select(&["IPv4", "IPv6"][..]), vec(endpoint, 0..4), weight)
        .prop_map(|(service, part, family, endpoints, weight)| {
            let is_v4 = family == "IPv4";
            let port = |name: &str, protocol: &str, port| api::EndpointPort {
                name: Some(name.to_owned()),
                protocol: protocol.to_owned(),
                port: Some(port),
            };
            let endpoints = endpoints.into_iter().map(|(host, node, state, hint)| api::Endpoint {
                addresses: vec![if is_v4 {
                    Ipv4Addr::new(10, 61, 3, host).to_string()
                } else {
                    Ipv6Addr::new(0xfd41, 0x61, 0, 3, 0, 0, 0, host.into()).to_string()
                }],
                node_name: node.map(str::to_owned),
                conditions: api::EndpointConditions {
                    ready: Some(state < 4),
                    serving: Some(state != 5),
                    terminating: Some(state >= 4),
                },
                hints: api::EndpointHints {
                    for_zones: hint
                        .map(|zone| api::Hint { name: format!("zone-{zone}") })
                        .into_iter()
                        .collect(),
                    for_nodes: Vec::new(),
                },
            });
            let mut metadata = metadata(&format!("{service}-{family}-{part}").to_lowercase());
            metadata.labels.insert("kubernetes.io/service-name".to_owned(), service);
            let weight = weight.map(|weight| ("proxier.dev/weight".to_owned(), weight.to_owned()));
            metadata.annotations.extend(weight);
            let mut ports = Vec::new();
            for protocol in ["TCP", "UDP", "SCTP"] {
                ports.extend([
                    port("web", protocol, 8080),
                    port("dns", protocol, 5353),
                    port("alt", protocol, 9000),
                ]);
            }
            api::EndpointSlice {
                metadata,
                address_type: family.to_owned(),
                ports,
                endpoints: endpoints.collect(),
            }
        })
        .boxed()
}

/// The node and its settings.
pub fn node() -> BoxedStrategy<NodeEnv> {
    (0_u8..4, 0_u8..3, proptest::bool::ANY, proptest::bool::ANY)
        .prop_map(|(detector, zone, masquerade_all, restricted)| {
            let nets = |texts: &[&str]| {
                texts.iter().filter_map(|text| text.parse().ok()).collect::<Vec<_>>()
            };
            let addresses = ["127.0.0.1", "172.20.7.11", "10.61.3.254", "::1", "fd41:7::11"];
            NodeEnv {
                name: NODE.to_owned(),
                zone: format!("zone-{zone}"),
                ips: vec![Ipv4Addr::new(172, 20, 7, 11).into()],
                interface_addresses: addresses.iter().filter_map(|it| it.parse().ok()).collect(),
                detect_local: match detector {
                    0 => DetectLocal::None,
                    1 => DetectLocal::BridgeInterface("cni0".to_owned()),
                    _ => DetectLocal::ClusterCidr(nets(&["10.61.0.0/16", "fd41:61::/48"])),
                },
                masquerade_all,
                node_port_addresses: NodePortAddresses::Inside(if restricted {
                    nets(&["172.20.7.0/24"])
                } else {
                    Vec::new()
                }),
                ..NodeEnv::default()
            }
        })
        .boxed()
}

/// Something that happens.
pub fn event() -> BoxedStrategy<Event> {
    event_of(service(), slice())
}

fn event_of(
    services: BoxedStrategy<api::Service>,
    slices: BoxedStrategy<api::EndpointSlice>,
) -> BoxedStrategy<Event> {
    let name = |name: String| ObjectName::new("shop", &name);
    prop_oneof![
        6 => services.prop_map(|it| apply(Service::read(&it).value.map(Object::Service))),
        8 => slices.prop_map(|it| apply(EndpointSlice::read(&it).value.map(Object::EndpointSlice))),
        2 => service_names().prop_map(move |it| Event::Delete(ObjectKey::Service(name(it)))),
        2 => slice().prop_map(move |it| Event::Delete(ObjectKey::EndpointSlice(name(it.metadata.name)))),
        1 => node().prop_map(|env| Event::Node(Box::new(env))),
    ]
    .boxed()
}

/// A few events that come between two syncs.
pub fn burst() -> BoxedStrategy<Vec<Event>> {
    vec(event(), 1..6).boxed()
}

/// The same with [`tuned_service`] and [`tuned_slice`].
pub fn tuned_burst() -> BoxedStrategy<Vec<Event>> {
    vec(event_of(tuned_service(), tuned_slice()), 1..6).boxed()
}

/// What goes wrong with the commits of a history, one after the other: mostly nothing.
pub fn faults() -> BoxedStrategy<Vec<Option<Fault>>> {
    let fault =
        select(&[Fault::LoseReply, Fault::LoseRequest, Fault::StopHalfWay, Fault::Transport][..]);
    vec(option::weighted(0.2, fault), 0..24).boxed()
}

fn apply(object: Option<Object>) -> Event {
    let nothing = || Event::Delete(ObjectKey::Service(ObjectName::new("shop", "nothing")));
    object.map_or_else(nothing, Event::Apply)
}

fn metadata(name: &str) -> api::Metadata {
    api::Metadata {
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        ..api::Metadata::default()
    }
}
