//! Places where a test may end or hold this process: one for each side and step of a handover.
//!
//! `WHIMBREL_FAILPOINT=SIDE:STEP:ACTION` arms one for the life of the process; `WHIMBREL_FAILPOINT=file=PATH` arms the
//! one that stands in that file at the time, or none, so that a test need not restart what it is about to kill.
//! ACTION is `abort` (the process dies as by SIGKILL), or `hold=DIR`: the file `DIR/SIDE-STEP` appears, and the process
//! goes on when `DIR/go` exists or after `HOLD_LIMIT`. The points are the steps of the engine's enum; a step cannot be
//! without one, since the host passes the enum's value at every entry.
//!
//! Invariant: without the variable nothing happens and nothing is read after the first look.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use whimbrel_wire::peer::migrate::{Side, Step};

/// Nobody is held for longer than this.
const HOLD_LIMIT: Duration = Duration::from_secs(120);

enum Arming {
    Never,
    Always(Armed),
    In(PathBuf),
}

struct Armed {
    side: Side,
    step: Step,
    action: Action,
}

#[derive(Clone)]
enum Action {
    Abort,
    Hold(PathBuf),
}

fn arming() -> &'static Arming {
    static ARMING: OnceLock<Arming> = OnceLock::new();
    ARMING.get_or_init(|| {
        let Ok(text) = std::env::var("WHIMBREL_FAILPOINT") else { return Arming::Never };
        if let Some(path) = text.strip_prefix("file=") {
            return Arming::In(PathBuf::from(path));
        }
        if let Some(armed) = parse(&text) {
            return Arming::Always(armed);
        }
        tracing::warn!(
            text,
            "WHIMBREL_FAILPOINT is not SIDE:STEP:abort, SIDE:STEP:hold=DIR or file=PATH; ignored"
        );
        Arming::Never
    })
}

fn parse(text: &str) -> Option<Armed> {
    let mut parts = text.trim_end().splitn(3, ':');
    let side = parts.next()?;
    let side = Side::ALL.iter().copied().find(|known| known.as_str() == side)?;
    let step = parts.next()?.parse().ok()?;
    let action = match parts.next()? {
        "abort" => Action::Abort,
        action => Action::Hold(PathBuf::from(action.strip_prefix("hold=")?)),
    };
    Some(Armed { side, step, action })
}

/// What is armed at this point now.
async fn action_at(side: Side, step: Step) -> Option<Action> {
    let here = |armed: &Armed| armed.side == side && armed.step == step;
    match arming() {
        Arming::Never => None,
        Arming::Always(armed) => here(armed).then(|| armed.action.clone()),
        Arming::In(path) => read(path).await.filter(here).map(|armed| armed.action),
    }
}

async fn read(path: &Path) -> Option<Armed> {
    parse(&tokio::fs::read_to_string(path).await.ok()?)
}

/// Called by `side` when it enters `step`.
pub async fn reach(side: Side, step: Step) {
    match action_at(side, step).await {
        None => {}
        Some(Action::Abort) => std::process::abort(),
        Some(Action::Hold(dir)) => {
            let _ = tokio::fs::write(dir.join(format!("{side}-{step}")), b"").await;
            let go = dir.join("go");
            let _ = tokio::time::timeout(HOLD_LIMIT, async {
                while !tokio::fs::try_exists(&go).await.unwrap_or(false) {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            })
            .await;
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn every_step_of_both_sides_can_be_armed() {
        for side in Side::ALL {
            for step in Step::ALL {
                let armed = parse(&format!("{side}:{step}:hold=/x:y\n")).unwrap();
                assert!(armed.side == *side && armed.step == *step);
                assert!(matches!(armed.action, Action::Hold(dir) if dir == Path::new("/x:y")));
                assert!(parse(&format!("{side}:{step}:abort")).is_some());
            }
        }
        assert!(parse("source:jump:abort").is_none());
    }

    #[tokio::test]
    async fn a_file_is_read_anew_each_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("armed");
        assert!(read(&path).await.is_none());
        std::fs::write(&path, "target:verify:abort").unwrap();
        assert!(read(&path).await.is_some_and(|armed| armed.step == Step::Verify));
        std::fs::write(&path, "").unwrap();
        assert!(read(&path).await.is_none());
    }
}
