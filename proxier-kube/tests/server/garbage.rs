//! Objects with anything anywhere in them never stop the rest.

use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};
use proxier_kube::Kind;
use serde_json::{Value, json};

use super::rig::{Rig, node, options, server, service};

/// Sound objects with every field that is read.
fn sound() -> [Value; 4] {
    let meta = |name: &str, labels: Value| {
        json!({"name": name, "namespace": "shop", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z",
            "deletionTimestamp": null, "labels": labels, "annotations": {"a": "b",
                "endpoints.kubernetes.io/last-change-trigger-time": "2026-01-01T00:00:00Z"}})
    };
    [
        json!({"kind": "Service", "metadata": meta("any", json!({"app": "x"})),
            "spec": {"type": "LoadBalancer", "clusterIP": "10.96.9.9",
                "clusterIPs": ["10.96.9.9", "fd00::9"], "ipFamilies": ["IPv4", "IPv6"],
                "ports": [{"name": "web", "protocol": "TCP", "port": 80, "nodePort": 30080,
                    "targetPort": "http", "appProtocol": "http"}],
                "externalIPs": ["192.0.2.7"], "loadBalancerSourceRanges": ["198.51.100.0/24"],
                "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
                "externalTrafficPolicy": "Local", "internalTrafficPolicy": "Cluster",
                "healthCheckNodePort": 32000, "trafficDistribution": "PreferClose"},
            "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.9", "ipMode": "VIP"}]}}}),
        json!({"kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": meta("any-1", json!({"kubernetes.io/service-name": "any"})),
            "endpoints": [{"addresses": ["10.61.9.1"], "nodeName": "node-a", "zone": "z",
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "hints": {"forZones": [{"name": "z"}], "forNodes": [{"name": "node-a"}]}}],
            "ports": [{"name": "web", "protocol": "TCP", "port": 8080}]}),
        json!({"kind": "Node",
            "metadata": {"name": "node-a", "labels": {"topology.kubernetes.io/zone": "z"},
                "deletionTimestamp": null},
            "spec": {"podCIDR": "10.61.0.0/24", "podCIDRs": ["10.61.0.0/24"],
                "taints": [{"key": "k", "value": "v", "effect": "NoSchedule"}]},
            "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}}),
        json!({"kind": "ServiceCIDR", "metadata": {"name": "more"},
            "spec": {"cidrs": ["10.97.0.0/16"]}}),
    ]
}

fn values() -> Vec<Value> {
    let long = "x".repeat(5000);
    vec![
        json!(null),
        json!(true),
        json!(-1),
        json!(65536),
        json!(1e300),
        json!(0),
        json!(""),
        json!("\u{0}"),
        json!("::"),
        json!("a/b"),
        json!("999.1.1.1/99"),
        json!(long),
        json!([]),
        json!([null]),
        json!([[]]),
        json!({}),
        json!({"a": [{}]}),
    ]
}

/// Where there is something in an object; its kind is left alone, or it would be another.
fn places(object: &Value, at: &str, found: &mut Vec<String>) {
    let inner: Vec<(String, &Value)> = match object {
        Value::Object(map) => map.iter().map(|(key, it)| (key.replace('/', "~1"), it)).collect(),
        Value::Array(list) => {
            list.iter().enumerate().map(|(index, it)| (index.to_string(), it)).collect()
        }
        Value::Bool(_) | Value::Null | Value::Number(_) | Value::String(_) => Vec::new(),
    };
    for (key, value) in inner {
        let place = format!("{at}/{key}");
        if place != "/kind" {
            places(value, &place, found);
            found.push(place);
        }
    }
}

/// A sound object with each of these places set to one of the values, or removed after the last.
fn mutated(object: &Value, changes: &[(usize, usize)]) -> Value {
    let mut object = object.clone();
    let values = values();
    for (place, value) in changes {
        let mut all = Vec::new();
        places(&object, "", &mut all);
        if all.is_empty() {
            break;
        }
        let place = &all[place % all.len()];
        match values.get(value % (values.len() + 1)) {
            Some(value) => *object.pointer_mut(place).unwrap() = value.clone(),
            None => remove(&mut object, place),
        }
    }
    object
}

