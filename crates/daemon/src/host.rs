//! Changes to this machine, each a guard: made by `apply`, undone when dropped. Used by the privileged helper only.

pub mod link;
pub mod netlink;
pub mod resolved;
pub mod resolver;
