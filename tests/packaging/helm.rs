//! What Helm makes of the chart. Runs where `DOMICILE_HELM` names the program, as `make test` does.

use std::collections::BTreeMap;
use std::process::Command;

use serde_json::Value;

use super::{documents, kustomize, names, path, read};

/// The program, or nothing if these tests aren't asked for. Asked for and missing is a failure.
fn program() -> Option<String> {
    let Ok(program) = std::env::var("DOMICILE_HELM") else {
        eprintln!("skipped: DOMICILE_HELM names no helm");
        return None;
    };
    let version = Command::new(&program).args(["version", "--short"]).output();
    assert!(
        version.is_ok_and(|output| output.status.success()),
        "DOMICILE_HELM={program} is no helm that runs: give the path of one, or unset it to leave out these tests"
    );
    Some(program)
}

/// Runs Helm: its output, or its complaint.
fn helm(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .expect("helm runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(text(&output.stderr))
    }
}

fn template(program: &str, settings: &[&str]) -> Result<Vec<Value>, String> {
    let chart = path("charts/domicile").display().to_string();
    let mut arguments = vec![
        "template",
        "domicile",
        &chart,
        "--namespace",
        "domicile-system",
    ];
    for setting in settings {
        arguments.extend(["--set", setting]);
    }
    helm(program, &arguments).map(|text| documents(&text))
}

fn key(object: &Value) -> String {
    format!("{} {}", object["kind"], object["metadata"]["name"])
}

/// By kind and name, without what tells who installed it.
fn objects(objects: Vec<Value>) -> BTreeMap<String, Value> {
    let comparable = objects.into_iter().map(|mut object| {
        let metadata = &mut object["metadata"];
        if let Some(labels) = metadata["labels"].as_object_mut() {
            for label in [
                "helm.sh/chart",
                "app.kubernetes.io/managed-by",
                "app.kubernetes.io/version",
            ] {
                labels.remove(label);
            }
        }
        if let Some(annotations) = metadata["annotations"].as_object_mut() {
            annotations.remove("helm.sh/resource-policy");
        }
        if let Some(metadata) = metadata.as_object_mut() {
            metadata.retain(|_, v| !v.is_null() && v.as_object().is_none_or(|o| !o.is_empty()));
        }
        (key(&object), object)
    });
    comparable.collect()
}

#[test]
fn the_chart_passes_lint() {
    let Some(program) = program() else { return };
    let chart = path("charts/domicile").display().to_string();
    if let Err(complaint) = helm(&program, &["lint", "--strict", &chart]) {
        panic!("{complaint}");
    }
}

#[test]
fn config_is_what_the_chart_makes_of_its_defaults() {
    let Some(program) = program() else { return };
    let chart = objects(template(&program, &[]).expect("the defaults"));
    let mut config = objects(kustomize("config"));
    config
        .remove("\"Namespace\" \"domicile-system\"")
        .expect("config brings the namespace along");
    for (name, object) in &chart {
        assert_eq!(config.get(name), Some(object), "{name}");
    }
    assert_eq!(chart.len(), config.len(), "config has more than the chart");
}

#[test]
fn definitions_are_upgraded_and_never_removed() {
    let Some(program) = program() else { return };
    let with = template(&program, &[]).expect("the defaults");
    let definitions: Vec<&Value> = with
        .iter()
        .filter(|o| o["kind"] == "CustomResourceDefinition")
        .collect();
    assert_eq!(definitions.len(), names("crds", ".yaml").len());
    for definition in definitions {
        assert_eq!(
            definition["metadata"]["annotations"]["helm.sh/resource-policy"],
            "keep"
        );
    }
    let without = template(&program, &["crds.install=false"]).expect("without definitions");
    assert!(
        without
            .iter()
            .all(|o| o["kind"] != "CustomResourceDefinition")
    );
}

