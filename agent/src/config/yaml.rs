//! YAML as a tree that knows where each value stands, within limits.
//!
//! Everything that people write for Signet (configuration, manifests, policies) is read
//! through this tree, so that every error names line, field, value and remedy the same way.
//! A [`Node`] is also a serde deserializer, for types whose shape is not ours.

use serde::de::{
    self, Deserialize, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, SeqAccess,
    Visitor,
};
use serde_saphyr::Spanned;

/// A document larger than this is refused, in bytes.
pub const MAX_FILE_BYTES: u64 = 8 * 1024 * 1024;
/// Nesting deeper than this is refused.
pub const MAX_DEPTH: usize = 48;
/// A document with more values than this is refused.
pub const MAX_NODES: usize = 200_000;
/// A file with more documents than this is refused.
pub const MAX_DOCUMENTS: usize = 20_000;

/// A value and where it stands.
#[derive(Clone, PartialEq, Debug)]
pub struct Node {
    /// Line in its file, from 1.
    pub line: u64,
    /// The value.
    pub value: Value,
}

/// A YAML value.
#[derive(Clone, PartialEq, Debug)]
pub enum Value {
    /// `null`, `~` or nothing.
    Null,
    /// `true`, `false`.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A whole number above `i64::MAX`.
    Uint(u64),
    /// Another number.
    Float(f64),
    /// Text.
    Text(String),
    /// A list.
    List(Vec<Node>),
    /// A mapping, in order.
    Map(Vec<Field>),
}

/// A field of a mapping.
#[derive(Clone, PartialEq, Debug)]
pub struct Field {
    /// Its name.
    pub name: String,
    /// Line of the name.
    pub line: u64,
    /// Its value.
    pub node: Node,
}

/// What is wrong, and where: one sentence with field, value and remedy.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{}{}{message}", self.path(), self.separator())]
pub struct Fault {
    /// Line in the file, from 1; 0 where it is the whole file.
    pub line: u64,
    /// The field, innermost last.
    path: Vec<String>,
    /// Value and remedy.
    pub message: String,
}

impl Fault {
    /// A fault at a line, of no field yet.
    pub fn new(line: u64, message: impl Into<String>) -> Self {
        Self { line, path: Vec::new(), message: message.into() }
    }

    /// The same fault, seen from the mapping or list that holds it.
    #[must_use]
    pub fn within(mut self, segment: impl Into<String>) -> Self {
        self.path.insert(0, segment.into());
        self
    }

    fn separator(&self) -> &'static str {
        match self.path.last() {
            None => "",
            Some(last) if last.ends_with(':') => " ",
            Some(_) => ": ",
        }
    }

    /// `spec.ingress[0].from`, empty for the whole document. A segment that ends with a colon
    /// stands before the path: `Pod web: spec.nodeName`.
    pub fn path(&self) -> String {
        let mut path = String::new();
        for segment in &self.path {
            if path.ends_with(':') {
                path.push(' ');
            } else if !path.is_empty() && !segment.starts_with('[') {
                path.push('.');
            }
            path.push_str(segment);
        }
        path
    }
}

impl de::Error for Fault {
    fn custom<T: std::fmt::Display>(message: T) -> Self {
        Self::new(0, message.to_string())
    }
}

/// Reads every document of a text. Empty documents are left out.
///
/// # Errors
///
/// The first place that is not YAML or exceeds a limit.
pub fn parse(text: &str) -> Result<Vec<Node>, Fault> {
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(Fault::new(
            0,
            format!("the file has {} bytes; split it: {MAX_FILE_BYTES} is the most", text.len()),
        ));
    }
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: MAX_DEPTH,
            flow_nesting_limit: MAX_DEPTH,
            max_nodes: MAX_NODES,
            max_events: 3 * MAX_NODES,
            max_documents: MAX_DOCUMENTS,
            max_aliases: 1_000,
            max_anchors: 1_000,
            max_merge_keys: 1_000,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: MAX_NODES,
            max_replay_stack_depth: 16,
            max_alias_expansions_per_anchor: 1_000,
        },
        // `signet.dev/mode: off` is a word, not a boolean.
        strict_booleans: true,
        with_snippet: false,
    };
    let nodes: Vec<Node> =
        serde_saphyr::from_multiple_with_options(text, options).map_err(fault_of)?;
    Ok(nodes.into_iter().filter(|node| node.value != Value::Null).collect())
}