fn remove(object: &mut Value, place: &str) {
    let (parent, key) = place.rsplit_once('/').unwrap();
    match object.pointer_mut(parent).unwrap() {
        Value::Object(map) => drop(map.remove(&key.replace("~1", "/"))),
        Value::Array(list) => drop(list.remove(key.parse::<usize>().unwrap())),
        Value::Bool(_) | Value::Null | Value::Number(_) | Value::String(_) => {}
    }
}

/// Every place with every value, one at a time.
fn single_mutations() -> Vec<Value> {
    let mut found = Vec::new();
    for object in sound() {
        let mut all = Vec::new();
        places(&object, "", &mut all);
        for place in 0..all.len() {
            found.extend((0..=values().len()).map(|value| mutated(&object, &[(place, value)])));
        }
    }
    assert!(found.len() > 1500, "only {}", found.len());
    found
}

fn lists(rig: &Rig) -> Vec<u64> {
    Kind::ALL.iter().map(|kind| rig.status.borrow().of(*kind).counts.lists).collect()
}

#[tokio::test]
async fn every_field_spoiled_in_every_way_stops_nothing_in_watches() {
    let rig = Rig::start(server().await, true);
    rig.until_equal().await;
    for object in single_mutations() {
        rig.server.apply(object);
    }
    rig.server.apply(service("marker", "10.96.8.8"));
    rig.server.apply(node("192.0.2.9"));
    rig.until_equal().await;
    let address = ["192.0.2.9".parse::<std::net::IpAddr>().unwrap()];
    rig.until("the node's address", |rig| rig.store.lock().unwrap().env().ips == address).await;
    assert!(rig.services().iter().any(|it| it.name().name() == "marker"));
    assert_eq!(lists(&rig), [1; 4], "no list because of an object");
}

#[tokio::test]
async fn every_field_spoiled_in_every_way_stops_nothing_in_lists() {
    for streaming in [true, false] {
        let server = server().await;
        for (index, mut object) in single_mutations().into_iter().enumerate() {
            let is_node = object["kind"] == "Node";
            let name = object.pointer_mut("/metadata/name");
            // One node is watched; all others are objects of their own, as far as they have a name.
            if let Some(name) = name.filter(|it| it.is_string() && !is_node) {
                *name = json!(format!("any-{index}"));
            }
            server.apply(object);
        }
        server.apply(service("marker", "10.96.8.8"));
        let mut options = options(streaming);
        options.page_size = 100;
        options.node_patience = std::time::Duration::from_millis(100);
        let rig = Rig::start_with(server, "node-a", options);
        rig.until("the start", |rig| rig.status.borrow().started).await;
        rig.until_equal().await;
        assert!(rig.services().iter().any(|it| it.name().name() == "marker"));
        assert!(rig.status.borrow().troubles().next().is_none());
    }
}

#[test]
fn any_mixture_of_spoiled_objects_stops_nothing() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let rig = runtime.block_on(async {
        let rig = Rig::start(server().await, true);
        rig.until_equal().await;
        rig
    });
    let change = (any::<usize>(), any::<usize>());
    let object = (0..4_usize, prop::collection::vec(change, 1..4));
    let batch = prop::collection::vec(object, 1..40);
    let mut runner =
        TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(48) });
    let round = std::cell::Cell::new(0_u8);
    let outcome = runner.run(&batch, |batch| {
        round.set(round.get().wrapping_add(1));
        runtime.block_on(async {
            for (kind, changes) in &batch {
                rig.server.apply(mutated(&sound()[*kind], changes));
            }
            rig.server.apply(service("marker", &format!("10.96.8.{}", round.get())));
            rig.until_equal().await;
        });
        prop_assert_eq!(lists(&rig), [1; 4]);
        Ok(())
    });
    outcome.unwrap();
}
