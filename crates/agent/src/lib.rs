//! forkd in the cluster: agent, gateway, relay and controller.

pub mod controller;
pub mod dial;
pub mod dns;
pub mod environment;
pub mod laptops;
pub mod link;
mod netlink;
pub mod nft;
pub mod older;
pub mod pod;
pub mod proxy;
pub mod relay;
pub mod serve;
