//! `whimbrel cluster …`, `whimbrel host …` and `whimbrel link …`.

use clap::Subcommand;
use whimbrel_wire::HostId;
use whimbrel_wire::api::{ClusterInit, Host, HostDrain, HostJoin, Link, Token, TokenMake};
use whimbrel_wire::meta::{Pressure, Space};
use whimbrel_wire::size::show_bytes;

use super::Context;
use super::show::{fields, table};

/// `whimbrel cluster …`
#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// Make a cluster with this host as its first member; it keeps the certificate authority.
    Init {
        /// The cluster's name.
        #[arg(long, default_value = "whimbrel")]
        name: String,
        /// Where images are published unless told otherwise: a directory, s3://BUCKET/PREFIX or https://….
        #[arg(long, value_name = "URL")]
        store: Option<String>,
    },
    /// Make a token that lets one host join, once, within an hour.
    Token {
        /// Role of the certificate it buys: host, operator, reader or guest.
        #[arg(long, default_value = "host")]
        role: String,
    },
}

/// `whimbrel host …`
#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// Join the cluster that the member at ADDR belongs to.
    Join {
        /// IP:PORT of a member.
        addr: String,
        /// From `whimbrel cluster token`.
        #[arg(long, value_name = "T")]
        token: String,
    },
    /// All hosts.
    List,
    /// One host.
    Show {
        /// Its name.
        name: HostId,
    },
    /// Refuse new VMs there.
    Drain {
        /// Its name.
        name: HostId,
        /// Take VMs again.
        #[arg(long)]
        undo: bool,
    },
    /// Revoke a host's certificate. Its VMs keep their rights until `vm recover`.
    Remove {
        /// Its name.
        name: HostId,
    },
}

/// `whimbrel link …`
#[derive(Debug, Subcommand)]
pub enum LinkCommand {
    /// Connections to other hosts.
    List,
    /// The connection to one host.
    Show {
        /// Its name.
        name: HostId,
    },
}

/// Carries out a command.
pub async fn run_cluster(context: &Context, command: ClusterCommand) -> anyhow::Result<()> {
    match command {
        ClusterCommand::Init { name, store } => {
            let host: Host =
                context.client.post("/v1/cluster", &ClusterInit { name: name.parse()?, store }).await?;
            context.print(&host, |host| {
                format!("cluster {name} made; this host is {}\nnext: `whimbrel cluster token` for each further host", host.name)
            })
        }
        ClusterCommand::Token { role } => {
            let token: Token =
                context.client.post("/v1/cluster/token", &TokenMake { role: role.parse()? }).await?;
            context.print(&token, |token| token.token.clone())
        }
    }
}

/// Carries out a command.
pub async fn run_host(context: &Context, command: HostCommand) -> anyhow::Result<()> {
    match command {
        HostCommand::Join { addr, token } => {
            let host: Host =
                context.client.post("/v1/hosts/join", &HostJoin { address: addr, token }).await?;
            context.print(&host, |host| format!("joined as {}", host.name))
        }
        HostCommand::List => {
            let hosts: Vec<Host> = context.client.get("/v1/hosts").await?;
            context.print(&hosts, |hosts| {
                let rows: Vec<Vec<String>> = hosts
                    .iter()
                    .map(|host| {
                        vec![
                            host.name.to_string(),
                            host.role.to_string(),
                            host.state.clone(),
                            host.addresses.join(" "),
                            host.space.map_or_else(|| "-".into(), free),
                            host.platform.clone(),
                        ]
                    })
                    .collect();
                table(&["NAME", "ROLE", "STATE", "ADDRESSES", "FREE", "PLATFORM"], &rows)
            })
        }
        HostCommand::Show { name } => {
            let host: Host = context.client.get(&format!("/v1/hosts/{name}")).await?;
            context.print(&host, describe)
        }
        HostCommand::Drain { name, undo } => {
            let host: Host = context
                .client
                .post(&format!("/v1/hosts/{name}/drain"), &HostDrain { draining: !undo })
                .await?;
            context.print(&host, describe)
        }
        HostCommand::Remove { name } => {
            let host: Host = context.client.delete(&format!("/v1/hosts/{name}")).await?;
            context.print(&host, |host| format!("{} removed: its certificate is no longer good", host.name))
        }
    }
}

/// Carries out a command.
pub async fn run_link(context: &Context, command: LinkCommand) -> anyhow::Result<()> {
    match command {
        LinkCommand::List => {
            let links: Vec<Link> = context.client.get("/v1/links").await?;
            context.print(&links, |links| {
                let rows: Vec<Vec<String>> = links
                    .iter()
                    .map(|link| {
                        vec![
                            link.host.to_string(),
                            link.state.clone(),
                            link.address.clone(),
                            show_bytes(link.sent_bytes),
                            show_bytes(link.received_bytes),
                        ]
                    })
                    .collect();
                table(&["HOST", "STATE", "ADDRESS", "SENT", "RECEIVED"], &rows)
            })
        }
        LinkCommand::Show { name } => {
            let link: Link = context.client.get(&format!("/v1/links/{name}")).await?;
            context.print(&link, |link| {
                fields(&[
                    ("host", link.host.to_string()),
                    ("state", link.state.clone()),
                    ("address", link.address.clone()),
                    ("silent", link.silent_ms.map_or_else(|| "-".into(), |ms| format!("{ms} ms"))),
                    ("sent", show_bytes(link.sent_bytes)),
                    ("received", show_bytes(link.received_bytes)),
                ])
            })
        }
    }
}

fn describe(host: &Host) -> String {
    fields(&[
        ("host", host.name.to_string()),
        ("role", host.role.to_string()),
        ("state", host.state.clone()),
        ("addresses", host.addresses.join(" ")),
        ("version", host.version.clone()),
        ("platform", host.platform.clone()),
        ("space", host.space.map_or_else(|| "-".into(), space)),
    ])
}

/// What is free for volumes, in few words.
fn free(space: Space) -> String {
    match space.pressure {
        Pressure::Ample => show_bytes(space.free_bytes),
        short => format!("{} ({})", show_bytes(space.free_bytes), short.as_str()),
    }
}

fn space(space: Space) -> String {
    let soon = match space.full_in_s {
        Some(left_s) if space.pressure != Pressure::Ample => {
            format!("; full in {} min at this rate", left_s / 60)
        }
        _ => String::new(),
    };
    format!(
        "{} free of {}, {} promised to volumes: {}{soon}",
        show_bytes(space.free_bytes),
        show_bytes(space.total_bytes),
        show_bytes(space.promised_bytes),
        space.pressure.as_str()
    )
}
