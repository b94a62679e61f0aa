//! Columns that line up; nothing is cut off.

use unicode_width::UnicodeWidthStr;

/// Rows whose cells are padded to the widest of their column, two spaces between them.
#[derive(Debug, Default)]
pub struct Table {
    widths: Vec<usize>,
}

impl Table {
    /// Makes room for a row.
    pub fn fit<S: AsRef<str>>(&mut self, row: &[S]) {
        for (column, cell) in row.iter().enumerate() {
            let width = cell.as_ref().width();
            match self.widths.get_mut(column) {
                Some(widest) => *widest = width.max(*widest),
                None => self.widths.push(width),
            }
        }
    }

    /// A row as a line; `style` may wrap a cell (it sees column and text, not the padding).
    pub fn line<S: AsRef<str>>(
        &self,
        row: &[S],
        style: impl Fn(usize, &str) -> Option<anstyle::Style>,
    ) -> String {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let cell = cell.as_ref();
            if column > 0 {
                line.push_str("  ");
            }
            match style(column, cell) {
                Some(style) => line.push_str(&format!("{style}{cell}{style:#}")),
                None => line.push_str(cell),
            }
            if column + 1 < row.len() {
                let width = self.widths.get(column).copied().unwrap_or(0);
                line.push_str(&" ".repeat(width.saturating_sub(cell.width())));
            }
        }
        line
    }

    /// All rows as lines, without style.
    pub fn plain<S: AsRef<str>>(rows: &[Vec<S>]) -> Vec<String> {
        let mut table = Self::default();
        rows.iter().for_each(|row| table.fit(row));
        rows.iter().map(|row| table.line(row, |_, _| None)).collect()
    }
}

/// Text from outside on one line: control characters would reach the terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// `3h12m`, `9m`, `40s`: the two largest units.
pub fn duration(seconds: u64) -> String {
    let (days, hours) = (seconds / 86_400, seconds / 3600 % 24);
    let (minutes, rest) = (seconds / 60 % 60, seconds % 60);
    let pair = |a: u64, unit: &str, b: u64, small: &str| {
        if b == 0 { format!("{a}{unit}") } else { format!("{a}{unit}{b}{small}") }
    };
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{rest}s"),
        (0, 0, m) => pair(m, "m", rest, "s"),
        (0, h, m) => pair(h, "h", m, "m"),
        (d, h, _) => pair(d, "d", h, "h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (seconds, expected) in
            [(0, "0s"), (59, "59s"), (540, "9m"), (61, "1m1s"), (11_520, "3h12m"), (90_000, "1d1h")]
        {
            assert_eq!(duration(seconds), expected);
        }
    }

    #[test]
    fn columns_line_up_by_what_is_seen() {
        let rows = vec![vec!["A", "B"], vec!["日本", "x"], vec!["c", ""]];
        assert_eq!(Table::plain(&rows), ["A     B", "日本  x", "c     "]);
    }
}
