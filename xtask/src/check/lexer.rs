//! Just enough of Rust's lexical grammar to read paths, keywords and attributes without
//! being fooled by comments, strings, characters and lifetimes.

/// A token that the checks look at.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Token<'a> {
    /// The word or the single punctuation character.
    pub text: &'a str,
    /// Its line, from 1.
    pub line: usize,
}

/// The words (identifiers, keywords, numbers) and punctuation of a source file.
///
/// Strings, characters and lifetimes are left out, comments too; a raw identifier loses its
/// `r#`. Text that does not end (an open string) ends with the file.
pub fn tokens(source: &str) -> Vec<Token<'_>> {
    Lexer { source, bytes: source.as_bytes(), at: 0, line: 1 }.run()
}

struct Lexer<'a> {
    source: &'a str,
    bytes: &'a [u8],
    at: usize,
    line: usize,
}

impl<'a> Lexer<'a> {
    fn run(mut self) -> Vec<Token<'a>> {
        let mut tokens = Vec::new();
        while let Some(byte) = self.peek(0) {
            match byte {
                b'/' if self.peek(1) == Some(b'/') => self.skip_while(|b| b != b'\n'),
                b'/' if self.peek(1) == Some(b'*') => self.block_comment(),
                b'"' => self.string(),
                b'\'' => self.character_or_lifetime(),
                b if is_word(b) => {
                    let start = self.at;
                    let line = self.line;
                    self.skip_while(is_word);
                    let word = &self.source[start..self.at];
                    if !self.literal_after(word) {
                        tokens.push(Token { text: word, line });
                    }
                }
                b if b.is_ascii_whitespace() => self.advance(),
                _ => {
                    tokens
                        .push(Token { text: &self.source[self.at..self.at + 1], line: self.line });
                    self.advance();
                }
            }
        }
        tokens
    }

    fn peek(&self, ahead: usize) -> Option<u8> {
        self.bytes.get(self.at + ahead).copied()
    }

    fn advance(&mut self) {
        if self.peek(0) == Some(b'\n') {
            self.line += 1;
        }
        self.at += 1;
    }

    fn skip_while(&mut self, keep: impl Fn(u8) -> bool) {
        while self.peek(0).is_some_and(&keep) {
            self.advance();
        }
    }

    fn block_comment(&mut self) {
        let mut depth = 0;
        while let Some(byte) = self.peek(0) {
            let step = match (byte, self.peek(1)) {
                (b'/', Some(b'*')) => 1,
                (b'*', Some(b'/')) => -1,
                _ => {
                    self.advance();
                    continue;
                }
            };
            self.advance();
            self.advance();
            depth += step;
            if depth == 0 {
                return;
            }
        }
    }

    fn string(&mut self) {
        self.advance();
        while let Some(byte) = self.peek(0) {
            self.advance();
            match byte {
                b'\\' => self.advance(),
                b'"' => return,
                _ => {}
            }
        }
    }

    fn character_or_lifetime(&mut self) {
        // 'a' and '\n' are characters, 'a without a closing quote is a lifetime.
        if self.peek(1) == Some(b'\\') {
            self.advance();
            self.advance();
            self.advance();
            self.skip_while(|b| b != b'\'');
            self.advance();
            return;
        }
        let character = self.source[self.at + 1..].chars().next();
        let width = character.map_or(0, char::len_utf8);
        self.advance();
        if self.peek(width) == Some(b'\'') {
            for _ in 0..=width {
                self.advance();
            }
        } else {
            self.skip_while(is_word);
        }
    }

    /// Skips the literal that `word` is a prefix of (`b"…"`, `r#"…"#`, `b'x'`); true when
    /// it was one. A raw identifier's `r#` is skipped too.
    fn literal_after(&mut self, word: &str) -> bool {
        match (word, self.peek(0)) {
            ("b" | "c", Some(b'"')) => self.string(),
            ("b", Some(b'\'')) => self.character_or_lifetime(),
            ("r" | "br" | "cr", Some(b'"' | b'#')) => {
                let hashes = self.bytes[self.at..].iter().take_while(|b| **b == b'#').count();
                if self.peek(hashes) != Some(b'"') {
                    // `r#type`
                    self.advance();
                    return true;
                }
                let end = format!("\"{}", "#".repeat(hashes));
                for _ in 0..=hashes {
                    self.advance();
                }
                while self.at < self.bytes.len()
                    && !self.bytes[self.at..].starts_with(end.as_bytes())
                {
                    self.advance();
                }
                for _ in 0..end.len() {
                    self.advance();
                }
            }
            _ => return false,
        }
        true
    }
}

fn is_word(byte: u8) -> bool {
    byte == b'_' || byte.is_ascii_alphanumeric() || byte >= 0x80
}

/// Lines (from 1, inclusive) of the modules under `#[cfg(test)]`.
pub fn test_lines(tokens: &[Token<'_>]) -> Vec<(usize, usize)> {
    const ATTRIBUTE: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut found = Vec::new();
    let mut at = 0;
    while at + ATTRIBUTE.len() <= tokens.len() {
        let is_attribute = tokens[at..].iter().zip(ATTRIBUTE).all(|(t, wanted)| t.text == wanted);
        if !is_attribute {
            at += 1;
            continue;
        }
        let end = item_end(tokens, at + ATTRIBUTE.len());
        let last = tokens[end.min(tokens.len() - 1)].line;
        found.push((tokens[at].line, last));
        at = end + 1;
    }
    found
}

/// Index of the token that ends the item at `at`: its closing brace or its semicolon.
fn item_end(tokens: &[Token<'_>], at: usize) -> usize {
    let mut depth = 0usize;
    for (index, token) in tokens.iter().enumerate().skip(at) {
        match token.text {
            "{" => depth += 1,
            "}" => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    return index;
                }
            }
            ";" if depth == 0 => return index,
            _ => {}
        }
    }
    tokens.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(source: &str) -> Vec<&str> {
        tokens(source).into_iter().map(|t| t.text).filter(|t| is_word(t.as_bytes()[0])).collect()
    }

    #[test]
    fn comments_strings_and_characters_are_left_out() {
        assert_eq!(words("a // b\nc /* d /* e */ f */ g"), ["a", "c", "g"]);
        assert_eq!(words(r##"a "b \" c" d r#"e " f"# g b"h" i"##), ["a", "d", "g", "i"]);
        assert_eq!(
            words(r"a '\'' b '\u{1F600}' c '\\' d 'é' e b'x' f"),
            ["a", "b", "c", "d", "e", "f"]
        );
        assert_eq!(words("fn x<'a>(y: &'a str) 'outer: loop {}"), ["fn", "x", "y", "str", "loop"]);
        assert_eq!(words("r#type r#\"a\"# b"), ["type", "b"]);
        assert_eq!(words("a \"never closed b"), ["a"]);
    }

    #[test]
    fn lines_are_counted_through_everything() {
        let source = "a\n\"x\ny\"\n/* \n */ b\nr\"\n\" c 'x'\nd";
        let lines: Vec<_> = tokens(source).iter().map(|t| (t.text, t.line)).collect();
        assert_eq!(lines, [("a", 1), ("b", 5), ("c", 7), ("d", 8)]);
    }

    #[test]
    fn test_modules_are_found_with_their_ends() {
        let source = "fn a() {}\n#[cfg(test)]\nmod tests {\n  fn b() { {} }\n}\nfn c() {}\n#[cfg(test)]\nmod more;\n";
        assert_eq!(test_lines(&tokens(source)), [(2, 5), (7, 8)]);
        assert_eq!(test_lines(&tokens("#[cfg(not(test))]\nmod a {}")), []);
    }
}
