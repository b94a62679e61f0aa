//! Imports of `agent` run downwards: a room imports only rooms of lower floors.
//!
//! The table of floors is the numbered list at the head of `agent/src/lib.rs`; this reads it
//! from there, so that there is one.

use std::collections::BTreeMap;

use super::{
    Finding,
    lexer::{self, Token},
};

/// Room → floor.
pub type Floors = BTreeMap<String, u32>;

/// Reads the table from the crate's head and holds it against the modules that it declares.
pub fn read_table(lib: &str, tokens: &[Token<'_>], findings: &mut Vec<Finding>) -> Floors {
    let mut floors = Floors::new();
    let mut floor = None;
    for (index, line) in lib.lines().enumerate() {
        let Some(text) = line.strip_prefix("//!") else { break };
        let text = text.trim_start();
        if let Some((number, _)) = text.split_once(". ")
            && let Ok(number) = number.parse::<u32>()
        {
            floor = Some(number);
        } else if text.is_empty() {
            // The list is one paragraph an item; a blank line ends it.
            floor = None;
        }
        let Some(floor) = floor else { continue };
        for room in links(text) {
            if let Some(earlier) = floors.insert(room.to_owned(), floor)
                && earlier != floor
            {
                findings.push(Finding::error(
                    "agent/src/lib.rs",
                    index + 1,
                    format!("`{room}` is on floor {earlier} and on floor {floor} of the map"),
                ));
            }
        }
    }
    hold_against_modules(&floors, tokens, findings);
    floors
}

fn hold_against_modules(floors: &Floors, tokens: &[Token<'_>], findings: &mut Vec<Finding>) {
    let declared: BTreeMap<&str, usize> = tokens
        .windows(3)
        .filter(|w| w[0].text == "mod" && w[2].text == ";")
        .map(|w| (w[1].text, w[1].line))
        .collect();
    for (room, line) in &declared {
        if !floors.contains_key(*room) {
            findings.push(Finding::error(
                "agent/src/lib.rs",
                *line,
                format!("module `{room}` has no floor: name it as [`{room}`] in the list above"),
            ));
        }
    }
    for (room, floor) in floors {
        if !declared.contains_key(room.as_str()) {
            findings.push(Finding::error(
                "agent/src/lib.rs",
                1,
                format!("the map has `{room}` on floor {floor}, but there is no such module"),
            ));
        }
    }
}

/// The plain names in ``[`name`]`` links of a line.
fn links(text: &str) -> impl Iterator<Item = &str> {
    text.split("[`").skip(1).filter_map(|rest| {
        let name = rest.split_once("`]")?.0;
        name.bytes().all(|b| b == b'_' || b.is_ascii_alphanumeric()).then_some(name)
    })
}

/// Checks one file of the crate, given as its path below `agent/src`.
///
/// Test modules are left out: they make what they need from wherever it is made.
pub fn check(floors: &Floors, file: &str, tokens: &[Token<'_>], findings: &mut Vec<Finding>) {
    let module: Vec<&str> = module_path(file);
    let Some(room) = module.first() else { return };
    let Some(own) = floors.get(*room) else { return };
    let tests = lexer::test_lines(tokens);
    for import in imports(&module, tokens) {
        let in_test = tests.iter().any(|(first, last)| (*first..=*last).contains(&import.line));
        if import.room == *room || in_test {
            continue;
        }
        let Some(floor) = floors.get(import.room) else { continue };
        if floor < own {
            continue;
        }
        let relation = if floor == own { "the same floor" } else { "a floor above" };
        findings.push(Finding::error(
            &format!("agent/src/{file}"),
            import.line,
            format!(
                "`{room}` (floor {own}) imports `{}` (floor {floor}), which is on {relation}: \
                 move what both need down, or hand it over from above",
                import.room
            ),
        ));
    }
}

/// `proxy/http/mod.rs` → `[proxy, http]`; the crate's root has no module path.
fn module_path(file: &str) -> Vec<&str> {
    let stem = file.strip_suffix(".rs").unwrap_or(file);
    let mut path: Vec<&str> = stem.split('/').collect();
    match path.last() {
        Some(&"mod") => drop(path.pop()),
        Some(&"lib" | &"main") if path.len() == 1 => path.clear(),
        _ => {}
    }
    path
}

struct Import<'a> {
    room: &'a str,
    line: usize,
}

/// Every room named by a path from the crate's root: `crate::room…`, `crate::{a, b::c}`, and
/// `super::…` chains that reach the root.
fn imports<'a>(module: &[&str], tokens: &[Token<'a>]) -> Vec<Import<'a>> {
    let mut found = Vec::new();
    let mut depth = 0usize;
    // Brace depths at which inline modules were opened: each is one more level for `super`.
    let mut inline: Vec<usize> = Vec::new();
    let text = |index: usize| tokens.get(index).map_or("", |t| t.text);
    let mut at = 0;
    while at < tokens.len() {
        match text(at) {
            "{" => {
                if at >= 2 && text(at - 2) == "mod" {
                    inline.push(depth);
                }
                depth += 1;
            }
            "}" => {
                depth = depth.saturating_sub(1);
                if inline.last() == Some(&depth) {
                    inline.pop();
                }
            }
            "crate" if text(at + 1) == ":" && text(at + 2) == ":" => {
                rooms_at(tokens, at + 3, &mut found);
            }
            "super" if at == 0 || text(at - 1) != ":" => {
                let mut ups = 1;
                let mut next = at + 1;
                while text(next) == ":" && text(next + 1) == ":" && text(next + 2) == "super" {
                    ups += 1;
                    next += 3;
                }
                let reaches_root = ups == module.len() + inline.len();
                if reaches_root && text(next) == ":" && text(next + 1) == ":" {
                    rooms_at(tokens, next + 2, &mut found);
                }
            }
            _ => {}
        }
        at += 1;
    }
    found
}

