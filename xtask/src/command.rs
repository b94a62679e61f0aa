//! Running other programs: shown before they run, an error names them.

use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};

/// Prints the command and runs it with our standard streams; fails when it fails.
pub fn run(command: &mut Command) -> anyhow::Result<()> {
    eprintln!("$ {}", shown(command));
    let status =
        command.status().with_context(|| format!("`{}` could not be started", shown(command)))?;
    if !status.success() {
        bail!("`{}` ended with {status}", shown(command));
    }
    Ok(())
}

/// Prints the command and runs it without its standard output; fails when it fails.
pub fn quietly(command: &mut Command) -> anyhow::Result<()> {
    run(command.stdout(Stdio::null()))
}

/// Runs a program quietly and returns its standard output; `None` when it is missing or fails.
pub fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The command as one would type it, with the environment it adds.
pub fn shown(command: &Command) -> String {
    let mut words = Vec::new();
    for (name, value) in command.get_envs() {
        if let Some(value) = value {
            words.push(format!("{}={}", name.to_string_lossy(), quoted(&value.to_string_lossy())));
        }
    }
    words.push(quoted(&command.get_program().to_string_lossy()));
    words.extend(command.get_args().map(|a| quoted(&a.to_string_lossy())));
    words.join(" ")
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_as_one_would_type_it() {
        let mut command = Command::new("cargo");
        command.args(["test", "a b", "it's"]).env("LEVEL", "1");
        assert_eq!(shown(&command), r"LEVEL=1 cargo test 'a b' 'it'\''s'");
    }

    #[test]
    fn a_failing_command_is_an_error_that_names_it() {
        assert!(run(&mut Command::new("true")).is_ok());
        let error = run(&mut Command::new("false")).unwrap_err().to_string();
        assert!(error.starts_with("`false` ended with"), "{error}");
        assert!(output("false", &[]).is_none());
        assert_eq!(output("printf", &["x"]).as_deref(), Some("x"));
    }
}
