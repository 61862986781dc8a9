//! What is in `deploy/` is what Kubernetes and systemd take.
#![expect(clippy::panic, reason = "any failure fails the test")]
#![expect(clippy::unwrap_used, reason = "any failure fails the test")]

use std::{collections::BTreeSet, fs, path::PathBuf};

use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{ConfigMap, ServiceAccount},
    rbac::v1::{ClusterRole, ClusterRoleBinding},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

fn read(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../deploy").join(name);
    fs::read_to_string(path).unwrap()
}

fn documents(name: &str) -> Vec<Value> {
    let text = read(name);
    yaml_serde::Deserializer::from_str(&text).map(|it| Value::deserialize(it).unwrap()).collect()
}

/// What of `given` the type did not take, as paths.
fn lost(given: &Value, taken: Option<&Value>, path: &str, found: &mut Vec<String>) {
    let Some(taken) = taken else { return found.push(path.to_owned()) };
    match (given, taken) {
        (Value::Object(given), Value::Object(_)) => {
            for (key, value) in given {
                lost(value, taken.get(key), &format!("{path}.{key}"), found);
            }
        }
        (Value::Array(given), Value::Array(_)) => {
            for (index, value) in given.iter().enumerate() {
                lost(value, taken.get(index), &format!("{path}[{index}]"), found);
            }
        }
        (given, taken) if given == taken => {}
        (given, taken) => found.push(format!("{path}: {given} became {taken}")),
    }
}

/// What the type does not know it drops; what it knows it prints again.
fn check<T: DeserializeOwned + Serialize>(file: &str, document: &Value) {
    let object: T =
        serde_json::from_value(document.clone()).unwrap_or_else(|error| panic!("{file}: {error}"));
    let again = serde_json::to_value(object).unwrap();
    let mut found = Vec::new();
    lost(document, Some(&again), "", &mut found);
    assert!(found.is_empty(), "{file}: unknown fields {found:?}");
}

const MANIFESTS: [&str; 3] = ["rbac.yaml", "configmap.yaml", "daemonset.yaml"];

#[test]
fn manifests_have_no_unknown_fields() {
    let mut kinds = BTreeSet::new();
    for file in MANIFESTS {
        for document in documents(file) {
            let kind = document["kind"].as_str().unwrap();
            match kind {
                "ClusterRole" => check::<ClusterRole>(file, &document),
                "ClusterRoleBinding" => check::<ClusterRoleBinding>(file, &document),
                "ConfigMap" => check::<ConfigMap>(file, &document),
                "DaemonSet" => check::<DaemonSet>(file, &document),
                "ServiceAccount" => check::<ServiceAccount>(file, &document),
                other => panic!("{file}: {other} is not checked"),
            }
            kinds.insert(kind.to_owned());
        }
    }
    assert_eq!(kinds.len(), 5, "{kinds:?}");
    // The check can fail.
    let mut wrong = documents("daemonset.yaml").remove(0);
    wrong["spec"]["template"]["spec"]["hostNetwrk"] = true.into();
    assert!(std::panic::catch_unwind(|| check::<DaemonSet>("wrong", &wrong)).is_err());
}

#[test]
fn the_role_grants_what_is_watched_and_no_more() {
    let role = documents("rbac.yaml").into_iter().find(|it| it["kind"] == "ClusterRole").unwrap();
    let granted: BTreeSet<(String, String)> = role["rules"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|rule| rule["verbs"].as_array().unwrap().contains(&"watch".into()))
        .flat_map(|rule| {
            let text = |field: &str| rule[field].as_array().unwrap().clone();
            let groups = text("apiGroups");
            text("resources").into_iter().flat_map(move |resource| {
                let resource = resource.as_str().unwrap().to_owned();
                let pairs = groups
                    .iter()
                    .map(move |group| (group.as_str().unwrap().to_owned(), resource.clone()));
                pairs.collect::<Vec<_>>()
            })
        })
        .collect();
    let watched =
        proxier_kube::Kind::ALL.map(|it| (it.group().to_owned(), it.resource().to_owned()));
    assert_eq!(granted, watched.into());
}

#[test]
fn names_agree_between_files() {
    let set = documents("daemonset.yaml").remove(0);
    let map = documents("configmap.yaml").remove(0);
    let role = documents("rbac.yaml");
    let pod = &set["spec"]["template"]["spec"];
    assert_eq!(pod["volumes"][0]["configMap"]["name"], map["metadata"]["name"]);
    let account = role.iter().find(|it| it["kind"] == "ServiceAccount").unwrap();
    assert_eq!(pod["serviceAccountName"], account["metadata"]["name"]);
    assert_eq!(set["metadata"]["namespace"], account["metadata"]["namespace"]);
    let mount = pod["containers"][0]["volumeMounts"][0]["mountPath"].as_str().unwrap();
    let files = map["data"].as_object().unwrap();
    let config = files.get("config.conf").unwrap().as_str().unwrap();
    assert!(config.contains(&format!("kubeconfig: {mount}/kubeconfig.conf")), "{config}");
    assert!(files.contains_key("kubeconfig.conf"));
    let args = serde_json::to_string(&pod["containers"][0]["args"]).unwrap();
    assert!(args.contains(&format!("--config={mount}/config.conf")), "{args}");
}

#[test]
fn alert_rules_have_the_shape_of_rules() {
    let rules = documents("alerts.yaml").remove(0);
    let groups = rules["groups"].as_array().unwrap();
    let rules: Vec<_> = groups.iter().flat_map(|it| it["rules"].as_array().unwrap()).collect();
    assert!(rules.len() > 3);
    for rule in rules {
        let known = ["alert", "annotations", "expr", "for", "labels"];
        let fields: Vec<_> = rule.as_object().unwrap().keys().collect();
        assert!(fields.iter().all(|it| known.contains(&it.as_str())), "{fields:?}");
        assert!(rule["alert"].is_string() && rule["expr"].is_string(), "{rule}");
        assert!(rule["annotations"]["summary"].is_string(), "{rule}");
        let severity = rule["labels"]["severity"].as_str().unwrap();
        assert!(["critical", "info", "warning"].contains(&severity), "{rule}");
    }
    let dashboard: Value = serde_json::from_str(&read("dashboard.json")).unwrap();
    assert!(dashboard["panels"].as_array().unwrap().len() > 5);
}
