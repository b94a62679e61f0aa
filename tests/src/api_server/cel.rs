//! Kubernetes' expressions: CEL with what the API server adds to it, as far as it is there.
//!
//! Parsed and evaluated, not type-checked. A function that a real server has and this one lacks
//! is named by a 501 before anything is evaluated.

use std::{collections::HashMap, sync::Arc};

use ::cel::{Context, Env, ExecutionError, Program, Value as Cel, extensions};
use serde_json::Value;

use super::{Refusal, http::cannot};

/// Functions beside operators and macros that expressions may call.
const FUNCTIONS: [&str; 25] = [
    "bool",
    "bytes",
    "charAt",
    "contains",
    "double",
    "dyn",
    "endsWith",
    "indexOf",
    "int",
    "join",
    "lastIndexOf",
    "lowerAscii",
    "matches",
    "replace",
    "reverse",
    "size",
    "split",
    "startsWith",
    "string",
    "substring",
    "trim",
    "type",
    "uint",
    "upperAscii",
    "quote",
];
/// Words that no field may be named in an expression.
const RESERVED: [&str; 21] = [
    "as",
    "break",
    "const",
    "continue",
    "else",
    "false",
    "for",
    "function",
    "if",
    "import",
    "in",
    "let",
    "loop",
    "namespace",
    "null",
    "package",
    "return",
    "true",
    "var",
    "void",
    "while",
];

/// An expression.
pub(super) struct Expression {
    source: String,
    program: Program,
}

impl Expression {
    /// Parses one; its faults are the author's (422), what is not there this server's (501).
    pub(super) fn parse(source: &str) -> Result<Self, Refusal> {
        let program = env().compile(source).map_err(|error| {
            let message = format!("compilation failed: {source}: {error}");
            Refusal::new(422, "Invalid", message)
        })?;
        let lacking = {
            let references = program.references();
            let mut functions = references.functions().into_iter();
            let lacking = functions.find(|name| {
                name.starts_with(|c: char| c.is_ascii_alphabetic()) && !FUNCTIONS.contains(name)
            });
            lacking.map(str::to_owned)
        };
        match lacking {
            Some(name) => Err(cannot(&format!("the function {name} of CEL: {source}"))),
            None => Ok(Self { source: source.to_owned(), program }),
        }
    }

    /// The text.
    pub(super) fn source(&self) -> &str {
        &self.source
    }

    /// True when it speaks of this variable.
    pub(super) fn speaks_of(&self, variable: &str) -> bool {
        self.program.references().has_variable(variable)
    }

    /// Evaluates it.
    pub(super) fn evaluate(&self, variables: &Variables) -> Result<Cel, Failure> {
        let mut context = Context::with_env(env());
        for (name, value) in &variables.0 {
            context.add_variable_from_value(name.as_str(), value.clone());
        }
        self.program.execute(&context).map_err(Failure)
    }

    /// Evaluates it to a verdict.
    pub(super) fn holds(&self, variables: &Variables) -> Result<bool, Failure> {
        match self.evaluate(variables)? {
            Cel::Bool(holds) => Ok(holds),
            other => Err(Failure(ExecutionError::function_error(
                "bool",
                format!("the expression is {}", other.type_of()),
            ))),
        }
    }

    /// Evaluates it to a text.
    pub(super) fn text(&self, variables: &Variables) -> Result<String, Failure> {
        match self.evaluate(variables)? {
            Cel::String(text) => Ok(text.to_string()),
            other => Err(Failure(ExecutionError::function_error(
                "string",
                format!("the expression is {}", other.type_of()),
            ))),
        }
    }
}

fn env() -> Arc<Env> {
    static ENV: std::sync::OnceLock<Arc<Env>> = std::sync::OnceLock::new();
    ENV.get_or_init(|| {
        let mut env = Env::stdlib();
        // Names are declared once: this cannot conflict.
        if let Err(error) = env.add_extension(extensions::strings) {
            eprintln!("the test API server has no extension of strings: {error}");
        }
        Arc::new(env)
    })
    .clone()
}

/// Why an expression has no value.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Failure(ExecutionError);

impl Failure {
    /// The key that was not there, if that is why.
    pub(super) fn missing_key(&self) -> Option<&str> {
        match &self.0 {
            ExecutionError::NoSuchKey(key) => Some(key),
            _ => None,
        }
    }
}

/// What expressions speak of, by name.
#[derive(Clone, Default)]
pub(super) struct Variables(HashMap<String, Cel>);

