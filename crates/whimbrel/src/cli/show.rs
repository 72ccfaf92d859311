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

/// Seconds since 1970 as a date and time of UTC.
pub fn show_time(wall_s: u64) -> String {
    let (days, second) = (wall_s / 86_400, wall_s % 86_400);
    // Howard Hinnant's civil_from_days, for years after 1970.
    let z = days + 719_468;
    let (era, of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let day_of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let (day, month) =
        (day_of_year - (153 * shifted + 2) / 5 + 1, if shifted < 10 { shifted + 3 } else { shifted - 9 });
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02} UTC", second / 3600, second % 3600 / 60)
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

    #[test]
    fn a_time_is_shown_as_the_calendar_says() {
        // From `date -u -d @N`.
        for (wall_s, shown) in [
            (0, "1970-01-01 00:00 UTC"),
            (951_782_399, "2000-02-28 23:59 UTC"),
            (951_782_400, "2000-02-29 00:00 UTC"),
            (1_709_251_199, "2024-02-29 23:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00 UTC"),
        ] {
            assert_eq!(show_time(wall_s), shown);
        }
    }
}