/// Reads a text that must hold at most one document.
pub fn parse_one(text: &str) -> Result<Option<Node>, Fault> {
    let mut nodes = parse(text)?;
    match nodes.get(1) {
        Some(second) => Err(Fault::new(second.line, "a second document; write one only")),
        None => Ok(nodes.pop()),
    }
}

fn fault_of(error: serde_saphyr::Error) -> Fault {
    let line = error.location().map_or(0, |location| location.line());
    // The message's own position is repeated by ours.
    let text = error.without_snippet().to_string();
    let text = text.lines().next().unwrap_or_default();
    let text = match text.rfind(" at line ") {
        Some(at) => &text[..at],
        None => text,
    };
    let text = match text.strip_prefix("error: ") {
        Some(rest) => rest
            .split_once("column ")
            .map_or(rest, |(_, rest)| rest.split_once(": ").map_or(rest, |(_, rest)| rest)),
        None => text,
    };
    Fault::new(line, format!("not valid YAML: {text}"))
}

impl Node {
    /// `a list`, `the text "x"`, … for messages.
    pub fn describe(&self) -> String {
        match &self.value {
            Value::Null => "nothing".into(),
            Value::Bool(v) => format!("the boolean {v}"),
            Value::Int(v) => format!("the number {v}"),
            Value::Uint(v) => format!("the number {v}"),
            Value::Float(v) => format!("the number {v}"),
            Value::Text(v) => format!("{:?}", shorten(v)),
            Value::List(_) => "a list".into(),
            Value::Map(_) => "a mapping".into(),
        }
    }

    /// A fault at this value.
    pub fn fault(&self, message: impl Into<String>) -> Fault {
        Fault::new(self.line, message)
    }

    /// True for `null` and nothing.
    pub fn is_null(&self) -> bool {
        self.value == Value::Null
    }

    /// The text.
    pub fn text(&self) -> Result<&str, Fault> {
        match &self.value {
            Value::Text(text) => Ok(text),
            Value::Bool(_) | Value::Int(_) | Value::Uint(_) | Value::Float(_) => {
                Err(self.fault(format!("{} where text is wanted; quote it", self.describe())))
            }
            _ => Err(self.fault(format!("{} where text is wanted", self.describe()))),
        }
    }

    /// A boolean.
    pub fn boolean(&self) -> Result<bool, Fault> {
        match self.value {
            Value::Bool(v) => Ok(v),
            _ => Err(self.fault(format!("{} is not true or false", self.describe()))),
        }
    }

    /// A whole number within bounds.
    pub fn number(&self, least: u64, most: u64) -> Result<u64, Fault> {
        let number = match self.value {
            Value::Int(v) => u64::try_from(v).ok(),
            Value::Uint(v) => Some(v),
            _ => None,
        };
        number.filter(|n| (least..=most).contains(n)).ok_or_else(|| {
            self.fault(format!("{} is not a whole number from {least} to {most}", self.describe()))
        })
    }

    /// The items of a list (`null` is an empty one) of at most `most`, each given to `read`
    /// with its position in the path.
    pub fn list<T>(
        &self,
        most: usize,
        mut read: impl FnMut(&Node) -> Result<T, Fault>,
    ) -> Result<Vec<T>, Fault> {
        let items = match &self.value {
            Value::List(items) => items,
            Value::Null => return Ok(Vec::new()),
            _ => return Err(self.fault(format!("{} where a list is wanted", self.describe()))),
        };
        if items.len() > most {
            return Err(self.fault(format!("{} entries; {most} is the most", items.len())));
        }
        let each = |(index, item)| read(item).map_err(|e: Fault| e.within(format!("[{index}]")));
        items.iter().enumerate().map(each).collect()
    }

