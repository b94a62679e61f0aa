//! A terminal for a program that draws on one: tmux, on a socket of its own.

use std::{
    env, fs,
    path::PathBuf,
    process::{Command, Output},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

/// How often a screen is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// A program on a terminal, until it is dropped. What its screen showed is kept, with times.
#[derive(Debug)]
pub struct Terminal {
    dir: TempDir,
    started: Instant,
    /// Each screen that differed from the one before.
    frames: Vec<(Duration, String)>,
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.tmux(&["kill-server"]).output();
    }
}

impl Terminal {
    /// Runs `program` on a terminal of so many columns and lines. When it has ended, `ended with`
    /// and its exit code are on the screen.
    pub fn start(program: &std::path::Path, args: &[&str], size: (u16, u16)) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let terminal = Self { dir, started: Instant::now(), frames: Vec::new() };
        // What it leaves on the terminal is still seen when it has ended; an interrupt is for the
        // program alone.
        let script = r#"trap : INT; "$0" "$@"; echo "ended with $?"; exec sleep 600"#;
        let (columns, lines) = (size.0.to_string(), size.1.to_string());
        let session = ["-f", "/dev/null", "new-session", "-d", "-x", &columns, "-y", &lines];
        let mut command = terminal.tmux(&session);
        let output = command.args(["sh", "-c", script]).arg(program).args(args).output();
        let output = output.context("tmux: `cargo xtask setup` installs it")?;
        success(&output)?;
        Ok(terminal)
    }

    fn tmux(&self, args: &[&str]) -> Command {
        let mut command = Command::new("tmux");
        command.arg("-S").arg(self.dir.path().join("tmux.sock")).args(args);
        command.env_remove("TMUX").env_remove("SIGNET_SOCKET").env_remove("NO_COLOR");
        command.env("LC_ALL", "C.UTF-8");
        command
    }

    /// Presses a key, as tmux names it: `q`, `C-c`.
    pub fn press(&self, key: &str) -> Result<()> {
        success(&self.tmux(&["send-keys", key]).output()?)
    }

    /// What is on the screen, with its colours as escape sequences where `coloured`.
    pub fn screen(&mut self, coloured: bool) -> Result<String> {
        let colours: &[&str] = if coloured { &["-e"] } else { &[] };
        let output = self.tmux(&[&["capture-pane", "-p"], colours].concat()).output()?;
        success(&output)?;
        let screen = String::from_utf8(output.stdout).context("a screen")?;
        if !coloured && self.frames.last().is_none_or(|(_, last)| *last != screen) {
            self.frames.push((self.started.elapsed(), screen.clone()));
        }
        Ok(screen)
    }

    /// The screen, once it is as it should be; `meanwhile` is done between two looks.
    pub fn until(
        &mut self,
        what: &str,
        limit: Duration,
        mut meanwhile: impl FnMut() -> Result<()>,
        holds: impl Fn(&str) -> bool,
    ) -> Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            let screen = self.screen(false)?;
            if holds(&screen) {
                return Ok(screen);
            }
            if Instant::now() > deadline {
                bail!("{what} never comes:\n{screen}");
            }
            meanwhile()?;
            thread::sleep(LOOK);
        }
    }

    /// Writes the recording, beside the pictures of the page: `target/ui/NAME.txt` has every
    /// screen with its time, `target/ui/NAME.ansi` the last one in its colours.
    pub fn keep(&mut self, name: &str) -> Result<PathBuf> {
        let coloured = self.screen(true)?;
        let target = env::var_os("CARGO_TARGET_DIR").map_or_else(
            || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target"),
            PathBuf::from,
        );
        let dir = target.join("ui");
        fs::create_dir_all(&dir)?;
        let mut text = String::new();
        for (at, screen) in &self.frames {
            text.push_str(&format!("=== {:.1} s\n{}\n", at.as_secs_f64(), screen.trim_end()));
        }
        let path = dir.join(format!("{name}.txt"));
        fs::write(&path, text).with_context(|| path.display().to_string())?;
        fs::write(path.with_extension("ansi"), coloured)?;
        Ok(path)
    }
}

fn success(output: &Output) -> Result<()> {
    if output.status.success() {
        return Ok(());
    }
    bail!("tmux: {} {}", output.status, String::from_utf8_lossy(&output.stderr).trim())
}
