//! The operator's rights are those that its code uses, and no more.

use std::collections::{BTreeMap, BTreeSet};

use domicile::api::PrivacyDataStore;
use domicile::operator::rights::kinds::ChildKind as RightsKind;
use domicile::operator::store::build::{self, Settings};
use domicile::operator::store::kinds::ChildKind;
use serde_json::{Value, json};

use super::{find, kustomize, read, samples};

/// What the code uses: group, resource, verbs, where. A call that is added or removed changes this line.
const USED: [(&str, &str, &str, &str); 33] = [
    (
        "domicile.dev",
        "privacydatastores",
        "get list watch patch",
        "store/observe, store/mod, store/apply (finalizer, annotations)",
    ),
    (
        "domicile.dev",
        "privacydatastores/status",
        "patch",
        "store/report, store/apply, rights/apply",
    ),
    (
        "domicile.dev",
        "rightsworkflows/status",
        "patch",
        "rights/report",
    ),
    (
        "domicile.dev",
        "rightsworkflows/finalizers",
        "update",
        "rights/build: blockOwnerDeletion",
    ),
    (
        "domicile.dev",
        "privacydatastores/finalizers",
        "update",
        "build::owner: blockOwnerDeletion",
    ),
    ("domicile.dev", "regions", "list watch", "geography::start"),
    (
        "domicile.dev",
        "regions/status",
        "patch",
        "geography::execute",
    ),
    (
        "domicile.dev",
        "residencypolicies",
        "get list watch",
        "geography::start; get: geography::execute (Bind), asked for by the API server",
    ),
    (
        "domicile.dev",
        "residencypolicies/status",
        "patch",
        "geography::execute",
    ),
    (
        "domicile.dev",
        "rightsworkflows",
        "get list watch patch",
        "geography::start, rights/observe, rights/apply (finalizer), store/observe (who keeps requests here)",
    ),
    (
        "",
        "nodes",
        "list watch patch",
        "geography::start, geography::execute (stamp)",
    ),
    (
        "",
        "namespaces",
        "get list watch",
        "store/observe, geography::start",
    ),
    (
        "storage.k8s.io",
        "storageclasses",
        "get list",
        "store/observe",
    ),
    (
        "admissionregistration.k8s.io",
        "validatingadmissionpolicies",
        "list watch",
        "geography::start",
    ),
    (
        "admissionregistration.k8s.io",
        "validatingadmissionpolicybindings",
        "list watch create patch delete",
        "geography::start, geography::execute (Bind, Unbind)",
    ),
    (
        "",
        "pods",
        "get list watch create delete",
        "store/mod, store/observe, store/apply, rights/mod, rights/apply (outside)",
    ),
    (
        "",
        "persistentvolumeclaims",
        "get list watch create patch delete",
        "store/mod, store/observe, store/apply",
    ),
    (
        "",
        "persistentvolumes",
        "get",
        "store/observe, store/attest",
    ),
    (
        "",
        "secrets",
        "get list watch create update delete",
        "store/mod, store/observe, store/apply, store/attest (its key)",
    ),
    (
        "",
        "services",
        "get list watch create patch delete",
        "store/mod, store/observe, store/apply, plan::retire",
    ),
    (
        "",
        "serviceaccounts",
        "get list create patch",
        "store/observe, store/apply",
    ),
    (
        "",
        "configmaps",
        "get list create patch update",
        "store/observe, store/apply, store/attest; update: granted to instances",
    ),
    (
        "discovery.k8s.io",
        "endpointslices",
        "get list watch create patch update",
        "store/mod, store/apply; update: granted to instances",
    ),
    (
        "rbac.authorization.k8s.io",
        "roles",
        "get list create patch",
        "store/observe, store/apply",
    ),
    (
        "rbac.authorization.k8s.io",
        "rolebindings",
        "get list create patch",
        "store/observe, store/apply",
    ),
    (
        "policy",
        "poddisruptionbudgets",
        "get list create patch delete",
        "store/observe, store/apply; delete: rights/plan (a pool's)",
    ),
    (
        "apps",
        "deployments",
        "get list watch create patch delete",
        "rights/mod, rights/observe, rights/apply",
    ),
    (
        "autoscaling",
        "horizontalpodautoscalers",
        "get list create patch delete",
        "rights/observe, rights/apply",
    ),
    (
        "networking.k8s.io",
        "networkpolicies",
        "get list create patch",
        "rights/observe, rights/apply",
    ),
    (
        "rbac.authorization.k8s.io",
        "clusterrolebindings",
        "get create delete",
        "rights/observe, rights/apply (the gateway's)",
    ),
    (
        "rbac.authorization.k8s.io",
        "clusterroles",
        "bind",
        "rights/apply (domicile-rights-gateway alone), asked for by the API server",
    ),
    (
        "events.k8s.io",
        "events",
        "create patch",
        "store/report, store/apply, store/attest",
    ),
    (
        "coordination.k8s.io",
        "leases",
        "get create update",
        "operator/mod: the election",
    ),
];