    /// The fields of a mapping.
    pub fn fields(&self) -> Result<&[Field], Fault> {
        match &self.value {
            Value::Map(fields) => Ok(fields),
            _ => Err(self.fault(format!("{} where a mapping is wanted", self.describe()))),
        }
    }

    /// A field of a mapping, if it is one and has it and it is not null.
    pub fn get(&self, name: &str) -> Option<&Node> {
        match &self.value {
            Value::Map(fields) => {
                fields.iter().find(|f| f.name == name && !f.node.is_null()).map(|f| &f.node)
            }
            _ => None,
        }
    }

    /// A mapping whose fields are all known: calls `read` for each that is not null.
    pub fn known_fields<'a>(
        &'a self,
        known: &[&str],
        mut read: impl FnMut(&'a str, &'a Node) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        for field in self.fields()? {
            if !known.contains(&field.name.as_str()) {
                return Err(unknown_field(field, known));
            }
            if !field.node.is_null() {
                read(&field.name, &field.node).map_err(|e| e.within(&field.name))?;
            }
        }
        Ok(())
    }

    /// The tree of a JSON value, which has no lines.
    ///
    /// # Errors
    ///
    /// Nesting that is deeper than [`MAX_DEPTH`].
    pub fn from_json(json: serde_json::Value) -> Result<Self, Fault> {
        Self::from_json_below(json, MAX_DEPTH)
    }

    fn from_json_below(json: serde_json::Value, levels: usize) -> Result<Self, Fault> {
        let Some(levels) = levels.checked_sub(1) else {
            return Err(Fault::new(0, format!("nested deeper than {MAX_DEPTH} levels")));
        };
        let value = match json {
            serde_json::Value::Null => Value::Null,
            serde_json::Value::Bool(v) => Value::Bool(v),
            serde_json::Value::Number(v) => match (v.as_i64(), v.as_u64()) {
                (Some(v), _) => Value::Int(v),
                (None, Some(v)) => Value::Uint(v),
                // serde_json's numbers are one of the three.
                (None, None) => Value::Float(v.as_f64().unwrap_or(f64::NAN)),
            },
            serde_json::Value::String(v) => Value::Text(v),
            serde_json::Value::Array(items) => {
                let items = items.into_iter().map(|item| Self::from_json_below(item, levels));
                Value::List(items.collect::<Result<_, _>>()?)
            }
            serde_json::Value::Object(fields) => {
                let fields = fields.into_iter().map(|(name, value)| {
                    Ok(Field { name, line: 0, node: Self::from_json_below(value, levels)? })
                });
                Value::Map(fields.collect::<Result<_, Fault>>()?)
            }
        };
        Ok(Self { line: 0, value })
    }

    /// This tree as a type of serde's.
    ///
    /// # Errors
    ///
    /// The first field that does not fit, with its path and line.
    pub fn deserialize_into<'de, T: Deserialize<'de>>(&'de self) -> Result<T, Fault> {
        T::deserialize(self)
    }
}

/// The fault of a field that nobody reads, with the nearest known one.
pub fn unknown_field(field: &Field, known: &[&str]) -> Fault {
    let hint = match nearest(&field.name, known) {
        Some(near) => format!("did you mean {near}?"),
        None => format!("known are {}", known.join(", ")),
    };
    Fault::new(field.line, format!("unknown field; {hint}")).within(shorten(&field.name))
}