impl Variables {
    pub(super) fn with(mut self, name: &str, value: Cel) -> Self {
        self.set(name, value);
        self
    }

    pub(super) fn set(&mut self, name: &str, value: Cel) {
        self.0.insert(name.to_owned(), value);
    }
}

/// JSON as expressions see it. Names of fields that are no names of CEL are escaped where `fields`
/// is set, which is how a schema's properties appear; a map's keys stay as they are.
pub(super) fn value(json: &Value) -> Cel {
    match json {
        Value::Null => Cel::Null,
        Value::Bool(value) => Cel::Bool(*value),
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(number), _) => Cel::Int(number),
            (None, Some(number)) => Cel::Float(number),
            (None, None) => Cel::Null,
        },
        Value::String(text) => Cel::from(text.as_str()),
        Value::Array(items) => Cel::from(items.iter().map(value).collect::<Vec<Cel>>()),
        Value::Object(fields) => {
            let fields = fields.iter().filter(|(_, field)| !field.is_null());
            map(fields.map(|(name, field)| (name.clone(), value(field))))
        }
    }
}

/// A map.
pub(super) fn map(entries: impl Iterator<Item = (String, Cel)>) -> Cel {
    Cel::from(entries.collect::<HashMap<String, Cel>>())
}

/// A property's name in an expression; `None`: it has none.
pub(super) fn escaped(name: &str) -> Option<String> {
    if RESERVED.contains(&name) {
        return Some(format!("__{name}__"));
    }
    let mut escaped = String::new();
    let mut rest = name;
    while let Some(c) = rest.chars().next() {
        let (text, length) = match c {
            '_' if rest.starts_with("__") => ("__underscores__".to_owned(), 2),
            '.' => ("__dot__".to_owned(), 1),
            '-' => ("__dash__".to_owned(), 1),
            '/' => ("__slash__".to_owned(), 1),
            c if c == '_' || c.is_ascii_alphanumeric() => (c.to_string(), 1),
            _ => return None,
        };
        escaped.push_str(&text);
        rest = &rest[length..];
    }
    Some(escaped).filter(|name| !name.starts_with(|c: char| c.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn holds(source: &str, object: &Value) -> Result<bool, String> {
        let expression = Expression::parse(source).map_err(|refusal| refusal.message)?;
        let variables = Variables::default().with("self", value(object));
        expression.holds(&variables).map_err(|failure| failure.to_string())
    }

    #[test]
    fn expressions_are_evaluated() {
        let object = json!({"a": 3, "labels": {"x/y": "on"}, "list": ["p", "q"], "gone": null});
        for (source, wanted) in [
            ("has(self.a) && self.a >= 3", true),
            ("has(self.gone) || has(self.b)", false),
            ("\"x/y\" in self.labels && self.labels[\"x/y\"] == \"on\"", true),
            ("self.list.exists(item, item == \"q\")", true),
            ("self.list.all(item, item.startsWith(\"p\"))", false),
            ("self.list.size() == 2 ? true : false", true),
            ("\"Upper\".lowerAscii() == \"upper\"", true),
            ("self.labels[\"x/y\"].matches(\"^o[a-z]$\")", true),
        ] {
            assert_eq!(holds(source, &object), Ok(wanted), "{source}");
        }
        // What is not there is an error, no answer.
        assert!(holds("self.b == 3", &object).unwrap_err().contains("No such key: b"));
        assert!(holds("self.a", &object).unwrap_err().contains("the expression is int"));
    }

    #[test]
    fn what_is_lacking_is_named() {
        for name in ["isIP", "quantity", "url", "sum"] {
            let refusal = Expression::parse(&format!("true || {name}(self.a)")).err().unwrap();
            assert_eq!(refusal.code, 501, "{name}");
            assert!(refusal.message.contains(&format!("the function {name}")), "{name}");
        }
        assert_eq!(Expression::parse("self.a ==").err().map(|refusal| refusal.code), Some(422));
    }

    #[test]
    fn property_names_are_escaped() {
        for (name, wanted) in [
            ("endPort", Some("endPort")),
            ("x-y", Some("x__dash__y")),
            ("a.b/c", Some("a__dot__b__slash__c")),
            ("namespace", Some("__namespace__")),
            ("a__b", Some("a__underscores__b")),
            ("ä", None),
            ("1a", None),
        ] {
            assert_eq!(escaped(name).as_deref(), wanted, "{name}");
        }
    }
}