type Rights = BTreeMap<(String, String), BTreeSet<String>>;

fn texts(value: &Value) -> impl Iterator<Item = &str> {
    value
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
}

fn rights<'a>(rules: impl IntoIterator<Item = &'a Value>) -> Rights {
    let mut out = Rights::new();
    for rule in rules {
        for group in texts(&rule["apiGroups"]) {
            for resource in texts(&rule["resources"]) {
                let verbs = out
                    .entry((group.to_owned(), resource.to_owned()))
                    .or_default();
                verbs.extend(texts(&rule["verbs"]).map(str::to_owned));
            }
        }
    }
    out
}

fn rules(object: &Value) -> &Vec<Value> {
    object["rules"].as_array().expect("a role has rules")
}

fn granted() -> Rights {
    let objects = kustomize("config/rbac");
    let cluster = find(&objects, "ClusterRole", "domicile-operator");
    let own = find(&objects, "Role", "domicile-operator");
    rights(rules(cluster).iter().chain(rules(own)))
}

#[test]
fn the_operator_may_do_what_its_code_does_and_no_more() {
    let used: Rights = USED
        .iter()
        .map(|(group, resource, verbs, _)| {
            let verbs = verbs.split(' ').map(str::to_owned).collect();
            (((*group).to_owned(), (*resource).to_owned()), verbs)
        })
        .collect();
    assert_eq!(used.len(), USED.len(), "one line per resource");
    assert_eq!(granted(), used);
}

/// Nobody may grant what he hasn't: what the operator puts into an instance's Role, it must hold.
#[test]
fn the_operator_holds_what_it_grants() {
    let store: PrivacyDataStore = samples::store("config/samples/30-privacy-data-store.yaml");
    let settings = Settings {
        image: "domicile:0.1.0".into(),
        ipv6: false,
    };
    let granted = granted();
    let mut seen = 0;
    for (kind, object) in build::children(&store, &[], &settings) {
        if kind == ChildKind::Role {
            seen += 1;
            for (resource, verbs) in rights(rules(&object.data)) {
                let held = granted
                    .get(&resource)
                    .unwrap_or_else(|| panic!("{resource:?}"));
                assert!(verbs.is_subset(held), "{resource:?}: {verbs:?} of {held:?}");
            }
        }
    }
    assert_eq!(seen, 1);
}

#[test]
fn every_kind_of_child_can_be_made_and_kept() {
    let granted = granted();
    let of_workflows = RightsKind::ALL.map(RightsKind::resource);
    for resource in ChildKind::ALL
        .map(ChildKind::resource)
        .into_iter()
        .chain(of_workflows)
    {
        let verbs = granted.get(&(resource.group.clone(), resource.plural.clone()));
        let verbs = verbs.unwrap_or_else(|| panic!("no right to {}", resource.plural));
        for verb in ["get", "list", "create", "patch"] {
            assert!(verbs.contains(verb), "{verb} {}", resource.plural);
        }
    }
}

