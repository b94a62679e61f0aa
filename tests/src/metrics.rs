//! Metrics as Prometheus reads them: the text form of OpenMetrics, parsed strictly.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use crate::process::Place;

/// A scrape: every sample by name and labels.
#[derive(Clone, Debug, Default)]
pub struct Metrics(BTreeMap<(String, BTreeMap<String, String>), f64>);

impl Metrics {
    /// Asks an address, from a place of the lab or from here.
    pub fn scrape(place: Option<&Place>, address: &str) -> Result<Self> {
        let url = format!("http://{address}/metrics");
        let curl = ["curl", "-sS", "--fail", "--max-time", "10", &url];
        let text = match place {
            Some(place) => place.run(&curl)?.success()?,
            None => {
                let output = Command::new(curl[0]).args(&curl[1..]).output().context("curl")?;
                ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
                String::from_utf8(output.stdout)?
            }
        };
        Self::parse(&text)
    }

    /// Parses a whole text. A metric that is there twice, or one without a type, is an error.
    pub fn parse(text: &str) -> Result<Self> {
        let text = text.strip_suffix("# EOF\n").context("it does not end with # EOF")?;
        let mut families = BTreeSet::new();
        let mut family = String::new();
        let mut samples = BTreeMap::new();
        for line in text.lines() {
            if let Some(comment) = line.strip_prefix("# ") {
                if let Some((name, _)) =
                    comment.strip_prefix("TYPE ").and_then(|c| c.split_once(' '))
                {
                    ensure!(families.insert(name.to_owned()), "{name} is there twice");
                    family = name.to_owned();
                }
                continue;
            }
            // An exemplar follows the value; it tells one of the events that were counted.
            let (sample, exemplar) = match line.split_once(" # {") {
                Some((sample, exemplar)) => (sample, Some(exemplar)),
                None => (line, None),
            };
            if let Some(exemplar) = exemplar {
                let (labels, _) = exemplar.split_once("} ").with_context(|| line.to_owned())?;
                labels_of(labels)?;
            }
            let (key, value) = sample.rsplit_once(' ').with_context(|| line.to_owned())?;
            let (name, labels) = match key.split_once('{') {
                Some((name, labels)) => {
                    (name, labels_of(labels.strip_suffix('}').with_context(|| line.to_owned())?)?)
                }
                None => (key, BTreeMap::new()),
            };
            ensure!(name.starts_with(&family) && !family.is_empty(), "{line}: not of {family}");
            ensure!(name.starts_with("signet_") || name.starts_with(ISTIO), "{line}");
            let value = value.parse().with_context(|| line.to_owned())?;
            let before = samples.insert((name.to_owned(), labels), value);
            ensure!(before.is_none(), "{line}: there twice");
        }
        Ok(Self(samples))
    }

    /// The sum of the samples of this name (without `signet_`, but with `istio_`) that have these
    /// labels; 0 when there is none.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let name = whole(name);
        self.0
            .iter()
            .filter(|((of, has), _)| {
                *of == name
                    && labels.iter().all(|(l, v)| has.get(*l).map(String::as_str) == Some(*v))
            })
            .map(|(_, value)| value)
            .sum()
    }

    /// The samples of a name (without `signet_`, but with `istio_`).
    pub fn of(&self, name: &str) -> Vec<(&BTreeMap<String, String>, f64)> {
        let name = whole(name);
        self.0.iter().filter(|((of, _), _)| *of == name).map(|((_, l), v)| (l, *v)).collect()
    }

    /// The names of all metrics, as documentation has them: without what a histogram adds.
    pub fn names(&self) -> BTreeSet<String> {
        let plain = |name: &str| {
            let suffixes = ["_bucket", "_count", "_sum"];
            let histogram = name.contains("duration_seconds");
            let cut = suffixes.iter().find_map(|s| name.strip_suffix(s)).filter(|_| histogram);
            cut.unwrap_or(name).to_owned()
        };
        self.0.keys().map(|(name, _)| plain(name)).collect()
    }

    /// Those that a page of documentation does not mention.
    pub fn undocumented(&self, page: &str) -> Vec<String> {
        let is_there = |name: &String| page.contains(&format!("`{name}`"));
        self.names().into_iter().filter(|name| !is_there(name)).collect()
    }

    /// How many samples there are.
    pub fn series(&self) -> usize {
        self.0.len()
    }

    /// Names of the metrics with a label that has this value in it, Istio's apart.
    pub fn tellers(&self, value: &str) -> BTreeSet<&str> {
        self.0
            .keys()
            .filter(|(name, labels)| {
                !name.starts_with(ISTIO) && labels.values().any(|v| v.contains(value))
            })
            .map(|(name, _)| name.as_str())
            .collect()
    }
}

/// What Istio's names begin with.
const ISTIO: &str = "istio_tcp_";

fn whole(name: &str) -> String {
    if name.starts_with(ISTIO) { name.to_owned() } else { format!("signet_{name}") }
}

/// `a="b",c="d"`, with the escapes of the text form.
fn labels_of(text: &str) -> Result<BTreeMap<String, String>> {
    let mut labels = BTreeMap::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (name, after) = rest.split_once("=\"").with_context(|| text.to_owned())?;
        let mut value = String::new();
        let mut chars = after.char_indices();
        let end = loop {
            match chars.next() {
                Some((at, '"')) => break at,
                Some((_, '\\')) => match chars.next() {
                    Some((_, 'n')) => value.push('\n'),
                    Some((_, c @ ('"' | '\\'))) => value.push(c),
                    _ => bail!("{text}: an unknown escape"),
                },
                Some((_, c)) => value.push(c),
                None => bail!("{text}: no end"),
            }
        };
        ensure!(labels.insert(name.to_owned(), value).is_none(), "{text}: {name} twice");
        rest = &after[end + 1..];
        if let Some(more) = rest.strip_prefix(',') {
            rest = more;
        } else {
            ensure!(rest.is_empty(), "{text}");
        }
    }
    Ok(labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_found() {
        let good = "# HELP signet_a x.\n# TYPE signet_a counter\nsignet_a_total{b=\"c,\\\"\"} 2\n";
        let metrics = Metrics::parse(&format!("{good}# EOF\n")).unwrap();
        assert_eq!(metrics.sum("a_total", &[("b", "c,\"")]), 2.0);
        assert_eq!(metrics.sum("a_total", &[("b", "d")]), 0.0);
        assert!(
            !metrics.tellers("c,").is_empty()
                && metrics.series() == 1
                && metrics.of("a_total").len() == 1
        );
        for bad in [
            good.to_owned(),
            format!("{good}{good}# EOF\n"),
            "signet_a 1\n# EOF\n".to_owned(),
            "# TYPE a gauge\na 1\n# EOF\n".to_owned(),
            "# TYPE signet_a gauge\nsignet_a{b=\"c} 1\n# EOF\n".to_owned(),
            "# TYPE signet_a gauge\nsignet_a one\n# EOF\n".to_owned(),
        ] {
            assert!(Metrics::parse(&bad).is_err(), "{bad}");
        }
    }
}
