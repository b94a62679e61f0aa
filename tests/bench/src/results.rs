//! Values of rounds and their medians.

use anyhow::Result;
use serde::Serialize;

/// Everything that was measured, in the order of measuring.
#[derive(Default)]
pub struct Results {
    values: Vec<Value>,
}

/// One round's value.
#[derive(Clone, Serialize)]
struct Value {
    case: String,
    subject: &'static str,
    round: usize,
    value: f64,
    unit: &'static str,
}

/// A case's summary. Ratios are those to plaintext on the same path, where there is one.
#[derive(Serialize)]
struct Summary {
    case: String,
    subject: &'static str,
    median: f64,
    unit: &'static str,
    ratio_to_plaintext: Option<f64>,
    ratio_min: Option<f64>,
    ratio_max: Option<f64>,
}

/// The subject that nothing of ours is between.
pub const PLAINTEXT: &str = "plaintext";
/// The subject of cases that have one only.
pub const SIGNET: &str = "signet";

impl Results {
    /// Adds a round's value of a subject, and says it.
    pub fn add(
        &mut self,
        case: &str,
        subject: &'static str,
        round: usize,
        value: f64,
        unit: &'static str,
    ) {
        eprintln!("bench: {case} {subject} round {round}: {value:.2} {unit}");
        self.values.push(Value { case: case.to_owned(), subject, round, value, unit });
    }

    fn summaries(&self) -> Vec<Summary> {
        let mut names: Vec<(&str, &'static str)> = Vec::new();
        for value in &self.values {
            let name = (value.case.as_str(), value.subject);
            if !names.contains(&name) {
                names.push(name);
            }
        }
        // A case's subjects side by side, in the order of the cases.
        let mut cases: Vec<&str> = Vec::new();
        for (case, _) in &names {
            if !cases.contains(case) {
                cases.push(case);
            }
        }
        names.sort_by_key(|(case, subject)| {
            (cases.iter().position(|c| c == case), *subject != PLAINTEXT, *subject)
        });
        names.into_iter().filter_map(|(case, subject)| self.summary(case, subject)).collect()
    }

    fn rounds(&self, case: &str, subject: &str) -> Vec<&Value> {
        self.values.iter().filter(|v| v.case == case && v.subject == subject).collect()
    }

    fn summary(&self, case: &str, subject: &'static str) -> Option<Summary> {
        let rounds = self.rounds(case, subject);
        let unit = rounds.first()?.unit;
        let median = median(rounds.iter().map(|v| v.value).collect())?;
        // Round by round: what the machine does to one it does to the other.
        let plain = self.rounds(case, PLAINTEXT);
        let ratios: Vec<f64> = rounds
            .iter()
            .filter_map(|v| {
                let plain = plain.iter().find(|p| p.round == v.round)?;
                (subject != PLAINTEXT).then_some(v.value / plain.value)
            })
            .collect();
        Some(Summary {
            case: case.to_owned(),
            subject,
            median,
            unit,
            ratio_min: ratios.iter().copied().reduce(f64::min),
            ratio_max: ratios.iter().copied().reduce(f64::max),
            ratio_to_plaintext: self::median(ratios),
        })
    }

    /// A line a case and subject, aligned.
    pub fn print(&self) {
        println!(
            "{:<32} {:<12} {:>12}  {:<5} {:>9} {:>15}",
            "CASE", "SUBJECT", "MEDIAN", "UNIT", "TO PLAIN", "RANGE"
        );
        for s in self.summaries() {
            let ratio = s.ratio_to_plaintext.map(|r| format!("{r:.3}")).unwrap_or_default();
            let range = match (s.ratio_min, s.ratio_max) {
                (Some(least), Some(most)) => format!("{least:.3} to {most:.3}"),
                _ => String::new(),
            };
            let line = format!(
                "{:<32} {:<12} {:>12.2}  {:<5} {ratio:>9} {range:>15}",
                s.case, s.subject, s.median, s.unit
            );
            println!("{}", line.trim_end());
        }
    }

    /// Every value, then every summary, as NDJSON.
    pub fn json(&self) -> Result<String> {
        let mut text = String::new();
        for value in &self.values {
            text += &serde_json::to_string(value)?;
            text.push('\n');
        }
        for summary in self.summaries() {
            text += &serde_json::to_string(&summary)?;
            text.push('\n');
        }
        Ok(text)
    }
}

/// The middle value; of an even number the mean of both middle ones. `None` of none.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    if values.len() % 2 == 1 {
        return Some(upper);
    }
    Some(f64::midpoint(values[values.len() / 2 - 1], upper))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn records_are_as_the_contract_has_them() {
        let mut results = Results::default();
        for (round, value) in [(1, 10.0), (2, 30.0), (3, 20.0)] {
            results.add("certificates", SIGNET, round, value, "1/s");
        }
        let text = results.json().unwrap();
        let lines: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 4);
        assert_eq!(lines[0]["round"], 1);
        assert_eq!(lines[0]["subject"], "signet");
        assert_eq!(lines[3]["median"], 20.0);
        assert_eq!(lines[3]["unit"], "1/s");
        assert!(lines[3]["ratio_to_plaintext"].is_null(), "there is no plaintext of this");
    }

    #[test]
    fn ratios_are_of_the_same_round() {
        let mut results = Results::default();
        for (round, plain, signet) in [(1, 10.0, 5.0), (2, 100.0, 20.0), (3, 1.0, 0.3)] {
            results.add("bulk-1", SIGNET, round, signet, "Gb/s");
            results.add("bulk-1", PLAINTEXT, round, plain, "Gb/s");
        }
        let [plain, signet] = &results.summaries()[..] else { panic!("two subjects") };
        assert_eq!((plain.subject, plain.ratio_to_plaintext), (PLAINTEXT, None));
        assert_eq!((signet.ratio_to_plaintext, signet.median), (Some(0.3), 5.0));
        assert_eq!((signet.ratio_min, signet.ratio_max), (Some(0.2), Some(0.5)));
    }
}
