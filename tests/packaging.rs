//! What people install is what the code needs: the chart, `config/` and the samples.
//!
//! The chart and `config/` carry the generated definitions; what both carry is the same; the operator's rights are
//! those that its code uses and no more; the samples are read in full, and those that are refused are refused in the
//! words of the operator. Needs no cluster. What needs Helm runs where `DOMICILE_HELM` names the program.

#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "a test that can't go on should say so and stop"
)]

#[path = "packaging/admission.rs"]
mod admission;
#[path = "packaging/helm.rs"]
mod helm;
#[path = "packaging/monitoring.rs"]
mod monitoring;
#[path = "packaging/rbac.rs"]
mod rbac;
#[path = "packaging/samples.rs"]
mod samples;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use clap::Args as _;
use serde_json::{Value, json};

/// A path in the repository.
fn path(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(relative)
}

fn read(relative: &str) -> String {
    fs::read_to_string(path(relative)).unwrap_or_else(|error| panic!("{relative}: {error}"))
}

/// The documents of a YAML stream.
fn documents(text: &str) -> Vec<Value> {
    text.split("\n---\n")
        .map(|document| document.strip_prefix("---\n").unwrap_or(document))
        .filter(|document| {
            document
                .lines()
                .any(|line| !line.is_empty() && !line.starts_with('#') && line != "---")
        })
        .map(|document| {
            serde_yaml::from_str(document).unwrap_or_else(|error| panic!("{error}:\n{document}"))
        })
        .collect()
}

/// The names of the files of a folder that end so, sorted.
fn names(folder: &str, ending: &str) -> Vec<String> {
    let entries = fs::read_dir(path(folder)).unwrap_or_else(|error| panic!("{folder}: {error}"));
    let mut names: Vec<String> = entries
        .map(|entry| {
            let entry = entry.expect("the folder is readable");
            entry.file_name().to_string_lossy().into_owned()
        })
        .filter(|name| name.ends_with(ending))
        .collect();
    names.sort();
    names
}

/// The documents of a kustomization and of those it names.
fn kustomize(folder: &str) -> Vec<Value> {
    let kustomization: Value = serde_yaml::from_str(&read(&format!("{folder}/kustomization.yaml")))
        .expect("a kustomization is YAML");
    let resources = kustomization["resources"].as_array().expect("resources");
    resources
        .iter()
        .flat_map(|resource| {
            let resource = format!("{folder}/{}", resource.as_str().expect("a name"));
            if path(&resource).is_dir() {
                kustomize(&resource)
            } else {
                documents(&read(&resource))
            }
        })
        .collect()
}

#[test]
fn chart_and_config_carry_the_generated_definitions() {
    let generated = names("crds", ".yaml");
    assert_eq!(generated.len(), 4);
    for copy in ["charts/domicile/files/crds", "config/crds"] {
        let mut there = names(copy, ".yaml");
        there.retain(|name| name != "kustomization.yaml");
        assert_eq!(there, generated, "{copy}: run `make generate`");
        for name in &generated {
            assert_eq!(
                read(&format!("{copy}/{name}")),
                read(&format!("crds/{name}")),
                "{copy}/{name} is not what the types generate: run `make generate`"
            );
        }
    }
    let listed: BTreeSet<String> = kustomize("config/crds")
        .iter()
        .filter_map(|crd| Some(crd["metadata"]["name"].as_str()?.to_owned()))
        .collect();
    assert_eq!(
        listed.len(),
        generated.len(),
        "config/crds/kustomization.yaml lists them all"
    );
}

/// The template adds an annotation there; elsewhere it would do nothing, or harm.
#[test]
fn the_chart_finds_the_metadata_of_a_definition() {
    for name in names("crds", ".yaml") {
        let text = read(&format!("crds/{name}"));
        assert_eq!(text.matches("\nmetadata:\n").count(), 1, "{name}");
        assert!(
            !text.contains("\n  annotations:"),
            "{name} has annotations of its own"
        );
    }
}

#[test]
fn chart_and_config_carry_the_same_admission_and_roles() {
    let mut admission = names("config/admission", ".yaml");
    admission.retain(|name| name != "kustomization.yaml");
    assert_eq!(
        names("charts/domicile/files/admission", ".yaml"),
        admission,
        "run `make generate`"
    );
    let mut pairs = vec![(
        "files/user-roles.yaml".to_owned(),
        "rbac/user-roles.yaml".to_owned(),
    )];
    for name in admission {
        assert!(
            read("config/admission/kustomization.yaml").contains(&format!("- {name}\n")),
            "{name}"
        );
        pairs.push((
            format!("files/admission/{name}"),
            format!("admission/{name}"),
        ));
    }
    for (chart, config) in pairs {
        assert_eq!(
            read(&format!("charts/domicile/{chart}")),
            read(&format!("config/{config}")),
            "charts/domicile/{chart} and config/{config} must be the same bytes"
        );
    }
}

fn find<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    objects
        .iter()
        .find(|object| object["kind"] == kind && object["metadata"]["name"] == name)
        .unwrap_or_else(|| panic!("no {kind} {name}"))
}

