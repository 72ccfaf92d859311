//! The host agent: starts everything, stops everything, serves the API.

use std::path::Path;

use crate::config::Config;

/// Runs the agent until it is told to stop.
pub async fn run(file: Option<&Path>, _socket: &Path) -> anyhow::Result<()> {
    let _config = Config::load(file)?;
    Ok(())
}
