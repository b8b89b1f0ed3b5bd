//! Alerts and dashboards speak of metrics that exist, and every alert has its runbook.

use regex::Regex;
use serde_json::Value;

use super::read;

/// The pages that list every metric; tests beside the metrics compare them with what is served.
fn documented() -> String {
    read("docs/gateway.md") + &read("docs/worker.md")
}

fn alerts() -> Vec<Value> {
    let text = read("charts/domicile/files/alerts/rights.yaml");
    serde_yaml::from_str(&text).expect("alerts are YAML")
}

fn unknown(expression: &str, pages: &str) -> Vec<String> {
    let name = Regex::new(r"rights_[a-z_]+").expect("a pattern");
    let end = Regex::new("_(total|bucket|count|sum)$").expect("a pattern");
    name.find_iter(expression)
        .map(|found| end.replace(found.as_str(), "").into_owned())
        // The worker's page leaves the prefix out.
        .filter(|metric| {
            let short = metric.strip_prefix("rights_").unwrap_or(metric);
            !pages.contains(metric.as_str()) && !pages.contains(&format!("`{short}"))
        })
        .collect()
}

#[test]
fn alerts_and_dashboards_name_metrics_that_are_documented() {
    let pages = documented();
    for alert in alerts() {
        let expression = alert["expr"].as_str().expect("an expression");
        assert!(expression.contains("rights_"), "{alert}");
        assert_eq!(unknown(expression, &pages), Vec::<String>::new(), "{alert}");
    }
    let board: Value = serde_json::from_str(&read("charts/domicile/files/dashboards/rights.json"))
        .expect("a dashboard is JSON");
    let panels = board["panels"].as_array().expect("panels");
    assert!(panels.len() >= 10);
    for panel in panels {
        for target in panel["targets"].as_array().expect("targets") {
            let expression = target["expr"].as_str().expect("an expression");
            assert_eq!(
                unknown(expression, &pages),
                Vec::<String>::new(),
                "{}",
                panel["title"]
            );
        }
    }
    assert_eq!(
        unknown("sum(rights_no_such_thing_total)", &pages),
        ["rights_no_such_thing"]
    );
}

#[test]
fn every_alert_has_a_runbook() {
    let page = read("docs/rights-monitoring.md");
    for alert in alerts() {
        let name = alert["alert"].as_str().expect("a name");
        let runbook = alert["annotations"]["runbook"].as_str().expect("a runbook");
        assert_eq!(
            runbook,
            format!("docs/rights-monitoring.md#{}", name.to_lowercase())
        );
        assert!(page.contains(&format!("\n### {name}\n")), "{name}");
    }
}
