//! Processor time of processes, without the part that a guest itself uses.

use std::fs;
use std::path::Path;

/// Clock ticks per second in /proc, the same on every Linux for x86-64.
const TICKS_PER_S: f64 = 100.0;

/// Seconds of processor time that `pid` used so far, less its virtual processors'. 0 for a process that is gone.
pub fn overhead_s(pid: u32) -> f64 {
    let process = format!("/proc/{pid}");
    let mut ticks = ticks(Path::new(&process));
    for task in fs::read_dir(format!("{process}/task")).into_iter().flatten().flatten() {
        let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        if name.starts_with("CPU ") {
            ticks -= self::ticks(&task.path());
        }
    }
    (ticks / TICKS_PER_S).max(0.0)
}

/// utime + stime of a process or thread.
fn ticks(dir: &Path) -> f64 {
    let stat = fs::read_to_string(dir.join("stat")).unwrap_or_default();
    // The name in parentheses may hold anything; fields count from behind it.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let field = |n: usize| fields.get(n).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
    field(11) + field(12)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_busy_process_uses_processor_time_and_a_missing_one_none() {
        let started = std::time::Instant::now();
        let mut x = 1u64;
        while started.elapsed().as_millis() < 60 {
            x = x.wrapping_mul(3).rotate_left(7);
        }
        assert!(x != 0 && overhead_s(std::process::id()) > 0.01);
        assert!(overhead_s(u32::MAX - 1).abs() < f64::EPSILON);
    }
}
