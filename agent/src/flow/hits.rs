//! How often each policy decided or audited, among the records that arrived.

use std::collections::HashMap;

use super::{FlowEvent, FlowRecord};
use crate::policy::model::PolicyName;

/// Policies counted by name; more of them are not counted any more.
const MAX_POLICIES: usize = 20_000;

/// Verdicts by policy since the start.
#[derive(Debug, Default)]
pub struct Hits {
    by_policy: HashMap<PolicyName, u64>,
}

impl Hits {
    /// Counts a record, if it is a verdict of a policy.
    pub fn count(&mut self, record: &FlowRecord) {
        let Some(name) = record.policy.as_ref().filter(|_| record.event == FlowEvent::Verdict)
        else {
            return;
        };
        if let Some(hits) = self.by_policy.get_mut(name) {
            *hits += 1;
        } else if self.by_policy.len() < MAX_POLICIES {
            self.by_policy.insert(name.clone(), 1);
        }
    }

    /// The counts as of now.
    pub fn snapshot(&self) -> HashMap<PolicyName, u64> {
        self.by_policy.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::example::{allowed, ended};

    #[test]
    fn verdicts_are_counted_and_ends_are_not() {
        let mut hits = Hits::default();
        let record = allowed();
        let name = record.policy.clone().unwrap();
        hits.count(&record);
        hits.count(&record);
        hits.count(&FlowRecord { event: ended().event, ..record.clone() });
        hits.count(&FlowRecord { policy: None, ..record });
        assert_eq!(hits.snapshot(), HashMap::from([(name, 2)]));
    }
}
