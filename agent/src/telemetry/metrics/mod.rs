//! A process's metrics, in the text form of OpenMetrics 1.0.
//!
//! What happens now and then is counted where it happens, in a struct of the module's own whose
//! label values are `&'static str`: there are as many series as the code has words. What a
//! module counts or knows anyhow is a [`Reading`], taken when somebody asks.

mod server;

use std::{fmt, sync::Arc};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, text},
    metrics::{MetricType, counter::Counter, family::Family, histogram::Histogram},
    registry::Registry,
};

pub use self::server::{PageServer, metrics_page, ready_page, serve};

/// Counters by labels from the code.
pub type Counters<const N: usize> = Family<[(&'static str, &'static str); N], Counter>;
/// Durations, in seconds, by labels from the code.
pub type Durations<const N: usize> =
    Family<[(&'static str, &'static str); N], Histogram, fn() -> Histogram>;

/// Upper bounds of durations, in seconds: from a call on the same machine to one that fails by
/// its deadline.
const BOUNDS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

/// Durations of anything.
pub fn durations<const N: usize>() -> Durations<N> {
    Family::new_with_constructor(|| Histogram::new(BOUNDS))
}

/// What is registered is written out by [`Metrics::text`]; every name begins with `signet_`, but
/// for those that others gave ([`Metrics::foreign`]).
#[derive(Debug)]
pub struct Metrics {
    own: Registry,
    foreign: Registry,
}

impl Default for Metrics {
    /// With nothing in it but the version.
    fn default() -> Self {
        let mut metrics =
            Self { own: Registry::with_prefix("signet"), foreign: Registry::default() };
        metrics.read(|| {
            let version = env!("CARGO_PKG_VERSION");
            vec![Reading::gauge("build_info", "The version that runs").with("version", version, 1)]
        });
        metrics
    }
}

impl Metrics {
    /// Adds counters.
    pub fn counters<const N: usize>(&mut self, name: &str, help: &str, counters: &Counters<N>) {
        self.own.register(name, help, counters.clone());
    }

    /// Adds durations; the name says that they are seconds.
    pub fn durations<const N: usize>(&mut self, name: &str, help: &str, all: &Durations<N>) {
        self.own.register(name, help, all.clone());
    }

    /// Adds a metric under its whole name, which people's dashboards know from somebody else.
    pub fn foreign(
        &mut self,
        name: &str,
        help: &str,
        metric: impl prometheus_client::registry::Metric,
    ) {
        self.foreign.register(name, help, metric);
    }

    /// Adds what `read` reads whenever somebody asks.
    pub fn read(&mut self, read: impl Fn() -> Vec<Reading> + Send + Sync + 'static) {
        self.own.register_collector(Box::new(Readings(Box::new(read))));
    }

    /// All of it.
    pub fn text(&self) -> Result<String, fmt::Error> {
        let mut out = String::new();
        text::encode_registry(&mut out, &self.own)?;
        text::encode_registry(&mut out, &self.foreign)?;
        text::encode_eof(&mut out)?;
        Ok(out)
    }

    /// Ready to be served.
    pub fn shared(self) -> Arc<Self> {
        Arc::new(self)
    }
}

/// A metric with its values of a moment. A counter's name gets `_total` when it is written out.
#[derive(Clone, PartialEq, Debug)]
pub struct Reading {
    name: &'static str,
    help: &'static str,
    counter: bool,
    samples: Vec<(Labels, f64)>,
}

