//! How many requests a node may make: a bucket of tokens for each.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// The most nodes that are remembered; a full bucket is as good as none and is forgotten first.
const MAX_NODES: usize = 20_000;

/// The buckets of all nodes.
#[derive(Debug)]
pub struct Limits {
    per_second: f64,
    burst: f64,
    buckets: Mutex<HashMap<Arc<str>, Bucket>>,
}

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Limits {
    /// `burst` requests at once, `per_second` in the long run.
    pub fn new(per_second: u32, burst: u32) -> Self {
        Self { per_second: per_second.into(), burst: burst.into(), buckets: Mutex::default() }
    }

    /// Takes a token; the error is how long until there is one.
    pub fn take(&self, node: &Arc<str>, now: Instant) -> Result<(), Duration> {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= MAX_NODES && !buckets.contains_key(node) {
            let full = Duration::from_secs_f64(self.burst / self.per_second);
            buckets.retain(|_, bucket| now.saturating_duration_since(bucket.at) < full);
        }
        let bucket = buckets.entry(node.clone()).or_insert(Bucket { tokens: self.burst, at: now });
        let passed = now.saturating_duration_since(bucket.at).as_secs_f64();
        bucket.tokens = (bucket.tokens + passed * self.per_second).min(self.burst);
        bucket.at = now;
        if bucket.tokens < 1.0 {
            return Err(Duration::from_secs_f64((1.0 - bucket.tokens) / self.per_second));
        }
        bucket.tokens -= 1.0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_a_burst_then_a_rate_and_takes_nothing_from_others() {
        let limits = Limits::new(2, 3);
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        let start = Instant::now();
        for _ in 0..3 {
            assert!(limits.take(&a, start).is_ok());
        }
        assert_eq!(limits.take(&a, start), Err(Duration::from_millis(500)));
        assert!(limits.take(&b, start).is_ok());
        assert!(limits.take(&a, start + Duration::from_millis(500)).is_ok());
        assert!(limits.take(&a, start + Duration::from_millis(501)).is_err());
        for _ in 0..3 {
            assert!(limits.take(&a, start + Duration::from_secs(3600)).is_ok());
        }
        assert!(limits.take(&a, start + Duration::from_secs(3600)).is_err(), "never more");
    }
}