/// The known word that `word` is probably a slip of.
pub fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let distance = |a: &str, b: &str| -> usize {
        // Levenshtein over one row; the words are short.
        let b: Vec<char> = b.chars().flat_map(char::to_lowercase).collect();
        let mut row: Vec<usize> = (0..=b.len()).collect();
        for (i, ca) in a.chars().flat_map(char::to_lowercase).enumerate() {
            let mut diagonal = row[0];
            row[0] = i + 1;
            for (j, cb) in b.iter().enumerate() {
                let substituted = diagonal + usize::from(ca != *cb);
                diagonal = row[j + 1];
                row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
            }
        }
        row[b.len()]
    };
    if word.len() > 64 {
        return None;
    }
    known
        .iter()
        .map(|k| (distance(word, k), *k))
        .min()
        .filter(|(d, k)| *d <= 1 + k.len() / 4)
        .map(|(_, k)| k)
}

/// At most 80 characters of a text, for messages.
pub fn shorten(text: &str) -> String {
    match text.char_indices().nth(80) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

// --- text → tree ---------------------------------------------------------------------

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        Ok(Self { line: spanned.referenced.line(), value: spanned.value })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(Value::Int(v))
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(i64::try_from(v).map_or(Value::Uint(v), Value::Int))
    }

    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        Ok(Value::Float(v))
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(Value::Text(v.to_owned()))
    }

    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(Value::Text(v))
    }

    fn visit_bytes<E: de::Error>(self, _: &[u8]) -> Result<Value, E> {
        Err(E::custom("binary values are not read here"))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Value::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut fields = Vec::new();
        while let Some(name) = map.next_key::<Spanned<String>>()? {
            let node = map.next_value()?;
            fields.push(Field { line: name.referenced.line(), name: name.value, node });
        }
        Ok(Value::Map(fields))
    }
}

// --- tree → types --------------------------------------------------------------------

/// Gives a serde error that does not know where it is the place of the value.
fn place(node: &Node) -> impl Fn(Fault) -> Fault + '_ {
    move |mut fault| {
        if fault.line == 0 {
            fault.line = node.line;
        }
        fault
    }
}

impl<'de> Deserializer<'de> for &'de Node {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match &self.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(v) => visitor.visit_bool(*v),
            Value::Int(v) => visitor.visit_i64(*v),
            Value::Uint(v) => visitor.visit_u64(*v),
            Value::Float(v) => visitor.visit_f64(*v),
            Value::Text(v) => visitor.visit_borrowed_str(v),
            Value::List(items) => visitor.visit_seq(Items { items: items.iter().enumerate() }),
            Value::Map(fields) => visitor.visit_map(Fields { fields: fields.iter(), value: None }),
        }
        .map_err(place(self))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.value {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
        .map_err(place(self))
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        visitor.visit_newtype_struct(self).map_err(place(self))
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_borrowed_str(self.text()?).map_err(place(self))
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_str(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let variant: de::value::StrDeserializer<'_, Fault> = self.text()?.into_deserializer();
        visitor.visit_enum(variant).map_err(place(self))
    }

    fn deserialize_bytes<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_borrowed_bytes(self.text()?.as_bytes()).map_err(place(self))
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_bytes(visitor)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char unit unit_struct seq tuple
        tuple_struct map struct identifier ignored_any
    }
}

struct Items<'de> {
    items: std::iter::Enumerate<std::slice::Iter<'de, Node>>,
}

impl<'de> SeqAccess<'de> for Items<'de> {
    type Error = Fault;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Fault> {
        let Some((index, node)) = self.items.next() else { return Ok(None) };
        seed.deserialize(node).map(Some).map_err(|e| place(node)(e).within(format!("[{index}]")))
    }
}

struct Fields<'de> {
    fields: std::slice::Iter<'de, Field>,
    value: Option<&'de Field>,
}

