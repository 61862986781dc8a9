//! Bad input: each mistake costs only itself, and is named with object and field.

use proxier::{
    Family,
    manifest::Manifest,
    model::{Event, NodeEnv, NodePortAddresses, Store},
};

/// A Service and its slice as a manifest, with one thing replaced.
fn shop(what: &str, by: &str) -> Manifest {
    let good = r"
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.1
  externalIPs: [198.51.100.7]
  loadBalancerSourceRanges: [192.0.2.0/24]
  ports:
  - {name: web, port: 80, nodePort: 30080}
  - {name: dns, port: 53, protocol: UDP}
status: {loadBalancer: {ingress: [{ip: 203.0.113.7}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: cart-1, namespace: shop, labels: {kubernetes.io/service-name: cart}}
addressType: IPv4
ports: [{name: web, port: 8080}, {name: dns, port: 5353, protocol: UDP}]
endpoints:
- {addresses: [10.61.3.21], nodeName: tern}
- {addresses: [10.61.4.22], nodeName: heron}
";
    assert!(good.contains(what), "{what}");
    Manifest::parse("shop.yaml", &good.replacen(what, by, 1))
}

/// What is programmed nevertheless: frontends and endpoints.
fn programmed(manifest: &Manifest) -> (usize, usize) {
    let mut store = Store::new(NodeEnv::default());
    store.apply(Event::Services(manifest.services().cloned().collect()));
    store.apply(Event::EndpointSlices(manifest.slices().cloned().collect()));
    store.take();
    store.fragments().fold((0, 0), |(frontends, endpoints), it| {
        (frontends + it.frontends.len(), endpoints + it.cluster.len())
    })
}

fn check(what: &str, by: &str, expected: (usize, usize), problem: &str) {
    let manifest = shop(what, by);
    let problems: Vec<_> = manifest.problems.iter().map(ToString::to_string).collect();
    assert_eq!(programmed(&manifest), expected, "{by}");
    if problem.is_empty() {
        assert_eq!(problems, [""; 0], "{by}");
    } else {
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems.concat().contains(problem), "{problems:?}\nshould say: {problem}");
    }
}

#[test]
fn good_input_has_no_problems() {
    check("LoadBalancer", "LoadBalancer", (7, 4), "");
}

#[test]
fn each_mistake_costs_only_itself() {
    let cart = "shop.yaml, document 1: Service shop/cart: ";
    let slice = "shop.yaml, document 2: EndpointSlice shop/cart-1: ";
    let in_cart = |field_and_text: &str| format!("{cart}{field_and_text}");
    let in_slice = |field_and_text: &str| format!("{slice}{field_and_text}");

    check("port: 80,", "port: 0,", (3, 2), &in_cart("spec.ports[0].port: 0 is not a port number"));
    check("port: 80,", "port: 65536,", (3, 2), &in_cart("spec.ports[0].port: 65536 is not a port"));
    check("nodePort: 30080", "nodePort: 70000", (6, 4), &in_cart("spec.ports[0].nodePort: 70000"));
    check(
        "protocol: UDP",
        "protocol: QUIC",
        (4, 2),
        &in_cart("spec.ports[1].protocol: unknown protocol \"QUIC\": expected TCP, UDP or SCTP"),
    );
    check(
        "name: dns, port: 53, protocol: UDP",
        "name: web, port: 81",
        (4, 2),
        &in_cart("spec.ports[1].name: \"web\"/TCP is already taken"),
    );
    check("198.51.100.7", "not-an-ip", (5, 4), &in_cart("spec.externalIPs[0]: \"not-an-ip\""));
    check(
        "192.0.2.0/24",
        "192.0.2.9/24",
        (7, 4),
        &in_cart(
            "spec.loadBalancerSourceRanges[0]: \"192.0.2.9/24\" has host bits set: read as 192.0.2.0/24",
        ),
    );
    check("203.0.113.7", "203.0.113", (5, 4), &in_cart("status.loadBalancer.ingress[0]"));
    check(
        "type: LoadBalancer",
        "type: LoadBalancer\n  externalTrafficPolicy: Locl",
        (7, 4),
        &in_cart("spec.externalTrafficPolicy: unknown policy \"Locl\": read as Cluster"),
    );
    check(
        "addresses: [10.61.3.21]",
        "addresses: []",
        (7, 2),
        &in_slice("endpoints[0].addresses: no address: the endpoint is skipped"),
    );
    check(
        "10.61.3.21",
        "fd41::1",
        (7, 2),
        &in_slice("endpoints[0].addresses: fd41::1 in a slice of IPv4: the endpoint is skipped"),
    );
    check("addressType: IPv4", "addressType: IPv5", (7, 0), &in_slice("addressType: \"IPv5\""));
    check("port: 8080", "port: 65536", (7, 2), &in_slice("ports[0].port: 65536"));
    check(
        "name: cart-1",
        &format!("name: {}", "x".repeat(300)),
        (7, 0),
        "metadata.name: 300 characters, at most 253: the object is ignored",
    );
    check(
        "name: cart,",
        &format!("name: {},", "x".repeat(300)),
        (0, 0),
        "metadata.name: 300 characters",
    );
    check("name: cart,", "name: \"a b\\nc\",", (0, 0), "is not a DNS name");
}

#[test]
fn unreadable_documents_are_told_from_wrong_fields() {
    let manifest = shop("port: 80,", "port: [80],");
    assert!(manifest.is_damaged());
    let message = manifest.problems[0].to_string();
    assert!(
        message.starts_with("shop.yaml, document 1: Service cart: spec.ports[0].port: "),
        "{message}"
    );
    assert!(!shop("port: 80,", "port: 0,").is_damaged());
    let manifest = shop("kind: Service", "kind: Service\n\tname: tab");
    assert!(manifest.problems[0].to_string().starts_with("shop.yaml, document 1: line "));
}

#[test]
fn lenient_addresses_are_read_and_printed_canonically() {
    let manifest = shop("10.61.3.21", "010.061.003.021");
    let slice = manifest.slices().next().unwrap();
    assert_eq!(slice.endpoints()[0].ip.to_string(), "10.61.3.21");
    assert_eq!(slice.family(), Family::V4);
}

#[test]
fn two_services_wanting_one_frontend_the_older_has_it() {
    let service = |name: &str, created: &str, ip: &str| {
        format!(
            "---\nkind: Service\nmetadata: {{name: {name}, namespace: shop, creationTimestamp: {created}}}\n\
             spec: {{clusterIP: {ip}, externalIPs: [198.51.100.7], ports: [{{port: 80}}]}}\n"
        )
    };
    let text = service("young", "2026-02-02T00:00:00Z", "10.96.0.1")
        + &service("old", "2026-01-01T00:00:00Z", "10.96.0.2");
    let manifest = Manifest::parse("a.yaml", &text);
    let mut store = Store::new(NodeEnv::default());
    store.apply(Event::Services(manifest.services().cloned().collect()));
    store.apply(Event::EndpointSlices(Vec::new()));
    store.take();
    let conflicts: Vec<_> = store.conflicts().map(|it| it.to_string()).collect();
    assert_eq!(
        conflicts,
        [
            "shop/young/TCP/IPv4: 198.51.100.7:80/TCP already belongs to shop/old/TCP/IPv4, which is older"
        ]
    );
    let frontends: Vec<_> = store.fragments().map(|it| it.frontends.len()).collect();
    assert_eq!(frontends, [2, 1]);
}

#[test]
fn node_port_addresses_are_checked() {
    let parse = |entries: &[&str]| NodePortAddresses::parse(entries);
    assert_eq!(parse(&["primary"]), Ok(NodePortAddresses::Primary));
    assert!(parse(&["primary", "10.0.0.0/8"]).unwrap_err().contains("cannot be combined"));
    assert!(parse(&["10.0.0.0/33"]).unwrap_err().contains("neither a CIDR"));
}
