//! Figures out of samples, and which goals they meet.
//!
//! Owns the rows' names. Never leaves a run out.

use anyhow::Result;

use super::cases::{Case, Kind};
use super::sample::Sample;
use crate::figures::Figure;

/// The rows of one case at one latency.
///
/// # Errors
/// If there are no samples.
pub fn figures(case: Case, latency: u64, samples: &[Sample]) -> Result<Vec<Figure>> {
    let name = |what: &str| format!("{what}/{case}@{latency}ms");
    let of = |what: &str, unit: &str, value: &dyn Fn(&Sample) -> Option<f64>| {
        let values: Vec<f64> = samples.iter().filter_map(value).collect();
        (!values.is_empty()).then(|| Figure::new(&name(what), unit, &values))
    };
    let mut rows = vec![
        of("gap", "s", &|s| Some(s.gap)),
        of("writer", "s", &|s| Some(s.writer)),
        of("lost", "rows", &|s| Some(count(s.lost + s.duplicates))),
        of("dual", "rows", &|s| Some(count(s.dual))),
        of("stale", "s", &|s| Some(s.stale)),
        of("back", "s", &|s| s.back),
    ];
    match case.kind {
        Kind::QuietApiDown => {
            rows.push(of("longest", "s", &|s| Some(s.longest)));
            rows.push(of("usual", "s", &|s| s.usual));
        }
        Kind::RegionCutHome => rows.push(of("again", "s", &|s| s.again)),
        Kind::Flapping => rows.push(of("failovers", "", &|s| Some(count(s.failovers)))),
        Kind::Cancelled => {
            rows.push(of("cancelled", "rows", &|s| Some(count(s.cancelled))));
            rows.push(of("cancelled-lost", "rows", &|s| {
                Some(count(s.cancelled_lost))
            }));
        }
        _ => {}
    }
    rows.into_iter().flatten().collect()
}

fn count(n: usize) -> f64 {
    n as f64
}

/// Whether a case meets its goal, in words; nothing if it has none.
#[must_use]
pub fn verdict(case: Case, latency: u64, rows: &[Figure]) -> Vec<String> {
    let row = |what: &str| {
        let name = format!("{what}/{case}@{latency}ms");
        rows.iter().find(|f| f.name == name)
    };
    let judge = |what: &str, value: f64, goal: f64, of: &str| {
        let mark = if value <= goal { "ok   " } else { "ABOVE" };
        format!("{mark} {what}/{case}@{latency}ms: {of} {value:.2} s, goal {goal:.2} s")
    };
    let mut said = Vec::new();
    if let (Some(gap), Some(goal)) = (row("gap"), case.goal()) {
        said.push(judge("gap", gap.p95, goal, "p95"));
    }
    let maxima = [("back", 60.0), ("longest", 0.2), ("again", 3.0)];
    for (what, goal) in maxima {
        if let Some(found) = row(what) {
            said.push(judge(what, found.max, goal, "max"));
        }
    }
    said
}

/// One line for one run.
#[must_use]
pub fn line(sample: &Sample) -> String {
    let Sample {
        case,
        latency,
        run,
        variant,
        gap,
        writer,
        ..
    } = sample;
    let back = sample.back.map_or("-".to_owned(), |b| format!("{b:.1}"));
    let mut text = format!(
        "{case}@{latency}ms run {run}{}{variant}: gap {gap:.2} s, writer {writer:.2} s, lost {}, dual {}, stale {:.2} s, \
         back {back} s, failovers {}, {} commits, {} unknown",
        if variant.is_empty() { "" } else { " " },
        sample.lost + sample.duplicates,
        sample.dual,
        sample.stale,
        sample.failovers,
        sample.commits,
        sample.unknown,
    );
    for violation in &sample.violations {
        text += &format!("\n!!!!  {case}@{latency}ms run {run}: {violation}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_their_names_and_goals_their_words() {
        let case = Case::parse("node-cut+api-down").unwrap();
        let samples = [1.0, 5.0].map(|gap| Sample {
            gap,
            back: (gap < 2.0).then_some(10.0),
            ..Sample::default()
        });
        let rows = figures(case, 40, &samples).unwrap();
        let names: Vec<&str> = rows.iter().map(|f| f.name.as_str()).collect();
        assert_eq!(
            names,
            ["gap", "writer", "lost", "dual", "stale", "back"]
                .map(|n| format!("{n}/node-cut+api-down@40ms"))
        );
        assert_eq!((rows[0].max, rows[0].runs, rows[5].runs), (5.0, 2, 1));
        let said = verdict(case, 40, &rows);
        assert!(
            said[0].starts_with("ABOVE gap/node-cut+api-down@40ms"),
            "{said:?}"
        );
        assert!(said[1].starts_with("ok    back/"), "{said:?}");
    }
}
