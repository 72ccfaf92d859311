//! Images: where each block is read from.
//!
//! ```text
//! read.rs    one block from local cache, peers, seed: the state machine      swarm.rs   who else has the image, and what
//! home.rs    which host fetches a block that nobody has yet                  fill.rs    the order of background fetches
//! access.rs  which hosts may have it
//! ```

pub mod access;
pub mod fill;
pub mod home;
pub mod read;
pub mod swarm;
