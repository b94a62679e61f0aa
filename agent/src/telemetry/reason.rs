//! The reasons' names and meanings, generated from the ABI's one list.

use signet_ebpf::{abi::Reason, for_each_reason};

macro_rules! name_reasons {
    ($($variant:ident = $number:literal $name:literal $doc:literal,)*) => {
        /// The reason's name in records, metrics and on the command line.
        pub const fn name(reason: Reason) -> &'static str {
            match reason {
                $(Reason::$variant => $name,)*
                _ => "internal",
            }
        }

        /// One sentence about the reason.
        pub const fn meaning(reason: Reason) -> &'static str {
            match reason {
                $(Reason::$variant => $doc,)*
                _ => "a bug in Signet",
            }
        }

        /// The reason of a name.
        pub fn parse(s: &str) -> Option<Reason> {
            match s {
                $($name => Some(Reason::$variant),)*
                _ => None,
            }
        }
    };
}
for_each_reason!(name_reasons);
