//! What the tests speak with: the laptop, the cluster, the shop.
//!
//! Nothing here links forkd's own code but names of its API: everything goes through the binaries, as it does for a user.

pub mod cluster;
pub mod install;
pub mod laptop;
pub mod process;
pub mod shop;
pub mod test;
pub mod wait;

pub use laptop::Laptop;
pub use process::{Output, Process};
pub use shop::{Line, inside};
pub use test::{on_laptop, on_two_laptops};
pub use wait::eventually;
