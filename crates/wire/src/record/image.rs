//! Images at rest: manifest, packs, and the cache's files.