type Labels = Vec<(&'static str, String)>;

impl Reading {
    /// Something that only grows.
    pub fn counter(name: &'static str, help: &'static str) -> Self {
        Self { name, help, counter: true, samples: Vec::new() }
    }

    /// Something that comes and goes.
    pub fn gauge(name: &'static str, help: &'static str) -> Self {
        Self { name, help, counter: false, samples: Vec::new() }
    }

    /// The one value.
    pub fn value(self, value: impl Number) -> Self {
        self.labelled(Vec::new(), value)
    }

    /// The value for one value of a label.
    pub fn with(self, label: &'static str, of: impl Into<String>, value: impl Number) -> Self {
        self.labelled(vec![(label, of.into())], value)
    }

    /// The value for each value of a label.
    pub fn each<L: Into<String>, V: Number>(
        self,
        label: &'static str,
        values: impl IntoIterator<Item = (L, V)>,
    ) -> Self {
        values.into_iter().fold(self, |reading, (of, value)| reading.with(label, of, value))
    }

    /// The value for several labels.
    pub fn labelled(mut self, labels: Labels, value: impl Number) -> Self {
        self.samples.push((labels, value.number()));
        self
    }

    /// Name with labels and whole value, for `signet status`.
    pub fn flat(&self) -> impl Iterator<Item = (String, u64)> {
        self.samples.iter().map(|(labels, value)| {
            let labels: Vec<String> =
                labels.iter().map(|(name, value)| format!("{name}=\"{value}\"")).collect();
            let labels = match labels.is_empty() {
                true => String::new(),
                false => format!("{{{}}}", labels.join(",")),
            };
            (format!("{}{labels}", self.name), *value as u64)
        })
    }

    fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        if self.samples.is_empty() {
            return Ok(());
        }
        let kind = if self.counter { MetricType::Counter } else { MetricType::Gauge };
        let mut metric = encoder.encode_descriptor(self.name, self.help, None, kind)?;
        for (labels, value) in &self.samples {
            let write = |metric: &mut prometheus_client::encoding::MetricEncoder<'_>| {
                if self.counter {
                    let exemplar =
                        None::<&prometheus_client::metrics::exemplar::Exemplar<Labels, f64>>;
                    metric.encode_counter(value, exemplar)
                } else {
                    metric.encode_gauge(value)
                }
            };
            match labels.is_empty() {
                true => write(&mut metric)?,
                false => write(&mut metric.encode_family(labels)?)?,
            }
        }
        Ok(())
    }
}

/// A sample's value. Beyond 2^53 the last digits are lost.
pub trait Number {
    /// As OpenMetrics writes it.
    fn number(self) -> f64;
}

impl Number for f64 {
    fn number(self) -> f64 {
        self
    }
}

impl Number for u64 {
    fn number(self) -> f64 {
        self as f64
    }
}

impl Number for usize {
    fn number(self) -> f64 {
        self as f64
    }
}

impl Number for i32 {
    fn number(self) -> f64 {
        self.into()
    }
}

impl Number for bool {
    fn number(self) -> f64 {
        u8::from(self).into()
    }
}

/// Seconds since 1970.
impl Number for jiff::Timestamp {
    fn number(self) -> f64 {
        self.as_millisecond() as f64 / 1000.0
    }
}

struct Readings(Box<dyn Fn() -> Vec<Reading> + Send + Sync>);

impl Collector for Readings {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.0().iter().try_for_each(|reading| reading.encode(&mut encoder))
    }
}

impl fmt::Debug for Readings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Readings")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_openmetrics() {
        let mut metrics = Metrics::default();
        let (calls, took) = (Counters::<2>::default(), durations::<1>());
        metrics.counters("calls", "Calls by method and code", &calls);
        metrics.durations("call_duration_seconds", "How long calls took", &took);
        metrics.read(|| {
            vec![
                Reading::gauge("open_flows", "Open flows").value(7usize),
                Reading::counter("lost", "Lost \"events\"").with("cause", "a\"b\\c\n", 3u64),
                Reading::counter("never", "Nothing to say"),
            ]
        });
        calls.get_or_create(&[("method", "Fetch"), ("code", "Ok")]).inc_by(2);
        took.get_or_create(&[("method", "Fetch")]).observe(0.003);
        let text = metrics.text().unwrap();
        for line in [
            "# TYPE signet_calls counter",
            "signet_calls_total{method=\"Fetch\",code=\"Ok\"} 2",
            "signet_call_duration_seconds_bucket{le=\"0.0025\",method=\"Fetch\"} 0",
            "signet_call_duration_seconds_bucket{le=\"0.005\",method=\"Fetch\"} 1",
            "signet_call_duration_seconds_count{method=\"Fetch\"} 1",
            "# TYPE signet_open_flows gauge",
            "signet_open_flows 7.0",
            "signet_lost_total{cause=\"a\\\"b\\\\c\\n\"} 3.0",
            &format!("signet_build_info{{version=\"{}\"}} 1.0", env!("CARGO_PKG_VERSION")),
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert!(text.ends_with("# EOF\n") && !text.contains("never"), "{text}");
    }

    #[test]
    fn readings_are_flat_for_people() {
        let reading = Reading::counter("calls", "").each("code", [("Ok", 2u64), ("Gone", 1)]);
        let flat: Vec<_> = reading.flat().collect();
        assert_eq!(flat, [("calls{code=\"Ok\"}".into(), 2), ("calls{code=\"Gone\"}".into(), 1)]);
        let flat: Vec<_> = Reading::gauge("open", "").value(3usize).flat().collect();
        assert_eq!(flat, [("open".to_owned(), 3)]);
    }
}
