//! Which role may call which method: the one table.
//!
//! Invariants: what stands in no rule is refused to everybody; an exact name wins over its area. A role says what
//! kind of peer calls, nothing more: whether *this* host may act on *this* object is checked where the object is
//! (rights, entitlement).
//!
//! Not here: how a role is proven (`host::link`), what a method does (`wire::peer`).

use whimbrel_wire::Role;

const HOST: &[Role] = &[Role::Host];
const ALL: &[Role] = &Role::ALL;
const MANAGE: &[Role] = &[Role::Host, Role::Operator];

/// `AREA.*` stands for every method of an area. Streams are methods too, named by their service.
const RULES: &[(&str, &[Role])] = &[
    // Blocks of images and their bitmaps. Guests read datasets only, through an area of their own.
    ("image.*", HOST),
    // A volume's writable layer on its way to another host.
    ("layer.*", HOST),
    // A VM's RAM on its way.
    ("memory.*", HOST),
    // The handover.
    ("migrate.*", HOST),
    // The metadata store, served.
    ("meta.*", HOST),
    // Certificates: everybody renews its own; only hosts forward what others ask for.
    ("cluster.renew", ALL),
    ("cluster.*", HOST),
    // Long work on this host, seen from another.
    ("task.*", MANAGE),
    // A volume shown over NBD on a TCP port, attached.
    ("export.*", MANAGE),
    // Questions about the host itself: versions, free space, prechecks.
    ("host.*", HOST),
];

/// The roles that may call `method`; empty for an unknown one.
pub fn allowed(method: &str) -> &'static [Role] {
    let exact = RULES.iter().find(|(name, _)| *name == method);
    let area = || {
        let (area, verb) = method.split_once('.')?;
        let in_area = |name: &str| name.strip_suffix(".*") == Some(area);
        (!verb.is_empty() && verb != "*").then(|| RULES.iter().find(|(name, _)| in_area(name)))?
    };
    exact.filter(|(name, _)| !name.ends_with('*')).or_else(area).map_or(&[], |(_, roles)| roles)
}

/// Whether a peer of this role may call this method.
pub fn may_call(role: Role, method: &str) -> bool {
    allowed(method).contains(&role)
}

/// Whether a peer of this role may make this request of the remote API. Operators may do everything that is not
/// kept to the local socket; readers look; hosts and guests have methods of their own and need no API.
pub fn may_request(role: Role, http_method: &str) -> bool {
    match role {
        Role::Operator => true,
        Role::Reader => matches!(http_method, "GET" | "HEAD"),
        Role::Host | Role::Guest => false,
    }
}

#[cfg(test)]
mod test {
    use super::*;

    /// What each role may do, written a second time and the other way round.
    #[test]
    fn the_whole_table_stands_as_decided() {
        let host_only = [
            "image.block",
            "image.bitmap",
            "layer.pull",
            "memory.stripe",
            "migrate.prepare",
            "migrate.memory",
            "meta.read",
            "meta.txn",
            "meta.watch",
            "cluster.join",
            "cluster.sign",
            "host.precheck",
        ];
        for method in host_only {
            for role in Role::ALL {
                assert_eq!(may_call(role, method), role == Role::Host, "{role} {method}");
            }
        }
        for role in Role::ALL {
            assert!(may_call(role, "cluster.renew"), "{role} renews its certificate");
            let manages = matches!(role, Role::Host | Role::Operator);
            assert_eq!(may_call(role, "task.show"), manages, "{role} task.show");
            assert_eq!(may_call(role, "export.nbd"), manages, "{role} export.nbd");
        }
        let areas: Vec<_> = RULES.iter().map(|(name, _)| name.split('.').next().unwrap()).collect();
        let decided = ["image", "layer", "memory", "migrate", "meta", "cluster", "task", "export", "host"];
        for area in decided {
            assert!(areas.contains(&area), "{area} has a rule");
        }
        assert!(areas.iter().all(|area| decided.contains(area)), "a new area is decided here too");
    }

    #[test]
    fn what_no_rule_names_is_refused_to_everybody() {
        for method in [
            "",
            ".",
            "*",
            "image",
            "image.",
            "image.*",
            "images.block",
            "x.image.block",
            "cluster.*",
            "Image.block",
        ] {
            for role in Role::ALL {
                assert!(!may_call(role, method), "{role} {method:?}");
            }
        }
    }

    #[test]
    fn a_reader_looks_and_an_operator_acts() {
        for (role, get, post) in [
            (Role::Operator, true, true),
            (Role::Reader, true, false),
            (Role::Host, false, false),
            (Role::Guest, false, false),
        ] {
            assert_eq!(may_request(role, "GET"), get, "{role}");
            for method in ["POST", "PUT", "DELETE", "PATCH", "get"] {
                assert_eq!(may_request(role, method), post, "{role} {method}");
            }
        }
    }
}
