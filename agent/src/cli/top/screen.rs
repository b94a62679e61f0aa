//! The live form: a screen of its own, with keys.

use std::{io, process, thread, time::Duration};

use ratatui::{
    Frame,
    crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers},
    layout::{Constraint, Layout},
    style::{Color, Modifier, Style},
    text::Line,
    widgets::{Row as Cells, Table, TableState},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use unicode_width::UnicodeWidthStr as _;

use super::{HEADER, Sort, Turn, cells, headline, tally};
use crate::cli::exit::{Exit, Failure};

/// Lines that a page key goes.
const PAGE: usize = 10;
/// How often the keyboard's thread looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(200);
/// The exit code of a process that SIGTERM ends.
const TERMINATED: i32 = 143;
const KEYS: &str = "q ends  s sorts  d denied only  arrows scroll";

/// What is shown, and how.
struct Screen {
    turn: Option<Turn>,
    sort: Sort,
    denied_only: bool,
    /// The first line that is shown.
    from: usize,
}

/// What a key does.
#[derive(PartialEq, Eq, Debug)]
enum Does {
    Nothing,
    Redraw,
    End,
}

/// Shows turns until a key ends it, or there are no more.
pub async fn run(mut turns: mpsc::Receiver<Turn>, sort: Sort) -> Result<Exit, Failure> {
    let failed = |error: io::Error| Failure::new(Exit::Host, format!("the terminal: {error}"));
    let mut told_to_end = signal(SignalKind::terminate()).map_err(failed)?;
    let mut keys = keyboard();
    let mut terminal = ratatui::try_init().map_err(failed)?;
    // Also when the command is interrupted while it waits.
    let restored = Restored;
    let mut screen = Screen { turn: None, sort, denied_only: false, from: 0 };
    loop {
        terminal.draw(|frame| screen.draw(frame)).map_err(failed)?;
        tokio::select! {
            turn = turns.recv() => match turn {
                Some(turn) => screen.turn = Some(turn),
                None => return Ok(Exit::Unreachable),
            },
            key = keys.recv() => match key.map(|event| screen.obey(&event)) {
                Some(Does::End) => return Ok(Exit::Done),
                Some(Does::Redraw | Does::Nothing) => {}
                None => return Err(failed(io::ErrorKind::UnexpectedEof.into())),
            },
            _ = told_to_end.recv() => {
                // The signal's own way to end would leave the terminal as it is.
                drop(restored);
                process::exit(TERMINATED);
            }
        }
    }
}

struct Restored;

impl Drop for Restored {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// What is typed, and changes of the window's size.
fn keyboard() -> mpsc::Receiver<Event> {
    let (events, typed) = mpsc::channel(16);
    thread::spawn(move || {
        while !events.is_closed() {
            let read = match event::poll(LOOK) {
                Ok(false) => continue,
                Ok(true) => event::read(),
                Err(error) => Err(error),
            };
            let Ok(event) = read else { return };
            if events.blocking_send(event).is_err() {
                return;
            }
        }
    });
    typed
}

impl Screen {
    fn obey(&mut self, event: &Event) -> Does {
        let Event::Key(key) = event else { return Does::Redraw };
        if key.kind == KeyEventKind::Release {
            return Does::Nothing;
        }
        let last = self.turn.as_ref().map_or(0, |turn| turn.rows.len().saturating_sub(1));
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return Does::End,
            // Raw mode has taken its meaning away.
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => {
                return Does::End;
            }
            KeyCode::Char('s') => self.sort = self.sort.next(),
            KeyCode::Char('d') => (self.denied_only, self.from) = (!self.denied_only, 0),
            KeyCode::Up | KeyCode::Char('k') => self.from = self.from.saturating_sub(1),
            KeyCode::Down | KeyCode::Char('j') => self.from = (self.from + 1).min(last),
            KeyCode::PageUp => self.from = self.from.saturating_sub(PAGE),
            KeyCode::PageDown => self.from = (self.from + PAGE).min(last),
            KeyCode::Home => self.from = 0,
            KeyCode::End => self.from = last,
            _ => return Does::Nothing,
        }
        Does::Redraw
    }

