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

impl Results {
    /// Adds a round's value, and says it.
    pub fn add(&mut self, case: &str, round: usize, value: f64, unit: &'static str) {
        eprintln!("bench: {case} round {round}: {value:.2} {unit}");
        self.values.push(Value { case: case.to_owned(), subject: "signet", round, value, unit });
    }

    fn summaries(&self) -> Vec<Summary> {
        let mut names: Vec<&str> = Vec::new();
        for value in &self.values {
            if !names.contains(&value.case.as_str()) {
                names.push(&value.case);
            }
        }
        names.into_iter().filter_map(|name| self.summary(name)).collect()
    }

    fn summary(&self, case: &str) -> Option<Summary> {
        let rounds: Vec<&Value> = self.values.iter().filter(|v| v.case == case).collect();
        let first = rounds.first()?;
        let median = median(rounds.iter().map(|v| v.value).collect())?;
        Some(Summary {
            case: case.to_owned(),
            subject: first.subject,
            median,
            unit: first.unit,
            ratio_to_plaintext: None,
            ratio_min: None,
            ratio_max: None,
        })
    }

    /// A line a case, aligned.
    pub fn print(&self) {
        println!("{:<32} {:<8} {:>12}  UNIT", "CASE", "SUBJECT", "MEDIAN");
        for s in self.summaries() {
            println!("{:<32} {:<8} {:>12.2}  {}", s.case, s.subject, s.median, s.unit);
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
            results.add("certificates", round, value, "1/s");
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
}
