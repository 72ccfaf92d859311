//! Places where a test may end or hold this process: one for each side and step of a handover.
//!
//! `WHIMBREL_FAILPOINT=SIDE:STEP:ACTION` arms one. ACTION is `abort` (the process dies as by SIGKILL), or
//! `hold=DIR`: the file `DIR/SIDE-STEP` appears, and the process goes on when `DIR/go` exists or after
//! `HOLD_LIMIT`. The points are the steps of the engine's enum; a step cannot be without one, since the host
//! passes the enum's value at every entry.
//!
//! Invariant: without the variable nothing happens and nothing is read after the first look.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use whimbrel_wire::peer::migrate::{Side, Step};

/// Nobody is held for longer than this.
const HOLD_LIMIT: Duration = Duration::from_secs(120);

struct Armed {
    side: Side,
    step: Step,
    action: Action,
}

enum Action {
    Abort,
    Hold(PathBuf),
}

fn armed() -> Option<&'static Armed> {
    static ARMED: OnceLock<Option<Armed>> = OnceLock::new();
    ARMED
        .get_or_init(|| {
            let text = std::env::var("WHIMBREL_FAILPOINT").ok()?;
            let parsed = parse(&text);
            if parsed.is_none() {
                tracing::warn!(
                    text,
                    "WHIMBREL_FAILPOINT is not SIDE:STEP:abort or SIDE:STEP:hold=DIR; ignored"
                );
            }
            parsed
        })
        .as_ref()
}

fn parse(text: &str) -> Option<Armed> {
    let mut parts = text.splitn(3, ':');
    let side = parts.next()?;
    let side = Side::ALL.iter().copied().find(|known| known.as_str() == side)?;
    let step = parts.next()?.parse().ok()?;
    let action = match parts.next()? {
        "abort" => Action::Abort,
        action => Action::Hold(PathBuf::from(action.strip_prefix("hold=")?)),
    };
    Some(Armed { side, step, action })
}

/// Called by `side` when it enters `step`.
pub async fn reach(side: Side, step: Step) {
    let Some(armed) = armed().filter(|armed| armed.side == side && armed.step == step) else { return };
    match &armed.action {
        Action::Abort => std::process::abort(),
        Action::Hold(dir) => {
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
                let armed = parse(&format!("{side}:{step}:hold=/x:y")).unwrap();
                assert!(armed.side == *side && armed.step == *step);
                assert!(matches!(armed.action, Action::Hold(dir) if dir == std::path::Path::new("/x:y")));
                assert!(parse(&format!("{side}:{step}:abort")).is_some());
            }
        }
        assert!(parse("source:jump:abort").is_none());
    }
}
