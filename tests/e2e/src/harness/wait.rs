//! Waiting for a condition, never for time.

use std::thread::sleep;
use std::time::{Duration, Instant};

/// The bound for what takes a second or two on an idle machine: two busy cores may need ten times that.
pub const SOON: Duration = Duration::from_secs(40);
/// Between two looks: short beside anything that is waited for.
const BETWEEN: Duration = Duration::from_millis(100);

/// Looks until `probe` gives a value; its last complaint is what the panic says.
#[track_caller]
pub fn eventually<T>(what: &str, mut probe: impl FnMut() -> Result<T, String>) -> T {
    let begin = Instant::now();
    loop {
        match probe() {
            Ok(value) => return value,
            Err(why) if begin.elapsed() > SOON => {
                panic!("waited {} s in vain until {what}: {why}", SOON.as_secs())
            }
            Err(_) => sleep(BETWEEN),
        }
    }
}

/// `Ok` when the condition holds, for [`eventually`].
pub fn so(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise()) }
}