#[test]
fn switches_leave_out_what_they_say() {
    let Some(program) = program() else { return };
    let all = template(&program, &[]).expect("the defaults");
    for (setting, gone) in [
        (
            "admission.enabled=false",
            &[
                "ValidatingAdmissionPolicy",
                "ValidatingAdmissionPolicyBinding",
            ][..],
        ),
        ("serviceAccount.create=false", &["ServiceAccount"][..]),
        (
            "podDisruptionBudget.create=false",
            &["PodDisruptionBudget"][..],
        ),
        ("networkPolicy.enabled=false", &["NetworkPolicy"][..]),
    ] {
        for kind in gone {
            assert!(all.iter().any(|o| o["kind"] == *kind), "{kind}");
            let rest = template(&program, &[setting]).expect("a switch");
            assert!(rest.iter().all(|o| o["kind"] != *kind), "{setting}: {kind}");
        }
    }
    let unguarded = template(&program, &["admission.guardNodeLabels=false"]).expect("a switch");
    let has = |objects: &[Value], name: &str| objects.iter().any(|o| o["metadata"]["name"] == name);
    for name in ["domicile-node-labels", "domicile-node-witnesses"] {
        assert!(has(&all, name) && !has(&unguarded, name), "{name}");
    }
    assert!(has(&unguarded, "domicile-node-stamp") && has(&unguarded, "domicile-binding"));
    let monitored = template(
        &program,
        &["serviceMonitor.enabled=true", "serviceMonitor.interval=30s"],
    );
    assert!(
        monitored
            .expect("a monitor")
            .iter()
            .any(|o| o["kind"] == "ServiceMonitor")
    );
    let alerting = template(&program, &["prometheusRule.enabled=true"]).expect("alerts");
    let rules = alerting.iter().find(|o| o["kind"] == "PrometheusRule");
    let rules = rules.expect("a PrometheusRule")["spec"]["groups"][0]["rules"].clone();
    for rule in rules.as_array().expect("rules") {
        for (text, holds) in [
            (&rule["expr"], "domicile_"),
            (&rule["annotations"]["summary"], ""),
            (&rule["annotations"]["runbook"], "."),
        ] {
            let text = text.as_str().unwrap_or_default();
            assert!(!text.is_empty() && text.contains(holds), "{rule}");
        }
    }
    assert!(all.iter().all(|o| o["kind"] != "PrometheusRule"));
}

#[test]
fn every_setting_arrives() {
    let Some(program) = program() else { return };
    let made = template(
        &program,
        &[
            "image.repository=registry.example/domicile",
            "image.digest=sha256:0000000000000000000000000000000000000000000000000000000000000000",
            "imagePullSecrets[0].name=pull",
            "logLevel=debug",
            "priorityClassName=system-cluster-critical",
            "tolerations[0].operator=Exists",
            "podLabels.a=b",
            "podAnnotations.c=d",
            "topologySpreadConstraints[0].maxSkew=1",
            "affinity.nodeAffinity.x=y",
            "replicas=1",
        ],
    )
    .expect("all of these are allowed");
    let deployment = made
        .iter()
        .find(|o| o["kind"] == "Deployment")
        .expect("a Deployment");
    let pod = &deployment["spec"]["template"];
    let container = &pod["spec"]["containers"][0];
    let image = "registry.example/domicile@sha256:0000000000000000000000000000000000000000000000000000000000000000";
    assert_eq!(container["image"], image);
    assert_eq!(container["env"][0]["value"], image);
    assert_eq!(pod["spec"]["imagePullSecrets"][0]["name"], "pull");
    assert_eq!(container["env"][3]["value"], "debug");
    assert_eq!(pod["spec"]["priorityClassName"], "system-cluster-critical");
    assert_eq!(pod["spec"]["tolerations"][0]["operator"], "Exists");
    assert_eq!(pod["metadata"]["labels"]["a"], "b");
    assert_eq!(pod["metadata"]["annotations"]["c"], "d");
    assert_eq!(pod["spec"]["topologySpreadConstraints"][0]["maxSkew"], 1);
    assert_eq!(pod["spec"]["affinity"]["nodeAffinity"]["x"], "y");
    assert_eq!(deployment["spec"]["replicas"], 1);
}

#[test]
fn a_misspelt_value_is_refused() {
    let Some(program) = program() else { return };
    for setting in [
        "replica=3",
        "image.tags=x",
        "admission.enable=false",
        "replicas=many",
        "crds.install=nope",
    ] {
        let complaint = template(&program, &[setting]).expect_err(setting);
        assert!(complaint.contains("schema"), "{setting}: {complaint}");
    }
}

#[test]
fn nothing_is_left_of_the_templates_in_what_is_installed() {
    let Some(program) = program() else { return };
    let chart = path("charts/domicile").display().to_string();
    let text =
        helm(&program, &["template", "x", &chart, "--namespace", "y"]).expect("another name");
    assert!(!text.contains("{{") && !text.contains("<no value>"));
    // Everything with a namespace says which, so that the output can be applied as it is.
    for object in documents(&text) {
        let scoped = [
            "ClusterRole",
            "ClusterRoleBinding",
            "CustomResourceDefinition",
        ];
        let kind = object["kind"].as_str().unwrap_or_default();
        if !scoped.contains(&kind) && !kind.starts_with("ValidatingAdmission") {
            assert_eq!(object["metadata"]["namespace"], "y", "{}", key(&object));
        }
    }
    assert!(read("charts/domicile/templates/NOTES.txt").contains("config/samples/10-regions.yaml"));
}
