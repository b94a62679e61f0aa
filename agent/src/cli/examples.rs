//! Every command's help has examples, and each of them is understood.

use clap::{Command, CommandFactory};

use super::Cli;

/// A command line without what a shell does with it: pipes and redirections end it.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted) = (Vec::new(), String::new(), false);
    for c in line.chars() {
        match c {
            '\'' => quoted = !quoted,
            '|' | '>' | ')' if !quoted => break,
            c if c.is_whitespace() && !quoted => {
                words.extend(Some(std::mem::take(&mut word)).filter(|word| !word.is_empty()));
            }
            c => word.push(c),
        }
    }
    words.extend(Some(word).filter(|word| !word.is_empty()));
    words
}

/// What follows the program's name in a line of examples.
fn arguments(line: &str) -> Option<Vec<String>> {
    let line = line.strip_prefix("  ")?;
    let begin = ["signet ", "kubectl signet "].iter().find_map(|p| line.strip_prefix(p));
    let within = || ["-- signet ", "<(signet "].iter().find_map(|p| Some(line.split_once(p)?.1));
    begin.or_else(within).map(words)
}

fn examples(command: &Command) -> Vec<Vec<String>> {
    let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let help = help.replace("\\\n", " ");
    let (_, examples) = help.split_once("Examples:\n").unwrap_or_default();
    examples.lines().take_while(|line| !line.is_empty()).filter_map(arguments).collect()
}

/// Runs `check` for each command that does something.
fn each(path: &str, command: &Command, check: &mut impl FnMut(&str, &Command)) {
    let mut inner = command.get_subcommands().filter(|c| c.get_name() != "help").peekable();
    if inner.peek().is_none() {
        return check(path, command);
    }
    for command in inner {
        each(&format!("{path} {}", command.get_name()), command, check);
    }
}

#[test]
fn each_command_has_examples_that_it_understands() {
    let root = Cli::command();
    let mut tried = 0;
    let mut check = |path: &str, command: &Command| {
        let found = examples(command);
        assert!(!found.is_empty(), "{path} --help has no example");
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        // A longer line would be broken once more, in its middle.
        let long = help.lines().find(|line| line.chars().count() > 100);
        assert_eq!(long, None, "{path} --help");
        for example in found {
            let line = example.join(" ");
            let shown = [&["signet".to_owned()], &example[..]].concat();
            let matches = Cli::command().try_get_matches_from(shown);
            assert!(matches.is_ok(), "{path}: signet {line}: {}", matches.unwrap_err());
            tried += 1;
        }
    };
    check("signet", &root);
    each("signet", &root, &mut check);
    assert!(tried > 50, "{tried} examples");
}

#[test]
fn lines_are_split_as_a_shell_does() {
    let args = |line| arguments(line).map(|words| words.join("|"));
    assert_eq!(args("  signet top -o json | jq '.x > 0'").as_deref(), Some("top|-o|json"));
    assert_eq!(args("  signet flows --identity 'a /*'").as_deref(), Some("flows|--identity|a /*"));
    assert_eq!(args("  source <(signet completion zsh)").as_deref(), Some("completion|zsh"));
    assert_eq!(args("  kubectl exec x -- signet check").as_deref(), Some("check"));
    assert_eq!(args("  man signet-flows"), None);
}
