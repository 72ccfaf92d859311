//! Charter pending.
fn main() {}
