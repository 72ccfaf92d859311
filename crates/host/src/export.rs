//! Volumes shown to guests and tools: vhost-user-blk and NBD.