/// The variables set in the Deployment are those that the operator reads.
#[test]
fn the_operator_gets_the_environment_that_it_reads() {
    let command = domicile::operator::Args::augment_args(clap::Command::new("operator"));
    let mut known: BTreeSet<String> = command
        .get_arguments()
        .filter_map(|argument| Some(argument.get_env()?.to_string_lossy().into_owned()))
        .collect();
    known.insert("DOMICILE_LOG".to_owned());
    let objects = kustomize("config/manager");
    let deployment = find(&objects, "Deployment", "domicile-operator");
    let container = &deployment["spec"]["template"]["spec"]["containers"][0];
    let set: BTreeSet<String> = container["env"]
        .as_array()
        .expect("env")
        .iter()
        .filter_map(|variable| Some(variable["name"].as_str()?.to_owned()))
        .collect();
    assert!(set.is_subset(&known), "{set:?} of {known:?}");
    for needed in [
        "DOMICILE_IMAGE",
        "DOMICILE_LEASE_NAMESPACE",
        "DOMICILE_IDENTITY",
    ] {
        assert!(set.contains(needed) && known.contains(needed), "{needed}");
    }
    let template = read("charts/domicile/templates/deployment.yaml");
    for name in known.iter().filter(|name| set.contains(*name)) {
        assert!(
            template.contains(&format!("- name: {name}\n")),
            "{name} in the chart"
        );
    }
    assert_eq!(container["env"][0]["value"], container["image"]);
    assert_eq!(
        container["image"],
        format!("domicile:{}", env!("CARGO_PKG_VERSION"))
    );
    assert_eq!(container["command"], json!(["/domicile"]));
    assert_eq!(container["args"], json!(["operator"]));
}

/// The store pods are what `config/samples` says they are: restricted. So is the operator.
#[test]
fn the_operator_meets_the_restricted_standard() {
    let objects = kustomize("config/manager");
    let pod = &find(&objects, "Deployment", "domicile-operator")["spec"]["template"]["spec"];
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
    assert_eq!(pod["securityContext"]["runAsUser"], 65532);
    assert_eq!(
        pod["securityContext"]["seccompProfile"]["type"],
        "RuntimeDefault"
    );
    let container = &pod["containers"][0]["securityContext"];
    assert_eq!(container["allowPrivilegeEscalation"], false);
    assert_eq!(container["readOnlyRootFilesystem"], true);
    assert_eq!(container["capabilities"], json!({ "drop": ["ALL"] }));
    let namespace = find(&objects, "Namespace", "domicile-system");
    assert_eq!(
        namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"],
        "restricted"
    );
}

#[test]
fn the_versions_agree() {
    let chart: Value = serde_yaml::from_str(&read("charts/domicile/Chart.yaml")).expect("YAML");
    assert_eq!(chart["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(chart["appVersion"], env!("CARGO_PKG_VERSION"));
    let manager: Value =
        serde_yaml::from_str(&read("config/manager/kustomization.yaml")).expect("YAML");
    assert_eq!(manager["images"][0]["newTag"], env!("CARGO_PKG_VERSION"));
}

/// Values whose content is Kubernetes' own: documented as a whole.
const WHOLE: [&str; 3] = ["nodeSelector", "podSecurityContext", "securityContext"];

/// Every value as a dotted path.
fn values(at: &str, value: &Value, out: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) if !map.is_empty() && !WHOLE.contains(&at) => {
            for (key, inner) in map {
                let at = if at.is_empty() {
                    key.clone()
                } else {
                    format!("{at}.{key}")
                };
                values(&at, inner, out);
            }
        }
        _ => {
            out.insert(at.to_owned());
        }
    }
}

#[test]
fn every_value_is_documented_and_in_the_schema() {
    let text = read("charts/domicile/values.yaml");
    let parsed: Value = serde_yaml::from_str(&text).expect("values.yaml is YAML");
    let mut paths = BTreeSet::new();
    values("", &parsed, &mut paths);
    assert!(paths.len() > 30);

    // A comment stands right above each.
    let (mut stack, mut above): (Vec<String>, bool) = (Vec::new(), false);
    for line in text.lines() {
        let trimmed = line.trim_start();
        if trimmed.starts_with('#') {
            above = true;
            continue;
        }
        if let Some((key, _)) = trimmed
            .split_once(':')
            .filter(|_| !trimmed.starts_with('-'))
        {
            stack.truncate((line.len() - trimmed.len()) / 2);
            stack.push(key.to_owned());
            let at = stack.join(".");
            assert!(
                above || !paths.contains(&at),
                "values.yaml: {at} has no comment"
            );
        }
        above = false;
    }

    let schema: Value =
        serde_json::from_str(&read("charts/domicile/values.schema.json")).expect("JSON");
    let readme = read("charts/domicile/README.md");
    for at in &paths {
        let mut here = &schema;
        for key in at.split('.') {
            if let Some(name) = here["$ref"].as_str() {
                let name = name.trim_start_matches("#/definitions/");
                here = &schema["definitions"][name];
            }
            let known = here["properties"].get(key);
            here = known.unwrap_or(&here["additionalProperties"]);
            assert!(here.is_object(), "values.schema.json doesn't know {at}");
        }
        assert!(
            readme.contains(&format!("\n| `{at}` |")),
            "README.md doesn't list {at}"
        );
    }
    assert_eq!(schema["additionalProperties"], false);
}

#[test]
fn argo_cd_gets_the_script_for_every_kind() {
    let map: Value = serde_yaml::from_str(&read("config/argocd/argocd-cm.yaml")).expect("YAML");
    let data = map["data"].as_object().expect("data");
    let script = read("config/argocd/health.lua");
    let kinds: Vec<String> = domicile::api::crds::all()
        .expect("the definitions are generated")
        .into_iter()
        .map(|crd| {
            format!(
                "resource.customizations.health.{}_{}",
                crd.spec.group, crd.spec.names.kind
            )
        })
        .collect();
    assert_eq!(data.len(), kinds.len());
    for kind in kinds {
        assert_eq!(data.get(&kind), Some(&json!(script)), "{kind}");
    }
}