/// The first names of the path or of the group of paths at `at`.
fn rooms_at<'a>(tokens: &[Token<'a>], at: usize, found: &mut Vec<Import<'a>>) {
    let Some(first) = tokens.get(at) else { return };
    if first.text != "{" {
        found.push(Import { room: first.text, line: first.line });
        return;
    }
    let mut depth = 0usize;
    let mut expects_name = false;
    for token in &tokens[at..] {
        match token.text {
            "{" => {
                depth += 1;
                expects_name = depth == 1;
            }
            "}" => {
                depth -= 1;
                if depth == 0 {
                    return;
                }
            }
            "," => expects_name = depth == 1,
            name if expects_name => {
                found.push(Import { room: name, line: token.line });
                expects_name = false;
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::lexer::tokens, *};

    const LIB: &str = "//! The house.\n//!\n//! 1. [`spiffe`] parses, [`config`] reads,\n//!    [`telemetry`] names.\n//! 2. [`policy`] decides over a [`cluster::model::World`].\n//! 3. [`cluster`] knows.\n//!\n//! See also [`elsewhere`].\n\npub mod cluster;\npub mod config;\npub mod policy;\npub mod spiffe;\npub mod telemetry;\n";

    fn table() -> Floors {
        let mut findings = Vec::new();
        let floors = read_table(LIB, &tokens(LIB), &mut findings);
        assert!(findings.is_empty(), "{findings:?}");
        floors
    }

    fn findings(file: &str, source: &str) -> Vec<(usize, String)> {
        let mut findings = Vec::new();
        check(&table(), file, &tokens(source), &mut findings);
        findings.into_iter().map(|f| (f.line, f.message)).collect()
    }

    #[test]
    fn the_table_is_read_from_the_head_of_the_crate() {
        let floors = table();
        assert_eq!(floors.len(), 5, "{floors:?}");
        assert_eq!((floors["telemetry"], floors["policy"], floors["cluster"]), (1, 2, 3));
    }

    #[test]
    fn a_module_without_a_floor_and_a_floor_without_a_module_are_found() {
        let lib = LIB.replace("pub mod cluster;", "pub mod drawer;");
        let mut findings = Vec::new();
        read_table(&lib, &tokens(&lib), &mut findings);
        let text = format!("{findings:?}");
        assert_eq!(findings.len(), 2, "{text}");
        assert!(text.contains("module `drawer` has no floor"), "{text}");
        assert!(text.contains("the map has `cluster` on floor 3"), "{text}");
    }

    #[test]
    fn downward_imports_pass() {
        let good = "use crate::{policy::model::{Policy, Rule}, spiffe::SpiffeId};\n\
                    fn f() -> crate::telemetry::Name { self::x(); super::y() }\n\
                    use crate::cluster::World;";
        assert!(findings("cluster/files.rs", good).is_empty());
    }

    #[test]
    fn upward_and_sideways_imports_are_found_in_every_form() {
        let sideways = findings("spiffe/id.rs", "use std::fmt;\nuse crate::config::AgentConfig;");
        assert_eq!(sideways.len(), 1, "{sideways:?}");
        assert_eq!(sideways[0].0, 2);
        assert!(sideways[0].1.contains("the same floor"), "{sideways:?}");

        let grouped = "use crate::{\n    policy::model,\n    cluster::{self, model::{World}},\n};";
        let up = findings("spiffe/id.rs", grouped);
        assert_eq!(up.iter().map(|f| f.0).collect::<Vec<_>>(), [2, 3], "{up:?}");
        assert!(up[1].1.contains("a floor above"), "{up:?}");

        assert_eq!(findings("policy/a.rs", "fn f() { crate::cluster::go() }").len(), 1);
        assert_eq!(findings("policy/a.rs", "use super::super::cluster::World;").len(), 1);
        assert_eq!(findings("policy/mod.rs", "use super::cluster::World;").len(), 1);
        assert_eq!(findings("policy/a.rs", "pub(in crate::cluster) fn f() {}").len(), 1);
    }

    #[test]
    fn super_inside_an_inline_module_starts_there() {
        let own = "mod tests { use super::super::cluster::x; fn f() { if a { b } } }";
        assert!(findings("policy/a.rs", own).is_empty());
        let root = "mod tests { fn f() { {} } use super::super::super::cluster::x; }";
        assert_eq!(findings("policy/a.rs", root).len(), 1);
        let after = "mod tests { }\nuse super::super::cluster::x;";
        assert_eq!(findings("policy/a.rs", after).len(), 1);
    }

    #[test]
    fn test_modules_may_import_from_anywhere() {
        let import = "use crate::config::AgentConfig;";
        let test = format!("#[cfg(test)]\nmod tests {{\n    {import}\n}}");
        assert!(findings("spiffe/id.rs", &test).is_empty());
        assert_eq!(findings("spiffe/id.rs", &format!("{test}\n{import}")).len(), 1);
    }

    #[test]
    fn words_in_comments_and_strings_are_not_imports() {
        let source = "// use crate::cluster::World;\nconst A: &str = \"crate::cluster\";";
        assert!(findings("spiffe/id.rs", source).is_empty());
    }
}