    fn draw(&mut self, frame: &mut Frame<'_>) {
        let [head, body, foot] =
            Layout::vertical([Constraint::Length(1), Constraint::Min(1), Constraint::Length(1)])
                .areas(frame.area());
        let Some(turn) = &self.turn else {
            frame.render_widget(Line::from("signet top: counting …"), head);
            return;
        };
        frame.render_widget(Line::from(format!("signet top  {}", headline(turn))), head);
        let only = if self.denied_only { "  denied only" } else { "" };
        let foot_line = format!("{KEYS}  by {}{only}", self.sort.name());
        frame.render_widget(Line::from(foot_line).style(Modifier::DIM), foot);
        let shown: Vec<_> = tally::sorted(&turn.rows, self.sort)
            .into_iter()
            .filter(|row| !self.denied_only || row.denied_in_all > 0)
            .collect();
        self.from = self.from.min(shown.len().saturating_sub(1));
        let mut widths = HEADER.map(|name| name.width());
        let mut lines = Vec::with_capacity(shown.len());
        for row in shown {
            let cells = cells(row);
            for (width, cell) in widths.iter_mut().zip(&cells) {
                *width = (*width).max(cell.width());
            }
            let style = match (row.denied > 0.0, row.audit > 0.0) {
                (true, _) => Style::new().fg(Color::Red),
                (false, true) => Style::new().fg(Color::Yellow),
                (false, false) => Style::new(),
            };
            lines.push(Cells::new(cells).style(style));
        }
        let widths =
            widths.map(|width| Constraint::Length(u16::try_from(width).unwrap_or(u16::MAX)));
        let table = Table::new(lines, widths)
            .header(Cells::new(HEADER).style(Style::new().add_modifier(Modifier::BOLD)))
            .column_spacing(2);
        let mut state = TableState::new().with_offset(self.from);
        frame.render_stateful_widget(table, body, &mut state);
    }
}

#[cfg(test)]
mod tests {
    use ratatui::{Terminal, backend::TestBackend, crossterm::event::KeyEvent};

    use super::*;
    use crate::cli::top::tally::Row;

    fn row(identity: &str, out: f64, denied: f64) -> Row {
        Row {
            identity: identity.into(),
            out,
            into: 0.0,
            denied,
            denied_in_all: denied as u64,
            audit: 0.0,
            reason: (denied > 0.0).then(|| "policy_no_match".into()),
            median: Some(Duration::from_millis(3)),
            slowest: None,
        }
    }

    fn screen() -> Screen {
        let turn = Turn {
            time: "2026-08-06T10:12:04Z".parse().unwrap(),
            over: Duration::from_secs(2),
            flows: 13.5,
            denied: 1.0,
            rows: vec![row("shop/a", 3.5, 0.0), row("shop/b", 1.0, 1.0), row("shop/c", 9.0, 0.0)],
            nodes: 2,
            missing: vec![],
            is_partial: false,
            lost: 7,
        };
        Screen { turn: Some(turn), sort: Sort::Flows, denied_only: false, from: 0 }
    }

    fn drawn(screen: &mut Screen) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(86, 6)).unwrap();
        terminal.draw(|frame| screen.draw(frame)).unwrap();
        let buffer = terminal.backend().buffer();
        let line = |y| -> String {
            let cells = (0..86).map(|x| buffer[(x, y)].symbol());
            cells.collect::<String>().trim_end().to_owned()
        };
        (0..6).map(line).collect()
    }

    #[test]
    fn it_looks_like_this() {
        assert_eq!(
            drawn(&mut screen()),
            [
                "signet top  10:12:04  2 nodes  3 identities  13.5 flows/s  1.0 denied/s  7 events lost",
                "IDENTITY  OUT/S  IN/S  DENIED/S  DENIED  AUDIT/S  P50    P99  REASON",
                "shop/c    9.0    0     0         0       0        3.0ms  -    -",
                "shop/a    3.5    0     0         0       0        3.0ms  -    -",
                "shop/b    1.0    0     1.0       1       0        3.0ms  -    policy_no_match",
                "q ends  s sorts  d denied only  arrows scroll  by flows",
            ]
        );
    }

    #[test]
    fn keys_sort_filter_scroll_and_end() {
        let mut screen = screen();
        let mut press = |code, modifiers| screen.obey(&Event::Key(KeyEvent::new(code, modifiers)));
        let plain = KeyModifiers::NONE;
        assert_eq!(press(KeyCode::Char('x'), plain), Does::Nothing);
        assert_eq!(press(KeyCode::Char('q'), plain), Does::End);
        assert_eq!(press(KeyCode::Char('c'), KeyModifiers::CONTROL), Does::End);
        assert_eq!(press(KeyCode::Char('c'), plain), Does::Nothing);
        assert_eq!(press(KeyCode::Char('s'), plain), Does::Redraw);
        assert_eq!(press(KeyCode::Down, plain), Does::Redraw);
        let lines = drawn(&mut screen);
        // By denied, and the first line is scrolled away.
        assert!(lines[2].starts_with("shop/a") && lines[5].ends_with("by denied"), "{lines:?}");
        screen.obey(&Event::Key(KeyEvent::new(KeyCode::Char('d'), plain)));
        let lines = drawn(&mut screen);
        assert!(lines[2].starts_with("shop/b") && lines[3].is_empty(), "{lines:?}");
    }

    #[test]
    fn before_the_first_turn_it_says_so() {
        let mut screen = Screen { turn: None, ..screen() };
        assert_eq!(drawn(&mut screen)[0], "signet top: counting …");
    }
}
