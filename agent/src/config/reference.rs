//! `docs/configuration.md`, generated from [`KEYS`] and held in step with it.

use super::{
    Apply, KEYS,
    authority::{AuthorityConfig, SETTINGS},
};

const HEAD: &str = "# Configuration

The agent reads a YAML file (`--config`), below the environment, below flags. A key that does not
exist is refused wherever it stands. `signet agent --print-config` shows each key with its value and
where that comes from. In the file a dot leads into a section, and lists are YAML lists; elsewhere
lists are comma-separated. *Live* keys take effect when the file changes, *restart* keys when the
agent starts again.

This page is generated from the agent's own table (`agent/src/config/keys.rs`).

| Key | Flag | Environment | Values | Default | Takes effect | Meaning |
|---|---|---|---|---|---|---|
";

const AUTHORITY: &str = "
## The authority

`signet authority` reads its own keys (`agent/src/config/authority.rs`) from the same kinds of sources;
all take effect when it starts.

| Key | Flag | Environment | Values | Default | Meaning |
|---|---|---|---|---|---|
";

fn markdown() -> String {
    let mut page = HEAD.to_owned();
    for key in KEYS {
        let default = match key.default_text().as_str() {
            "null" | "[]" => "–".to_owned(),
            text => format!("`{text}`"),
        };
        let apply = match key.apply {
            Apply::Live => "live",
            Apply::Restart => "restart",
        };
        let doc = key.doc.replace('|', "\\|");
        let form = key.form.replace('|', "\\|");
        page += &format!(
            "| `{}` | `--{}` | `{}` | {form} | {default} | {apply} | {doc} |\n",
            key.name,
            key.flag(),
            key.env(),
        );
    }
    page += AUTHORITY;
    for setting in SETTINGS {
        let default = match setting.show(&AuthorityConfig::default()).as_str() {
            "null" | "[]" => "–".to_owned(),
            text => format!("`{text}`"),
        };
        page += &format!(
            "| `{}` | `--{}` | `{}` | {} | {default} | {} |\n",
            setting.name,
            setting.flag(),
            setting.env(),
            setting.form.replace('|', "\\|"),
            setting.doc.replace('|', "\\|"),
        );
    }
    page
}

#[test]
fn generated_configuration_page_is_in_step() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/configuration.md");
    let page = markdown();
    if std::env::var_os("SIGNET_WRITE_GENERATED").is_some() {
        std::fs::write(path, &page).unwrap();
    }
    let present = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        present == page,
        "docs/configuration.md is behind the table of keys: \
         SIGNET_WRITE_GENERATED=1 cargo test -p signet generated"
    );
}
