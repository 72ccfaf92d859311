//! House rules that no compiler checks: charters, file lengths, words that must not land, and a code map that
//! tells the truth.
//!
//! Not here: what rustfmt, clippy, rustdoc and cargo-deny check (`check.rs`).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::cmd::{capture, cmd};
use crate::paths;

/// No source file is longer.
const MAX_LINES: usize = 800;
/// Files that were longer when the rule came, with the length they may not exceed; entries only shrink or go.
const LONGER: [(&str, usize); 1] = [("crates/host/src/disk/layer.rs", 860)];

/// Words that must not land, put together here so that this file passes its own check.
fn banned() -> Vec<(String, &'static str)> {
    let join = |a: &str, b: &str| format!("{a}{b}");
    vec![
        (join("TO", "DO"), "finish it, or say in the documentation what is missing"),
        (join("FIX", "ME"), "fix it"),
        (join("XX", "X"), "say what is wrong, in words"),
        (join("todo", "!("), "an unfinished path must not land"),
        (join("unimplemented", "!("), "an unfinished path must not land"),
        (join("/wo", "rk/"), "no absolute path of a development machine"),
        (join("/ho", "me/"), "no absolute path of a development machine"),
        (join("deb.deb", "ian.org"), "no registry host: derive the mirror from apt's configuration"),
        (join("static.crates", ".io"), "no registry host"),
        (join("index.crates", ".io"), "no registry host"),
    ]
}

/// Files that stand at the top of the project.
const TOP_FILES: [&str; 6] =
    ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "LICENSE-APACHE", "LICENSE-MIT", "Cargo.lock"];
/// Directories with text of ours.
const TEXT: [&str; 6] = ["crates", "xtask", "guest", "docs", ".ci", ".config"];

/// Checks everything that needs no build; every finding is printed.
pub fn run() -> Result<()> {
    let root = paths::workspace();
    let mut findings = Vec::new();
    for name in TOP_FILES {
        if fs::read(root.join(name)).map_or(0, |b| b.len()) == 0 {
            findings.push(format!("{name}: missing or empty"));
        }
    }
    let mut files = Vec::new();
    for dir in TEXT {
        list(&root.join(dir), &mut files)?;
    }
    files.extend(TOP_FILES.iter().map(|n| root.join(n)).filter(|p| p.extension().is_some_and(|e| e == "md")));
    for path in &files {
        let Ok(text) = fs::read_to_string(path) else { continue };
        let name = path.strip_prefix(&root).unwrap_or(path).display().to_string();
        check_file(&name, &text, &mut findings);
    }
    if let Ok(text) = fs::read_to_string(root.join("ARCHITECTURE.md")) {
        check_code_map(&root, &text, &mut findings);
    }
    finish(&findings)
}

fn finish(findings: &[String]) -> Result<()> {
    for f in findings {
        eprintln!("tidy: {f}");
    }
    if !findings.is_empty() {
        bail!("tidy found {} things", findings.len());
    }
    Ok(())
}

fn list(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if !dir.is_dir() {
        return Ok(());
    }
    for entry in fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        let path = entry.context("list files")?.path();
        if path.is_dir() {
            list(&path, files)?;
        } else {
            files.push(path);
        }
    }
    files.sort();
    Ok(())
}

fn check_file(name: &str, text: &str, findings: &mut Vec<String>) {
    let rust = name.ends_with(".rs");
    if rust && !text.starts_with("//!") {
        findings.push(format!("{name}: opens without its charter (//!)"));
    }
    let lines = text.lines().count();
    let limit = LONGER.iter().find(|(n, _)| *n == name).map_or(MAX_LINES, |(_, lines)| *lines);
    if rust && lines > limit {
        findings.push(format!("{name}: {lines} lines, limit {limit}: is it one module?"));
    }
    for (word, advice) in banned() {
        if let Some(at) = text.lines().position(|l| l.contains(&word)) {
            findings.push(format!("{name}:{}: {word:?}: {advice}", at + 1));
        }
    }
}

/// The capability table: a row says `later` in its last cell, or its modules exist and open with a charter. All of
/// them if it says just `built`; at least one on each side if it says that a part is built.
fn check_code_map(root: &Path, text: &str, findings: &mut Vec<String>) {
    let is_row = |l: &&str| {
        l.starts_with('|') && l.trim_start_matches('|').trim().starts_with(|c: char| c.is_ascii_digit())
    };
    let rows: Vec<&str> = text.lines().filter(is_row).collect();
    if rows.len() < 12 {
        findings.push(format!("ARCHITECTURE.md: {} rows of capabilities, expected 12", rows.len()));
    }
    for row in rows {
        let cells: Vec<&str> = row.trim().trim_matches('|').split('|').map(str::trim).collect();
        let [_, what, decides, does, state] = *cells.as_slice() else {
            findings.push(format!("ARCHITECTURE.md: a row without five cells: {row}"));
            continue;
        };
        if state == "later" {
            continue;
        }
        for (cell, base) in [(decides, "crates/engine/src"), (does, "crates/host/src")] {
            let paths: Vec<&str> = cell.split('`').skip(1).step_by(2).collect();
            let missing: Vec<&&str> = paths.iter().filter(|p| !has_charter(&root.join(base), p)).collect();
            let enough = if state == "built" { missing.is_empty() } else { missing.len() < paths.len() };
            if !enough && !paths.is_empty() {
                findings.push(format!(
                    "ARCHITECTURE.md: {what}, {state:?}: no such module in {base}, or it has no charter: {missing:?}"
                ));
            }
        }
    }
}

