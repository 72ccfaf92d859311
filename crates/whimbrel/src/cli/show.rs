//! Tables, sizes and progress for people.

use std::io::{IsTerminal as _, Write as _};

use whimbrel_wire::api::Task;
use whimbrel_wire::size::show_bytes;

/// Columns padded to their widest cell; the first row is the heading.
pub fn table(heading: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = heading.iter().map(|cell| cell.len()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> = cells.zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        padded.join("  ").trim_end().to_owned() + "\n"
    };
    let mut text = line(&mut heading.iter().copied());
    for row in rows {
        text += &line(&mut row.iter().map(String::as_str));
    }
    text
}

/// `key: value` lines, values aligned.
pub fn fields(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(key, _)| key.len()).max().unwrap_or(0) + 1;
    pairs.iter().map(|(key, value)| format!("{:<width$} {value}\n", format!("{key}:"))).collect()
}

/// Shows how long work goes on: a bar on a terminal, a line every few seconds otherwise. Writes to standard error.
pub struct Progress {
    terminal: bool,
    last_line: Option<std::time::Instant>,
    drawn: bool,
}

/// Between two lines when standard error is not a terminal.
const LINE_EVERY_S: u64 = 3;

impl Default for Progress {
    fn default() -> Self {
        Self { terminal: std::io::stderr().is_terminal(), last_line: None, drawn: false }
    }
}

impl Progress {
    /// Shows the task's present figures.
    pub fn show(&mut self, task: &Task) {
        if self.terminal {
            let line = line(task);
            eprint!("\r\x1b[2K{line}");
            let _ = std::io::stderr().flush();
            self.drawn = true;
        } else if self.last_line.is_none_or(|at| at.elapsed().as_secs() >= LINE_EVERY_S) {
            eprintln!("{}", line(task));
            self.last_line = Some(std::time::Instant::now());
        }
    }

    /// Leaves the line of the bar.
    pub fn finish(&mut self) {
        if self.drawn {
            eprintln!();
            self.drawn = false;
        }
    }
}

fn line(task: &Task) -> String {
    let mut line = format!("{}: {}", task.object, task.phase);
    if let Some(share) = (task.done_bytes.min(task.total_bytes) * 100).checked_div(task.total_bytes) {
        line +=
            &format!("  {share:>3} %  {} of {}", show_bytes(task.done_bytes), show_bytes(task.total_bytes));
    }
    if task.rate_bytes_s > 0 {
        line += &format!("  {}/s", show_bytes(task.rate_bytes_s));
    }
    if let Some(eta_s) = task.eta_s {
        line += &format!("  {eta_s} s left");
    }
    if let Some(waiting_for) = &task.waiting_for {
        line += &format!("  waiting for {waiting_for}");
    }
    line
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn columns_line_up() {
        let text = table(
            &["NAME", "STATE"],
            &[vec!["web-server".into(), "running".into()], vec!["a".into(), "x".into()]],
        );
        assert_eq!(text, "NAME        STATE\nweb-server  running\na           x\n");
    }
}
