//! Sets the log up: to stderr, as text or JSON, filtered by level.

use std::io::IsTerminal;

use tracing::Subscriber;
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    filter::{LevelFilter, filter_fn},
    layer::SubscriberExt,
    registry::LookupSpan,
    reload,
    util::SubscriberInitExt,
};

use super::recent::Recent;

/// The target of lines that tell of flows: those are kept as records, with reasons and filters.
const ACCESS: &str = "access";

/// How log lines look.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Why the log could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// The filter is not one.
    #[error(
        "logLevel: {value:?} is neither a level (error, warn, info, debug, trace) nor a list of target=level: {cause}"
    )]
    Filter {
        /// As given.
        value: String,
        /// What is wrong with it.
        cause: String,
    },
    /// A log is set up already.
    #[error("the log is set up already: {0}")]
    Already(String),
}

/// Changes the levels of the log that [`init`] has set up, and has its last lines.
#[derive(Clone, Debug)]
pub struct Levels {
    handle: reload::Handle<EnvFilter, Registry>,
    recent: Recent,
}

impl Levels {
    /// Takes other levels; what is none changes nothing.
    pub fn set(&self, level: &str) -> Result<(), LogError> {
        let filter = filter(level)?;
        self.handle.reload(filter).map_err(|e| LogError::Already(e.to_string()))
    }

    /// The last lines.
    pub fn recent(&self) -> &Recent {
        &self.recent
    }
}

/// Writes the last lines into `recent`, those about flows left out.
pub(super) fn recent_layer<S>(recent: &Recent) -> impl Layer<S> + use<S>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .with_writer(recent.clone())
        .with_filter(filter_fn(|metadata| metadata.target() != ACCESS))
}

/// Sends the process's log to stderr; `level` is a level or `target=level,…`.
pub fn init(level: &str, format: Format) -> Result<Levels, LogError> {
    let (filter, handle) = reload::Layer::new(filter(level)?);
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let recent = Recent::default();
    let registry = tracing_subscriber::registry().with(filter).with(recent_layer(&recent));
    let done = match format {
        Format::Text => registry.with(lines).try_init(),
        Format::Json => registry.with(lines.json().flatten_event(true)).try_init(),
    };
    done.map_err(|e| LogError::Already(e.to_string()))?;
    Ok(Levels { handle, recent })
}

fn filter(level: &str) -> Result<EnvFilter, LogError> {
    EnvFilter::builder()
        .with_default_directive(LevelFilter::INFO.into())
        .parse(level)
        .map_err(|e| LogError::Filter { value: level.into(), cause: e.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_lists_are_filters_and_nonsense_is_not() {
        for good in ["info", "debug", "info,signet::proxy=trace", ""] {
            assert!(filter(good).is_ok(), "{good}");
        }
        let error = filter("signet=loud").unwrap_err().to_string();
        assert!(error.contains("\"signet=loud\""), "{error}");
    }
}
