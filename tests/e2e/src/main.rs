//! forkd, end to end, on a real cluster: through its binary, as its users meet it. Run by `tests/e2e/run`.
//!
//! Every test starts from a laptop and a cluster without any trace of a session and must end so. Waiting is for
//! conditions; nothing here claims how long something takes, but where an error must come at once.

mod command;
mod faults;
mod forks;
mod harness;
mod install;
mod intercept;
mod output;
mod protocols;
mod raw;
mod refusals;
mod rights;
mod session;
