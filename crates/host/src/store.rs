//! Images on this host: publish, cache, read, verify, scrub, collect.