/// Whether `path`, a file or a folder with its module's file beside it, opens with a charter.
fn has_charter(base: &Path, path: &str) -> bool {
    let file = match path.strip_suffix('/') {
        Some(folder) => base.join(format!("{folder}.rs")),
        None => base.join(path),
    };
    fs::read_to_string(file).is_ok_and(|text| text.starts_with("//!"))
}

/// `docs/cli.md` as the program describes itself.
fn describe_cli(whimbrel: &Path) -> Result<String> {
    let mut text = String::from(
        "# The command line\n\nWritten by `cargo xtask tidy --write-cli` from the program's own help; do not edit.\n",
    );
    describe_command(whimbrel, &[], &mut text)?;
    Ok(text)
}

fn describe_command(whimbrel: &Path, words: &[&str], text: &mut String) -> Result<()> {
    let mut c = cmd(whimbrel, words);
    let help = capture(c.arg("--help").env("COLUMNS", "100").env_remove("WHIMBREL_SOCKET"))?;
    let title = [&["whimbrel"], words].concat().join(" ");
    let level = "#".repeat((words.len() + 2).min(4));
    text.push_str(&format!("\n{level} `{title}`\n\n```text\n{}\n```\n", help.trim_end()));
    for sub in subcommands(&help) {
        describe_command(whimbrel, &[words, &[sub.as_str()]].concat(), text)?;
    }
    Ok(())
}

fn subcommands(help: &str) -> BTreeSet<String> {
    help.lines()
        .skip_while(|l| *l != "Commands:")
        .skip(1)
        .take_while(|l| l.starts_with("  "))
        .filter(|l| !l.starts_with("    "))
        .filter_map(|l| l.split_whitespace().next())
        .filter(|name| *name != "help")
        .map(str::to_owned)
        .collect()
}

/// Writes `docs/cli.md` anew, or checks that it is what the program says.
pub fn cli_docs(whimbrel: &Path, write: bool) -> Result<()> {
    let (path, now) = (paths::workspace().join("docs/cli.md"), describe_cli(whimbrel)?);
    if write {
        return fs::write(&path, now).context("write docs/cli.md");
    }
    if fs::read_to_string(&path).unwrap_or_default() != now {
        bail!("docs/cli.md does not say what the program says: run `cargo xtask tidy --write-cli`");
    }
    Ok(())
}

#[cfg(test)]
mod test {
    use super::*;

    fn findings(name: &str, text: &str) -> Vec<String> {
        let mut f = Vec::new();
        check_file(name, text, &mut f);
        f
    }

    #[test]
    fn a_file_without_charter_or_with_a_banned_word_is_found() {
        assert!(findings("a.rs", "//! What it is.\nfn a() {}\n").is_empty());
        assert!(findings("a.rs", "fn a() {}\n")[0].contains("charter"));
        let word = format!("//! x\n// {}{}: later\n", "TO", "DO");
        assert!(findings("a.rs", &word)[0].starts_with("a.rs:2"));
        assert!(findings("a.rs", &"//! x\n".repeat(MAX_LINES + 1))[0].contains("limit"));
    }

    #[test]
    fn a_code_map_that_names_a_missing_module_is_found_unless_it_comes_later() {
        let check = |paths: &str, state: &str| {
            let row = format!("| 1 | relay | {paths} | the agent | {state} |\n");
            let mut f = Vec::new();
            check_code_map(&paths::workspace(), &row.repeat(12), &mut f);
            f.len()
        };
        assert_eq!(check("`no/such.rs`", "built"), 12);
        assert_eq!(check("`no/such.rs`", "later"), 0);
        assert_eq!(check("`no/such.rs`, `image/`", "a part built"), 0);
        assert_eq!(check("`no/such.rs`, `image/`", "built"), 12);
    }

    #[test]
    fn subcommands_are_read_from_help() {
        let help = "Text\n\nCommands:\n  run   Start\n  list  All\n          more text\n  help  Print\n\nOptions:\n  -h\n";
        assert_eq!(subcommands(help).into_iter().collect::<Vec<_>>(), ["list", "run"]);
    }
}
