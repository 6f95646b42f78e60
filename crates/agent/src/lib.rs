//! forkd in the cluster: agent, gateway, relay and controller.

mod netlink;
pub mod nft;
pub mod proxy;