#[test]
fn no_role_has_a_wildcard_or_a_way_to_more() {
    let (mut seen, mut bound) = (0, 0);
    for object in kustomize("config/rbac") {
        let kind = object["kind"].as_str().unwrap_or_default();
        if !kind.ends_with("Role") {
            continue;
        }
        for rule in rules(&object) {
            seen += 1;
            for key in ["apiGroups", "resources", "verbs"] {
                assert!(texts(&rule[key]).count() > 0, "{rule}");
                assert!(texts(&rule[key]).all(|text| !text.contains('*')), "{rule}");
            }
            for verb in ["escalate", "impersonate"] {
                assert!(texts(&rule["verbs"]).all(|v| v != verb), "{rule}");
            }
            // One role may be bound without being held: it only asks.
            if texts(&rule["verbs"]).any(|v| v == "bind") {
                assert_eq!(rule["resourceNames"], json!(["domicile-rights-gateway"]));
                assert_eq!(rule["resources"], json!(["clusterroles"]));
                bound += 1;
            }
            for resource in [
                "pods/exec",
                "pods/attach",
                "nodes/proxy",
                "serviceaccounts/token",
            ] {
                assert!(texts(&rule["resources"]).all(|r| r != resource), "{rule}");
            }
        }
    }
    assert!(seen > 20);
    assert_eq!(bound, 1);
}

/// What may be bound to a gateway lets it ask, and nothing else.
#[test]
fn a_gateway_may_ask_and_nothing_else() {
    let objects = kustomize("config/rbac");
    let name = domicile::api::names::rights::GATEWAY_CLUSTER_ROLE;
    let rights = rights(rules(find(&objects, "ClusterRole", name)));
    let asks = ["tokenreviews", "subjectaccessreviews"];
    assert_eq!(rights.len(), asks.len());
    for ((_, resource), verbs) in rights {
        assert!(asks.contains(&resource.as_str()), "{resource}");
        assert_eq!(verbs, BTreeSet::from(["create".to_owned()]));
    }
}

/// Each rule has its reason above it, in both places, and the rules are the same text.
#[test]
fn chart_and_config_give_the_same_rights_with_the_same_reasons() {
    let config = read("config/rbac/operator.yaml");
    for (file, kind) in [
        ("clusterrole", "\nkind: ClusterRole\n"),
        ("role", "\nkind: Role\n"),
    ] {
        let of = |text: &str| {
            let from = text.find(kind).expect("the role");
            let text = &text[from..];
            let rules = &text[text.find("\nrules:\n").expect("rules")..];
            let end = rules.find("\n---").or_else(|| rules.find("\n{{- end }}"));
            rules[..end.expect("the end of the role")].to_owned()
        };
        let chart = of(&read(&format!("charts/domicile/templates/{file}.yaml")));
        assert_eq!(chart, of(&config), "{file}");
        let lines: Vec<&str> = chart.lines().collect();
        for pair in lines
            .windows(2)
            .filter(|pair| pair[1].starts_with("- apiGroups"))
        {
            let continued = pair[0].starts_with("  verbs") && file == "role";
            assert!(
                pair[0].starts_with("# ") || continued,
                "no reason for {}",
                pair[1]
            );
        }
    }
}

/// What people get: reading and changing of namespaced kinds in Kubernetes' own roles, nothing of the status.
#[test]
fn people_get_what_the_names_say() {
    let objects = kustomize("config/rbac");
    let role = |name: &str| find(&objects, "ClusterRole", name);
    let aggregated = |name: &str| -> Vec<&str> {
        let labels = role(name)["metadata"]["labels"]
            .as_object()
            .expect("labels");
        labels
            .keys()
            .filter_map(|key| key.strip_prefix("rbac.authorization.k8s.io/aggregate-to-"))
            .collect()
    };
    assert_eq!(aggregated("domicile-view"), ["admin", "edit", "view"]);
    assert_eq!(aggregated("domicile-edit"), ["admin", "edit"]);
    assert!(
        aggregated("domicile-status").is_empty(),
        "it reaches every port of every pod"
    );
    for (resource, verbs) in rights(rules(role("domicile-view"))) {
        assert!(
            verbs
                .iter()
                .all(|v| ["get", "list", "watch"].contains(&v.as_str())),
            "{resource:?}"
        );
    }
    let namespaced: BTreeSet<String> = domicile::api::crds::all()
        .expect("the definitions are generated")
        .into_iter()
        .filter(|crd| crd.spec.scope == "Namespaced")
        .map(|crd| crd.spec.names.plural)
        .collect();
    for name in ["domicile-view", "domicile-edit"] {
        let named: BTreeSet<String> = rights(rules(role(name)))
            .into_keys()
            .map(|(_, resource)| resource)
            .collect();
        assert_eq!(named, namespaced, "{name}");
    }
}