impl<'de> MapAccess<'de> for Fields<'de> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Fault> {
        let Some(field) = self.fields.next() else { return Ok(None) };
        self.value = Some(field);
        let name: de::value::StrDeserializer<'_, Fault> = field.name.as_str().into_deserializer();
        seed.deserialize(name).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Fault> {
        let Some(field) = self.value.take() else {
            return Err(Fault::new(0, "a value was asked for before its name"));
        };
        seed.deserialize(&field.node)
            .map_err(|e| place(&field.node)(e).within(shorten(&field.name)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn values_know_their_lines_and_words_stay_words() {
        let docs = parse("# head\nmode: off\n---\n---\na:\n  - 1\n  - \"x\"\nb: true\n").unwrap();
        assert_eq!(docs.len(), 2);
        assert_eq!(docs[0].get("mode").unwrap().value, Value::Text("off".into()));
        assert_eq!(docs[0].get("mode").unwrap().line, 2);
        let list = docs[1].get("a").unwrap();
        let lines = list.list(9, |n| Ok(n.line)).unwrap();
        assert_eq!(lines, [6, 7]);
        assert_eq!(docs[1].get("b").unwrap().value, Value::Bool(true));
    }

    #[test]
    fn broken_yaml_is_one_line_with_its_place() {
        for (text, line) in [
            ("a: 1\nb: [1, 2\n", 3),
            ("a: 1\na: 2\n", 2),
            ("x:\n\t- tab\n", 2),
            ("a: *nobody\n", 1),
            ("good: 1\n---\nbad: }\n", 3),
        ] {
            let fault = parse(text).unwrap_err();
            assert!(fault.line.abs_diff(line) <= 1, "{text:?}: {fault:?}");
            assert!(!fault.to_string().contains('\n'), "{fault}");
            assert!(fault.to_string().starts_with("not valid YAML: "), "{fault}");
        }
    }

    #[test]
    fn depth_size_and_alias_bombs_are_refused() {
        let deep = "[".repeat(MAX_DEPTH + 1) + &"]".repeat(MAX_DEPTH + 1);
        assert!(parse(&deep).is_err());
        let fits = "[".repeat(MAX_DEPTH - 2) + &"]".repeat(MAX_DEPTH - 2);
        assert!(parse(&fits).is_ok());
        let mut bomb = String::from("a: &a [x,x,x,x,x,x,x,x,x,x]\n");
        for (this, last) in "bcdefgh".chars().zip("abcdefg".chars()) {
            bomb.push_str(&format!(
                "{this}: &{this} [{}]\n",
                vec![format!("*{last}"); 10].join(",")
            ));
        }
        assert!(parse(&bomb).is_err());
        let wide = format!("[{}]", "1,".repeat(MAX_NODES + 1));
        assert!(parse(&wide).is_err());
    }

    #[derive(serde::Deserialize, Debug)]
    struct Typed {
        #[allow(dead_code, reason = "only its reading is tested")]
        items: Vec<Item>,
    }

    #[derive(serde::Deserialize, Debug)]
    struct Item {
        #[allow(dead_code, reason = "only its reading is tested")]
        port: u16,
    }

    #[test]
    fn typed_reading_names_path_and_line() {
        let node = parse_one("items:\n- port: 1\n- port: many\n").unwrap().unwrap();
        let fault = node.deserialize_into::<Typed>().unwrap_err();
        assert_eq!((fault.line, fault.path().as_str()), (3, "items[1].port"));
        let node = parse_one("items:\n- port: 1\n").unwrap().unwrap();
        assert_eq!(node.deserialize_into::<Typed>().unwrap().items[0].port, 1);
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in ".{0,400}") {
            let _ = parse(&text);
        }

        #[test]
        fn yaml_like_text_never_panics(
            text in "([a-c]: |- |\\[|\\]|\\{|\\}|\"|'|&a |\\*a|\n|  |---\n|\\|\n|>|#|!!|%|0x1|1e3|~|<<: ){0,60}"
        ) {
            let _ = parse(&text);
        }
    }
}
