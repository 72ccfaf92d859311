//! `whimbrel task …`, and waiting for the work that other commands start.

use std::time::Duration;

use clap::Subcommand;
use whimbrel_wire::api::{Task, TaskLimit, TaskStarted, TaskState};
use whimbrel_wire::size::{parse_rate_bytes_s, show_bytes};
use whimbrel_wire::{ErrorKind, HostId, WireError};

use super::Context;
use super::show::{Progress, fields, table};

/// The commands.
#[derive(Debug, Subcommand)]
pub enum TaskCommand {
    /// All work of this host, oldest first.
    List,
    /// One task.
    Show {
        /// Its number.
        id: u64,
        /// The host that runs it, if it is another one.
        #[arg(long)]
        host: Option<HostId>,
    },
    /// Follow a task until it ends.
    Watch {
        /// Its number.
        id: u64,
        /// The host that runs it, if it is another one.
        #[arg(long)]
        host: Option<HostId>,
    },
    /// Limit what a move sends from now on; without --bandwidth it is not limited any more. The time for which its VM
    /// stands still is not made longer by a limit.
    Limit {
        /// Its number.
        id: u64,
        /// Most of the link to use, like 1Gbit.
        #[arg(long, value_name = "RATE", value_parser = parse_rate_bytes_s)]
        bandwidth: Option<u64>,
        /// The host that runs it, if it is another one.
        #[arg(long)]
        host: Option<HostId>,
    },
    /// Ask a task to stop and undo what it did.
    Cancel {
        /// Its number.
        id: u64,
        /// The host that runs it, if it is another one.
        #[arg(long)]
        host: Option<HostId>,
    },
}

/// Carries out a command.
pub async fn run(context: &Context, command: TaskCommand) -> anyhow::Result<()> {
    match command {
        TaskCommand::List => {
            let tasks: Vec<Task> = context.client.get("/v1/tasks").await?;
            context.print(&tasks, |tasks| {
                let rows: Vec<Vec<String>> = tasks.iter().map(row).collect();
                table(&["ID", "KIND", "OBJECT", "STATE", "PHASE", "DONE", "OF", "WAITING FOR"], &rows)
            })
        }
        TaskCommand::Show { id, host } => {
            let task: Task = context.client.get(&path(id, "", host.as_ref())).await?;
            context.print(&task, describe)
        }
        TaskCommand::Watch { id, host } => follow(context, id, host.as_ref(), false).await,
        TaskCommand::Limit { id, bandwidth, host } => {
            let body = TaskLimit { bandwidth_bytes_s: bandwidth };
            let task: Task = context.client.post(&path(id, "/limit", host.as_ref()), &body).await?;
            context.print(&task, describe)
        }
        TaskCommand::Cancel { id, host } => {
            let _: Task = context.client.post(&path(id, "/cancel", host.as_ref()), &()).await?;
            follow_quietly(context, id, host.as_ref()).await
        }
    }
}

fn path(id: u64, action: &str, host: Option<&HostId>) -> String {
    let query = host.map(|host| format!("?host={host}")).unwrap_or_default();
    format!("/v1/tasks/{id}{action}{query}")
}

fn name_of<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

fn row(task: &Task) -> Vec<String> {
    vec![
        task.id.to_string(),
        name_of(&task.kind),
        task.object.clone(),
        name_of(&task.state),
        task.phase.clone(),
        show_bytes(task.done_bytes),
        show_bytes(task.total_bytes),
        task.waiting_for.clone().unwrap_or_default(),
    ]
}

/// A task for people.
fn describe(task: &Task) -> String {
    let mut pairs = vec![
        ("task", task.id.to_string()),
        ("kind", name_of(&task.kind)),
        ("object", task.object.clone()),
        ("state", name_of(&task.state)),
        ("phase", task.phase.clone()),
        ("done", format!("{} of {}", show_bytes(task.done_bytes), show_bytes(task.total_bytes))),
        ("on the wire", show_bytes(task.wire_bytes)),
    ];
    if let Some(downtime_ms) = task.downtime_ms {
        pairs.push(("downtime", format!("{downtime_ms:.1} ms")));
    }
    if let Some(waiting_for) = &task.waiting_for {
        pairs.push(("waiting for", waiting_for.clone()));
    }
    if let Some(error) = &task.error {
        pairs.push(("error", error.to_string()));
    }
    for note in &task.notes {
        pairs.push(("note", note.clone()));
    }
    let figures: Vec<(&str, String)> =
        task.figures.iter().map(|(name, value)| (name.as_str(), format!("{value:.1}"))).collect();
    fields(&pairs) + &fields(&figures)
}

/// Between two looks at a task's progress.
const POLL: Duration = Duration::from_millis(200);

/// Waits for the work that a command started (unless asked not to), and prints how it ended. Ctrl-C cancels it.
pub async fn wait_for(context: &Context, started: &TaskStarted, no_wait: bool) -> anyhow::Result<()> {
    if no_wait {
        return context.print(started, |started| format!("task {}", started.task));
    }
    follow(context, started.task, Some(&started.host), true).await
}

async fn follow(
    context: &Context,
    id: u64,
    host: Option<&HostId>,
    cancel_on_interrupt: bool,
) -> anyhow::Result<()> {
    let mut progress = Progress::default();
    let mut interrupted = false;
    let task = loop {
        let task: Task = context.client.get(&path(id, "", host)).await?;
        if task.state.is_final() {
            break task;
        }
        progress.show(&task);
        tokio::select! {
            () = tokio::time::sleep(POLL) => {}
            _ = tokio::signal::ctrl_c() => {
                progress.finish();
                if interrupted || !cancel_on_interrupt {
                    return Err(WireError::new(ErrorKind::Cancelled, format!("watch task {id}: interrupted")).into());
                }
                interrupted = true;
                eprintln!("cancelling task {id} (interrupt again to leave it to itself)");
                let _: Task = context.client.post(&path(id, "/cancel", host), &()).await?;
            }
        }
    };
    progress.finish();
    end(context, task)
}

async fn follow_quietly(context: &Context, id: u64, host: Option<&HostId>) -> anyhow::Result<()> {
    loop {
        let task: Task = context.client.get(&path(id, "", host)).await?;
        if task.state.is_final() {
            return context.print(&task, describe);
        }
        tokio::time::sleep(POLL).await;
    }
}

fn end(context: &Context, task: Task) -> anyhow::Result<()> {
    context.print(&task, describe)?;
    match (task.state, task.error) {
        (TaskState::Done, _) => Ok(()),
        (_, Some(error)) => Err(error.into()),
        (_, None) => Err(WireError::new(ErrorKind::Internal, format!("finish task {}", task.id)).into()),
    }
}
