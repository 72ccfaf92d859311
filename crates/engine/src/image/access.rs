//! Which hosts may read which image.
//!
//! An image belongs to a domain (a tenant) or to the default one; a host serves the domains in its record. Blocks are
//! asked for by image, so this one check stands before every block, bitmap and manifest a host gives away.

use whimbrel_wire::Name;

/// The domain of images and hosts that name none.
pub const DEFAULT_DOMAIN: &str = "default";

/// Whether a host that serves `domains` may read an image of `domain`.
pub fn may_read(domains: &[Name], domain: Option<&Name>) -> bool {
    let wanted = domain.map_or(DEFAULT_DOMAIN, Name::as_str);
    if domains.is_empty() {
        return wanted == DEFAULT_DOMAIN;
    }
    domains.iter().any(|served| served.as_str() == wanted)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_host_reads_its_own_domains_only() {
        let name = |text: &str| text.parse::<Name>().unwrap();
        assert!(may_read(&[], None));
        assert!(may_read(&[], Some(&name("default"))));
        assert!(!may_read(&[], Some(&name("red"))));
        assert!(!may_read(&[name("red")], None), "a tenant's host does not read the default domain");
        assert!(may_read(&[name("red"), name("default")], None));
        assert!(may_read(&[name("red")], Some(&name("red"))));
        assert!(!may_read(&[name("red")], Some(&name("blue"))));
    }
}
